"""What `lib.lm.prepare_full` refuses, takes up again, and draws for the data that ship."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

from lib.lm import pairs as files
from lib.lm import prepare_full
from lib.lm.config import TINY
from lib.lm.full_scale import DATA
from lib.lm.models import load_tokenizer
from lib.lm.pairs import SPLITS
from tests.lm.test_prepare import Killed, half_of, one_too_long, other_tokenizer, written
from tests.tiny_lm import TEMPLATE, save_tiny_policy, tiny_tokenizer


@pytest.fixture
def pairs(tmp_path):
    """Preferences, a policy, and what makes a folder of them."""
    rows = [{"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"}
            for i in range(60)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    policy = save_tiny_policy(tmp_path / "a")
    arguments = ["--policy", f"a={policy}", "--distinct", str(tmp_path / "pairs.jsonl"), "--out",
                 str(tmp_path / "out"), "--epochs", "1", "--max-tokens", "16"]  # fmt: skip
    return tmp_path, arguments


def refused(arguments, capsys):
    assert prepare_full.main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "tokenizer",
    [other_tokenizer(), tiny_tokenizer(template=TEMPLATE), tiny_tokenizer(eos="<turn>")],
    ids=["vocabulary", "template", "eos"],
)
def test_a_policy_of_another_tokenizer_is_refused_before_any_work(pairs, capsys, tokenizer):
    root, arguments = pairs
    other = save_tiny_policy(root / "b", tokenizer=tokenizer)
    said = refused([*arguments, "--policy", f"b={other}"], capsys)
    assert "has another tokenizer than" in said and "prepare a folder of its own" in said
    assert not (root / "out").exists()


def test_an_eos_that_is_named_ends_the_responses_and_stays_with_the_policies(pairs, capsys):
    root, arguments = pairs
    named = [*arguments, "--eos", "<turn>"]
    assert "not with --no-copy" in refused([*named, "--no-copy"], capsys)
    assert prepare_full.main(named) == 0
    tokenizer, _ = load_tokenizer(root / "out" / "policy-a")
    assert tokenizer.eos_token == "<turn>"
    table = pd.read_parquet(root / "out" / "distinct.parquet")
    assert {ids[-1] for ids in table["first"]} == {tokenizer.eos_token_id}
    assert "has another tokenizer" in refused(arguments, capsys)  # now without the option
    assert prepare_full.main(named) == 0


@pytest.mark.parametrize("named", ["a/b", "a/b=c", "=c", "a="])
def test_a_policy_without_a_name_of_its_own_is_refused(pairs, capsys, named):
    with pytest.raises(SystemExit):
        prepare_full.main([*pairs[1], "--policy", named])
    assert f"without '/', got {named!r}" in capsys.readouterr().err


def test_the_commands_of_the_help_are_read(pairs):
    """Each example is one that the parser takes."""
    text = prepare_full.__doc__.replace("\\\n", " ")
    examples = [line.split()[3:] for line in text.splitlines() if "python -m" in line]
    policies = [prepare_full._parser().parse_args(words).policy for words in examples]
    assert [[name for name, _ in named] for named in policies] == [["128", "64"], ["sft"]]


@pytest.mark.parametrize("rows", [[{"a": "b"}], [{"prompt": "a", "chosen": "b", "rejected": "c"}]])
def test_pairs_of_no_use_are_refused_before_anything_is_written(pairs, capsys, rows):
    """Without their columns; one pair alone, which leaves nothing to hold out."""
    root, arguments = pairs
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = refused(arguments, capsys)
    assert ("has the columns ['a']" if "a" in rows[0] else "nothing is left for") in said
    assert not (root / "out").exists()


def test_a_folder_without_a_named_eos_takes_none_later(pairs, capsys):
    root, arguments = pairs
    assert prepare_full.main(arguments) == 0
    similar = [*arguments, "--similar", str(root / "pairs.jsonl"), "--eos", "<turn>"]
    del similar[similar.index("--distinct") : similar.index("--distinct") + 2]
    assert "has another tokenizer" in refused(similar, capsys)
    assert not (root / "out" / "similar.parquet").exists()


def test_a_folder_takes_no_second_policy_of_another_tokenizer(pairs, capsys):
    root, arguments = pairs
    assert prepare_full.main(arguments) == 0
    assert prepare_full.main([*arguments, "--policy", f"b={save_tiny_policy(root / 'b')}"]) == 0
    other = save_tiny_policy(root / "c", tokenizer=other_tokenizer())
    said = refused(["--policy", f"c={other}", *arguments[2:]], capsys)
    assert "policy-a" in said and "has another tokenizer" in said
    assert not (root / "out" / "policy-c").exists()


def test_a_folder_takes_no_other_policy_of_the_same_name(pairs, capsys):
    root, arguments = pairs
    assert prepare_full.main(arguments) == 0
    other = save_tiny_policy(root / "b", seed=1)
    said = refused(["--policy", f"a={other}", *arguments[2:]], capsys)
    assert "policy-a" in said and repr(str(other)) in said


@pytest.mark.parametrize(
    ("option", "value"),
    [("--pairs", 0), ("--held-out", 0), ("--strong-temperature", 0), ("--seed", -1)],
)
def test_bad_numbers_are_named_before_any_work(pairs, capsys, option, value):
    root, arguments = pairs
    said = refused([*arguments, option, str(value)], capsys)
    assert f"{option} must be between" in said and not (root / "out").exists()


def test_other_pairs_than_those_that_are_there_are_refused(pairs, capsys):
    root, arguments = pairs
    assert prepare_full.main(arguments) == 0
    same = shutil.copy(root / "pairs.jsonl", root / "same.jsonl")
    other = root / "other.jsonl"
    other.write_text("\n".join((root / "pairs.jsonl").read_text().splitlines()[:50]))
    before = (root / "out" / "prepared.json").read_bytes()
    named = f"--distinct {root / 'pairs.jsonl'}, not {other}: name a new --out"
    assert named in refused([*arguments, "--distinct", str(other)], capsys)
    assert "--seed 0, not 1" in refused([*arguments, "--seed", "1"], capsys)
    assert (root / "out" / "prepared.json").read_bytes() == before
    assert prepare_full.main([*arguments, "--distinct", str(same)]) == 0
    more = [*arguments[:2], "--similar", str(other), *arguments[4:]]  # of what is not there yet
    assert prepare_full.main(more) == 0
    assert prepare_full.main([*arguments, "--similar", str(other)]) == 0


def test_pairs_that_were_read_are_not_made_again_over_them(pairs, capsys):
    root, arguments = pairs
    assert prepare_full.main(arguments) == 0
    before = (root / "out" / "distinct.parquet").read_bytes()
    table = pd.DataFrame({"prompt": [f"say {i}" for i in range(60)]})
    table.to_parquet(root / "prompts.parquet")
    making = [*arguments[:2], "--prompts", str(root / "prompts.parquet"), "--strong", str(root),
              "--judge", str(root), *arguments[4:]]  # fmt: skip
    assert "holds distinct pairs that were read: name a new --out" in refused(making, capsys)
    assert (root / "out" / "distinct.parquet").read_bytes() == before


def test_what_was_written_in_part_is_written_again(pairs, monkeypatch):
    root, arguments = pairs
    steps = ((shutil, "copytree", "policy-a"), (files, "save", "distinct.parquet"))
    for where, what, left in steps:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(where, what, half_of(getattr(where, what)))
            prepare_full.main(arguments)
        assert not (root / "out" / left).exists()
    assert prepare_full.main(arguments) == 0
    assert len(pd.read_parquet(root / "out" / "distinct.parquet")) == 60


def test_the_policies_that_ship_read_alike():
    folders = (TINY / "policy", DATA / "policy-64", DATA / "policy-256")
    first, *others = (prepare_full._reading(str(folder), None) for folder in folders)
    assert all(reading == first for reading in others)


def test_a_reward_model_of_another_tokenizer_is_refused(pairs, capsys):
    root, arguments = pairs
    other = save_tiny_policy(root / "b", tokenizer=other_tokenizer())
    said = refused([*arguments, "--reward-model", str(other)], capsys)
    assert "has another tokenizer than the policy" in said and not (root / "out").exists()


def test_a_killed_reward_training_is_done_again(pairs):
    root, arguments = pairs
    (root / "out" / "reward-distinct" / "trainer").mkdir(parents=True)  # all that it left
    assert prepare_full.main(arguments) == 0
    assert (root / "out" / "reward-distinct" / "model.safetensors").is_file()
    assert "kept" in json.loads((root / "out" / "prepared.json").read_text())["reward-distinct"]


def test_most_responses_are_not_cut_unasked(pairs, capsys):
    root, arguments = pairs
    rows = [{"prompt": f"say {i}", "chosen": "y" * 200, "rejected": "n" * 199} for i in range(60)]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = refused(arguments[:-2], capsys)
    assert "120 of all 120 responses reach 96 tokens" in said and "--max-tokens" in said
    assert prepare_full.main(arguments) == 0
    assert json.loads((root / "out" / "prepared.json").read_text())["distinct"]["capped"] == 120


def test_a_prompt_that_is_there_twice_is_not_held_out_and_trained_on(tmp_path):
    table = pd.DataFrame({"prompt": [f"say {i % 20}" for i in range(60)]})
    table.to_parquet(tmp_path / "prompts.parquet")
    options = prepare_full._parser().parse_args(
        ["--policy", "a=b", "--out", "o", "--prompts", str(tmp_path / "prompts.parquet"),
         "--pairs", "20", "--held-out", "3"])  # fmt: skip
    prompts = prepare_full._prompts(options, tiny_tokenizer())
    train, held_out = ({tuple(p) for p in prompts[s][0]} for s in SPLITS)
    assert held_out and not train & held_out


def test_a_prompt_that_is_too_long_moves_no_other(tmp_path):
    rows, kept = one_too_long()
    options = prepare_full._parser().parse_args(
        ["--policy", "a=b", "--out", "o", "--prompts", written(rows, tmp_path / "prompts.jsonl"),
         "--pairs", "11", "--held-out", "8"])  # fmt: skip
    tokenizer = tiny_tokenizer()
    for name, (ids, texts) in prepare_full._prompts(options, tokenizer).items():
        assert sorted(texts) == sorted(row["prompt"] for row in kept if row["split"] == name)
        assert all(text in tokenizer.decode(i) for i, text in zip(ids, texts, strict=True))


def test_the_prompts_of_the_shipped_pairs_are_those_of_their_command():
    """All pairs of `similar` have an untied judgement, so all prompts are there."""
    options = prepare_full._parser().parse_args(
        ["--policy", "128=x", "--out", "o", "--prompts", str(TINY / "responses.parquet"),
         "--pairs", "1536", "--held-out", "192", "--max-prompt", "64"])  # fmt: skip
    prompts = prepare_full._prompts(options, load_tokenizer(TINY / "policy")[0])
    shipped = pd.read_parquet(DATA / "similar.parquet")
    for split in SPLITS:
        rows = shipped[shipped["split"] == split]["prompt"]
        assert prompts[split][0] == [[int(i) for i in ids] for ids in rows]
