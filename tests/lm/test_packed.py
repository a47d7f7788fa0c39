"""Packed weights and one-query attention: the same numbers up to rounding, nothing left behind, and
nothing at all for a model that a processor's cache holds."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.utils.prune
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
)

from lib.lm import attention, decode, lora, packed
from lib.lm import network as network_module
from lib.lm.cache import WholeLayer, growing_cache
from lib.lm.network import Network
from lib.lm.outputs import Outputs
from lib.lm.policy import CausalPolicy, Scorer
from lib.lm.prefix import Prefixed
from lib.methods import METHODS
from lib.rollouts import Rollout

pytestmark = pytest.mark.skipif(
    not packed._packs(torch.float32), reason="no packed products on this machine"
)

BF16 = pytest.param("bfloat16", 0.03, marks=pytest.mark.skipif(
    not packed._packs(torch.bfloat16), reason="bfloat16 is emulated here"))  # fmt: skip
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": None,
         "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2}  # fmt: skip
CONFIGS = {
    "GPTNeoX": GPTNeoXConfig(**SIZES),
    "grouped heads": LlamaConfig(**SIZES, num_key_value_heads=2),
    "sliding window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5),
    "Conv1D": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2),
    "LoRA": GPTNeoXConfig(**SIZES),
}  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NEVER = torch.tensor([-1])


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    if request.param == "LoRA":
        lora.attach(model, 4, 0)
        for name, p in model.named_parameters():  # they are zero at the start
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture
def all_sizes(monkeypatch):
    monkeypatch.setattr(packed, "FITS", 0)


@contextmanager
def unpacked(*_):
    yield None


def plainly(monkeypatch):
    """The feature patched out."""
    monkeypatch.setattr(network_module, "large", lambda model: False)
    monkeypatch.setattr(network_module, "packed", unpacked)


def rows(seed=0):
    """Tokens and mask, padded on the left."""
    tokens = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :3] = mask[2, :6] = False
    return tokens, mask


def logp(network):
    """Of the tokens that a token stands before: (N,) nats."""
    tokens, mask = rows()
    hidden = network.hidden(tokens, mask)
    found = network.logp(hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return found[mask[:, :-1].flatten()]


@torch.no_grad()
def scored(network, fast=True):
    """`logp` in a context of packed weights."""
    with packed.packed(network.model, network.dtype, 24) if fast else nullcontext():
        return logp(network)


def gradients(network):
    network.zero_grad()
    found = logp(network)
    (found * torch.linspace(-1, 1, len(found))).sum().backward()
    grads = {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
    return {"logp": found.detach()} | grads


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype, most", [("float32", 1e-5), BF16])
def test_values_are_those_of_plain_layers(model, all_sizes, dtype, most, monkeypatch):
    """In chunks of logits as well."""
    network = Network(model, dtype=dtype)
    plain = scored(network, fast=False)
    for near in (network_module.NEAR, 100):
        monkeypatch.setattr(network_module, "NEAR", near)
        assert distance(scored(network), plain) < most
    with torch.no_grad(), packed.packed(model, dtype, 24):
        assert packed.is_packed(model.get_output_embeddings())


@pytest.mark.parametrize("budget", [2**26, 100])
@pytest.mark.parametrize("dtype, most", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_gradients_are_those_of_a_small_model(model, dtype, most, budget, monkeypatch):
    """At once, and in chunks that are computed again (whose sum, of the head, is rounded to the
    products' dtype); with packed layers, and without. Attention is as usual, which rounds otherwise
    in bfloat16."""
    monkeypatch.setattr(packed, "many_queries", lambda _: nullcontext())
    network = Network(model, temperature=0.7, dtype=dtype)
    expected = gradients(network)
    monkeypatch.setattr(packed, "FITS", 0)
    monkeypatch.setattr(network_module, "LOGIT_BUDGET", budget)
    with packed.packed(model, dtype, 24) as inside:
        assert inside == (torch.float32 if dtype == "float32" else None)
        inside = gradients(network)
    for found in (gradients(network), inside):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype and distance(found[name], value) < most, name


@pytest.mark.parametrize("dtype, most", [("float32", 1e-5), BF16])
@pytest.mark.parametrize("dead", [[], [0, 1], [4, 8], range(9)])
def test_gradients_are_added_to_those_before_and_no_row_of_zeros_is_multiplied(
    dead, dtype, most, monkeypatch
):
    torch.manual_seed(0)
    of, product, multiplied = getattr(torch, dtype), packed._product, []
    monkeypatch.setattr(packed, "_product", lambda w, b, x: multiplied.append(len(x)) or
                        product(w, b, x))  # fmt: skip
    layer, inputs, share = torch.nn.Linear(32, 16), torch.randn(2, 3, 3, 32), torch.randn(3, 3, 16)
    share.view(9, 16)[list(dead)] = 0
    back = packed._pack(layer.weight.detach().to(of).t().contiguous(), 9)
    found, expected, place = [], [], None
    for x in inputs:
        x = x.requires_grad_()
        known = layer(x).detach().to(of)
        out = packed._Differentiable.apply(x, layer.weight, layer.bias, back, lambda _, k=known: k)
        (out * share).sum().backward()
        found.append(x.grad)
        assert place in (None, layer.weight.grad.data_ptr())
        place = layer.weight.grad.data_ptr()
    found += [layer.weight.grad, layer.bias.grad]
    layer.zero_grad()
    for x in inputs.detach():
        x = x.requires_grad_()
        (layer(x) * share).sum().backward()
        expected.append(x.grad)
    expected += [layer.weight.grad, layer.bias.grad]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert torch.equal(one, other) if len(dead) == 9 else distance(one, other) < most
    assert multiplied == [9 - len(dead)] * 2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype, digits", [(torch.float64, 6), (torch.bfloat16, 2)])
def test_chosen_is_a_log_softmax_in_several_pieces(dtype, digits, temperature, monkeypatch):
    """Its gradient is left where the logits were."""
    monkeypatch.setattr(packed, "PIECE", 20)  # two rows
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, 9, generator=generator)).to(dtype)
    tokens, share = torch.tensor([0, 3, 8, 3, 1]), torch.linspace(-1, 2, 5)
    exact = logits.double().requires_grad_()
    expected = (exact / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    (expected * share).sum().backward()
    place = logits.clone().requires_grad_()
    found = packed.Chosen.apply(place, tokens, temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    grad, = torch.autograd.grad((found * share).sum(), place)
    assert grad.data_ptr() == place.data_ptr() and grad.dtype == dtype
    assert (grad.double() - exact.grad).abs().max() < 10**-digits


def test_a_second_backward_pass_is_refused():
    """The first has left the gradient where the log-probabilities were."""
    logits = torch.randn(4, 9, requires_grad=True)
    found = packed.Chosen.apply(logits * 1, torch.arange(4), 1.0)
    found.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        found.sum().backward()


def test_layers_are_their_own_again_even_after_an_exception(model, all_sizes):
    before = {name: p.clone() for name, p in model.named_parameters()}
    usual = AttentionInterface()["sdpa"]
    cache = growing_cache(model.config, torch.float32)
    with (
        pytest.raises(KeyError),
        packed.packed(model, "float32", 24) as dtype,
        attention.one_query(cache),
    ):
        assert dtype == torch.float32 and packed.is_packed(model.get_output_embeddings())
        raise KeyError
    assert AttentionInterface()["sdpa"] is usual
    assert not any("forward" in vars(m) for m in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_a_layer_that_cannot_be_packed_leaves_no_other_packed(model, all_sizes, monkeypatch):
    pack, calls = packed._pack, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return pack(*arguments)

    monkeypatch.setattr(packed, "_pack", failing)
    with pytest.raises(RuntimeError), packed.packed(model, "float32", 24):
        pass
    assert not any("forward" in vars(m) for m in model.modules())


def test_weights_that_changed_between_two_contexts_are_seen(model, all_sizes):
    network = Network(model)
    optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-2)
    before = scored(network)
    gradients(network)
    optimiser.step()
    after = scored(network)
    assert distance(after, before) > 1e-2 and distance(after, scored(network, fast=False)) < 1e-5
    with packed.packed(model, "float32", 24):
        assert distance(gradients(network)["logp"], after) < 1e-5


def sampled(network, length=40):
    tokens, mask = rows()
    uniforms = torch.rand(6, length, generator=torch.Generator().manual_seed(1))
    with network.autocast():
        return decode.sample(network, tokens, mask, uniforms, NEVER, 0)


def test_sampling_draws_what_it_draws_plainly(model, all_sizes, monkeypatch):
    """Past the first room of the cache; a layer with a window of its own attends as usual."""
    network, held = Network(model), []
    whole = attention._held
    monkeypatch.setattr(attention, "_held", lambda *x: held.append(whole(*x)) or held[-1])
    found = sampled(network)
    cache = growing_cache(model.config, torch.float32)
    layers = sum(isinstance(x, WholeLayer) for x in cache.layers)
    assert sum(x is not None for x in held) == layers * 40  # the prompt pass too
    plainly(monkeypatch)
    plain = sampled(network)
    assert torch.equal(found.completions, plain.completions)
    torch.testing.assert_close(found.logp, plain.logp, **CLOSE)


def test_sampling_in_bfloat16_finds_what_scoring_does(model, all_sizes):
    network = Network(model, dtype="bfloat16")
    found = sampled(network)
    tokens, mask = (x.repeat_interleave(2, 0) for x in rows())
    whole = torch.cat([tokens, found.completions], 1)
    seen = torch.cat([mask, torch.ones_like(found.completions, dtype=torch.bool)], 1)
    with torch.no_grad():
        hidden = network.hidden(whole[:, :-1], seen[:, :-1])[:, tokens.shape[1] - 1 :]
        logp = network.logp(hidden.flatten(0, 1), found.completions.flatten())
    assert distance(found.logp.flatten(), logp) < 0.03


def test_rows_that_finish_are_left_out_of_the_whole_cache(model, all_sizes, monkeypatch):
    network = Network(model)
    tokens, mask = rows()
    uniforms = torch.rand(3, 40, generator=torch.Generator().manual_seed(1))
    ends = torch.arange(0, 50, 12)
    found = decode.sample(network, tokens, mask, uniforms, ends, 0)
    plainly(monkeypatch)
    plain = decode.sample(network, tokens, mask, uniforms, ends, 0)
    assert torch.equal(found.mask, plain.mask) and found.mask.sum(-1).unique().numel() > 1
    torch.testing.assert_close(found.logp, plain.logp, **CLOSE)


def test_a_weight_that_is_made_anew_at_every_pass_is_not_packed(all_sizes):
    """As pruning and quantisation make it; then no layer is, since keys and queries must agree."""
    one, two = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
    torch.nn.utils.prune.random_unstructured(one, "weight", 0.5)
    with torch.no_grad(), packed.packed(torch.nn.Sequential(one, two), "float32", 4) as dtype:
        assert dtype is None and not packed.is_packed(one) and not packed.is_packed(two)


def test_a_network_without_its_adapters_packs_as_it_does(all_sizes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["LoRA"])
    lora.attach(model, 4, 0)
    for packs in (True, False):
        base = lora.Base(Network(model, packs=packs))
        assert base.large == packs and torch.isfinite(logp(base)).all()


def test_products_outside_of_the_dtype_that_was_packed_are_the_layers_own(all_sizes):
    """Such as a router's, which some models keep in float32."""
    layer, x = torch.nn.Linear(32, 32), torch.randn(4, 32)
    with torch.no_grad(), packed.packed(layer, "bfloat16", 4), torch.autocast("cpu"):
        assert layer(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


# --- what a processor's cache holds ---------------------------------------------------------------


def step(dtype):
    """Two updates of a small policy: all that it drew, scored and learned."""
    torch.manual_seed(0)
    network = Network(AutoModelForCausalLM.from_config(CONFIGS["GPTNeoX"]), dtype=dtype)
    policy, method, (tokens, mask) = CausalPolicy(network, (3,), 0, 1e-2), METHODS["dpo"], rows()
    found = []
    for seed in range(2):
        uniforms = torch.rand(6, 40, generator=torch.Generator().manual_seed(seed))
        drawn = policy.frozen().sample(tokens, mask, uniforms)
        shape = (3, 2, 40)
        batch = Rollout(
            prompts=tokens, prompt_mask=mask, completions=drawn.completions.view(shape),
            mask=drawn.mask.view(shape), logp=drawn.logp.view(shape), ref=None,
            rewards=torch.rand(3, 2, generator=torch.Generator().manual_seed(seed)),
            scale=drawn.scale,
        )  # fmt: skip
        scored = policy.score(batch)
        batch = Rollout(**{**vars(batch), "ref": scored + 0.1 * batch.mask})
        batch = batch.labelled(method.prepare(batch, method.hyper))
        logp, _ = policy.update(batch, method, method.hyper, method.items(batch))
        found += [drawn.completions, drawn.logp, scored, logp]
    return found + [p.detach() for p in policy.parameters] + [p.grad for p in policy.parameters]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_model_runs_what_it_ran_bit_for_bit(dtype, monkeypatch):
    with monkeypatch.context() as patch:
        plainly(patch)
        expected = step(dtype)

    def forbidden(*_, **__):
        raise AssertionError("a small model is to run the code that it always ran")

    for name in ("_pack", "_packed_forward"):
        monkeypatch.setattr(packed, name, forbidden)
    monkeypatch.setattr(attention, "_products", forbidden)
    monkeypatch.setattr(packed.Chosen, "forward", forbidden)
    monkeypatch.setattr(WholeLayer, "update", forbidden)
    monkeypatch.setattr(Outputs, "recording", forbidden)
    for x, y in zip(step(dtype), expected, strict=True):
        assert torch.equal(x, y)


def test_a_network_that_is_not_to_pack_scores_by_its_own_products_at_any_size(
    model, all_sizes, monkeypatch
):
    """A judge, whose scores are published to the last digit; also after a prefix it has read."""
    tokens, mask = rows()
    whole = torch.ones(3, 1, 8, dtype=torch.bool)
    batch = Rollout(prompts=tokens, prompt_mask=mask, completions=tokens[:, None], mask=whole,
                    logp=torch.zeros(3, 1, 8), ref=None, rewards=torch.zeros(3, 1),
                    scale=torch.ones(()))  # fmt: skip
    for make in (lambda packs: Network(model, packs=packs),
                 lambda packs: Prefixed(Network(model, packs=packs), [1, 2])):  # fmt: skip
        expected = Scorer(make(True), (3,), 0).score(batch)
        with monkeypatch.context() as patch:
            patch.setattr(packed, "FITS", 2**40)
            plain = Scorer(make(True), (3,), 0).score(batch)
        assert torch.equal(Scorer(make(False), (3,), 0).score(batch), plain)
        torch.testing.assert_close(expected, plain, **CLOSE)
        assert make(True).large and not make(False).large
    network = Network(model, packs=False)
    with network.packed(4) as dtype:
        assert dtype is None and not packed.is_packed(model.get_output_embeddings())


def test_weights_count_in_float32_and_from_the_limit_on(monkeypatch):
    layer = torch.nn.Linear(32, 64)
    for limit, expected in ((4 * 32 * 64, torch.float32), (4 * 32 * 64 + 1, None)):
        monkeypatch.setattr(packed, "FITS", limit)
        with torch.no_grad(), packed.packed(layer, "float32", 4) as dtype:
            assert dtype == expected and packed.is_packed(layer) == (expected is not None)


def test_layers_elsewhere_than_on_a_cpu_stay_as_they_are(all_sizes):
    model = torch.nn.Linear(32, 32, device="meta")
    with packed.packed(model, "float32", 4) as dtype:
        assert dtype is None and not packed.is_packed(model)
