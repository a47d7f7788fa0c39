"""Keys and values of the tokens so far, for decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 32  # positions added when there is no room left


class RoomyLayer(DynamicLayer):
    """A layer that writes new tokens into spare room, where its parent copies all tokens before
    them at every step. Keys and values are (S, heads, tokens, width) views of what is held."""

    held: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.held is None or end > self.held[0].shape[-2]:
            old = (self.keys, self.values) if start else None
            self.held = tuple(self._room(x, len(x), end) for x in (key_states, value_states))
            if old is not None:
                self._write(old, 0, start)
        self._write((key_states, value_states), start, end)
        self.keys, self.values = (x[:, :, :end] for x in self.held)
        return self.keys, self.values

    def _room(self, like: Tensor, rows: int, tokens: int) -> Tensor:
        """(rows, heads, tokens + ROOM, width), with nothing written."""
        _, heads, _, width = like.shape
        return like.new_empty(rows, heads, tokens + ROOM, width)

    def _write(self, new: tuple[Tensor, Tensor], start: int, end: int) -> None:
        for held, part in zip(self.held, new, strict=True):
            held[:, :, start:end] = part

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.held = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.held = None


class WholeLayer(RoomyLayer):
    """A layer whose whole allocation, `held`, can be multiplied by: spare room is zeros.

    It is in `dtype`, that of the products: rotary positions leave keys in float32, and attention
    would cast them at every step.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.products = dtype

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        keys, values = (x.to(self.products) for x in (key_states, value_states))
        return super().update(keys, values, *args, **kwargs)

    def _room(self, like: Tensor, rows: int, tokens: int) -> Tensor:
        room = super()._room(like, rows, tokens)
        room[:, :, tokens:] = 0
        return room

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Straight to where there is room, so that the next token does not copy them once more."""
        old, tokens = (self.keys, self.values), self.get_seq_length()
        self.held = tuple(self._room(x, len(x) * repeats, tokens) for x in old)
        for held, x in zip(self.held, old, strict=True):
            held.unflatten(0, (-1, repeats))[:, :, :, :tokens] = x[:, None]
        self.keys, self.values = (x[:, :, :tokens] for x in self.held)


def growing_cache(config: PreTrainedConfig, whole: torch.dtype | None = None) -> DynamicCache:
    """A cache for any architecture of transformers; layers with a window of their own keep it.

    Args: whole: dtype of `WholeLayer`s, None for plain ones.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_roomy(whole) if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def _roomy(whole: torch.dtype | None) -> RoomyLayer:
    return RoomyLayer() if whole is None else WholeLayer(whole)
