"""Products of a sampling in the update that follows: the same step but for rounding, and only where
they are those of the update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lib.lm import kept, lora, packed
from lib.lm.kept import Kept
from lib.lm.network import Network
from lib.lm.policy import CausalPolicy
from lib.methods import METHODS
from lib.rollouts import Rollout
from tests.lm.test_packed import BF16, CONFIGS, distance, rows

pytestmark = pytest.mark.skipif(
    not packed._packs(torch.float32), reason="no packed products on this machine"
)
ENDS = (3, 17, 31)  # ids of EOS: completions end early, each at another place
CONTINUED = [name for name in CONFIGS if name not in ("sliding window", "Conv1D")]


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch):
    monkeypatch.setattr(packed, "FITS", 0)


def policy(name="GPTNeoX", method="dpo", dtype="float32", budget=None, rate=1e-2):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    if name == "LoRA":
        lora.attach(model, 4, 0, dtype)
    value_head = "value_head" in METHODS[method].needs
    network = Network(model, 0.9, value_head=value_head, dtype=dtype)
    return CausalPolicy(network, ENDS, 0, rate, budget=budget)


def drawn(policy, method, seed, count=2, length=30):
    """A sampling with rewards, padded prompts, and a reference that differs from the policy."""
    tokens, mask = rows()
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(3 * count, length, generator=generator)
    found = policy.frozen().sample(tokens, mask, uniforms)
    shape = (3, count, length)
    whole = found.mask.view(shape)
    batch = Rollout(
        prompts=tokens, prompt_mask=mask, completions=found.completions.view(shape), mask=whole,
        logp=found.logp.view(shape), ref=found.logp.view(shape) + 0.1 * whole,
        rewards=torch.rand(3, count, generator=generator), scale=found.scale,
        values=None if found.values is None else found.values.view(shape),
    )  # fmt: skip
    hyper = {**METHODS[method].hyper, "kl_coefficient": 0.1}
    return batch.labelled(METHODS[method].prepare(batch, hyper)), hyper


def learn(policy, method, batch, hyper):
    method = METHODS[method]
    return policy.update(batch, method, hyper, method.items(batch))[0]


def steps(monkeypatch, keep, method="dpo", count=2, **more):
    """Two samplings with an update each; all that the second found, and where it led."""
    monkeypatch.setattr(kept, "KEEP", keep)
    one = policy(method=method, **more)
    for seed in range(2):
        batch, hyper = drawn(one, method, seed, count)
        held = bool(one.kept.prompts)
        logp = learn(one, method, batch, hyper)
        assert not one.kept.prompts
    return held, {"logp": logp, "drawn": batch.logp,
                        **{n: p.grad for n, p in one.network.named_parameters()
                           if p.grad is not None}}  # fmt: skip


@pytest.mark.parametrize("dtype, most", [("float32", 2e-5), BF16])
@pytest.mark.parametrize("name", CONTINUED)
def test_gradients_are_those_of_a_pass_that_multiplies(name, dtype, most, monkeypatch):
    """In several micro-batches of rows in another order, whose prompts are padded less."""
    for budget in (None, 40):
        held, found = steps(monkeypatch, 2**30, name=name, dtype=dtype, budget=budget)
        plain, expected = steps(monkeypatch, 0, name=name, dtype=dtype, budget=budget)
        assert held and not plain and found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype and distance(found[key], value) < most, key


@pytest.mark.parametrize(
    "method, count", [("best_of_n", 4), ("ppo_token", 2), ("reinforce", 1), ("rwr", 2)]
)
def test_every_method_takes_the_step_that_it_took(method, count, monkeypatch):
    """Some of the completions, a value head, one completion of a prompt."""
    held, found = steps(monkeypatch, 2**30, method, count)
    _, expected = steps(monkeypatch, 0, method, count)
    assert held
    for key, value in expected.items():
        assert distance(found[key], value) < 2e-5, key


def multiplied(policy, batch, hyper, monkeypatch):
    """Matrices that an update multiplies by, and how many there are in the model but its head."""
    seen, product = [], packed._product
    with monkeypatch.context() as patch:
        patch.setattr(packed, "_product", lambda w, *x: seen.append(w) or product(w, *x))
        learn(policy, "dpo", batch, hyper)
    return len(seen), sum(type(m) is nn.Linear for m in policy.network.model.base_model.modules())


def test_the_update_after_a_sampling_multiplies_by_no_matrix_but_the_heads(monkeypatch):
    """Forward; backward it does, in both passes. The first update of all, and a second one on the
    same sampling, do both."""
    one = policy()
    batch, hyper = drawn(one, "dpo", 0)
    found, layers = multiplied(one, batch, hyper, monkeypatch)
    assert found == 4 * layers + 2
    batch, hyper = drawn(one, "dpo", 1)
    assert multiplied(one, batch, hyper, monkeypatch) == (2 * layers + 2, layers)
    assert multiplied(one, batch, hyper, monkeypatch) == (4 * layers + 2, layers)


def trained():
    """A policy after its first update."""
    one = policy()
    learn(one, "dpo", *drawn(one, "dpo", 0))
    return one


def test_nothing_is_kept_for_what_is_not_learned_from_next():
    one = trained()
    tokens, mask = rows()
    one.sample(tokens, mask, torch.rand(3, 5))  # an evaluation
    assert one.kept.tokens is None
    batch, _ = drawn(one, "dpo", 1)
    one.sample(tokens, mask, torch.rand(3, 5))  # the next minibatch of one sampling
    assert one.kept.holds(batch.completions.flatten(0, 1))
    one.frozen()
    assert not one.kept.holds(batch.completions.flatten(0, 1))


def test_the_next_sampling_is_written_to_the_same_place():
    """Or to another, if it is of another shape."""
    one = trained()
    places = []
    for length in (30, 30, 20):
        batch, hyper = drawn(one, "dpo", 1, length=length)
        places.append(list(one.kept.completions.values()))
        learn(one, "dpo", batch, hyper)
    assert all(x is y for x, y in zip(*places[:2], strict=True))
    assert all(x.shape[1] == 20 for x in places[2])


def test_another_batch_than_the_one_that_was_sampled_is_computed(monkeypatch):
    one = trained()
    batch, hyper = drawn(one, "dpo", 1)
    other = replace(batch, completions=49 - batch.completions)
    found, layers = multiplied(one, other, hyper, monkeypatch)
    assert found == 4 * layers + 2


def test_a_run_that_goes_on_from_a_saved_state_finds_the_same_numbers():
    """What is kept is not saved, and whether anything is does not depend on where it was killed."""
    whole = policy()
    for seed in range(3):
        if seed == 1:
            state = {k: v.clone() for k, v in whole.state().items()}
        learn(whole, "dpo", *drawn(whole, "dpo", seed))
    later = policy()
    later.load_state(state)
    for seed in (1, 2):
        learn(later, "dpo", *drawn(later, "dpo", seed))
    for x, y in zip(whole.parameters, later.parameters, strict=True):
        assert torch.equal(x, y)


def test_several_processes_keep_nothing(monkeypatch):
    """Their shares of a sampling and of its update are not the same rows."""
    one = trained()
    assert one.frozen()._to_keep() is one.kept
    monkeypatch.setattr("lib.lm.parallel.place", lambda: (0, 2))
    assert one._to_keep() is None


# --- layers that cannot be kept -------------------------------------------------------------------


class Odd(nn.Module):
    """Layers that are called twice in a pass, for half of the tokens, not every time, and as often
    as there are passes, but not once in each."""

    def __init__(self):
        super().__init__()
        self.plain, self.shared, self.some, self.rare, self.uneven = (
            nn.Linear(4, 4) for _ in range(5)
        )
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        x = self.shared(self.shared(self.plain(x)))
        self.some(x[: len(x) // 2])
        x = self.rare(x) if self.passes != 2 else x
        for _ in range({1: 1, 2: 2, 3: 0}[self.passes]):
            x = self.uneven(x)
        return x


def recorded(model, length=3):
    kept, given = Kept(model.children(), torch.float32), []
    with torch.no_grad(), kept.recording(torch.zeros(2, 5), torch.zeros(4, length)):
        given.append(model(torch.randn(2, 5, 4)))
        for t in range(length - 1):
            kept.at(torch.arange(4), t)
            given.append(model(torch.randn(4, 1, 4)))
    return kept, given


def test_only_layers_that_see_every_token_once_are_kept():
    model = Odd()
    found, _ = recorded(model)
    assert [name for name, m in model.named_children() if m in found] == ["plain"]
    assert not any(m._forward_hooks for m in model.children())


def test_rows_and_positions_are_found_again():
    model = nn.Sequential(nn.Linear(4, 4))
    found, (prompts, *later) = recorded(model)
    found.ready(torch.tensor([1]), 2, torch.tensor([3, 0]), 2)
    assert torch.equal(found.take(model[0]), prompts[[1], -2:])
    assert torch.equal(found.take(model[0]), torch.cat(later, 1)[[3, 0]])
    assert found.take(model[0]) is None  # a third pass is computed


def test_where_there_is_no_room_the_dearest_layers_are_kept(monkeypatch):
    """A layer of 64 inputs spares twice what one of 32 does for each number that is held."""
    wide, narrow, other = nn.Linear(64, 8), nn.Linear(32, 8), nn.Linear(16, 4)
    prompts, tokens = torch.zeros(2, 5), 2 * 5 + 4 * 3
    for numbers, expected in ((20, [wide, narrow, other]), (19, [wide, narrow]),
                              (15, [wide, other]), (3, [])):  # fmt: skip
        monkeypatch.setattr(kept, "KEEP", 4 * tokens * numbers)
        layers = nn.ModuleList([other, narrow, wide])
        with Kept(layers, torch.float32).recording(prompts, torch.zeros(4, 3)):
            assert [m for m in (wide, narrow, other) if m._forward_hooks] == expected
