"""What the full-scale chapter shows: the judge, the pairs, and what makes y_w fall.

Tables here are made of pairs, a reference policy and result tables; no run is computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
from myst_nb import glue

from lib import stats, tables
from lib.chapter import NOT_RUN, Chapter
from lib.experiments import final
from lib.experiments.full_scale import BATCHED, OFFLINE, ON_POLICY, FullScaleProfile
from lib.lengths import reference_policy
from lib.lm.batches import padded
from lib.lm.config import MINIBATCH, TINY
from lib.lm.full_scale import DATA, KINDS
from lib.lm.gold import as_rollout
from lib.lm.models import load_tokenizer, stored_ids

FACTORS = {"policy": "large policy", "pairs": "much data", "kind": "distinct pairs"}
SCORED = 128  # pairs whose log-probability under the reference policy is shown
ANSWERERS = {"first": "the tiny policy", "second": "the tiny policy", "strong": "SmolLM2"}
OWN_ANSWERERS = {"first": "the policy", "second": "the policy", "strong": "the strong model"}
# Kinds of answers whose names in the shipped table need the row above them: how they are shown.
SPELLED = {
    "its own answer": "own answer", "its first half": "own answer, first half",
    "it, said twice": "own answer, said twice", "its words shuffled": "own answer, words shuffled",
}  # fmt: skip


def calibration(path: Path = DATA / "calibration.parquet") -> pd.DataFrame:
    """Per kind of answer: mean gold reward with its 95% interval, the likelihoods that it is made
    of (nats a token), the share of copied tokens, and how often the prompt's own answer beats it.
    """
    table = pd.read_parquet(path)
    full = table["answer"].iloc[0]
    own = table[table["answer"] == full].set_index("prompt")["score"]
    rows = []
    for name, part in table.groupby("answer", sort=False):
        better = own.loc[part["prompt"]].to_numpy() > part["score"].to_numpy()
        mean, low, high = stats.interval(part["score"])
        rows.append({
            "answer": SPELLED.get(name, name), "effect": mean, "low": low, "high": high,
            "n": len(part),
            "given": part["given"].mean(), "without": part["without"].mean(),
            "copied": part["copied"].mean(),
            "loses to own answer": float("nan") if name == full else better.mean(),
        })  # fmt: skip
    found = pd.DataFrame(rows).sort_values("effect", ascending=False, ignore_index=True)
    return found.rename(columns={"answer": "label"})


def shipped(kind: str, folder: Path = DATA) -> pd.DataFrame:
    """The pairs of a kind with their gold rewards: a row a pair, the preferred response first."""
    return pd.read_parquet(folder / f"{kind}.parquet")


class Reference:
    """The base policy of a chapter's runs and the folder of their pairs: the shipped ones, unless
    `prepared` names a folder that is here."""

    def __init__(self, chapter: Chapter):
        run = chapter.settings()[0].run(chapter.profile, 0.1, 0)
        here = run.policy_folder.is_dir()  # published runs may be of pairs that lie elsewhere
        self.folder, source = (run.folder, run.policy_folder) if here else (DATA, TINY / "policy")
        self.tokenizer, _ = load_tokenizer(source)
        self.policy = reference_policy(source, stored_ids(self.tokenizer, source))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if (self.folder / f"{kind}.parquet").exists()]


def pairs_table(reference: Reference) -> pd.DataFrame:
    """Per kind of pair: how many, who wrote what is preferred, how far the two are apart in gold
    reward, and log pi_ref of either, nats a token: how near they lie to the policy. Pairs that were
    read have neither writer nor gold reward.
    """
    rows, names = [], ANSWERERS if reference.folder == DATA else OWN_ANSWERERS
    for kind in reference.kinds:
        table = shipped(kind, reference.folder)
        train = table[table["split"] == "train"]
        row = {"pairs": kind, "to train on": len(train), "held out": len(table) - len(train)}
        if "gold_first" in train:
            wrote = train["answerer"].map(names).value_counts(normalize=True)
            gap = train["gold_first"] - train["gold_second"]
            row |= {"preferred is by": f"{wrote.index[0]} ({wrote.iloc[0]:.0%})",
                    "gold reward of y_w": train["gold_first"].mean(),
                    "gold reward of y_l": train["gold_second"].mean(),
                    "median gap": gap.median()}  # fmt: skip
        sides = {"w": "first", "l": "second"}
        rows.append(row | {f"log pi_ref of y_{y}": density(reference, train, side)
                           for y, side in sides.items()})  # fmt: skip
    return pd.DataFrame(rows)


def held_out(kind: str, folder: Path = DATA) -> pd.DataFrame:
    """The pairs of a kind that nobody trains on."""
    table = shipped(kind, folder)
    return table[table["split"] == "validation"]


def shared(kind: str, folder: Path = DATA) -> tuple[float, float]:
    """The share of the shorter response's tokens that are in the other one as well: of a pair, and
    of answers to different prompts (y_w and the next pair's y_l). Means over held-out pairs."""
    better, worse = (list(map(set, held_out(kind, folder)[side])) for side in ("first", "second"))

    def mean(others: list[set]) -> float:
        pairs = zip(better, others, strict=True)
        return float(np.mean([len(a & b) / min(len(a), len(b)) for a, b in pairs]))

    return mean(worse), mean(worse[1:] + worse[:1])


def proxy_accuracy(kind: str, folder: Path = DATA) -> str:
    """ "66% (59% to 72%) of 192": the held-out pairs that the shipped reward model ranks as the
    judge does, with the interval of a share."""
    made = json.loads((folder / "prepared.json").read_text())[f"reward-{kind}"]
    count = made["pairs"]["validation"]
    right, low, high = stats.share(round(made["kept"]["accuracy"] * count), count)
    return f"{right:.0%} ({low:.0%} to {high:.0%}) of {count}"


def density(reference: Reference, table: pd.DataFrame, side: str) -> float:
    """Mean log pi_ref of the first `SCORED` responses of a side, nats a token."""
    part = table.head(SCORED)
    policy = reference.policy
    tokens, mask = padded([list(map(int, row)) for row in part[side]], policy.pad)
    heads = [list(map(int, row)) for row in part["prompt"]]
    device = str(policy.network.device)
    logp = policy.score(as_rollout(heads, tokens, mask, policy.pad, device))[:, 0]
    return float(logp.sum() / mask.sum())


def examples(reference: Reference, count: int = 2) -> pd.DataFrame:
    """The held-out pairs whose gap in gold reward is nearest its median, in words; the first ones
    where no judge has seen them."""
    rows = []
    for kind in reference.kinds:
        table = held_out(kind, reference.folder)
        if judged := "gold_first" in table:
            gap = table["gold_first"] - table["gold_second"]
            table = table.loc[(gap - gap.median()).abs().sort_values().index]
        for row in table.head(count).itertuples():
            better, worse = (
                reference.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)
                for ids in (row.first, row.second)
            )
            gold = {"gold": row.gold_first, "its gold": row.gold_second} if judged else {}
            rows.append({"pairs": kind, "instruction": row.instruction, "preferred": better,
                         "other": worse, **gold})  # fmt: skip
    found = pd.DataFrame(rows)
    order = ["pairs", "instruction", "preferred", "gold", "other", "its gold"]
    return found[[name for name in order if name in found]]


# --- runs ---------------------------------------------------------------------------------------


def looked_at(lines: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The rows at which a judge looked, of those lines that had one."""
    return {label: rows.dropna(subset="gold") for label, rows in lines.items() if "gold" in rows}


def ends(lines: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Final values of runs, and how many responses end in EOS; gold only where a judge looked."""
    columns = {"gain in gold": "gain in gold reward", "final proxy": "proxy",
               "final KL to reference": "KL, nats", "final length": "length"}  # fmt: skip
    if len(looked_at(lines)) < len(lines):
        del columns["gain in gold"]
    table = tables.ends(lines, columns)
    if not table.empty:
        ended = [f"{final(rows)['ended'].mean():.0%}" for rows in lines.values()]
        table.insert(table.columns.get_loc("seeds"), "end in EOS", ended)
    return table


def kinds(chapter: Chapter) -> list[str]:
    """The kinds of pairs that the chapter's grid has: a folder of one's own may have one."""
    here = {s.reward_function for s in chapter.settings()}
    return [kind for kind in KINDS if kind in here]


def ratio_panels(chapter: Chapter, kind: str) -> dict[str, pd.DataFrame]:
    """ "DPO, width 64" -> rows, for the smallest and the largest policy, or for the only one."""
    profile: FullScaleProfile = chapter.profile
    ends = {f"{m}@{kind}[policy={p},subset={profile.many}]": (m, p)
            for p in (profile.policies[0], profile.policies[-1]) for m in OFFLINE}  # fmt: skip
    only = {f"{m}@{kind}[judged=True]": (m, profile.policies[1]) for m in OFFLINE}
    found = {name: key for name, key in ends.items() if chapter.has(name)} or {
        name: key for name, key in only.items() if chapter.has(name)}  # fmt: skip
    titles = {m: title.partition(" (")[0] for m, title in chapter.names().items()}
    return {f"{titles[m]}, width {p}": chapter.reported(name) for name, (m, p) in found.items()}


def by_batch(chapter: Chapter, method: str) -> dict[str, pd.DataFrame]:
    """ "B = 64" -> judged rows of an on-policy method on similar pairs, by completions at once."""
    found = {MINIBATCH: f"{method}@similar[judged=True]"}
    found |= {MINIBATCH * k: f"{method}@similar[judged=True,sets={k}]"
              for k in chapter.profile.sets}  # fmt: skip
    return chapter.lines({f"B = {b}": name for b, name in found.items()})


def numbers(chapter: Chapter) -> None:
    """Makes the chapter's numbers available to its prose: those of its settings by their names
    (`Chapter.numbers`), differences and the factorial's effects as "fs_..."."""
    chapter.numbers({"gain": "gain in gold", "margin": "final margin"}, digits=2)
    chapter.numbers({"w": "final chosen log-ratio", "l": "final rejected log-ratio"})
    chapter.numbers({"kl": "final KL to reference"}, digits=0)
    for method in BATCHED:
        fresh, old = (f"{method}@similar[judged=True{dial}]" for dial in ("", ",sets=4"))
        chapter.number(f"fs_batch_{method}", f"{fresh} - {old}", "final gold")
    profile: FullScaleProfile = chapter.profile
    for name, text in _looks(chapter).items():
        glue(f"fs_{name}", text, display=False)
    glue("fs_pilot_gain", _pilot_gain(chapter), display=False)
    for kind in KINDS:
        run, better = f"dpo_offline@{kind}[judged=True]", held_out(kind)["first"]
        chapter.number_at(f"fs_ended_{kind}", run, "ended", [profile.updates], ".0%")
        glue(f"fs_tokens_{kind}", f"{better.map(len).mean():.0f}", display=False)
    for name, share in zip(("fs_shared", "fs_shared_other"), shared("similar"), strict=True):
        glue(name, f"{share:.0%}", display=False)
    glue("fs_seen", profile.updates * MINIBATCH // 2 // profile.few, display=False)
    fast, slow = (f"dpo_offline@{kind}[judged=True]" for kind in ("distinct", "similar"))
    ratio = chapter.rate(fast) / chapter.rate(slow) if chapter.has(fast, slow) else float("nan")
    glue("fs_rates", tables.number_text(ratio, digits=1), display=False)
    glue("fs_accuracy", proxy_accuracy("similar"), display=False)
    found = cells(chapter, "dpo_offline", "final chosen log-ratio")
    falls = sum(values.mean() < 0 for values in found.values())
    glue("fs_falls", f"{falls} of {len(found)}", display=False)
    shown = {f"{scope}_{factor}": NOT_RUN for scope in ("effect", "similar")
             for factor in FACTORS}  # fmt: skip
    if len(table := effects(found).set_index("label")):
        shown = {f"effect_{factor}": "{effect:+.1f} ({low:+.1f} to {high:+.1f})".format(
            **table.loc[label]) for factor, label in FACTORS.items()}  # fmt: skip
        shown |= {f"similar_{factor}": tables.interval_text(by_seed, signed=True, digits=1)
                  for factor, by_seed in effects_on_similar(found).items()}  # fmt: skip
    for name, text in shown.items():
        glue(f"fs_{name}", text, display=False)


def _looks(chapter: Chapter) -> dict[str, str]:
    """`mid_gap`, RWR's gold reward from fresh samples less that from old ones in the middle of the
    run; `late_rwr`, `late_rwr_old` and so on, what the gold reward gains from there to the end;
    `worse`, how many runs of RWR end worse from fresh samples."""
    names = {m: f"{m}@similar[judged=True]" for m in ON_POLICY}
    names |= {f"{m}_old": f"{m}@similar[judged=True,sets=4]" for m in BATCHED}
    end = chapter.profile.updates
    middle, last = ({name: _gold(chapter, setting, update) for name, setting in names.items()}
                    for update in (end // 2, end))  # fmt: skip
    gaps = {"mid_gap": middle["rwr"] - middle["rwr_old"]}
    gaps |= {f"late_{name}": last[name] - middle[name] for name in names}
    said = {name: tables.interval_text(gap.dropna(), signed=True) if gap.count() else NOT_RUN
            for name, gap in gaps.items()}  # fmt: skip
    gap = (last["rwr"] - last["rwr_old"]).dropna()
    return said | {"worse": f"{(gap < 0).sum()} of {len(gap)}" if len(gap) else NOT_RUN}


def _gold(chapter: Chapter, setting: str, update: int) -> pd.Series:
    """The gold reward by seed at an update; empty where the setting is not run or not judged."""
    rows = chapter.reported(setting) if chapter.has(setting) else pd.DataFrame()
    if "gold" not in rows:
        return pd.Series(dtype=float)
    return rows[rows["update"] == update].set_index("seed")["gold"]


def _pilot_gain(chapter: Chapter) -> str:
    """What the larger rate of on-policy methods had over the smaller in the pilot's proxy."""
    gains = []
    for method in ON_POLICY:
        if chapter.has(name := f"{method}@similar"):
            swept = final(chapter.swept(name)).groupby("learning_rate", observed=True)
            gains += [m.iloc[-1] - m.iloc[0] for m in [swept["proxy"].mean()] if len(m)]
    return f"{min(gains):.2f} to {max(gains):.2f}" if gains else NOT_RUN


# --- what makes y_w fall --------------------------------------------------------------------------


def cells(chapter: Chapter, method: str, statistic: str) -> dict[tuple[int, ...], pd.Series]:
    """The factorial's results: levels (policy, pairs, kind), each 0 or 1 -> a statistic by seed.

    Those that the profile has: where all policies are of one size, level 0 stands for it alone.
    """
    profile: FullScaleProfile = chapter.profile
    sizes, data = (profile.policies[0], profile.policies[-1]), (profile.few, profile.many)
    found = {}
    for i, j, k in product(range(len({*sizes})), (0, 1), (0, 1)):
        name = f"{method}@{KINDS[k]}[policy={sizes[i]},subset={data[j]}]"
        if chapter.has(name):
            found[i, j, k] = stats.per_run(chapter.reported(name), statistic)
    return found


def effects(found: Mapping[tuple[int, ...], pd.Series]) -> pd.DataFrame:
    """What each factor, and each combination of factors, adds to a statistic.

    The effect of a factor is the mean over the four cells with it less that over the four without,
    within each seed; that of a combination is half the difference between a factor's effect with
    and without the others, and so on (the usual contrasts of a 2 x 2 x 2 design).
    Args: found: as `cells` gives them.
    Returns: label, effect, low, high, n; no rows unless all eight cells are there.
    """
    names, rows = list(FACTORS.values()), []
    for size in (1, 2, 3) if len(found) == 8 else ():
        for chosen in combinations(range(3), size):
            total = sum(np.prod([2 * levels[i] - 1 for i in chosen]) * by_seed
                        for levels, by_seed in found.items())  # fmt: skip
            by_seed = (total / 4).dropna()
            label = " with ".join(names[i] for i in chosen)
            rows.append((label, *stats.interval(by_seed), len(by_seed)))
    return pd.DataFrame(rows, columns=["label", "effect", "low", "high", "n"])


def effects_on_similar(found: Mapping[tuple[int, ...], pd.Series]) -> dict[str, pd.Series]:
    """The effects of policy and of pairs on similar pairs alone, by seed. Args: as `effects`."""

    def side(factor: int, level: int) -> pd.Series:
        return sum(found[cell] for cell in product((0, 1), (0, 1), (0,)) if cell[factor] == level)

    return {name: ((side(i, 1) - side(i, 0)) / 2).dropna()
            for i, name in enumerate(("policy", "pairs"))}  # fmt: skip


def cell_table(chapter: Chapter, statistics: Mapping[str, str]) -> pd.DataFrame:
    """One row for each method and cell of the factorial: means of statistics over seeds."""
    profile: FullScaleProfile = chapter.profile
    rows = []
    for method, title in chapter.names().items():
        columns = {name: cells(chapter, method, s) for name, s in statistics.items()}
        for levels, by_seed in next(iter(columns.values())).items():
            i, j, k = levels
            rows.append({
                "method": title, "policy": profile.policies[-i], "pairs": KINDS[k],
                "trained on": profile.many if j else profile.few,
                **{name: found[levels].mean() for name, found in columns.items()},
                "seeds": len(by_seed),
            })  # fmt: skip
    return pd.DataFrame(rows)
