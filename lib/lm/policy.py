"""A language model as the `Policy` of `lib.finetune`: optimiser, micro-batches and dtype."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from sysconfig import get_paths

import numpy as np
import torch
from torch import Tensor
from torch.utils._triton import has_triton
from transformers import PreTrainedModel

from lib.finetune import exact_div
from lib.lm import parallel
from lib.lm.decode import Samples, sample
from lib.lm.network import Network
from lib.lm.outputs import Outputs
from lib.lm.static import StaticDecoder, compilable, why_not_compiled, why_not_fixed
from lib.methods import Hyper, Method
from lib.rollouts import Rollout, sent

# Log-probabilities recomputed by the full pass against those of the cached decoder, as a share of
# the largest logit: float32 rounding, and that of bfloat16 (8 bits of mantissa) and float16 (11).
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
# What the mean over tokens may be of that in 16 bits, where one token may be off by half a nat: a
# wrong position, mask or temperature shows here. (Measured for the tiny policy: 0.01.)
MEAN_SHARE = 1 / 8
# float16 has no numbers below 6e-8, where many gradients are: the loss is multiplied by this before
# the backward pass and the gradient divided after it (Micikevicius et al. 2018).
LOSS_SCALE = 2.0**16
# Tokens that pass through the network at once: rows times the longest row. Prompts and responses
# are padded apart: there may be up to twice as many. On a CPU a small bucket pads less
# and keeps activations in the cache (an update of the tiny policy: 0.5 s at 1,024, 0.8 s at 8,192).
TOKEN_BUDGET = {"cpu": 1024, "cuda": 8192}
# The same for a model that is `large` on a CPU: each bucket reads its weights and writes their
# gradients once more (a step of width 512: 12.4 s at 1,024, 12.2 s at this; in bfloat16 8.0 s and
# 7.7 s, and no less above).
LARGE_BUDGET = 2048
# What an update could take from its sampling (`lib.lm.outputs`) is computed anew where so many
# updates, or a multiple, came before it: only there does a mistake in positions or mask show
# (`lib.finetune.check_identities`).
ANEW = 10
# Prompts are read once for several completions where that spares this share of the tokens. What a
# second pass costs of its own is regained from about there on (tiny policy).
SPARED = 1 / 16


def token_budget(device: torch.device) -> int:
    return TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cuda"])


def _budget(network: Network) -> int:
    return LARGE_BUDGET if network.large else token_budget(network.device)


def has_dtype(device: torch.device, dtype: str) -> bool:
    """Whether the device multiplies in `dtype` itself: a GPU before Ampere emulates bfloat16."""
    if device.type != "cuda" or dtype != "bfloat16":
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def compiles(network: Network) -> bool:
    """Whether the one-token step can be compiled: a GPU that has its dtype, a model whose step is
    the same at every token, and what compiles it."""
    if network.device.type != "cuda" or not has_dtype(network.device, network.dtype):
        return False
    return compilable(network.model) and _has_compiler()


@cache
def _has_compiler() -> bool:
    """Triton, and what it calls: a C compiler and Python's headers. Says once what is missing."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    found = {"Triton": has_triton(), "a C compiler": any(map(shutil.which, names)),
             "Python's headers": Path(get_paths()["include"], "Python.h").is_file()}  # fmt: skip
    missing = " and ".join(name for name, here in found.items() if not here)
    if missing:
        warnings.warn(f"without {missing} here, completions are drawn by the slower decoder "
                      "'growing'", stacklevel=2)  # fmt: skip
    return not missing


def _check(model: PreTrainedModel, decoder: str | None) -> None:
    """Raises: ValueError for a decoder that would fail with the model, or draw other tokens."""
    why = why_not_fixed(model) if decoder in ("static", "compiled") else None
    if decoder == "compiled":
        why = why or why_not_compiled(model)
    if why is not None:
        raise ValueError(f"{type(model).__name__} {why}: decoder must be 'growing', "
                         f"not '{decoder}'")  # fmt: skip


class Scorer:
    """A frozen language model that samples and scores.

    Args:
        network: the model in two halves.
        eos: ids that end a completion. pad: id that stands where nothing counts (masks are never
            derived from it, so it may be an EOS).
        budget: tokens that pass through the network at once; None for those of the device and of
            the model's size.
        decoder: "growing" (`lib.lm.decode`), "static" or "compiled" (`lib.lm.static`); None for
            "compiled" where that works (`compiles`), else "growing".
        longest: tokens of the longest prompt that will be sampled for, 0 if it is not known.
    Raises: ValueError for "static" or "compiled" and a model for which it does not work.
    """

    def __init__(
        self,
        network: Network,
        eos: tuple[int, ...],
        pad: int,
        budget: int | None = None,
        decoder: str | None = None,
        longest: int = 0,
    ):
        _check(network.model, decoder)
        self.network, self.pad, self.longest = network, pad, longest
        self.budget = budget or _budget(network)
        self.decoder = decoder or ("compiled" if compiles(network) else "growing")
        self.eos = torch.tensor(eos, device=network.device)

    def sample(self, prompts: Tensor, prompt_mask: Tensor, uniforms: Tensor) -> Samples:
        """C completions of every prompt. prompts (P, *) padded on the left; uniforms (P C, L).

        Completions of a prompt stand together.
        Raises: ValueError if C is no whole number, or for prompts that are padded on the right.
        """
        _check_left(prompt_mask)
        count = exact_div(len(uniforms), len(prompts), "completions of the prompts")
        own = parallel.mine(torch.arange(len(prompts), device=prompts.device))
        rows = (own[:, None] * count + torch.arange(count, device=own.device)).flatten()
        inputs = (prompts[own], prompt_mask[own], uniforms[rows], self.eos, self.pad)
        if self.decoder == "growing":
            with self.network.autocast():  # one context: weights are cast once, not at every token
                part = sample(self.network, *inputs, self._outputs_due())
        else:
            part = self._static.sample(*inputs)
        return part.placed(rows, len(uniforms))

    def _outputs_due(self) -> Outputs | None:
        """Where the decoder "growing" keeps outputs of what it samples now, None for nowhere."""
        return None

    @cached_property
    def _static(self) -> StaticDecoder:
        return StaticDecoder(self.network, self.decoder == "compiled", self.longest)

    @torch.no_grad()
    def score(self, batch: Rollout) -> Tensor:
        """log pi(y_t | x, y_<t) of a rollout's completions: (P, C, L) nats, 0 off the mask.

        Raises: ValueError for prompts that are padded on the right.
        """
        rows = Rows.of_rollout(batch)
        _check_left(rows.prompt_mask)
        out = torch.zeros(rows.mask.shape, device=rows.mask.device)
        network = self.network
        with network.packed(self.budget):
            for index in rows.buckets(self.budget):
                part = rows.pick(index)
                hidden, targets, at = part.states(network)
                out[rows.there(index)[at[0]], at[1]] = network.logp(hidden, targets)
        return parallel.total(out).view(batch.mask.shape)

    @torch.no_grad()
    def divergences(self, batch: Rollout, other: Scorer) -> tuple[Tensor, Tensor]:
        """KL(self || other) and own entropy per token along completions: two of (P, C, L) nats."""
        rows = Rows.of_rollout(batch)
        out = torch.zeros(2, *rows.completions.shape, device=self.network.device)
        for index in rows.buckets(self.budget):
            part = rows.pick(index)
            hidden, _, at = part.states(self.network)
            others, _, _ = part.states(other.network)
            found = self.network.divergences(hidden, other.network, others)
            out[:, rows.there(index)[at[0]], at[1]] = torch.stack(found)
        kl, spread = parallel.total(out).view(2, *batch.mask.shape)
        return kl, spread


class Rows:
    """Completions and their prompts: a row is a prompt padded on the left, then a completion.

    What has which length is known to the host, so that it need not wait for the device to say so.
    Args: prompts, prompt_mask: (Q, *), True on the last prompt_sizes (Q,) tokens. of: (S,), the
        prompt of each row. completions, mask: (S, L), True on the first sizes (S,) tokens.
    """

    def __init__(
        self, prompts: Tensor, prompt_mask: Tensor, prompt_sizes: np.ndarray, of: np.ndarray,
        completions: Tensor, mask: Tensor, sizes: np.ndarray,
    ):  # fmt: skip
        self.prompts, self.prompt_mask, self.prompt_sizes = prompts, prompt_mask, prompt_sizes
        self.of, self.completions, self.mask, self.sizes = of, completions, mask, sizes

    @classmethod
    def of_rollout(cls, batch: Rollout) -> Rows:
        host, (groups, count) = batch.host or _sizes(batch), batch.mask.shape[:2]
        return cls(batch.prompts, batch.prompt_mask, host["prompt"],
                   np.arange(groups).repeat(count), batch.completions.flatten(0, 1),
                   batch.mask.flatten(0, 1), host["completion"].flatten())  # fmt: skip

    def there(self, indices: np.ndarray) -> Tensor:
        """Indices where the rows are."""
        return sent(indices, self.mask.device)

    def buckets(self, budget: int) -> list[np.ndarray]:
        """This process's row indices by falling length, cut so that rows times the longest row
        are at most `budget` (padding: `TOKEN_BUDGET`)."""
        lengths = self.prompt_sizes[self.of] + self.sizes
        order = parallel.mine(_falling(lengths))
        return _cut(order, lengths[order], budget)

    def pick(self, index: np.ndarray) -> Rows:
        """Some rows and their prompts, without the columns that are padding in all of them."""
        kept, of = np.unique(self.of[index], return_inverse=True)
        prompt_sizes, sizes = self.prompt_sizes[kept], self.sizes[index]
        first, last = self.prompts.shape[1] - prompt_sizes.max(), max(1, sizes.max())
        kept, index = self.there(kept), self.there(index)
        return Rows(self.prompts[kept, first:], self.prompt_mask[kept, first:], prompt_sizes, of,
                    self.completions[index, :last], self.mask[index, :last], sizes)  # fmt: skip

    def whole(self) -> tuple[Tensor, Tensor]:
        """Tokens of prompt and completion, and their mask, both (S, *)."""
        of = self.there(self.of)
        return (torch.cat([self.prompts[of], self.completions], 1),
                torch.cat([self.prompt_mask[of], self.mask], 1))  # fmt: skip

    def states(
        self, network: Network, continued: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Hidden states before every token that counts (N, d), those tokens (N,), and where they
        stand: (row, position), each (N,).

        Args: continued: read each prompt once even where that spares little.
        """
        if continued or (network.continues and self._spared() >= SPARED):
            hidden = network.continued(self.prompts, self.prompt_mask, self.there(self.of),
                                       self.completions, self.mask)  # fmt: skip
        else:
            tokens, mask = self.whole()
            start = self.prompts.shape[1]
            hidden = network.hidden(tokens[:, :-1], mask[:, :-1])[:, start - 1 :]
        row = np.arange(len(self.sizes)).repeat(self.sizes)
        position = np.arange(len(row)) - (self.sizes.cumsum() - self.sizes)[row]
        at = self.there(row), self.there(position)
        return hidden[at], self.completions[at], at

    def _spared(self) -> float:
        """Share of the tokens that need not be read if each prompt is read once."""
        (prompts, width), (rows, length) = self.prompts.shape, self.completions.shape
        return (rows - prompts) * width / (rows * (width + length))


def _check_left(prompt_mask: Tensor) -> None:
    if not prompt_mask[:, -1].all():
        raise ValueError("prompts must be padded on the left: of some the last token is padding")


def _sizes(batch: Rollout) -> dict[str, np.ndarray]:
    """How many tokens count of each prompt (P,) and completion (P, C); the device is asked."""
    masks = {"prompt": batch.prompt_mask, "completion": batch.mask}
    return {name: mask.sum(-1).cpu().numpy() for name, mask in masks.items()}


def _falling(lengths: np.ndarray) -> np.ndarray:
    """Indices by falling length; equal ones keep their order, so that all processes agree."""
    return np.argsort(-lengths, kind="stable")


def _cut(order: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """`order` in pieces of n rows, each with n * its first (longest) length <= budget, or n = 1."""
    pieces, start = [], 0
    while start < len(lengths):
        step = max(1, budget // max(1, lengths[start]))
        pieces.append(order[start : start + step])
        start += step
    return pieces


class CausalPolicy(Scorer):
    """A language model that trains: the `Policy` of `lib.finetune`.

    Args:
        rate: learning rate of Adam (no weight decay, constant).
        clip_norm: the gradient is scaled down to this Euclidean norm, as TRL's trainers do.
    """

    breaks: frozenset[str] = frozenset()

    def __init__(
        self,
        network: Network,
        eos: tuple[int, ...],
        pad: int,
        rate: float,
        clip_norm: float = 1.0,
        budget: int | None = None,
        decoder: str | None = None,
        longest: int = 0,
    ):
        super().__init__(network, eos, pad, budget, decoder, longest)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=rate, fused=True)
        self.clip_norm = clip_norm
        self.alive = torch.tensor(True, device=network.device)
        self.loss_scale: Tensor | None = None
        if network.dtype == "float16":
            self.loss_scale = torch.tensor(LOSS_SCALE, device=network.device)
        self.tolerance = TOLERANCE[network.dtype]
        self.fresh = False  # whether nothing was learned since the last sampling
        self.outputs = network.outputs()

    def frozen(self) -> CausalPolicy:
        """Itself: an iteration's completions are drawn before its first update, and not again."""
        self.fresh = True
        self.outputs.clear()
        return self

    def _outputs_due(self) -> Outputs | None:
        """For the first update on a sampling, which is on what is drawn first. Of several processes
        none samples the rows that it learns from."""
        first = self.fresh and not self.outputs.recorded
        if not (first and self.outputs.layers) or parallel.place()[1] > 1:
            return None
        updates = max((int(x["step"]) for x in self.optimiser.state.values()), default=0)
        return self.outputs if updates % ANEW else None

    def planned(self, data: Rollout, method: Method) -> Rollout:
        """With the numbers of tokens, and which completions can carry loss: what the host cuts
        micro-batches by. The device is asked here, once a sampling, and in one process by no
        update but the first in 16 bits (`_check_mean`)."""
        return replace(data, host=_sizes(data) | {"active": method.active(data).cpu().numpy()})

    def update(
        self, batch: Rollout, method: Method, hyper: Hyper, items: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One Adam step (see `lib.finetune.Policy`), in micro-batches of whole prompt groups.

        Completions that carry no loss (`method.active`) do not pass through the network; their
        log-probabilities are returned as those of the sampling. A step whose gradient is not
        finite is not taken, and no later one; in float16 later ones are, with half the loss scale,
        as long as that is above 1.
        Raises: AssertionError if in 16 bits the first after a sampling finds other
            log-probabilities than it drew with, on average (see `ANEW`).
        """
        self.optimiser.zero_grad()
        if not batch.host:
            batch = self.planned(batch, method)
        seen = method.active(batch).any(-1)
        logp, values = (_without(x, seen) for x in (batch.logp, batch.values))
        outputs = self.outputs.once(batch.prompts, batch.completions.flatten(0, 1))
        with self.network.packed(self.budget, outputs):
            for groups in self._micro_batches(batch):
                part = batch.pick(groups)
                new, predicted = self._forward(part, groups, outputs)
                loss = self._loss(method, part, new, predicted, hyper, items)
                (loss if self.loss_scale is None else loss * self.loss_scale).backward()
                there = sent(groups, logp.device)
                logp[there] = new.detach()
                if values is not None:
                    values[there] = predicted.detach()
        parallel.sum_gradients(self.parameters)
        logp, values = (_gathered(x, seen) for x in (logp, values))
        if self.fresh and self.network.dtype != "float32":
            self._check_mean(batch, method, logp)
        self.fresh = False
        self.outputs.clear()  # the weights are about to change
        norm = self._step()
        item, metrics = method.loss(batch, logp, hyper)
        metrics = {"loss": item.sum() / items, "grad_norm": norm, **metrics}
        if method.critic is not None:
            metrics["value_loss"] = method.critic(batch, values, hyper).sum() / items
        return logp, metrics

    def _check_mean(self, batch: Rollout, method: Method, logp: Tensor) -> None:
        mask = batch.mask & method.active(batch)[..., None]
        off = (logp - batch.logp).abs().where(mask, 0.0).sum() / mask.sum().clamp(min=1)
        if self.alive and off > MEAN_SHARE * self.tolerance * (1 + batch.scale):
            raise AssertionError(f"{method.name}: identity 'recomputed' is off by {off:.3g} nats a "
                                 "token on average")  # fmt: skip

    def _micro_batches(self, batch: Rollout) -> list[np.ndarray]:
        """This process's prompt groups by falling length of their longest active completion, cut
        to the budget."""
        active = batch.host["active"]
        longest = (batch.host["completion"] * active).max(-1) + batch.host["prompt"]
        longest = longest * active.any(-1)
        order = _falling(longest)
        order = parallel.mine(order[longest[order] > 0])
        return _cut(order, longest[order] * active.sum(-1).max(), self.budget)

    def _forward(
        self, batch: Rollout, groups: np.ndarray, outputs: Outputs | None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and values (P, C, L) of active completions; the rest as sampled.

        Args: groups: (P,), which of the sampling's these are, each with an active completion.
            outputs: of that sampling.
        """
        index, count = np.flatnonzero(batch.host["active"]), batch.mask.shape[1]
        rows = Rows.of_rollout(batch).pick(index)
        if outputs is not None:
            drawn = groups[index // count] * count + index % count  # rows of the whole sampling
            outputs.ready(rows.there(groups), rows.prompts.shape[1], rows.there(drawn), rows.mask)
        hidden, targets, at = rows.states(self.network, outputs is not None)
        at = rows.there(index)[at[0]], at[1]
        logp = batch.logp.flatten(0, 1).index_put(at, self.network.logp(hidden, targets))
        if batch.values is None:
            return logp.view_as(batch.logp), None
        values = batch.values.flatten(0, 1).index_put(at, self.network.values(hidden))
        return logp.view_as(batch.logp), values.view_as(batch.logp)

    def _loss(
        self, method: Method, part: Rollout, logp: Tensor, values: Tensor | None, hyper: Hyper,
        items: Tensor,
    ) -> Tensor:  # fmt: skip
        item, _ = method.loss(part, logp, hyper)
        total = item.sum()
        if method.critic is not None:
            total = total + method.critic(part, values, hyper).sum()
        return total / items

    def _step(self) -> Tensor:
        """Clips and applies the gradient; returns its norm before clipping. No host waits here."""
        if self.loss_scale is not None:
            grads = [p.grad for p in self.parameters if p.grad is not None]
            if grads:  # there are none where all pairs are tied
                torch._foreach_div_(grads, self.loss_scale)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        taken = self.alive & norm.isfinite()
        if self.loss_scale is None:
            self.alive = taken
        else:
            self.loss_scale = self.loss_scale.where(taken, self.loss_scale / 2)
            self.alive = self.alive & (self.loss_scale >= 1)
        self.optimiser.found_inf = (~taken).float()  # a fused step is then left out
        self.optimiser.step()
        return norm.detach()

    def state(self) -> dict[str, Tensor]:
        """All that training changes, by name: parameters, moments, whether it is alive."""
        named = self.network.named_parameters()
        tensors = {f"network.{k}": v.detach() for k, v in named if v.requires_grad}
        for i, p in enumerate(self.parameters):
            moments = self.optimiser.state.get(p, {})
            tensors |= {f"optimiser.{i}.{name}": value for name, value in moments.items()}
        tensors["alive"] = self.alive
        return tensors if self.loss_scale is None else tensors | {"loss_scale": self.loss_scale}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.outputs = self.network.outputs()  # what a run has left there need not be finite
        own = dict(self.network.named_parameters())
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "network":
                own[rest].copy_(value)
            elif kind == "optimiser":
                number, _, moment = rest.partition(".")
                parameter = self.parameters[int(number)]
                self.optimiser.state[parameter][moment] = value.to(parameter.device).clone()
        self.alive = tensors["alive"].to(self.network.device)
        if self.loss_scale is not None:
            self.loss_scale = tensors["loss_scale"].to(self.network.device)


def _without(x: Tensor | None, groups: Tensor) -> Tensor | None:
    """A copy of (P, ...) with 0 where `groups` (P,) is True."""
    return None if x is None else x.where(~groups.view(-1, *[1] * (x.dim() - 1)), 0.0)


def _gathered(x: Tensor | None, groups: Tensor) -> Tensor | None:
    """(P, ...), its `groups` from the processes that computed them."""
    if x is None or parallel.place()[1] == 1:
        return x
    return parallel.total(_without(x, ~groups)) + _without(x, groups)
