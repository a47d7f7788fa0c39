"""The shipped pairs and tiny policy are what their card and their record say."""

import hashlib
import json
import re

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.lm import tiny
from lib.lm.sft import response_loss
from tests.scripts import loaded

CARD = tiny.FOLDER / "README.md"


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_parquet(tiny.PAIRS)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.POLICY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny.POLICY, use_safetensors=True)


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((tiny.POLICY / "training.json").read_text())


@pytest.fixture(scope="module")
def make():
    """The script that made the prompts, as a module."""
    return loaded(tiny.FOLDER / "make.py")


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_card_names_every_file_with_its_hash():
    named = dict(re.findall(r"^\| `([\w./]+)` \| `([0-9a-f]{64})` \|$", CARD.read_text(), re.M))
    assert set(named) == {"responses.parquet", "policy/model.safetensors", "policy/tokenizer.json"}
    assert {name: sha256(tiny.FOLDER / name) for name in named} == named


def test_the_card_counts_what_is_there(table):
    """Split, topics, pairs, capped."""
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", CARD.read_text(), re.M)
    said = {row[0]: [int(number.replace(",", "")) for number in row[1:]] for row in rows}
    parts = dict(list(table.groupby("split"))) | {"all": table}
    assert said == {
        name: [part["topic"].nunique(), len(part), int(part["capped"].sum())]
        for name, part in parts.items()
    }


def test_files_are_small():
    assert tiny.PAIRS.stat().st_size < 2e6
    assert sum(f.stat().st_size for f in tiny.FOLDER.rglob("*") if f.is_file()) < 12e6
    assert not list(tiny.FOLDER.rglob("*.bin")) + list(tiny.FOLDER.rglob("*.pkl"))


def test_pairs_are_many_whole_and_distinct(table):
    assert list(table) == ["prompt", "response", "topic", "template", "split", "capped"]
    assert len(table) - table["capped"].sum() >= 5000
    assert not table.isna().any().any()
    assert (table["response"].str.strip() == table["response"]).all()
    assert (table["response"] != "").all()
    assert table["prompt"].is_unique


def test_splits_share_no_topic_and_no_comparison_crosses_them(table):
    topics = {split: set(part["topic"]) for split, part in table.groupby("split")}
    assert {split: len(found) for split, found in topics.items()} == {
        "train": 260, "validation": 30, "test": 30}  # fmt: skip
    assert not topics["train"] & topics["validation"] | topics["test"] & topics["train"]
    assert not topics["validation"] & topics["test"]
    held_out = re.compile("|".join(rf"\b{t}\b" for t in topics["validation"] | topics["test"]))
    compared = table[(table["split"] == "train") & (table["template"] == "compare")]
    assert not compared["prompt"].str.contains(held_out).any()


def test_prompts_are_those_of_the_script(table, make):
    columns = ["prompt", "topic", "template", "split"]
    made = make.prompts()[columns]
    assert made["prompt"].is_unique
    missing = made.merge(table[columns], how="left", on=columns, indicator=True)
    assert len(table.merge(made, on=columns)) == len(table)
    assert (missing["_merge"] == "left_only").sum() < 20  # empty responses were dropped


def test_the_draw_of_a_prompt_depends_on_no_other(make):
    alone, together = make.uniforms(["a"]), make.uniforms(["b", "a"])
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(together[0], together[1])
    logits = torch.tensor([[0.0, 5.0, 4.0] + [-9.0] * 60])
    assert make.pick(logits, torch.tensor([0.0])).item() == 1  # the likeliest comes first
    assert make.pick(logits, torch.tensor([0.9])).item() == 2
    assert make.pick(logits, torch.tensor([1.0])).item() < 63


def test_responses_depend_on_no_batch(make, table, model):
    """Prompts of different lengths, together and one by one; rows leave as they end."""
    left = AutoTokenizer.from_pretrained(tiny.POLICY, padding_side="left")
    batch = table.iloc[[5, 700, 30, 2100]][["prompt"]].assign(brevity="Be brief.")
    together = make.respond(model, left, batch)
    alone = [make.respond(model, left, batch.iloc[[row]]) for row in range(len(batch))]
    assert together["response"].tolist() == [one["response"].iloc[0] for one in alone]
    assert together["capped"].tolist() == [one["capped"].iloc[0] for one in alone]
    assert together["response"].nunique() == len(batch)


@pytest.mark.parametrize(("token", "capped"), [("a", True), (tiny.EOS, False)])
def test_a_response_without_eos_is_capped(make, table, model, monkeypatch, token, capped):
    left = AutoTokenizer.from_pretrained(tiny.POLICY, padding_side="left")
    drawn = left.convert_tokens_to_ids(token)
    monkeypatch.setattr(make, "pick", lambda logits, _: torch.full((len(logits),), drawn))
    done = make.respond(model, left, table.iloc[:2][["prompt"]].assign(brevity=""))
    assert done["capped"].tolist() == [capped] * 2
    assert done["response"].tolist() == ["a" * make.CAP if capped else ""] * 2


def test_batches_hold_every_prompt_once(make, table):
    rows = table[["prompt"]].assign(brevity="").iloc[:100]
    parts = make.batches(rows, 32)
    assert [len(part) for part in parts] == [32, 32, 32, 4]
    assert sorted(index for part in parts for index in part.index) == list(rows.index)


def test_pairs_leaves_out_capped_ones_and_names_an_unknown_split(table):
    counts = {split: len(tiny.pairs(split)) for split in tiny.SPLITS}
    assert sum(counts.values()) == (~table["capped"]).sum()
    with pytest.raises(ValueError, match=r"\('train', 'validation', 'test'\), got 'dev'"):
        tiny.pairs("dev")


def test_tokenizer_has_eos_and_padding_apart(tokenizer, model):
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer) == tiny.VOCABULARY == model.config.vocab_size
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 0
    assert tokenizer.eos_token_id == 0
    assert model.config.pad_token_id == tokenizer.pad_token_id == 1


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_tokenizer_round_trips_any_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    if not set(re.findall(r"<\|\w+\|>", text)):
        assert tokenizer.eos_token_id not in ids


def test_tokenizer_round_trips_the_responses(tokenizer, table):
    texts = list(table["response"])
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    assert tokenizer.batch_decode(ids) == texts
    assert not any(set(row) & set(tokenizer.all_special_ids) for row in ids)


def test_template_ends_where_the_response_starts(tokenizer):
    """The prompt holds no EOS; a whole conversation is the prompt, the response and the EOS."""
    prompt, response = "Define goats.", "Animals with horns."
    (example,) = tiny.encode(tokenizer, [prompt], [response])
    assert tokenizer.eos_token_id not in example.prompt
    assert example.response.count(tokenizer.eos_token_id) == 1
    assert example.response[-1] == tokenizer.eos_token_id
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    assert whole == [*example.prompt, *example.response]


def test_examples_fit_the_cap_and_few_are_lost(tokenizer):
    for split in tiny.SPLITS:
        found = tiny.examples(tokenizer, split)
        assert max(len(example.response) for example in found) <= tiny.CAP
        assert len(found) > 0.95 * len(tiny.pairs(split))


def test_policy_is_the_small_pythia_in_float32(model, record):
    assert model.config.model_type == "gpt_neox"
    assert not model.config.tie_word_embeddings
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert sum(weight.numel() for weight in model.parameters()) == record["parameters"]
    assert (model.config.hidden_dropout, model.config.attention_dropout) == (0, 0)
    sampling = model.generation_config
    assert (sampling.do_sample, sampling.temperature, sampling.top_k) == (True, 1.0, 0)


def test_policy_has_the_recorded_loss(model, tokenizer, record):
    found = response_loss(model, tiny.examples(tokenizer, "validation")[:64])
    assert found == pytest.approx(record["validation_loss_first_64"], abs=1e-3)


def test_record_keeps_the_lowest_loss_and_names_its_data(record):
    losses = {row["update"]: row["validation"] for row in record["losses"]}
    assert record["chosen_update"] == min(losses, key=losses.get)
    # the trainer's are means of batch means
    assert record["validation_loss"] == pytest.approx(min(losses.values()), abs=0.05)
    assert record["data_sha256"] == sha256(tiny.PAIRS)
    assert re.fullmatch("[0-9a-f]{40}", record["commit"])
    assert record["sampled_lengths"]["ended"] > 0.85
