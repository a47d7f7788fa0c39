"""Outputs of a sampling's linear layers, for the update that follows it.

The first update on a sampling passes the same tokens through the same weights: its linear layers
would give what they gave then, but for rounding. Where that is kept here, the update's forward pass
takes it and does not multiply. Its gradients are computed as ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

KEEP = 2**30  # bytes at most
ALL = slice(None)


class _Pass(NamedTuple):
    """What a layer is given next: the shape of these tokens, and of which completions they are and
    where; None for those of all prompts."""

    shape: tuple[int, ...]
    rows: Tensor | slice
    position: int | None


class _Share(NamedTuple):
    """What a layer takes next: of each of these rows of its place these columns."""

    places: dict[nn.Linear, Tensor]
    rows: Tensor | slice
    columns: slice = ALL


class Outputs:
    """Of linear layers, for P prompts of m tokens and S completions of up to L tokens.

    A layer's are kept if it was called once in every pass, for every token of it: not those of one
    that a model shares between its blocks, or that sees a part of the tokens. Weights must not
    change between a sampling and its update. That takes an output once, and may write to it.
    Args: layers: whose outputs may be kept. dtype: of their products. head: one more layer, called
        after every pass for the last token of each row.
    """

    def __init__(
        self, layers: Iterable[nn.Linear], dtype: torch.dtype, head: nn.Linear | None = None
    ):
        self.layers, self.dtype, self.head = list(layers), dtype, head
        self.prompts: dict[nn.Linear, Tensor] = {}  # (P, m, o); none of the head
        # (S, L - 1, o), of all tokens but the last; of the head (S, L, o). They outlive `clear`,
        # and the next sampling writes to the same place: to be given another takes longer than to
        # write. So what is left of a completion that has ended is anything finite.
        self.completions: dict[nn.Linear, Tensor] = {}
        self._due: dict[bool, list[_Share]] = {}  # by whether it is the head's
        self._taken: Counter[nn.Linear] = Counter()
        self.clear()

    def clear(self) -> None:
        """Forgets the sampling."""
        self._tokens: tuple[Tensor, Tensor] | None = None  # of prompts and completions
        self._kept: set[nn.Linear] = set()
        self.prompts.clear()
        self._calls: Counter[nn.Linear] = Counter()  # -1 once a pass was not as it should be
        self._shape = torch.Size((0, 0))
        self._passes = 0
        self._pass: dict[bool, _Pass] = {}  # the present one, by whether it is the head's

    # --- while it is sampled ----------------------------------------------------------------------

    @contextmanager
    def recording(self, prompts: Tensor, completions: Tensor) -> Iterator[None]:
        """Of a pass through prompts (P, m), and the others that are announced by `at`.

        Where there is no room for all layers, those are kept that multiply most for a number that
        they give. Args: completions: (S, L), filled in meanwhile.
        """
        self.clear()
        self._shape = completions.shape
        self._kept = set(self._worth_most(prompts.numel()))
        for layer, place in list(self.completions.items()):
            if layer not in self._kept or place.shape[:2] != self._places(layer):
                del self.completions[layer]
        self._next(_Pass(prompts.shape, ALL, None), _Pass((len(completions),), ALL, 0))
        try:
            yield
        except BaseException:
            self.clear()
            raise
        self._tokens = prompts.clone(), completions.clone()
        for layer in [x for x in self._kept if self._calls[x] != self._passes]:
            self._kept.remove(layer)
            self.prompts.pop(layer, None)
            self.completions.pop(layer, None)

    def _worth_most(self, prompts: int) -> Iterator[nn.Linear]:
        """Layers by falling number of inputs, whose outputs `KEEP` holds. prompts: their tokens."""
        room = KEEP // self.dtype.itemsize
        layers = self.layers if self.head is None else [*self.layers, self.head]
        for layer in sorted(layers, key=lambda x: x.in_features, reverse=True):
            tokens = self._places(layer).numel() + (0 if layer is self.head else prompts)
            if tokens * layer.out_features <= room:
                room -= tokens * layer.out_features
                yield layer

    def at(self, rows: Tensor, position: int) -> None:
        """The next pass reads this token of these completions."""
        count = len(rows)
        where = ALL if count == self._shape[0] else rows  # to a slice it writes faster
        self._next(_Pass((count, 1), where, position), _Pass((count,), where, position + 1))

    def _next(self, layers: _Pass, head: _Pass) -> None:
        self._passes += 1
        self._pass = {False: layers, True: head}

    def note(self, layer: nn.Linear, out: Tensor) -> None:
        """What a layer gave in this pass."""
        if layer not in self._kept:
            return
        shape, rows, position = self._pass[layer is self.head]
        if out.shape[:-1] != shape or self._calls[layer] != self._passes - 1:
            self._calls[layer] = -1
            return
        self._calls[layer] += 1
        if layer not in self.completions:
            self.completions[layer] = out.new_zeros(*self._places(layer), out.shape[-1])
        if position is None:
            self.prompts[layer] = out.clone()
        else:
            self.completions[layer][rows, position] = out.flatten(0, -2)

    def _places(self, layer: nn.Linear) -> torch.Size:
        """Of how many completions and of how many tokens a layer's outputs are kept."""
        rows, length = self._shape
        return torch.Size((rows, length if layer is self.head else length - 1))

    @property
    def recorded(self) -> bool:
        """Whether a sampling was, to its end."""
        return self._tokens is not None

    # --- when it is learned from ------------------------------------------------------------------

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._kept

    def are_of(self, prompts: Tensor, completions: Tensor) -> bool:
        """Whether anything is kept, and of these tokens: (P, *), whose padding on the left may be
        wider than it was, and (S, L)."""
        if not (self.recorded and self._kept):
            return False
        read, drawn = self._tokens
        return torch.equal(read, prompts[:, -read.shape[1] :]) and torch.equal(drawn, completions)

    def once(self, prompts: Tensor, completions: Tensor) -> Outputs | None:
        """Itself where it `are_of` these, else None. Not a second time, not even where the update
        failed: what was taken may have been written to."""
        if not self.are_of(prompts, completions):
            return None
        self._tokens = None
        return self

    def ready(self, groups: Tensor, width: int, rows: Tensor, mask: Tensor) -> None:
        """What the next two passes take: the last `width` tokens of the prompts at `groups` (q,),
        then all but the last of the completions at `rows` (s,); and the head, for all tokens where
        mask (s, n) of these is True."""
        row, position = mask.nonzero(as_tuple=True)
        drawn = {x: self.completions[x].flatten(0, 1) for x in self._kept if x is self.head}
        self._due = {
            False: [_Share(self.prompts, _run(groups), slice(-width, None)),
                    _Share(self.completions, _run(rows), slice(mask.shape[1] - 1))],
            True: [_Share(drawn, _run(rows[row] * self._shape[1] + position))],
        }  # fmt: skip
        self._taken.clear()

    def take(self, layer: nn.Linear, shape: torch.Size) -> Tensor | None:
        """What a kept layer gives in its next pass, for tokens of this shape; None if it is not
        known. Where the rows follow each other it stands where it was kept."""
        turn, due = self._taken[layer], self._due[layer is self.head]
        self._taken[layer] += 1
        if turn >= len(due):
            return None
        places, rows, columns = due[turn]
        if isinstance(rows, slice):
            found = places[layer][rows, columns].contiguous()
        else:
            found = places[layer][:, columns].index_select(0, rows)
        return found if found.shape[:-1] == shape else None


def _run(rows: Tensor) -> Tensor | slice:
    """Indices (n,), n > 0, as a slice if they follow each other."""
    first, count = int(rows[0]), len(rows)
    following = torch.equal(rows, torch.arange(first, first + count))
    return slice(first, first + count) if following else rows
