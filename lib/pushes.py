"""Tables of the chapter negative_gradient, from result tables and the exact results of `optima`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lib import methods, optima, stats, tables
from lib.bandit.reference import histogram

Lines = Mapping[str, pd.DataFrame]  # label -> rows of one setting, one run per seed


def ends(rows: Mapping[str, Lines]) -> pd.DataFrame:
    """Where every method ends, with 95% intervals. Args: rows: reward -> title -> rows."""
    found = []
    for reward, lines in rows.items():
        for title, table in lines.items():
            found.append({
                "reward": reward, "method": title, "learning rate": _rate(table),
                "final reward": _mean(table, "final reward"),
                "final KL, nats": _mean(table, "final KL to reference", 1),
                "reward at 10 nats": _mean(table, "reward at 10 nats"),
                "seeds": table["seed"].nunique(),
            })  # fmt: skip
    return pd.DataFrame(found)


def _rate(table: pd.DataFrame) -> str:
    return tables.rate_text(float(table["learning_rate"].iloc[0]))


def _mean(table: pd.DataFrame, statistic: str, digits: int = 2) -> str:
    return tables.interval_text(stats.per_run(table, statistic), digits=digits)


def reached(rows: Mapping[str, Lines], exact: pd.DataFrame) -> pd.DataFrame:
    """What each loss asks for (`optima.optima`) beside what its runs reached.

    Methods without an optimum in `exact` have "none" there.
    """
    by_title = exact.assign(title=[methods.get(m).title for m in exact["method"]])
    by_title = by_title.set_index(["reward_function", "title"])
    found = []
    for reward, lines in rows.items():
        for title, table in lines.items():
            known = (reward, title) in by_title.index
            best = by_title.loc[(reward, title)] if known else None
            found.append({
                "reward": reward, "method": title,
                "reward, asked for": f"{best['reward']:.2f}" if known else "none",
                "reward, reached": _mean(table, "final reward"),
                "KL, asked for": f"{best['kl']:.1f}" if known else "none",
                "KL, reached": _mean(table, "final KL to reference", 1),
            })  # fmt: skip
    return pd.DataFrame(found)


def pushed_up(betas: Sequence[float]) -> pd.DataFrame:
    """Tokens whose win ratio is above the break-even, and the reference's mass on them."""
    found = []
    for reward in ("R1", "R2"):
        ratio = optima.win_ratio(reward)
        for beta in betas:
            bar = optima.break_even(beta)
            up = np.flatnonzero(ratio > bar)
            found.append({
                "reward": reward, "beta": beta, "break-even": bar, "largest win ratio": ratio.max(),
                "tokens pushed up": f"{up[0]} to {up[-1]}" if len(up) else "none",
                "share of the reference's tokens": histogram()[up].sum(),
            })  # fmt: skip
    return pd.DataFrame(found)


def chosen_terms(dial: Mapping[str, Mapping[float, pd.DataFrame]]) -> pd.DataFrame:
    """The terms of `moves` at the end, and the training loss beside the least it can be.

    Args: dial: reward -> number of prompts -> rows.
    """
    found = []
    for reward, parts in dial.items():
        for prompts, table in parts.items():
            terms, last = moves(table), _last(table)
            found.append({
                "reward": reward, "prompts": f"{prompts:g}", "IPO's loss": last["loss"].mean(),
                "least possible": optima.ipo_floor(int(last["completions"].iloc[0])),
                "KL(ref, policy)": terms["forward_kl"].mean(), "gap": terms["margin"].mean(),
                "y_w, fresh": terms["chosen"].mean(),
                "y_w, trained": last["chosen_logratio"].mean(),
                "y_l, trained": last["rejected_logratio"].mean(),
            })  # fmt: skip
    return pd.DataFrame(found)


def moves(rows: pd.DataFrame) -> pd.DataFrame:
    """What the held-out log-ratios say at the end of each run, in nats.

    For answers drawn from pi_ref, the mean of log pi - log pi_ref is -KL(pi_ref || pi); a run's
    held-out pairs are such draws (of prompts not trained on, unless all 100 are). Hence
    chosen = margin (N - 1) / N - KL(pi_ref || pi).
    Returns: one row per run: seed, forward_kl, margin, chosen; empty where held-out pairs were not
        followed.
    """
    columns = ["held_out_chosen_logratio", "held_out_rejected_logratio"]
    last = _last(rows)
    last = last.reindex(columns=[*last.columns.union(columns)]).dropna(subset=columns)
    chosen, rejected = (last[c] for c in columns)
    n = last["completions"]
    return pd.DataFrame({
        "seed": last["seed"], "forward_kl": -(chosen + (n - 1) * rejected) / n,
        "margin": chosen - rejected, "chosen": chosen,
    })  # fmt: skip


def _last(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["update"] == rows["update"].max()]


def by_rate(rows: pd.DataFrame) -> pd.DataFrame:
    """The end of every run of a sweep, its learning rate in place of the update.

    So that a drawing of curves connects what one method reaches at each of its rates.
    """
    last = _last(rows)
    return last.assign(update=last["learning_rate"])


def exact_numbers() -> dict[str, str]:
    """Exact results that the prose quotes, by the name it quotes them under."""
    moves, found = optima.ipo_moves(), {}
    for reward in ("R1", "R2"):
        for n in (10, 100):
            found[f"best_of_{n}_{reward}"] = f"{optima.best_of(n, reward):.2f}"
        found[f"uniform_{reward}"] = f"{optima.uniform_reward(reward, 50, 99):.2f}"
        found[f"reference_{reward}"] = f"{optima.best_of(1, reward):.2f}"
    found |= {f"ipo_{name}": f"{value:.1f}" for name, value in moves.items()}
    return found


def last_mean(lines: Lines, column: str, digits: int = 1) -> str:
    """A column's mean over the ends of the runs of the one setting in `lines`, or "-" if none."""
    return "-" if not lines else f"{_last(next(iter(lines.values())))[column].mean():.{digits}f}"


def low_runs(lines: Lines) -> str:
    """How many runs of the one setting in `lines` end below reward 0.1: "3 of 20"."""
    if not lines:
        return "-"
    finals = stats.per_run(next(iter(lines.values())), "final reward")
    return f"{(finals < 0.1).sum()} of {len(finals)}"
