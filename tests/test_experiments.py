"""Grids: rules find their settings, sizes keep their promise, a pilot's seeds stay unreported."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from lib import claims, experiments, tables
from lib.experiments import length
from lib.experiments.settings import matching
from lib.lm.config import PREPARED, TINY
from lib.lm.full_scale import FullScaleRun
from lib.publish import configurations
from lib.runs import Store, code_fingerprint, columns, compute, identity, largest_published

LENGTH = tuple(length.CHAPTERS)
GRIDS = [(c, p) for c in experiments.CHAPTERS for p in experiments.PROFILES]


def assumed(chapter, profile):
    """All runs of a chapter if every sweep selected its middle rate."""
    planned = experiments.stages(chapter, profile, choose=experiments.assumer)
    return {run for stage in planned for run in stage(None)}


def test_a_run_is_read_where_a_column_is_largest_and_not_at_its_end():
    rows = pd.DataFrame({"run": ["a", "a", "a", "b", "b"], "update": [0, 1, 2, 0, 1],
                         "proxy": [0.0, 2.0, 1.0, 3.0, float("nan")]})  # fmt: skip
    assert experiments.at_best(rows, "proxy")["update"].tolist() == [1, 0]
    assert experiments.final(rows)["update"].tolist() == [2, 1]


@pytest.mark.parametrize("chapter", experiments.CHAPTERS)
def test_every_rule_finds_its_settings_in_the_full_grid(chapter):
    profile = experiments.CHAPTERS[chapter].profiles["full"]
    names = {s.name for s in experiments.settings(chapter, profile)}
    for rule in claims.rules():
        if rule.chapter == chapter:
            assert {name for _, name in claims.terms(rule.contrast)} <= names, rule.id


@pytest.mark.parametrize(("chapter", "profile"), GRIDS)
def test_every_setting_of_every_profile_is_a_valid_run(chapter, profile):
    made = experiments.CHAPTERS[chapter].profiles[profile]
    grid = experiments.settings(chapter, made)
    assert len({s.name for s in grid}) == len(grid)
    for setting in grid:
        assert setting.run(made, made.rates[0], 0).updates > 0


def test_the_full_length_grid_is_at_most_400_runs():
    runs = set()
    for chapter in LENGTH:
        profile = experiments.CHAPTERS[chapter].profiles["full"]
        runs |= assumed(chapter, profile)
    assert 300 < len(runs) <= 400


@pytest.mark.parametrize("chapter", LENGTH)
def test_pilot_seeds_are_not_reported_and_five_are(chapter):
    profile = experiments.CHAPTERS[chapter].profiles["full"]
    assert len(profile.sweep_seeds) == 2
    for setting in experiments.settings(chapter, profile):
        seeds = experiments.report_seeds(setting, profile)
        assert len(seeds) == 5 and not set(seeds) & set(profile.sweep_seeds)


def test_on_policy_methods_skip_the_slowest_rate_unless_rates_are_given():
    profile = experiments.CHAPTERS["complementary_length"].profiles["full"]
    offline, sampled = (experiments.Setting(name, "min") for name in ("dpo_offline", "dpo"))
    assert profile.competing(offline) == profile.rates == (1e-3, 3e-4, 1e-4)
    assert profile.competing(sampled) == (1e-3, 3e-4)
    assert profile.with_rates((1e-4,)).competing(sampled) == (1e-4,)
    sweep, *_ = experiments.stages("complementary_length", profile)
    tried = {(config.method, config.learning_rate) for config in sweep(None)}
    assert ("dpo_offline", 1e-4) in tried and ("dpo", 1e-4) not in tried
    shown = tables.grid([offline, sampled], profile)
    assert shown["rates tried"].tolist() == ["all", "the largest 2"]


def test_lengths_have_no_pilot_where_there_is_one_rate_to_choose():
    one = experiments.CHAPTERS["on_policy_length"].profiles["smoke"]
    assert len(one.rates) == 1
    assert experiments.stages("on_policy_length", one)[0](None) == []
    offline, sampled = (experiments.Setting(m, "min") for m in ("dpo_offline", "dpo"))
    two = replace(one, rates=(1e-3, 1e-4), slowest=1e-3)  # on-policy methods try one of them
    assert two.sweep(sampled) == [] and len(two.sweep(offline)) == 2


def test_full_scale_has_no_pilot_where_there_is_one_rate_to_choose():
    one = experiments.CHAPTERS["full_scale"].profiles["smoke"]
    two = replace(one, rates=(1e-3, 3e-4))
    assert len(one.rates) == 1
    sweep, report, _ = experiments.stages("full_scale", one)
    assert sweep(None) == []
    assert {config.learning_rate for config in report(None)} == set()  # base settings only choose
    assert {c.learning_rate for c in experiments.stages("full_scale", two)[0](None)} == {1e-3, 3e-4}
    assert {c.seed for c in assumed("full_scale", one)} == set(one.dial_seeds)


def test_extra_seeds_are_of_settings_that_are_reported():
    profile = experiments.CHAPTERS["full_scale"].profiles["smoke"]
    _, bases, dials = experiments.stages("full_scale", profile, extra_seeds=(100,))
    assert bases(None) == []  # base settings only choose
    assert {config.seed for config in dials(None)} == {*profile.dial_seeds, 100}


def test_dial_b_multiplies_the_batch_and_keeps_the_updates():
    profile = experiments.CHAPTERS["on_policy_length"].profiles["full"]
    run = experiments.Setting("ppo_token", "min", (("sets", 4),)).run(profile, 1e-3, 0)
    assert (run.batch, run.sets) == (256, 4)
    assert run.updates == profile.updates == 4 * run.iterations


def rows(method, task, rate, seed, ends, proxy=0.0, **options):
    """A run's table as `lib.runs.compute` gives it: configuration, identity, two rows."""
    profile = experiments.CHAPTERS["complementary_length"].profiles["full"]
    config = experiments.Setting(method, task, tuple(options.items())).run(profile, rate, seed)
    return pd.DataFrame([columns(config)] * 2).assign(
        run=f"{method}{task}{rate}{seed}{options or ''}", update=[0, 96], reward=[-50.0, ends],
        proxy=[0.0, proxy], length=[50.0, -ends], samples=[0, 6144],
        seconds_sampling=[0.5, 1.5], seconds_scoring=[0.0, 1.0], seconds_training=[0.0, 2.0],
    )  # fmt: skip


def test_options_added_later_are_told_apart_and_older_tables_have_none():
    profile = experiments.CHAPTERS["complementary_length"].profiles["full"]
    rate = profile.rates[0]
    old = rows("dpo", "min", rate, 0, ends=-1.0)
    new = [rows("dpo", "min", rate, 0, ends=-1.0, **o)
           for o in ({"lora_rank": 8}, {"lora_rank": 16}, {"checkpointing": True})]  # fmt: skip
    assert not {"lora_rank", "checkpointing", "decoder"} & set(old)
    for table in (old, pd.concat([old, *new], ignore_index=True)):
        plain = matching(table, experiments.Setting("dpo", "min"), profile)
        assert set(plain["run"]) == set(old["run"])
    for option, one in zip((("lora_rank", 8), ("lora_rank", 16), ("checkpointing", True)), new,
                           strict=True):  # fmt: skip
        found = matching(table, experiments.Setting("dpo", "min", (option,)), profile)
        assert set(found["run"]) == set(one["run"])
        assert matching(old, experiments.Setting("dpo", "min", (option,)), profile).empty


def test_a_rate_that_a_setting_names_is_not_chosen():
    """Its runs are those at that rate, also where another one is chosen for the base."""
    profile = experiments.CHAPTERS["on_policy_length"].profiles["full"]
    fast, slow = (experiments.Setting("reinforce", "skew", (("learning_rate", r),), "base", "dial")
                  for r in profile.reuse_rates)  # fmt: skip
    table = pd.concat([rows("reinforce", "skew", rate, seed, ends=-seed, proxy=rate)
                       for rate in profile.reuse_rates for seed in (0, 1, *profile.dial_seeds)],
                      ignore_index=True)  # fmt: skip
    assert experiments.selected_rate(table, fast.base, profile) == 1e-3
    for setting, rate in ((fast, 1e-3), (slow, 3e-4)):
        assert setting.name == f"reinforce@skew[learning_rate={rate}]"
        found = experiments.reported(table, setting, profile)
        assert set(found["learning_rate"]) == {rate} and set(found["seed"]) == {5, 6, 7, 8, 9}
        runs = [c for stage in experiments.stages("on_policy_length", profile,
                choose=experiments.assumer) for c in stage(table)]  # fmt: skip
        own = [c for c in runs if (c.method, c.task, c.batch, c.inner_steps, c.learning_rate)
               == ("reinforce", "skew", 64, 1, rate) and c.seed in profile.dial_seeds]  # fmt: skip
        assert {c.seed for c in own} == set(profile.dial_seeds)
    given = profile.with_rates((1e-2,))
    rates = {s.rate for s in experiments.settings("on_policy_length", given)}
    assert rates == {None, 1e-2}


@pytest.mark.parametrize("chapter", experiments.CHAPTERS)
def test_no_run_executes_the_code_that_stores_it(chapter):
    """An edit of the store, which moves no number, makes no published table stale."""
    code = code_fingerprint(*experiments.engine(chapter).modules)
    assert not [path for path in code if path.startswith("lib/runs/")]


@pytest.mark.parametrize("chapter", LENGTH)
def test_published_runs_keep_their_identity(chapter):
    """Fields that were added since leave the runs that were computed before as they are."""
    published = largest_published(chapter)
    stages = experiments.stages(published.chapter, published.profile)
    assert set(published.runs) == set(configurations(stages, published.table))


def test_the_pilot_chooses_by_proxy_and_not_by_gold():
    profile = experiments.CHAPTERS["complementary_length"].profiles["full"]
    fast, slow = profile.rates[0], profile.rates[1]
    table = pd.concat([
        rows("dpo", "min", fast, 0, ends=-1.0, proxy=1.0),
        rows("dpo", "min", slow, 0, ends=-9.0, proxy=2.0),
    ])  # fmt: skip
    chosen = experiments.selected_rate(table, experiments.Setting("dpo", "min"), profile)
    assert chosen == slow


def test_the_clocks_target_lies_95_in_100_of_the_way_to_the_best_method():
    profile = experiments.CHAPTERS["complementary_length"].profiles["full"]
    rate = profile.rates[0]
    ends = {"dpo": -2.0, "rwr": -30.0, "ppo_token": -10.0, "dpo_offline": -5.0}
    table = pd.concat(
        [rows(name, "min", rate, seed, end, 1.0) for name, end in ends.items() for seed in (0, 5)]
    )
    derived = length.with_target(table, profile)
    assert derived["target"].unique() == pytest.approx([-50 + 0.95 * 48])
    assert derived["seconds"].unique().tolist() == [0.0, 4.0]


def test_the_bandits_clock_leaves_out_what_is_drawn_before_the_first_update():
    profile = experiments.CHAPTERS["wall_clock"].profiles["smoke"].with_rates((0.01,))
    table = pd.concat([
        pd.DataFrame([columns(setting.run(profile, 0.01, seed))] * 2).assign(
            run=f"{setting.name}{seed}", update=[0, 2], reward=[0.0, 0.5],
            seconds_sampling=[3.0, 4.0], seconds_scoring=[0.0, 0.5], seconds_training=[0.0, 2.0],
        )
        for setting in experiments.settings("wall_clock", profile) if setting.options
        for seed in profile.dial_seeds
    ])  # fmt: skip
    derived = experiments.with_target(table, profile)
    assert derived["seconds"].tolist() == [0.0, 3.5] * (len(table) // 2)
    assert derived["target"].unique() == pytest.approx([0.95 * 0.5])


@pytest.mark.parametrize("name", ["gpu", "paper"])
def test_a_profile_needs_its_device_only_to_compute(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    profile = experiments.profile_named("complementary_length", name)
    assert profile.device == "cuda"
    with pytest.raises(RuntimeError, match="needs a CUDA device.*'smoke', 'cpu', 'full'"):
        experiments.engine("complementary_length", profile.device)


@pytest.mark.parametrize("name", ["gpu", "paper"])
def test_larger_full_scale_profiles_read_folders_that_are_made_where_they_run(name):
    profile = experiments.CHAPTERS["full_scale"].profiles[name]
    run = experiments.Setting("dpo_offline", "similar").run(profile, 1e-5, 0)
    assert run.folder.parent.name == PREPARED.name
    assert run.policy_folder.name == f"policy-{profile.policies[1]}"


def test_a_folder_of_ones_own_runs_what_it_has(tmp_path):
    """One kind of pairs, one policy and no judge: no run of what is missing, and no gold reward."""
    (tmp_path / "policy-128").mkdir()
    pd.DataFrame({"split": ["train"] * 1000}).to_parquet(tmp_path / "similar.parquet")
    shipped = experiments.CHAPTERS["full_scale"].profiles["full"]
    own = replace(shipped, options=(*shipped.options, ("prepared", str(tmp_path))))
    grid = experiments.settings("full_scale", own)
    assert {s.reward_function for s in grid} == {"similar"}
    assert not any("policy" in dict(s.options) for s in grid)
    assert {s.run(own, 1e-3, 5).judge for s in grid} == {None}
    (tmp_path / "judge").mkdir()
    judged = [s for s in grid if "judged" in dict(s.options)]
    assert {s.run(own, 1e-3, 5).judge for s in judged} == {"judge"}


def test_a_plan_takes_the_selected_rate_where_the_sweep_is_whole():
    profile = experiments.CHAPTERS["complementary_length"].profiles["full"]
    base, dial = (experiments.Setting("dpo_offline", "min", o, sweep)
                  for o, sweep in (((), "all"), ((("beta", 0.5),), "base")))  # fmt: skip
    slow, middle = profile.rates[-1], profile.rates[1]
    table = pd.concat([
        rows("dpo_offline", "min", rate, seed, ends=-1.0, proxy=float(rate == slow)).assign(
            run=identity(base.run(profile, rate, seed)))
        for rate, seed in profile.sweep(base)
    ])  # fmt: skip
    for results, rate in ((table, slow), (table[:-2], middle), (None, middle)):
        assumed = experiments.assumer(results, profile)
        assert (assumed(base), assumed(dial)) == (rate, rate)


def test_a_missing_judge_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.lm.full_scale.PREPARED", tmp_path)
    profile = experiments.profile_named("full_scale", "cpu")
    configs = sorted(assumed("full_scale", profile), key=lambda config: bool(config.judge))
    assert configs[0].judge is None and configs[-1].judge == "smollm2"
    store, engine = Store(tmp_path / "store"), experiments.engine("full_scale")
    with pytest.raises(FileNotFoundError, match="the judge 'smollm2' is not in"):
        compute(configs, store, engine, say=lambda text: None)
    assert not store.root.exists() or not list(store.root.glob("records/*/*"))
    engine.check([config for config in configs if not config.judge])


def test_a_folder_without_what_the_chapter_runs_on_is_named(tmp_path):
    shipped = experiments.CHAPTERS["full_scale"].profiles["full"]
    own = replace(shipped, options=(*shipped.options, ("prepared", str(tmp_path))))
    with pytest.raises(ValueError, match=f"'{tmp_path}' has nothing .*lib.lm.prepare_full"):
        experiments.check_runs("full_scale", own, None, (), {"prepared": str(tmp_path)})


def test_a_larger_policy_is_expected_to_take_longer_whatever_its_dtype():
    """The one of width 256 ships in 16 bits."""
    small, base, large = (
        experiments.engine("full_scale").seconds(FullScaleRun(
            "dpo_offline", "given", 1e-3, 0, policy=policy, iterations=1, batch=64, completions=2))
        for policy in ("64", "128", "256")
    )  # fmt: skip
    assert small < 0.5 * base and large > 3 * base


def test_what_compares_more_pairs_than_a_file_has_is_left_out(tmp_path):
    """A file of one's own: 120 pairs to train on, where `cpu` compares 100 with 800."""
    shipped = experiments.CHAPTERS["full_scale"].profiles["cpu"]
    own = replace(shipped, options=(*shipped.options, ("prepared", str(tmp_path))))
    (tmp_path / f"policy-{own.policies[1]}").mkdir()
    (tmp_path / f"policy-{own.policies[0]}").mkdir()

    def subsets(train):
        split = ["train"] * train + ["validation"] * 20
        pd.DataFrame({"split": split}).to_parquet(tmp_path / "similar.parquet")
        found = [dict(s.options) for s in experiments.settings("full_scale", own)]
        assert found.count({}) == 5  # the pilots: two offline methods, three on-policy ones
        return {options["subset"] for options in found if "subset" in options}

    assert (own.few, own.many) == (100, 800)
    assert [subsets(train) for train in (99, 100, 800)] == [set(), {100}, {100, 800}]


@pytest.mark.parametrize(
    ("chapter", "options", "said"),
    [
        ("on_policy_length", {"checkpointing": "yes"}, "checkpointing must be true or false"),
        ("on_policy_length", {"clip_norm": "1e-3"}, "in YAML write 0.001, not 1e-3"),
        ("on_policy", {"held_out": "no"}, "held_out must be true or false, got 'no'"),
        ("on_policy", {"evaluations": 2.5}, "evaluations must be a whole number, got 2.5"),
    ],
)
def test_an_option_of_another_kind_is_refused(chapter, options, said):
    with pytest.raises(ValueError, match=said):
        experiments.check_options(chapter, options)


def test_a_prepared_folder_that_is_not_there_names_the_presets():
    with pytest.raises(FileNotFoundError, match="no folder 'nonexist'.*tiny.*smollm2.*pythia"):
        experiments.check_options("on_policy_length", {"prepared": "nonexist"})
    experiments.check_options("on_policy_length", {"prepared": "smollm2"})  # made where it runs


@pytest.mark.parametrize("way", ["./data/length", "data/length/", str(TINY)])
def test_a_prepared_folder_is_one_however_it_is_written(way, monkeypatch):
    monkeypatch.chdir(TINY.parents[1])
    for chapter in ("on_policy_length", "full_scale"):
        full = experiments.CHAPTERS[chapter].profiles["full"]
        setting = experiments.Setting("rwr", "min" if chapter != "full_scale" else "similar")
        made = {setting.run(replace(full, options=(*full.options, ("prepared", name))), 1e-3, 5)
                for name in ("data/length", way)}  # fmt: skip
        assert len(made) == 1
    own = replace(experiments.profile_named("on_policy_length", "smoke"),
                  options=(*experiments.profile_named("on_policy_length", "smoke").options,
                           ("prepared", way), ("evaluations", 1.0)))  # fmt: skip
    experiments.check_runs("on_policy_length", own, ["rwr"], (),
                           {"prepared": way, "evaluations": 1.0})  # fmt: skip


def test_reported_seeds_do_not_choose_the_rate():
    profile = experiments.CHAPTERS["complementary_length"].profiles["full"]
    fast, slow = profile.rates[:2]
    found = ((slow, 0, 2.0), (fast, 0, 1.0), (fast, 5, 9.0))
    table = pd.concat([rows("dpo", "min", rate, seed, -1.0, proxy) for rate, seed, proxy in found])
    assert experiments.selected_rate(table, experiments.Setting("dpo", "min"), profile) == slow


def test_the_paper_profile_runs_every_value_that_the_papers_figures_draw():
    """What the page says is left out at `full` is what is left out there, and nothing at `paper`:
    Figures 11 to 13, 21 and 22 by B, in minibatches; 15 and 23 by T."""
    drawn = {("ppo_token", "min", "sets"): (), ("ppo_token", "skew", "sets"): (3,),
             ("ppo_token", "mode", "sets"): (2, 3), ("rwr", "min", "sets"): (2, 3),
             ("rwr", "skew", "sets"): (2, 3), ("best_of_n", "min", "inner_steps"): (4,),
             ("best_of_n", "skew", "inner_steps"): (), ("ppo_token", "min", "inner_steps"): (2, 4),
             ("ppo_token", "skew", "inner_steps"): (2, 4)}  # fmt: skip
    for name, left_out in {"full": True, "paper": False}.items():
        profile = length.PROFILES[name]
        # whether the profile's folder is there or not
        settings = length._on_policy(replace(profile, options=()))
        run = {s.name for s in settings}
        for (method, task, option), missing in drawn.items():
            values = profile.batches if option == "sets" else profile.inner_steps
            assert set(values) >= {2, 4}
            absent = {v for v in values if f"{method}@{task}[{option}={v}]" not in run}
            assert absent == (set(missing) if left_out else set()), (name, method, task)


def test_the_pilot_of_gpu_alone_has_one_seed():
    """book/own_model.ipynb says so, and why."""
    sizes = {name: len(length.PROFILES[name].sweep_seeds) for name in ("full", "gpu", "paper")}
    assert sizes == {"full": 2, "gpu": 1, "paper": 2}


def test_profile_paper_has_both_of_table_10s_choices():
    """4 of 64 responses; 10 of 60, since 10 does not divide 64 (chapter methods, audit)."""
    grid = experiments.CHAPTERS["on_policy_length"]
    profile = grid.profiles["paper"]
    found = {(r.completions, r.minibatch, r.batch, r.updates) for s in grid.settings(profile)
             if s.method == "best_of_n" and s.reward_function == "min"
             and "inner_steps" not in dict(s.options)
             for r in [profile.configuration(s, 1e-6, 5)]}  # fmt: skip
    assert found == {(4, 64, 64, 72), (10, 60, 60, 72)}
