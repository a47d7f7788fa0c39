"""Forward and reverse KL on a categorical distribution with independent logits (Lemma E.4).

p = softmax(f) is trained to match q by gradient descent on f. A *push* is minus the gradient with
respect to the logits, so that one step is f + rate * push. Everything is in nats; tensors are
(..., V) log-probabilities in float64, so that masses far below 1e-300 stay finite. Chapter: theory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.allowed import one_of
from lib.divergences import categorical_kl

Push = Callable[[Tensor, Tensor], Tensor]


def forward_push(logp: Tensor, logq: Tensor) -> Tensor:
    """q - p = -d KL(q || p) / d f: Eq. (12), (eq-forward-step). Args and returns: (..., V)."""
    return logq.exp() - logp.exp()


def reverse_push(logp: Tensor, logq: Tensor) -> Tensor:
    """p (log(q / p) + KL(p || q)) = -d KL(p || q) / d f: Eq. (13), (eq-reverse-step).

    A category without mass gets none: 0 log 0 = 0. Args and returns: (..., V).
    """
    p = logp.exp()
    lead = categorical_kl(logp, logq)[..., None]
    return (p * (logq - logp + lead)).where(p != 0, 0.0)


OBJECTIVES: dict[str, Push] = {"forward": forward_push, "reverse": reverse_push}


def push_of(objective: str) -> Push:
    """The push of "forward" or "reverse". Raises: ValueError for another name."""
    return OBJECTIVES[one_of("objective", objective, OBJECTIVES)]


def descend(logp: Tensor, push: Tensor, rate: float) -> Tensor:
    """log softmax(f + rate * push), the distribution after one step. Args: (..., V)."""
    return (logp + rate * push).log_softmax(-1)


def contrast(push: Tensor, first: int = 0, second: int = 1) -> Tensor:
    """Delta / rate of Eq. (5), (eq-delta): the shared constant cancels. (..., V) -> (...)."""
    return push[..., first] - push[..., second]


def autograd_push(objective: str, logits: Tensor, logq: Tensor) -> Tensor:
    """Minus the gradient of a KL of (eq-two-kls) with respect to the logits, by autograd."""
    leaf = logits.detach().clone().requires_grad_()
    logp = leaf.log_softmax(-1)
    pair = {"forward": (logq, logp), "reverse": (logp, logq)}
    push_of(objective)
    (gradient,) = torch.autograd.grad(categorical_kl(*pair[objective]).sum(), leaf)
    return -gradient


def trajectory(
    logp: Tensor, logq: Tensor, objective: str, rate: float = 0.1, steps: int = 100
) -> Tensor:
    """Gradient descent from p towards q: (steps + 1, ..., V) log-probabilities.

    Raises: ValueError for a rate that is not positive or fewer than one step.
    """
    if not rate > 0 or steps < 1:
        raise ValueError(f"rate must be positive and steps at least 1, got {rate} and {steps}")
    push, found = push_of(objective), [logp]
    for _ in range(steps):
        found.append(descend(found[-1], push(found[-1], logq), rate))
    return torch.stack(found)


def distance(logp: Tensor, logq: Tensor) -> Tensor:
    """Total variation: the mass that p still has to move to become q. (..., V) -> (...)."""
    return (logp.exp() - logq.exp()).abs().sum(-1) / 2


@dataclass(frozen=True)
class Halfway:
    """Where a trajectory has first moved half of the mass that it has to move.

    Args: reached (...) bool. steps (...) updates, the last one if not reached.
        logp (..., V) there.
    """

    reached: Tensor
    steps: Tensor
    logp: Tensor


def halfway(path: Tensor, logq: Tensor) -> Halfway:
    """The first step at which distance(p_t, q) <= distance(p_0, q) / 2. Args: path (T, ..., V)."""
    left = distance(path, logq)
    done = left <= left[0] / 2
    reached = done.any(0)
    steps = torch.where(reached, done.float().argmax(0), len(path) - 1)
    index = steps[None, ..., None].expand(1, *path.shape[1:])
    return Halfway(reached, steps, path.gather(0, index)[0])


def progress(logp: Tensor, start: Tensor, logq: Tensor) -> Tensor:
    """(p - p_0) / (q - p_0): each category's share of its own way. NaN where q = p_0."""
    way = logq.exp() - start.exp()
    return (logp.exp() - start.exp()) / way.where(way != 0, torch.nan)
