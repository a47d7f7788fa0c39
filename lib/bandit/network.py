"""GPT-nano, many at once: a stack of small transformers with one parameter set per run.

minGPT's "gpt-nano": 3 layers, 3 heads, width 48, vocabulary 100, context 10: 94,992 parameters.
(The paper prints 0.9M; its own configuration has 0.09M.) Every parameter carries a leading run
dimension and every product is a batched matrix product, so that seeds and learning rates of a grid
train together. One difference from minGPT: the exact GELU, not its tanh approximation (the two
differ by less than 5e-4, and the exact one is 3 times as fast here).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = dict[str, Tensor]
LANES = 64  # float32 numbers that a CPU sums at once: four of its widest vectors


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network. `context` counts input tokens: the prompt and all but the last."""

    layers: int = 3
    heads: int = 3
    width: int = 48
    vocabulary: int = 100
    context: int = 10

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one run."""
        d = self.width
        block = {
            "ln1.gain": (d,), "ln1.bias": (d,), "qkv.weight": (d, 3 * d), "qkv.bias": (3 * d,),
            "out.weight": (d, d), "out.bias": (d,), "ln2.gain": (d,), "ln2.bias": (d,),
            "up.weight": (d, 4 * d), "up.bias": (4 * d,),
            "down.weight": (4 * d, d), "down.bias": (d,),
        }  # fmt: skip
        return {
            "token": (self.vocabulary, d),
            "position": (self.context, d),
            **{f"{i}.{k}": v for i in range(self.layers) for k, v in block.items()},
            "lnf.gain": (d,),
            "lnf.bias": (d,),
            "head.weight": (d, self.vocabulary),
        }

    def dropped(self, tokens: int) -> tuple[int, int, int]:
        """Shape of what dropout acts on in one run: embedding, then attention and MLP by layer."""
        return 1 + 2 * self.layers, tokens, self.width

    def initial(self, seed: int) -> Parameters:
        """minGPT's initialisation of one run: N(0, 0.02), residual outputs scaled by depth."""
        generator = torch.Generator().manual_seed(seed)
        parameters = {}
        for name, shape in self.shapes().items():
            if name.endswith("gain"):
                parameters[name] = torch.ones(shape)
            elif name.endswith("bias"):
                parameters[name] = torch.zeros(shape)
            else:
                residual = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / sqrt(2 * self.layers) if residual else 0.02
                parameters[name] = torch.randn(shape, generator=generator) * std
        return parameters


GPT_NANO = Architecture()


def _folded(p: Parameters, norm: str, linear: str) -> tuple[Tensor, Tensor]:
    """The offset (R, 1, n) and weight (R, d, n) of a linear layer after a layer norm, with the
    norm's gain and bias folded in: d x n numbers a run are touched instead of every token."""
    weight, offset = p[f"{linear}.weight"], p.get(f"{linear}.bias")
    shift = torch.bmm(p[f"{norm}.bias"][:, None], weight)
    shift = shift if offset is None else shift + offset[:, None]
    return shift, p[f"{norm}.gain"][..., None] * weight


def _fold(p: Parameters, arch: Architecture) -> dict[str, tuple[Tensor, Tensor]]:
    """All layers that follow a layer norm, folded: once for all positions that are decoded."""
    pairs = [(f"{i}.{norm}", f"{i}.{linear}") for i in range(arch.layers)
             for norm, linear in (("ln1", "qkv"), ("ln2", "up"))]  # fmt: skip
    return {linear: _folded(p, norm, linear) for norm, linear in [*pairs, ("lnf", "head")]}


def _normalised(x: Tensor, layer: tuple[Tensor, Tensor]) -> Tensor:
    """Layer norm, then a layer of `_fold`. x (R, N, d) -> (R, N, n)."""
    shift, weight = layer
    return torch.baddbmm(shift, F.layer_norm(x, x.shape[-1:]), weight)


def _gelu(x: Tensor) -> Tensor:
    """The exact GELU, in place where no gradient has to pass."""
    return F.gelu(x) if x.requires_grad else F.gelu(x, out=x)


def _causal(length: int) -> Tensor:
    """(key, query) mask: 0 where the key is not later than the query, else -inf."""
    return torch.full((length, length), float("-inf")).tril(-1)


def _attention(qkv: Tensor, heads: int, length: int) -> Tensor:
    """Causal self-attention over short sequences. qkv (R, S * L, 3 d) -> (R, S * L, d).

    Scores are kept as (key, query), so that the softmax runs over a dimension that is not the
    last: rows of 9 numbers would leave vector units idle (measured: twice as fast as
    scaled_dot_product_attention, forward and backward).
    """
    runs, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    sequences, size = runs * tokens // length, width // heads
    parts = qkv.reshape(sequences, length, 3 * width).split(size, -1)
    q, k, v = (torch.cat(parts[i * heads : (i + 1) * heads]) for i in range(3))
    mask = _causal(length).to(qkv.device)
    scores = torch.baddbmm(mask, k, q.transpose(1, 2), alpha=size**-0.5)
    mixed = torch.bmm(scores.softmax(1).transpose(1, 2), v)
    return torch.cat(mixed.split(sequences), -1).reshape(runs, tokens, width)


def _embed(p: Parameters, tokens: Tensor, start: int) -> Tensor:
    """tokens (R, S, L) at positions start ... -> (R, S, L, d)."""
    runs, vocabulary, width = p["token"].shape
    offset = torch.arange(runs, device=tokens.device).view(-1, 1, 1) * vocabulary
    flat = F.embedding(tokens + offset, p["token"].reshape(-1, width))
    return flat + p["position"][:, None, start : start + tokens.shape[-1]]


def _out(p: Parameters, i: int, mixed: Tensor) -> Tensor:
    return torch.baddbmm(p[f"{i}.out.bias"][:, None], mixed, p[f"{i}.out.weight"])


def _down(p: Parameters, i: int, up: Tensor) -> Tensor:
    return torch.baddbmm(p[f"{i}.down.bias"][:, None], _gelu(up), p[f"{i}.down.weight"])


def dropout_masks(numbers: Tensor, rate: float) -> Tensor:
    """Factors of dropout from uniform numbers: 0 with chance `rate`, else 1 / (1 - rate)."""
    return (numbers >= rate) / (1 - rate)


def logits(
    p: Parameters, tokens: Tensor, arch: Architecture = GPT_NANO, masks: Tensor | None = None
) -> Tensor:
    """Next-token logits. tokens (R, S, L) -> (R, S, L, V).

    Args: masks: (R, *arch.dropped(S * L)) factors of dropout, for training only.
    """
    runs, sequences, length = tokens.shape
    places = iter(() if masks is None else masks.unbind(1))

    def drop(x: Tensor) -> Tensor:
        return x if masks is None else x * next(places)

    folded = _fold(p, arch)
    x = drop(_embed(p, tokens, 0).reshape(runs, sequences * length, arch.width))
    for i in range(arch.layers):
        qkv = _normalised(x, folded[f"{i}.qkv"])
        x = x + drop(_out(p, i, _attention(qkv, arch.heads, length)))
        x = x + drop(_down(p, i, _normalised(x, folded[f"{i}.up"])))
    return _normalised(x, folded["head"]).view(runs, sequences, length, arch.vocabulary)


class Decoder:
    """Next-token logits one position at a time, with cached keys and values.

    The heads of all sequences lie along the last dimension, which fills vector units. Each run's
    share of it is filled up to a multiple of `LANES`, so that where in a vector a sequence stands,
    and with it the last digit of its sums, does not depend on the other runs.
    Args: p, arch as `logits`; sequences: S, decoded side by side in every run.
    """

    def __init__(self, p: Parameters, sequences: int, length: int, arch: Architecture = GPT_NANO):
        runs, self.lanes = p["token"].shape[0], sequences * arch.heads
        shape = (arch.width // arch.heads, runs, -(-self.lanes // LANES) * LANES)
        self.p, self.folded, self.arch, self.position = p, _fold(p, arch), arch, 0
        self.queries = p["token"].new_zeros(shape)
        self.cache = p["token"].new_empty(arch.layers, 2, length, *shape)  # keys and values
        self.cache[..., self.lanes :] = 0.0

    def step(self, tokens: Tensor) -> Tensor:
        """tokens (R, S) at the next position -> logits (R, S, V)."""
        t, p, sequences = self.position, self.p, tokens.shape[1]
        x = _embed(p, tokens[..., None], t)[:, :, 0]
        for i in range(self.arch.layers):
            self._spread(_normalised(x, self.folded[f"{i}.qkv"]), self.cache[i, :, t])
            keys, values = self.cache[i, :, : t + 1]
            scores = (self.queries * keys).sum(1) * len(self.queries) ** -0.5
            mixed = (scores.softmax(0)[:, None] * values).sum(0)
            x = x + _out(p, i, self._gathered(mixed, sequences))
            x = x + _down(p, i, _normalised(x, self.folded[f"{i}.up"]))
        self.position += 1
        return _normalised(x, self.folded["head"])

    def _spread(self, qkv: Tensor, now: Tensor) -> None:
        """(R, S, 3 d) into `queries` and this position's keys and values, (2, size, R, lanes)."""
        parts = qkv.unflatten(-1, (3, self.arch.heads, -1)).permute(2, 4, 0, 3, 1)
        for part, place in ((parts[0], self.queries), (parts[1:], now)):
            place[..., : self.lanes].unflatten(-1, (self.arch.heads, -1)).copy_(part)

    def _gathered(self, mixed: Tensor, sequences: int) -> Tensor:
        """(size, R, lanes) -> (R, S, d)."""
        parts = mixed[..., : self.lanes].unflatten(-1, (self.arch.heads, sequences))
        return parts.permute(1, 3, 2, 0).flatten(2)
