"""The length problems: rewards and preferences by a rule that anybody can check (section 3.2).

Length counts response tokens without EOS. A response that hits the cap has no EOS; a response that
was truncated on purpose ends in one. Chapter: problems.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lib.allowed import one_of

TASKS = ("min", "mode", "skew")
GIVEN = "given"  # preferences that came with the pairs: no rule, and so no gold reward
TRUNCATED = 0.95  # share of the Skew data's responses that are cut short (appendix J.1)
SKEW_MEAN = 0.25  # mean of the exponential length, as a share of the SFT policy's mean length


def check_task(task: str) -> str:
    """Raises: ValueError that names the tasks."""
    return one_of("task", task, (*TASKS, GIVEN))


def lengths(completions: Tensor, mask: Tensor, eos: Tensor) -> Tensor:
    """Response tokens without EOS. (..., L) ids, (..., L) bool, (k,) ids -> (...) int."""
    return (mask & ~torch.isin(completions, eos)).sum(-1)


def gold(task: str, length: Tensor, target: float) -> Tensor:
    """The gold reward in tokens: -length (Min, Skew), -|length - target| (Mode).

    Raises: ValueError for preferences without a rule.
    """
    if task == GIVEN:
        raise ValueError("preferences that were given follow no rule: there is no gold reward")
    length = length.float()
    return -(length - target).abs() if check_task(task) == "mode" else -length


def truncated(
    responses: list[list[int]], eos: int, mean: float, seed: int
) -> tuple[list[list[int]], int]:
    """The Skew data: with probability 0.95 a response is cut at an exponential length.

    Args: responses: token ids, with EOS where they ended. mean: of the exponential, in tokens.
    Returns: the responses, a cut one ending in EOS, and how many were cut (one that is shorter
        than its drawn length stays as it is).
    """
    draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
    chosen = draw.random(len(responses)) < TRUNCATED
    limits = np.ceil(draw.exponential(mean, len(responses))).astype(int)
    out, cut = [], 0
    for response, choose, limit in zip(responses, chosen, limits, strict=True):
        body = response[:-1] if response and response[-1] == eos else response
        short = bool(choose) and limit < len(body)
        out.append([*body[:limit], eos] if short else list(response))
        cut += short
    return out, cut
