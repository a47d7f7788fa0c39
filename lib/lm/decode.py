"""Sampling completions with cached keys and values, from numbers that were drawn ahead.

One uniform number for every (completion, position), inverted through the CDF: what is sampled then
does not depend on batching, on the number of processes, or on how often a run was killed.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from lib.lm import parallel
from lib.lm.attention import one_query
from lib.lm.cache import growing_cache
from lib.lm.network import Network
from lib.lm.outputs import Outputs
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
    outputs: Outputs | None = None,
) -> Samples:
    """Ancestral sampling until EOS or `L` tokens; EOS counts as a token, a capped row has none.

    A prompt is read once, and its keys and values copied to its completions. The cache grows, and
    finished rows are left out.
    Args:
        prompts, prompt_mask: (P, *), padded on the left.
        uniforms: (S, L) in [0, 1), S a multiple of P: completions of a prompt stand together.
        eos: (k,) ids that end a completion.
        outputs: where those of layers are kept, if their weights are packed.
    """
    rows, length = uniforms.shape
    trace = Trace(network, rows, length, pad)
    if rows == 0:
        return trace.samples()
    recording = nullcontext()
    if outputs is not None:
        recording = outputs.recording(prompts, trace.completions)
    with network.packed(rows, outputs) as dtype, recording:
        cache = growing_cache(network.model.config, dtype)
        with one_query(cache):
            _fill(trace, network, cache, prompts, prompt_mask, uniforms, eos, outputs)
    return trace.samples()


def _fill(
    trace: Trace, network: Network, cache: Cache, prompts: Tensor, prompt_mask: Tensor,
    uniforms: Tensor, eos: Tensor, outputs: Outputs | None,
) -> None:  # fmt: skip
    """Samples as `sample` says, with an empty cache; announces its passes to `outputs`."""
    rows, length = uniforms.shape
    count = rows // len(prompts)
    active = torch.ones(rows, dtype=torch.bool, device=prompts.device)
    index = torch.arange(rows, device=prompts.device)
    state = network.hidden(prompts, prompt_mask, cache)[:, -1]
    mask, state = repeated(count, prompt_mask, state)
    if count > 1:
        cache.batch_repeat_interleave(count)
    for t in range(length):
        drawn = draw(network, state, uniforms[index, t])
        trace.note(t, index, active, drawn)
        tokens = drawn.tokens
        active = active & ~torch.isin(tokens, eos)
        if t % LOOK == LOOK - 1:
            if not active.any():
                break
            if active.float().mean() < 1 - DROP:
                keep = active.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                index, tokens, mask, active = (x[keep] for x in (index, tokens, mask, active))
        if t + 1 < length:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if outputs is not None:
                outputs.at(index, t)
            state = network.hidden(tokens[:, None], mask, cache)[:, 0]


def repeated(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Every row `count` times, the copies together."""
    return tuple(x if count == 1 else x.repeat_interleave(count, 0) for x in tensors)


class Drawn(NamedTuple):
    """One token of each row: tokens (n,), logp (n,) nats, values (n,) or None; scale (n,), the
    largest logit."""

    tokens: Tensor
    logp: Tensor
    values: Tensor | None
    scale: Tensor


def draw(network: Network, state: Tensor, uniforms: Tensor) -> Drawn:
    """The next tokens from the states before them, (n, d) and (n,)."""
    return drawn_from(network.logits(state), network.values(state), uniforms)


def drawn_from(raw: Tensor, values: Tensor | None, uniforms: Tensor) -> Drawn:
    """The next tokens from their logits (n, V), and what else is noted of them."""
    logp = raw.log_softmax(-1)
    tokens = invert_cdf(logp.exp(), uniforms)
    return Drawn(tokens, logp.gather(-1, tokens[:, None])[:, 0], values, raw.abs().amax(-1))


class Trace:
    """What has been sampled so far."""

    def __init__(self, network: Network, rows: int, length: int, pad: int):
        options = {"device": network.device}
        self.completions = torch.empty(rows, length, dtype=torch.long, **options)
        self.mask = torch.empty(rows, length, dtype=torch.bool, **options)
        self.logp = torch.empty(rows, length, **options)
        self.values = torch.empty(rows, length, **options) if network.value else None
        self.scale = torch.empty((), **options)
        self.clear(pad)

    def clear(self, pad: int) -> None:
        """Nothing has been sampled."""
        self.completions.fill_(pad)
        for x in (self.mask, self.logp, self.values, self.scale):
            if x is not None:
                x.zero_()

    def note(self, t: int | Tensor, index: Tensor, active: Tensor, drawn: Drawn) -> None:
        """Keeps token t, a number or (1,), of those rows of `index` that are active."""
        torch.maximum(self.scale, drawn.scale.where(active, 0.0).amax(), out=self.scale)
        kept = self.completions[index, t]
        self.completions[index, t] = torch.where(active, drawn.tokens, kept)
        self.logp[index, t] = drawn.logp.where(active, 0.0)
        self.mask[index, t] = active
        if self.values is not None:
            self.values[index, t] = drawn.values.where(active, 0.0)

    def samples(self) -> Samples:
        return Samples(self.completions, self.mask, self.logp, self.values, self.scale)
