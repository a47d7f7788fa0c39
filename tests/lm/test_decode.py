"""Sampling: against transformers' own generation, alone and in company, EOS and padding."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from lib.lm import decode
from lib.lm.batches import padded, unpadded
from lib.lm.network import Network
from tests.tiny_lm import save_tiny_policy

EOS, PAD = 256, 257
PROMPTS = [[10, 20, 30], [40], [50, 60, 70, 80, 90], [5, 256, 7]]  # an EOS inside a prompt
CAP = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), initializer_range=0.3)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def drawn(network, prompts, numbers, eos=(EOS,), pad=PAD, **options):
    ids, mask = padded(prompts, pad, "left")
    return decode.sample(network, ids, mask, numbers, torch.tensor(eos), pad, **options)


def numbers(rows, seed=0):
    return torch.rand(rows, CAP, generator=torch.Generator().manual_seed(seed))


def test_at_temperature_zero_it_is_transformers_greedy_generation(model):
    found = drawn(Network(model, temperature=1e-4), PROMPTS, numbers(4))
    ids, mask = padded(PROMPTS, PAD, "left")
    other = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=CAP, do_sample=False,
                           eos_token_id=EOS, pad_token_id=PAD)[:, ids.shape[1] :]  # fmt: skip
    other = torch.nn.functional.pad(other, (0, CAP - other.shape[1]), value=PAD)
    assert torch.equal(found.completions, other)


def test_a_completion_does_not_depend_on_its_company(model):
    network, u = Network(model), numbers(4)
    together = drawn(network, PROMPTS, u)
    for i, prompt in enumerate(PROMPTS):
        alone = drawn(network, [prompt], u[i : i + 1])
        assert torch.equal(alone.completions[0], together.completions[i])
        torch.testing.assert_close(alone.logp[0], together.logp[i], atol=1e-5, rtol=1e-5)


def test_leaving_out_finished_rows_changes_nothing(model, monkeypatch):
    network, u, many = Network(model), numbers(32), PROMPTS * 8
    monkeypatch.setattr(decode, "LOOK", 1000)
    kept = drawn(network, many, u, eos=tuple(range(0, 260, 5)))
    monkeypatch.setattr(decode, "LOOK", 1)
    monkeypatch.setattr(decode, "DROP", 0.01)
    dropped = drawn(network, many, u, eos=tuple(range(0, 260, 5)))
    assert kept.mask.sum(-1).unique().numel() > 3  # they end at different times
    assert torch.equal(kept.completions, dropped.completions)
    assert torch.equal(kept.mask, dropped.mask)
    torch.testing.assert_close(kept.logp, dropped.logp, atol=1e-5, rtol=1e-5)


def test_a_completion_ends_with_the_first_of_several_eos_or_at_the_cap(model):
    eos = tuple(range(0, 250, 10))
    found = drawn(Network(model), PROMPTS * 8, numbers(32), eos=eos)
    rows = unpadded(found.completions, found.mask)
    assert all(sum(token in eos for token in row) <= 1 for row in rows)
    assert all(row[-1] in eos or len(row) == CAP for row in rows)
    capped = [row for row in rows if row[-1] not in eos]
    assert capped and len(capped) < len(rows)
    assert (found.completions[~found.mask] == PAD).all()
    assert (found.logp[~found.mask] == 0).all()


def test_padding_with_eos_changes_nothing(model):
    """Masks come from the sampling itself, never from comparing ids with the padding id."""
    network, u = Network(model), numbers(4)
    apart, same = drawn(network, PROMPTS, u), drawn(network, PROMPTS, u, pad=EOS)
    assert torch.equal(apart.mask, same.mask)
    assert unpadded(apart.completions, apart.mask) == unpadded(same.completions, same.mask)


def test_frequencies_of_the_first_token_are_the_models_probabilities(model):
    rows = 20_000
    network = Network(model)
    ids, mask = padded([PROMPTS[0]] * rows, PAD, "left")
    u = torch.rand(rows, 1, generator=torch.Generator().manual_seed(1))
    found = decode.sample(network, ids, mask, u, torch.tensor([EOS]), PAD)
    p = network.logits(network.hidden(ids[:1], mask[:1])[:, -1]).softmax(-1)[0].detach()
    seen = found.completions[:, 0].bincount(minlength=len(p)).double()
    wanted = rows * p.double() / p.double().sum()
    likely = wanted > 5  # the others together: the test wants some of each kind
    counts = (torch.cat([x[likely], x[~likely].sum()[None]]) for x in (seen, wanted))
    assert chisquare(*counts).pvalue > 1e-3
    torch.testing.assert_close(found.logp[:, 0], p.log()[found.completions[:, 0]],
                               atol=1e-5, rtol=1e-5)  # fmt: skip
