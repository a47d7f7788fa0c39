"""What own_model says of a GPU is what `data/gpu` says, and its files are what their card says."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pandas as pd
import pytest

from benchmarks import cuda, lm
from lib import experiments, measured
from lib.figures import curves
from lib.lm.length import TASKS
from lib.runs import ROOT, canonical
from lib.runs.records import write_record
from tests.scripts import loaded
from tests.test_notebooks import read

CARD = measured.FOLDER / "README.md"
with pytest.MonkeyPatch.context() as patch:  # whatever is prepared on this machine
    patch.setattr(experiments.length, "prepared_tasks", lambda name: TASKS)
    PLANNED = experiments.stages("complementary_length", "gpu")[0](None)
PILOT = measured.record("pilot")


@pytest.fixture(scope="module")
def collect():
    """The script that made the table, as a module."""
    return loaded(measured.FOLDER / "collect.py")


def prose() -> str:
    cells = [c.source for c in read("book/own_model").cells if c.cell_type == "markdown"]
    return "\n".join(cells)


# the files


def test_the_card_names_every_file_with_its_hash():
    named = dict(re.findall(r"^\| `([\w.]+)` \| `([0-9a-f]{64})` \|$", CARD.read_text(), re.M))
    there = {p.name for p in measured.FOLDER.glob("*.*")} - {CARD.name, "collect.py"}
    assert set(named) == there
    content = {name: (measured.FOLDER / name).read_bytes() for name in named}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in content.items()} == named
    assert PILOT["sha256"]["pilot.parquet"] == named["pilot.parquet"]
    assert sum(p.stat().st_size for p in measured.FOLDER.glob("*.*")) < 1e5


def test_all_parts_are_of_one_commit_and_one_card():
    parts = [measured.record(n) for n in ("benchmarks", "training", "prepared", "pilot")]
    commits = {p.get("commit") or p["environment"]["commit"] for p in parts}
    assert commits == {re.search(r"`([0-9a-f]{40})`", CARD.read_text())[1]}
    assert {p["environment"]["device_name"] for p in parts if "environment" in p} == {"NVIDIA H200"}
    assert PILOT["uncommitted"] == []


def test_what_was_prepared_starts_from_what_was_fine_tuned():
    prepared, training = measured.record("prepared"), measured.record("training")
    folder = prepared["policy"]["name"]
    assert folder == prepared["arguments"]["reward_model"] and folder in prose()
    assert training["responses"]["name"] == prepared["arguments"]["prompts"]
    assert training["losses"][-1]["validation"] == pytest.approx(training["validation_loss"], 1e-2)


# speed


def test_the_step_is_that_of_the_benchmark():
    step, shape = measured.STEP, cuda.PRESETS["pythia"].config()
    assert (step.prompt, step.response) == (lm.PROMPT, lm.LENGTH)
    assert measured.RESPONSES == lm.PROMPTS * lm.COMPLETIONS == cuda.ROWS
    assert (step.policy.width, step.policy.layers) == (shape.hidden_size, shape.num_hidden_layers)
    lines = measured.record("benchmarks")["results"]
    tokens = {line["details"]["tokens"] for line in lines if "tokens" in line["details"]}
    assert tokens == {measured.RESPONSES * step.response}
    said = f"draw {lm.COMPLETIONS} responses of {lm.LENGTH} tokens for each of {lm.PROMPTS} prompts"
    assert f"{said} of {lm.PROMPT} tokens" in prose()
    assert f"{cuda.ROWS} responses of {cuda.NEW} tokens to prompts of {cuda.PROMPT}." in prose()


def test_ratios_are_those_of_the_benchmarks_own_lines():
    lines = {line["name"]: line for line in measured.record("benchmarks")["results"]}
    ours = [line for name, line in lines.items() if f"cuda/{measured.OURS}" in name]
    slower = measured.steps().set_index("trainer")["slower"]
    assert sorted(line["ratio"] for line in ours) == pytest.approx(sorted(slower.iloc[1:]))
    assert slower.iloc[0] == 1
    decoders = measured.decoding().set_index("decoder")
    for name in ("compiled", "growing"):
        row = decoders.loc[measured.DECODERS[name]]
        line = lines[f"lm/decode/pythia/cuda/{name}"]
        assert row["against generate"] == pytest.approx(line["ratio"])
        assert row["least ms"] / row["ms a token"] == pytest.approx(
            line["details"]["share_of_limit"])  # fmt: skip
        assert row["ms a token"] * cuda.NEW == pytest.approx(1e3 * line["ours"])


def test_phases_of_a_step_are_the_whole_of_it():
    table = measured.steps()
    parts = table[[f"{phase}, ms" for phase in ("sampling", "scoring", "training")]]
    assert parts.sum(axis=1).tolist() == pytest.approx(table["ms an update"].tolist())
    ours = measured.beside().set_index("of an update")["measured"]
    assert ours["together, ms"] == pytest.approx(table["ms an update"].iloc[0])
    assert ours["memory, GiB"] == pytest.approx(table["GiB"].iloc[0])


def test_estimates_are_those_of_the_formulas():
    """By hand: 64 responses of 64 tokens to prompts of 32, 40% of 989e12 operations a second."""
    estimated = measured.beside().set_index("of an update")["estimated"]
    passed, p = 64 * (64 + 32), 1_414_647_808
    assert estimated["training, ms"] == pytest.approx(1e3 * 6 * p * passed / (0.4 * 989e12))
    assert estimated["scoring, ms"] == pytest.approx(1e3 * 2 * p * passed / (0.4 * 989e12))


def test_what_the_page_concludes_of_speed():
    said, steps = measured.numbers(), measured.steps()
    factors = [said[f"h200_{phase}"] for phase in ("scoring", "training", "memory")]
    assert max(factors) < 1.2 < said["h200_together"] < said["h200_sampling"]
    assert said["decode_rest"] > said["decode_least"]
    arithmetic = 2e3 * 1_414_647_808 * 64 / measured.H200.flops  # ms, at the peak
    assert arithmetic < said["decode_rest"] / 4
    float32 = steps.iloc[:3]
    for phase in ("scoring", "training"):
        assert float32[f"{phase}, ms"].max() < 1.15 * float32[f"{phase}, ms"].min()
    assert steps["sampling, ms"].idxmin() == 0
    assert said["trl_half"] < said["trl_static"] < said["trl_dynamic"]


# the pilot


def test_runs_are_runs_of_the_profile_and_the_others_are_named():
    """Field by field, but for the data: the pairs and models of that machine are not here."""
    table = measured.pilot().drop_duplicates("run")
    planned = {(r.method, r.task, r.learning_rate, r.seed): r for r in PLANNED}
    cells = list(table[["method", "task", "learning_rate", "seed"]].itertuples(index=False))
    for cell, row in zip(cells, table.to_dict("records"), strict=True):
        fields = canonical(planned[tuple(cell)])["fields"]
        assert {n: row.get(n, PILOT["configuration"].get(n)) for n in fields} == fields
    missing = [(m["method"], m["task"], m["learning_rate"], m["seed"]) for m in PILOT["missing"]]
    assert sorted([*map(tuple, cells), *missing]) == sorted(planned)
    assert (len(cells), len(planned)) == (PILOT["runs"], PILOT["planned"])


def test_every_run_is_whole_and_without_seconds():
    table = measured.pilot()
    assert [c for c in table if "seconds" in c] == []
    rows = table.groupby("run")["update"].agg(["count", "min", "max"]).drop_duplicates()
    assert rows.to_numpy().tolist() == [[PILOT["configuration"]["evaluations"] + 1, 0, 48]]
    assert not table["diverged"].any()
    start = table[table["update"] == 0]
    assert start.groupby("task")[["reward", "proxy", "length"]].nunique().eq(1).all().all()


def test_the_gold_reward_is_that_of_the_task():
    table = measured.pilot()
    short = table[table["task"] != "mode"]
    np.testing.assert_allclose(short["reward"], -short["length"], rtol=1e-6)
    mode, target = table[table["task"] == "mode"], measured.record("prepared")["reward-mode"]
    assert (mode["reward"] <= -(mode["length"] - target["target"]).abs() + 1e-4).all()


def test_ends_show_every_run_beside_its_start():
    table, shown = measured.pilot(), measured.ends()
    before = shown["method"] == "before"
    assert before.sum() == len(TASKS) and len(shown) - before.sum() == PILOT["runs"]
    last = table[table["update"] == 48]
    assert sorted(shown.loc[~before, "KL, nats"]) == sorted(last["kl_ref"])
    assert (shown.loc[before, "KL, nats"] == 0).all()


def test_the_figure_draws_every_run_twice():
    looks = curves.method_looks(measured.pilot()["method"].unique())
    statistics = ["final reward", "final KL to reference"] * len(TASKS)
    _, drawn = curves.dial(measured.panels(), looks, statistics, "learning rate")
    assert len(drawn) == 2 * PILOT["runs"]
    reward = drawn[drawn["statistic"] == "final reward"]["mean"]
    last = measured.pilot().query("update == 48")["reward"]
    assert sorted(reward) == pytest.approx(sorted(last))


def test_what_the_page_concludes_of_the_pilot():
    said, last = measured.numbers(), measured.pilot().query("update == 48")
    least = last[last["task"] == "min"].sort_values("length").iloc[-1]
    assert (least["method"], least["learning_rate"]) == ("dpo_offline", 1e-5)
    missing = pd.DataFrame(PILOT["missing"]).groupby(["method", "task"]).size().to_dict()
    assert {key: n for key, n in missing.items() if key[0] != "ppo_token"} == {
        ("dpo", "skew"): 2, ("dpo_offline", "skew"): 1}  # fmt: skip
    assert sum(r.method == "ppo_token" for r in PLANNED) == 6
    mode = last[last["task"] == "mode"].sort_values("reward", ascending=False)
    assert mode["method"].iloc[:2].tolist() == ["rwr", "dpo"]
    assert (mode["learning_rate"].iloc[:2] == 1e-4).all()
    pref = [said[f"mode_pref_ft_{rate}"] for rate in (1, 3, 10)]
    assert (min(pref), max(pref)) == (pref[0], pref[1])
    assert max(abs(end - said["start_mode"]) for end in pref) < 2 * said["start_error"]
    assert abs(said["mode_dpo_3"] - said["mode_dpo_offline_3"]) < 2 * said["start_error"]
    assert said["turned_end"] < said["turned_best"] and said["turned_length"] > 0
    assert max(said["tensors_high"], said["process_said"]) < said["process_high"]


# the script


def store(folder, run, table, commit):
    name = f"{run.learning_rate:g}"
    about = {"configuration": canonical(run), "identity": name, "commit": commit, "dirty": [],
             "finished": "now", "environment": {}, "code": {}}  # fmt: skip
    write_record(folder / "records" / "ab" / f"{name}.parquet", table, about)


def test_collect_keeps_what_differs_and_drops_seconds(collect, tmp_path):
    table = pd.DataFrame({"update": [0, 1], "reward": [0.0, 1.0], "seconds_training": [0.0, 9.0]})
    for run in PLANNED[:2]:
        store(tmp_path, run, table, commit="c")
    found, about = collect.collected(tmp_path)
    assert list(found) == ["run", *collect.CELL, "update", "reward"] and len(found) == 4
    assert "batch" in about["configuration"] and "seed" not in about["configuration"]
    assert len(collect.absent(found, PLANNED)) == len(PLANNED) - 2


def test_collect_refuses_runs_of_two_commits(collect, tmp_path):
    for run in PLANNED[:2]:
        store(tmp_path, run, pd.DataFrame({"update": [0]}), commit=f"{run.learning_rate:g}")
    with pytest.raises(SystemExit, match="several commits or machines"):
        collect.collected(tmp_path)


def test_collect_reads_what_pytorch_says_of_a_full_card(collect):
    log = ("CUDA out of memory. GPU 0 has a total capacity of 10.00 GiB. Process 7 has 66.00 MiB "
           "memory in use. Process 8 has 6.50 GiB memory in use. Including non-PyTorch memory, "
           "this process has 3.25 GiB memory in use. Of the allocated memory 2.00 GiB is allocated "
           "by PyTorch\nelse\n")  # fmt: skip
    assert collect.memory(log) == {"capacity": 10.0, "processes": [3.25, 6.5], "tensors": [2.0]}


# the page


def test_sentences_use_every_number_that_is_read():
    named = set(re.findall(r"\{glue:text\}`(\w+)", prose()))
    made = set(measured.numbers())
    of_mode = {name for name in made if re.match(r"mode_\w+_\d+(_kl)?$", name)}
    assert made - of_mode <= named
    assert len(named & of_mode) >= 8


def test_typed_numbers_are_those_of_the_files():
    """The ledger, the card, README and the changelog have no `glue`."""
    said, finished = measured.numbers(), f"{PILOT['runs']} of the {PILOT['planned']} runs"
    ledger = "\n".join(c.source for c in read("book/status").cells)
    for text in (
        f"{1e3 * sum(measured.phases().values()):.0f} ms",
        f"{said['h200_together']:.1f} times the estimate",
        f"{said['trl_static']:.1f} times as long",
        f"of which {said['tensors_high']:.1f} were found", f"says {said['process_said']:.1f} now",
        f"{said['process_low']:.0f} to {said['process_high']:.0f} GiB",
    ):
        assert text in ledger
    assert all(finished in text for text in (
        ledger, (ROOT / "README.md").read_text(), (ROOT / "CHANGELOG.md").read_text(),
    ))  # fmt: skip
    assert f"{PILOT['planned'] - PILOT['runs']} of {PILOT['planned']} runs" in CARD.read_text()
