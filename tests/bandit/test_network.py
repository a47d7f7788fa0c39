"""The stacked network against torch.nn's own transformer, the decoder against the full pass."""

from __future__ import annotations

from math import prod

import pytest
import torch

from lib.bandit.network import GPT_NANO, Decoder, dropout_masks, logits
from tests.bandit.helpers import PlainGPT, random_parameters

RUNS, SEQUENCES = 3, 5


@pytest.fixture(scope="module")
def parameters():
    return random_parameters(RUNS)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(100, (RUNS, SEQUENCES, 10), generator=torch.Generator().manual_seed(1))


def test_number_of_parameters():
    """0.09M, where the paper prints 0.9M."""
    assert sum(prod(shape) for shape in GPT_NANO.shapes().values()) == 94_992
    assert sum(p.numel() for p in GPT_NANO.initial(0).values()) == 94_992


@pytest.mark.parametrize("length", [1, 9, 10])
def test_logits_and_gradients_equal_a_plain_transformer(parameters, tokens, length):
    leaves = {k: v.clone().requires_grad_() for k, v in parameters.items()}
    tokens = tokens[..., :length]
    mine = logits(leaves, tokens)
    target = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))
    mine.log_softmax(-1).mul(target).mean((1, 2, 3)).sum().backward()
    for run in range(RUNS):
        plain = PlainGPT(parameters, run)
        other = plain(tokens[run])
        torch.testing.assert_close(mine[run], other, rtol=1e-5, atol=5e-5)
        other.log_softmax(-1).mul(target[run]).mean().backward()
        for name, gradient in plain.gradients().items():
            torch.testing.assert_close(
                leaves[name].grad[run], gradient, rtol=1e-4, atol=1e-5, msg=f"{run} {name}"
            )


def test_runs_are_apart(parameters, tokens):
    """A gradient of one run's logits reaches no other run's parameters."""
    leaves = {k: v.clone().requires_grad_() for k, v in parameters.items()}
    logits(leaves, tokens)[1].square().mean().backward()
    for name, leaf in leaves.items():
        assert leaf.grad[[0, 2]].count_nonzero() == 0, name
        assert leaf.grad[1].count_nonzero() > 0, name


def test_later_tokens_do_not_matter(parameters, tokens):
    changed = tokens.clone()
    changed[..., 6:] = (changed[..., 6:] + 1) % 100
    before, after = logits(parameters, tokens), logits(parameters, changed)
    torch.testing.assert_close(before[:, :, :6], after[:, :, :6], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, :, 6:], after[:, :, 6:], atol=1e-2)


def test_decoder_equals_the_full_pass_at_every_position(parameters, tokens):
    decoder = Decoder(parameters, SEQUENCES, 10)
    full = logits(parameters, tokens)
    for t in range(10):
        torch.testing.assert_close(
            decoder.step(tokens[..., t]), full[:, :, t], rtol=1e-4, atol=1e-4, msg=f"position {t}"
        )


def test_dropout_only_when_asked(parameters, tokens):
    plain = logits(parameters, tokens)
    assert torch.equal(plain, logits(parameters, tokens))
    generator = torch.Generator().manual_seed(0)
    shape = (2, RUNS, *GPT_NANO.dropped(SEQUENCES * 10))
    masks = dropout_masks(torch.rand(shape, generator=generator), 0.1)
    assert masks.eq(0).float().mean().item() == pytest.approx(0.1, abs=5e-3)
    assert masks.mean().item() == pytest.approx(1, abs=5e-3)
    first, second = (logits(parameters, tokens, masks=half) for half in masks)
    assert not torch.allclose(first, plain, atol=1e-2)
    assert not torch.allclose(first, second, atol=1e-2)
    assert torch.equal(logits(parameters, tokens, masks=torch.ones_like(masks[0])), plain)


@pytest.mark.parametrize("place", range(7))
def test_dropout_acts_at_every_place(parameters, tokens, place):
    """After the embedding, and on what attention and MLP of each layer add."""
    masks = torch.ones(RUNS, *GPT_NANO.dropped(SEQUENCES * 10))
    masks[:, place] = 0.5
    plain, halved = logits(parameters, tokens), logits(parameters, tokens, masks=masks)
    assert not torch.allclose(halved, plain, atol=1e-2)


def test_initialisation_is_mingpts_and_follows_its_seed():
    initial = GPT_NANO.initial(3)
    assert initial["0.ln1.gain"].eq(1).all() and initial["0.qkv.bias"].eq(0).all()
    assert initial["token"].std().item() == pytest.approx(0.02, rel=0.05)
    assert initial["0.out.weight"].std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert torch.equal(initial["token"], GPT_NANO.initial(3)["token"])
    assert not torch.equal(initial["token"], GPT_NANO.initial(4)["token"])
