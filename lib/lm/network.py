"""A causal language model in two halves, so that the head runs on response tokens only.

The logits of a batch are the largest tensor of a training step (tokens x vocabulary). Taking
hidden states and head apart keeps them to the tokens that count, and in chunks to a fixed budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lib.divergences import categorical_kl, entropy
from lib.lm.attention import masks_unread
from lib.lm.outputs import Outputs
from lib.lm.packed import Chosen, is_packed, large, packed, takes

# Logits held at once (numbers, not bytes): 256 MB in float32.
LOGIT_BUDGET = 2**26
# The same where a CPU reads them from its cache again, and no gradient needs them: 4 MB, but so
# many rows at least that the head need not be read for a few.
NEAR, ROWS = 2**20, 32
# Layers that multiply by a matrix, and that autocast knows; GPT-2 and its kin have the second.
LINEAR = (nn.Linear, Conv1D)


def products(device: torch.device, dtype: str) -> AbstractContextManager:
    """Matrix products in `dtype`. Weights are cast once inside the outermost of such contexts where
    they train, and at every product otherwise."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


class Network(nn.Module):
    """Hidden states, head and, if asked for, a value head of a transformers model.

    Args:
        model: any causal LM of transformers whose logits are its output embedding of the last
            hidden state.
        temperature: logits are divided by it, in sampling and in scoring alike.
        value_head: add a linear head for values, zero at the start.
        dtype: of the matrix products, "float32", "bfloat16" or "float16"; weights are as they come.
        checkpointing: of a layer, keep what went in for the backward pass, and compute the rest
            again (Chen et al. 2016).
        packs: whether products on a CPU may be those of `lib.lm.packed`, which round otherwise.
    Raises: ValueError if the head is not where it should be, for a model with other states than
        keys and values, or for checkpointing if transformers knows no layers of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        temperature: float = 1.0,
        value_head: bool = False,
        dtype: str = "float32",
        checkpointing: bool = False,
        packs: bool = True,
    ):
        super().__init__()
        self.packs = packs
        self.model, self.temperature, self.dtype = model.eval(), temperature, dtype
        self.value: nn.Linear | None = None
        if value_head:
            self.value = nn.Linear(model.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)
            self.value.to(model.device)
        self.checkpointing = checkpointing
        if checkpointing:
            _check_layers(model)
        _check_cache(model)
        self._check_head()
        self.continues = self._continues()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def large(self) -> bool:
        """Whether it packs, and is large enough to gain by it."""
        return self.packs and large(self.model)

    def packed(
        self, rows: int, outputs: Outputs | None = None
    ) -> AbstractContextManager[torch.dtype | None]:
        """`lib.lm.packed.packed`, where it is to be."""
        return packed(self.model, self.dtype, rows, outputs) if self.packs else nullcontext()

    def outputs(self) -> Outputs:
        """A place for those of its present layers; for none if the network does not pack, or could
        not use them in `continued`."""
        modules = self.model.base_model.modules() if self.large and self.continues else ()
        layers = [m for m in modules if type(m) is nn.Linear]
        head = self.model.get_output_embeddings()
        last = head if type(head) is nn.Linear else None
        return Outputs(layers, getattr(torch, self.dtype), last)

    @property
    def vocabulary(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def autocast(self) -> AbstractContextManager:
        return products(self.device, self.dtype)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some architectures scale or cap their logits after the head: not ours to guess."""
        tokens, mask = self._few_tokens()
        with self.autocast():
            whole = self.model(input_ids=tokens).logits.float()
        if not _close(whole, self.logits(self.hidden(tokens, mask)) * self.temperature):
            name = type(self.model).__name__
            raise ValueError(f"{name} does more to its logits than its output embedding does: "
                             "the book's loop cannot take it apart")  # fmt: skip

    def _few_tokens(self) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([[1, 2, 3, 4]], device=self.device) % self.vocabulary
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    @torch.no_grad()
    def _continues(self) -> bool:
        """Whether `continued` can be used, and spares time. Tried and not assumed.

        A layer that is computed again in the backward pass reads no cache; and on a GPU a second
        pass is not measured: that of a small model waits for its kernels' launches.
        """
        if self.checkpointing or self.device.type != "cpu":
            return False
        if {type(x) for x in DynamicCache(config=self.model.config).layers} != {DynamicLayer}:
            return False
        tokens, mask = self._few_tokens()
        (prompt, rest), of = tokens.split(2, 1), torch.zeros(2, dtype=torch.long)
        (prompt_mask, rest_mask) = mask.split(2, 1)
        with self._exactly():
            found = self.continued(prompt, prompt_mask, of, rest[of], rest_mask[of])
            return _close(self.hidden(tokens, mask)[:, 1:-1].expand_as(found), found)

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        """Products in float32, where the weights are: in 16 bits the hidden states of two passes of
        SmolLM2 differ by a fiftieth of the largest, and both by an eighth from the exact ones."""
        dtype = self.dtype
        if all(p.dtype == torch.float32 for p in self.model.parameters()):
            self.dtype = "float32"
        try:
            yield
        finally:
            self.dtype = dtype

    def continued(
        self, prompts: Tensor, prompt_mask: Tensor, of: Tensor, tokens: Tensor, mask: Tensor
    ) -> Tensor:
        """Hidden states before each token of rows (S, n) that follow prompt `of` (S,) of Q, each
        read once. prompts and mask (Q, m), padded on the left. -> (S, n, d).

        Gradients pass through the prompt's keys and values (Wang and Hegde 2024).
        """
        cache = DynamicCache(config=self.model.config)  # `growing_cache` passes no gradient
        with self.autocast():  # one context: weights are cast once
            states = self.hidden(prompts, prompt_mask, cache)[of, -1:]
            if tokens.shape[1] == 1:
                return states
            cache.batch_select_indices(of)
            mask = torch.cat([prompt_mask[of], mask], 1)
            rest = self.hidden(tokens[:, :-1], mask[:, :-1], cache)
        return torch.cat([states, rest], 1)

    def hidden(
        self, tokens: Tensor, mask: Tensor, cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Last hidden states. tokens (S, n); mask (S, m) bool of all m >= n tokens so far, those
        in the cache included; positions (S, n) count the tokens that are not padding, and need not
        be given where m is no more than that. -> (S, n, d)."""
        if positions is None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        unread = masks_unread(self.device) if cache is None else nullcontext()
        with self.autocast(), self._layers_checkpointed(cache), unread:
            out = self.model.base_model(
                input_ids=tokens, attention_mask=mask, position_ids=positions,
                past_key_values=cache, use_cache=cache is not None,
            )  # fmt: skip
        return out.last_hidden_state

    def _layers_checkpointed(self, cache: Cache | None) -> AbstractContextManager:
        """Where gradients are wanted; a layer that reads a cache cannot be computed again."""
        wanted = self.checkpointing and cache is None and torch.is_grad_enabled()
        return _checkpointed(_layers(self.model)) if wanted else nullcontext()

    def logits(self, hidden: Tensor, head: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """(..., d) -> (..., V) float32, at the temperature. head: what `_head` returned, for
        callers with several chunks."""
        raw = self._raw(hidden, head).float()
        return raw if self.temperature == 1 else raw / self.temperature

    def _raw(self, hidden: Tensor, head: tuple[Tensor, Tensor | None] | None) -> Tensor:
        """What the head gives, in the dtype of the products."""
        with self.autocast():
            if head is None:
                return self.model.get_output_embeddings()(hidden)
            return nn.functional.linear(hidden, *head)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the head, cast once to the dtype of the products."""
        head = self.model.get_output_embeddings()
        parts = head.weight, getattr(head, "bias", None)
        if self.dtype == "float32":
            return parts
        return tuple(x if x is None else x.to(getattr(torch, self.dtype)) for x in parts)

    def values(self, hidden: Tensor) -> Tensor | None:
        """(..., d) -> (...) what the value head predicts, or None if there is none."""
        if self.value is None:
            return None
        with torch.autocast(self.device.type, enabled=False):
            return self.value(hidden.float())[..., 0]

    def logp(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of tokens from the states before them. (N, d), (N,) -> (N,) nats."""
        layer = self.model.get_output_embeddings()
        head = None if is_packed(layer) else self._head()
        in_place = self.large

        def part(h: Tensor, t: Tensor) -> Tensor:
            if in_place:
                return Chosen.apply(self._raw(h, head), t, self.temperature)
            return self.logits(h, head).log_softmax(-1).gather(-1, t[:, None])[:, 0]

        near = in_place and head is None and not torch.is_grad_enabled()
        chunk = max(ROWS, NEAR // self.vocabulary) if near else self._chunk
        if takes(layer):  # logits that are held already
            chunk = len(hidden)
        pieces = list(zip(*(x.split(chunk) for x in (hidden, targets)), strict=True))
        if len(pieces) == 1 or not torch.is_grad_enabled():
            return torch.cat([part(*piece) for piece in pieces])
        # a chunk's logits are computed again in the backward pass, and never held together
        again = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(*piece) for piece in pieces])

    @torch.no_grad()
    def divergences(self, hidden: Tensor, other: Network, others: Tensor) -> tuple[Tensor, Tensor]:
        """KL(self || other) of the next token, and own entropy. Both (N, d) -> (N,), (N,) nats."""
        kl, spread, heads = [], [], (self._head(), other._head())
        for mine, theirs in zip(hidden.split(self._chunk), others.split(self._chunk), strict=True):
            logp = self.logits(mine, heads[0]).log_softmax(-1)
            kl.append(categorical_kl(logp, other.logits(theirs, heads[1]).log_softmax(-1)))
            spread.append(entropy(logp))
        return torch.cat(kl), torch.cat(spread)

    @property
    def _chunk(self) -> int:
        return max(1, LOGIT_BUDGET // self.vocabulary)


def _close(whole: Tensor, parts: Tensor) -> bool:
    return torch.allclose(whole, parts, rtol=1e-2, atol=1e-2 * whole.abs().max().item())


def matrices(model: nn.Module) -> list[nn.Linear | Conv1D]:
    """The linear layers whose weight is theirs alone: not a head that is tied to the embedding."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = (m for m in model.modules() if isinstance(m, LINEAR))
    return [m for m in linear if id(m.weight) not in embeddings]


def halve(model: nn.Module, dtype: str) -> None:
    """Keeps frozen matrices in the dtype of their products, which changes no product, since
    autocast would cast them. Embeddings and norms stay as they are."""
    for layer in matrices(model) if dtype != "float32" else ():
        for p in layer.parameters(recurse=False):
            if not p.requires_grad:
                p.data = p.data.to(getattr(torch, dtype))


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _check_layers(model: PreTrainedModel) -> None:
    if not (model.supports_gradient_checkpointing and _layers(model)):
        raise ValueError(f"{type(model).__name__} has no layers that transformers can checkpoint: "
                         "checkpointing must be False")  # fmt: skip


def _check_cache(model: PreTrainedModel) -> None:
    """Completions of a prompt go on from its keys and values, with the padding masked."""
    layers = DynamicCache(config=model.config).layers
    if any(isinstance(x, LinearAttentionCacheLayerMixin) or not isinstance(x, DynamicLayer)
           for x in layers):  # fmt: skip
        raise ValueError(f"{type(model).__name__} has layers with a state of their own (as Mamba, "
                         "or convolutions): the policy must be a model of attention alone")


@contextmanager
def _checkpointed(layers: list[nn.Module]) -> Iterator[None]:
    """Layers of which only what goes in is kept for the backward pass.

    They stay in evaluation mode. transformers' own switch works in training mode alone, in which a
    layer that applies dropout itself, as OPT's do, would apply it.
    """
    for layer in layers:
        layer.forward = partial(_kept_input, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _kept_input(forward: Callable, *arguments: Any, **more: Any) -> Any:
    """Nothing in a pass is random, so no random state is kept with a layer's input."""
    again = partial(forward, **more)
    return checkpoint(again, *arguments, use_reentrant=False, preserve_rng_state=False)
