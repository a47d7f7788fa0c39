"""Which method when, as a tree of questions (the paper's Figure 1) whose leaves are computed.

Two tables go in, and nothing else: what each method reached on each problem with each seed
(`collect`), and the verdicts on the paper's comparisons (`lib.claims`).

The questions. Can you sample while you train, and how often: never ("fixed"), rarely, so that one
drawing serves many updates ("rare"), or for every update ("fresh")? Does the reward's peak lie near
what the reference policy writes, or far from it ([C1])? If far: do preference pairs come near the
peak ([C2])? `PROBLEMS` says which of the book's problems stand for which answers. Who may sample
may also train on fixed data, so "rare" and "fresh" compare on-policy and offline methods.

The rule, written before its first use:

1. A problem *votes* at a leaf if at least two methods have at least `MIN_SEEDS` seeds in common.
   Only those common seeds are compared.
2. In each seed the *first* are the method with the best final reward and all within the problem's
   margin of it (a shared first place counts for each). A method's share of seeds has a Wilson 95%
   interval.
3. On a problem a method *leads* if it has the best mean, or if the best mean is not ahead of it by
   more than the margin with 95% confidence (paired within seeds).
4. A leaf *recommends* the methods that lead on every voting problem that ran them.
5. A comparison of a claim *bears on* a leaf if it orders methods (by reward, length or speed) on a
   problem of the leaf and is of the leaf's kind: offline methods alone are "fixed", a dial of
   staleness (B or T) is "rare", everything else with an on-policy method is "fresh". Comparisons
   that were not judged do not count.
6. The leaf's outcome, the first of these that applies:
   "not computed yet": no method has results on any of its problems;
   "inconclusive": no problem votes, no comparison bears on it, or half of those that do or more
   are inconclusive;
   "mixed": some comparisons are reproduced and some not, or no method leads on every voting
   problem that ran it;
   "as the paper says": all that are decided are reproduced;
   "against the paper": all that are decided are not.

Beside the rule, and without a say in it, stands the reward of the untrained model: a method *harms*
if a run of it ended below where it began by more than the margin.

Chapter: index.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lib import claims, experiments, methods, stats
from lib.chapter import Chapter
from lib.experiments import Setting
from lib.tables import NEAR

MIN_SEEDS = 5  # as the claims' rules ask for at least
ALIKE = 2.0  # tokens: what the rules of the length problems take for no difference
RANKING = ("reward", "gold", "length", "speed")  # words of statistics that order methods
STALE = ("sets", "inner_steps")  # options that make on-policy data older: the dials B and T
TIMED = ("alone", "evaluations", "held_out")  # options of runs that were timed: same problem
NOT_YET = "not computed yet"
SIDES = ("on-policy", "offline")
OUTCOMES = ("as the paper says", "mixed", "against the paper", "inconclusive", NOT_YET)
MIB_PER_GIB = 1024
COLUMNS = ("problem", "choice", "chapter", "method", "serves", "seed", "start", "reward",
           "completions", "seconds", "memory")  # fmt: skip

SAMPLING = {
    "fixed": "No, the data are fixed.",
    "rare": "Rarely: one sampling has to serve many updates.",
    "fresh": "Yes, for every update.",
}
PLACES = {
    ("near", None): "Near what the model writes.",
    ("far", "apart"): "Far, and the pairs are what the model writes.",
    ("far", "close"): "Far, but the pairs come near it.",
}


@dataclass(frozen=True)
class Problem:
    """A problem of the book that stands for answers to the questions.

    Args:
        name: as its settings write it: "ipo@R1" is a setting of "R1".
        title: in print.
        chapters: whose results it has.
        peak: "near" or "far" from what the reference policy writes ([C1]).
        pairs: where the peak is far, whether pairs are "apart" from it or come "close" ([C2]).
        margin: of final reward, below which there is no difference. unit: of the reward, in print.
        sizes: of its models, "bandit" or a name of `lib.footprint.PRESETS`, where a profile names
            no other.
        column: of a result table, which holds its reward. base: options of its base settings.
    Raises: ValueError that names the place and the ones there are.
    """

    name: str
    title: str
    chapters: tuple[str, ...]
    peak: str
    pairs: str | None = None
    margin: float = NEAR
    unit: str = ""
    sizes: str = "tiny"
    column: str = "reward"
    base: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ValueError(f"{self.name}: (peak, pairs) must be one of {tuple(PLACES)}, "
                             f"got {self.place}")  # fmt: skip

    @property
    def place(self) -> tuple[str, str | None]:
        return self.peak, self.pairs


_BANDIT = ("on_policy", "negative_gradient")
_LENGTH = ("complementary_length", "on_policy_length", "negative_gradient_length")
_SCALE = dict(chapters=("full_scale",), peak="far", margin=0.1, unit=" nats a token",
              column="gold", base=(("judged", True),))  # fmt: skip
PROBLEMS = (
    Problem("R1", "bandit R1", _BANDIT, "far", "apart", sizes="bandit"),
    Problem("min", "Min Length", _LENGTH, "far", "apart", ALIKE, " tokens"),
    Problem("skew", "Skew Length", _LENGTH, "far", "close", ALIKE, " tokens"),
    Problem("similar", "pairs of one model", pairs="apart", **_SCALE),
    Problem("distinct", "pairs of two models", pairs="close", **_SCALE),
    Problem("R2", "bandit R2", _BANDIT, "near", sizes="bandit"),
    Problem("mode", "Mode Length", _LENGTH, "near", None, ALIKE, " tokens"),
)


def margins() -> str:
    """ "0.02 of the bandit's reward, 2 tokens, ...": what is no difference, for the prose."""
    found = {p.unit or " of the bandit's reward": f"{p.margin:g}" for p in PROBLEMS}
    return ", ".join(margin + unit for unit, margin in found.items())


@dataclass(frozen=True)
class Entry:
    """A method on a problem.

    Args:
        first, alone: in how many of the n seeds it was first, and first with no other. low, high:
            95% interval of first / n.
        mean, mean_low, mean_high, worst: final reward, its 95% interval and its lowest value.
        leads, harms: see the rule.
        completions, seconds: medians of a whole run, evaluation left out; completions are those
            drawn in training, or the fixed ones that it reads.
        memory: MiB that training takes at most, by the formula of `lib.footprint`; NaN where the
            sizes of the models are not known.
    """

    method: str
    first: int
    alone: int
    low: float
    high: float
    mean: float
    mean_low: float
    mean_high: float
    worst: float
    leads: bool
    harms: bool
    completions: float
    seconds: float
    memory: float


@dataclass(frozen=True)
class Standing:
    """The methods on a problem, the most often first on top.

    Args: n: seeds that all have in common. start: reward of the untrained model. chapters: whose
        results these are. serves: how many updates one drawing serves.
    """

    problem: Problem
    n: int
    start: float
    chapters: tuple[str, ...]
    serves: int
    entries: tuple[Entry, ...]

    @property
    def votes(self) -> bool:
        return self.n >= MIN_SEEDS and len(self.entries) > 1

    @property
    def solved(self) -> bool:
        """Whether a method's mean ends above the untrained model."""
        return any(e.mean > self.start for e in self.entries)

    @property
    def leading(self) -> tuple[str, ...]:
        return tuple(e.method for e in self.entries if e.leads)


@dataclass(frozen=True)
class Leaf:
    """An end of the tree: a choice of sampling, a place of the peak, and what was found there.

    Args: standings: of its problems that have results. verdicts: how many of the comparisons that
        bear on it have which verdict. chapters: that judge those. recommended: labels of methods.
    """

    choice: str
    place: tuple[str, str | None]
    standings: tuple[Standing, ...]
    verdicts: Mapping[str, int]
    chapters: tuple[str, ...]
    recommended: tuple[str, ...]
    outcome: str

    def found(self, name: str) -> list[Entry]:
        """What a method, by its label, reached on each of the problems that vote."""
        return [e for s in self.standings if s.votes for e in s.entries if label(e.method) == name]


# --- from chapters to a table ---------------------------------------------------------------------


def collect(
    chapters: Mapping[str, Chapter], problems: Sequence[Problem] = PROBLEMS
) -> pd.DataFrame:
    """What every method reached: a table with `COLUMNS`, one row per problem, choice, method, seed.

    serves: how many updates one drawing serves, 0 where nothing is drawn. start: the reward before
    training. completions, seconds, memory: as in `Entry`.

    A problem's chapters must share a profile, which says how long runs are: those that differ from
    the first one of the problem that has results are left out.
    """
    rows = []
    for problem in problems:
        have = {name: chapters[name] for name in problem.chapters if name in chapters}
        profiles = [chapter.profile_name for chapter in have.values()]
        for name, chapter in have.items():
            if chapter.profile_name != profiles[0]:
                continue
            for choice, setting in _contenders(chapter.settings(), problem):
                rows.append(_ends(chapter.reported(setting.name), problem.column).assign(
                    problem=problem.name, choice=choice, chapter=name, method=setting.method,
                    serves=0 if choice == "fixed" else dict(setting.options).get("sets", 1),
                    memory=_memory(problem, chapter.profile)))  # fmt: skip
    if not rows:
        return pd.DataFrame(columns=list(COLUMNS))
    keys = ["problem", "choice", "method", "seed"]  # chapters share runs
    return pd.concat(rows, ignore_index=True)[list(COLUMNS)].drop_duplicates(keys)


def _contenders(settings: Iterable[Setting], problem: Problem) -> list[tuple[str, Setting]]:
    """(choice, setting) of a problem: offline ones, fresh ones, and the stalest that there are."""
    settings = list(settings)
    base = [s for s in settings if s.reward_function == problem.name and s.options == problem.base]
    found = [("fresh" if methods.get(s.method).on_policy else "fixed", s) for s in base]
    return found + [("rare", s) for s in stalest(settings, problem)]


def stalest(settings: Iterable[Setting], problem: Problem) -> list[Setting]:
    """The settings of a problem that differ from the base one by the grid's largest B alone."""
    own = [*(name for name, _ in problem.base), "sets"]
    dial = {s: dict(s.options)["sets"] for s in settings if s.reward_function == problem.name
            and [option for option, _ in s.options] == own}  # fmt: skip
    return [s for s, k in dial.items() if k == max(dial.values())]


def _ends(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """seed, reward before and after training, completions and seconds of each run.

    A run without a finite reward gets the worst one that any run of the setting has had: zero would
    be the best there is where rewards are negative.
    """
    last = experiments.final(rows.assign(seconds=stats.seconds(rows)))
    start = rows.loc[rows["update"] == 0].set_index("seed")[column].astype(float)
    reward = last[column].astype(float)
    worst = rows[column].replace([np.inf, -np.inf], np.nan).min()
    return pd.DataFrame({
        "seed": last["seed"], "start": last["seed"].map(start),
        "reward": reward.where(np.isfinite(reward), worst),
        "completions": last["samples"], "seconds": last["seconds"],
    })  # fmt: skip


def _memory(problem: Problem, profile: experiments.Profile) -> float:
    """MiB of training, estimated; NaN for a policy of the reader's own, of unknown size."""
    from lib import footprint  # with the language models' libraries, which take seconds to import

    options = dict(profile.options)
    name = options.get("prepared", problem.sizes)
    preset = {"bandit": footprint.BANDIT, **footprint.PRESETS}.get(name)
    if preset is None:
        return float("nan")
    bandit = name == "bandit"
    found = footprint.memory(
        preset, 4 if options.get("dtype", "float32") == "float32" else 2,
        micro_batch=footprint.TOKEN_BUDGET[profile.device],
        batch=footprint.BANDIT_BATCH if bandit else footprint.MINIBATCH,
        compiled=profile.device == "cuda" and not bandit,
    )  # fmt: skip
    return MIB_PER_GIB * found["total"]


def served(results: pd.DataFrame) -> dict[str, str]:
    """For the prose: how many updates a rare drawing serves, on the bandit and elsewhere."""
    rare = results[results["choice"] == "rare"]
    bandit = rare["problem"].isin([p.name for p in PROBLEMS if p.sizes == "bandit"])
    parts = {"rare_bandit": rare[bandit], "rare_models": rare[~bandit]}
    return {name: f"{part['serves'].max():.0f}" if len(part) else NOT_YET
            for name, part in parts.items()}  # fmt: skip


# --- from tables to leaves ------------------------------------------------------------------------


def leaves(
    results: pd.DataFrame, verdicts: Iterable[claims.Verdict],
    problems: Sequence[Problem] = PROBLEMS,
) -> list[Leaf]:
    """Every leaf of the tree, in its order. Args: results: a table as `collect` makes it."""
    verdicts = list(verdicts)
    return [leaf(choice, place, results, verdicts, problems)
            for choice in SAMPLING for place in PLACES]  # fmt: skip


def leaf(
    choice: str, place: tuple[str, str | None], results: pd.DataFrame,
    verdicts: Sequence[claims.Verdict], problems: Sequence[Problem] = PROBLEMS,
) -> Leaf:
    own = [p for p in problems if p.place == place]
    found = (standing(results, problem, choice) for problem in own)
    standings = tuple(s for s in found if s is not None)
    bearing = [v for v in verdicts if v.verdict != "not judged"
               and bears(v.rule, choice, own)]  # fmt: skip
    counts = Counter(v.verdict for v in claims.distinct(bearing))
    chapters = tuple(dict.fromkeys(v.rule.chapter for v in bearing))
    chosen = recommended(standings)
    return Leaf(choice, place, standings, counts, chapters, chosen,
                outcome(standings, counts, chosen))  # fmt: skip


def standing(results: pd.DataFrame, problem: Problem, choice: str) -> Standing | None:
    """Rules 1 to 3 for a problem. Returns: None where a method of the choice has no results."""
    kinds = {"fixed"} if choice == "fixed" else {"fixed", choice}
    rows = results[(results["problem"] == problem.name) & results["choice"].isin(kinds)]
    if choice not in set(rows["choice"]):
        return None
    rewards, before = (rows.pivot(index="seed", columns="method", values=column).astype(float)
                       for column in ("reward", "start"))  # fmt: skip
    rewards = rewards.dropna()
    if rewards.empty:
        return None
    costs = rows.groupby("method", observed=True)[["completions", "seconds", "memory"]].median()
    firsts = rewards.ge(rewards.max(axis=1) - problem.margin, axis=0)
    alone = firsts.mul(firsts.sum(axis=1) == 1, axis=0)
    top, worst_gain = rewards.mean().idxmax(), (rewards - before).min()
    entries = [
        Entry(name, int(firsts[name].sum()), int(alone[name].sum()),
              *stats.share(firsts[name].sum(), len(rewards))[1:], *stats.interval(rewards[name]),
              float(rewards[name].min()),
              not stats.interval(rewards[top] - rewards[name])[1] > problem.margin,
              bool(worst_gain[name] < -problem.margin),
              *costs.loc[name].astype(float))
        for name in rewards
    ]  # fmt: skip
    entries.sort(key=lambda e: (-e.first, -e.mean))
    return Standing(problem, len(rewards), float(rows["start"].mean()),
                    tuple(rows["chapter"].unique()), int(rows["serves"].max()),
                    tuple(entries))  # fmt: skip


def label(method: str) -> str:
    """What a method is called across problems: "DPO (offline)", and "PPO" for both its kinds."""
    entry = methods.get(method)
    return f"{entry.title.partition(' (')[0]} ({SIDES[not entry.on_policy]})"


def by_side(labels: Iterable[str], note: Callable[[str], str] = lambda label: "") -> str:
    """ "on-policy DPO, IPO; offline DPO" from labels such as "DPO (offline)", a note after each."""
    labels = list(labels)
    found = {side: [name.removesuffix(f" ({side})") + note(name) for name in labels
                    if name.endswith(f"({side})")] for side in SIDES}  # fmt: skip
    return "; ".join(f"{side} {', '.join(names)}" for side, names in found.items() if names)


def recommended(standings: Sequence[Standing]) -> tuple[str, ...]:
    """Rule 4; those that lead on most problems come first, then those most often first."""
    ran, led, first = Counter(), Counter(), Counter()
    for found in (s for s in standings if s.votes):
        for entry in found.entries:
            name = label(entry.method)
            ran[name] += 1
            led[name] += entry.leads
            first[name] += entry.first / found.n
    chosen = [name for name in ran if led[name] == ran[name]]
    return tuple(sorted(chosen, key=lambda name: (-led[name], -first[name])))


def bears(rule: claims.Rule, choice: str, problems: Iterable[Problem]) -> bool:
    """Rule 5: whether a comparison orders methods on one of `problems`, at this choice."""
    if not any(word in rule.statistic for word in RANKING):
        return False
    parts = [_parts(name) for _, name in claims.terms(rule.contrast)]
    own = [p for p in problems if p.name in {task for _, task, _ in parts}]
    options = {option for *_, given in parts for option in given}
    base = {name for p in own for name, _ in p.base}
    if not own or options - base - {*STALE, *TIMED}:
        return False  # another problem than the leaf's, such as completions of one token
    if options & set(STALE):
        return choice == "rare"
    if len({method for method, *_ in parts}) == 1:
        return False  # one method on two problems: it orders none
    sampled = any(methods.get(method).on_policy for method, *_ in parts)
    return choice == ("fresh" if sampled else "fixed")


def _parts(setting: str) -> tuple[str, str, list[str]]:
    """Method, task and names of the options of a setting such as "rwr@min[sets=4]"."""
    method, _, rest = setting.partition("@")
    task, _, options = rest.rstrip("]").partition("[")
    return method, task, [pair.split("=")[0] for pair in options.split(",") if pair]


def outcome(
    standings: Sequence[Standing], verdicts: Mapping[str, int], chosen: Sequence[str]
) -> str:
    """Rule 6."""
    if not standings:
        return NOT_YET
    yes, no, open_ = (verdicts.get(v, 0)
                      for v in ("reproduced", "not reproduced", "inconclusive"))  # fmt: skip
    if not any(s.votes for s in standings) or open_ >= yes + no:
        return "inconclusive"
    if (yes and no) or not chosen:
        return "mixed"
    return "as the paper says" if yes else "against the paper"
