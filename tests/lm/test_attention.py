"""Attention by products: what PyTorch's gives, in float32 to the last digits but two, in bfloat16
no further from that than PyTorch's own; and PyTorch's for what it does not know."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM

from lib.lm import attention, packed
from lib.lm.cache import growing_cache
from lib.lm.decode import sample
from lib.lm.network import Network
from lib.lm.policy import Scorer
from lib.rollouts import Rollout
from tests.lm.test_packed import BF16, CONFIGS, distance, gradients, model, rows  # noqa: F401

MODULE = nn.Module()
MODULE.is_causal = True
MODULE.num_key_value_groups = 2


def called(monkeypatch):
    """A list that grows with every product."""
    calls, products = [], attention._products
    monkeypatch.setattr(attention, "_products", lambda *x: calls.append(1) or products(*x))
    return calls


def test_gradients_are_those_of_pytorchs(model, monkeypatch):  # noqa: F811
    """With padding, grouped heads, and a window that is a mask."""
    network = Network(model)
    expected, calls = gradients(network), called(monkeypatch)
    with attention._instead(attention._attend, torch.float32):
        found = gradients(network)
    assert len(calls) == 2  # layers
    for name, value in expected.items():
        assert distance(found[name], value) < 1e-5, name


def far(network, exact):
    """Relative distance of log-probabilities and gradients from `exact`, on average."""
    found = gradients(network)
    return sum(distance(found[k], x) for k, x in exact.items()) / len(exact)


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=BF16.marks)])
@pytest.mark.parametrize("name", CONFIGS)
def test_in_16_bits_it_rounds_no_more_than_pytorchs(name, dtype, monkeypatch):
    torch.manual_seed(0)
    one = AutoModelForCausalLM.from_config(CONFIGS[name])
    exact, network = gradients(Network(one)), Network(one, dtype=dtype)
    monkeypatch.setattr(packed, "FITS", 0)
    calls = called(monkeypatch)
    with packed.packed(one, dtype, 24):
        found = far(network, exact)
    assert len(calls) == 2
    monkeypatch.setattr(packed, "FITS", 2**40)
    assert 0 < found < 1.2 * far(network, exact) and len(calls) == 2


def asked(dtype=torch.float32, **more):
    """Attention of 2 rows, 4 heads in 2 groups and 3 queries to 5 keys; PyTorch's of the same."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, n, 8, generator=generator)
                         for heads, n in ((4, 3), (2, 5), (2, 5)))  # fmt: skip
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2).expand(2, 1, 3, 5)
    given = {"attention_mask": mask, "scaling": 0.3, "dropout": 0.0, **more}
    mask = given.pop("attention_mask")
    plain = AttentionInterface()["sdpa"]
    with attention._instead(attention._attend, dtype):
        found, _ = AttentionInterface()["sdpa"](MODULE, query, key, value, mask, **given)
    return found, plain(MODULE, query, key, value, mask, **given)[0]


@pytest.mark.parametrize("mask", ["bool", "added", "all"])
def test_masks_of_both_kinds_say_the_same(mask, monkeypatch):
    calls = called(monkeypatch)
    admits = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    admits[..., 0] = True
    added = torch.zeros(2, 1, 3, 5).masked_fill(~admits, torch.finfo(torch.float32).min)
    given = {"bool": admits, "added": added, "all": torch.ones_like(admits)}[mask]
    found, expected = asked(attention_mask=given)
    torch.testing.assert_close(found, expected)
    assert calls and found.is_contiguous()


def test_padding_that_sees_nothing_is_finite():
    """It attends to all alike, where PyTorch's gives 0; nobody reads it."""
    admits = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    admits[0, 0, 0] = False
    found, expected = asked(attention_mask=admits)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(found[0, 1:], expected[0, 1:])


@pytest.mark.parametrize("more", [{"attention_mask": None}, {"dropout": 1.0}, {"most": 119}])
def test_what_it_does_not_know_is_pytorchs_to_the_bit(more, monkeypatch):
    calls = called(monkeypatch)
    monkeypatch.setattr(attention, "MOST", more.pop("most", attention.MOST))
    found, expected = asked(**more)
    assert torch.equal(found, expected) and not calls


def test_without_a_mask_a_query_sees_what_is_before_it(monkeypatch):
    """Where it is to; keys of which none is masked are PyTorch's affair."""
    calls = called(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    plain = AttentionInterface()["sdpa"]
    for told in (None, True, False):
        given = (MODULE, query, key, value, None)
        with attention._instead(attention._attend, torch.float32):
            found, _ = AttentionInterface()["sdpa"](*given, is_causal=told)
        expected, _ = plain(*given, is_causal=told)
        torch.testing.assert_close(found, expected)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=BF16.marks)])
@pytest.mark.parametrize("padded", [True, False])
def test_in_16_bits_scoring_finds_what_sampling_did(padded, dtype, monkeypatch):
    """Or comes closer to it than by other attention: to the bit where the products of few rows and
    of many round alike."""
    monkeypatch.setattr(packed, "FITS", 0)
    torch.manual_seed(0)
    network = Network(AutoModelForCausalLM.from_config(CONFIGS["grouped heads"]), dtype=dtype)
    scorer, (tokens, mask) = Scorer(network, (-1,), 0), rows()
    mask = mask if padded else torch.ones_like(mask)
    off = []
    for limit in (attention.MOST, 0):
        monkeypatch.setattr(attention, "MOST", limit)
        drawn = scorer.sample(tokens, mask, torch.rand(3, 9, generator=torch.manual_seed(1)))
        batch = Rollout(prompts=tokens, prompt_mask=mask, completions=drawn.completions[:, None],
                        mask=drawn.mask[:, None], logp=drawn.logp[:, None], ref=None,
                        rewards=torch.zeros(3, 1), scale=drawn.scale)  # fmt: skip
        off.append((scorer.score(batch) - batch.logp).abs().max().item())
    assert off[0] < 0.5 * off[1]


def test_the_limit_is_a_number_of_scores(monkeypatch):
    """2 rows, 4 heads, 3 queries and 5 keys have 120."""
    calls = called(monkeypatch)
    monkeypatch.setattr(attention, "MOST", 120)
    asked()
    assert calls


def usual(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **more):
    """Attention as a model calls it, with what it was told."""
    return "usual", more


@pytest.mark.parametrize("single", [False, True])
def test_a_word_that_it_does_not_know_is_not_left_out(single):
    """For many queries and for one; what is None says nothing. The mask may be given by name."""
    cache = growing_cache(CONFIGS["GPTNeoX"], torch.float32)
    key, value = cache.update(torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8), 0)
    query = torch.randn(2, 4, 1 if single else 3, 8)
    attend = [attention._attend, attention._attend_once][single]
    mask = torch.ones(2, 1, query.shape[2], 5, dtype=torch.bool)
    given = cache if single else torch.float32
    call = partial(attend, given, usual, MODULE, query, key, value, attention_mask=mask)
    for word in ("softcap", "position_bias"):
        assert call(**{word: 3.0}) == ("usual", {word: 3.0})
        assert call(**{word: None})[0] != "usual"
    assert call(dropout=0.1)[0] == "usual"
    torch.testing.assert_close(call()[0], call(scaling=8**-0.5)[0])


def test_another_models_attention_is_its_own(monkeypatch):
    """Within a context that is for products in 16 bits."""
    calls = called(monkeypatch)
    found, expected = asked(torch.bfloat16)
    assert torch.equal(found, expected) and not calls
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = asked(torch.bfloat16)
    assert calls and found.dtype == torch.bfloat16


def test_prompts_without_padding_are_read_causally(monkeypatch):
    """Their mask is none."""
    monkeypatch.setattr(packed, "FITS", 0)
    torch.manual_seed(0)
    network = Network(AutoModelForCausalLM.from_config(CONFIGS["GPTNeoX"]))
    tokens = torch.randint(1, 50, (3, 8))
    drawn = sample(network, tokens, torch.ones_like(tokens, dtype=torch.bool), torch.rand(3, 9),
                   torch.tensor([-1]), 0)  # fmt: skip
    whole = torch.cat([tokens, drawn.completions], 1)
    logp = network.model(whole[:, :-1]).logits.log_softmax(-1)[:, 7:]
    expected = logp.gather(-1, drawn.completions[..., None])[..., 0]
    torch.testing.assert_close(drawn.logp, expected.detach(), rtol=1e-5, atol=1e-5)


def test_in_float32_pytorchs_is_as_fast_and_stays():
    plain = AttentionInterface()["sdpa"]
    with attention.many_queries(torch.float32):
        assert AttentionInterface()["sdpa"] is plain
    with attention.many_queries(torch.bfloat16):
        assert AttentionInterface()["sdpa"] is not plain
    assert AttentionInterface()["sdpa"] is plain
