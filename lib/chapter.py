"""What a chapter's notebook calls: parameters checked, plan, results, figures, verdicts."""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from myst_nb import glue

from lib import cards, claims, experiments, methods, runs, tables
from lib.allowed import one_of
from lib.bandit.config import BanditRun
from lib.bandit.engine import BanditEngine
from lib.experiments import Setting
from lib.publish import STORE
from lib.runs.configurations import as_number
from lib.untracked import Untracked

# said by tqdm, for bars that are not drawn here, when a language-model library is imported
warnings.filterwarnings("ignore", message="IProgress not found")

# Where the numbers of figures go: a build says, and serves them beside its pages. Runs of one's own
# have a folder of their own, so that they leave those of the built page alone.
FIGURE_DATA = Path(os.environ.get("PREFBOOK_FIGURE_DATA", "_build/own/figure-data"))
BUILT = "PREFBOOK_FIGURE_DATA" in os.environ
PROSE = "full"  # the profile whose published results the chapters' sentences interpret
NOT_RUN = "(not run at this profile)"  # in place of a number in the prose
NOT_DRAWN = "Not drawn: none of its runs is among those asked for."  # in place of a figure
NO_PROFILE = ("prepared, learning_rates and options need a profile, which says how much is run: "
              f"{', '.join(experiments.PROFILES)}")  # fmt: skip
COMMON = {"profile", "recompute", "plan_only"}  # parameters of every chapter
INJECTED = "# Parameters\n"  # how the cell begins in which papermill sets what it was given
LIFTS = re.compile(r"plan_only|\b(Chapter|Page)\(")  # a cell to run also after `plan_only`
SAID: dict[str, str] = {}  # what this kernel made available to the prose, by name
LISTENING: set[Any] = set()  # the shells whose outputs SAID is taken from
BADGES = {"reproduced": "reproduced", "partly": "partly", "not reproduced": "not",
          "inconclusive": "inconclusive", "not judged": "inconclusive"}  # fmt: skip


class Page:
    """A chapter without runs of its own: takes the parameters of every chapter and checks them.

    Args:
        name: the chapter's, for the files of its figures' numbers.
        profile, recompute, plan_only: as `Chapter`; with `plan_only` the rest is skipped.
    Raises: ValueError that names the bad value and the allowed ones, or a parameter that papermill
        was given and the notebook does not have.
    """

    def __init__(
        self, name: str, *, profile: str = "auto", recompute: bool = False, plan_only: bool = False
    ):
        self.name = name
        self._take(profile, recompute, plan_only)
        if self.plan_only:
            print(f"{name} has no runs of its own: nothing to compute")
            _skip_the_rest()

    def _take(self, profile: str, recompute: bool, plan_only: bool) -> None:
        """Checks and keeps what every chapter is given."""
        _refuse_unknown(get_ipython())
        self.profile_name = one_of("profile", profile, ("auto", *experiments.PROFILES))
        self.recompute = _flag("recompute", recompute)
        self.plan_only = _flag("plan_only", plan_only)
        if recompute and profile == "auto":
            if not torch.cuda.is_available():
                raise ValueError(f"recompute needs a profile: {', '.join(experiments.PROFILES)}")
            self.profile_name = "gpu"
        if not plan_only and _listen(get_ipython()):
            print("Numbers in sentences are filled in on the rendered page; "
                  f"{type(self).__name__.lower()}.said() lists them.")  # fmt: skip

    def said(self) -> Markdown:
        """The numbers of this notebook's sentences, by name: those of the cells run so far."""
        return tables.shown(pd.DataFrame(sorted(SAID.items()), columns=["name", "text"]))

    def keep(self, name: str, table: pd.DataFrame) -> Markdown:
        """Stores the numbers of a figure as CSV and returns a link to them: beside the page, or in
        a run of one's own from the root of the checkout. Where that cannot be written it is said,
        and the run goes on."""
        path = FIGURE_DATA / f"{self.name}-{name}.csv"
        try:
            FIGURE_DATA.mkdir(parents=True, exist_ok=True)
            table.to_csv(path, index=False, float_format="%.6g")
        except OSError as error:
            return Markdown(f"The numbers of this figure could not be kept: {FIGURE_DATA}: "
                            f"{error.strerror or error}")  # fmt: skip
        link = f"figure-data/{path.name}" if BUILT else path.as_posix()
        where = "CSV" if BUILT else path.as_posix()
        return Markdown(f'<a class="figure-data" href="{link}">'
                        f"the numbers of this figure ({where})</a>")  # fmt: skip

    def show(self, name: str, figure: Any, table: pd.DataFrame) -> None:
        """Displays a figure, and a link to its numbers below it.

        If it is None, a sentence, and an empty figure: a page may refer to it.
        """
        if empty := figure is None:
            figure = Figure(figsize=(4, 0.3))
            figure.add_subplot().set(xticks=[], yticks=[])
        display(figure)
        display(Markdown(NOT_DRAWN) if empty else self.keep(name, table))


class Chapter(Page):
    """A chapter's results at a profile, from what is published or computed now.

    Args:
        name: of `lib.experiments.CHAPTERS`.
        profile: "auto" for the published one that the prose is about, else the largest; or a name
            of `lib.experiments.PROFILES`.
        recompute: leave published results aside and compute (finished runs are kept in `store`);
            a profile must say how much, or a GPU be there, whose profile is then taken.
        plan_only: print what would be run and skip the rest of the notebook.
        methods: only these, None for all of the chapter.
        seeds: reported seeds beyond the profile's, pooled with those and marked.
        learning_rates: of the sweep, None for the profile's.
        prepared: the folder of a policy of your own, None for the profile's; or the options by
            which `lib.lm.prepare` makes it first, such as {"policy": "my-model", "prompts":
            "my.jsonl"}.
        options: fields of every run that differ from the profile's; None leaves a field as it is.
        store: folder of finished runs.
    Raises: before anything is run, ValueError that names the bad value and the allowed ones, or a
        parameter that papermill was given and the notebook does not have; FileNotFoundError for a
        `prepared` that has not been made. Where something is to be computed, RuntimeError if the
        profile's device is missing.
    """

    def __init__(
        self,
        name: str,
        *,
        profile: str = "auto",
        recompute: bool = False,
        plan_only: bool = False,
        methods: Sequence[str] | None = None,
        seeds: Sequence[int] = (),
        learning_rates: Sequence[float] | None = None,
        prepared: str | Path | Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        store: str | Path | None = None,
    ):
        self.name = experiments.check_chapter(name)
        self._take(profile, recompute, plan_only)
        if profile == "auto" and not recompute:
            published = _published(name, PROSE) or runs.largest_published(name)
            self.profile_name = published.profile if published else "cpu"
        named = experiments.profile_named(name, self.profile_name)
        if isinstance(prepared, Mapping):
            prepared = self._made(prepared, profile=profile, recompute=recompute, methods=methods,
                                  seeds=seeds, learning_rates=learning_rates, options=options,
                                  store=store)  # fmt: skip
        folder = None if prepared is None else str(prepared)
        given = _checked_options({"prepared": folder}, options)
        experiments.check_options(name, given)
        self.profile = replace(_with_rates(named, learning_rates),
                               options=(*(dict(named.options) | given).items(),))  # fmt: skip
        self.methods = None if methods is None else listed("methods", methods, "[dpo, rwr]")
        full = experiments.CHAPTERS[name].profiles["full"]
        self.extra_seeds = _checked_seeds(seeds, max(full.report_seeds) + 1)
        self.store = runs.Store(STORE if store is None else store)
        self._begun = False  # to compute something
        self.published = None if recompute else _published(name, self.profile_name)
        if not self._elsewhere:
            experiments.check_runs(name, self.profile, self.methods, self.extra_seeds, given)
        if profile == "auto" and not (recompute or self._profile_as_named or self.plan_only):
            raise ValueError(NO_PROFILE)
        if self.plan_only:
            print(self.plan())
            _skip_the_rest()

    def _made(self, folder: Mapping[str, Any], **others: Any) -> str:
        """The folder that `lib.lm.prepare` makes, of these options, once the other parameters have
        passed with the shipped one. Raises: what these raise; ValueError where it is of no use."""
        if others["profile"] == "auto" and not others["recompute"]:
            raise ValueError(NO_PROFILE)
        if self.name == "full_scale":
            raise ValueError("prepared must be a folder that lib.lm.prepare_full made, "
                             f"got {dict(folder)}")  # fmt: skip
        trial = Chapter(self.name, prepared="tiny", **others)
        if not self.plan_only:
            experiments.engine(self.name, trial.profile.device)
            trial.store.prepare(0)
        from lib.lm.prepare import made  # with the language models' libraries

        return made(folder, self.plan_only)

    @cached_property
    def _elsewhere(self) -> bool:
        """Whether the published runs are of a policy that was made where they ran: the same
        configuration then has another identity here, or none."""
        own = self.extra_seeds or not self._profile_as_named
        if self.profile.device == "cpu" or self.published is None or own or not self.settings():
            return False
        setting = self.settings()[0]
        rows = experiments.matching(self.published.table, setting, self.profile)
        if rows.empty:
            return False
        rate, seed, run = rows[["learning_rate", "seed", "run"]].iloc[0]
        try:
            return runs.identity(setting.run(self.profile, float(rate), int(seed))) != run
        except FileNotFoundError:
            return True

    @cached_property
    def _by_configuration(self) -> dict[frozenset, str]:
        """Configuration -> identity of each published run."""
        rows = self.published.table.drop_duplicates("run")
        fields = rows[self.published.meta["configuration"]].to_dict("records")
        return {_present(row): run for row, run in zip(fields, rows["run"], strict=True)}

    def _name(self, config: Any) -> str:
        """A run's identity: where its data are elsewhere, that of the published run of the same
        configuration, "" if there is none."""
        if self._elsewhere:
            return self._by_configuration.get(_present(runs.columns(config)), "")
        return runs.identity(config)

    @cached_property
    def engine(self) -> runs.Engine:
        """What computes the chapter's runs; it may import a language-model library."""
        return experiments.engine(self.name, self.profile.device)

    @property
    def jobs(self) -> int | None:
        return experiments.CHAPTERS[self.name].jobs

    @property
    def _stages(self) -> list:
        return experiments.stages(self.name, self.profile, self.methods, self.extra_seeds)

    def plan(self) -> str:
        """What a run of this chapter would compute, how long it would take, and how much disk.

        Learning rates are selected where the store or the published table has their sweep, and
        assumed elsewhere: they change no cost.
        """
        if self._elsewhere:
            return f"{self.name} at profile {self.profile_name}: published, nothing to compute"
        return f"{self.name} at profile {self.profile_name}: {self._plan(self._planned())}"

    def _planned(self) -> list[Any]:
        """The configurations of all stages, some at assumed learning rates."""
        asked = self.name, self.profile, self.methods, self.extra_seeds
        configs: dict[Any, None] = {}
        for stage in experiments.stages(*asked, experiments.assumer):
            configs |= dict.fromkeys(stage(self._at_hand([*configs])))
        return [*configs]

    def _plan(self, configs: Sequence[Any]) -> runs.Plan:
        return runs.plan(configs, self.store, self.engine, self.jobs, self.published)

    def _at_hand(self, configs: Sequence[Any]) -> pd.DataFrame | None:
        """The table of those of `configs` that need not be computed, None if all must be."""
        if not configs:
            return None
        if (table := self._cut(configs)) is not None:
            return table
        plan = self._plan(configs)
        todo = {run.identity for run in plan.todo}
        have = [run for run in plan.runs if run.identity not in todo]
        found = [run.status.table for run in have]
        return runs.assemble([run.config for run in have], found) if have else None

    def _cut(self, configs: Sequence[Any]) -> pd.DataFrame | None:
        """The table of `configs` cut out of the published one where that has them all, which is
        several times as quick as asking for each of thousands of runs."""
        wanted = {self._name(config) for config in configs}
        if self.published is None or wanted - self.published.runs.keys():
            return None
        table = self.published.table
        return table[table["run"].isin(wanted)].reset_index(drop=True)

    @cached_property
    def results(self) -> pd.DataFrame:
        """The chapter's result table, computed or loaded at first use."""
        results: pd.DataFrame | None = None
        known: set[Any] = set()
        for stage in self._stages:
            new = [config for config in dict.fromkeys(stage(results)) if config not in known]
            if not new:
                continue
            known.update(new)
            table = self._read_or_computed(new)
            results = table if results is None else pd.concat([results, table], ignore_index=True)
        return experiments.CHAPTERS[self.name].derive(results, self.profile)

    def _read_or_computed(self, configs: Sequence[Any]) -> pd.DataFrame:
        """The table of `configs`, computed where it is not published.

        Raises: RuntimeError where it is not all published and nobody asked for more than the
            published grid: to read a page should not start hours of work.
        """
        if (table := self._cut(configs)) is not None:
            return table
        if self.published is not None and not self.extra_seeds and self._profile_as_named:
            wanted = [self._name(config) for config in configs]
            lacking = sum(run not in self.published.runs for run in wanted)
            raise RuntimeError(
                f"{self.published.path} lacks {lacking} of the {len(wanted)} runs that "
                f"profile {self.profile_name} has now: recompute=True with "
                f"profile={self.profile_name!r} computes them, "
                f"make publish CHAPTER={self.name} PROFILE={self.profile_name} publishes all, "
                "python -m lib.publish ... --missing those"
            )
        runs.refuse_missing(self.engine, lambda: self._plan(self._planned()))
        if not self._begun:
            self._begun = True
            print(self.plan())
        return runs.compute(
            configs, self.store, self.engine, self.jobs, published=self.published, say=self._say,
            progress=not BUILT,
        )  # fmt: skip

    def _say(self, text: str) -> None:
        if "Nothing to compute" not in text:
            print(text)

    def source(self) -> Markdown:
        """Where the numbers come from, and whether the prose fits them: commit, date, profile.

        Nothing with `plan_only`: the cell that made the chapter goes on to here.
        """
        if self.plan_only:
            return Markdown("")
        results, n = self.results, self.results["run"].nunique()
        if self.published is None:
            text = f"Computed now at profile `{self.profile_name}`: {n:,} runs."
        else:
            meta = self.published.meta
            text = (
                f"Published results, profile `{self.profile_name}`: {n:,} runs, computed at "
                f"commit `{meta['commit'][:10]}`, published {meta['published'][:10]}"
            )
            later = self.published.changes()
            text += f"; {later}." if later else "."
            if self._elsewhere:
                text += (" They are of a policy that was made where they ran; one that is here is "
                         "not looked at: `recompute` runs it.")  # fmt: skip
            if notice := self.published.notice():
                text += f" **Stale:** {notice}."
        if self.extra_seeds:
            text += f" Pooled with your own seeds {list(self.extra_seeds)}, computed now."
        if results["diverged"].any():
            gone = results.groupby("run", observed=True)["diverged"].any().sum()
            text += f" {gone} runs went non-finite; they are kept, frozen at that update."
        kind = "note" if self.is_interpreted else "warning"
        return Markdown(f"```{{{kind}}}\n{text} {self.reading()}\n```")

    @property
    def is_interpreted(self) -> bool:
        """Whether these are the published results that the chapter's prose was written for."""
        own = self.methods is not None or self.extra_seeds
        standard = self.profile_name == PROSE and self._profile_as_named
        return self.published is not None and standard and not own

    @property
    def _profile_as_named(self) -> bool:
        """Whether no learning rates or options of the caller's own changed the profile."""
        return self.profile == experiments.CHAPTERS[self.name].profiles[self.profile_name]

    def reading(self) -> str:
        """How to read the sentences that interpret figures and tables, given what is shown."""
        sentences = "The sentences that interpret figures and tables were written for"
        if self.is_interpreted:
            return f"{sentences} these results."
        written = _published(self.name, PROSE)
        about = f"`{PROSE}` results"
        if written is not None:
            commit, date = written.meta["commit"][:10], written.meta["published"][:10]
            about = f"the published {about} (commit `{commit}`, {date})"
        return f"**{sentences} {about}, not for those shown here, and may not hold for them.**"

    def settings(self) -> list[Setting]:
        """The grid: every setting of this chapter at this profile."""
        return experiments.settings(self.name, self.profile, self.methods)

    def reported(self, setting: str) -> pd.DataFrame:
        """Rows of a setting, such as "ipo@R1", at its selected rate on the reported seeds.

        Raises: ValueError that lists the settings there are.
        """
        return self._rows(self._setting(setting))

    @cached_property
    def _rows(self) -> Callable[[Setting], pd.DataFrame]:
        """`reported` of a setting; figures, tables and prose ask for the same ones many times."""

        def rows(setting: Setting) -> pd.DataFrame:
            seeds = (*experiments.report_seeds(setting, self.profile), *self.extra_seeds)
            return experiments.reported(
                self.results, setting, self.profile, seeds, self._chosen(setting)
            )

        return cache(rows)

    @cached_property
    def _chosen(self) -> Callable[[Setting], float]:
        """The learning rate of a setting; rows and verdicts need the same ones."""
        return experiments.selector(self.results, self.profile)

    def _setting(self, name: str) -> Setting:
        grid = {s.name: s for s in self.settings()}
        if name not in grid:
            raise ValueError(f"setting must be one of {sorted(grid)}, got {name!r}")
        return grid[name]

    def has(self, *settings: str) -> bool:
        """Whether all these settings are in the grid of this profile and choice of methods."""
        return set(settings) <= {s.name for s in self.settings()}

    def rate(self, setting: str) -> float:
        """The learning rate selected for a setting."""
        return float(self.reported(setting)["learning_rate"].iloc[0])

    @cached_property
    def verdicts(self) -> list[claims.Verdict]:
        """The verdict of each comparison that the chapter's claims are split into."""
        return claims.judge_all(self.name, self.results, self.profile, self._chosen)

    def show_verdicts(self, *ids: str) -> Markdown:
        """The verdicts on claims `ids` (all by default), each with its comparisons."""
        summary = claims.summary(self.verdicts)
        shown = summary[summary["claim"].isin(ids)] if ids else summary
        parts = [_claim_text(row, self.verdicts) for row in shown.to_dict("records")]
        return Markdown("\n\n".join(parts))

    def lines(self, settings: Mapping[str, str]) -> dict[str, pd.DataFrame]:
        """Reported rows of `settings` (label -> name), without those not in this profile's grid."""
        return {label: self.reported(s) for label, s in settings.items() if self.has(s)}

    def dial(self, base: str, option: str, *, swept: bool = False) -> dict[float, pd.DataFrame]:
        """Rows by value of `option`, the base setting's own included: those that are reported.

        With `swept`, those at every learning rate and seed.
        """
        found = {}
        if self.has(base):
            found[getattr(self._setting(base).run(self.profile, 0.1, 0), option)] = base
        for s in self.settings():
            if s.base.name == base and len(s.options) == 1 and s.options[0][0] == option:
                found[s.options[0][1]] = s.name
        rows = self._everything if swept else self.reported
        return {value: rows(found[value]) for value in sorted(found)}

    def _everything(self, setting: str) -> pd.DataFrame:
        return experiments.matching(self.results, self._setting(setting), self.profile)

    def names(self) -> dict[str, str]:
        """Name -> title of the chapter's methods, in the order of the grid."""
        return {s.method: methods.get(s.method).title for s in self.settings()}

    def swept(self, setting: str) -> pd.DataFrame:
        """The rows of a base setting on the sweep seeds, at every learning rate."""
        rows = self._everything(setting)
        return rows[rows["seed"].isin(self.profile.sweep_seeds)]

    def switches(self) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
        """Each switched convention or hyperparameter: label -> (its rows, the base setting's)."""
        dials = {("sets",), ("inner_steps",)}
        grid = [s for s in self.settings() if s.sweep == "base"]
        switched = [s for s in grid if tuple(name for name, _ in s.options) not in dials]
        return {_switch_label(s): (self.reported(s.name), self.reported(s.base.name))
                for s in switched}  # fmt: skip

    def counts(self) -> None:
        """Makes n_report, n_dial, n_few, n_sweep (seeds) and n_rates available to the prose."""
        profile, extra = self.profile, len(self.extra_seeds)
        glue("n_report", len(profile.report_seeds) + extra, display=False)
        glue("n_dial", len(profile.dial_seeds) + extra, display=False)
        glue("n_few", len(profile.few_seeds) + extra, display=False)
        glue("n_sweep", len(profile.sweep_seeds), display=False)
        glue("n_rates", len(profile.rates), display=False)

    def contrast(self, text: str, statistic: str = "final reward") -> pd.Series | None:
        """A statistic of a contrast such as "ipo@R1 - rwr@R1", by seed, as the verdicts use it.

        Returns: None where one of its settings is not in the grid of this profile, or its results
            have no such statistic.
        """
        return claims.by_seed(
            text, statistic, lambda name: self.reported(name) if self.has(name) else None
        )

    def number(
        self, name: str, text: str, statistic: str = "final reward", digits: int = 2
    ) -> None:
        """Makes a contrast's mean and 95% interval available to the prose as `name`."""
        glue(name, contrast_text(text, self.contrast(text, statistic), digits), display=False)

    def number_at(
        self, name: str, setting: str, column: str, updates: Sequence[int], form: str = ".0f",
        rate: float | None = None,
    ) -> None:  # fmt: skip
        """Makes a column's mean over the rows of some updates available to the prose as `name`.

        Args: rate: of the sweep's runs at this learning rate, not of the reported ones.
        """
        values = pd.Series(dtype=float)
        if self.has(setting):
            rows = self.reported(setting) if rate is None else self.swept(setting)
            rows = rows if rate is None else rows[rows["learning_rate"] == rate]
            values = rows.loc[rows["update"].isin(updates), column]
        glue(name, NOT_RUN if values.empty else f"{values.mean():{form}}", display=False)

    def numbers(self, statistics: Mapping[str, str], digits: int = 1) -> None:
        """Makes means and 95% intervals of every setting of profile `PROSE` available to the prose.

        Args: statistics: first word of a number's name -> what it is. With {"length": "final
            length"} the names are "length_dpo_offline_min", "length_ppo_token_min_sets_4".
        """
        whole = experiments.CHAPTERS[self.name].profiles[PROSE]
        for s in experiments.settings(self.name, whole):
            for word, statistic in statistics.items():
                name = re.sub(r"\W+", "_", f"{word}_{s.name}").strip("_")
                self.number(name, s.name, statistic, digits)


def contrast_text(text: str, values: pd.Series | None, digits: int = 2) -> str:
    """A contrast's mean and 95% interval for the prose, signed where it is a difference."""
    if values is None or values.empty:
        return NOT_RUN
    return tables.interval_text(values, len(claims.terms(text)) > 1, digits)


def _present(row: Mapping[str, Any]) -> frozenset:
    """The fields of a configuration that have a value."""
    return frozenset((name, value) for name, value in row.items() if not pd.isna(value))


def trial(config: BanditRun) -> pd.DataFrame:
    """The result table of one run, computed in this process and not stored: to try a method out."""
    (table,) = BanditEngine().run([config], Untracked())
    return table


def _switch_label(setting: Setting) -> str:
    """ "RWR: weights = raw": the title without what all of a chapter's methods share."""
    options = ", ".join(f"{name} = {value}" for name, value in setting.options)
    return f"{cards.short(setting.method)}: {options}"


def badge(verdict: str) -> str:
    """A verdict as MyST text that carries its word, not only its colour."""
    return f"[{verdict}]{{.verdict-{BADGES[verdict]}}}"


def _claim_text(row: dict[str, Any], verdicts: Sequence[claims.Verdict]) -> str:
    """A claim with its verdict, and the table of its comparisons."""
    own = [v for v in verdicts if v.rule.claim == row["claim"]]
    comparisons = [_comparison(v) for v in own]
    # the verdict stands where a narrow page shows it
    columns = ["comparison", "verdict", "effect", "95% interval", "claimed", "seeds"]
    table = cards.markdown(pd.DataFrame(comparisons, columns=columns), "llrllr")
    elsewhere = _elsewhere(row["claim"], {v.rule.chapter for v in own})
    return f"**{row['claim']}** {badge(row['verdict'])} {row['says']}.{elsewhere}\n\n{table}"


def _elsewhere(claim: str, here: Collection[str]) -> str:
    """Which other chapters judge a claim: over all of them its verdict may be another one."""
    homes = (rule.chapter for rule in claims.rules() if rule.claim == claim)
    others = dict.fromkeys(home for home in homes if home not in here)
    links = ", ".join(map(cards.link, others))
    return f" Also judged in {links}; [together](index.ipynb)." if links else ""


def _comparison(v: claims.Verdict) -> tuple[Any, ...]:
    numbers = ("-", "-")
    if v.seeds:
        digits = 3 - sum(abs(v.effect) >= size for size in (1, 10))
        numbers = (f"{v.effect:+.{digits}f}", f"{v.low:+.{digits}f} to {v.high:+.{digits}f}")
    verdict = badge(v.verdict) + (", but not as claimed" if v.excluded else "")
    return f"{v.rule.says} ({v.rule.statistic})", verdict, *numbers, v.rule.claimed, v.seeds


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def listed(name: str, values: Any, example: str) -> list[Any]:
    """A parameter that is a list. Raises: ValueError that shows how to give one."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f'{name} must be a list such as -y "{name}: {example}", got {values!r}')
    return list(values)


def _checked_seeds(seeds: Sequence[int], first: int) -> tuple[int, ...]:
    """Extra seeds, refused where they would be reported and have chosen the rate as well."""
    given = listed("seeds", seeds, f"[{first}]")
    bad = [s for s in given if isinstance(s, bool) or not isinstance(s, int) or s < first]
    if bad or len(set(given)) != len(given):
        raise ValueError(
            f"seeds must be distinct integers from {first} on, since 0 to {first - 1} choose the "
            f"learning rate or are reported already; got {given}"
        )
    return tuple(given)


def _with_rates(profile: experiments.Profile, rates: Sequence[float] | None) -> experiments.Profile:
    if rates is None:
        return profile
    given = listed("learning_rates", rates, "[0.01, 0.001]")
    bad = [r for r in given
           if isinstance(r, bool) or not isinstance(r, int | float) or not 0 < r <= 10]  # fmt: skip
    if bad or not given:
        hint = next(filter(None, map(as_number, given)), "")
        raise ValueError(f"learning_rates must be numbers in (0, 10], got {given}{hint}")
    return profile.with_rates(tuple(sorted({float(r) for r in given}, reverse=True)))


def _checked_options(shorthands: dict[str, Any], options: Any) -> dict[str, Any]:
    """All options that are not None."""
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(
            f'options must be a mapping such as -y "options: {{evaluations: 10}}", got {options!r}'
        )
    given = shorthands | dict(options or {})
    return {name: value for name, value in given.items() if value is not None}


def _published(name: str, profile: str) -> runs.Published | None:
    path = runs.results_folder() / name / f"{profile}.parquet"
    return runs.Published.load(path) if path.exists() else None


def _refuse_unknown(shell: Any) -> None:
    """Raises: ValueError for parameters that papermill set and the notebook does not have.

    papermill warns and runs the notebook without them. It sets what it was given in a cell of its
    own, behind the one that has the parameters.
    """
    cells = shell.user_ns.get("In", []) if shell is not None else []
    given, own = set(), set()
    for names, injected in ((_assigned(cell), cell.startswith(INJECTED)) for cell in cells):
        if injected:
            given = names
        elif names >= COMMON:
            given, own = set(), names
    if own and given - own:
        raise ValueError(f"unknown parameter {sorted(given - own)}; there are {sorted(own)}")


def _assigned(cell: str) -> set[str]:
    """The names that a cell's lines assign."""
    return set(re.findall(r"^(\w+) *=(?!=)", cell, re.MULTILINE))


def _listen(shell: Any) -> bool:
    """Notes in SAID what is glued from here on. Whether a reader is to be told, once a kernel:
    nobody can answer questions of the notebooks that papermill and the build run."""
    if not hasattr(shell, "kernel") or shell in LISTENING:
        return False
    LISTENING.add(shell)
    shell.display_pub.register_hook(_note)
    return getattr(shell.kernel, "_allow_stdin", False)


def _note(message: dict[str, Any]) -> dict[str, Any]:
    """Takes a glued value's name and text from the message that displays it."""
    content = message["content"]
    if glued := content.get("metadata", {}).get("scrapbook"):
        text = content["data"].get(f"{glued['mime_prefix']}text/plain", "")
        SAID[glued["name"]] = str(ast.literal_eval(text)) if text[:1] in ("'", '"') else text
    return message


def _skip_the_rest() -> None:
    """Makes the cells below do nothing, until one that LIFTS this; a script simply goes on."""
    shell = get_ipython()
    if shell is None:
        return
    print("The cells below are skipped until plan_only = False is run, and this cell again.")

    def skipped(lines: list[str]) -> list[str]:
        if not any(map(LIFTS.search, lines)):
            return []
        shell.input_transformers_cleanup.remove(skipped)
        return lines

    shell.input_transformers_cleanup.append(skipped)
