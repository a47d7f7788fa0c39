"""How well the reward models of a prepared folder know the gold reward. Chapter: length.

A reward model's score s is the proxy; its only claim is on pairs, P(y is preferred to y') =
sigmoid(s(y) - s(y')), which is what is checked here, on pairs that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import stats as scipy_stats
from scipy.special import expit

from lib import stats
from lib.lengths import TITLES, Prepared, pairs_rollout, rollout
from lib.lm.batches import padded
from lib.lm.length import TASKS
from lib.lm.models import load_reward_model
from lib.lm.reward import RewardModel

# Tokens of gold reward between the two responses of a pair: label -> from, below.
GAPS = {"all": (0, np.inf), "under 6": (0, 6), "6 to 15": (6, 16), "16 to 30": (16, 31),
        "31 and more": (31, np.inf)}  # fmt: skip
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0)  # edges of the calibration's bins
CUTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # tokens that responses are cut to
LONG = 48  # held-out responses at most that are cut
BIN = 8  # tokens of a bin of the responses as they were written


@dataclass(frozen=True)
class Judged:
    """Held-out pairs and what a reward model says of them.

    Args:
        task: of the reward model.
        scores, gold, lengths: (P, 2) each; gold in tokens. All validation pairs, ties included.
    """

    task: str
    scores: np.ndarray
    gold: np.ndarray
    lengths: np.ndarray

    @property
    def untied(self) -> np.ndarray:
        return self.gold[:, 0] != self.gold[:, 1]

    @property
    def gap(self) -> np.ndarray:
        """(U,) gold reward by which the preferred response is better, tokens; untied pairs."""
        return np.abs(np.diff(self.gold[self.untied], axis=1)[:, 0])

    @property
    def margin(self) -> np.ndarray:
        """(U,) score of the preferred response minus that of the other; untied pairs."""
        sign = np.sign(np.diff(self.gold[self.untied], axis=1)[:, 0])
        return sign * np.diff(self.scores[self.untied], axis=1)[:, 0]

    @property
    def right(self) -> np.ndarray:
        """(U,) whether the preferred response has the larger score (an equal one does not)."""
        return self.margin > 0


def model(prepared: Prepared, task: str) -> RewardModel:
    """The reward model of a task."""
    network, _ = load_reward_model(prepared.folder / f"reward-{task}", device=prepared.device)
    return RewardModel(network)


def judged(prepared: Prepared, task: str) -> Judged:
    """The validation pairs of a task, of the task's own distribution, scored."""
    pairs = prepared.data(task).pairs["validation"]
    batch = pairs_rollout(prepared, pairs, torch.arange(len(pairs)))
    scores = model(prepared, task).score(batch).cpu().double().numpy()
    return Judged(task, scores, prepared.gold(task, pairs.lengths), pairs.lengths)


def accuracy(verdicts: Sequence[Judged]) -> pd.DataFrame:
    """Share of held-out pairs that the score orders as the rule does, by difference in gold.

    Columns: task, gap (of `GAPS`), right, low, high (Wilson's 95% interval), n.
    """
    rows = []
    for one in verdicts:
        for label, (low, high) in GAPS.items():
            within = (one.gap >= low) & (one.gap < high)
            hits, count = one.right[within].sum(), within.sum()
            found = stats.share(hits, count) if count else [np.nan] * 3
            rows.append((one.task, label, *found, int(count)))
    return pd.DataFrame(rows, columns=["task", "gap", "right", "low", "high", "n"])


def calibration(verdicts: Sequence[Judged]) -> pd.DataFrame:
    """How often the reward model is right against how sure it is; held-out untied pairs.

    Sure: sigmoid(|s(y) - s(y')|), the probability that it gives its own favourite. Columns: task,
    sure (mean of the bin), right, low, high (Wilson's 95% interval), n; empty bins are left out.
    """
    rows = []
    for one in verdicts:
        sure = expit(np.abs(one.margin))
        bins = np.digitize(sure, CONFIDENCES[1:-1])
        for number in np.unique(bins):
            inside = bins == number
            rows.append((one.task, sure[inside].mean(),
                         *stats.share(one.right[inside].sum(), inside.sum()),
                         int(inside.sum())))  # fmt: skip
    return pd.DataFrame(rows, columns=["task", "sure", "right", "low", "high", "n"])


def summary(verdicts: Sequence[Judged]) -> pd.DataFrame:
    """One row per reward model; the index is the task.

    Columns: accuracy; loss = mean -log sigmoid(margin), nats a pair (chapter length,
    eq-bradley-terry; a coin has ln 2 = 0.69); rank = Spearman's correlation of score and gold over
    the held-out responses; pairs, the untied ones.
    """
    rows = [{
        "task": one.task, "accuracy": one.right.mean(),
        "loss": np.logaddexp(0, -one.margin).mean(),
        "rank": scipy_stats.spearmanr(one.scores.ravel(), one.gold.ravel()).statistic,
        "pairs": len(one.margin),
    } for one in verdicts]  # fmt: skip
    return pd.DataFrame(rows).set_index("task")


def cut_scores(prepared: Prepared, task: str) -> np.ndarray:
    """(responses, len(CUTS)) scores of the same held-out responses, cut to each length.

    Only responses longer than the largest cut (or, where there are few, the longest ones) are
    taken, so that every column is of the same texts; NaN where a cut is no shorter than a text.
    A cut response ends in EOS, as those of the Skew data do.
    """
    data, own = prepared.data("min"), prepared.data("min").pairs["validation"]
    order = np.argsort(-own.lengths[:, 0], kind="stable")[:LONG]
    prompts, prompt_mask = padded([own.prompts[i] for i in order], data.ids.pad, "left",
                                  prepared.device)  # fmt: skip
    cuts = [[[*own.first[i][:cut], data.ids.eos[0]] for cut in CUTS] for i in order]
    ids, mask = padded([row for rows in cuts for row in rows], data.ids.pad, "right",
                       prepared.device)  # fmt: skip
    shape = (len(order), len(CUTS), -1)
    batch = rollout(prompts, prompt_mask, ids.view(shape), mask.view(shape))
    scores = model(prepared, task).score(batch).cpu().double().numpy()
    return np.where(own.lengths[order, :1] > np.array(CUTS)[None], scores, np.nan)


def curve(one: Judged, cuts: np.ndarray) -> pd.DataFrame:
    """Score against length: columns task, kind, length, mean, low, high (95%, of the mean), n.

    kind "cut": the same texts cut to each length (`cut_scores`); kind "own": held-out responses as
    they were written, in bins of 8 tokens.
    """
    rows = []
    for number, cut in enumerate(CUTS):
        values = cuts[~np.isnan(cuts[:, number]), number]
        if len(values) > 1:
            rows.append((one.task, "cut", float(cut), *stats.interval(values), len(values)))
    lengths, scores = one.lengths.ravel(), one.scores.ravel()
    for number in np.unique(lengths // BIN):
        inside = lengths // BIN == number
        if inside.sum() > 1:
            rows.append((one.task, "own", lengths[inside].mean(), *stats.interval(scores[inside]),
                         int(inside.sum())))  # fmt: skip
    return pd.DataFrame(rows, columns=["task", "kind", "length", "mean", "low", "high", "n"])


def resolution(prepared: Prepared, cuts: dict[str, np.ndarray]) -> pd.DataFrame:
    """What a reward model says to the same text at two lengths, neighbours in CUTS.

    Columns: task, short, long, better (the mean probability sigmoid(s - s') that it gives to the
    one that the gold reward prefers; 1/2: equal scores on average), right (of how many texts that
    one has the higher score), n. Pairs of lengths on the two sides of the Mode task's target are
    left out.
    """
    rows = []
    for task, scores in cuts.items():
        for number, (short, long) in enumerate(zip(CUTS[:-1], CUTS[1:], strict=True)):
            if task == "mode" and short < prepared.target < long:
                continue
            gold = prepared.gold(task, np.array([short, long]))
            gaps = (scores[:, number] - scores[:, number + 1]) * np.sign(gold[0] - gold[1])
            gaps = gaps[~np.isnan(gaps)]
            if len(gaps):
                rows.append((task, short, long, float(expit(gaps).mean()), int((gaps > 0).sum()),
                             len(gaps)))  # fmt: skip
    return pd.DataFrame(rows, columns=["task", "short", "long", "better", "right", "n"])


def shown(table: pd.DataFrame, row: str, value: str, digits: int = 2) -> pd.DataFrame:
    """A long table with one column per task, in the order of the rows; intervals if it has them."""

    def cell(entry: pd.Series) -> str:
        text = f"{entry[value]:.{digits}f}"
        if np.isnan(entry[value]):
            return "-"
        if "low" not in entry:
            return text
        return f"{text} ({entry['low']:.{digits}f} to {entry['high']:.{digits}f}), n = {entry['n']}"

    columns = {
        TITLES[task]: table[table["task"] == task].set_index(row).apply(cell, axis=1)
        for task in TASKS if (table["task"] == task).any()
    }  # fmt: skip
    order = list(dict.fromkeys(table[row]))
    found = pd.DataFrame({title: column.reindex(order) for title, column in columns.items()})
    return found.fillna("-").reset_index(names=row)


def resolution_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`resolution` with one column per task."""
    steps = table["short"].astype(str) + " or " + table["long"].astype(str)
    return shown(table.assign(tokens=steps), "tokens", "better")


def numbers(
    prepared: Prepared, verdicts: Sequence[Judged], cuts: dict[str, np.ndarray]
) -> dict[str, float | str]:
    """What the prose quotes, by name; `seen_min_4` is `resolution` at 4 tokens and the next cut,
    `order_min_4` how many texts it puts in the right order there."""
    found: dict[str, float | str] = {}
    for row in resolution(prepared, cuts).itertuples():
        found[f"seen_{row.task}_{row.short}"] = f"{row.better:.2f}"
        found[f"order_{row.task}_{row.short}"] = f"{row.right} of {row.n}"
    right = accuracy(verdicts).set_index(["task", "gap"])
    for task, row in summary(verdicts).iterrows():
        found |= {f"accuracy_{task}": f"{row.accuracy:.2f}", f"rank_{task}": f"{row['rank']:.2f}",
                  f"loss_{task}": f"{row.loss:.2f}"}  # fmt: skip
        found |= {f"close_{task}": f"{right.right[task, 'under 6']:.2f}",
                  f"far_{task}": f"{right.right[task, '31 and more']:.2f}"}  # fmt: skip
    for task, scores in cuts.items():
        means = {cut: column[~np.isnan(column)].mean() for cut, column in
                 zip(CUTS, scores.T, strict=True) if not np.isnan(column).all()}  # fmt: skip
        found[f"favourite_{task}"] = max(means, key=means.get)
    return found
