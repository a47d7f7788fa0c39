"""Outputs of a sampling's linear layers, for the update that follows it.

The first update on a sampling passes the same tokens through the same weights: its linear layers
would give what they gave then, but for rounding. Where that is kept here, the update's forward pass
takes it and does not multiply. Its gradients are computed as ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

KEEP = 2**30  # bytes at most


class Outputs:
    """Of linear layers, for P prompts of m tokens and S completions of up to L tokens.

    A layer's are kept if it was called once in every pass, for every token of it: not those of one
    that a model shares between its blocks, or that sees a part of the tokens. Weights must not
    change between a sampling and its update.
    Args: layers: whose outputs may be kept. dtype: of their products.
    """

    def __init__(self, layers: Iterable[nn.Linear], dtype: torch.dtype):
        self.layers, self.dtype = list(layers), dtype
        self.prompts: dict[nn.Linear, Tensor] = {}  # (P, m, o)
        # (S, L - 1, o), of all tokens but the last. They outlive `clear`, and the next sampling
        # writes to the same place: to be given another takes longer than to write. So what is left
        # of a completion that has ended is anything finite.
        self.completions: dict[nn.Linear, Tensor] = {}
        self._due: list[tuple[dict[nn.Linear, Tensor], Tensor, slice]] = []
        self._taken: Counter[nn.Linear] = Counter()
        self.clear()

    def clear(self) -> None:
        """Forgets the sampling."""
        self._tokens: tuple[Tensor, Tensor] | None = None  # of prompts and completions
        self.prompts.clear()
        self._chosen: set[nn.Linear] = set()
        self._shape = (0, 0)
        self._calls: Counter[nn.Linear] = Counter()  # -1 once a pass was not as it should be
        self._passes: list[tuple[torch.Size, Tensor | None, int]] = []

    # --- while it is sampled ----------------------------------------------------------------------

    @contextmanager
    def recording(self, prompts: Tensor, completions: Tensor) -> Iterator[None]:
        """Of a pass through prompts (P, m), and the others that are announced by `at`.

        Where there is no room for all layers, those are kept that multiply most for a number that
        they give. Args: completions: (S, L), filled in meanwhile.
        """
        self.clear()
        rows, length = completions.shape
        self._shape = rows, length - 1
        self._passes.append((prompts.shape, None, 0))
        room = KEEP // (self.dtype.itemsize * (prompts.numel() + rows * (length - 1)))
        self._chosen = set(_worth_most(self.layers, room))
        for layer in self.completions.keys() - self._chosen:
            del self.completions[layer]
        try:
            yield
        except BaseException:
            self.clear()
            raise
        self._tokens = prompts.clone(), completions.clone()
        for layer in self._chosen:
            if self._calls[layer] != len(self._passes):
                self.prompts.pop(layer, None)
                self.completions.pop(layer, None)

    def at(self, rows: Tensor, position: int) -> None:
        """The next pass reads this token of these completions."""
        self._passes.append((torch.Size((len(rows), 1)), rows, position))

    def note(self, layer: nn.Linear, out: Tensor) -> None:
        """What a layer gave in this pass."""
        if layer not in self._chosen:
            return
        shape, rows, position = self._passes[-1]
        if out.shape[:-1] != shape or self._calls[layer] != len(self._passes) - 1:
            self._calls[layer] = -1
            return
        self._calls[layer] += 1
        if rows is not None:
            self.completions[layer][rows, position] = out[:, 0]
            return
        self.prompts[layer] = out.clone()
        place = self.completions.get(layer)
        if place is None or place.shape[:2] != self._shape:
            self.completions[layer] = out.new_zeros(*self._shape, out.shape[-1])

    @property
    def recorded(self) -> bool:
        """Whether a sampling was, to its end."""
        return self._tokens is not None

    # --- when it is learned from ------------------------------------------------------------------

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self.prompts

    def are_of(self, prompts: Tensor, completions: Tensor) -> bool:
        """Whether anything is kept, and of these tokens: (P, *), whose padding on the left may be
        wider than it was, and (S, L)."""
        if not (self.recorded and self.prompts):
            return False
        read, drawn = self._tokens
        return torch.equal(read, prompts[:, -read.shape[1] :]) and torch.equal(drawn, completions)

    def ready(self, groups: Tensor, width: int, rows: Tensor, length: int) -> None:
        """What the next two passes take: the last `width` tokens of the prompts at `groups` (q,),
        then the first `length` of the completions at `rows` (s,)."""
        self._due = [(self.prompts, groups, slice(-width, None)),
                     (self.completions, rows, slice(length))]  # fmt: skip
        self._taken.clear()

    def take(self, layer: nn.Linear, shape: torch.Size) -> Tensor | None:
        """What a kept layer gives in its next pass, for tokens of this shape; None if it is not
        known."""
        turn = self._taken[layer]
        self._taken[layer] += 1
        if turn >= len(self._due):
            return None
        store, rows, columns = self._due[turn]
        found = store[layer][:, columns].index_select(0, rows)
        return found if found.shape[:-1] == shape else None


def _worth_most(layers: Iterable[nn.Linear], room: int) -> Iterator[nn.Linear]:
    """Layers by falling number of inputs, which give `room` numbers a token together at most."""
    for layer in sorted(layers, key=lambda x: x.in_features, reverse=True):
        if layer.out_features <= room:
            room -= layer.out_features
            yield layer
