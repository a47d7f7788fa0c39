"""Supervised fine-tuning by command: what it learns from, what it writes, what it refuses."""

import json
import re

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from lib.lm import supervise
from lib.lm.models import load_tokenizer
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
    assert losses[-1] < losses[0] - 0.1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    load_tokenizer(tmp_path / "out")


def test_responses_end_in_eos_and_the_prompt_is_as_everywhere(policy, tmp_path):
    table(rows=30, answer=1).drop(columns="answer").to_json(
        tmp_path / "said.jsonl", orient="records", lines=True)  # fmt: skip
    tokenizer, _ = load_tokenizer(policy)
    options = supervise._parser().parse_args(
        ["--policy", "p", "--responses", str(tmp_path / "said.jsonl"), "--out", "o"])  # fmt: skip
    data, record = supervise.examples(options, tokenizer)
    rows = [row for part in data.values() for row in part]
    assert len(rows) == 30 and {row.response[-1] for row in rows} == {tokenizer.eos_token_id}
    assert record["too long"] == 0 and 0 < len(data["validation"]) < 15


@pytest.mark.parametrize(("made", "said"), [
    (lambda: table().drop(columns="response"), "looked for .*response/output"),
    (lambda: table(response=[[{"role": "assistant", "content": "a"}]] * 24), "must be text"),
    (lambda: table(response=["long " * 500] * 24), "no response of at most 256 tokens"),
])  # fmt: skip
def test_what_cannot_be_learned_from_is_refused(policy, tmp_path, capsys, made, said):
    made().to_json(tmp_path / "said.jsonl", orient="records", lines=True)
    assert run(policy, tmp_path / "said.jsonl", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert not (tmp_path / "out").exists()
