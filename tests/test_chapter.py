"""What a chapter tells its reader about the results it shows, and the rows it hands to figures."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from myst_nb import glue
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from traitlets.config import Config

from lib import chapter, claims, experiments
from lib.chapter import Chapter, Page
from lib.experiments.bandit import FULL
from lib.experiments.length import PROFILES as LENGTH
from lib.runs.configurations import file_hash

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope="module")
def complementary():
    return Chapter("complementary")


def test_the_published_full_results_are_those_the_prose_interprets(complementary):
    text = complementary.source().data
    assert text.startswith("```{note}") and "were written for these results" in text


@pytest.mark.parametrize("own", [
    {"profile": "smoke"}, {"profile": "full", "recompute": True}, {"methods": ["ipo"]},
    {"seeds": [25]}, {"profile": "full", "learning_rates": [0.01]},
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


def test_a_judge_that_is_missing_is_said_before_the_first_stage(tmp_path, monkeypatch):
    """The pilots, which nobody judges, would take their time first."""
    monkeypatch.setattr("lib.lm.full_scale.PREPARED", tmp_path / "nothing")
    shown = Chapter("full_scale", profile="full", recompute=True, store=tmp_path / "store")
    monkeypatch.setattr("lib.runs.compute", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(FileNotFoundError, match="the judge 'smollm2' is not in"):
        shown.results  # noqa: B018


def test_runs_that_the_published_table_lacks_are_not_computed_unasked(tmp_path):
    shown = Chapter("complementary", methods=["ipo"], store=tmp_path)
    gone = next(iter(set(shown.results["run"])))
    lacking = Chapter("complementary", methods=["ipo"], store=tmp_path)
    del lacking.published.runs[gone]
    with pytest.raises(RuntimeError, match=r"full.parquet lacks 1 of the .*make publish CHAPTER="):
        _ = lacking.results
    lacking.published.runs[gone] = shown.published.runs[gone]
    assert lacking.results["run"].nunique() == shown.results["run"].nunique()


def test_a_published_gpu_table_is_shown_on_a_cpu(monkeypatch, tmp_path):
    """Its runs are the full profile's; the device is needed only to compute."""
    full = chapter._published("complementary", "full")
    folder = tmp_path / "complementary"
    folder.mkdir()
    shutil.copy(full.path, folder / "gpu.parquet")
    shutil.copy(full.path.with_suffix(".json"), folder / "gpu.json")
    monkeypatch.setattr("lib.runs.published.results_folder", lambda results=None: tmp_path)
    monkeypatch.setattr("lib.chapter.runs.results_folder", lambda results=None: tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    shown = Chapter("complementary", methods=["ipo"], store=tmp_path / "store")
    assert shown.profile_name == "gpu" and shown.profile.device == "cuda"
    assert "profile `gpu`" in shown.source().data and len(shown.reported("ipo@R1"))
    afresh = Chapter("complementary", methods=["ipo"], profile="gpu", recompute=True,
                     store=tmp_path / "store")  # fmt: skip
    with pytest.raises(RuntimeError, match="needs a CUDA device to compute"):
        _ = afresh.results


@pytest.fixture
def of_a_gpu(monkeypatch, tmp_path):
    """The tiny policy's results as if they were SmolLM2's, whose folder is not here."""
    full = chapter._published("complementary_length", "full")
    rates = (full.table["learning_rate"] / 10).round(9)
    table = full.table.assign(prepared="smollm2", dtype="bfloat16", learning_rate=rates)
    path = tmp_path / "complementary_length" / "gpu.parquet"
    path.parent.mkdir()
    table.to_parquet(path)
    meta = full.meta | {"profile": "gpu", "sha256": file_hash(path)}
    path.with_suffix(".json").write_text(json.dumps(meta))
    for owner in ("lib.runs.published", "lib.chapter.runs"):
        monkeypatch.setattr(f"{owner}.results_folder", lambda results=None: tmp_path)
    monkeypatch.setattr("lib.lm.config.PREPARED", tmp_path)
    monkeypatch.setitem(LENGTH, "gpu", replace(LENGTH["gpu"], sweep_seeds=(0, 1)))
    return tmp_path


def test_published_runs_of_a_policy_made_elsewhere_are_shown(of_a_gpu):
    shown = Chapter("complementary_length", profile="gpu", store=of_a_gpu / "store")
    assert len(shown.reported("dpo@skew")["seed"].unique()) == 5
    assert {v.verdict for v in shown.verdicts} > {"reproduced"}
    assert "nothing to compute" in shown.plan()
    assert "of a policy that was made where they ran" in shown.source().data
    alone = Chapter("complementary_length", profile="gpu", methods=["dpo"], store=of_a_gpu / "s")
    assert set(alone.results["method"]) == {"dpo"}
    with pytest.raises(FileNotFoundError, match="make it with lib.lm.prepare"):
        Chapter("complementary_length", profile="gpu", seeds=[10], store=of_a_gpu / "store")
    with pytest.raises(FileNotFoundError, match="make it with lib.lm.prepare"):
        Chapter("complementary_length", profile="gpu", recompute=True, store=of_a_gpu / "store")


def test_published_runs_of_a_policy_made_elsewhere_are_all_there(of_a_gpu):
    shown = Chapter("complementary_length", profile="gpu", store=of_a_gpu / "store")
    gone = shown.reported("rwr@min")["run"].iloc[0]
    cut = Chapter("complementary_length", profile="gpu", store=of_a_gpu / "store")
    table = cut.published.table
    object.__setattr__(cut.published, "table", table[table["run"] != gone])
    with pytest.raises(RuntimeError, match="gpu.parquet lacks 1 of the "):
        _ = cut.results


def test_a_folder_that_was_half_made_is_not_taken_for_the_published_one(of_a_gpu):
    (of_a_gpu / "smollm2").mkdir()
    with pytest.raises(ValueError, match="has nothing that complementary_length runs on"):
        Chapter("complementary_length", profile="gpu", store=of_a_gpu / "store")


def test_auto_is_what_the_sentences_are_about(of_a_gpu):
    assert Chapter("complementary_length", store=of_a_gpu).profile_name == "gpu"
    for file in (ROOT / "data" / "results" / "complementary_length").iterdir():
        shutil.copy(file, of_a_gpu / "complementary_length")
    assert Chapter("complementary_length", store=of_a_gpu).profile_name == "full"


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
    assert line.replace(r"\|", "").count("|") == 7 and "+0.50 to +1.50" in line


def test_a_claim_says_where_else_it_is_judged():
    """Q1-reuse-reinforce is judged on the bandit and on the length problems."""
    rules = [r for r in claims.rules() if r.claim == "Q1-reuse-reinforce"]
    here, other = dict.fromkeys(r.chapter for r in rules)
    own = [claims.Verdict(r, "reproduced", 1.0, 0.5, 1.5, 20) for r in rules if r.chapter == here]
    row = {"claim": "Q1-reuse-reinforce", "verdict": "reproduced", "says": "so"}
    first, *_ = chapter._claim_text(row, own).splitlines()
    assert first.endswith(f"so. Also judged in [{other.replace('_', ' ')}]({other}.ipynb); "
                          "[together](index.ipynb).")  # fmt: skip
    every = [claims.Verdict(r, "reproduced", 1.0, 0.5, 1.5, 20) for r in rules]
    assert "Also judged" not in chapter._claim_text(row, every)


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
    swept = shown.swept("ppo_token@min")
    rate = swept["learning_rate"].min()
    shown.number_at("rate", "ppo_token@min", "length", [4], ".3f", rate=rate)
    shown.number_at("no_rate", "ppo_token@min", "length", [4], rate=7.0)
    slow = swept[(swept["learning_rate"] == rate) & (swept["update"] == 4)]["length"].mean()
    assert said == {"both": f"{rows[[4, 8]].mean():.3f}", "none": chapter.NOT_RUN,
                    "other": chapter.NOT_RUN, "rate": f"{slow:.3f}",
                    "no_rate": chapter.NOT_RUN}  # fmt: skip


# Plans


def test_a_chapter_whose_runs_are_published_plans_nothing(tmp_path):
    plan = Chapter("complementary", store=tmp_path).plan()
    assert plan.endswith("560 published. Nothing to compute.")


@pytest.mark.parametrize(("name", "method"), [
    ("wall_clock", "ipo"), ("negative_gradient", "ipo_offline"),
])  # fmt: skip
def test_a_plan_of_more_seeds_counts_those_alone(name, method, tmp_path):
    """Base settings and dials at the rates that the published sweeps select."""
    more = Chapter(name, methods=[method], seeds=[25], store=tmp_path)
    assert f" To compute: {len(more.settings())} runs = " in more.plan()


@pytest.mark.slow
def test_a_plan_finds_what_the_store_has(tmp_path, capsys):
    """The whole plan is said before the first stage, and a bar with the time left is drawn."""
    asked = {"profile": "smoke", "methods": ["ipo"], "recompute": True, "store": tmp_path}
    before = Chapter("complementary", **asked)
    assert "8 missing" in before.plan()
    assert before.results["run"].nunique() == 8
    said = capsys.readouterr()
    assert said.out.startswith("complementary at profile smoke: 8 runs") and "<00:" in said.err
    assert "8 stored. Nothing to compute." in Chapter("complementary", **asked).plan()


# What is refused, before anything is run


@pytest.mark.parametrize(("own", "said"), [
    ({"seeds": 25}, r'seeds must be a list such as -y "seeds: \[25\]", got 25'),
    ({"seeds": "25"}, "seeds must be a list"),
    ({"seeds": [2**31]}, "seed must be between 0 and 2147483647"),
    ({"learning_rates": 0.01}, "learning_rates must be a list such as"),
    ({"learning_rates": [True]}, r"learning_rates must be numbers in \(0, 10\], got \[True\]"),
    ({"learning_rates": [0.1, "1e-3"]}, r"got \[0.1, '1e-3'\] .*write 0.001, not 1e-3"),
    ({"methods": 3}, "methods must be a list such as"),
    ({"methods": "dpo"}, "methods must be a list such as .*, got 'dpo'"),
    ({"options": "tau"}, "options must be a mapping such as"),
    ({"options": {"tua": 1}}, "option must be one of .*'tau'.*, got 'tua'"),
    ({"options": {"seed": 1}}, "option must be one of .*, got 'seed'"),
    ({"options": {"prompts": "4"}}, "prompts must be a whole number, got '4'"),
    ({"options": {"prompts": 0}}, "prompts must be between 1 and"),
    ({"prepared": "folder"}, "option must be one of .*, got 'prepared'"),
    ({"profile": "smok"}, "profile must be one of .*'auto', 'smoke'"),
    ({"recompute": True}, "recompute needs a profile: smoke, cpu, full, gpu, paper"),
    ({"recompute": "true"}, "recompute must be True or False"),
    ({"learning_rates": [0.01]}, "learning_rates and options need a profile, .*: smoke, cpu"),
    ({"options": {"prompts": 3}}, "need a profile"),
    ({"store": 5}, "store must be the path of a folder, got 5"),
    ({"store": ["a"]}, r"store must be the path of a folder, got \['a'\]"),
    ({"store": ""}, "store must be the path of a folder, got ''"),
])  # fmt: skip
def test_a_bad_value_is_refused_by_name(own, said, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=said):
        Chapter("complementary", **{"store": tmp_path} | own)


@pytest.mark.parametrize(("name", "own", "said"), [
    ("complementary_length", {"options": {"lora_rnk": 1}}, "option must be one of .*'lora_rank'"),
    ("negative_gradient_length", {"options": {"completions": 4}}, "no run .* takes completions=4"),
    ("full_scale", {"options": {"kind": "similar"}}, "option must be one of .*, got 'kind'"),
])  # fmt: skip
def test_a_bad_option_of_a_language_models_run_is_refused(name, own, said):
    with pytest.raises(ValueError, match=said):
        Chapter(name, **own)


@pytest.mark.parametrize("name", ["complementary_length", "full_scale"])
def test_a_folder_that_is_not_prepared_is_refused(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Chapter(name, prepared=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"has nothing that {name} runs on"):
        Chapter(name, prepared=tmp_path)


def test_a_store_that_cannot_be_written_is_said_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lib.lm.prepare", None)  # it is not come to
    with pytest.raises(OSError, match="the store /proc/below cannot be written"):
        Chapter("complementary_length", prepared={"policy": "x"}, profile="smoke", recompute=True,
                store="/proc/below")  # fmt: skip


@pytest.mark.parametrize(("name", "maker"), [("complementary_length", "prepare"),
                                             ("full_scale", "prepare_full")])  # fmt: skip
def test_a_profile_whose_folder_is_not_made_says_how_to_make_it(name, maker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lib.lm.config.PREPARED", tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"not there: make it with lib.lm.{maker} \("):
        Chapter(name, profile="gpu", plan_only=True)


def test_options_change_every_run(tmp_path):
    own = Chapter("complementary", profile="smoke", options={"prompts": 3, "tau": None})
    (run, *_) = (s.run(own.profile, 0.01, 5) for s in own.settings())
    assert run.prompts == 3 and not own.is_interpreted
    assert Chapter("complementary", options={"tau": None}).is_interpreted


def test_a_gpu_is_taken_where_there_is_one_and_nothing_else_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    asked = {"recompute": True, "plan_only": True, "store": tmp_path}
    assert Chapter("complementary", **asked).profile_name == "gpu"
    assert Chapter("complementary", profile="cpu", **asked).profile_name == "cpu"
    assert Chapter("complementary", store=tmp_path).profile_name == "full"


def test_a_page_refuses_what_a_chapter_refuses(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="profile must be one of .*'auto', 'smoke'"):
        Page("methods", profile="smok")
    with pytest.raises(ValueError, match="recompute needs a profile"):
        Page("methods", recompute=True)


# In a kernel


class Publisher(DisplayPublisher):
    """With hooks, as a kernel's."""

    def publish(self, data, metadata=None, **_):
        for hook in self.hooks:
            assert hook({"content": {"data": data, "metadata": metadata or {}}})

    def register_hook(self, hook):
        self.hooks = [*getattr(self, "hooks", []), hook]


@pytest.fixture
def shell(monkeypatch):
    """run(cell) -> what it raised, in a shell of its own; `run.shell` is that shell."""
    monkeypatch.setattr(chapter, "SAID", {})
    config = Config({"HistoryManager": {"enabled": False}})
    own = InteractiveShell.instance(config=config, display_pub_class=Publisher)

    def run(cell: str) -> Exception | None:
        return own.run_cell(cell, store_history=True).error_in_exec

    run.shell = own
    yield run
    own.restore_sys_module_state()
    InteractiveShell.clear_instance()


def cells_of(name: str, **parameters) -> list[str]:
    """A chapter's code cells from `parameters` on, with the one that papermill puts behind it."""
    notebook = load_notebook_node(str(ROOT / "book" / f"{name}.ipynb"))
    if parameters:
        notebook = parameterize_notebook(notebook, parameters)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"][1:]


@pytest.mark.parametrize("name", ["methods", "complementary"])
def test_a_parameter_that_the_notebook_does_not_have_is_refused(shell, name):
    own, injected, made, *_ = cells_of(name, profil="smoke")
    assert shell(own) is None and shell(injected) is None
    error = shell(made)
    assert isinstance(error, ValueError)
    assert "unknown parameter ['profil']; there are ['" in str(error)
    assert shell(injected.replace("profil ", "profile ")) is None
    assert shell("1\n" + made.partition("chapter.counts")[0]) is None


def test_the_rest_is_skipped_until_the_first_cells_are_run_again(shell, capsys):
    own, made, *_ = cells_of("methods")
    for cell in (own + "\nplan_only = True", made, "below = 1"):
        assert shell(cell) is None
    assert "page" in shell.shell.user_ns and "below" not in shell.shell.user_ns
    assert "skipped until plan_only = False is run" in capsys.readouterr().out
    for cell in (own, made, "below = 1"):
        assert shell(cell) is None
    assert shell.shell.user_ns["below"] == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("cell", ["page = Page('methods')", "c = lib.chapter.Chapter('theory')"])
def test_a_chapter_made_elsewhere_ends_the_skipping_too(shell, cell):
    own, made, *_ = cells_of("methods")
    for source in (own + "\nplan_only = True", made, cell, "below = 1"):
        shell(source)
    assert shell.shell.user_ns["below"] == 1


@pytest.mark.parametrize("reader", [True, False])
def test_numbers_of_the_prose_are_listed_where_nobody_fills_them_in(shell, reader, capsys):
    """papermill and the build fill them in, or have nobody to tell."""
    shell.shell.kernel = SimpleNamespace(_allow_stdin=reader)
    page = Page("methods")
    told = capsys.readouterr().out
    assert told.startswith("Numbers in sentences are filled in on the rendered page; page.said()"
                           if reader else "")  # fmt: skip
    assert bool(told) is reader
    Chapter("complementary").counts()
    glue("share", "it's 5%", display=False)
    assert capsys.readouterr().out == ""
    rows = page.said().data.splitlines()
    assert "| n_rates | 10 |" in rows and "| share | it's 5% |" in rows


@pytest.mark.parametrize("built", [True, False])
def test_numbers_of_a_figure_are_linked_where_they_are(built, monkeypatch, tmp_path):
    """A build's beside its page; those of one's own run in a folder that no build serves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chapter, "BUILT", built)
    folder = Path("figure-data") if built else Path("_build/own/figure-data")
    monkeypatch.setattr(chapter, "FIGURE_DATA", folder)
    link = Page("index").keep("a", pd.DataFrame({"x": [1]})).data
    (href,) = re.findall(r'href="(.*?)"', link)
    assert Path(href).is_file() and Path(href).parent == folder


def test_a_figures_numbers_that_cannot_be_kept_stop_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(chapter, "FIGURE_DATA", tmp_path / "file" / "below")
    said = Page("index").keep("a", pd.DataFrame({"x": [1]})).data
    assert said == f"The numbers of this figure could not be kept: {tmp_path}/file/below: " \
        "Not a directory"  # fmt: skip
