"""How methods rank on the bandit, by which rule, and what a ranking hangs on.

A ranking is made of four readings of the same published runs (`CRITERIA`). Pairs of methods are
told apart seed by seed; how far a ranking moves under other seeds, learning rates and batches is
Kendall's tau to the ranking as it is. Chapter: audit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd

from lib import experiments, methods, stats
from lib.cards import link, short
from lib.chapter import NOT_RUN
from lib.decisions import NOT_YET, by_side, label
from lib.experiments import OFFLINE, ON_POLICY, REWARDS
from lib.overview import Chapters, home
from lib.tables import CEILING, COLLAPSED, NEAR, interval_text

FAMILIES = {"all": (*ON_POLICY, *OFFLINE), "on-policy": ON_POLICY, "offline": OFFLINE}
STATISTICS = {"end": "final reward", "speed": "mean reward over updates",
              "10 nats": "reward at 10 nats"}  # fmt: skip
DISTANCE = 10.0  # nats from the reference
LEVEL = 3  # decimals: means that agree to these share a rank
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Runs:
    """A method's runs on a reward, one row each: seed, learning_rate, end, speed, 10 nats, stride,
    lost (see `scored`).

    Args: rate: the selected learning rate. reported: at that rate, on the reported seeds. swept:
        at every rate, on the sweep seeds.
    """

    rate: float
    reported: pd.DataFrame
    swept: pd.DataFrame


Field = Mapping[str, Runs]  # method -> its runs on one reward


def scored(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per run: seed, learning_rate, a column per name of `STATISTICS`, and `lost`.

    `stride`: the KL to the reference at the first row after the start, nats. `lost`: the run went
    non-finite, or answers in one way only and that is not the best answer.
    """
    parts = []
    for rate, part in rows.groupby("learning_rate", observed=True):
        last = experiments.final(part).set_index("seed")
        stuck = (last["entropy"] < COLLAPSED) & ~(last["reward"] > CEILING - 1e-3)
        table = pd.DataFrame({k: stats.per_run(part, name) for k, name in STATISTICS.items()})
        later = part[part["update"] > 0].sort_values("update")
        table["stride"] = later.groupby("seed")["kl_ref"].first()
        table["lost"] = last["diverged"].astype(bool) | stuck
        parts.append(table.rename_axis("seed").reset_index().assign(learning_rate=float(rate)))
    return pd.concat(parts, ignore_index=True)


def field(chapters: Chapters, reward: str) -> dict[str, Runs]:
    """Every method that has results on a reward, at its base setting."""
    found = {}
    for name in FAMILIES["all"]:
        setting = f"{name}@{reward}"
        chapter = home(chapters, setting)
        if chapter is not None:
            swept, reported = scored(chapter.swept(setting)), scored(chapter.reported(setting))
            found[name] = Runs(chapter.rate(setting), reported, swept)
    return found


def _best_of_sweep(runs: Runs, column: str) -> pd.Series:
    """A column by seed at the rate that has most of it, on the seeds that choose that rate; named
    by the rate."""
    rate = runs.swept.groupby("learning_rate")[column].mean().idxmax()
    return _at(runs, rate)[column].rename(rate)


def _at(runs: Runs, rate: float) -> pd.DataFrame:
    """The sweep's runs at a learning rate, by seed."""
    return runs.swept[runs.swept["learning_rate"] == rate].set_index("seed")


def _at_distance(runs: Runs) -> pd.Series:
    """The reward at 10 nats by seed, at the best of the rates whose first step stays within them.

    A run whose first step goes further would be read off the straight line between two rows, at a
    policy that it never had. Where every rate does, the smallest.
    """
    strides = runs.swept.groupby("learning_rate")["stride"].max()
    small = strides.index[strides < DISTANCE]
    rates = small if len(small) else strides.index[:1]
    return _best_of_sweep(replace(runs, swept=runs.swept[runs.swept["learning_rate"].isin(rates)]),
                          "10 nats")  # fmt: skip


# Reading -> its value by seed, for every method of a field.
CRITERIA: dict[str, Callable[[Runs], pd.Series]] = {
    "end": lambda runs: runs.reported.set_index("seed")["end"],
    "best of sweep": lambda runs: _best_of_sweep(runs, "end"),
    "speed": lambda runs: runs.reported.set_index("seed")["speed"],
    "10 nats": _at_distance,
}
WORST, LOST = "worst seed", "lost runs"
GOOD = 0.1  # of the bandit's reward: an end that near to the best one is a good one


def values(runs: Field) -> pd.DataFrame:
    """Methods by criteria: means of `CRITERIA`, the worst seed's end, the number of lost runs."""
    rows = {}
    for name, own in runs.items():
        means = {criterion: by_seed(own).mean() for criterion, by_seed in CRITERIA.items()}
        rows[name] = {**means, WORST: own.reported["end"].min(), LOST: own.reported["lost"].sum()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*CRITERIA, WORST, LOST])


def ranks(table: pd.DataFrame) -> pd.DataFrame:
    """Ranks within each column of `values`, 1 for the best; equal to 3 decimals is a tie."""
    signs = pd.Series({name: 1 if name == LOST else -1 for name in table})
    return (table.round(LEVEL) * signs).rank(method="min").astype(int)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """`values` as text: two decimals, counts as counts."""
    rewards = table.drop(columns=LOST).map("{:.2f}".format)
    return rewards.assign(**{LOST: table[LOST].astype(int).astype(str)})


def shades(ranked: pd.DataFrame) -> pd.DataFrame:
    """`ranks` as shades: 1 for the first place, 0 for the last."""
    return 1 - (ranked - 1) / max(len(ranked) - 1, 1)


def practical(runs: Field, reward: str) -> str:
    """What a ranking of ends leaves open, as a Markdown list: a short way, and an untuned rate."""
    if not runs:
        return NOT_YET
    return f"- {_short_way(runs, reward)}\n- {_untuned(runs, reward)}"


def _short_way(runs: Field, reward: str) -> str:
    """Who earns most where the policy stays close to the reference, if it can be told."""
    by_seed = {label(name): _at_distance(own) for name, own in runs.items()}
    order = sorted(by_seed, key=lambda name: -by_seed[name].mean())
    top, rest = by_seed[order[0]], [by_seed[name] for name in order[1:]]
    head = "**Must the model stay close to where it started?**"
    found = (f"{interval_text(top)} on bandit {reward} (at a learning rate of {top.name:g}, the "
             f"best of its sweep for this, on the {len(top)} seeds that chose it)")  # fmt: skip
    if not rest or any(_sign(top - other) < 1 for other in rest):
        return (f"{head} Within 10 nats no method is ahead of all others; the best mean is "
                f"{found} ({link('audit')}).")  # fmt: skip
    others = f"{rest[-1].mean():.2f} to {rest[0].mean():.2f}"
    return (f"{head} Take {by_side(order[:1])}: within 10 nats it earns {found}, the others "
            f"{others}, all told apart from it ({link('audit')}).")  # fmt: skip


def _untuned(runs: Field, reward: str) -> str:
    """Who does well at many learning rates: how many end near the best end of any method."""
    ends = {n: own.swept.groupby("learning_rate")["end"].mean() for n, own in runs.items()}
    best = max(means.max() for means in ends.values())
    good: dict[int, list[str]] = {}
    for name, means in ends.items():
        good.setdefault(int((means >= best - GOOD).sum()), []).append(label(name))
    most, *rest = sorted(good, reverse=True)
    told = "; ".join(f"{by_side(good[n])} at {n or 'none'}" for n in rest)
    tried = max(map(len, ends.values()))
    seeds = max(own.swept["seed"].nunique() for own in runs.values())
    return (f"**Can you not tune the learning rate?** Take {by_side(good[most])}: at {most} of "
            f"{tried} rates tried on bandit {reward} they end within {GOOD} of the best end of any "
            f"method, in the mean of {seeds} seeds.{f' The others: {told}.' if told else ''}")


def tau(first: pd.Series, second: pd.Series) -> float:
    """Kendall's tau-b of two readings of the same methods: 1 same order, -1 reversed.

    Means that agree to 3 decimals are ties. NaN where one reading has ties only.
    """
    both = pd.concat([first, second], axis=1).dropna().to_numpy(float)
    return float(_tau(both[:, 0], both[None, :, 1])[0])


def _tau(first: np.ndarray, others: np.ndarray) -> np.ndarray:
    """tau-b of (n,) values to each row of (draws, n): concordant less discordant pairs, over the
    geometric mean of the numbers of untied ones."""
    i, j = np.triu_indices(len(first), 1)
    x, y = (np.sign(v[..., i] - v[..., j])
            for v in (first.round(LEVEL), others.round(LEVEL)))  # fmt: skip
    untied = np.sqrt(np.abs(x).sum() * np.abs(y).sum(-1))
    return np.divide((x * y).sum(-1), untied, np.full(len(y), np.nan), where=untied > 0)


# Which orderings survive


def signs(runs: Field) -> pd.DataFrame:
    """Every pair of methods by every criterion: 1 if the first is above the second, -1, or 0.

    Above: the 95% interval of the difference within seeds lies beyond 0.02. Index: first, second;
    columns: `CRITERIA`.
    """
    by_seed = {c: {name: read(own) for name, own in runs.items()} for c, read in CRITERIA.items()}
    rows = {
        pair: {c: _sign(found[pair[0]] - found[pair[1]]) for c, found in by_seed.items()}
        for pair in combinations(runs, 2)
    }
    index = pd.MultiIndex.from_tuples(rows, names=["first", "second"]) if rows else None
    return pd.DataFrame(list(rows.values()), index=index, columns=[*CRITERIA])


def _sign(differences: pd.Series) -> int:
    _, low, high = stats.interval(differences.dropna())
    return int(low > NEAR) - int(high < -NEAR)


def kind(first: str, second: str) -> str:
    """What a pair of methods compares."""
    sides = [methods.get(name).on_policy for name in (first, second)]
    if sides[0] != sides[1]:
        return "on-policy with offline"
    return "two on-policy methods" if sides[0] else "two offline methods"


def survival(table: pd.DataFrame) -> pd.DataFrame:
    """`signs` by kind of pair: how many pairs each criterion tells apart, and how many all do.

    Columns: compared, pairs; a criterion each; "all four, same order"; "two disagree" (told apart
    both ways).
    """
    if table.empty:
        return pd.DataFrame()
    kinds = [kind(*pair) for pair in table.index]
    rows = []
    for name, part in table.groupby(kinds, sort=False):
        same = (part == 1).all(axis=1) | (part == -1).all(axis=1)
        turned = (part == 1).any(axis=1) & (part == -1).any(axis=1)
        rows.append({"compared": name, "pairs": len(part), **(part != 0).sum().to_dict(),
                     "all four, same order": int(same.sum()),
                     "two disagree": int(turned.sum())})  # fmt: skip
    return pd.DataFrame(rows)


KEYS = {"on-policy with offline": "mixed", "two on-policy methods": "on",
        "two offline methods": "off"}  # fmt: skip


def numbers(fields: Mapping[str, Field]) -> dict[str, str]:
    """For the prose: `on_speed_R1`, the pairs of two on-policy methods that speed tells apart.

    Likewise `mixed` and `off`; a criterion, `kept` (all four, same order) or `pairs`; and
    `tau_speed_R1`, Kendall's tau of a reading to the end, of all methods.
    """
    keys = [f"{kind}_{column}" for kind in KEYS.values()
            for column in ("pairs", "kept", *map(_key, CRITERIA))]  # fmt: skip
    keys += [f"tau_{_key(name)}" for name in (*CRITERIA, WORST)]
    found = {f"{key}_{reward}": NOT_RUN for key in keys for reward in REWARDS}
    for reward, runs in fields.items():
        table = values(runs)
        for name in (*CRITERIA, WORST):
            found[f"tau_{_key(name)}_{reward}"] = f"{tau(table['end'], table[name]):.2f}"
        for row in survival(signs(runs)).to_dict("records"):
            key = KEYS[row["compared"]]
            found[f"{key}_pairs_{reward}"] = str(row["pairs"])
            found[f"{key}_kept_{reward}"] = str(row["all four, same order"])
            found |= {f"{key}_{_key(name)}_{reward}": str(row[name]) for name in CRITERIA}
    return found


def _key(name: str) -> str:
    return name.replace(" ", "_")


# What a ranking hangs on


def first_share(runs: Field, draws: int = DRAWS) -> pd.DataFrame:
    """How often each method is first of its family when the seeds are drawn anew.

    The bootstrap: as many seeds as there are, drawn with replacement, the same ones for every
    method. Methods level to 3 decimals share a first place. Index: methods; columns: `CRITERIA`.
    """
    shares = {}
    for criterion, read in CRITERIA.items():
        shares[criterion] = pd.concat([
            _first(pd.DataFrame({n: read(runs[n]) for n in names if n in runs}), draws)
            for names in (ON_POLICY, OFFLINE) if set(names) & set(runs)
        ])  # fmt: skip
    return pd.DataFrame(shares, index=list(runs))


def _resampled(by_seed: pd.DataFrame, draws: int) -> np.ndarray:
    """(draws, methods) means over seeds drawn with replacement. Args: by_seed: seeds by methods."""
    complete = by_seed.dropna().to_numpy()
    picks = np.random.default_rng(0).integers(len(complete), size=(draws, len(complete)))
    return complete[picks].mean(1)


def _first(by_seed: pd.DataFrame, draws: int) -> pd.Series:
    means = _resampled(by_seed, draws).round(LEVEL)
    best = means == means.max(1, keepdims=True)
    return pd.Series((best / best.sum(1, keepdims=True)).mean(0), by_seed.columns)


def neighbour(runs: Runs, step: int) -> pd.DataFrame:
    """The sweep's runs at the next learning rate: `step` 1 is larger, -1 smaller; ends stay."""
    rates = sorted(runs.swept["learning_rate"].unique())
    at = min(max(rates.index(runs.rate) + step, 0), len(rates) - 1)
    return _at(runs, rates[at])


def moved(chapters: Chapters, reward: str, runs: Field) -> dict[str, dict[str, pd.DataFrame]]:
    """Each change that is tried: what is changed -> method -> its runs by seed, so changed.

    The base of a change of learning rate is the sweep itself, since its other rates have no other
    seeds; `""` is that base.
    """
    changes: dict[str, dict[str, pd.DataFrame]] = {
        "": {name: _at(own, own.rate) for name, own in runs.items()},
        "rates one lower": {name: neighbour(own, -1) for name, own in runs.items()},
        "rates one higher": {name: neighbour(own, 1) for name, own in runs.items()},
    }
    for rate in shared_rates(runs):
        changes[f"all at {rate:g}"] = {name: _at(own, rate) for name, own in runs.items()}
    for k in batches(chapters):
        found = {}
        for name in ON_POLICY:
            setting = f"{name}@{reward}[sets={k}]"
            if (chapter := home(chapters, setting)) is not None:
                found[name] = scored(chapter.reported(setting)).set_index("seed")
        if len(found) == len(ON_POLICY):
            changes[f"k = {k}"] = found
    return changes


def shared_rates(runs: Field) -> list[float]:
    """The distinct learning rates that were selected, largest first: one for all methods."""
    return sorted({own.rate for own in runs.values()}, reverse=True)


def batches(chapters: Chapters) -> list[int]:
    """The values of k at which every on-policy method may have been run."""
    chapter = home(chapters, "dpo@R1")
    return sorted(chapter.profile.sets) if chapter is not None else []


def sensitivity(chapters: Chapters, reward: str, runs: Field, draws: int = DRAWS) -> pd.DataFrame:
    """Kendall's tau of each changed ranking to the ranking as it is, by family and criterion.

    Columns: change, family, criterion ("end" or "speed"), tau (for other seeds its median), low,
    high (2.5% and 97.5% of the draws for other seeds, else NaN), first (the leader), n (methods
    ranked).
    """
    rows = []
    changes = moved(chapters, reward, runs)
    reported = {name: own.reported.set_index("seed") for name, own in runs.items()}
    for family, names in FAMILIES.items():
        for criterion in ("end", "speed"):
            base, swept = (_means(part, names, criterion) for part in (reported, changes[""]))
            if len(base) < 2:
                continue
            found = _under_seeds(reported, names, criterion, draws)
            rows.append(("other seeds", family, criterion, *found, len(base)))
            for change, part in changes.items():
                other = _means(part, names, criterion)
                if change and set(other.index) == set(base.index):
                    start = swept if not change.startswith("k = ") else base
                    rows.append((change, family, criterion, tau(start, other), np.nan, np.nan,
                                 leaders(other), len(other)))  # fmt: skip
    columns = ["change", "family", "criterion", "tau", "low", "high", "first", "n"]
    return pd.DataFrame(rows, columns=columns)


def _means(runs: Mapping[str, pd.DataFrame], names: Sequence[str], column: str) -> pd.Series:
    return pd.Series({n: runs[n][column].mean() for n in names if n in runs}, dtype=float)


def leaders(means: pd.Series) -> str:
    """The methods with the best mean, to 3 decimals; titles joined by a comma."""
    level = means.round(LEVEL)
    return ", ".join(map(short, level.index[level == level.max()]))


def leaders_table(table: pd.DataFrame) -> pd.DataFrame:
    """Who is first after each change, by family, from `sensitivity`: by the end, and by speed."""
    own = table[table["family"] != "all"]
    wide = own.pivot_table("first", ["family", "change"], "criterion", "first", sort=False)
    return wide.reset_index()[["change", "family", "end", "speed"]]


def _under_seeds(
    runs: Mapping[str, pd.DataFrame], names: Sequence[str], column: str, draws: int
) -> tuple[float, float, float, str]:
    """Median tau under other seeds, 2.5% and 97.5% of it, and the leader as it is."""
    by_seed = pd.DataFrame({n: runs[n][column] for n in names if n in runs})
    base = by_seed.dropna().mean()
    found = _tau(base.to_numpy(), _resampled(by_seed, draws))
    kept = found[~np.isnan(found)]
    if not len(kept):
        return (np.nan, np.nan, np.nan, leaders(base))
    low, median, high = np.quantile(kept, [0.025, 0.5, 0.975]).tolist()
    return median, low, high, leaders(base)


def under_hyperparameters(chapters: Chapters) -> pd.DataFrame:
    """A method's place in its family at other values of beta, on the seeds that both were run on.

    The paper writes beta for DPO's KL weight, for the push-down of best-of-N and for RWR's
    temperature. Columns: setting, statistic, default, switched (values), the place with either (of
    how many), seeds.
    """
    rows = []
    for setting, statistic, family in _BETAS:
        base = setting.partition("[")[0]
        if home(chapters, setting) is None or home(chapters, base) is None:
            continue
        own = stats.per_run(home(chapters, setting).reported(setting), statistic)
        default = stats.per_run(home(chapters, base).reported(base), statistic)
        seeds = own.index.intersection(default.index)
        others = {
            name: stats.per_run(home(chapters, name).reported(name), statistic).reindex(seeds)
            for name in (f"{m}@{base.split('@')[1]}" for m in family if m != base.split("@")[0])
            if home(chapters, name) is not None
        }
        before, after = (_place(x[seeds].mean(), others, statistic) for x in (default, own))
        of = len(others) + 1
        rows.append((setting, statistic, default[seeds].mean(), own[seeds].mean(),
                     f"{before} of {of}", f"{after} of {of}", len(seeds)))  # fmt: skip
    columns = ["setting", "statistic", "default", "switched", "place, default", "place, switched",
               "seeds"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


_LENGTH = ("pref_ft", "rwr_offline", "dpo_offline", "ipo_offline")
_BETAS = (
    ("best_of_n_negative@R1[beta=0.1]", "final reward", OFFLINE),
    ("best_of_n_negative@R1[threshold=0.5]", "final reward", OFFLINE),
    ("rwr@R1[temperature=0.05]", "final reward", ON_POLICY),
    ("dpo_offline@min[beta=0.02]", "final length", _LENGTH),
    ("dpo_offline@min[beta=0.5]", "final length", _LENGTH),
)


def _place(mean: float, others: Mapping[str, pd.Series], statistic: str) -> int:
    """The rank of a mean among the others': lengths are better when shorter."""
    sign = -1 if statistic == "final length" else 1
    return 1 + sum(sign * other.mean() > sign * mean for other in others.values())
