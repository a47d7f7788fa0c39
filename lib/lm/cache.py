"""Keys and values of the tokens so far, for decoding."""

from __future__ import annotations

from typing import Any

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
            self.held = tuple(_with_room(x, end) for x in (key_states, value_states))
            if old is not None:
                self._write(old, 0, start)
        self._write((key_states, value_states), start, end)
        self.keys, self.values = (x[:, :, :end] for x in self.held)
        return self.keys, self.values

    def _write(self, new: tuple[Tensor, Tensor], start: int, end: int) -> None:
        for held, part in zip(self.held, new, strict=True):
            held[:, :, start:end] = part

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.held = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.held = None


def _with_room(like: Tensor, tokens: int) -> Tensor:
    rows, heads, _, width = like.shape
    return like.new_empty(rows, heads, tokens + ROOM, width)


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache for any architecture of transformers; layers with a window of their own keep it."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache
