"""Records the reference trajectory of the first updates: `python -m tests.record_trajectory`.

Losses and gradient norms of 3 methods x 2 seeds x 10 updates go to tests/data/trajectory.json, with
commit, versions, device and CPU capability. A change of the code that moves them is then seen, and
recording again is a decision: it refuses files that differ from the commit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lib.bandit.config import bandit_run
from lib.bandit.problem import BanditProblem
from lib.finetune import fine_tune
from lib.runs.provenance import commit, environment, uncommitted

FILE = Path(__file__).parent / "data" / "trajectory.json"
METHODS, SEEDS, RATE, UPDATES = ("best_of_n", "reinforce", "ipo_offline"), (0, 1), 0.001, 10
METRICS = ("loss", "grad_norm")


def trajectory(method: str) -> dict[str, list[list[float]]]:
    """{metric: [update][seed]} of the first updates on R1, at the book's size."""
    runs = [bandit_run(method, "R1", RATE, seed) for seed in SEEDS]
    problem, config = BanditProblem(runs), runs[0]
    state = problem.initial_state()
    rows = fine_tune(state, problem, problem.method, config.schedule, config.hyper)
    metrics = [next(rows) for _ in range(UPDATES)]
    return {name: [row[name].tolist() for row in metrics] for name in METRICS}


def main() -> None:
    """Writes the file; exits with 1 and writes nothing if the tree differs from the commit."""
    changed = uncommitted(["lib", "data/bandit", "tests/record_trajectory.py"])
    if changed:
        sys.exit(f"commit first: {', '.join(changed)} would not be in the recorded commit")
    recorded = {
        "commit": commit(),
        **environment("cpu", "float32"),
        "settings": {"seeds": SEEDS, "learning_rate": RATE, "reward_function": "R1"},
        "trajectories": {method: trajectory(method) for method in METHODS},
    }
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{FILE.name}: {len(METHODS)} methods, {UPDATES} updates, commit {recorded['commit']}")


if __name__ == "__main__":
    main()
