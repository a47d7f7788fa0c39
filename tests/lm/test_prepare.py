"""From a policy and prompts to a prepared folder, and what is refused."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd
import papermill
import pytest
import torch
from transformers import AutoModelForSequenceClassification, CohereConfig, CohereForCausalLM

from lib import lengths
from lib.chapter import Chapter
from lib.lm import pairs, prepare
from lib.lm.config import TINY, length_run
from lib.lm.engine import LengthEngine
from lib.lm.models import ids, load_policy, load_reward_model, load_tokenizer
from lib.lm.problem import LengthProblem
from lib.lm.sampler import Sampler
from lib.lm.text import load_preferences, load_prompts
from lib.untracked import Untracked
from tests.tiny_lm import TEMPLATE, save_tiny_policy, tiny_tokenizer

ROOT = Path(__file__).parents[2]


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
    (table,) = LengthEngine().run([run], Untracked())
    assert len(table) == 2


def test_preparing_again_keeps_what_is_there(prepared, capsys):
    out, arguments = prepared
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")}
    assert len(before) == 4
    assert prepare.main(arguments) == 0
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")} == before
    assert "accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "was"),
    [("seed", 1, "0"), ("max-tokens", 12, "16"), ("max-prompt", 30, "32"), ("limit", 50, "None"),
     ("rate", 0.1, "0.01"), ("epochs", 1, "2"), ("preferences", None, "None")],
)  # fmt: skip
def test_other_settings_than_those_of_what_is_there_are_refused(
    prepared, tmp_path, capsys, option, value, was
):
    out, arguments = prepared
    before = (out / "prepared.json").read_bytes()
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(40)]
    arguments = elsewhere(arguments)
    if option == "preferences":
        value = written(rows, tmp_path / "pairs.jsonl")
        at = arguments.index("--prompts")
        del arguments[at : at + 2]
    assert prepare.main([*arguments, f"--{option}", str(value)]) == 2
    said = capsys.readouterr().err
    assert f"{out} holds" in said and f"--{option} {was}, not {value}" in said
    assert "name a new --out" in said and (out / "prepared.json").read_bytes() == before


def test_other_prompts_are_refused_and_the_same_ones_go_by_any_path(prepared, tmp_path, capsys):
    out, arguments = prepared
    prompts = Path(arguments[3])
    same = shutil.copy(prompts, tmp_path / "same.parquet")
    pd.read_parquet(prompts).head(58).to_parquet(tmp_path / "other.parquet")
    again = shutil.copytree(out, tmp_path / "again")
    assert prepare.main(elsewhere(arguments, prompts=same, out=again)) == 0
    assert prepare.main(elsewhere(arguments, prompts=tmp_path / "other.parquet")) == 2
    assert f"--prompts {prompts}, not {tmp_path / 'other.parquet'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("limit", 0), ("limit", -5), ("max-tokens", 0), ("max-tokens", -3), ("epochs", 0),
     ("rate", -1), ("rate", "nan"), ("seed", -1), ("seed", 2**40), ("max-prompt", 0)],
)  # fmt: skip
def test_bad_numbers_are_named_before_any_work(prepared, tmp_path, capsys, option, value):
    _, arguments = prepared
    changed = elsewhere(arguments, **{"out": tmp_path / "new", option: value})
    assert prepare.main(changed) == 2
    assert f"error: --{option} must be between" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_gpu_that_is_not_here_is_refused(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = elsewhere(prepared[1], out=tmp_path / "new", device="cuda")
    assert prepare.main(arguments) == 2 and not (tmp_path / "new").exists()
    assert "--device cuda: no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("more", [("--limit", "5"), ("--column", "x"), ("--tasks", "min")])
def test_given_preferences_take_no_options_of_prompts(tmp_path, capsys, more):
    policy = save_tiny_policy(tmp_path / "sft")
    arguments = ["--policy", str(policy), "--preferences", "x.jsonl", "--out",
                 str(tmp_path / "out"), *more]  # fmt: skip
    assert prepare.main(arguments) == 2 and not (tmp_path / "out").exists()
    assert f"{more[0]} cannot be given with --preferences" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "how"), [("prompts", "Name it: --column NAME"), ("preferences", "Rename the columns")]
)
def test_columns_that_are_not_found_are_said_in_words_of_the_command(tmp_path, capsys, kind, how):
    policy = save_tiny_policy(tmp_path / "sft")
    source = written([{"a": "b"}], tmp_path / "rows.jsonl")
    assert prepare.main(["--policy", str(policy), f"--{kind}", source, "--out",
                         str(tmp_path / "out")]) == 2  # fmt: skip
    said = capsys.readouterr().err
    assert how in said and "has the columns ['a']" in said and "Name them" not in said
    assert not (tmp_path / "out").exists()


def test_pairs_without_a_split_are_not_kept(prepared, tmp_path, capsys):
    """Of one prompt, which the seed holds out, nothing is left to train on."""
    pd.DataFrame({"prompt": ["a"]}).to_parquet(tmp_path / "prompts.parquet")
    arguments = elsewhere(prepared[1], out=tmp_path / "new", prompts=tmp_path / "prompts.parquet")
    assert prepare.main(arguments) == 2
    assert "nothing is left for train: give more prompts" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_is_no_folder_is_refused(prepared, tmp_path, capsys, place):
    (tmp_path / "file").touch()
    assert prepare.main(elsewhere(prepared[1], out=tmp_path / place)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(tmp_path / "file") in said and said.count("\n") == 1


# --- what a kill leaves ---------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler of errors catches, as no kill can be."""


def killed(*_, **__):
    raise Killed


def elsewhere(arguments, **changed):
    """The arguments with some options changed."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    options |= {"--" + name: str(value) for name, value in changed.items()}
    return [word for pair in options.items() for word in pair]


def half_of(write):
    """`write`, killed when it has written a part of the file at `path`, or of the folder."""

    def cut(*arguments, **more):
        write(*arguments, **more)
        path = next(a for a in reversed(arguments) if isinstance(a, Path))
        for file in [path] if path.is_file() else path.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:100])
        raise Killed

    return cut


def test_another_policy_than_the_one_that_is_there_is_refused(prepared, tmp_path, capsys):
    _, arguments = prepared
    other = save_tiny_policy(tmp_path / "other", seed=1, initializer_range=0.3)
    arguments = elsewhere(arguments, out=tmp_path / "new")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prepare, "_pairs", killed)
        prepare.main(arguments)
    before = (tmp_path / "new" / "policy" / "model.safetensors").read_bytes()
    assert prepare.main(elsewhere(arguments, policy=other)) == 2
    said = capsys.readouterr().err
    assert repr(arguments[1]) in said and repr(str(other)) in said
    assert "prepare a folder of its own" in said
    record = json.loads((tmp_path / "new" / "prepared.json").read_text())
    assert record["policy"]["name"] == arguments[1]
    assert (tmp_path / "new" / "policy" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "new" / "pairs.parquet").exists()


@pytest.mark.parametrize(
    ("where", "what", "left"),
    [(shutil, "copytree", "policy"), (pairs, "save", "pairs.parquet"),
     (prepare.reward, "train", "reward-min")],
)  # fmt: skip
def test_what_was_written_in_part_is_written_again(prepared, tmp_path, where, what, left):
    out, arguments = prepared
    new = tmp_path / "new"
    arguments = [*elsewhere(arguments, out=new, epochs=1), "--tasks", "min"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, what, half_of(getattr(where, what)))
        prepare.main(arguments)
    assert not (new / left).exists()
    assert prepare.main(arguments) == 0
    for file in ("policy/model.safetensors", "pairs.parquet"):
        assert (new / file).read_bytes() == (out / file).read_bytes()
    assert load_reward_model(new / "reward-min") and not list(new.glob(".*"))


def test_a_killed_sampling_goes_on_with_what_it_has_not_drawn(prepared, tmp_path, capsys):
    out, arguments = prepared
    new, sample, drawn = tmp_path / "new", Sampler.sample, []
    arguments = [*elsewhere(arguments, out=new, epochs=1), "--tasks", "min"]

    def first_alone(self, *x):
        drawn.append(len(x[0]))
        return sample(self, *x) if drawn == [90] else killed()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Sampler, "sample", first_alone)
        prepare.main(arguments)
    assert (new / prepare.BATCHES).exists() and "sampling:" in capsys.readouterr().err
    drawn.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", lambda self, *x: drawn.append(len(x[0])) or
                      sample(self, *x))  # fmt: skip
        assert prepare.main(arguments) == 0
    assert drawn == [30]
    assert (new / "pairs.parquet").read_bytes() == (out / "pairs.parquet").read_bytes()
    assert not list(new.glob(".*"))


@pytest.mark.parametrize(("size", "what"), [(4_000, "policy"), (300_000, "reward-min")])
def test_a_disk_without_room_is_said_in_one_line(prepared, tmp_path, capsys, size, what):
    """As where no file may be longer: what was finished stays, and nothing in part."""
    out, arguments = prepared
    new = tmp_path / "new"
    arguments = [*elsewhere(arguments, out=new, epochs=1), "--tasks", "min"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        assert prepare.main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {new / what} cannot be written: ") and "too large" in said
    assert not list(new.glob(".*"))
    assert (new / "pairs.parquet").exists() == (what != "policy") and not (new / what).exists()


def test_a_reward_model_learns_which_of_two_is_shorter(prepared):
    """Held-out accuracy after training, by this book's own scoring, is TRL's."""
    out, _ = prepared
    kept = json.loads((out / "prepared.json").read_text())["reward-min"]["kept"]
    run = length_run("dpo", "min", 1e-3, 0, prepared=str(out), max_tokens=16)
    problem = LengthProblem(run)
    scores = problem.reward.score(problem.held_out)
    right = (scores[problem.held_out.rewards == 1] > scores[problem.held_out.rewards == 0]).float()
    assert right.mean().item() == pytest.approx(kept["accuracy"], abs=1e-6)


def test_a_folder_inside_the_policys_own_holds_the_policy_alone(tmp_path):
    policy = save_tiny_policy(tmp_path / "p")
    (policy / "checkpoint-9").mkdir()
    (policy / "checkpoint-9" / "optimizer.pt").write_text("large")
    prepare.copy_policy(policy, policy / "out" / "policy")
    made = {file.name for file in (policy / "out" / "policy").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= made
    assert not made & {"out", "checkpoint-9"}


@pytest.mark.parametrize(
    ("scaled", "options", "said"),
    [(False, ["--max-tokens", "97"], "--max-prompt 160 and --max-tokens 97 are more than the 256"),
     (True, [], "logits")],
)  # fmt: skip
def test_a_policy_that_the_loop_cannot_train_is_refused_before_any_work(
    tmp_path, capsys, scaled, options, said
):
    if scaled:
        policy = tmp_path / "p"
        CohereForCausalLM(
            CohereConfig(vocab_size=264, hidden_size=16, num_hidden_layers=1, intermediate_size=32,
                         num_attention_heads=2, num_key_value_heads=2, logit_scale=0.5,
                         bos_token_id=None, eos_token_id=256, pad_token_id=257)
        ).save_pretrained(policy)  # fmt: skip
        tiny_tokenizer().save_pretrained(policy)
    else:
        policy = save_tiny_policy(tmp_path / "p")
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(40)]
    pairs_file = written(rows, tmp_path / "pairs.jsonl")
    assert prepare.main(["--policy", str(policy), "--preferences", str(pairs_file), "--out",
                         str(tmp_path / "out"), *options]) == 2  # fmt: skip
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_policy_with_weights_of_another_form_beside_its_own_is_the_same_one(tmp_path):
    """As Mistral's folder has them; they are not copied."""
    policy = save_tiny_policy(tmp_path / "p", initializer_range=0.3)
    shutil.copy(policy / "model.safetensors", policy / "consolidated.safetensors")
    rows = [{"prompt": f"say {i}"} for i in range(200)]
    arguments = ["--policy", str(policy), "--prompts", written(rows, tmp_path / "prompts.jsonl"),
                 "--out", str(tmp_path / "out"), "--max-tokens", "16", "--max-prompt", "32",
                 "--epochs", "1", "--tasks", "min"]  # fmt: skip
    assert [prepare.main(arguments), prepare.main(arguments)] == [0, 0]
    assert not (tmp_path / "out" / "policy" / "consolidated.safetensors").exists()


def test_an_eos_that_is_named_later_than_the_policy_was_copied_is_refused(tmp_path, capsys):
    policy = save_tiny_policy(tmp_path / "p")
    rows = [{"prompt": f"say {i}"} for i in range(40)]
    arguments = ["--policy", str(policy), "--prompts", written(rows, tmp_path / "prompts.jsonl"),
                 "--out", str(tmp_path / "out"), "--max-tokens", "8", "--max-prompt", "32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_pairs", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        assert prepare.main(arguments) == 2
    assert (tmp_path / "out" / "policy").exists()
    assert prepare.main([*arguments, "--eos", "<turn>"]) == 2
    assert "holds a policy made with --eos None, not <turn>" in capsys.readouterr().err


def test_a_template_that_ends_answers_otherwise_than_by_eos_is_told(capsys):
    prepare.warn_of_another_end(tiny_tokenizer(template=TEMPLATE))
    said = capsys.readouterr().err
    assert "ends an answer with '<turn>', and the tokenizer's EOS is '<eos>'" in said
    prepare.warn_of_another_end(tiny_tokenizer(template=TEMPLATE, eos="<turn>"))
    prepare.warn_of_another_end(tiny_tokenizer())
    assert not capsys.readouterr().err
    more = TEMPLATE.replace("{% endfor %}", "{% endfor %}{{ eos_token }}")  # as Phi-3's
    prepare.warn_of_another_end(tiny_tokenizer(template=more))
    assert "ends an answer with '<turn>'" in capsys.readouterr().err


def test_padding_that_is_eos_is_replaced_for_training(tmp_path):
    from lib.lm.reward import _pad_that_ends_nothing

    assert _pad_that_ends_nothing(tiny_tokenizer(), [256]) == "<pad>"
    same = tiny_tokenizer(pad="<eos>")
    assert same.convert_tokens_to_ids(_pad_that_ends_nothing(same, [256])) != same.eos_token_id
    second = _pad_that_ends_nothing(tiny_tokenizer(), [256, 257])  # as Qwen's instruct models
    assert tiny_tokenizer().convert_tokens_to_ids(second) not in (256, 257)


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


@pytest.fixture(scope="module")
def own_preferences(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("own")
    policy = save_tiny_policy(tmp / "sft", initializer_range=0.3)
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(40)]
    (tmp / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--policy", str(policy), "--preferences", str(tmp / "pairs.jsonl"), "--out",
                 str(tmp / "out"), "--max-tokens", "16", "--max-prompt", "32", "--epochs",
                 "1"]  # fmt: skip
    said = io.StringIO()
    with redirect_stdout(said):
        assert prepare.main(arguments) == 0
    assert "--- chosen:" in said.getvalue()  # one formatted example, before any training
    return tmp / "out"


def test_preferences_of_ones_own_are_the_task_given(own_preferences):
    out = own_preferences
    record = json.loads((out / "prepared.json").read_text())
    assert sum(record["pairs"]["count"].values()) == 40 and (out / "reward-given").is_dir()
    for name in ("dpo_offline", "reinforce"):
        run = length_run(name, "given", 1e-3, 0, prepared=str(out), updates=2, minibatch=8,
                         batch=16 if name == "dpo_offline" else 8, max_tokens=16, prompts=3,
                         evaluations=1)  # fmt: skip
        (table,) = LengthEngine().run([run], Untracked())
        assert table["reward"].tolist() == table["proxy"].tolist()  # no rule, no gold
    problem = LengthProblem(run)
    chosen = problem.held_out.rewards == 1
    assert (problem.lengths(problem.held_out)[chosen] > 4).all()  # "yes ..." is the longer one


def test_a_chapter_makes_the_folder_of_the_options_that_it_is_given(tmp_path, capsys, monkeypatch):
    """Once; a second start takes what is there. One example is shown before anything is trained."""
    monkeypatch.setattr(prepare, "PREPARED", tmp_path)
    policy = save_tiny_policy(tmp_path / "sft", initializer_range=0.3)
    table = pd.DataFrame({"text": [f"say {i}" for i in range(40)]})
    table.to_json(tmp_path / "prompts.jsonl", orient="records", lines=True)
    options = {"policy": str(policy), "prompts": str(tmp_path / "prompts.jsonl"), "column": "text",
               "max_tokens": 12, "max_prompt": 32, "epochs": 1, "tasks": ["min", "mode"],
               "reward_model": None}  # fmt: skip
    more = {"profile": "smoke", "recompute": True, "store": tmp_path / "store"}
    with pytest.raises(ValueError, match="plan_only makes nothing.*lib.lm.prepare --out .* mode"):
        Chapter("on_policy_length", prepared=options, **more | {"plan_only": True})
    chapter = Chapter("on_policy_length", prepared=options, **more)
    folder = Path(dict(chapter.profile.options)["prepared"])
    said = capsys.readouterr().out
    assert said.index("--- prompt") < said.index("reward-min: accuracy") and folder.is_dir()
    assert re.search(r"\nreward-min, epoch 1: loss 0\.\d+, accuracy [\d.]+ on held-out", said)
    assert "{'" not in said and "responses cut" not in said
    assert {s.reward_function for s in chapter.settings()} == {"min", "mode"}
    weights = (folder / "reward-min/model.safetensors").stat()
    again = lengths.Prepared({**options, "tasks": ["min", "mode", "skew"], "out": str(folder)})
    assert again.name == str(folder) and (folder / "reward-skew").is_dir()
    assert (folder / "reward-min/model.safetensors").stat() == weights


def test_a_folder_is_named_by_what_its_options_mean(tmp_path, monkeypatch):
    """However paths, numbers and defaults are written; another value has a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "prepare", lambda options: None)
    (tmp_path / "p").mkdir()
    (tmp_path / "x.jsonl").touch()
    plain = {"policy": "p", "prompts": "x.jsonl"}
    same = ({"policy": str(tmp_path / "p/")}, {"prompts": "./x.jsonl"}, {"seed": "0"},
            {"max_tokens": 96, "rate": 0.001, "epochs": 6}, {"tasks": ["skew", "min", "mode"]},
            {"device": "cpu", "limit": None})  # fmt: skip
    other = ({"prompts": "y.jsonl"}, {"seed": 1}, {"max_tokens": 95}, {"tasks": ["min"]},
             {"reward_model": "p"}, {"column": "x"}, {"dtype": "bfloat16"})  # fmt: skip
    name = prepare.made(plain)
    assert {prepare.made(plain | more) for more in same} == {name}
    assert len({name, *(prepare.made(plain | more) for more in other)}) == 1 + len(other)


@pytest.mark.parametrize(("chapter", "change", "said"), [
    ("on_policy_length", {"polcy": "x"}, r"prepared: there is no polcy; there are \['column"),
    ("on_policy_length", {"policy": None}, "prepared: the following arguments are required"),
    ("on_policy_length", {"prompts": "no/such.jsonl"}, "no/such.jsonl"),
    ("on_policy_length", {"tasks": "mni"}, "prepared: argument --tasks: invalid choice: 'mni'"),
    ("full_scale", {}, "prepared must be a folder that lib.lm.prepare_full made"),
])  # fmt: skip
def test_options_of_a_folder_that_are_none_are_refused(tmp_path, chapter, change, said):
    options = {"policy": str(TINY / "policy"), "prompts": "x.jsonl", "out": str(tmp_path / "new")}
    with pytest.raises((ValueError, OSError), match=said):
        Chapter(chapter, profile="smoke", recompute=True, prepared={**options, **change})
    with pytest.raises(ValueError, match="need a profile"):
        Chapter(chapter, prepared=options)


@pytest.mark.parametrize(("change", "said"), [
    ({"methods": ["dpoo"]}, "methods must be among"), ({"seeds": [1]}, "seeds must be"),
    ({"learning_rates": [50]}, "learning_rates must be"),
    ({"options": {"dtype": "flaot16"}}, "flaot16"), ({"profile": "gpu"}, "needs a CUDA device"),
])  # fmt: skip
def test_other_parameters_are_refused_before_the_folder_is_made(change, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(prepare, "made", None)
    with pytest.raises((ValueError, RuntimeError), match=said):
        Chapter("on_policy_length", prepared={"policy": "p", "prompts": "x"},
                **{"profile": "smoke", "recompute": True} | change)  # fmt: skip


def test_a_folder_that_another_command_fills_is_waited_for(prepared, tmp_path):
    """The second finds all that the first has made, and makes nothing."""
    _, arguments = prepared
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    options |= {"--out": str(tmp_path / "new"), "--epochs": "1", "--tasks": "min"}
    command = [sys.executable, "-m", "lib.lm.prepare",
               *[word for pair in options.items() for word in pair]]  # fmt: skip
    both = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT) for _ in range(2)]  # fmt: skip
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("reward-min: accuracy" in text for text in said) == 1


def test_the_length_chapters_run_on_preferences_of_ones_own(own_preferences, tmp_path):
    """From a command in the root, as a reader runs them."""
    for chapter in ("complementary_length", "negative_gradient_length", "on_policy_length"):
        found = papermill.execute_notebook(
            ROOT / f"book/{chapter}.ipynb", tmp_path / "out.ipynb", cwd=ROOT, progress_bar=False,
            parameters={"profile": "smoke", "recompute": True, "prepared": str(own_preferences),
                        "options": {"max_tokens": 16}, "store": str(tmp_path / "store")},
        )  # fmt: skip
        shown = "".join(str(c.get("outputs", "")) for c in found.cells).lower()
        assert "given" in shown and "| proxy |" in shown and "| gold reward |" not in shown


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


# --- what ships, and how samples are drawn --------------------------------------------------------


def settled(*arguments):
    options = prepare._parser().parse_args(["--policy", "p", "--out", "o", *arguments])
    prepare.settle(options)
    return options


def test_the_shipped_pairs_are_those_of_their_command():
    """Its prompts by split, and what the policy answers to the first of them."""
    options = settled("--prompts", str(TINY / "responses.parquet"), "--column", "prompt",
                      "--max-prompt", "64", "--device", "cpu")  # fmt: skip
    tokenizer, _ = load_tokenizer(TINY / "policy")
    model, _ = load_policy(TINY / "policy")
    found, prompts = ids(tokenizer, model), prepare._prompts(options, tokenizer)
    shipped = {s: pairs.load(TINY / "pairs.parquet", s, found.eos) for s in pairs.SPLITS}
    assert prompts == {s: p.prompts for s, p in shipped.items()}
    sampler = Sampler(model, found, 64 + 96, options)
    assert sampler.rows >= 2 * pairs.BATCH  # all at once, as they were drawn
    again = pairs.sample_pairs(sampler, prompts["train"][:12], options.max_tokens, options.seed)
    then = shipped["train"]
    two = ((again.first, then.first[:12]), (again.second, then.second[:12]))
    same = [a == b for pair in two for a, b in zip(*pair, strict=True)]
    assert sum(same) >= 23  # of 24: another processor may round a token over


def test_the_defaults_are_those_that_the_shipped_folder_was_made_with():
    options = settled("--prompts", "x", "--device", "cpu")
    assert (options.rate, options.max_tokens, options.dtype) == (1e-3, 96, "float32")
    assert options.epochs == 6 and not options.cut


def test_a_reward_model_that_was_trained_before_starts_from_a_small_rate():
    options = settled("--prompts", "x", "--reward-model", "somewhere")
    assert (options.rate, options.epochs) == (1e-5, 1)
    options = settled("--prompts", "x", "--reward-model", "y", "--rate", "0.1", "--epochs", "3")
    assert (options.rate, options.epochs) == (0.1, 3)


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [("cpu", None, "float32"), ("cuda", (7, 5), "float16"), ("cuda:1", (8, 0), "bfloat16"),
     ("cuda", (9, 0), "bfloat16"), ("cuda", None, "float32")],
)  # fmt: skip
def test_samples_are_drawn_in_a_dtype_that_the_device_has(device, capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert prepare.usual_dtype(device) == dtype


def test_a_folder_is_made_in_16_bits_with_another_decoder(prepared, tmp_path):
    out, arguments = prepared
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    options |= {"--out": str(tmp_path / "new"), "--tasks": "min", "--epochs": "1",
                "--dtype": "bfloat16", "--decoder": "static"}  # fmt: skip
    assert prepare.main([word for pair in options.items() for word in pair]) == 0
    made, exact = (pd.read_parquet(f / "pairs.parquet") for f in (tmp_path / "new", out))
    same = [list(a) == list(b) for a, b in zip(made["first"], exact["first"], strict=True)]
    assert 0 < sum(same) < len(same)  # near, and rounded
    record = json.loads((tmp_path / "new" / "prepared.json").read_text())
    assert record["arguments"]["dtype"] == "bfloat16"


# --- what a file says -----------------------------------------------------------------------------

ROWS = [{"prompt": f"say {i // 2}", "chosen": f"yes {i}", "rejected": f"no {i}",
         "split": ("train", "validation", "test")[i // 2 % 3]} for i in range(24)]  # fmt: skip
ROWS[2]["prompt"] = "  "  # is dropped: what comes after must not move up


def written(rows, file):
    table = pd.DataFrame(rows)
    if file.suffix == ".jsonl":
        table.to_json(file, orient="records", lines=True)
    else:
        getattr(table, f"to_{file.suffix[1:]}")(file, index=False)
    return str(file)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_files_own_split_is_kept_whatever_its_format(suffix, tmp_path):
    source = written(ROWS, tmp_path / f"rows.{suffix}")
    for load in (load_prompts, load_preferences):
        read = load(source)
        assert len(read) == 23
        named = dict(zip(read.prompts, prepare.split_of(source, read), strict=True))
        assert named == {r["prompt"]: r["split"] for r in ROWS if r["prompt"].strip()}
    prompts = prepare._prompts(settled("--prompts", source), tiny_tokenizer())
    assert [len(prompts[s]) for s in pairs.SPLITS] == [8, 7]  # and the test rows are left out
    options = settled("--preferences", source)
    read = load_preferences(source)
    splits, texts, _ = prepare.given_pairs(read, options, tiny_tokenizer(), (256,),
                                           prepare.split_of(source, read))  # fmt: skip
    for name in pairs.SPLITS:
        wanted = [r["prompt"] for r in ROWS if r["split"] == name and r["prompt"].strip()]
        assert texts[name]["instruction"].tolist() == wanted and len(splits[name]) == len(wanted)


def one_too_long(*sides):
    """Rows of which the second's prompt is too long to be kept, and those that stay."""
    rows = [{"prompt": f"say {i}" if i != 1 else "x" * 500, **{s: f"{s} {i}" for s in sides},
             "split": "train" if i < 12 else "validation"} for i in range(20)]  # fmt: skip
    return rows, [row for i, row in enumerate(rows) if i != 1]


def test_a_prompt_that_is_too_long_moves_no_other(tmp_path):
    rows, kept = one_too_long("chosen", "rejected")
    source, tokenizer = written(rows, tmp_path / "rows.jsonl"), tiny_tokenizer()
    prompts = prepare._prompts(settled("--prompts", source), tokenizer)
    assert [len(prompts[s]) for s in pairs.SPLITS] == [11, 8]
    read = load_preferences(source)
    splits, texts, record = prepare.given_pairs(read, settled("--preferences", source), tokenizer,
                                                (256,), prepare.split_of(source, read))  # fmt: skip
    assert record["too long"] == 1
    for name, own in splits.items():
        wanted = [row for row in kept if row["split"] == name]
        assert texts[name]["instruction"].tolist() == [row["prompt"] for row in wanted]
        for side, key in ((own.first, "chosen"), (own.second, "rejected")):
            decoded = [tokenizer.decode(coded[:-1]) for coded in side]
            assert decoded == [row[key] for row in wanted]
        for coded, row in zip(own.prompts, wanted, strict=True):
            assert row["prompt"] in tokenizer.decode(coded)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({0: {"split": "dev"}}, "row 1: split must be one of .*, got 'dev'"),
        ({0: {"split": "validation"}}, "row 2: its prompt is in 'train' and in 'validation'"),
        ({i: {"split": "train"} for i in range(24)}, r"no row that is \['validation'\]"),
    ],
)
def test_a_split_that_is_none_is_refused(change, match, tmp_path):
    rows = [row | change.get(i, {}) for i, row in enumerate(ROWS)]
    source = written(rows, tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=match):
        prepare.split_of(source, load_prompts(source))


def test_all_pairs_of_a_prompt_are_on_one_side():
    prompts = [f"say {i % 40}" for i in range(200)]
    names = prepare.drawn(prompts, 0)
    assert set(names) == {"train", "validation"}
    assert len(set(zip(prompts, names, strict=True))) == 40
    assert names[:40] == prepare.drawn(prompts[:40], 0)  # those of a file without repetitions


def test_a_file_of_distinct_prompts_keeps_the_split_that_it_had():
    """Recorded when a split was drawn for every row."""
    names = prepare.drawn([f"say {i}" for i in range(60)], 0)
    assert [i for i, name in enumerate(names) if name == "validation"] == [0, 1, 43, 46, 48]


# --- given pairs ----------------------------------------------------------------------------------


def test_a_cap_that_nobody_named_may_not_cut_most_responses(tmp_path, capsys):
    rows = [{"prompt": f"say {i}", "chosen": "y" * 200, "rejected": "n" * (1 + 199 * (i < 2))}
            for i in range(300)]  # fmt: skip
    read = load_preferences(written(rows, tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="302 of all 600 responses reach 96 tokens .*--max-tokens"):
        prepare.given_pairs(read, settled("--preferences", "x"), tiny_tokenizer(), (256,))
    options = settled("--preferences", "x", "--max-tokens", "96")
    _, _, record = prepare.given_pairs(read, options, tiny_tokenizer(), (256,))
    assert record["capped"] == 302
    assert "302 of all 600 responses reach 96 tokens and are cut" in capsys.readouterr().out


def other_tokenizer():
    """The bytes in another order."""
    tokenizer = tiny_tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"] = {t: 255 - i for t, i in data["model"]["vocab"].items()}
    return type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(data)),
                           eos_token="<eos>", pad_token="<pad>")  # fmt: skip


def test_a_reward_model_of_another_tokenizer_is_refused_before_any_work(prepared, tmp_path, capsys):
    _, arguments = prepared
    other = save_tiny_policy(tmp_path / "other", tokenizer=other_tokenizer())
    more = tiny_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<mine>"]})
    same = save_tiny_policy(tmp_path / "same", tokenizer=more)
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    options |= {"--out": str(tmp_path / "new"), "--tasks": "min", "--epochs": "1"}
    for reward, status in ((other, 2), (same, 0)):
        options["--reward-model"] = str(reward)
        assert prepare.main([word for pair in options.items() for word in pair]) == status
        if status:
            assert "has another tokenizer than the policy" in capsys.readouterr().err
            assert not (tmp_path / "new").exists()
