"""Supervised fine-tuning: what carries loss, what is kept, and what is refused."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
)

from lib.lm import sft, tiny
from lib.lm.sft import IGNORED, Example, SFTRun

TOY = [Example([2, 10 + n], [20 + n, 30 + n, 0]) for n in range(16)]
FAST = SFTRun(learning_rate=1e-2, batch=8, epochs=6, warmup_steps=0, patience=6)


def policy(seed: int = 0, **changes) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, eos_token_id=0, pad_token_id=1,
        bos_token_id=None, **changes)  # fmt: skip
    return GPTNeoXForCausalLM(config)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.train_tokenizer(["a few words"])


ids = st.lists(st.integers(0, 63), min_size=1, max_size=9)


@given(st.lists(st.builds(Example, ids, ids), min_size=1, max_size=5))
def test_labels_cover_the_response_and_nothing_else(batch):
    """Also when a token of the prompt or the response is the EOS or the padding token."""
    tokens, mask, labels = sft.padded(batch)
    for row, (prompt, response) in enumerate(batch):
        length = len(prompt) + len(response)
        assert labels[row].tolist()[: len(prompt)] == [IGNORED] * len(prompt)
        assert labels[row].tolist()[len(prompt) : length] == response
        assert set(labels[row].tolist()[length:]) <= {IGNORED}
        assert mask[row].tolist() == [1] * length + [0] * (tokens.shape[1] - length)
        columns = sft.columns(batch[row])
        masked = zip(columns["input_ids"], columns["completion_mask"], strict=True)
        assert [token for token, on in masked if on] == response


def test_trainer_sees_the_labels_that_the_loss_counts(tokenizer, tmp_path):
    """TRL's batches carry the response and its EOS, though EOS and padding may coincide."""
    examples = [*TOY[:3], Example([2, 5, 6, 7], [0])]
    for pad in ("<|padding|>", "<|endoftext|>"):
        tokenizer.pad_token = pad
        trainer = sft._trainer(policy(), tokenizer, examples, examples, FAST, str(tmp_path))
        batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
        found = [[t for t in row if t != IGNORED] for row in batch["labels"].tolist()]
        assert found == [example.response for example in examples]
    tokenizer.pad_token = tiny.PAD


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_response_loss_depends_on_no_batch(order, batch):
    """By hand: the mean over response tokens of -log pi, one example at a time."""
    model = policy().eval()
    examples = [Example([2] * (n + 1), [9 + n] * (6 - n)) for n in range(6)]
    total = 0.0
    for prompt, response in examples:
        with torch.no_grad():
            logp = model(torch.tensor([[*prompt, *response]])).logits.log_softmax(-1)[0]
        for place, token in enumerate(response, start=len(prompt)):
            total -= logp[place - 1, token].item()
    expected = total / sum(len(example.response) for example in examples)
    found = sft.response_loss(model, [examples[n] for n in order], batch)
    assert found == pytest.approx(expected, rel=1e-5)


def test_sft_lowers_the_loss_and_learns_the_eos(tokenizer, tmp_path):
    model = policy()
    trained = sft.sft(model, tokenizer, TOY, TOY[:8], dataclasses.replace(FAST, epochs=20))
    first, *rest = [row["validation"] for row in trained.losses]
    assert first == pytest.approx(math.log(64), abs=0.2)
    assert min(rest) < first - 1
    assert sft.response_loss(model, TOY[:8]) == pytest.approx(min(rest), abs=1e-4)
    prompt, response = TOY[0]
    last = model(torch.tensor([[*prompt, *response[:-1]]])).logits[0, -1].softmax(-1)
    assert last[0] > 0.5
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    assert sft.response_loss(again, TOY) == pytest.approx(sft.response_loss(model, TOY), abs=1e-6)


def test_sft_keeps_the_lowest_validation_loss_and_stops(tokenizer):
    """Validation pairs that contradict the training pairs: each epoch makes them less likely."""
    contrary = [Example(prompt, [50, 51, 0]) for prompt, _ in TOY]
    model = policy()
    run = dataclasses.replace(FAST, epochs=30, patience=2, learning_rate=3e-2)
    trained = sft.sft(model, tokenizer, TOY, contrary, run)
    losses = {row["update"]: row["validation"] for row in trained.losses[1:]}
    assert len(losses) < 30
    assert list(losses)[-1] > trained.chosen_update == min(losses, key=losses.get)
    found = sft.response_loss(model, contrary)
    assert found == pytest.approx(losses[trained.chosen_update], abs=1e-4)


def test_same_seed_same_policy_other_seed_another(tokenizer):
    losses = []
    for seed in (0, 0, 1):
        run = dataclasses.replace(FAST, epochs=2, seed=seed)
        losses.append(sft.sft(policy(), tokenizer, TOY, TOY, run).losses[-1]["validation"])
    assert losses[0] == losses[1] != losses[2]


def test_dropout_reaches_layers_that_apply_it_themselves():
    """OPT's and Bloom's hold a number, and no module."""
    opt = OPTConfig(vocab_size=264, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, dropout=0.5,
                    num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.5)  # fmt: skip
    bloom = BloomConfig(vocab_size=264, hidden_size=16, n_layer=1, n_head=2, hidden_dropout=0.5,
                        attention_dropout=0.5)  # fmt: skip
    for config in (opt, bloom):
        torch.manual_seed(0)
        model, tokens = AutoModelForCausalLM.from_config(config).train(), torch.arange(8)[None]
        assert not torch.equal(model(tokens).logits, model(tokens).logits)
        sft.set_dropout(model, 0.0)
        assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_dropout_is_for_training_only(tokenizer):
    model = policy(hidden_dropout=0.3, attention_dropout=0.3)
    run = dataclasses.replace(FAST, epochs=1, dropout=0.5)
    trained = sft.sft(model, tokenizer, TOY, TOY, run)
    plain = sft.sft(policy(), tokenizer, TOY, TOY, dataclasses.replace(run, dropout=0.0))
    assert trained.losses[1]["train"] != plain.losses[1]["train"]
    assert (model.config.hidden_dropout, model.config.attention_dropout) == (0, 0)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert not model.training


@pytest.mark.parametrize(
    ("examples", "named"),
    [
        ([], "no examples"),
        ([TOY[0], Example([2], [])], "example 1: empty response"),
        ([Example([], [3, 0])], "example 0: empty prompt"),
        ([Example([2] * 30, [3] * 3)], "example 0: 33 tokens, the model takes 32"),
        ([Example([2], [64])], "example 0: token ids from 2 to 64, the model has 0 to 63"),
        ([Example([-1], [3])], "example 0: token ids from -1 to 3"),
    ],
)
def test_examples_that_cannot_be_learned_are_named(tokenizer, examples, named):
    with pytest.raises(ValueError, match=named):
        sft.sft(policy(), tokenizer, examples, TOY, FAST)
    with pytest.raises(ValueError, match=named):
        sft.sft(policy(), tokenizer, TOY, examples, FAST)


def test_a_run_without_a_finite_loss_is_an_error(tokenizer):
    model = policy()
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = math.nan
    with pytest.raises(RuntimeError, match="no finite validation loss.*learning_rate 0.01"):
        sft.sft(model, tokenizer, TOY, TOY, dataclasses.replace(FAST, epochs=1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", math.nan), ("learning_rate", 2.0), ("batch", 0), ("epochs", 0),
     ("dropout", 1.0), ("schedule", "step"), ("device", "tpu"), ("patience", 0)],
)  # fmt: skip
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
        SFTRun(**{name: value})


def test_a_constant_rate_is_warmed_up_as_well(tmp_path):
    """transformers' own "constant" would leave the warm-up out and say nothing."""
    arguments = sft._arguments(SFTRun(schedule="constant", warmup_steps=4), str(tmp_path))
    assert arguments.lr_scheduler_type == "constant_with_warmup" and arguments.warmup_steps == 4


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match=r"\['rate'\]; there are \['learning_rate'"):
        sft.settings({"rate": 1e-3})
