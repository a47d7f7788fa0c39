"""A policy that is a table and a problem that keeps notes: what tests run Algorithm 1 on."""

from __future__ import annotations

import torch

from lib.rollouts import Rollout

TOKENS, LENGTH = 4, 2


class TabularPolicy:
    """Each run draws tokens independently from the softmax of its row; trained by plain SGD."""

    breaks: frozenset[str] = frozenset()
    tolerance = 1e-5

    def __init__(self, runs: int = 2, rate: float = 0.1, error: float = 0.0):
        self.table = torch.linspace(-0.5, 0.5, TOKENS).repeat(runs, 1)
        self.alive = torch.ones(runs, dtype=torch.bool)
        self.rate, self.error = rate, error  # error: added to every recomputed log-probability
        self.seen: list[list[int]] = []  # the prompts of each update
        self.items: list[list[float]] = []
        self.plans = 0

    def frozen(self) -> TabularPolicy:
        copy = TabularPolicy(len(self.table))
        copy.table = self.table.clone()
        return copy

    def score(self, completions: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """(R, P, C, L) tokens to their log-probabilities."""
        logp = (self.table if table is None else table).log_softmax(-1)
        return logp.gather(1, completions.flatten(1)).view(completions.shape)

    def expected(self, values: torch.Tensor) -> torch.Tensor:
        """(R,) mean value of a token."""
        return self.table.softmax(-1) @ values

    def planned(self, data, method):
        self.plans += 1
        return data

    def update(self, batch, method, hyper, items):
        self.seen.append(batch.prompts[0].tolist())
        self.items.append(items.tolist())
        leaf = self.table.clone().requires_grad_()
        logp = self.score(batch.completions, leaf) + self.error
        item, metrics = method.loss(batch, logp, hyper)
        loss = item.flatten(1).sum(-1) / items
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        self.alive &= gradient.isfinite().all(-1) & loss.detach().isfinite()
        self.table -= self.rate * gradient.where(self.alive[:, None], 0.0)
        return logp.detach(), {"loss": loss.detach(), **metrics}


class TabularProblem:
    """Prompts are numbered 100 i + group, so that an update can tell which data it saw."""

    def __init__(self, groups: int, completions: int = 4, drift: float = 0.0):
        self.groups, self.completions = groups, completions
        self.values = torch.arange(TOKENS) / (TOKENS - 1)
        self.behaviours: list[torch.Tensor] = []  # the sampling policy's table at each collection
        self.drift = drift  # added to the reference's log-probabilities

    def collect(self, state, method) -> Rollout:
        behaviour = state.behaviour.table
        self.behaviours.append(behaviour.clone())
        generator = torch.Generator().manual_seed(state.iteration)
        runs = len(behaviour)
        shape = (runs, self.groups, self.completions, LENGTH)
        completions = torch.multinomial(
            behaviour.softmax(-1), shape[1] * shape[2] * LENGTH, True, generator=generator
        ).view(shape)
        prompts = 100 * state.iteration + torch.arange(self.groups)
        return Rollout(
            prompts=prompts.repeat(runs, 1),
            completions=completions,
            mask=torch.ones(shape, dtype=torch.bool),
            logp=state.behaviour.score(completions),
            ref=state.reference.score(completions) + self.drift,
            rewards=self.values[completions].mean(-1),
            scale=behaviour.abs().amax(-1),
            lead=1,
        )
