"""Finished runs of a pilot as one small table: `python data/gpu/collect.py STORE --log LOG ...`.

STORE is the run store, LOG what `lib.publish` printed: how much memory every process had when the
card was full. Writes pilot.parquet and pilot.json beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from lib import experiments
from lib.lm.config import LengthRun
from lib.runs.records import read_record

FOLDER = Path(__file__).resolve().parent
CELL = ["method", "task", "learning_rate", "seed"]


def collected(store: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Every evaluation of every run, but for the seconds: several runs shared the machine.

    Returns: (table, what the runs have in common). Columns: run (its identity), CELL, the other
    fields in which runs differ, and what an evaluation measures.
    """
    found = [read_record(path) for path in sorted(store.glob("records/*/*.parquet"))]
    fields = pd.DataFrame([about["configuration"]["fields"] for _, about in found])
    texts = fields.map(json.dumps)
    varied = [*CELL, *(n for n in fields if n not in CELL and texts[n].nunique() > 1)]
    rows = []
    for (table, about), (_, config) in zip(found, fields[varied].iterrows(), strict=True):
        metrics = table[[c for c in table if not c.startswith("seconds_")]]
        rows.append(pd.DataFrame({"run": about["identity"], **config, **metrics}))
    table = pd.concat(rows, ignore_index=True).sort_values([*CELL, "update"], ignore_index=True)
    first, *others = [about for _, about in found]
    if any(about[n] != first[n] for about in others for n in ("commit", "environment", "code")):
        raise SystemExit(f"{store} holds runs of several commits or machines")
    shared = {n: v for n, v in first["configuration"]["fields"].items() if n not in varied}
    return table, {
        "commit": first["commit"],
        "uncommitted": sorted({name for _, about in found for name in about["dirty"]}),
        "finished": max(about["finished"] for _, about in found),
        "environment": first["environment"], "configuration": shared, "code": first["code"],
    }  # fmt: skip


def absent(table: pd.DataFrame, planned: Iterable[LengthRun]) -> list[dict[str, Any]]:
    """CELL of every planned run that the table lacks."""
    have = table[CELL].drop_duplicates().to_dict("records")
    cells = [{name: getattr(run, name) for name in CELL} for run in planned]
    return [cell for cell in cells if cell not in have]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def memory(log: str) -> dict[str, Any]:
    """GiB from PyTorch's messages that a card is full: of the whole card, of every process by the
    first message, and of PyTorch's tensors in each process that got one."""
    first, *_ = messages = re.findall(r"CUDA out of memory.*", log)
    used = re.findall(r"rocess (?:\d+ )?has ([\d.]+) GiB memory in use", first)
    tensors = [re.search(r"memory ([\d.]+) GiB is allocated by PyTorch", m)[1] for m in messages]
    return {
        "capacity": float(re.search(r"capacity of ([\d.]+) GiB", first)[1]),
        "processes": sorted(map(float, used)),
        "tensors": sorted(map(float, tensors)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True, help="of the prepared folder")
    parser.add_argument("--chapter", default="complementary_length")
    parser.add_argument("--profile", default="gpu")
    parser.add_argument("--jobs", type=int, required=True)
    args = parser.parse_args()
    table, about = collected(args.store)
    planned = experiments.stages(args.chapter, args.profile)[0](None)
    table.to_parquet(FOLDER / "pilot.parquet", index=False)
    about = {
        "command": f".venv/bin/python -m lib.publish {args.chapter} --profile {args.profile} "
                   f"--jobs {args.jobs}",
        "runs": int(table["run"].nunique()), "planned": len(planned),
        "missing": absent(table, planned), "memory_gib": memory(args.log.read_text()),
        "sha256": {"pilot.parquet": sha256(FOLDER / "pilot.parquet"),
                   "pairs.parquet": sha256(args.pairs)}, **about,
    }  # fmt: skip
    (FOLDER / "pilot.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
