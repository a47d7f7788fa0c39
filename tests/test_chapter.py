"""What a chapter tells its reader about the results it shows, and the rows it hands to figures."""

import pytest

from lib import chapter, claims, experiments
from lib.chapter import Chapter
from lib.experiments.bandit import FULL
from lib.experiments.length import PROFILES as LENGTH


@pytest.fixture(scope="module")
def complementary():
    return Chapter("complementary")


def test_the_published_full_results_are_those_the_prose_interprets(complementary):
    text = complementary.source().data
    assert text.startswith("```{note}") and "were written for these results" in text


@pytest.mark.parametrize("own", [
    {"profile": "smoke"}, {"profile": "full", "recompute": True}, {"methods": ["ipo"]},
    {"seeds": [25]}, {"learning_rates": [0.01]},
])  # fmt: skip
def test_other_results_are_told_apart_from_the_prose(own, tmp_path):
    shown = Chapter("complementary", **own, store=tmp_path)
    meta = chapter._published("complementary", "full").meta
    assert not shown.is_interpreted
    assert "not for those shown here" in shown.reading()
    assert meta["commit"][:10] in shown.reading() and meta["published"][:10] in shown.reading()


def test_a_plan_computes_nothing(tmp_path, capsys):
    """The cell that makes the chapter asks for its source as well, which would run the grid."""
    planned = Chapter("complementary", profile="smoke", recompute=True, plan_only=True,
                      store=tmp_path)  # fmt: skip
    assert planned.source().data == "" and "results" not in vars(planned)
    assert capsys.readouterr().out.startswith("complementary at profile smoke: ")


def test_runs_that_the_published_table_lacks_are_not_computed_unasked(tmp_path):
    shown = Chapter("complementary", methods=["ipo"], store=tmp_path)
    gone = next(iter(set(shown.results["run"])))
    lacking = Chapter("complementary", methods=["ipo"], store=tmp_path)
    del lacking.published.runs[gone]
    with pytest.raises(RuntimeError, match=r"full.parquet lacks 1 of the .*make publish CHAPTER="):
        _ = lacking.results
    lacking.published.runs[gone] = shown.published.runs[gone]
    assert lacking.results["run"].nunique() == shown.results["run"].nunique()


def test_without_published_results_the_reading_still_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(chapter, "_published", lambda name, profile: None)
    shown = Chapter("complementary", profile="smoke", store=tmp_path)
    assert "written for `full` results, not for those shown here" in shown.reading()


def test_a_dial_holds_the_base_setting_at_its_own_value(monkeypatch):
    prompts = Chapter("negative_gradient")
    monkeypatch.setattr(prompts, "reported", lambda setting: setting)
    found = prompts.dial("ipo_offline@R1", "prompts")
    assert list(found) == [10, *FULL.prompts] and found[10] == "ipo_offline@R1"
    sets = Chapter("on_policy")
    monkeypatch.setattr(sets, "reported", lambda setting: setting)
    assert list(sets.dial("best_of_n@R1", "sets")) == [1, *FULL.sets]


def test_reported_rows_are_selected_once(complementary):
    assert complementary.reported("ipo@R1") is complementary.reported("ipo@R1")
    with pytest.raises(ValueError, match="setting must be one of"):
        complementary.reported("ipo@R3")


def test_a_comparison_with_bars_stays_in_its_column():
    rule = next(r for r in claims.rules() if "||" in r.says)
    row = {"claim": rule.claim, "verdict": "reproduced", "says": "so"}
    text = chapter._claim_text(row, [claims.Verdict(rule, "reproduced", 1.0, 0.5, 1.5, 20)])
    *_, line = text.splitlines()
    assert line.replace(r"\|", "").count("|") == 6 and "+0.5 to +1.5" in line


def test_numbers_of_the_prose_are_named_after_their_settings(monkeypatch):
    said = {}
    monkeypatch.setattr(chapter, "glue", lambda name, text, display: said.update({name: text}))
    shown = Chapter("on_policy_length", methods=["ppo_token"])
    shown.numbers({"length": "final length"}, digits=0)
    own = shown.contrast("ppo_token@min[sets=4]", "final length")
    assert said["length_ppo_token_min_sets_4"].startswith(f"{own.mean():.0f} (")
    assert said["length_rwr_min_sets_4"] == "(not run at this profile)"
    assert len(said) == len(experiments.settings("on_policy_length", LENGTH["full"]))


def test_a_column_at_some_updates_is_a_number_of_the_prose(monkeypatch):
    said = {}
    monkeypatch.setattr(chapter, "glue", lambda name, text, display: said.update({name: text}))
    shown = Chapter("on_policy_length", methods=["ppo_token"])
    rows = shown.reported("ppo_token@min").groupby("update")["length"].mean()
    shown.number_at("both", "ppo_token@min", "length", [4, 8], ".3f")
    shown.number_at("none", "ppo_token@min", "length", [5])
    shown.number_at("other", "rwr@min", "length", [4])
    assert said == {"both": f"{rows[[4, 8]].mean():.3f}", "none": chapter.NOT_RUN,
                    "other": chapter.NOT_RUN}  # fmt: skip
