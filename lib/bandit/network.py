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


def _normalised(x: Tensor, gain: Tensor, bias: Tensor, weight: Tensor, offset: Tensor | None):
    """Layer norm then linear, with the norm's gain and bias folded into the linear layer.

    The fold touches 48 x n numbers a run instead of every token. x (R, N, d) -> (R, N, n).
    """
    x = F.layer_norm(x, x.shape[-1:])
    shift = torch.bmm(bias[:, None], weight)
    shift = shift if offset is None else shift + offset[:, None]
    return torch.baddbmm(shift, x, gain[..., None] * weight)


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


def _mlp(p: Parameters, i: int, x: Tensor, drop) -> Tensor:
    up = _normalised(
        x, p[f"{i}.ln2.gain"], p[f"{i}.ln2.bias"], p[f"{i}.up.weight"], p[f"{i}.up.bias"]
    )
    return x + drop(torch.baddbmm(p[f"{i}.down.bias"][:, None], F.gelu(up), p[f"{i}.down.weight"]))


def _qkv(p: Parameters, i: int, x: Tensor) -> Tensor:
    return _normalised(
        x, p[f"{i}.ln1.gain"], p[f"{i}.ln1.bias"], p[f"{i}.qkv.weight"], p[f"{i}.qkv.bias"]
    )


def _out(p: Parameters, i: int, mixed: Tensor) -> Tensor:
    return torch.baddbmm(p[f"{i}.out.bias"][:, None], mixed, p[f"{i}.out.weight"])


def _head(p: Parameters, x: Tensor) -> Tensor:
    return _normalised(x, p["lnf.gain"], p["lnf.bias"], p["head.weight"], None)


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

    x = drop(_embed(p, tokens, 0).reshape(runs, sequences * length, arch.width))
    for i in range(arch.layers):
        x = x + drop(_out(p, i, _attention(_qkv(p, i, x), arch.heads, length)))
        x = _mlp(p, i, x, drop)
    return _head(p, x).view(runs, sequences, length, arch.vocabulary)


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
        self.p, self.arch, self.position = p, arch, 0
        self.cache = p["token"].new_empty(arch.layers, 2, length, *shape)
        self.now = p["token"].new_zeros(3, *shape)  # this position's queries, keys and values

    def step(self, tokens: Tensor) -> Tensor:
        """tokens (R, S) at the next position -> logits (R, S, V)."""
        t, p, sequences = self.position, self.p, tokens.shape[1]
        x = _embed(p, tokens[..., None], t)[:, :, 0]
        for i in range(self.arch.layers):
            self._spread(_qkv(p, i, x))
            self.cache[i, :, t] = self.now[1:]
            keys, values = self.cache[i, :, : t + 1]
            scores = (self.now[0] * keys).sum(1) * self.now.shape[1] ** -0.5
            mixed = (scores.softmax(0)[:, None] * values).sum(0)
            x = x + _out(p, i, self._gathered(mixed, sequences))
            x = _mlp(p, i, x, lambda y: y)
        self.position += 1
        return _head(p, x)

    def _spread(self, qkv: Tensor) -> None:
        """(R, S, 3 d) into `now` (3, size, R, lanes)."""
        parts = qkv.unflatten(-1, (3, self.arch.heads, -1)).permute(2, 4, 0, 3, 1)
        self.now[..., : self.lanes].unflatten(-1, (self.arch.heads, -1)).copy_(parts)

    def _gathered(self, mixed: Tensor, sequences: int) -> Tensor:
        """(size, R, lanes) -> (R, S, d)."""
        parts = mixed[..., : self.lanes].unflatten(-1, (self.arch.heads, sequences))
        return parts.permute(1, 3, 2, 0).flatten(2)
