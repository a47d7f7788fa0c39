"""Outputs of a sampling in the update that follows: the same step but for rounding, and only where
they are what the update would find."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lib.lm import lora, network, outputs, packed
from lib.lm.network import Network
from lib.lm.outputs import Outputs
from lib.lm.policy import ANEW, CausalPolicy
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
    whole = Network(model, 0.9, value_head=value_head, dtype=dtype)
    return CausalPolicy(whole, ENDS, 0, rate, budget=budget)


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


def held(policy, batch):
    return policy.outputs.are_of(batch.prompts, batch.completions.flatten(0, 1))


def steps(monkeypatch, keep, method="dpo", count=2, **more):
    """Two samplings with an update each; all that the second found, and where it led."""
    monkeypatch.setattr(outputs, "KEEP", keep)
    one = policy(method=method, **more)
    for seed in range(2):
        batch, hyper = drawn(one, method, seed, count)
        used = held(one, batch)
        logp = learn(one, method, batch, hyper)
        assert not one.outputs.prompts
    return used, {"logp": logp, "drawn": batch.logp,
                        **{n: p.grad for n, p in one.network.named_parameters()
                           if p.grad is not None}}  # fmt: skip


PART = 4 * (3 * 8 + 6 * 29) * 200  # bytes: some of the layers' outputs


@pytest.mark.parametrize("dtype, most", [("float32", 2e-5), BF16])
@pytest.mark.parametrize("name", CONTINUED)
def test_gradients_are_those_of_a_pass_that_multiplies(name, dtype, most, monkeypatch):
    """In several micro-batches of rows in another order, whose prompts are padded less; and where
    there is no room for all."""
    for budget, keep in ((None, 2**30), (40, 2**30), (None, PART)):
        used, found = steps(monkeypatch, keep, name=name, dtype=dtype, budget=budget)
        plain, expected = steps(monkeypatch, 0, name=name, dtype=dtype, budget=budget)
        assert used and not plain and found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype and distance(found[key], value) < most, key


@pytest.mark.parametrize(
    "method, count", [("best_of_n", 4), ("ppo_token", 2), ("reinforce", 1), ("rwr", 2)]
)
def test_every_method_takes_the_step_that_it_took(method, count, monkeypatch):
    """Some of the completions, a value head, one completion of a prompt."""
    used, found = steps(monkeypatch, 2**30, method, count)
    _, expected = steps(monkeypatch, 0, method, count)
    assert used
    for key, value in expected.items():
        assert distance(found[key], value) < 2e-5, key


def counted(policy, batch, hyper, monkeypatch, method="dpo"):
    """Of an update: matrices that it multiplied by, and outputs that it took; then the number of
    micro-batches, and of layers but the head."""
    products, taken, product, take = [], [], packed._product, Outputs.take
    with monkeypatch.context() as patch:
        patch.setattr(packed, "_product", lambda w, *x: products.append(w) or product(w, *x))
        patch.setattr(Outputs, "take", lambda *x: taken.append(take(*x)) or taken[-1])
        pieces = len(policy._micro_batches(policy.planned(batch, METHODS[method])))
        learn(policy, method, batch, hyper)
    layers = sum(type(m) is nn.Linear for m in policy.network.model.base_model.modules())
    return len(products), sum(x is not None for x in taken), pieces, layers


def test_one_update_in_ten_multiplies_by_all_matrices_others_by_none(monkeypatch):
    """Forward: backward all do, in both passes. A second update on one sampling does as well."""
    one = policy()
    for number in range(ANEW + 2):
        batch, hyper = drawn(one, "dpo", number)
        anew = number % ANEW == 0
        products, taken, pieces, layers = counted(one, batch, hyper, monkeypatch)
        assert pieces == 1
        each = 2 * layers + 1
        assert (products, taken) == ((2 * each, 0) if anew else (each, each))
    assert counted(one, batch, hyper, monkeypatch) == (4 * layers + 2, 0, 1, layers)


@pytest.mark.parametrize("more, method, count", [
    ({"budget": 40}, "dpo", 2), ({"name": "LoRA"}, "dpo", 2), ({}, "reinforce", 1),
    pytest.param({"dtype": "bfloat16"}, "dpo", 2, marks=BF16.marks),
])  # fmt: skip
def test_all_outputs_are_taken_in_both_passes_of_every_micro_batch(
    more, method, count, monkeypatch
):
    one = policy(method=method, **more)
    learn(one, method, *drawn(one, method, 0, count))
    batch, hyper = drawn(one, method, 1, count)
    _, taken, pieces, layers = counted(one, batch, hyper, monkeypatch, method)
    assert taken == (2 * layers + 1) * pieces and (pieces > 1) == ("budget" in more)


@pytest.mark.parametrize("name", ["sliding window", "Conv1D"])
def test_a_model_that_cannot_go_on_from_a_prompt_or_has_other_layers_keeps_nothing(
    name, monkeypatch
):
    used, _ = steps(monkeypatch, 2**30, name=name)
    assert not used


def trained():
    """A policy after its first update."""
    one = policy()
    learn(one, "dpo", *drawn(one, "dpo", 0))
    return one


def test_nothing_is_kept_for_what_is_not_learned_from_next():
    one = trained()
    tokens, mask = rows()
    one.sample(tokens, mask, torch.rand(3, 5))  # an evaluation
    assert not one.outputs.recorded
    batch, _ = drawn(one, "dpo", 1)
    one.sample(tokens, mask, torch.rand(3, 5))  # the next minibatch of one sampling
    assert held(one, batch)
    one.frozen()
    assert not held(one, batch)


def test_wider_padding_is_no_other_prompt_and_all_else_is():
    """As minibatches that are joined have it. Tokens that were changed in place are seen."""
    one = trained()
    batch, _ = drawn(one, "dpo", 1)
    assert held(one, replace(batch, prompts=nn.functional.pad(batch.prompts, (3, 0))))
    assert not held(one, replace(batch, prompts=batch.prompts.flip(0)))
    assert not held(one, replace(batch, completions=batch.completions.flip(0)))
    for tokens in (batch.prompts, batch.completions):
        tokens[0, ..., -1] += 1
        assert not held(one, batch)
        tokens[0, ..., -1] -= 1
        assert held(one, batch)


def test_weights_that_are_loaded_are_not_those_of_the_sampling():
    """Nor is what a run that went non-finite has left."""
    one = trained()
    state = {k: v.clone() for k, v in one.state().items()}
    batch, _ = drawn(one, "dpo", 1)
    for place in one.outputs.completions.values():
        place.fill_(torch.nan)
    one.load_state(state)
    assert not held(one, batch)
    learn(one, "dpo", *drawn(one, "dpo", 1))
    assert one.alive


def test_a_sampling_that_is_stopped_leaves_nothing(monkeypatch):
    one = trained()
    batch, hyper = drawn(one, "dpo", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Outputs, "at", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        drawn(one, "dpo", 2)
    assert not one.outputs.prompts and not held(one, batch)
    learn(one, "dpo", batch, hyper)


def test_what_is_hooked_to_a_layer_acts_once(monkeypatch):
    """As one's own hook that scales a layer's output does."""
    found = []
    for keep in (2**30, 0):
        monkeypatch.setattr(outputs, "KEEP", keep)
        one = policy()
        layer = next(m for m in one.network.model.base_model.modules() if type(m) is nn.Linear)
        layer.register_forward_hook(lambda *x: 1.5 * x[-1])
        for seed in range(2):
            learn(one, "dpo", *drawn(one, "dpo", seed))
        found.append(layer.weight.grad)
    assert distance(*found) < 2e-5


def test_the_next_sampling_is_written_to_the_same_place():
    """Or to another, if it is of another shape."""
    one, places = trained(), []
    for length in (30, 30, 20):
        batch, hyper = drawn(one, "dpo", 1, length=length)
        places.append(dict(one.outputs.completions))
        learn(one, "dpo", batch, hyper)
    assert all(place is places[1].pop(layer) for layer, place in places[0].items())
    assert not places[1]
    with one.outputs.recording(torch.zeros(3, 8), torch.zeros(6, 25)):
        assert not one.outputs.completions  # let go before others are asked for
    head = places[2].pop(one.outputs.head)
    assert head.shape[1] == 20 and all(x.shape[1] == 19 for x in places[2].values())


def test_a_run_that_goes_on_from_a_saved_state_finds_the_same_numbers():
    """Where an earlier sampling has left its outputs in places that are not read, and where not."""
    whole = policy()
    for seed in range(4):
        if seed == 2:
            state = {k: v.clone() for k, v in whole.state().items()}
        learn(whole, "dpo", *drawn(whole, "dpo", seed))
    later = policy()
    later.load_state(state)
    for seed in (2, 3):
        learn(later, "dpo", *drawn(later, "dpo", seed))
    for x, y in zip(whole.parameters, later.parameters, strict=True):
        assert torch.equal(x, y)


def test_several_processes_keep_nothing(monkeypatch):
    """Their shares of a sampling and of its update are not the same rows."""
    one = trained()
    assert one.frozen()._outputs_due() is one.outputs
    monkeypatch.setattr("lib.lm.parallel.place", lambda: (0, 2))
    assert one._outputs_due() is None


@pytest.mark.parametrize("kept", [True, False])
def test_logits_that_are_held_are_learned_from_in_one_piece(kept, monkeypatch):
    """To compute those of a chunk again in the backward pass would spare no memory. Others are."""
    one, calls, forward = trained(), [], packed.Chosen.forward
    batch, hyper = drawn(one, "dpo", 1)
    if not kept:
        one.outputs.clear()
    monkeypatch.setattr(network, "LOGIT_BUDGET", 100)  # two tokens
    monkeypatch.setattr(packed.Chosen, "forward", lambda *x: calls.append(1) or forward(*x))
    learn(one, "dpo", batch, hyper)
    assert len(calls) == (1 if kept else 2 * -(-int(batch.mask.sum()) // 2))


@pytest.mark.parametrize("dtype, most", [("float32", 2e-5), BF16])
def test_logits_that_stand_in_a_row_become_their_gradients(dtype, most, monkeypatch):
    """Where no completion ends early, none is copied."""
    monkeypatch.setattr("tests.lm.test_outputs.ENDS", (-1,))
    used, found = steps(monkeypatch, 2**30, dtype=dtype)
    _, expected = steps(monkeypatch, 0, dtype=dtype)
    assert used and all(distance(found[k], x) < most for k, x in expected.items())
    monkeypatch.setattr(outputs, "KEEP", 2**30)
    one = policy(dtype=dtype)
    learn(one, "dpo", *drawn(one, "dpo", 0))
    batch, hyper = drawn(one, "dpo", 1)
    place = one.outputs.completions[one.outputs.head]
    logits = place.clone()
    learn(one, "dpo", batch, hyper)
    assert not torch.equal(place, logits)
    assert place.float().sum(-1).abs().max() < 0.01  # of a softmax, less what was drawn


def test_an_update_that_fails_leaves_nothing_to_take(monkeypatch):
    """It has written gradients where the logits were."""
    monkeypatch.setattr("tests.lm.test_outputs.ENDS", (-1,))
    one = trained()
    batch, hyper = drawn(one, "dpo", 1)
    state = {k: v.clone() for k, v in one.state().items()}
    plain = policy()
    plain.load_state(state)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lib.lm.parallel.sum_gradients", lambda _: (_ for _ in ()).throw(
            KeyboardInterrupt))  # fmt: skip
        learn(one, "dpo", batch, hyper)
    assert not held(one, batch)
    found, expected = (learn(x, "dpo", batch, hyper) for x in (one, plain))
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=BF16.marks)])
def test_where_some_are_kept_the_others_multiply(dtype, monkeypatch):
    """In bfloat16 by their own products, which are no packed ones."""
    monkeypatch.setattr(outputs, "KEEP", PART if dtype == "float32" else PART // 2)
    one = policy(dtype=dtype)
    learn(one, "dpo", *drawn(one, "dpo", 0))
    batch, hyper = drawn(one, "dpo", 1)
    kept = len(one.outputs.prompts)
    products, taken, _, layers = counted(one, batch, hyper, monkeypatch)
    assert 0 < kept < layers and taken == 2 * kept
    assert products == (2 * kept if dtype == "bfloat16" else 2 * layers + 2 * (layers - kept) + 2)


def test_a_pass_that_is_not_known_multiplies_by_the_layers_own_weight():
    """Packed it is not."""
    one = trained()
    batch, _ = drawn(one, "dpo", 1)
    tokens, mask = batch.prompts, batch.prompt_mask
    expected = one.network.hidden(tokens, mask)
    with one.network.packed(24, one.outputs):
        one.outputs.ready(torch.arange(3), 8, torch.arange(6), WHOLE.repeat(6, 1))
        known, second, third = (one.network.hidden(tokens, mask) for _ in range(3))
    for found in (known, second, third):  # the second is of another shape, a third is not due
        assert distance(found[mask], expected[mask]) < 1e-5


def test_weights_are_packed_for_a_sampling_whatever_is_kept():
    one = trained()
    drawn(one, "dpo", 1)
    assert one.outputs.prompts
    with torch.no_grad(), one.network.packed(6, one.outputs):
        assert all(layer.forward.args[1] is not None for layer in one.outputs.layers)


# --- layers that cannot be kept -------------------------------------------------------------------


class Odd(nn.Module):
    """Layers that are called twice in a pass, for half of the tokens, not in the second pass, not
    in the last, and as often as there are passes, but not once in each."""

    NAMES = ("plain", "shared", "some", "rare", "early", "uneven")

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            setattr(self, name, nn.Linear(4, 4))
        self.head = nn.Linear(4, 7)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        out = self.plain(x)
        given = out.clone()
        out += self.shared(self.shared(x))  # in place, where the output was
        self.some(x[: len(x) // 2])
        if self.passes != 2:
            self.rare(x)
        if self.passes != 3:
            self.early(x)
        for _ in range({1: 1, 2: 2, 3: 0}[self.passes]):
            self.uneven(x)
        return given


def recorded(model, length=3):
    """Outputs of two prompts and four completions, what `model` gave in each pass, and after it
    its head. The last completion but one has ended at the end."""
    found, given, logits = Outputs([*model.children()][:-1], torch.float32, model.head), [], []
    with (
        torch.no_grad(), packed.packed(model, "float32", 8, found),
        found.recording(torch.zeros(2, 5), torch.zeros(4, length)),
    ):  # fmt: skip
        given.append(model(torch.randn(2, 5, 4)))
        logits.append(model.head(torch.randn(4, 4)))
        for t in range(length - 1):
            rows = torch.tensor([0, 1, 3]) if t == length - 2 else torch.arange(4)
            found.at(rows, t)
            given.append(model(torch.randn(len(rows), 1, 4)))
            logits.append(model.head(torch.randn(len(rows), 4)))
    return found, given, logits


def test_only_layers_that_see_every_token_once_are_kept():
    model = Odd()
    found, *_ = recorded(model)
    assert [name for name in Odd.NAMES if getattr(model, name) in found] == ["plain"]
    assert found.completions.keys() == {model.plain, model.head}


def test_a_head_that_is_called_once_more_is_not_kept():
    model = Odd()
    model.rare = model.head
    found, *_ = recorded(model)
    assert model.plain in found and model.head not in found


WHOLE = torch.ones(1, 3, dtype=torch.bool)


def test_rows_and_positions_are_found_again():
    """As they were given, whatever became of them."""
    model = Odd()
    found, (prompts, first, second), logits = recorded(model)
    later = torch.cat([first[[3, 0]], second[[2, 0]]], 1)
    mask = WHOLE.repeat(2, 1)
    mask[1, 1:] = False
    found.ready(torch.tensor([1]), 2, torch.tensor([3, 0]), mask)
    assert torch.equal(found.take(model.plain, torch.Size((1, 2))), prompts[[1], -2:])
    assert torch.equal(found.take(model.plain, torch.Size((2, 2))), later)
    assert found.take(model.plain, torch.Size((2, 2))) is None  # a third pass multiplies
    drawn = torch.stack([logits[0][3], logits[1][3], logits[2][2], logits[0][0]])
    assert torch.equal(found.take(model.head, torch.Size((4,))), drawn)
    assert found.take(model.head, torch.Size((4,))) is None
    found.ready(torch.tensor([1]), 2, torch.tensor([3, 0]), mask)
    assert found.take(model.plain, torch.Size((2,))) is None  # as does one of another shape


def test_rows_that_do_not_follow_each_other_are_copied():
    """As they are ordered by length: what is between may be permuted."""
    model = Odd()
    found, (_, first, _), _ = recorded(model)
    order = torch.tensor([0, 2, 1, 3])
    found.ready(torch.tensor([0, 1]), 5, order, WHOLE[:, :2].repeat(4, 1))
    found.take(model.plain, torch.Size((2, 5)))
    assert torch.equal(found.take(model.plain, torch.Size((4, 1))), first[order])


def test_what_follows_each_other_is_taken_where_it_stands():
    """And may be written to, by a model or where gradients are computed."""
    model = Odd()
    found, (prompts, first, _), logits = recorded(model)
    found.ready(torch.tensor([0, 1]), 5, torch.tensor([1, 2]), WHOLE.repeat(2, 1))
    taken = [found.take(model.plain, torch.Size(shape)) for shape in ((2, 5), (2, 2))]
    taken.append(found.take(model.head, torch.Size((6,))))
    place = found.completions[model.plain]
    assert [x.data_ptr() for x in taken] == [
        found.prompts[model.plain].data_ptr(), place[1].data_ptr(),
        found.completions[model.head][1].data_ptr()]  # fmt: skip
    assert torch.equal(taken[0], prompts) and torch.equal(taken[1][:, 0], first[1:3, 0])
    assert torch.equal(taken[2][[0, 3]], logits[0][1:3])
    found.ready(torch.tensor([0]), 5, torch.tensor([1, 2]), WHOLE[:, :2].repeat(2, 1))
    found.take(model.plain, torch.Size((1, 5)))
    part = found.take(model.plain, torch.Size((2, 1)))  # their first tokens do not follow
    assert part.is_contiguous() and torch.equal(part, first[1:3])


def test_a_model_may_write_to_what_its_layer_gave(monkeypatch):
    """As an activation in place does; also where a layer multiplies."""
    found = []
    for keep, fits in ((2**30, 0), (0, 0), (0, 2**40)):
        monkeypatch.setattr(outputs, "KEEP", keep)
        monkeypatch.setattr(packed, "FITS", fits)
        one = policy()
        for block in one.network.model.base_model.layers:
            block.mlp.act = nn.ReLU(inplace=True)
        for seed in range(2):
            batch, hyper = drawn(one, "dpo", seed)
            used = held(one, batch)
            learn(one, "dpo", batch, hyper)
        assert used == bool(keep)
        found.append([p.grad for p in one.parameters])
    for x, y, z in zip(*found, strict=True):
        assert distance(x, z) < 2e-5 and distance(y, z) < 2e-5


def test_where_there_is_no_room_the_dearest_layers_are_kept(monkeypatch):
    """A layer of 64 inputs spares twice what one of 32 does for each number that is held. Places of
    those that are not kept any more are let go."""
    wide, narrow, other = nn.Linear(64, 8), nn.Linear(32, 32), nn.Linear(16, 4)
    found, tokens = Outputs([other, narrow, wide], torch.float32), 2 * 5 + 4 * 2
    for numbers, expected in ((44, [wide, narrow, other]), (43, [wide, narrow]),
                              (39, [wide, other]), (3, [])):  # fmt: skip
        monkeypatch.setattr(outputs, "KEEP", 4 * tokens * numbers)
        with found.recording(torch.zeros(2, 5), torch.zeros(4, 3)):
            for layer in (wide, narrow, other):
                found.note(layer, torch.zeros(2, 5, layer.out_features))
            assert list(found.prompts) == expected and found.completions.keys() <= set(expected)
            for t in range(2):
                found.at(torch.arange(4), t)
                for layer in expected:
                    found.note(layer, torch.zeros(4, 1, layer.out_features))
        assert [m for m in (wide, narrow, other) if m in found] == expected
    half = Outputs([wide], torch.bfloat16)
    monkeypatch.setattr(outputs, "KEEP", 2 * tokens * 8)
    with half.recording(torch.zeros(2, 5), torch.zeros(4, 3)):
        assert half._kept == {wide}


def test_a_head_takes_room_for_the_tokens_that_it_draws(monkeypatch):
    """All of the completions, and none of the prompts."""
    layer, head = nn.Linear(32, 8), nn.Linear(32, 50)
    numbers = 8 * (2 * 5 + 4 * 2) + 50 * 4 * 3
    for room, expected in ((numbers, {layer, head}), (numbers - 1, {layer})):
        monkeypatch.setattr(outputs, "KEEP", 4 * room)
        found = Outputs([layer], torch.float32, head)
        with found.recording(torch.zeros(2, 5), torch.zeros(4, 3)):
            assert found._kept == expected
