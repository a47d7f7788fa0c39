"""Products of a sampling, kept for the update that follows it.

The first update on a sampling passes the same tokens through the same weights: its linear layers
would give what they gave then, but for rounding. Here their outputs are kept, and the update's
forward pass multiplies by none of their matrices. Its gradients are computed as ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

KEEP = 2**30  # bytes of outputs at most


class Kept:
    """Outputs of linear layers for P prompts of m tokens and S completions of up to L tokens.

    A layer is kept if it was called once in every pass, for every token of it: one that a model
    shares between its blocks is not, nor one that sees a part of the tokens.
    Args: layers: those that may be kept. dtype: of their products.
    """

    def __init__(self, layers: Iterable[nn.Linear], dtype: torch.dtype):
        self.layers, self.dtype = list(layers), dtype
        self.prompts: dict[nn.Linear, Tensor] = {}  # (P, m, outputs)
        # (S, L, outputs), 0 or what was there before where a completion has ended. The next
        # sampling writes to the same place: to be given another takes longer than to write.
        self.completions: dict[nn.Linear, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets the sampling."""
        self.tokens: Tensor | None = None
        self.prompts.clear()
        self._calls: Counter[nn.Linear] = Counter()  # -1 once a pass was not as it should be
        self._passes: list[tuple[torch.Size, Tensor | None, int]] = []
        self._due: list[tuple[dict[nn.Linear, Tensor], Tensor, slice]] = []
        self._taken: Counter[nn.Linear] = Counter()

    # --- while it is sampled ----------------------------------------------------------------------

    @contextmanager
    def recording(self, prompts: Tensor, completions: Tensor) -> Iterator[None]:
        """Of a pass through prompts (P, m), and the others that are announced by `at`.

        Where there is no room for all layers, those are kept that multiply most for a number that
        they give. Args: completions: (S, L), filled in meanwhile.
        """
        self.clear()
        self._filled = completions
        self._passes.append((prompts.shape, None, 0))
        room = KEEP // (self.dtype.itemsize * (prompts.numel() + completions.numel()))
        hooks = [x.register_forward_hook(self._note) for x in _worth_most(self.layers, room)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.tokens = completions
        for layer, calls in self._calls.items():
            if calls != len(self._passes):
                self.prompts.pop(layer, None)
                self.completions.pop(layer, None)

    def at(self, rows: Tensor, position: int) -> None:
        """The next pass reads this token of these completions."""
        self._passes.append((torch.Size((len(rows), 1)), rows, position))

    def _note(self, layer: nn.Linear, _: Any, out: Tensor) -> None:
        shape, rows, position = self._passes[-1]
        if out.shape[:-1] != shape or self._calls[layer] != len(self._passes) - 1:
            self._calls[layer] = -1
            return
        self._calls[layer] += 1
        if rows is None:
            self.prompts[layer] = out.clone()
            room = self.completions.get(layer)
            if room is None or room.shape[:2] != self._filled.shape:
                self.completions[layer] = out.new_zeros(*self._filled.shape, out.shape[-1])
        else:
            self.completions[layer][rows, position] = out[:, 0]

    # --- when it is learned from ------------------------------------------------------------------

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self.prompts

    def holds(self, tokens: Tensor) -> bool:
        """Whether anything is kept, and these are the completions (S, L)."""
        return bool(self.prompts) and torch.equal(self.tokens, tokens)

    def ready(self, prompts: Tensor, width: int, rows: Tensor, length: int) -> None:
        """What the next two passes find: the last `width` tokens of `prompts` (q,), then the first
        `length` of the completions `rows` (s,)."""
        self._due = [(self.prompts, prompts, slice(-width, None)),
                     (self.completions, rows, slice(length))]  # fmt: skip
        self._taken.clear()

    def take(self, layer: nn.Linear) -> Tensor | None:
        """The output of a layer's next pass, None if it is not known."""
        turn = self._taken[layer]
        self._taken[layer] += 1
        if layer not in self or turn >= len(self._due):
            return None
        store, rows, columns = self._due[turn]
        return store[layer][:, columns].index_select(0, rows)


def _worth_most(layers: Iterable[nn.Linear], room: int) -> Iterator[nn.Linear]:
    """Layers by falling number of inputs, that give `room` numbers a token at most."""
    for layer in sorted(layers, key=lambda x: x.in_features, reverse=True):
        if layer.out_features <= room:
            room -= layer.out_features
            yield layer
