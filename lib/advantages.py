"""From rewards to what a loss weighs a completion by: standardised, selected, paired, weighted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib.allowed import one_of

STANDARDISE = ("batch", "prompt", "running", "none")
WEIGHTS = ("normalised", "raw", "clipped")

# Added to the standard deviation. Ten equal rewards have deviation 0 only up to rounding, and
# dividing by that rounding error would turn a tie into an arbitrary ranking.
EPSILON = 1e-8

# Largest weight of the "clipped" option: the released LLM code clips exp(score) to [0, 20].
MAX_WEIGHT = 20.0
MAX_EXPONENT = 80.0


@dataclass
class Moments:
    """What standardise="running" needs of all rewards that a run has drawn so far.

    Args: sums: (3, ...) float64: their number, their sum and the sum of their squares.
    """

    sums: Tensor | None = None

    def add(self, rewards: Tensor) -> None:
        """Those of one more sampling, (..., P, C)."""
        wide = rewards.double().flatten(-2)
        sums = torch.stack([torch.ones_like(wide).sum(-1), wide.sum(-1), (wide**2).sum(-1)])
        self.sums = sums if self.sums is None else self.sums + sums

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """(...) each; the deviation with n - 1."""
        count, total, squares = self.sums
        mean = total / count
        return mean, ((squares - total * mean) / (count - 1)).clamp(min=0).sqrt()


def standardise(rewards: Tensor, over: str = "batch", moments: Moments | None = None) -> Tensor:
    """(r - mean) / (std + 1e-8), std with B - 1, in float64 (appendix F.1, Eq. 19).

    Args:
        rewards: (..., P, C).
        over: "batch" (all P x C completions of one sampling), "prompt" (its C completions),
            "running" (all completions that the run has drawn) or "none" (rewards as they are).
        moments: of the run, these rewards among them; for "running".
    Returns: (..., P, C) in the dtype of `rewards`.
    Raises: ValueError for another `over`.
    """
    one_of("standardise", over, STANDARDISE)
    if over == "none":
        return rewards
    wide = rewards.double()
    if over == "running":
        mean, std = (x[..., None, None] for x in moments.mean_and_std())
    else:
        dims = (-2, -1) if over == "batch" else (-1,)
        mean, std = wide.mean(dims, keepdim=True), wide.std(dims, keepdim=True, correction=1)
    return ((wide - mean) / (std + EPSILON)).to(rewards.dtype)


def select_best(rewards: Tensor, k: int = 1) -> Tensor:
    """The k completions of each prompt with the highest reward, the first ones on ties.

    Args: rewards (..., P, C). Returns: (..., P, C) bool with k True in each row.
    """
    order = rewards.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(rewards, dtype=torch.bool).scatter_(-1, order, True)


def preferences(rewards: Tensor, gap: float = 0.0) -> Tensor:
    """[i, j] True if y_i's reward exceeds y_j's by more than `gap`: all N (N - 1) / 2 pairs.

    Args: rewards (..., P, C). Returns: (..., P, C, C) bool; ties are False both ways.
    """
    return rewards[..., :, None] - rewards[..., None, :] > gap


def exponential_weights(advantage: Tensor, temperature: float, form: str) -> Tensor:
    """RWR's weights exp(A / temperature) (appendix I.2.5), in a form that does not overflow.

    "normalised" divides by the batch mean of the weights: the same direction of the gradient, but
    a size that does not swing by e^30 from one batch to the next, which Adam's running second
    moment would turn into vanishing steps. "raw" is the printed formula, up to e^80, where float32
    ends; "clipped" caps it at 20.

    Args: advantage (..., P, C).
    Returns: (..., P, C), non-negative, dtype of `advantage`.
    Raises: ValueError for another `form`.
    """
    one_of("weights", form, WEIGHTS)
    exponent = advantage.double() / temperature
    if form == "normalised":
        shifted = (exponent - exponent.amax((-2, -1), keepdim=True)).exp()
        weight = shifted / shifted.mean((-2, -1), keepdim=True)
    else:
        weight = exponent.clamp(max=MAX_EXPONENT).exp()
    if form == "clipped":
        weight = weight.clamp(max=MAX_WEIGHT)
    return weight.to(advantage.dtype)


def token_rewards(score: Tensor, log_ratio: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """-coefficient * log pi/pi_ref on every token, plus the completion's score on its last one.

    The reward of KL-penalised RL, token by token (Ziegler et al. 2019, Eq. 2; appendix G.3).

    Args: score (..., P, C); log_ratio (..., P, C, L) nats; mask (..., P, C, L) bool, a prefix.
    Returns: (..., P, C, L), zero outside the mask.
    """
    last = mask & ~torch.nn.functional.pad(mask[..., 1:], (0, 1))
    return (score[..., None] * last - coefficient * log_ratio) * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum_k (gamma lam)^k d_{t+k}, d_t = r_t + gamma V_{t+1} - V_t: Schulman et al. 2016.

    The value after the last token that counts is 0: a completion ends there, by EOS or at the cap.

    Args: rewards, values (..., L), V_t before token t; mask (..., L) bool, a prefix.
    Returns: (..., L), zero outside the mask.
    """
    values = values * mask
    advantage, following = torch.zeros_like(values), torch.zeros_like(values[..., 0])
    after = torch.nn.functional.pad(values[..., 1:], (0, 1))
    deltas = (rewards + gamma * after - values) * mask
    for t in reversed(range(values.shape[-1])):
        following = deltas[..., t] + gamma * lam * following
        advantage[..., t] = following
    return advantage * mask


def whiten(x: Tensor, mask: Tensor, lead: int = 0) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over all that counts in the batch; zero elsewhere.

    Args: x (..., P, C, L); mask the same shape, bool; lead: dimensions before P.
    """
    flat, keep = x.flatten(lead), mask.flatten(lead)
    count = keep.sum(-1).clamp(min=1)
    mean = (flat * keep).sum(-1) / count
    shape = mean.shape + (1,) * (x.dim() - lead)
    centred = (x - mean.view(shape)) * mask
    variance = (centred.flatten(lead) ** 2).sum(-1) / (count - 1).clamp(min=1)
    return centred / (variance.view(shape) + EPSILON).sqrt()
