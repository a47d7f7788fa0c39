"""The command of one run: the policy that it keeps, and what it warns of."""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest
import torch

from lib.lm import lora, run
from lib.lm.config import length_run
from lib.lm.engine import LengthEngine
from lib.lm.models import load_policy, load_tokenizer
from lib.lm.places import spelled
from lib.runs import identity
from lib.runs.records import read_record
from lib.untracked import Untracked
from tests.lm_folder import prepared_folder
from tests.tiny_lm import save_tiny_policy

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared_folder(tmp_path_factory.mktemp("prepared"))


def command(folder, *more):
    return ["--method", "dpo", "--task", "min", "--rate", "1e-2", "--updates", "2", "--prepared",
            str(folder), "--device", "cpu", "--option", "batch=8", "--option", "minibatch=8",
            "--option", "max_tokens=8", "--option", "prompts=4", "--option", "evaluations=1",
            *more]  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--option", "lora_rank=2")], ids=["all", "lora"])
def test_the_policy_that_is_saved_is_where_a_further_run_starts(folder, tmp_path, more):
    saved = tmp_path / "saved"
    assert run.main([*command(folder, *more), "--save", str(saved)]) == 0
    model, _ = load_policy(saved)
    before, _ = load_policy(folder / "policy")
    moved = (model(TOKENS).logits - before(TOKENS).logits).abs().max()
    assert moved > 1e-3 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in before.named_parameters()}
    tokenizers = [load_tokenizer(f)[0] for f in (saved, folder / "policy")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    further = shutil.copytree(folder, tmp_path / "further")
    shutil.rmtree(further / "policy")
    saved.rename(further / "policy")
    config = length_run("dpo", "min", 1e-2, 0, prepared=str(further), updates=2, batch=8,
                        minibatch=8, max_tokens=8, prompts=4, evaluations=1)  # fmt: skip
    (table,) = LengthEngine().run([config], Untracked())
    assert table["kl_ref"].iloc[0] == pytest.approx(0, abs=1e-6)
    assert table["kl_ref"].iloc[1] > 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_adapters_add_is_in_the_saved_matrices(tmp_path, dtype, tied):
    policy = save_tiny_policy(tmp_path / "p", initializer_range=0.3, tie_word_embeddings=tied)
    model, _ = load_policy(policy)
    lora.attach(model, 2, 0, dtype)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    plain = model.float()(TOKENS).logits  # frozen matrices stay rounded, products are exact
    with lora.switched_off(model):
        without = model(TOKENS).logits
    run.save(model, policy, tmp_path / "out")
    logits = load_policy(tmp_path / "out")[0](TOKENS).logits
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)
    assert (logits - without).abs().max() > 0.1


def test_a_policy_that_cannot_be_saved_leaves_its_table_and_no_part(
    folder, tmp_path, capsys, monkeypatch
):
    def full(model, source, to):
        to.mkdir()
        (to / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "save", full)
    saved, table = tmp_path / "saved", tmp_path / "table.parquet"
    assert run.main([*command(folder), "--save", str(saved), "--output", str(table)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: {saved} cannot be written: No space left on device"
    assert len(pd.read_parquet(table)) == 2 and not list(saved.iterdir())


def test_nothing_is_written_over_and_nothing_is_trained_first(folder, tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert run.main([*command(folder), "--save", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert f"--save {tmp_path}: there is something already" in said.err and not said.out
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("task", "there"), [("mode", r"\('min', 'skew'\)"), ("given", "mode")])
def test_a_task_that_the_folder_was_not_made_for_is_said(folder, tmp_path, capsys, task, there):
    few = shutil.copytree(folder, tmp_path / "few")
    if task == "mode":
        shutil.rmtree(few / "reward-mode")
    assert run.main([*command(few), "--task", task]) == 2
    said = capsys.readouterr().err
    assert re.search(f"task must be one of .*{there}.*got '{task}': lib.lm.prepare", said), said


@pytest.mark.parametrize("what", ["run", "code", "file"])
def test_a_checkpoint_of_something_else_is_neither_ignored_nor_written_over(
    folder, tmp_path, capsys, monkeypatch, what
):
    file = tmp_path / "checkpoint.safetensors"
    options = run._parser().parse_args([*command(folder), "--checkpoint", str(file)])
    own = run._checkpoint(options, run._header(run.configuration(options)))
    own.save({"a": TOKENS}, {})
    assert own.load() is not None
    seed, said = "0", "of another run"
    if what == "run":
        seed = "1"
    elif what == "code":
        monkeypatch.setattr(run, "code_fingerprint", lambda *_: {"lib/losses.py": "another"})
        said = "of other code"
    else:
        file.write_bytes(b"a policy, by mistake")
        said = "no checkpoint that can be read"
    before = file.read_bytes()
    monkeypatch.setattr(run.parallel, "start", None)  # nothing has been started
    arguments = [*command(folder, "--seed", seed), "--checkpoint", str(file)]
    assert run.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"--checkpoint {file}" in error and said in error and "remove it" in error
    assert file.read_bytes() == before


def test_another_cap_than_that_of_the_pairs_is_said(folder, tmp_path, capsys):
    other = shutil.copytree(folder, tmp_path / "other")
    for cap, warned in ((12, True), (8, False)):
        (other / "prepared.json").write_text(json.dumps({"arguments": {"max_tokens": str(cap)}}))
        assert run.main(command(other)) == 0
        assert ("cut at 8 tokens, the pairs of" in capsys.readouterr().err) == warned


def refused(arguments, capsys, monkeypatch):
    """What is said of a command that has started nothing."""
    monkeypatch.setattr(run.parallel, "start", None)
    assert run.main(arguments) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("option", "place", "said"),
    [
        ("--output", ".", "is a folder: name a file"),
        ("--checkpoint", ".", "is a folder: name a file"),
        ("--save", "file", "is a file: name a new folder"),
        ("--output", "t.csv", "the table is parquet, name it *.parquet"),
        ("--output", "file/below.parquet", "cannot be written"),
        ("--checkpoint", "file/below", "cannot be written"),
        ("--save", "file/below", "cannot be written"),
        ("--save", "/proc/below", "cannot be written"),
    ],
)
def test_places_that_cannot_be_written_are_said_before_training(
    folder, tmp_path, capsys, monkeypatch, option, place, said
):
    (tmp_path / "file").touch()
    place = tmp_path / place
    error = refused([*command(folder), option, str(place)], capsys, monkeypatch)
    assert f"{option} {place}" in error and said in error


@pytest.mark.parametrize("other, below", [("--output", "x"), ("--save", "x/checkpoint")])
def test_a_checkpoint_lies_where_nothing_else_will(
    folder, tmp_path, capsys, monkeypatch, other, below
):
    """It is removed at the end; and in a folder to save to it would keep a run from going on."""
    places = [other, str(tmp_path / "x"), "--checkpoint", str(tmp_path / below)]
    error = refused([*command(folder), *places], capsys, monkeypatch)
    assert f"--checkpoint {tmp_path / below} is the place of --output, or in that of" in error


@pytest.mark.parametrize("fails", ["write_record", "save"])
def test_what_can_be_written_is_kept_where_the_other_cannot_be(
    folder, tmp_path, monkeypatch, fails
):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(run, fails, full)
    places = ["--save", str(tmp_path / "saved"), "--output", str(tmp_path / "table.parquet")]
    assert run.main([*command(folder), *places]) == 2
    if fails == "write_record":
        load_policy(tmp_path / "saved")
    else:
        assert pd.read_parquet(tmp_path / "table.parquet")["update"].tolist() == [0, 2]


def test_what_is_written_says_what_it_is_of_and_the_lines_how_long_it_takes(
    folder, tmp_path, capsys
):
    file, saved = tmp_path / "table.parquet", tmp_path / "saved"
    places = ["--output", str(file), "--save", str(saved), "--option", "evaluations=2"]
    assert run.main([*command(folder), *places, "--updates", "4"]) == 0
    _, about = read_record(file)
    assert about["configuration"]["fields"]["method"] == "dpo" and about["commit"]
    kept = json.loads((saved / "run.json").read_text())
    assert kept.items() <= about.items()
    first, middle, last = (line for line in capsys.readouterr().out.splitlines()
                           if " of 4 updates: gold " in line)  # fmt: skip
    assert "left" not in first + last and re.search(r"2 of 4 .*, about \d+ s left$", middle)


def test_a_completion_that_may_outgrow_the_policys_positions_is_refused(folder, capsys):
    error = run.main([*command(folder), "--option", "max_tokens=5000"])
    assert error == 2 and "max_tokens must be at most" in capsys.readouterr().err


def test_a_gpu_that_is_not_here_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = refused([*command(folder), "--device", "cuda"], capsys, monkeypatch)
    assert "--device cuda: no CUDA device" in error


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("prompts=abc", "prompts must be a whole number, got 'abc'"),
        ("prompts=2.5", "prompts must be a whole number, got 2.5"),
        ("prompts=null", "prompts must be a whole number, got None"),
        ("beta=x", "beta must be a number or null, got 'x'"),
        ("checkpointing=yes", "checkpointing must be true or false, got 'yes'"),
        ("held_out=no", "held_out must be a whole number, got 'no'"),
        ("minibatch=0", "minibatch must be between 1 and"),
        ("seed=3", "--option seed=3: give --seed"),
        ("task=mode", "--option task=mode: give --task"),
        ("learning_rate=1", "give --rate"),
        ("iterations=5", "--option iterations: for dpo it follows from --updates, minibatch"),
        ("run=x", "unknown option ['run']; choose from ['batch', "),
        ("prepared=nonexist", "there is no folder 'nonexist'; give one that lib.lm.prepare made, "
                              "or one of ('tiny', 'smollm2', 'pythia')"),
    ],
)  # fmt: skip
def test_options_that_are_none_are_said_in_one_line(folder, capsys, monkeypatch, option, said):
    assert said in refused([*command(folder), "--option", option], capsys, monkeypatch)


def test_an_offline_method_takes_no_schedule_that_would_be_dropped(folder, capsys, monkeypatch):
    error = refused([*command(folder), "--method", "dpo_offline"], capsys, monkeypatch)
    assert "--option batch: for dpo_offline it follows from --updates, minibatch" in error


def test_a_folder_is_one_however_it_is_written(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    ways = (folder.name, f"./{folder.name}/", str(folder), f"{folder}/", f"x/../{folder.name}")
    configs = [run.configuration(run._parser().parse_args(command(way))) for way in ways]
    assert {c.prepared for c in configs} == {folder.name} and len({*map(identity, configs)}) == 1
    monkeypatch.chdir(folder / "policy")
    assert run.configuration(run._parser().parse_args(command("../"))).prepared == str(folder)
    assert spelled("tiny") == "tiny"
