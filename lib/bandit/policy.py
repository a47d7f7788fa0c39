"""A stack of policies: sampling, scoring and training of many bandit runs at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib.bandit.network import (
    GPT_NANO,
    Architecture,
    Decoder,
    Parameters,
    dropout_masks,
    logits,
)
from lib.methods import Hyper, Method
from lib.rollouts import Rollout, invert_cdf, token_logp

# Log-probabilities recomputed by the full pass against those of the cached decoder, in float32,
# as a share of the largest logit.
TOLERANCE = 1e-4


@dataclass
class Samples:
    """Completions of one decoding. completions and logp (R, S, L); scale (R,); distributions
    (R, S, L, V) log-probabilities along the sampled prefixes, or None."""

    completions: Tensor
    logp: Tensor
    scale: Tensor
    distributions: Tensor | None = None


class Scorer:
    """A frozen stack: samples and scores. `parameters` may have one run, shared by `runs`."""

    def __init__(self, parameters: Parameters, runs: int, arch: Architecture, shift: bool = True):
        # A stride-0 view, not a copy: every run then has matrix products of the same shape
        # whether it shares its parameters or not, and the same numbers.
        self.parameters = {k: v.expand(runs, *v.shape[1:]) for k, v in parameters.items()}
        self.arch, self.shift = arch, shift

    @torch.no_grad()
    def sample(self, prompts: Tensor, uniforms: Tensor, *, keep: bool = False) -> Samples:
        """Ancestral sampling at temperature 1, by inverting the CDF at given uniform numbers.

        Args: prompts (R, S); uniforms (R, S, L) in [0, 1); keep: return the distributions too.
        """
        runs, sequences, length = uniforms.shape
        decoder = Decoder(self.parameters, sequences, length, self.arch)
        tokens, logps, kept = [prompts], [], []
        scale = torch.zeros(runs, device=prompts.device)
        for t in range(length):
            raw = decoder.step(tokens[-1])
            scale = torch.maximum(scale, raw.abs().amax((-2, -1)))
            logp = raw.log_softmax(-1)
            tokens.append(invert_cdf(logp.exp(), uniforms[..., t]))
            logps.append(logp.gather(-1, tokens[-1][..., None])[..., 0])
            if keep:
                kept.append(logp)
        distributions = torch.stack(kept, 2) if keep else None
        return Samples(torch.stack(tokens[1:], -1), torch.stack(logps, -1), scale, distributions)

    def score(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """log pi(y_t | x, y_<t). prompts (R, S), completions (R, S, L) -> (R, S, L) nats."""
        tokens = torch.cat([prompts[..., None], completions], -1)
        inputs = tokens[..., :-1] if self.shift else tokens
        return token_logp(self._logits(inputs), tokens, shift=self.shift)

    @torch.no_grad()
    def distributions(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Log-probabilities of every token along given prefixes: (R, S, L, V)."""
        inputs = torch.cat([prompts[..., None], completions[..., :-1]], -1)
        return logits(self.parameters, inputs, self.arch).log_softmax(-1)

    def _logits(self, inputs: Tensor) -> Tensor:
        return logits(self.parameters, inputs, self.arch)


@dataclass(frozen=True)
class Dropout:
    """Dropout of a stack. numbers: (updates so far, shape) -> (R, *shape) uniform numbers."""

    rate: float
    numbers: Callable[[int, tuple[int, ...]], Tensor]

    def masks(self, updates: int, inputs: Tensor, arch: Architecture) -> Tensor:
        """The factors for tokens `inputs` (R, S, L): (R, places, S, L, d)."""
        numbers = self.numbers(updates, arch.dropped(inputs[0].numel())).to(inputs.device)
        return dropout_masks(numbers, self.rate).unflatten(2, inputs.shape[1:])


class StackedAdam:
    """torch.optim.Adam with one learning rate per run, on one flat (R, n) buffer.

    Kingma & Ba 2015, Algorithm 1; defaults of torch.optim.Adam.
    """

    def __init__(self, runs: int, size: int, rates: Tensor, betas=(0.9, 0.999), eps: float = 1e-8):
        self.rates, self.betas, self.eps = rates[:, None], betas, eps
        self.mean = torch.zeros(runs, size, device=rates.device)
        self.square = torch.zeros(runs, size, device=rates.device)
        self.steps = 0

    def step(self, flat: Tensor, gradient: Tensor, alive: Tensor) -> None:
        """Updates `flat` (R, n) in place for the runs that are `alive` (R,)."""
        self.steps += 1
        first, second = self.betas
        gradient = gradient.where(alive[:, None], 0.0)
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        denominator = (self.square / (1 - second**self.steps)).sqrt_().add_(self.eps)
        step = self.rates * alive[:, None] / (1 - first**self.steps)
        flat.sub_(step * self.mean / denominator)


class StackedPolicy(Scorer):
    """A stack that trains: the bandit's `Policy` of `lib.finetune`.

    Args:
        initial: parameters of one run, copied to all.
        rates: (R,) learning rates.
        dropout: in training only; breaks the identities "recomputed" and "first loss".
        shift: False breaks "recomputed" and "reference".
        reference_dropout: score completions under `initial` with dropout, afresh at every update,
            in place of the log-probabilities that a rollout holds; breaks "first loss".
    """

    tolerance = TOLERANCE

    def __init__(
        self,
        initial: Parameters,
        rates: Tensor,
        arch: Architecture = GPT_NANO,
        dropout: Dropout | None = None,
        shift: bool = True,
        reference_dropout: Dropout | None = None,
    ):
        runs, shapes = len(rates), arch.shapes()
        sizes = [shape.numel() for shape in map(torch.Size, shapes.values())]
        self.flat = torch.empty(runs, sum(sizes), device=rates.device)
        views = self.flat.split(sizes, -1)
        parameters = {
            name: view.view(runs, *shape)
            for (name, shape), view in zip(shapes.items(), views, strict=True)
        }
        super().__init__(parameters, runs, arch, shift)
        for name, value in initial.items():
            self.parameters[name].copy_(value.expand_as(self.parameters[name]))
        self.optimiser = StackedAdam(runs, self.flat.shape[1], rates)
        self.alive = torch.ones(runs, dtype=torch.bool, device=rates.device)
        self.dropout, self.reference_dropout = dropout, reference_dropout
        self.initial = {k: v.expand(runs, *v.shape[1:]) for k, v in initial.items()}
        self.breaks = frozenset(
            (["recomputed", "first loss"] if dropout else [])
            + (["first loss"] if reference_dropout else [])
            + ([] if shift else ["recomputed", "reference"])
        )

    def frozen(self) -> Scorer:
        """A copy of the stack as it is now."""
        return Scorer({k: v.clone() for k, v in self.parameters.items()}, len(self.flat),
                      self.arch, self.shift)  # fmt: skip

    def planned(self, data: Rollout, method: Method) -> Rollout:
        """As it is: all shapes are known."""
        return data

    def update(
        self, batch: Rollout, method: Method, hyper: Hyper, items: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One Adam step of every run that is finite (see `lib.finetune.Policy`).

        A run whose gradient is not finite is frozen as it was before this step, for good. Where it
        is known how many completions of a prompt carry loss, the others do not pass through the
        network; their log-probabilities are returned as those of the sampling.
        """
        if self.reference_dropout and batch.ref is not None:
            with torch.no_grad():
                ref = self._logp_of(self.initial, batch, None, self.reference_dropout)
            batch = replace(batch, ref=ref.view_as(batch.ref))
        leaves = {k: v.detach().requires_grad_() for k, v in self.parameters.items()}
        rows = carrying(batch, method, hyper)
        logp = self._logp_of(leaves, batch, rows, self.dropout)
        if rows is not None:
            logp = batch.logp.flatten(1, 2).scatter(1, rows[..., None].expand_as(logp), logp)
        logp = logp.view_as(batch.logp)
        item, metrics = method.loss(batch, logp, hyper)
        loss = item.flatten(1).sum(-1) / items
        grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
        gradient = torch.cat([g.flatten(1) for g in grads], -1)
        # in float64: squares of a large but finite gradient overflow float32
        norm = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float64).float()
        self.alive &= norm.isfinite() & loss.detach().isfinite()
        self.optimiser.step(self.flat, gradient, self.alive)
        return logp.detach(), {"loss": loss.detach(), "grad_norm": norm, **metrics}

    def _logp_of(
        self, parameters: Parameters, batch: Rollout, rows: Tensor | None, dropout: Dropout | None
    ) -> Tensor:
        """Log-probabilities of the completions at `rows` (R, n), or of all: (R, n, L) nats."""
        prompts, completions = flat_groups(batch)
        tokens = torch.cat([prompts[..., None], completions], -1)
        masks = None
        if dropout is not None:
            inputs = tokens[..., :-1] if self.shift else tokens
            masks = dropout.masks(self.optimiser.steps, inputs, self.arch)
        if rows is not None:
            tokens = tokens.take_along_dim(rows[..., None], 1)
            if masks is not None:  # drawn for all, so that they do not depend on who is trained on
                masks = masks.take_along_dim(rows[:, None, :, None, None], 2)
        inputs = tokens[..., :-1] if self.shift else tokens
        masks = None if masks is None else masks.flatten(2, 3)
        return token_logp(logits(parameters, inputs, self.arch, masks), tokens, shift=self.shift)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training changes, as tensors."""
        adam = self.optimiser
        return {"flat": self.flat, "mean": adam.mean, "square": adam.square,
                "steps": torch.tensor(adam.steps), "alive": self.alive}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        adam = self.optimiser
        self.flat.copy_(state["flat"])
        adam.mean.copy_(state["mean"])
        adam.square.copy_(state["square"])
        adam.steps = int(state["steps"])
        self.alive.copy_(state["alive"])


def carrying(batch: Rollout, method: Method, hyper: Hyper) -> Tensor | None:
    """Flat indices (R, n) of the `Method.carriers` of all prompts, in order; None for all."""
    if (count := method.carriers(hyper)) is None:
        return None
    first = method.active(batch).flatten(1).byte().argsort(dim=-1, descending=True, stable=True)
    return first[:, : batch.rewards.shape[1] * count]


def flat_groups(batch: Rollout) -> tuple[Tensor, Tensor]:
    """Prompts (R, P) and completions (R, P, C, L) as sequences (R, P C) and (R, P C, L)."""
    runs, groups, count, length = batch.completions.shape
    prompts = batch.prompts[..., None].expand(runs, groups, count)
    return prompts.reshape(runs, -1), batch.completions.reshape(runs, -1, length)
