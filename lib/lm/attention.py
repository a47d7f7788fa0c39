"""Attention of a model that is `large` on a CPU (`lib.lm.packed`), by batched products.

PyTorch's own, which never holds the scores of all keys, pays where there are many. For a single
query it reads the cache at a third of the memory's speed; in bfloat16 it takes four times as long
as the products do to pass a gradient back. Rounding differs, the arithmetic does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from lib.lm.cache import WholeLayer

SDPA = "sdpa"  # transformers' name of PyTorch's attention
# What models tell it that changes nothing where masks are given
UNREAD = {"is_causal", "position_ids", "use_cache", "sliding_window"}
MOST = 2**22  # scores of one layer, which are held until gradients have passed


@contextmanager
def one_query(cache: DynamicCache) -> Iterator[None]:
    """By products for a single query to the `WholeLayer`s of a cache, as usual for others."""
    whole = any(isinstance(x, WholeLayer) for x in cache.layers)
    with _instead(_attend_once, cache) if whole else nullcontext():
        yield


@contextmanager
def many_queries(dtype: torch.dtype) -> Iterator[None]:
    """By products in a dtype of 16 bits, where the scores of one layer are `MOST` at most: they
    round as those of `one_query`, so that scoring finds what sampling did. In float32, where
    products gain little, as usual."""
    with _instead(_attend, dtype) if dtype != torch.float32 else nullcontext():
        yield


@contextmanager
def masks_unread(device: torch.device) -> Iterator[None]:
    """On a GPU masks are built and passed on whatever they say. transformers would read whether one
    can be spared, and the host wait until the device has caught up."""
    if device.type == "cpu":
        yield
        return
    usual = AttentionMaskInterface()[SDPA]
    AttentionMaskInterface.register(
        SDPA, lambda *given, **more: usual(*given, **more | {"allow_is_causal_skip": False})
    )
    try:
        yield
    finally:
        AttentionMaskInterface.register(SDPA, usual)


@contextmanager
def _instead(attend: Callable[..., tuple[Tensor, None]], given: Any) -> Iterator[None]:
    """Attention by `attend`, which is given this and what attends as usual.

    It goes by the name of PyTorch's attention meanwhile, and not by one of its own: by that name
    some models of transformers choose how to mask.
    """
    usual = AttentionInterface()[SDPA]
    AttentionInterface.register(SDPA, partial(attend, given, usual))
    try:
        yield
    finally:
        AttentionInterface.register(SDPA, usual)


def _attend_once(
    cache: DynamicCache, usual: Callable, module: nn.Module, query: Tensor, key: Tensor,
    value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """(S, heads, 1, w) of queries -> (S, 1, heads, w). `usual` for all that is not that simple."""
    held = _held(cache, key, value)
    if query.shape[2] != 1 or held is None or dropout or _asked(more):
        return usual(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                     **more)  # fmt: skip
    # A product with the unused places of the cache costs less than one with gaps between rows
    return _products(query, *held, attention_mask, scaling, key.shape[2]), None


def _attend(
    dtype: torch.dtype, usual: Callable, module: nn.Module, query: Tensor, key: Tensor,
    value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """(S, heads, n, w) of queries -> (S, n, heads, w). `usual` for all that is not that simple, or
    whose products are in another dtype: of another model."""
    of = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    n, used = query.shape[2], key.shape[2]
    many = query.shape[:3].numel() * used > MOST
    mask = attention_mask
    if of == dtype and not (many or dropout or _asked(more)):
        if mask is None and n == used and _causal(module, more):
            mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
        if mask is not None:
            return _products(query, key.to(dtype), value.to(dtype), mask, scaling, used), None
    return usual(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                 **more)  # fmt: skip


def _causal(module: nn.Module, more: dict[str, Any]) -> bool:
    """Whether a query sees the keys up to its own where no mask says it, as transformers asks."""
    told = more.get("is_causal")
    return getattr(module, "is_causal", True) if told is None else told


def _asked(more: dict[str, Any]) -> bool:
    """Whether a model tells more than is looked at here."""
    return any(x is not None for name, x in more.items() if name not in UNREAD)


def _held(cache: DynamicCache, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
    """All that the layer holds that returned key and value, None if there is no such layer."""
    layers = (x for x in cache.layers if isinstance(x, WholeLayer))
    return next((x.held for x in layers if x.keys is key and x.values is value), None)


def _products(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None,
    used: int,
) -> Tensor:  # fmt: skip
    """Queries (S, heads, n, w) to `used` of the keys and values (S, groups, places, w), in the
    dtype of these; mask (S, *, n, used). -> (S, n, heads, w)."""
    (rows, heads, n, width), (groups, places) = query.shape, keys.shape[1:3]
    query = query.to(keys.dtype).reshape(rows * groups, heads // groups * n, width)
    scores = torch.bmm(query, keys.flatten(0, 1).transpose(1, 2)).float()
    scores *= width**-0.5 if scaling is None else scaling
    scores = _masked(scores.view(rows, heads, n, places), used, mask)
    share = scores.softmax(-1).to(values.dtype).view(rows * groups, heads // groups * n, places)
    out = torch.bmm(share, values.flatten(0, 1)).view(rows, heads, n, -1)
    return out.transpose(1, 2).contiguous()


def _masked(scores: Tensor, used: int, mask: Tensor | None) -> Tensor:
    """Scores (S, heads, n, places), in place: of `used` places those that mask (S, *, n, used)
    admits, which is bool or is added. Padding, which admits none, attends to all alike."""
    never = torch.finfo(scores.dtype).min
    scores[..., used:] = never
    part = scores[..., :used]
    if mask is not None and mask.dtype == torch.bool:
        part.masked_fill_(~mask, never)
    elif mask is not None:
        part += mask
    return scores
