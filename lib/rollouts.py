"""Sampled completions and what is known about them: the data that Algorithm 1 trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

# What a rollout holds for each prompt group.
GROUPED = ("prompts", "prompt_mask", "completions", "mask", "logp", "ref", "values", "rewards")


@dataclass(frozen=True)
class Rollout:
    """Completions for groups of prompts. `...` stands for `lead` leading dimensions (runs).

    Args:
        prompts: (..., P, *) prompt token ids, padded on the left where lengths differ.
        completions: (..., P, C, L) completion token ids, EOS included where there is one.
        mask: (..., P, C, L) bool, True on completion tokens that count.
        logp: (..., P, C, L) nats per token under the policy that sampled them ("old").
        ref: (..., P, C, L) nats per token under the reference policy, or None if not needed.
        rewards: (..., P, C) one reward per completion.
        scale: (...) largest absolute logit seen while sampling: what float error scales with.
        lead: number of leading dimensions before P.
        labels: what a method's `prepare` adds; every tensor has P at dimension `lead`.
        prompt_mask: like prompts, bool, False on padding; None where all prompts are as long.
        values: (..., P, C, L) what the value head predicted before each token, or None.
        host: what a policy wants to know of it without waiting for the device, by name
            (`lib.finetune.Policy.planned`); every array has P at its first dimension.
    """

    prompts: Tensor
    completions: Tensor
    mask: Tensor
    logp: Tensor
    ref: Tensor | None
    rewards: Tensor
    scale: Tensor
    lead: int = 0
    labels: dict[str, Tensor] = field(default_factory=dict)
    prompt_mask: Tensor | None = None
    values: Tensor | None = None
    host: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """P, the number of prompt groups."""
        return self.rewards.shape[self.lead]

    def labelled(self, labels: dict[str, Tensor]) -> Rollout:
        return replace(self, labels=labels)

    def narrow(self, start: int, length: int) -> Rollout:
        """Whole prompt groups `start` to `start + length`, as views."""
        if start == 0 and length == self.groups:
            return self
        return self._each(lambda x: x.narrow(self.lead, start, length),
                          slice(start, start + length))  # fmt: skip

    def pick(self, groups: np.ndarray) -> Rollout:
        """The prompt groups at these indices (n,), as copies."""
        there = sent(groups, self.rewards.device)
        return self._each(lambda x: x.index_select(self.lead, there), groups)

    def _each(self, cut: Callable[[Tensor], Tensor], groups: slice | np.ndarray) -> Rollout:
        parts = {name: None if (x := getattr(self, name)) is None else cut(x) for name in GROUPED}
        return replace(self, **parts, labels={k: cut(v) for k, v in self.labels.items()},
                       host={k: v[groups] for k, v in self.host.items()})  # fmt: skip


def sent(indices: np.ndarray, device: torch.device) -> Tensor:
    """Indices on a device; the host does not wait for it."""
    found = torch.from_numpy(indices)
    if device.type == "cuda":
        found = found.pin_memory()  # from other memory the driver may wait for the device first
    return found.to(device, non_blocking=True)


def sequence_logp(logp: Tensor, mask: Tensor) -> Tensor:
    """log pi(y|x) = sum_t log pi(y_t | x, y_<t) over the tokens that count.

    Args:
        logp: (..., L) nats per token.
        mask: (..., L) bool.
    Returns: (...) nats per completion.
    """
    return (logp * mask).sum(-1)


def token_logp(logits: Tensor, tokens: Tensor, *, shift: bool = True) -> Tensor:
    """Per-token log-probability: the one place where logits meet the tokens they predict.

    The logits at position t are the distribution of token t + 1. `shift=False` reproduces a slip
    of the released bandit code, which scores token t with the logits at t (the logits that have
    already read it); it exists for the audit only.

    Args:
        logits: (..., S, V), for the inputs `tokens`; with `shift` the last position is unused
            and may be left out (S - 1 positions).
        tokens: (..., S) the prompt's last token first, then the completion.
    Returns: (..., S - 1) nats, one per completion token.
    Raises: ValueError if the number of positions fits neither reading.
    """
    targets = tokens[..., 1:]
    length = targets.shape[-1]
    positions = logits.shape[-2]
    if positions not in ((length, length + 1) if shift else (length + 1,)):
        raise ValueError(f"{positions} logit positions do not fit {length + 1} tokens ({shift=})")
    logits = logits[..., :length, :] if shift else logits[..., 1:, :]
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def invert_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds u. (..., V), (...) -> (...) ids.

    A token is drawn by comparing one number to a sum, so that a sample does not depend on what
    else is in the batch. Rounding can leave the last sum below u: the last token that has any
    probability is then drawn.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[..., -1:]
    below = torch.minimum(uniforms[..., None], torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, below, right=True)[..., 0]
    return index.clamp(max=probabilities.shape[-1] - 1)  # a policy of NaN has no such token
