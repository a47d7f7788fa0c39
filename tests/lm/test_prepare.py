"""From a policy and prompts to a prepared folder, and what is refused."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from transformers import AutoModelForSequenceClassification

from lib.lm import prepare
from lib.lm.config import length_run
from lib.lm.engine import LengthEngine
from lib.lm.problem import LengthProblem
from tests.lm.test_problem import Silent
from tests.tiny_lm import save_tiny_policy, tiny_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepare")
    policy = save_tiny_policy(root / "sft", initializer_range=0.3)
    table = pd.DataFrame({"prompt": [f"say {i}" for i in range(60)],
                          "split": ["train"] * 45 + ["validation"] * 15})  # fmt: skip
    table.to_parquet(root / "prompts.parquet")
    arguments = ["--policy", str(policy), "--prompts", str(root / "prompts.parquet"), "--out",
                 str(root / "out"), "--max-tokens", "16", "--max-prompt", "32", "--epochs", "2",
                 "--rate", "0.01"]  # fmt: skip
    assert prepare.main(arguments) == 0
    return root / "out", arguments


def test_the_folder_says_what_it_was_made_of(prepared):
    out, _ = prepared
    record = json.loads((out / "prepared.json").read_text())
    assert record["pairs"]["count"] == {"train": 45, "validation": 15}
    assert record["policy"]["resolved"].startswith("sha256:")
    for task in ("min", "mode", "skew"):
        made = record[f"reward-{task}"]
        assert len(made["epochs"]) == 2 and made["kept"] in made["epochs"]
        assert made["pairs"]["train"] + made["ties"]["train"] == 45
        assert not (out / f"reward-{task}" / "trainer").exists()


def test_a_limit_takes_prompts_evenly():
    assert prepare._evenly(7, 3) == [0, 2, 4]
    assert prepare._evenly(0, 3) == []
    for limit in (None, 7, 100):
        assert prepare._evenly(7, limit) == list(range(7))


def test_too_few_prompts_to_compare_are_named(tmp_path, capsys):
    """The only validation pair of two equal lengths has nothing to teach."""
    policy = save_tiny_policy(tmp_path / "sft")
    table = pd.DataFrame({"prompt": ["a", "b"], "split": ["train", "validation"]})
    table.to_parquet(tmp_path / "prompts.parquet")
    assert prepare.main(["--policy", str(policy), "--prompts", str(tmp_path / "prompts.parquet"),
                         "--out", str(tmp_path / "out"), "--max-tokens", "1"]) == 2  # fmt: skip
    assert "min: none of the 1 train pairs is without a tie: give" in capsys.readouterr().err


def test_a_run_trains_on_it(prepared):
    out, _ = prepared
    run = length_run("dpo", "min", 1e-3, 0, prepared=str(out), updates=2, minibatch=8, batch=8,
                     max_tokens=16, prompts=4, evaluations=1)  # fmt: skip
    (table,) = LengthEngine().run([run], Silent())
    assert len(table) == 2


def test_preparing_again_keeps_what_is_there(prepared, capsys):
    out, arguments = prepared
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")}
    assert len(before) == 4
    assert prepare.main(arguments) == 0
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")} == before
    assert "accuracy" not in capsys.readouterr().out


def test_a_reward_model_learns_which_of_two_is_shorter(prepared):
    """Held-out accuracy after training, by this book's own scoring, is TRL's."""
    out, _ = prepared
    kept = json.loads((out / "prepared.json").read_text())["reward-min"]["kept"]
    run = length_run("dpo", "min", 1e-3, 0, prepared=str(out), max_tokens=16)
    problem = LengthProblem(run)
    scores = problem.reward.score(problem.held_out)
    right = (scores[problem.held_out.rewards == 1] > scores[problem.held_out.rewards == 0]).float()
    assert right.mean().item() == pytest.approx(kept["accuracy"], abs=1e-6)


def test_padding_that_is_eos_is_replaced_for_training(tmp_path):
    from lib.lm.reward import _pad_that_ends_nothing

    assert _pad_that_ends_nothing(tiny_tokenizer()) == "<pad>"
    same = tiny_tokenizer(pad="<eos>")
    assert same.convert_tokens_to_ids(_pad_that_ends_nothing(same)) != same.eos_token_id


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"--policy": "no/such/folder"}, "no folder 'no/such/folder'"),
     ({"--prompts": "missing.jsonl"}, "missing.jsonl")],
)  # fmt: skip
def test_what_is_missing_is_named(prepared, tmp_path, capsys, changed, message):
    _, arguments = prepared
    options = dict(zip(arguments[::2], arguments[1::2], strict=True)) | changed
    options["--out"] = str(tmp_path / "new")
    assert prepare.main([word for pair in options.items() for word in pair]) == 2
    assert message in capsys.readouterr().err


def test_weights_are_safetensors(prepared):
    out, _ = prepared
    model = AutoModelForSequenceClassification.from_pretrained(out / "reward-min",
                                                               use_safetensors=True)  # fmt: skip
    assert model.num_labels == 1


def test_preferences_of_ones_own_are_the_task_given(tmp_path, capsys):
    policy = save_tiny_policy(tmp_path / "sft", initializer_range=0.3)
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(40)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    arguments = ["--policy", str(policy), "--preferences", str(file), "--out", str(out),
                 "--max-tokens", "16", "--max-prompt", "32", "--epochs", "1"]  # fmt: skip
    assert prepare.main(arguments) == 0
    assert "--- chosen:" in capsys.readouterr().out  # one formatted example, before any training
    record = json.loads((out / "prepared.json").read_text())
    assert sum(record["pairs"]["count"].values()) == 40 and (out / "reward-given").is_dir()
    for name in ("dpo_offline", "reinforce"):
        run = length_run(name, "given", 1e-3, 0, prepared=str(out), updates=2, minibatch=8,
                         batch=16 if name == "dpo_offline" else 8, max_tokens=16, prompts=3,
                         evaluations=1)  # fmt: skip
        (table,) = LengthEngine().run([run], Silent())
        assert table["reward"].tolist() == table["proxy"].tolist()  # no rule, no gold
    problem = LengthProblem(run)
    chosen = problem.held_out.rewards == 1
    assert (problem.lengths(problem.held_out)[chosen] > 4).all()  # "yes ..." is the longer one


def test_given_preferences_have_no_rule_to_train_on():
    with pytest.raises(ValueError, match="follow no rule: label must be 'learned'"):
        length_run("dpo", "given", 1e-3, 0, label="rule")


def test_an_eos_that_was_named_is_kept_for_the_runs(tmp_path):
    policy = save_tiny_policy(tmp_path / "sft", tokenizer=tiny_tokenizer(eos=None))
    table = pd.DataFrame({"prompt": [f"say {i}" for i in range(30)]})
    table.to_json(tmp_path / "prompts.jsonl", orient="records", lines=True)
    arguments = ["--policy", str(policy), "--prompts", str(tmp_path / "prompts.jsonl"), "--out",
                 str(tmp_path / "out"), "--max-tokens", "12", "--max-prompt", "32", "--epochs", "1",
                 "--tasks", "min", "--eos", "<eos>"]  # fmt: skip
    assert prepare.main(arguments) == 0
    run = length_run("dpo", "min", 1e-3, 0, prepared=str(tmp_path / "out"), max_tokens=12)
    assert LengthProblem(run).data.ids.eos == (256,)
