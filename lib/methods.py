"""The registry of methods: Table 1 as data. A method says what it needs; no code asks its name.

A new method starts with its loss in `lib.losses` and its entry here; CONTRIBUTING.md says what
else brings it into the book. Chapter: methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, log
from typing import Any

import torch
from torch import Tensor

from lib import losses
from lib.advantages import (
    STANDARDISE,
    WEIGHTS,
    exponential_weights,
    gae,
    preferences,
    select_best,
    standardise,
    token_rewards,
    whiten,
)
from lib.allowed import between, one_of
from lib.controllers import AdaptiveKL
from lib.rollouts import Rollout, sequence_logp

Hyper = Mapping[str, Any]
Labels = dict[str, Tensor]
Metrics = dict[str, Tensor]

# Properties a method can ask for; a problem that cannot give one refuses the method.
NEEDS = ("rewards", "pairs", "chosen", "reference", "old", "value_head")

# What a hyperparameter may be: one of a few words, or a number in an interval (ends included).
CHOICES: dict[str, tuple[str, ...]] = {
    "standardise": STANDARDISE,
    "weights": WEIGHTS,
    "ratio_over": ("completion", "token"),
    "margin_over": ("completion", "token"),
}
SMALLEST = 1e-6  # of what a loss divides by
INTERVALS: dict[str, tuple[float, float]] = {
    "beta": (0.0, inf),
    "tau": (SMALLEST, inf),
    "temperature": (SMALLEST, inf),
    "clip": (SMALLEST, inf),
    "threshold": (0.0, 1.0),
    "top_k": (1, inf),
    "gap": (0.0, inf),
    "kl_penalty": (0.0, inf),
    "value_clip": (SMALLEST, inf),
    "value_weight": (0.0, inf),
    "gamma": (0.0, 1.0),
    "lam": (0.0, 1.0),
    "kl_start": (0.0, inf),
    "kl_target": (SMALLEST, inf),
    "kl_horizon": (1.0, inf),
}


@dataclass(frozen=True)
class Method:
    """One fine-tuning method, as Table 1 describes it and as Algorithm 1 runs it.

    Args:
        name, title, family: registry name, name in print, "supervised" | "policy gradient" |
            "contrastive".
        on_policy: draws new completions from the policy it trains.
        sample_reuse: may take several updates on one sample; None where nothing is drawn.
        negative_gradient: can multiply a completion's log-likelihood by a negative coefficient.
        needs: what it reads, from NEEDS.
        unit: what its loss is a mean over: "selected" completions, "pair", "completion", "token".
        hyper: its hyperparameters and their defaults.
        prepare: (rollout, hyper) -> labels, once per sampling; hyper then also holds the present
            "kl_coefficient" if the method has a controller, and the run's "moments" where
            standardise="running" asks for them.
        loss: (batch, logp, hyper) -> (loss per item, metrics); logp (..., P, C, L) nats per token.
        first_loss: hyper -> what the mean loss must be while policy = reference, where it is known.
        critic: (batch, values, hyper) -> the value head's loss per token, where one is needed.
        controller: hyper -> what adapts the KL coefficient between samplings.
        paper: where the paper (or else the literature) defines it.
    """

    name: str
    title: str
    family: str
    on_policy: bool
    sample_reuse: bool | None
    negative_gradient: bool
    needs: frozenset[str]
    unit: str
    prepare: Callable[[Rollout, Hyper], Labels]
    loss: Callable[[Rollout, Tensor, Hyper], tuple[Tensor, Metrics]]
    paper: str
    hyper: Mapping[str, Any] = field(default_factory=dict)
    first_loss: Callable[[Hyper], float] | None = None
    critic: Callable[[Rollout, Tensor, Hyper], Tensor] | None = None
    controller: Callable[[Hyper], AdaptiveKL] | None = None

    def items(self, batch: Rollout) -> Tensor:
        """(...) how many items the loss of `batch` averages over: the global denominator."""
        counted = {
            "selected": lambda: batch.labels["selected"],
            "pair": lambda: batch.labels["prefer"],
            "completion": lambda: torch.ones_like(batch.rewards),
            "token": lambda: batch.mask,
        }[self.unit]()
        return counted.flatten(batch.lead).sum(-1).clamp(min=1)

    def active(self, batch: Rollout) -> Tensor:
        """(..., P, C) bool: completions that can carry loss; a policy may skip the others."""
        if self.unit == "pair":
            prefer = batch.labels["prefer"]
            return prefer.any(-1) | prefer.any(-2)
        if self._selected_only:
            return batch.labels["selected"]
        return torch.ones_like(batch.rewards, dtype=torch.bool)

    def carriers(self, hyper: Hyper) -> int | None:
        """How many completions of a prompt carry loss, where that is known before the rewards are.

        Where it is not, all are trained on: a stack has products of one shape, and a run's numbers
        must not depend on how many ties the others have.
        """
        return hyper.get("top_k") if self._selected_only else None

    @property
    def _selected_only(self) -> bool:
        """Whether no completion but the selected ones carries loss."""
        return self.unit == "selected" and not self.negative_gradient

    def resolve(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Its hyperparameters with `overrides` in place of the defaults.

        Raises: ValueError for a hyperparameter that the method does not have, or a value that the
            hyperparameter cannot take.
        """
        unknown = set(overrides) - set(self.hyper)
        if unknown:
            raise ValueError(
                f"{self.name} has no hyperparameter {sorted(unknown)}; it has {sorted(self.hyper)}"
            )
        for name, value in overrides.items():
            check_hyperparameter(name, value)
        return {**self.hyper, **overrides}


def check_hyperparameter(name: str, value: Any) -> None:
    """Raises ValueError, naming what is allowed, if `name` cannot be `value`."""
    if name in CHOICES:
        one_of(name, value, CHOICES[name])
    if name in INTERVALS:
        between(name, value, *INTERVALS[name])


def _prepare_selected(rollout: Rollout, hyper: Hyper) -> Labels:
    return {"selected": select_best(rollout.rewards, hyper.get("top_k", 1))}


def _prepare_pairs(rollout: Rollout, hyper: Hyper) -> Labels:
    return {"prefer": preferences(rollout.rewards, hyper["gap"])}


def _prepare_chosen(rollout: Rollout, hyper: Hyper) -> Labels:
    return {"selected": preferences(rollout.rewards).any(-1)}


def _standardised(rollout: Rollout, hyper: Hyper) -> Tensor:
    return standardise(rollout.rewards, hyper["standardise"], hyper.get("moments"))


def _prepare_gae(rollout: Rollout, hyper: Hyper) -> Labels:
    """Token advantages, whitened over the batch, and returns; the score is standardised (F.1)."""
    score = _standardised(rollout, hyper)
    log_ratio = rollout.logp - rollout.ref
    coefficient = hyper.get("kl_coefficient", hyper["kl_start"])
    rewards = token_rewards(score, log_ratio, rollout.mask, coefficient)
    advantage = gae(rewards, rollout.values, rollout.mask, hyper["gamma"], hyper["lam"])
    return {"advantage": whiten(advantage, rollout.mask, rollout.lead),
            "returns": advantage + rollout.values * rollout.mask}  # fmt: skip


def _prepare_advantage(rollout: Rollout, hyper: Hyper) -> Labels:
    return {"advantage": _standardised(rollout, hyper)}


def _prepare_weights(rollout: Rollout, hyper: Hyper) -> Labels:
    advantage = _standardised(rollout, hyper)
    return {"weight": exponential_weights(advantage, hyper["temperature"], hyper["weights"])}


def _mean(x: Tensor, lead: int) -> Tensor:
    return x.detach().float().flatten(lead).mean(-1)


def _best_of_n(batch: Rollout, logp: Tensor, hyper: Hyper) -> tuple[Tensor, Metrics]:
    return losses.best_of_n(sequence_logp(logp, batch.mask), batch.labels["selected"]), {}


def _best_of_n_negative(batch: Rollout, logp: Tensor, hyper: Hyper) -> tuple[Tensor, Metrics]:
    total = sequence_logp(logp, batch.mask)
    selected = batch.labels["selected"]
    item = losses.best_of_n_negative(total, selected, hyper["beta"], hyper["threshold"])
    pushed = (item != 0) & ~selected
    return item, {"pushed_share": _mean(pushed, batch.lead)}


def _rwr(batch: Rollout, logp: Tensor, hyper: Hyper) -> tuple[Tensor, Metrics]:
    weight = batch.labels["weight"]
    flat = weight.flatten(batch.lead)
    # times a power of 2, which changes no digit: of a minibatch's tiny weights the squares are 0
    exponent = torch.frexp(flat.amax(-1, keepdim=True)).exponent.clamp(min=-126)
    flat = torch.ldexp(flat, -exponent)
    ess = flat.sum(-1) ** 2 / (flat**2).sum(-1)
    return losses.rwr(sequence_logp(logp, batch.mask), weight), {"effective_samples": ess}


def _reinforce(batch: Rollout, logp: Tensor, hyper: Hyper) -> tuple[Tensor, Metrics]:
    return losses.reinforce(sequence_logp(logp, batch.mask), batch.labels["advantage"]), {}


def _clipped(
    batch: Rollout, logp: Tensor, advantage: Tensor, clip: float
) -> tuple[Tensor, Metrics]:
    """PPO's loss of each token, and the share of the tokens whose ratio is outside the clip."""
    item = losses.ppo(logp, batch.logp, advantage, clip) * batch.mask
    outside = (((logp - batch.logp).exp() - 1).abs() > clip) & batch.mask
    tokens = batch.mask.flatten(batch.lead).sum(-1).clamp(min=1)
    return item, {"clip_fraction": outside.flatten(batch.lead).sum(-1) / tokens}


def _ppo(batch: Rollout, logp: Tensor, hyper: Hyper) -> tuple[Tensor, Metrics]:
    """`kl_penalty` is the released code's term. It holds no policy near the reference: log pi_ref
    is a constant in it, and the mean of what is left of its gradient is 0 on fresh samples."""
    new, old = sequence_logp(logp, batch.mask), sequence_logp(batch.logp, batch.mask)
    advantage, clip = batch.labels["advantage"], hyper["clip"]
    if hyper["ratio_over"] == "token":
        item, metrics = _clipped(batch, logp, advantage[..., None], clip)
        item = item.sum(-1)
    else:
        item = losses.ppo(new, old, advantage, clip)
        metrics = {"clip_fraction": _mean(((new - old).exp() - 1).abs() > clip, batch.lead)}
    if batch.ref is not None:
        item = item + hyper["kl_penalty"] * (new - sequence_logp(batch.ref, batch.mask))
    return item, metrics


def _ppo_token(batch: Rollout, logp: Tensor, hyper: Hyper) -> tuple[Tensor, Metrics]:
    return _clipped(batch, logp, batch.labels["advantage"], hyper["clip"])


def _critic(batch: Rollout, values: Tensor, hyper: Hyper) -> Tensor:
    loss = losses.value(values, batch.values, batch.labels["returns"], hyper["value_clip"])
    return hyper["value_weight"] * loss * batch.mask


def _adaptive_kl(hyper: Hyper) -> AdaptiveKL:
    return AdaptiveKL(hyper["kl_start"], hyper["kl_target"], hyper["kl_horizon"])


def _pairwise(loss: Callable, by_token: Callable, weight: str) -> Callable:
    """A contrastive loss over all preferred pairs, with the accuracy of its implicit reward.

    Args: by_token: the loss where `margin_over` is "token".
    """

    def terms(batch: Rollout, logp: Tensor, hyper: Hyper) -> tuple[Tensor, Metrics]:
        new, ref = sequence_logp(logp, batch.mask), sequence_logp(batch.ref, batch.mask)
        prefer = batch.labels["prefer"]
        margin = losses.pair_margin(new, ref).detach()
        pairs = prefer.flatten(batch.lead).sum(-1).clamp(min=1)
        right = ((margin > 0) & prefer).flatten(batch.lead).sum(-1)
        mean = (margin * prefer).flatten(batch.lead).sum(-1) / pairs
        metrics = {"pair_accuracy": right / pairs, "pair_margin": mean, "pairs": pairs.float()}
        if hyper["margin_over"] == "token":
            return by_token(logp, batch.ref, batch.mask, prefer, hyper[weight]), metrics
        return loss(new, ref, prefer, hyper[weight]), metrics

    return terms


_BEST = dict(unit="selected", prepare=_prepare_selected)
_PAIRS = dict(unit="pair", prepare=_prepare_pairs, needs=frozenset({"pairs", "reference"}))
_DPO = dict(
    loss=_pairwise(losses.dpo, losses.dpo_token, "beta"),
    first_loss=lambda hyper: log(2),
    hyper={"beta": 0.1, "gap": 0.0, "margin_over": "completion"},
)
_IPO = dict(
    loss=_pairwise(losses.ipo, losses.ipo_token, "tau"),
    first_loss=lambda hyper: 0.25 / hyper["tau"] ** 2,
    hyper={"tau": 0.05, "gap": 0.0, "margin_over": "completion"},
)
_RWR = dict(
    unit="completion",
    prepare=_prepare_weights,
    loss=_rwr,
    needs=frozenset({"rewards"}),
    hyper={"temperature": 0.1, "standardise": "batch", "weights": "normalised"},
)
_OFFLINE = dict(on_policy=False, sample_reuse=None)
_ON_POLICY = dict(on_policy=True, sample_reuse=True)


def _entries() -> list[Method]:
    supervised = dict(family="supervised", negative_gradient=False)
    contrastive = dict(family="contrastive", negative_gradient=True)
    gradient = dict(family="policy gradient", negative_gradient=True, unit="completion")
    return [
        Method("best_of_n_offline", "Best-of-N (offline)", loss=_best_of_n, **_OFFLINE, **_BEST,
               **supervised, needs=frozenset({"chosen"}), hyper={"top_k": 1}, paper="I.2.1"),
        Method("pref_ft", "Pref-FT (Binary FeedMe)", loss=_best_of_n, **_OFFLINE, **supervised,
               unit="selected", prepare=_prepare_chosen, needs=frozenset({"pairs", "chosen"}),
               paper="2.2"),
        Method("best_of_n_negative", "Best-of-N + negative gradient (offline)",
               loss=_best_of_n_negative, **_OFFLINE, **_BEST, family="supervised",
               negative_gradient=True, needs=frozenset({"rewards"}), paper="I.2.1",
               hyper={"beta": 1.0, "threshold": 0.01}),
        Method("rwr_offline", "RWR (offline)", **_OFFLINE, **supervised, **_RWR, paper="I.2.5"),
        Method("dpo_offline", "DPO (offline)", **_OFFLINE, **contrastive, **_PAIRS, **_DPO,
               paper="2.2, E.1.4"),
        Method("ipo_offline", "IPO (offline)", **_OFFLINE, **contrastive, **_PAIRS, **_IPO,
               paper="F.2, Eq. 20"),
        Method("best_of_n", "Best-of-N (on-policy)", loss=_best_of_n, **_ON_POLICY, **_BEST,
               **supervised, needs=frozenset({"rewards"}), hyper={"top_k": 1}, paper="I.2.1"),
        Method("rwr", "RWR (on-policy)", **_ON_POLICY, **supervised, **_RWR, paper="I.2.5"),
        Method("reinforce", "REINFORCE", on_policy=True, sample_reuse=False, **gradient,
               needs=frozenset({"rewards"}), prepare=_prepare_advantage, loss=_reinforce,
               hyper={"standardise": "batch"}, paper="I.2.3"),
        Method("ppo_sequence", "PPO (one ratio per completion)", **_ON_POLICY, **gradient,
               needs=frozenset({"rewards", "old"}), prepare=_prepare_advantage, loss=_ppo,
               hyper={"clip": 0.2, "standardise": "batch", "ratio_over": "completion",
                      "kl_penalty": 0.0}, paper="I.2.4"),
        Method("ppo_token", "PPO (one ratio per token)", **_ON_POLICY, family="policy gradient",
               negative_gradient=True, unit="token", prepare=_prepare_gae, loss=_ppo_token,
               critic=_critic, controller=_adaptive_kl, paper="G.3",
               needs=frozenset({"rewards", "old", "reference", "value_head"}),
               hyper={"clip": 0.2, "value_clip": 0.2, "value_weight": 0.1, "gamma": 1.0,
                      "lam": 0.95, "kl_start": 0.2, "kl_target": 6.0, "kl_horizon": 10_000.0,
                      "standardise": "batch"}),
        Method("dpo", "DPO (on-policy)", **_ON_POLICY, **contrastive, **_PAIRS, **_DPO,
               paper="4.3"),
        Method("ipo", "IPO (on-policy)", **_ON_POLICY, **contrastive, **_PAIRS, **_IPO,
               paper="I.2.2"),
    ]  # fmt: skip


METHODS: dict[str, Method] = {method.name: method for method in _entries()}


def get(name: str) -> Method:
    """The method registered as `name`. Raises: ValueError that names the allowed ones."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]
