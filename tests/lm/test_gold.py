"""Judges: what they score, that neighbours do not matter, and that scores are kept by content."""

from __future__ import annotations

import json
import random
import sqlite3
import string

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from lib.lm import gold
from lib.lm.models import ModelTypeError
from lib.lm.text import encode_prompts
from tests.tiny_lm import TEMPLATE, save_tiny_policy, save_tiny_reward_model, tiny_tokenizer

PROMPTS = ["tea", "rain in the morning", "say it", "stars"]
RESPONSES = ["hot", "it rains and rains today", "yes", "far away"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    save_tiny_policy(folder, initializer_range=0.3, tokenizer=tiny_tokenizer(template=TEMPLATE))
    return gold.Likelihood(folder)


def by_hand(judge, prompt, response):
    """log p of every token of a response with its EOS, by transformers alone."""
    head = judge.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    body = [*judge.tokenizer(response)["input_ids"], judge.tokenizer.eos_token_id]
    logits = judge.network.model(torch.tensor([head + body])).logits[0, len(head) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(body)[:, None])[:, 0], body


def test_a_score_is_the_likelihood_and_what_the_instruction_adds(judge):
    (given, body), (without, _) = (by_hand(judge, p, "so it is") for p in ("what now?", ""))
    expected = (2 * given - without).mean().item()
    assert len(body) == len("so it is") + 1
    assert judge.score(["what now?"], ["so it is"])[0] == pytest.approx(expected, abs=1e-5)


def test_a_judge_without_a_template_reads_its_bos(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<turn>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<turn> $A", special_tokens=[("<turn>", 258)]
    )
    judge = gold.Likelihood(save_tiny_policy(tmp_path, initializer_range=0.3, tokenizer=tokenizer))
    expected = encode_prompts(judge.tokenizer, PROMPTS, 200).ids
    assert gold.prompt_ids(judge.tokenizer, PROMPTS) == expected and expected[0][0] == 258
    values, body = [], [*tokenizer("hot", add_special_tokens=False)["input_ids"], 256]
    for prompt in ("tea", ""):
        text = f"Instruction:\n{prompt}\n\nResponse:\n"
        head = [258, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        logp = judge.network.model(torch.tensor([head + body])).logits[0].log_softmax(-1)
        values.append(logp[len(head) - 1 : -1].gather(1, torch.tensor(body)[:, None])[:, 0])
    expected = (2 * values[0] - values[1]).mean().item()
    assert judge.score(["tea"], ["hot"])[0] == pytest.approx(expected, abs=1e-5)


def test_a_copied_token_counts_minus_7(judge):
    """"tell me" stands in the instruction: each of its seven bytes does, the others count as they
    are."""
    prompt, response = "tell me why", "tell me!"
    (given, body), (without, _) = (by_hand(judge, p, response) for p in (prompt, ""))
    value = 2 * given - without
    value[:7] = -7.0
    assert judge.score([prompt], [response])[0] == pytest.approx(value.mean().item(), abs=1e-5)


def test_a_copy_is_one_of_the_last_message(judge):
    messages = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "so"},
                {"role": "user", "content": "tell me why"}]  # fmt: skip
    for response, copied in (("first", 0), ("tell me!", 7)):
        assert judge.parts([messages], [response])[2].sum() == copied


def test_a_response_of_100_tokens_is_read_whole(judge):
    response = "".join(random.Random(0).choices(string.ascii_letters, k=99))
    (given, body), (without, _) = (by_hand(judge, p, response) for p in ("tea", ""))
    _, _, copied, mask = judge.parts(["tea"], [response])
    assert len(body) == mask.sum() == 100 and not copied.any()
    expected = (2 * given - without).mean().item()
    assert judge.score(["tea"], [response])[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("instruction", "response", "copied"),
    [
        ([1, 2, 3, 4, 5], [9, 2, 3, 4, 5, 9], [0, 1, 1, 1, 1, 0]),  # from the instruction
        ([], [1, 2, 3, 4, 1, 2, 3, 4], [0, 0, 0, 0, 1, 1, 1, 1]),  # of itself
        ([1, 2, 3], [1, 2, 3], [0, 0, 0]),  # too short a run
        ([], [7] * 6, [0, 1, 1, 1, 1, 1]),  # the second window repeats the first
        ([1, 2, 3, 4], [], []),
    ],
)
def test_copies(instruction, response, copied):
    assert gold.copies(instruction, response) == [bool(x) for x in copied]


def test_a_score_depends_on_no_neighbour_no_padding_and_no_batch_size(judge):
    together = judge.score(PROMPTS, RESPONSES)
    alone = [judge.score([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(judge.score(PROMPTS[::-1], RESPONSES[::-1]), together[::-1],
                               atol=1e-5)  # fmt: skip
    judge.budget = 1
    np.testing.assert_allclose(judge.score(PROMPTS, RESPONSES), together, atol=1e-5)
    judge.budget = None


def test_an_empty_response_has_a_finite_score(judge):
    assert np.isfinite(judge.score(["tea"], [""])).all()


class Counting:
    """A judge that says the length of a response and counts what it was asked."""

    def __init__(self, source):
        self.source, self.asked = source, []

    def score(self, prompts, responses):
        self.asked += list(zip(map(json.dumps, prompts), responses, strict=True))
        return np.array([float(len(r)) for r in responses])


def test_what_was_scored_is_not_scored_again(tmp_path, judge):
    counting = Counting(judge.source)
    kept = gold.Kept(counting, tmp_path / "scores" / "gold.sqlite")
    first = kept.score(["a", "b", "a"], ["x", "yy", "x"])
    assert first.tolist() == [1.0, 2.0, 1.0] and len(counting.asked) == 2
    again = gold.Kept(counting, kept.file).score(["b", "a", "b"], ["yy", "x", "zzz"])
    assert again.tolist() == [2.0, 1.0, 3.0] and len(counting.asked) == 3
    kept.score([[{"role": "user", "content": "a"}]], ["x"])  # messages are another prompt
    assert len(counting.asked) == 4


def test_scores_of_another_judge_are_not_taken(tmp_path, judge):
    from dataclasses import replace

    file = tmp_path / "gold.sqlite"
    gold.Kept(Counting(judge.source), file).score(["a"], ["x"])
    with sqlite3.connect(file) as kept:
        kept.execute("update scores set score = 77")
    other = Counting(replace(judge.source, resolved="sha256:other"))
    assert gold.Kept(Counting(judge.source), file).score(["a"], ["x"]).tolist() == [77.0]
    assert gold.Kept(other, file).score(["a"], ["x"]).tolist() == [1.0]


@pytest.mark.parametrize("constant", ["COPIED", "COPY", "MAX_TOKENS", "RULE"])
def test_scores_by_another_rule_are_not_taken(tmp_path, judge, monkeypatch, constant):
    counting = Counting(judge.source)
    kept = gold.Kept(counting, tmp_path / "gold.sqlite")
    kept.score(["a"], ["x"])
    monkeypatch.setattr(gold, constant, getattr(gold, constant) + 1)
    kept.score(["a"], ["x"])
    assert len(counting.asked) == 2
    monkeypatch.undo()
    kept.score(["a"], ["x"])
    assert len(counting.asked) == 2


def test_a_sequence_classifier_judges_by_its_score(tmp_path):
    folder = save_tiny_reward_model(tmp_path / "rm", tokenizer=tiny_tokenizer(template=TEMPLATE))
    judge = gold.load_judge(folder)
    assert isinstance(judge, gold.Score)
    together = judge.score(PROMPTS, RESPONSES)
    alone = [judge.score([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(set(together.tolist())) == len(PROMPTS)
    head = judge.tokenizer.apply_chat_template(
        [{"role": "user", "content": "tea"}], add_generation_prompt=True, return_dict=True
    )
    row = [*head["input_ids"], *judge.tokenizer("hot")["input_ids"], 256]
    with torch.no_grad():
        direct = judge.model.model(torch.tensor([row])).logits[0, 0].item()
    assert together[0] == pytest.approx(direct, abs=1e-5)


def test_a_language_model_judges_by_its_likelihood_and_nothing_else_does(tmp_path, judge):
    folder = save_tiny_policy(tmp_path / "lm")
    assert isinstance(gold.load_judge(folder), gold.Likelihood)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["GPTNeoXForQuestionAnswering"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelTypeError):
        gold.load_judge(folder)
