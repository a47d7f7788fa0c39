"""Algorithm 1 of the paper, once: the only training loop of the book. Chapter: methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lib.advantages import Moments
from lib.controllers import AdaptiveKL
from lib.methods import Hyper, Method
from lib.rollouts import Rollout, sequence_logp


def exact_div(value: int, by: int, what: str) -> int:
    """value / by; raises ValueError that names `what` if there is a remainder."""
    if by < 1 or value % by:
        raise ValueError(f"{what}: {value} is not a multiple of {by}")
    return value // by


@dataclass(frozen=True)
class Schedule:
    """The counts of Algorithm 1. B and M count completions, C completions of one prompt.

    Args:
        iterations: samplings.
        batch: B, completions drawn by one sampling.
        minibatch: M, completions of one update.
        completions: C, completions of one prompt.
        inner_steps: T, passes over one sampling.
    Raises: ValueError where B, M and C do not divide.
    """

    iterations: int
    batch: int
    minibatch: int
    completions: int
    inner_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "minibatch", "completions", "inner_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        exact_div(self.batch, self.minibatch, "batch in minibatches")
        exact_div(self.minibatch, self.completions, "minibatch in completions of a prompt")

    @property
    def minibatches(self) -> int:
        return self.batch // self.minibatch

    @property
    def steps(self) -> int:
        """Updates taken on one sampling."""
        return self.minibatches * self.inner_steps

    @property
    def updates(self) -> int:
        return self.iterations * self.steps


class Policy(Protocol):
    """What `fine_tune` asks of a policy: it owns network, optimiser, micro-batches, devices."""

    alive: Tensor  # (...) bool: runs that are still finite
    breaks: frozenset[str]  # identities that a declared switch (dropout, no shift) breaks
    tolerance: float  # of recomputed log-probabilities, relative to the largest logit

    def frozen(self) -> Any:
        """A copy that samples and scores but does not train."""

    def planned(self, data: Rollout, method: Method) -> Rollout:
        """A labelled sampling, with what its updates want to know on the host."""

    def update(
        self, batch: Rollout, method: Method, hyper: Hyper, items: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One optimiser step on the sum of the method's loss over `items`.

        Returns: log-probabilities before the step (..., P, C, L), and detached metrics.
        """


class Problem(Protocol):
    """What `fine_tune` asks of a problem: data with rewards, from the policy or from a data set."""

    def collect(self, state: State, method: Method) -> Rollout:
        """Completions with rewards (and reference log-probabilities where the method needs them).

        On-policy methods: drawn from `state.behaviour` with the random numbers of
        `state.iteration`, so that a resumed run draws the same. Offline: the fixed data set.
        """


@dataclass
class State:
    """All that changes during a run; may be saved and restored after any update.

    `behaviour` is the policy as it was when the data of the current iteration were drawn
    (pi_gen), `step` the updates already taken on them, `moments` of all rewards so far.
    """

    policy: Any
    reference: Any
    behaviour: Any = None
    controller: AdaptiveKL | None = None  # of the KL coefficient, for methods that have one
    moments: Moments = field(default_factory=Moments)  # kept where standardise="running"
    iteration: int = 0
    step: int = 0
    updates: int = 0
    samples: int = 0


class Diverged(FloatingPointError):
    """Every run is non-finite: nothing is left to train."""


def fine_tune(
    state: State, problem: Problem, method: Method, schedule: Schedule, hyper: Hyper
) -> Iterator[dict[str, Tensor]]:
    """Algorithm 1: sample and label, then T passes over the data in minibatches of M; repeat.

    An offline method is the end of the same dial: one sampling, from the reference policy or a
    data set, and all updates on it. Yields the training metrics of each update, as (...) tensors,
    after which the caller may evaluate, save `state`, or stop; a restored `state` continues with
    the same numbers.

    Raises: AssertionError if an identity is violated; Diverged if every run is non-finite
        where a sampling is due; FloatingPointError if one is before anything was updated.
    """
    per_update = schedule.minibatch // schedule.completions
    while state.iteration < schedule.iterations:
        if state.step == 0:
            if not state.policy.alive.any():  # before drawing: a restored state ends here as well
                raise Diverged(f"every run is non-finite after {state.updates} updates")
            state.behaviour = state.policy.frozen()
            state.samples += schedule.batch
        data = problem.collect(state, method)
        if state.step == 0 and hyper.get("standardise") == "running":
            state.moments.add(data.rewards)  # once a sampling, not again where a run is resumed
        data = data.labelled(method.prepare(data, _present(hyper, state)))
        data = state.policy.planned(data, method)
        for step in range(state.step, schedule.steps):
            batch = data.narrow(step % schedule.minibatches * per_update, per_update)
            logp, metrics = state.policy.update(batch, method, hyper, method.items(batch))
            if step == 0:
                check_identities(state, method, hyper, batch, logp, metrics["loss"])
            state.updates += 1
            state.step = step + 1
            if state.step == schedule.steps:
                _close(state, data)
            yield metrics


def _present(hyper: Hyper, state: State) -> Hyper:
    """The hyperparameters, with what the run has made of them so far."""
    controller = state.controller
    adapted = {"kl_coefficient": controller.coefficient} if controller else {}
    return {**hyper, **adapted, "moments": state.moments}


def _close(state: State, data: Rollout) -> None:
    """The end of an iteration: the next one draws afresh."""
    if state.controller is not None:
        kl = sequence_logp(data.logp - data.ref, data.mask).mean().item()
        state.controller.update(kl, data.rewards.numel())
    state.iteration += 1
    state.step = 0


def check_identities(
    state: State, method: Method, hyper: Hyper, batch: Rollout, logp: Tensor, loss: Tensor
) -> None:
    """What must hold on the first minibatch after every sampling; cheap, so always on.

    - recomputed: the log-probability of a sample equals the one it was sampled with, so the
      importance ratio is 1 (of every token before the first update, on average after it);
    - reference: before the first update the policy is the reference, so their KL is 0;
    - first loss: before the first update the loss is what the method says (ln 2 for DPO).

    Where an update takes over what its sampling computed (`lib.lm.outputs`), "recomputed" compares
    little or nothing; now and then such a policy computes all anew for it.
    A switch that breaks an identity on purpose declares it in `policy.breaks`. Runs that have
    gone non-finite are left out; before the first update that is an error.
    Raises: AssertionError that names the identity and the deviation; FloatingPointError.
    """
    policy, first, alive = state.policy, state.updates == 0, state.policy.alive
    if first and not alive.all():
        raise FloatingPointError(f"{method.name}: loss or gradient not finite at the first update")
    allowed = policy.tolerance * (1 + batch.scale)

    def check(name: str, deviation: Tensor, allowed: Tensor) -> None:
        bad = alive & ~(deviation <= allowed)
        if name not in policy.breaks and bad.any():
            worst = deviation[bad].max().item()
            raise AssertionError(f"{method.name}: identity {name!r} is off by {worst:.3g}")

    def largest(x: Tensor) -> Tensor:
        return (x * batch.mask).abs().flatten(batch.lead).amax(-1)

    def average(x: Tensor) -> Tensor:
        tokens = batch.mask.flatten(batch.lead).sum(-1).clamp(min=1)
        return (x * batch.mask).abs().flatten(batch.lead).sum(-1) / tokens

    # The activations of a trained, perhaps collapsed, policy can be far larger than its logits, and
    # so can the rounding error of a token that it hardly ever writes (0.02 nats, once in a thousand
    # runs at a rate of 0.1): then the mean over tokens is held to the tolerance, not the largest.
    check("recomputed", (largest if first else average)(logp - batch.logp), allowed)
    if first and batch.ref is not None:
        check("reference", largest(batch.logp - batch.ref), allowed)
    if first and method.first_loss is not None:
        tied = loss == 0  # no pair to learn from
        off = (loss / method.first_loss(hyper) - 1).abs()
        check("first loss", off.where(~tied, 0.0), 10 * allowed)
