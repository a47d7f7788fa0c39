"""Tokens that many prompts begin with, such as a chat template's system message, read once."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from lib.lm.network import Network


def shared_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """The longest beginning that all prompts share and that leaves each of them a token."""
    return os.path.commonprefix([prompt[:-1] for prompt in prompts])


class Prefixed(Network):
    """A network that has read `prefix` before every row; all weights are shared with it.

    For scoring: it has no value head, keeps no cache of its callers', and gradients do not pass
    through it.
    """

    def __init__(self, network: Network, prefix: Sequence[int]):
        nn.Module.__init__(self)
        self.model, self.value = network.model, None
        self.temperature, self.dtype = network.temperature, network.dtype
        self.packs = network.packs
        self.checkpointing = self.continues = False
        tokens = torch.tensor([list(prefix)], dtype=torch.long, device=network.device)
        self.read, self.start = len(prefix), DynamicCache(config=network.model.config)
        if self.read:
            with torch.no_grad():
                super().hidden(tokens, torch.ones_like(tokens, dtype=torch.bool), self.start)

    @torch.no_grad()
    def hidden(
        self, tokens: Tensor, mask: Tensor, cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `Network.hidden`, with tokens and mask (S, n) of what follows the prefix.

        Raises: ValueError for a cache or positions of the caller's.
        """
        if cache is not None or positions is not None:
            raise ValueError("a prefixed network scores whole rows: no cache, no positions")
        if not self.read:
            return super().hidden(tokens, mask)
        cache = copy.deepcopy(self.start)  # a pass adds its own tokens
        cache.batch_repeat_interleave(len(tokens))
        return super().hidden(tokens, nn.functional.pad(mask, (self.read, 0), value=True), cache)
