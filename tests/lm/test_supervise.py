"""Supervised fine-tuning by command: what it learns from, what it writes, what it refuses."""

import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from lib.lm import supervise
from lib.lm.models import load_tokenizer
from lib.lm.sft import response_loss
from lib.lm.text import encode_prompts
from tests.tiny_lm import save_tiny_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def table(rows=24, **columns):
    said = {"prompt": [f"Say {n}." for n in range(rows)], "response": ["yes, yes"] * rows}
    return pd.DataFrame(said | columns)


def run(policy, path, out, *more):
    return supervise.main(["--policy", str(policy), "--responses", str(path), "--out", str(out),
                           "--rate", "1e-2", "--epochs", "3", "--batch", "8", "--device", "cpu",
                           *more])  # fmt: skip


def test_a_policy_learns_its_responses_and_is_written(policy, tmp_path):
    splits = ["validation" if n % 4 == 0 else "test" if n == 1 else "train" for n in range(24)]
    capped = [n == 2 for n in range(24)]
    table(split=splits, capped=capped).to_parquet(tmp_path / "said.parquet")
    assert run(policy, tmp_path / "said.parquet", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["pairs"] == {"train": 16, "validation": 6}
    losses = [row["validation"] for row in record["losses"]]
    assert record["validation_loss"] < losses[0] - 0.1
    assert record["left out"] == {"empty": 0, "capped": 1, "too long": 0}
    tokenizer, _ = load_tokenizer(tmp_path / "out")
    options = asked(tmp_path / "said.parquet")
    held_out = supervise.examples(options, tokenizer)[0]["validation"]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert response_loss(written, held_out) == pytest.approx(record["validation_loss"], rel=1e-4)


def asked(path):
    """The command's options, with all that is not asked for at its default."""
    return supervise._parser().parse_args(["--policy", "p", "--responses", str(path),
                                           "--out", "o"])  # fmt: skip


def test_responses_end_in_eos_and_the_prompt_is_as_everywhere(policy, tmp_path):
    """Also from a CSV file, whose column `capped` is text; a tenth of the prompts is held out."""
    table(rows=30, capped=[n == 2 for n in range(30)]).to_csv(tmp_path / "said.csv", index=False)
    tokenizer, _ = load_tokenizer(policy)
    data, record = supervise.examples(asked(tmp_path / "said.csv"), tokenizer)
    rows = [row for part in data.values() for row in part]
    assert len(rows) == 29 and {row.response[-1] for row in rows} == {tokenizer.eos_token_id}
    prompts = encode_prompts(tokenizer, [f"Say {n}." for n in range(30)], 100).ids
    assert all(row.prompt in prompts for row in rows)
    assert record["left out"]["capped"] == 1 and 0 < len(data["validation"]) < 15


def talks(*messages):
    return pd.DataFrame({"messages": [list(*messages)] * 24})


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", ["messages", "prompt and response"])
def test_message_lists_are_read_as_text_is(policy, tmp_path, layout, suffix):
    text = table().to_dict("records")
    rows = [([{"role": "user", "content": row["prompt"]}],
             [{"role": "assistant", "content": row["response"]}]) for row in text]  # fmt: skip
    lists = [{"messages": a + b} if layout == "messages" else {"prompt": a, "response": b}
             for a, b in rows]  # fmt: skip
    table().to_csv(tmp_path / "text.csv", index=False)
    file = tmp_path / f"said.{suffix}"
    if suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, lists)))
    else:
        pd.DataFrame(lists).to_parquet(file)
    tokenizer, _ = load_tokenizer(policy)

    def every(path):
        data, _ = supervise.examples(asked(path), tokenizer)
        return sorted(map(tuple, (row.prompt + row.response for s in data.values() for row in s)))

    assert every(file) == every(tmp_path / "text.csv")


CARD = """---
configs:
- config_name: alpaca_instructions
  data_files: [{split: sft, path: alpaca_instructions/sft.json}]
- config_name: other
  data_files: [{split: eval, path: other.json}]
---
"""


@pytest.mark.parametrize("place", ["alpaca_instructions/sft.json", ""], ids=["file", "folder"])
def test_alpacas_columns_are_read_from_a_file_and_from_the_hubs_layout(policy, tmp_path, place):
    """As AlpacaFarm has them: instruction, input (which belongs to the prompt) and output."""
    rows = [{"instruction": f"Say {n}.", "input": "twice" if n % 2 else "", "output": "yes"}
            for n in range(24)]  # fmt: skip
    (tmp_path / "alpaca_instructions").mkdir()
    (tmp_path / "alpaca_instructions/sft.json").write_text(json.dumps(rows))
    (tmp_path / "other.json").write_text(json.dumps(rows[:1]))
    (tmp_path / "README.md").write_text(CARD)
    options = asked(tmp_path / place)
    if not place:
        options.config, options.split = "alpaca_instructions", "sft"
    tokenizer, _ = load_tokenizer(policy)
    data, record = supervise.examples(options, tokenizer)
    found = [row for part in data.values() for row in part]
    assert len(found) == 24 and not any(record["left out"].values())
    asked_for = [f"Say {n}." + "\n\ntwice" * (n % 2) for n in range(24)]
    prompts = encode_prompts(tokenizer, asked_for, 100).ids
    assert sorted(row.prompt for row in found) == sorted(prompts)
    assert {tokenizer.decode(row.response) for row in found} == {"yes<eos>"}


def test_a_disk_without_room_is_said_before_training(policy, tmp_path, capsys, monkeypatch):
    table().to_json(tmp_path / "said.jsonl", orient="records", lines=True)
    monkeypatch.setattr(supervise, "sft", None)
    monkeypatch.setattr(supervise.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert run(policy, tmp_path / "said.jsonl", tmp_path / "out") == 2
    assert "out has room for 0.00 GiB, the policy takes" in capsys.readouterr().err


def test_a_policy_that_cannot_be_written_leaves_no_part(policy, tmp_path, capsys, monkeypatch):
    """The command can be given again as it is. What was logged is a line for each epoch."""
    table().to_json(tmp_path / "said.jsonl", orient="records", lines=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(supervise.provenance, "environment", lambda *_: {})
    monkeypatch.setattr(supervise.Path, "write_text", full)
    assert run(policy, tmp_path / "said.jsonl", tmp_path / "out") == 2
    said = capsys.readouterr()
    error = f"error: {tmp_path / 'out'} cannot be written: No space left on device"
    assert said.err.splitlines()[-1] == error and not list((tmp_path / "out").iterdir())
    lines = [line for line in said.out.splitlines() if "loss" in line]
    assert lines and all(re.fullmatch(r"epoch \d: validation loss \d\.\d{3}", x) for x in lines)


ODD = ["train", "validation"] * 12


@pytest.mark.parametrize(("made", "said"), [
    (lambda: table().drop(columns="response"), "and no response: name it one of .*output"),
    (lambda: table(response=[[{"role": "user", "content": "a"}]] * 24), "must be text, or one"),
    (lambda: talks([{"role": "user", "content": "a"}]), "row 1: 'messages' must be a list of"),
    (lambda: talks([{"role": "user", "content": "a"}] * 2), "row 1: a response must be text, or"),
    (lambda: table(response=["long " * 500] * 24), "no response .* is left .*'too long': 24"),
    (lambda: table(response=[" "] * 24), "'empty': 24"),
    (lambda: table(capped=[True] * 24), "'capped': 24"),
    (lambda: table(capped=["perhaps"] * 24), "row 1: capped must be one of"),
    (lambda: table(split=["valid"] * 24), "split must be one of .*got 'valid'"),
    (lambda: table(split=["train"] * 24), "has no row that is .'validation'"),
    (lambda: table(split=ODD, prompt=["Say 1."] * 24), "must not be trained on"),
])  # fmt: skip
def test_what_cannot_be_learned_from_is_refused(policy, tmp_path, capsys, made, said):
    made().to_json(tmp_path / "said.jsonl", orient="records", lines=True)
    assert run(policy, tmp_path / "said.jsonl", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_said_in_one_line(policy, tmp_path, capsys):
    table().to_json(tmp_path / "said.jsonl", orient="records", lines=True)
    assert run(policy, tmp_path / "said.jsonl", tmp_path / "said.jsonl" / "below") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "said.jsonl/below" in error and error.count("\n") == 1


def test_what_is_there_is_not_written_over(policy, tmp_path, capsys):
    table().to_json(tmp_path / "said.jsonl", orient="records", lines=True)
    assert run(policy, tmp_path / "said.jsonl", policy) == 2
    assert run(policy, tmp_path / "said.jsonl", tmp_path / "said.jsonl") == 2
    assert capsys.readouterr().err.count("is there already: name a new folder") == 2
