"""Decoding with a cache of fixed shape: what a compiler, and a CUDA graph, can take.

Every step has the same shapes and the same tensors: all rows, one token, all places of the cache.
On a GPU it is compiled, and captured with the draw of its token as a CUDA graph, so that the host
starts one thing a token. Finished rows go on and are not noted. The host waits for the device once
in `LOOK` tokens, to see whether all have finished.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from lib.lm.decode import LOOK, Drawn, Samples, Trace, draw, drawn_from, repeated
from lib.lm.network import LINEAR, Network

PLACES = 64  # a cache has a multiple of it: a compiled step serves prompts of similar length
KEPT = 2  # compiled steps of a process at once: of policies with and without a value head
SHAPES = 6  # rows by places, of all together; PyTorch's compiler stops at 8 variants of a function


def compilable(model: PreTrainedModel) -> bool:
    """Whether the step of one token can be compiled, and is the same at every token."""
    return why_not_fixed(model) is None and why_not_compiled(model) is None


def why_not_fixed(model: PreTrainedModel) -> str | None:
    """What keeps a model from a cache of fixed shape, to follow its name; None if nothing does."""
    # transformers' word on the class, under a private name: without it nothing is promised. GPT-Neo
    # cuts its mask by the number of keys, and from a fixed cache would draw other tokens
    if not getattr(model, "_can_compile_fullgraph", False):
        return "is not known to attend rightly to a cache of fixed shape"
    try:
        StaticCache(model.config, max_cache_len=1)
    except Exception as error:  # AttributeError, KeyError, ValueError: each architecture its own
        return f"has no cache of fixed shape in transformers ({type(error).__name__}: {error})"
    return None


def why_not_compiled(model: PreTrainedModel) -> str | None:
    """The same for the compiled step, of a model that has such a cache."""
    # a layer with a window counts its tokens in Python: each count would be compiled
    if any(type(x) is not StaticLayer for x in StaticCache(model.config, max_cache_len=1).layers):
        return "has layers with a window or a state of their own"
    # the matrices of experts are one tensor. How many tokens each of them gets is read by the host,
    # which a graph's capture refuses, and a `Twin` would leave them in float32
    if any(p.dim() == 3 for p in model.parameters()):
        return "has a mixture of experts"
    # "dynamic", or that of each type of layer
    if any("dynamic" in str(getattr(m, "rope_type", "")) for m in model.modules()):
        return "has rotary frequencies that depend on the length"
    return None


class FixedCache(StaticCache):
    """Keys and values of one dtype, that of the products. Rotary positions leave keys in float32,
    and attention would cast them back at every step."""

    def __init__(self, config: PreTrainedConfig, places: int, dtype: torch.dtype):
        super().__init__(config, max_cache_len=places)
        self.dtype, self.places = dtype, places

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        cast = (x.to(self.dtype) for x in (key_states, value_states))
        return super().update(*cast, *args, **kwargs)


class Slate:
    """What one sampling after the other writes on: tensors that stay where they are, since a CUDA
    graph knows them by their address.

    Args: length: tokens of a completion. places: of the cache. ends: ids that end a completion.
    """

    def __init__(self, network: Network, rows: int, length: int, places: int, ends: int):
        whole = partial(torch.zeros, dtype=torch.long, device=network.device)
        self.cache = FixedCache(network.model.config, places, getattr(torch, network.dtype))
        self.trace = Trace(network, rows, length, pad=0)
        self.mask = whole(rows, places).bool()
        self.uniforms = whole(rows, length).float()
        self.tokens, self.positions = whole(rows), whole(rows)
        self.active = whole(rows).bool()
        self.at = whole(1)  # which token of the completions `tokens` is
        self.index = torch.arange(rows, device=network.device)
        self.eos = whole(ends)
        self.graph: torch.cuda.CUDAGraph | None = None  # of the next token

    def begin(self, prompt_mask: Tensor, uniforms: Tensor, eos: Tensor, pad: int) -> None:
        """Ready for new prompts, (S, *) with the padding on the left."""
        self.cache.reset()
        self.trace.clear(pad)
        # every place after the prompt is allowed; that it is not read before it is written is
        # what the causal mask sees to
        self.mask.fill_(True)[:, : prompt_mask.shape[1]] = prompt_mask
        self.positions.copy_(prompt_mask.sum(-1))
        self.uniforms.copy_(uniforms)
        self.eos.copy_(eos)
        self.active.fill_(True)
        self.at.zero_()

    def put(self, drawn: Drawn) -> None:
        """Notes a token of each row that has not ended."""
        self.trace.note(self.at, self.index, self.active, drawn)
        self.tokens.copy_(drawn.tokens)
        self.active.logical_and_((drawn.tokens[:, None] != self.eos).all(-1))


class Steps:
    """The step of one token as it is reused: a twin of the network, and slates by their shape."""

    def __init__(self, twin: Twin, compiled: bool):
        self.twin, self.compiled, self.step = twin, compiled, step
        self.captures = compiled and twin.network.device.type == "cuda"
        self.slates: dict[tuple[int, int, int], Slate] = {}  # with the longest cache so far
        if compiled:
            self.step = torch.compile(step, fullgraph=True, dynamic=False)
            _made.add(self)

    def slate(self, rows: int, length: int, tokens: int, ends: int) -> Slate:
        """One with room for `tokens` of prompt and completion: that in use, or a longer one in its
        place."""
        shape = rows, length, ends
        slate = self.slates.get(shape)
        if slate is None or slate.cache.places < tokens:
            self.slates.pop(shape, None)  # before its successor is made
            if len(self.slates) >= SHAPES:
                self.slates.clear()
            places = -(-tokens // PLACES) * PLACES
            if self.compiled:
                _note_shape(id(self), rows, places)
            slate = self.slates[shape] = Slate(self.twin.network, rows, length, places, ends)
        return slate

    def advance(self, slate: Slate) -> None:
        """Reads the last token of every row, and puts the next one; nothing waits for the host."""
        raw, values = self.step(
            self.twin.network, slate.tokens, slate.positions, slate.mask, slate.cache
        )
        slate.positions.add_(1)
        slate.at.add_(1)
        slate.put(drawn_from(raw, values, slate.uniforms.index_select(1, slate.at)[:, 0]))

    def next(self, slate: Slate) -> None:
        """`advance`, on a GPU from its second time on a slate as a graph. A graph knows nothing of
        Python: what it reads must change in place, as weights do."""
        if slate.graph is not None:
            slate.graph.replay()
            return
        self.advance(slate)  # a graph can take what has run once, and is compiled
        if self.captures:
            slate.graph = captured(partial(self.advance, slate), slate.tokens.device)


def captured(work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """What `work` starts on a GPU, to be started again at once. It is not done now. Threads that
    have nothing to do with it may go on."""
    graph = torch.cuda.CUDAGraph()
    with (torch.cuda.device(device), _scratch_of_its_own(),
          torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"),
          ):  # fmt: skip
        work()
    return graph


@contextmanager
def _scratch_of_its_own() -> Iterator[None]:
    """Products ask once a stream for scratch space, and PyTorch keeps it for good. Kept from a
    capture, it would hold the graph's memory after the graph is gone; kept from before, it could
    not be let go while the graph writes there. PyTorch's own graphs let go of it at both ends too
    (`torch._inductor.cudagraph_trees`), by a private function that a release may lack."""
    let_go = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    let_go()
    try:
        yield
    finally:
        let_go()


_compiled: dict[tuple, Steps] = {}  # that networks of an architecture share
_made: WeakSet[Steps] = WeakSet()  # those, and those that networks have to themselves
_shapes: set[tuple[int, int, int]] = set()  # that the compiler has seen: of which steps, and what


def compiled_steps(network: Network) -> Steps:
    """The compiled step of a network's architecture: runs of a process use the same one, on the
    weights that each has, so that they do not all wait for the compiler. Where weights are frozen
    (LoRA) it is the network's own: they would have to be held twice."""
    own = not all(p.requires_grad for p in network.parameters())
    key = architecture(network)
    if own or (key not in _compiled and len(_compiled) >= KEPT):
        _compiled.clear()
        _forget()  # they would count as variants of what is compiled next
    if own:
        return Steps(Twin(network), compiled=True)
    if key not in _compiled:
        _compiled[key] = Steps(Twin(network, alone=True), compiled=True)
    return _compiled[key]


def _note_shape(*shape: int) -> None:
    """Forgets what was compiled where the compiler would refuse one more shape."""
    if shape not in _shapes and len(_shapes) >= SHAPES:
        _forget()
    _shapes.add(shape)


def _forget() -> None:
    """What was compiled, and before it the graphs that were made of it."""
    for steps in _made:
        steps.slates.clear()
    torch.compiler.reset()
    _shapes.clear()


def architecture(network: Network) -> tuple:
    """All that a compiled step depends on but for the values of weights and buffers."""
    named = chain(network.named_parameters(), network.named_buffers())
    tensors = ((name, x.shape, x.dtype, x.device) for name, x in named)
    config = network.model.config
    return (type(network), config.to_json_string(), config._attn_implementation,
            network.temperature, network.dtype, *tensors)  # fmt: skip


class StaticDecoder:
    """Samples as `lib.lm.decode.sample` does, and the same tokens up to rounding.

    Args:
        compiled: compile the step of one token, on a GPU into a CUDA graph.
        longest: tokens of the longest prompt to come, where it is known: caches have room for it
            from the start. Every length of a cache is compiled for, and the compiler allows few.
    """

    def __init__(self, network: Network, compiled: bool = False, longest: int = 0):
        self.network, self.longest = network, longest
        self.steps = compiled_steps(network) if compiled else Steps(Twin(network), compiled=False)

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, prompt_mask: Tensor, uniforms: Tensor, eos: Tensor, pad: int
    ) -> Samples:
        """See `lib.lm.decode.sample`."""
        (rows, length), steps = uniforms.shape, self.steps
        if rows == 0:
            return Trace(self.network, rows, length, pad).samples()
        network = steps.twin.refreshed(self.network)
        prompts, prompt_mask = repeated(rows // len(prompts), prompts, prompt_mask)
        tokens = max(prompts.shape[1], self.longest) + length
        slate = steps.slate(rows, length, tokens, len(eos))
        slate.begin(prompt_mask, uniforms, eos, pad)
        places = (prompt_mask.long().cumsum(-1) - 1).clamp(min=0)
        state = network.hidden(prompts, slate.mask, slate.cache, places)[:, -1]
        slate.put(draw(network, state, uniforms[:, 0]))
        for t in range(1, length):
            if t % LOOK == 0 and not slate.active.any():
                break
            steps.next(slate)
        return copy.deepcopy(slate.trace.samples())  # the next sampling writes over these


def step(
    network: Network, tokens: Tensor, positions: Tensor, mask: Tensor, cache: FixedCache
) -> tuple[Tensor, Tensor | None]:
    """Reads one token (S,) at its position (S,): the next logits (S, V), and values (S,) or None.

    mask (S, places). Drawing is no part of it: PyTorch 2.11 cannot compile its cumulative sum over
    a vocabulary (pytorch/pytorch issue 180221).
    """
    state = network.hidden(tokens[:, None], mask, cache, positions[:, None])[:, 0]
    return network.logits(state), network.values(state)


class Twin:
    """A network whose matrices are held in the dtype of its products, cast once for a sampling.

    Autocast would cast them at every token in a compiled step. All else is shared with the network;
    where the products are in float32, or the matrices in 16 bits, the network itself is used.
    Args: alone: share nothing, so that it can stand in for any network of the architecture.
    """

    def __init__(self, network: Network, alone: bool = False):
        dtype = getattr(torch, network.dtype)
        self.network, self.casts, self.names = network, [], []
        if dtype == torch.float32 and not alone:
            return
        tensors = chain(network.parameters(), network.buffers())
        self.network = copy.deepcopy(network, {} if alone else {id(x): x for x in tensors})
        for path, layer in self.network.named_modules():
            is_matrix = isinstance(layer, LINEAR) and layer is not self.network.value
            for name, source in list(layer.named_parameters(recurse=False)):
                wanted = dtype if is_matrix else source.dtype
                if alone or source.dtype != wanted:  # of a tied head too: the embedding keeps its
                    cast = nn.Parameter(source.detach().to(wanted), requires_grad=False)
                    setattr(layer, name, cast)
                    self.casts.append(cast)
                    self.names.append(f"{path}.{name}")
        if alone:
            for name, buffer in self.network.named_buffers():
                self.casts.append(buffer)
                self.names.append(name)

    @torch.no_grad()
    def refreshed(self, network: Network) -> Network:
        """The twin with the weights of a network as they are now."""
        if self.casts:
            parts = (network.named_parameters, network.named_buffers)
            known = dict(chain(*(part(remove_duplicate=False) for part in parts)))
            torch._foreach_copy_(self.casts, [known[name] for name in self.names])
        return self.network
