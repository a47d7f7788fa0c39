"""Sampling completions with cached keys and values, from numbers that were drawn ahead.

One uniform number for every (completion, position), inverted through the CDF: what is sampled then
does not depend on batching, on the number of processes, or on how often a run was killed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from lib.lm import parallel
from lib.lm.cache import growing_cache
from lib.lm.network import Network
from lib.rollouts import invert_cdf

LOOK = 8  # steps between two looks at who has finished: a look makes a GPU wait for the host
DROP = 0.25  # share of finished rows that makes it worth to leave them out


@dataclass(frozen=True)
class Samples:
    """Completions (S, L), ids; mask (S, L), True up to EOS or the cap; logp (S, L) nats; values
    (S, L) or None; scale (), the largest logit. Zero (pad) where the mask is False."""

    completions: Tensor
    mask: Tensor
    logp: Tensor
    values: Tensor | None
    scale: Tensor

    def placed(self, rows: Tensor, count: int) -> Samples:
        """These as the `rows` (n,) of `count`, the others from the other processes."""
        parts = (self.completions, self.mask, self.logp, self.values)
        whole = (None if x is None else parallel.placed(x, rows, count) for x in parts)
        return Samples(*whole, parallel.largest(self.scale))


@torch.no_grad()
def sample(
    network: Network,
    prompts: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    eos: Tensor,
    pad: int,
    static: bool = False,
) -> Samples:
    """Ancestral sampling until EOS or `L` tokens; EOS counts as a token, a capped row has none.

    A prompt is read once, and its keys and values copied to its completions.
    Args:
        prompts, prompt_mask: (P, *), padded on the left.
        uniforms: (S, L) in [0, 1), S a multiple of P: completions of a prompt stand together.
        eos: (k,) ids that end a completion.
        static: a cache of fixed shape, for a compiled decoder; else one that grows, and finished
            rows are left out.
    """
    rows, length = uniforms.shape
    trace = _Trace(network, rows, length, pad)
    if rows == 0:
        return trace.samples()
    count = rows // len(prompts)
    if static:  # the fixed shape is that of the completions
        prompts, prompt_mask, count = *_repeated(count, prompts, prompt_mask), 1
    active = torch.ones(rows, dtype=torch.bool, device=prompts.device)
    index = torch.arange(rows, device=prompts.device)
    cache = _cache(network, prompts.shape[1] + length, static)
    state = network.hidden(prompts, prompt_mask, cache)[:, -1]
    mask, state = _repeated(count, prompt_mask, state)
    if count > 1:
        cache.batch_repeat_interleave(count)
    for t in range(length):
        tokens = trace.draw(t, index, active, state, uniforms)
        active = active & ~torch.isin(tokens, eos)
        if t % LOOK == LOOK - 1:
            if not active.any():
                break
            if not static and active.float().mean() < 1 - DROP:
                keep = active.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                index, tokens, mask, active = (x[keep] for x in (index, tokens, mask, active))
        if t + 1 < length:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            state = network.hidden(tokens[:, None], mask, cache)[:, 0]
    return trace.samples()


def _repeated(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if count == 1 else x.repeat_interleave(count, 0) for x in tensors)


def _cache(network: Network, length: int, static: bool) -> DynamicCache | StaticCache:
    config = network.model.config
    if static:
        return StaticCache(config=config, max_cache_len=length)
    return growing_cache(config)


class _Trace:
    """What has been sampled so far."""

    def __init__(self, network: Network, rows: int, length: int, pad: int):
        options = {"device": network.device}
        self.network = network
        self.completions = torch.full((rows, length), pad, **options)
        self.mask = torch.zeros(rows, length, dtype=torch.bool, **options)
        self.logp = torch.zeros(rows, length, **options)
        self.values = torch.zeros(rows, length, **options) if network.value else None
        self.scale = torch.zeros((), **options)

    def draw(
        self, t: int, index: Tensor, active: Tensor, state: Tensor, uniforms: Tensor
    ) -> Tensor:
        """Draws token t of the rows `index`; notes it for those that are active."""
        raw = self.network.logits(state)
        self.scale = torch.maximum(self.scale, raw.abs().amax())
        logp = raw.log_softmax(-1)
        tokens = invert_cdf(logp.exp(), uniforms[index, t])
        drawn = logp.gather(-1, tokens[:, None])[:, 0]
        self.completions[index, t] = torch.where(active, tokens, self.completions[index, t])
        self.logp[index, t] = drawn.where(active, 0.0)
        self.mask[index, t] = active
        if self.values is not None:
            self.values[index, t] = self.network.values(state).where(active, 0.0)
        return tokens

    def samples(self) -> Samples:
        return Samples(self.completions, self.mask, self.logp, self.values, self.scale)
