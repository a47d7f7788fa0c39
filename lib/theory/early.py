"""Both objectives under early stopping, over a family of targets that the model can represent.

A target puts `LIKELY` of its mass on k of 10 categories, in equal or random parts; the start is a
Dirichlet draw. Both run gradient descent at one rate. They are compared when each has moved half of
the mass that it has to move, so that the comparison of *where* the mass went needs no common clock.
Chapter: theory.
"""

from __future__ import annotations

from functools import cache

import pandas as pd
import torch
from torch import Tensor

from lib.allowed import one_of
from lib.theory import dynamics

CATEGORIES, LIKELY = 10, 0.95
STARTS = {"flat": 10.0, "uneven": 1.0, "peaked": 0.3}  # concentration of the Dirichlet
COUNTS, HEIGHTS = (2, 3, 5), ("equal", "random")
RATE, STEPS = 0.2, 1500
BLOCK = 200  # targets whose whole paths are held in memory at once (50 MB)
LEFT, AHEAD = 0.25, 0.75  # shares of its way that a category left behind, or ahead, has gone


def start(n: int, concentration: float, generator: torch.Generator) -> Tensor:
    """(n, 10) log-probabilities of a Dirichlet, floored at 1e-12."""
    shape = torch.full((n, CATEGORIES), concentration, dtype=torch.float64)
    drawn = torch._standard_gamma(shape, generator=generator)
    return drawn.clamp(min=1e-12).log().log_softmax(-1)


def target(n: int, count: int, heights: str, generator: torch.Generator) -> Tensor:
    """(n, 10) log-probabilities: 0.95 on the first `count` categories, the rest spread evenly.

    Raises: ValueError if heights is neither "equal" nor "random".
    """
    one_of("heights", heights, HEIGHTS)
    parts = torch.ones(n, count, dtype=torch.float64)
    if heights == "random":
        parts = torch._standard_gamma(2 * parts, generator=generator)
    rest = torch.full((n, CATEGORIES - count), (1 - LIKELY) / (CATEGORIES - count)).double()
    return torch.cat([LIKELY * parts / parts.sum(-1, keepdim=True), rest], -1).log()


def kinds(per: int, seed: int) -> tuple[pd.DataFrame, Tensor, Tensor]:
    """`per` targets of each of the 18 kinds: start, count, heights; log p and log q (n, 10)."""
    generator, names, logs = torch.Generator().manual_seed(seed), [], []
    for name, concentration in STARTS.items():
        for count in COUNTS:
            for heights in HEIGHTS:
                names += [(name, count, heights)] * per
                logs.append((start(per, concentration, generator),
                             target(per, count, heights, generator)))  # fmt: skip
    logp, logq = (torch.cat(side) for side in zip(*logs, strict=True))
    return pd.DataFrame(names, columns=["start", "count", "heights"]), logp, logq


def measured(logp: Tensor, logq: Tensor, likely: Tensor, objective: str) -> pd.DataFrame:
    """One row per target: reached, time, and where its rising likely categories then are.

    Args: likely (n, 10) bool. Columns least, most: the smallest and largest share of its way that
    one of them has gone; NaN if fewer than two of them have to rise.
    """
    path = dynamics.trajectory(logp, logq, objective, RATE, STEPS)
    half = dynamics.halfway(path, logq)
    done, rising = dynamics.progress(half.logp, logp, logq), likely & (logq > logp)
    two = rising.sum(-1) > 1
    least = done.where(rising, torch.inf).amin(-1).where(two, torch.nan)
    most = done.where(rising, -torch.inf).amax(-1).where(two, torch.nan)
    time = (half.steps * RATE).where(half.reached, torch.inf)
    columns = {"reached": half.reached, "time": time, "least": least, "most": most}
    return pd.DataFrame({f"{k}_{objective}": v.numpy() for k, v in columns.items()})


def curves(per: int, seed: int, points: int = 40) -> pd.DataFrame:
    """Distance to the target along whole trajectories, as a share of that at the start.

    Columns: start, objective, time, low, median, high: the middle 80% of the targets.
    """
    names, logp, logq = kinds(per, seed)
    places = torch.logspace(0, torch.log10(torch.tensor(STEPS)).item(), points).long().unique()
    found = []
    for objective in dynamics.OBJECTIVES:
        path = dynamics.trajectory(logp, logq, objective, RATE, STEPS)[places]
        left = dynamics.distance(path, logq) / dynamics.distance(logp, logq)
        for name in STARTS:
            part = left[:, torch.tensor((names["start"] == name).to_numpy())]
            low, median, high = part.quantile(torch.tensor([0.1, 0.5, 0.9]).double(), dim=1)
            found.append(pd.DataFrame({
                "start": name, "objective": objective, "time": places * RATE,
                "low": low, "median": median, "high": high,
            }))  # fmt: skip
    return pd.concat(found, ignore_index=True)


@cache
def family(per: int, seed: int) -> pd.DataFrame:
    """One row per target: its kind, and `measured` for either objective."""
    names, logp, logq = kinds(per, seed)
    likely = torch.arange(CATEGORIES) < torch.tensor(names["count"].to_numpy())[:, None]
    parts = []
    for rows in torch.arange(len(names)).split(BLOCK):
        found = [measured(logp[rows], logq[rows], likely[rows], o) for o in dynamics.OBJECTIVES]
        parts.append(pd.concat(found, axis=1))
    return pd.concat([names, pd.concat(parts, ignore_index=True)], axis=1)


def compared(per: int, seed: int) -> pd.DataFrame:
    """`family` with three comparisons.

    sooner: reverse gets there first. subset_*: a likely category is ahead and another left behind.
    wider: likely categories are further apart under reverse. NaN where not both got there.
    """
    wide = family(per, seed).copy()
    wide["sooner"] = (wide["time_reverse"] < wide["time_forward"]).astype(float)
    both = wide["reached_forward"] & wide["reached_reverse"] & wide["least_forward"].notna()
    for o in dynamics.OBJECTIVES:
        split = (wide[f"least_{o}"] < LEFT) & (wide[f"most_{o}"] > AHEAD)
        wide[f"subset_{o}"] = split.astype(float).where(both)
    spread = {o: wide[f"most_{o}"] - wide[f"least_{o}"] for o in dynamics.OBJECTIVES}
    wide["wider"] = (spread["reverse"] > spread["forward"]).astype(float).where(both)
    return wide


def by_kind(table: pd.DataFrame) -> pd.DataFrame:
    """Shares of targets, and median times, by start and number of likely categories."""
    rows = []
    for (name, count), part in table.groupby(["start", "count"], sort=False):
        rows.append({
            "start": name, "likely categories": count, "targets": len(part),
            "half, forward": part["time_forward"].median(),
            "half, reverse": part["time_reverse"].median(),
            "reverse sooner": part["sooner"].mean(),
            "subset, forward": part["subset_forward"].mean(),
            "subset, reverse": part["subset_reverse"].mean(),
            "wider, reverse": part["wider"].mean(),
        })  # fmt: skip
    return pd.DataFrame(rows)
