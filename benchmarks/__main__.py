"""`python -m benchmarks [--quick] [word ...]`: the benchmarks whose name contains one of the words.

Prints one line for each: name, ratio to its named baseline, times, threads, what limits it. The
lines go to _build/benchmarks.json as well, after every one of them, with the machine, the versions
and the commit. The word "cuda" stands for all that need a GPU; without one they are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import torch  # noqa: E402

from benchmarks import Unmeasured, bandit, cuda, lm, store  # noqa: E402
from lib.commands import until_stopped  # noqa: E402
from lib.runs import ROOT, check_writable, environment, provenance, write_atomically  # noqa: E402

OUTPUT = ROOT / "_build" / "benchmarks.json"
BENCHMARKS = {**bandit.BENCHMARKS, **lm.BENCHMARKS, **cuda.BENCHMARKS, **store.BENCHMARKS}


def arguments() -> argparse.Namespace:
    """The command line. Exits, naming what is allowed, for a word that is part of no name and an
    output that cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("words", nargs="*", help=f"parts of names: {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true",
                        help="few repeats: two minutes in all, and five or more for each lm/")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes")
    args = parser.parse_args()
    for word in args.words:
        if not any(word in name for name in BENCHMARKS):
            parser.error(f"no benchmark is called {word!r}; there are {', '.join(BENCHMARKS)}")
    if args.output.suffix != ".json":
        parser.error(f"--output {args.output}: the results are JSON, name it *.json")
    try:
        check_writable(f"--output {args.output}", args.output.parent)
    except OSError as error:
        parser.error(str(error))
    return args


def save(path: Path, quick: bool, lines: list[dict]) -> None:
    """The results with where they come from, as JSON."""
    device = "cuda" if any("/cuda" in line["name"] and "ratio" in line for line in lines) else "cpu"
    about = {**environment(device, "float32"), "commit": provenance.commit(),
             "time": provenance.now(), "quick": quick, "cores": os.cpu_count(),
             "load": os.getloadavg()[0]}  # fmt: skip
    text = json.dumps({"environment": about, "results": lines}, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n"))


def main() -> int:
    """Runs what was asked for; 1 if a benchmark found something wrong."""
    args = arguments()
    chosen = [name for name in BENCHMARKS if not args.words or any(w in name for w in args.words)]
    torch.set_num_threads(1)
    effort = bandit.QUICK if args.quick else bandit.FULL
    lines, failed = [], False
    if os.getloadavg()[0] > 0.5:
        print(f"note: other work is running (load {os.getloadavg()[0]:.1f}); times are unreliable")
    for name in chosen:
        try:
            for result in BENCHMARKS[name](effort):
                print(result, flush=True)
                lines.append(asdict(result))
                save(args.output, args.quick, lines)
                failed |= isinstance(result, Unmeasured) and result.failed
        except AssertionError as error:
            line = Unmeasured(name, str(error))
            print(line, flush=True)
            lines.append(asdict(line))
            failed = True
    save(args.output, args.quick, lines)
    return int(failed)


if __name__ == "__main__":
    sys.exit(until_stopped(main, "the lines above are kept"))
