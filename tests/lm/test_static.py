"""Decoding with a cache of fixed shape: the same tokens as with one that grows, compiled or not."""

from __future__ import annotations

import copy
import shutil
import warnings
from contextlib import contextmanager, nullcontext
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from lib.lm import decode, lora, policy, static
from lib.lm.batches import padded
from lib.lm.config import TINY
from lib.lm.models import load_policy
from lib.lm.network import Network, halve, matrices
from lib.lm.pairs import load
from lib.lm.policy import TOLERANCE, Scorer, compiles
from lib.lm.static import StaticDecoder, Twin
from lib.rollouts import Rollout
from tests.tiny_lm import half_of, save_tiny_policy

EOS, PAD = 256, 257
PROMPTS = [[10, 20, 30], [40], [50, 60, 70, 80, 90], [5, 256, 7]]  # an EOS inside a prompt


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_policy(tmp_path_factory.mktemp("policy"), initializer_range=0.3)
    return AutoModelForCausalLM.from_pretrained(folder)


def numbers(rows, length=20, seed=0):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


def inputs(prompts, uniforms, eos=(EOS,)):
    return *padded(prompts, PAD, "left"), uniforms, torch.tensor(eos), PAD


def assert_same(one, other):
    assert torch.equal(one.completions, other.completions)
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.logp, other.logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.scale, other.scale, atol=1e-4, rtol=1e-5)
    if one.values is not None:
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-5)


def llama():
    """Grouped keys, a gated MLP and a tied head, as SmolLM2 has them."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=True,
        initializer_range=0.3, bos_token_id=None, eos_token_id=EOS,
    ))  # fmt: skip


def test_the_shipped_policy_writes_the_same_tokens_to_64_prompts():
    model, _ = load_policy(TINY / "policy")
    eos = (model.config.eos_token_id,)
    prompts = load(TINY / "pairs.parquet", "validation", eos).prompts[:64]
    given = inputs(prompts, numbers(64, 96), eos)
    network = Network(model)
    grown = decode.sample(network, *given)
    assert 20 < grown.mask.sum(-1).float().mean() < 60
    assert_same(grown, StaticDecoder(network).sample(*given))


def test_several_completions_ends_and_values(model):
    network = Network(model, temperature=1.5, value_head=True)
    torch.nn.init.normal_(network.value.weight)
    given = inputs(PROMPTS, numbers(12), eos=tuple(range(0, 260, 9)))
    grown, fixed = decode.sample(network, *given), StaticDecoder(network).sample(*given)
    assert 3 < grown.mask.sum(-1).unique().numel() and grown.values.abs().max() > 0.1
    assert_same(grown, fixed)


def test_grouped_keys_and_a_tied_head():
    network, given = Network(llama()), inputs(PROMPTS, numbers(8))
    assert_same(decode.sample(network, *given), StaticDecoder(network).sample(*given))


def only_slate(decoder):
    (slate,) = decoder.steps.slates.values()
    return slate


def test_a_cache_is_kept_until_a_longer_one_is_needed(model, monkeypatch):
    """And what an earlier sampling left in it is not read."""
    monkeypatch.setattr(static, "PLACES", 8)
    network = Network(model)
    decoder = StaticDecoder(network)
    long, short = [list(range(30))] * 2 + PROMPTS[:2], PROMPTS
    caches = []
    for i, prompts in enumerate([short, long, short, long]):
        given = inputs(prompts, numbers(4, seed=i))
        assert_same(decode.sample(network, *given), decoder.sample(*given))
        caches.append(only_slate(decoder).cache)
    assert caches[0] is not caches[1] and caches[1] is caches[2] is caches[3]
    assert [c.places for c in caches] == [32, 56, 56, 56]


def test_a_cache_has_room_for_the_longest_prompt_from_the_start(model, monkeypatch):
    """One length of a cache, and so one compiled step for a number of rows."""
    monkeypatch.setattr(static, "PLACES", 8)
    network, caches = Network(model), []
    scorer = Scorer(network, (EOS,), PAD, decoder="static", longest=30)
    for i, prompts in enumerate([PROMPTS, [list(range(30))] * 2 + PROMPTS[:2]]):
        given = inputs(prompts, numbers(4, seed=i))
        assert_same(decode.sample(network, *given), scorer.sample(*given[:3]))
        caches.append(only_slate(scorer._static).cache)
    assert caches[0] is caches[1] and caches[0].places == 56


def mistral():
    """Attention that looks four tokens back."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(
        vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, initializer_range=0.3, sliding_window=4,
        bos_token_id=None, eos_token_id=EOS,
    ))  # fmt: skip


def on_gpu(model, dtype="float32"):
    """What `compiles` asks of a network."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, model=model)


def test_layers_with_a_window_are_not_compiled(monkeypatch):
    """Such a layer counts tokens in Python: every token would be compiled, up to the limit."""
    monkeypatch.setattr(policy, "_has_compiler", lambda: True)
    windowed, network = mistral(), Network(mistral())
    assert compiles(on_gpu(llama())) and not compiles(on_gpu(windowed))
    assert not compiles(Network(llama()))  # a CPU
    Scorer(Network(llama()), (EOS,), PAD, decoder="compiled")
    with pytest.raises(ValueError, match="MistralForCausalLM has layers .* must be 'growing'"):
        Scorer(network, (EOS,), PAD, decoder="compiled")


def small(kind, **options):
    """A model of one narrow layer of any architecture."""
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{
        "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "bos_token_id": None,
        "eos_token_id": EOS, "pad_token_id": PAD, **options,
    }))  # fmt: skip


GPT_NEO = {"num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
EXPERTS, FIXED = "has a mixture of experts", "is not known to attend rightly"


@pytest.mark.parametrize(("kind", "options", "why", "fixed"), [
    ("gpt_neo", GPT_NEO, FIXED, False), ("mpt", {"d_model": 32, "n_layers": 1}, FIXED, False),
    ("mixtral", {"num_local_experts": 4, "sliding_window": None}, EXPERTS, True),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, EXPERTS, True),
    ("llama", {"rope_parameters": ROPE}, "has rotary frequencies that depend", True),
    ("gpt2", {}, None, True), ("qwen2", {}, None, True),
])  # fmt: skip
def test_models_that_a_fixed_decoder_would_fail_are_refused(monkeypatch, kind, options, why, fixed):
    """With the reason; and by themselves they are decoded by the growing one."""
    monkeypatch.setattr(policy, "_has_compiler", lambda: True)
    model = small(kind, **options)
    assert compiles(on_gpu(model)) is static.compilable(model) is (why is None)
    for decoder, works in (("compiled", why is None), ("static", fixed), ("growing", True)):
        if works:
            policy._check(model, decoder)
            continue
        with pytest.raises(ValueError, match=f"{type(model).__name__} {why}.* not '{decoder}'"):
            policy._check(model, decoder)


def test_a_scorer_asks_whether_its_decoder_works():
    with pytest.raises(ValueError, match=f"GPTNeoForCausalLM {FIXED}"):
        Scorer(Network(small("gpt_neo", **GPT_NEO)), (EOS,), PAD, decoder="static")


def test_a_dynamic_rope_of_some_layers_is_seen():
    model = llama()
    model.model.rotary_emb.rope_type = {"full_attention": "dynamic", "other": "default"}
    assert not static.compilable(model)


def test_a_model_without_a_fixed_cache_is_not_compiled(monkeypatch):
    def none(config, max_cache_len):
        raise KeyError("of its own")

    monkeypatch.setattr(static, "StaticCache", none)
    assert not static.compilable(llama())
    with pytest.raises(ValueError, match="LlamaForCausalLM has no cache .* 'of its own'"):
        policy._check(llama(), "static")


def test_a_transformers_that_says_nothing_of_a_model_is_not_guessed_at(monkeypatch):
    """The attribute is a private one."""
    monkeypatch.delattr(LlamaPreTrainedModel, "_can_compile_fullgraph")
    monkeypatch.delattr(PreTrainedModel, "_can_compile_fullgraph")
    assert not static.compilable(llama())


def test_adapters_are_no_reason_against_a_compiled_step():
    """In place, as `lora.attach` puts them, or in a model of peft's own around it."""
    model = llama()
    lora.attach(model, 2, 0)
    assert static.compilable(model)
    for made, expected in ((llama(), True), (small("gpt_neo", **GPT_NEO), False)):
        wrapped = get_peft_model(made, LoraConfig(target_modules="all-linear"))
        assert static.compilable(wrapped) is expected


def test_a_gpu_that_emulates_bfloat16_does_not_compile_it(monkeypatch):
    monkeypatch.setattr(policy, "_has_compiler", lambda: True)
    for capability, expected in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert compiles(on_gpu(llama(), "bfloat16")) is expected
        assert compiles(on_gpu(llama(), "float16"))
        assert half_of("cuda") == ("bfloat16" if expected else "float16")


def test_networks_of_an_architecture_keep_their_slates_apart_by_shape(model, monkeypatch):
    """A decoder of a shared step finds those of others there: what is its own, its shape says."""
    monkeypatch.setattr(static, "_compiled", {})
    monkeypatch.setattr(static, "_shapes", set())
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    one, other = (StaticDecoder(Network(model), compiled=True) for _ in range(2))
    one.sample(*inputs(PROMPTS, numbers(4)))
    other.sample(*inputs(PROMPTS, numbers(8)))
    assert list(other.steps.slates) == [(4, 20, 1), (8, 20, 1)]
    assert other.steps.slates[8, 20, 1].index.numel() == 8


@pytest.mark.parametrize(("triton", "compiler", "message"), [
    (True, "sh", None), (True, "no-such-compiler", "without a C compiler here"),
    (False, "sh", "without Triton here"), (False, "", "without Triton and a C compiler here"),
])  # fmt: skip
def test_what_a_compiled_decoder_needs_is_asked_for_once(monkeypatch, triton, compiler, message):
    monkeypatch.setattr(policy, "has_triton", lambda: triton)
    monkeypatch.setenv("CC", compiler)
    policy._has_compiler.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [compiles(on_gpu(llama())) for _ in range(2)]
    policy._has_compiler.cache_clear()
    assert found == [message is None] * 2
    assert [str(w.message)[: len(message or "")] for w in said] == ([message] if message else [])


def test_it_stops_looking_when_all_rows_have_ended(model, monkeypatch):
    seen, step = [], static.step
    monkeypatch.setattr(static, "step", lambda *args: seen.append(1) or step(*args))
    network = Network(model)
    StaticDecoder(network).sample(*inputs(PROMPTS, numbers(4, 200), eos=tuple(range(264))))
    assert len(seen) == decode.LOOK - 1


def gpt2():
    """Matrices that are Conv1D, and a tied head."""
    torch.manual_seed(0)
    return small("gpt2", num_hidden_layers=2, initializer_range=0.3)


def test_gpt2s_matrices_are_cast_as_others_are():
    """Bit for bit what autocast gives, and frozen ones are held in 16 bits alone."""
    network = Network(gpt2(), dtype="bfloat16")
    twin, given = Twin(network, alone=True).refreshed(network), inputs(PROMPTS, numbers(8))
    block = twin.model.transformer.h[1]
    cast = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    assert {p.dtype for layer in cast for p in layer.parameters()} == {torch.bfloat16}
    assert block.ln_1.weight.dtype == twin.model.transformer.wte.weight.dtype == torch.float32
    frozen = Network(gpt2().requires_grad_(False), dtype="bfloat16")
    halve(frozen.model, "bfloat16")
    assert frozen.model.transformer.h[1].mlp.c_fc.weight.dtype == torch.bfloat16
    with torch.no_grad():
        states, *others = (n.hidden(*given[:2]) for n in (network, twin, frozen))
    assert all(torch.equal(states, other) for other in others)
    assert torch.equal(network.logits(states), twin.logits(states))
    assert_scored(network, given[:2], StaticDecoder(network).sample(*given))
    assert len(matrices(network.model)) == 2 * len(cast)


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_cast_once_give_what_autocast_gives(model, tied):
    """Bit for bit, also after the weights have changed; and what was sampled can be scored."""
    network = Network(llama() if tied else model, dtype="bfloat16")
    decoder, given = StaticDecoder(network), inputs(PROMPTS, numbers(8))
    tokens, mask = given[:2]
    for _ in range(2):
        with torch.no_grad():
            next(iter(matrices(network.model))).weight.mul_(1.5)
            twin = decoder.steps.twin.refreshed(network)
            states = [n.hidden(tokens, mask) for n in (network, twin)]
            assert torch.equal(*states)
            assert torch.equal(network.logits(states[0]), twin.logits(states[0]))
        assert_scored(network, given[:2], decoder.sample(*given))


def assert_scored(network, prompts, samples):
    """The log-probabilities of a sampling are those of a pass over the whole completions."""
    scorer = Scorer(network, (EOS,), PAD)
    shape = (len(PROMPTS), -1, samples.mask.shape[1])
    batch = Rollout(
        prompts=prompts[0], prompt_mask=prompts[1], completions=samples.completions.view(shape),
        mask=samples.mask.view(shape), logp=samples.logp.view(shape), ref=None,
        rewards=samples.logp.new_zeros(samples.mask.view(shape).shape[:2]), scale=samples.scale,
    )  # fmt: skip
    difference = (scorer.score(batch) - batch.logp).abs().max()
    assert difference <= TOLERANCE[network.dtype] * (1 + samples.scale)


def test_the_twin_shares_all_but_its_matrices():
    network = Network(llama(), dtype="bfloat16", value_head=True)
    twin = Twin(network).network
    assert twin.value.weight is network.value.weight
    assert twin.model.model.embed_tokens.weight is network.model.model.embed_tokens.weight
    assert twin.model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert Twin(Network(llama())).casts == []


def test_networks_of_an_architecture_share_a_compiled_step(model, monkeypatch):
    """As long as all of their weights train; no more than KEPT are held."""
    monkeypatch.setattr(static, "_compiled", {})
    network = Network(copy.deepcopy(model))
    first = static.compiled_steps(network)
    assert static.compiled_steps(Network(copy.deepcopy(model), checkpointing=True)) is first
    own = {p.data_ptr() for p in network.parameters()}
    assert not own & {p.data_ptr() for p in first.twin.network.parameters()}
    valued = static.compiled_steps(Network(copy.deepcopy(model), value_head=True))
    assert valued is not first and len(static._compiled) == static.KEPT
    static.compiled_steps(Network(copy.deepcopy(model), temperature=2.0))
    assert len(static._compiled) == 1
    adapted = Network(copy.deepcopy(model))
    lora.attach(adapted.model, 2, 0)
    assert static.compiled_steps(adapted).twin.network is adapted and not static._compiled


def test_a_shared_twin_takes_all_that_a_network_has(model):
    one, other = (Network(copy.deepcopy(model), value_head=True) for _ in range(2))
    twin = Twin(one, alone=True)
    with torch.no_grad():
        for x in (*other.parameters(), *other.buffers()):
            x.copy_(torch.rand_like(x))
    states = [dict(n.state_dict(keep_vars=True)) for n in (twin.refreshed(other), other)]
    assert states[0].keys() == states[1].keys() and "value.weight" in states[0]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    own, theirs = (dict(n.named_buffers()) for n in (twin.network, other))
    assert own and all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_compiler_forgets_before_it_would_refuse_a_shape(monkeypatch, adapted):
    """Whether the step is shared, or the network's own."""
    resets, model = [], llama()
    if adapted:
        lora.attach(model, 2, 0)
    monkeypatch.setattr(static, "_compiled", {})
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(len(static._shapes)))
    monkeypatch.setattr(static, "_shapes", set())
    steps = static.compiled_steps(Network(model))
    resets.clear()
    for rows in range(1, static.SHAPES + 2):
        for length in (4, 5):  # which is no shape of the compiler's
            steps.slate(rows, length, 10, 1)
    assert resets == [static.SHAPES] and len(static._shapes) == 1
    assert [slate.index.numel() for slate in steps.slates.values()] == [rows] * 2  # nor graphs


def test_slates_are_not_kept_for_ever(model):
    """Of a decoder that is not compiled either: each holds keys and values."""
    steps = StaticDecoder(Network(model)).steps
    for rows in range(1, static.SHAPES + 2):
        steps.slate(rows, 4, 10, 1)
    assert list(steps.slates) == [(rows, 4, 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_sampled_with(dtype):
    model = llama()
    lora.attach(model, 2, 0, dtype)
    network = Network(model, dtype=dtype)
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    given = inputs(PROMPTS, numbers(8))
    found = StaticDecoder(network).sample(*given)
    assert_scored(network, given[:2], found)
    without = StaticDecoder(lora.Base(network)).sample(*given)
    assert not torch.equal(found.completions, without.completions)


def test_a_scorer_decodes_as_it_is_told(model):
    given = (*padded(PROMPTS, PAD, "left"), numbers(8))
    network = Network(model)
    ways = {way: Scorer(network, (EOS,), PAD, decoder=way) for way in (None, "growing", "static")}
    assert ways[None].decoder == "growing"  # of a CPU
    grown, *others = (scorer.sample(*given) for scorer in ways.values())
    for other in others:
        assert_same(grown, other)


class Graph(TorchDispatchMode):
    """A CUDA graph as a CPU can have one: the operations on tensors that some work started, to be
    started again on the same tensors. What Python did meanwhile is not done again, and reading a
    number is refused, as it is (with other things) while a GPU is captured."""

    def __init__(self, work, device):
        super().__init__()
        self.calls, self.replays = [], 0
        slate = vars(work.args[0])
        kept = [x for x in (*slate.values(), *vars(slate["trace"]).values(),
                            *chain(*(vars(layer).values() for layer in slate["cache"].layers)))
                if isinstance(x, torch.Tensor)]  # fmt: skip
        before = [x.clone() for x in kept]
        with self:
            work()
        for x, was in zip(kept, before, strict=True):  # a GPU does nothing while it is captured
            x.copy_(was)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        made = {}
        self.replays += 1

        def now(x):
            return made.get(id(x), x) if isinstance(x, torch.Tensor) else x

        for func, args, kwargs, then in self.calls:
            out = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_leaves(then), tree_leaves(out), strict=True):
                if isinstance(old, torch.Tensor):
                    made[id(old)] = new


@pytest.mark.parametrize(("dtype", "value_head"), [("float32", True), ("bfloat16", False)])
def test_a_token_can_be_captured_as_a_graph(model, monkeypatch, dtype, value_head):
    """And the graph writes what the step does, for other prompts, numbers, ends and weights."""
    monkeypatch.setattr(static, "captured", Graph)
    network = Network(copy.deepcopy(model), 1.5, value_head, dtype)
    plain, graphed = StaticDecoder(network, longest=6), StaticDecoder(network, longest=6)
    graphed.steps.captures = True
    for i, prompts in enumerate((PROMPTS, PROMPTS[::-1], [[9, 8, 7, 6, 5, 4]] * 4)):
        given = inputs(prompts, numbers(8, seed=i), eos=(EOS, 31 + i))
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.02 * torch.randn_like(p))
        assert_same(plain.sample(*given), graphed.sample(*given))
    assert only_slate(graphed).graph.replays > 3 * static.LOOK


@pytest.mark.parametrize("has", [True, False])
def test_a_captured_graph_alone_keeps_its_scratch_space(monkeypatch, has):
    """What products on its stream would keep of it is let go, also where the capture fails."""
    seen = []

    @contextmanager
    def noted(*args, **kwargs):
        seen.append("begin")
        try:
            yield
        finally:
            seen.append("end")

    def failing():
        raise RuntimeError("refused")

    for name, stand_in in (("CUDAGraph", object), ("Stream", object), ("graph", noted),
                           ("device", lambda _: nullcontext())):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    name, let_go = "_cuda_clearCublasWorkspaces", ["let go"] * has
    if has:
        monkeypatch.setattr(torch._C, name, lambda: seen.append("let go"), raising=False)
    else:
        monkeypatch.delattr(torch._C, name, raising=False)
    static.captured(lambda: seen.append("work"), torch.device("cuda"))
    assert seen == [*let_go, "begin", "work", "end", *let_go]
    seen.clear()
    with pytest.raises(RuntimeError, match="refused"):
        static.captured(failing, torch.device("cuda"))
    assert seen == [*let_go, "begin", "end", *let_go]


def cpu(samples):
    parts = (samples.completions, samples.mask, samples.logp, samples.values, samples.scale)
    return decode.Samples(*(x if x is None else x.cpu() for x in parts))


@pytest.mark.slow
@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.skipif(
        shutil.which("g++") is None, reason="the compiler of a CPU needs g++")),
    pytest.param("cuda", marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="there is no GPU here")),
])  # fmt: skip
def test_a_compiled_step_writes_the_same_tokens_and_is_not_compiled_again(model, device):
    """Not for other prompts, values or weights, nor for another network of the architecture."""
    halved = {"dtype": half_of(device), "checkpointing": True}
    for made, options in ((model, {}), (llama(), halved)):
        network = Network(copy.deepcopy(made).to(device), **options)
        decoder = StaticDecoder(network, compiled=True)
        given, others = (
            [x if isinstance(x, int) else x.to(device) for x in inputs(prompts, numbers(8, seed=i))]
            for i, prompts in enumerate((PROMPTS, PROMPTS[::-1]))
        )
        first = decoder.sample(*given)
        assert (only_slate(decoder).graph is not None) == (device == "cuda")
        assert_scored(network, given[:2], first)
        if network.dtype == "float32":
            assert_same(cpu(decode.sample(network, *given)), cpu(first))
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
            next(network.parameters()).mul_(1.1)
            again = decoder.sample(*others)
        assert_scored(network, others[:2], again)
        other = Network(copy.deepcopy(made).to(device), **options)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
            for p in other.parameters():
                p.mul_(0.9)
            found = StaticDecoder(other, compiled=True).sample(*others)
        assert_scored(other, others[:2], found)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
            assert_same(cpu(again), cpu(decoder.sample(*others)))
