"""What tests/lm/test_parallel.py compares: `python -m tests.lm_parallel FOLDER`, under torchrun."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from lib.lm import parallel
from lib.lm.config import length_run
from lib.lm.engine import LengthEngine
from lib.lm.problem import LengthProblem
from lib.lm.run import Silent

# Prompts of an evaluation: odd, and fewer than processes
METHODS = {"dpo": 7, "ppo_token": 1, "dpo_offline": 7, "best_of_n": 1}


def problem_of(method: str, prompts: int, folder: Path) -> LengthProblem:
    return LengthProblem(
        length_run(method, "min", 1e-2, 0, updates=4, batch=8, minibatch=8, inner_steps=2,
                   max_tokens=12, prompts=prompts, evaluations=2, prepared=str(folder))
    )  # fmt: skip


def compute(folder: Path) -> None:
    """First sampling and result table of a few updates of each method, a file for each process."""
    index, count = parallel.place()
    for name, prompts in METHODS.items():
        problem = problem_of(name, prompts, folder)
        state = problem.initial_state()
        state.behaviour = state.policy
        first = problem.collect(state, problem.method)
        names = ("completions", "mask", "logp", "rewards", "scale")
        out = folder / f"{count}-{name}-{index}"
        torch.save({name: getattr(first, name) for name in names}, out.with_suffix(".pt"))
        (table,) = LengthEngine().run([problem.config], Silent(Path(), {}))
        table.to_parquet(out.with_suffix(".parquet"))
    _tied(folder / f"{count}-tied-{index}.pt", problem_of("dpo", 4, folder))


def _tied(out: Path, problem: LengthProblem) -> None:
    """The policy after an update on pairs, and after one more on which all are tied."""
    state, method, hyper = problem.initial_state(), problem.method, problem.config.hyper
    state.behaviour = state.policy
    pairs = problem.collect(state, method)
    ties = replace(pairs, rewards=torch.zeros_like(pairs.rewards))
    after = []
    for batch in (pairs, ties):
        batch = batch.labelled(method.prepare(batch, hyper))
        state.policy.update(batch, method, hyper, method.items(batch))
        after.append(torch.cat([p.detach().flatten() for p in state.policy.parameters]))
    torch.save(after, out)


if __name__ == "__main__":
    process = parallel.start(cpu=True)
    compute(Path(sys.argv[1]))
    process.end_training()
