"""The 1-token bandit, from the exact dynamics to what a run does: three switches, one at a time.

With one token a completion is a category, and both objectives of the theory have a method: offline
best-of-N is forward KL to the law of the best of N draws (Lemma E.3), REINFORCE is the policy
gradient (Lemma E.1 with beta = 0). The exact dynamics have independent logits for every prompt, the
expected gradient and plain gradient descent; a run of the bandit has a network, 10 sampled
completions a prompt and Adam. Every context is a prompt, so rewards and divergences are exact.
Chapter: theory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from lib import methods
from lib.allowed import one_of
from lib.bandit.config import VOCABULARY, BanditRun, bandit_run
from lib.bandit.network import GPT_NANO, Parameters, logits
from lib.bandit.policy import StackedAdam
from lib.bandit.problem import TRAIN, contexts
from lib.bandit.reference import load, reward_table
from lib.divergences import categorical_kl
from lib.randomness import uniforms
from lib.rollouts import Rollout, invert_cdf

METHODS = ("best_of_n_offline", "reinforce")
DRAWS = 10  # N, completions of a prompt
RATES = {(False, False): 2.0, (False, True): 0.1, (True, False): 0.3, (True, True): 0.003}


@dataclass(frozen=True)
class Switches:
    """What separates a run from the theory. All False is Lemma E.4; all True is the bandit engine.

    Args: method: one of METHODS. reward_function: "R1" or "R2". network: shared parameters instead
        of independent logits. sampled: 10 completions a prompt instead of expectations. adam:
        instead of gradient descent. rate: None for one that suits (network, adam).
    Raises: ValueError for another method.
    """

    method: str
    reward_function: str
    network: bool = False
    sampled: bool = False
    adam: bool = False
    rate: float | None = None
    updates: int = 100
    seed: int = 5

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)

    @property
    def learning_rate(self) -> float:
        return RATES[self.network, self.adam] if self.rate is None else self.rate

    @property
    def run(self) -> BanditRun:
        """The bandit run that all switches on are meant to equal."""
        on_policy = methods.get(self.method).on_policy
        updates = {"iterations" if on_policy else "inner_steps": self.updates}
        return bandit_run(self.method, self.reward_function, self.learning_rate, self.seed,
                          prompts=VOCABULARY, completions=DRAWS, length=1, evaluations=4,
                          held_out=False, alone=True, **updates)  # fmt: skip


def ladder(method: str, reward_function: str, **options) -> dict[str, Switches]:
    """The theory, each switch alone, and all three: label -> switches."""
    exact = Switches(method, reward_function, **options)
    return {
        "theory": exact,
        "sampled": replace(exact, sampled=True),
        "Adam": replace(exact, adam=True),
        "network": replace(exact, network=True),
        "all three": replace(exact, sampled=True, adam=True, network=True),
    }


def train(switches: Switches) -> pd.DataFrame:
    """One row per update: update, reward and kl_ref, both exact means over the 100 contexts."""
    order = contexts([switches.seed])[0]
    leaves, score = _model(switches, order)
    step = _optimiser(switches, leaves)
    reference = score(leaves).detach()
    objective = (_sampled if switches.sampled else _expected)(switches, order, reference)
    reward, rows = reward_table(switches.reward_function), []
    for update in range(switches.updates + 1):
        logp = score(leaves)
        now, kl = logp.detach(), categorical_kl(logp.detach(), reference)
        rows.append((update, float((now.exp() @ reward).mean()), float(kl.mean())))
        step(torch.autograd.grad(objective(logp, update), list(leaves.values())))
    return pd.DataFrame(rows, columns=["update", "reward", "kl_ref"])


def _model(switches: Switches, order: Tensor):
    """Trainable leaves, and the function from them to log-probabilities (prompts, tokens)."""
    network = {k: v.clone() for k, v in load().items()}

    def by_network(parameters: Parameters) -> Tensor:
        return logits(parameters, order[None, :, None], GPT_NANO)[0, :, 0].log_softmax(-1)

    if switches.network:
        return {k: v.requires_grad_() for k, v in network.items()}, by_network
    table = by_network(network).clone().requires_grad_()
    return {"logits": table}, lambda leaves: leaves["logits"].log_softmax(-1)


def _optimiser(switches: Switches, leaves: Parameters):
    """A step from the gradients. Independent logits get each prompt's own gradient, not 1/100."""
    rate = switches.learning_rate
    scale = 1.0 if switches.network or switches.adam else float(VOCABULARY)
    size = sum(v.numel() for v in leaves.values())
    adam = StackedAdam(1, size, torch.tensor([rate])) if switches.adam else None

    @torch.no_grad()
    def step(gradients) -> None:
        flat = torch.cat([g.flatten() for g in gradients])[None]
        values = torch.cat([v.flatten() for v in leaves.values()])[None]
        if adam is None:
            values -= rate * scale * flat
        else:
            adam.step(values, flat, torch.ones(1, dtype=torch.bool))
        parts = values[0].split([v.numel() for v in leaves.values()])
        for leaf, part in zip(leaves.values(), parts, strict=True):
            leaf.copy_(part.view_as(leaf))

    return step


def best_of_law(logp: Tensor, reward: Tensor, n: int = DRAWS) -> Tensor:
    """Probabilities of each token as the best of n draws: (..., V); ties in proportion to p."""
    levels, place = reward.unique(return_inverse=True)
    p = logp.double().exp()
    mass = torch.zeros(*p.shape[:-1], len(levels), dtype=p.dtype).index_add(-1, place, p)
    wins = mass.cumsum(-1).clamp(max=1).pow(n).diff(dim=-1, prepend=torch.zeros_like(mass[..., :1]))
    return (p * (wins / mass)[..., place]).to(logp.dtype)


def _expected(switches: Switches, order: Tensor, reference: Tensor):
    """Loss of expected gradients: (log-probabilities, update) -> scalar, a mean over prompts."""
    reward = reward_table(switches.reward_function)
    target = best_of_law(reference, reward)

    def best_of_n(logp: Tensor, update: int) -> Tensor:
        return -(target * logp).sum(-1).mean()

    def reinforce(logp: Tensor, update: int) -> Tensor:
        p = logp.detach().exp()
        mean = (p @ reward).mean()
        deviation = (p @ (reward - mean) ** 2).mean().sqrt() + 1e-8
        return -(p * (reward - mean) / deviation * logp).sum(-1).mean()

    return {"best_of_n_offline": best_of_n, "reinforce": reinforce}[switches.method]


def _sampled(switches: Switches, order: Tensor, reference: Tensor):
    """The method's own loss on 10 completions a prompt, drawn with a run's random numbers."""
    method, reward = methods.get(switches.method), reward_table(switches.reward_function)
    kept: list[Rollout] = []

    def objective(logp: Tensor, update: int) -> Tensor:
        if method.on_policy or not kept:
            kept[:] = [_drawn(switches, order, logp.detach(), reference, reward, update)]
            kept[0] = kept[0].labelled(method.prepare(kept[0], method.hyper))
        batch = kept[0]
        tokens = batch.completions[0, ..., 0]
        item, _ = method.loss(batch, logp.gather(-1, tokens)[None, ..., None], method.hyper)
        return item.sum() / method.items(batch).sum()

    return objective


def _drawn(
    switches: Switches, order: Tensor, logp: Tensor, ref: Tensor, reward: Tensor, update: int
) -> Rollout:
    numbers = uniforms([switches.seed], TRAIN, update, (VOCABULARY * DRAWS, 1))
    numbers = numbers.view(VOCABULARY, DRAWS)
    tokens = invert_cdf(logp.exp()[:, None].expand(-1, DRAWS, -1), numbers)
    grid = (1, VOCABULARY, DRAWS, 1)
    return Rollout(
        prompts=order[None], completions=tokens.view(grid),
        mask=torch.ones(grid, dtype=torch.bool), logp=logp.gather(-1, tokens).view(grid),
        ref=ref.gather(-1, tokens).view(grid), rewards=reward[tokens][None],
        scale=logp.abs().amax()[None], lead=1,
    )  # fmt: skip


def paths(rewards: tuple[str, ...] = ("R1", "R2"), **options) -> pd.DataFrame:
    """`train` for every method, reward and switch: method, reward_function, switch, update, ..."""
    found = []
    for method in METHODS:
        for reward in rewards:
            for name, switches in ladder(method, reward, **options).items():
                labels = {"method": method, "reward_function": reward, "switch": name}
                found.append(train(switches).assign(**labels))
    return pd.concat(found, ignore_index=True)


def ends(table: pd.DataFrame) -> pd.DataFrame:
    """Where each path ends: one row per method and switch, reward and KL by reward function."""
    last = table.loc[table.groupby(["method", "reward_function", "switch"], sort=False)["update"]
                     .idxmax()]  # fmt: skip
    wide = last.pivot(index=["method", "switch"], columns="reward_function",
                      values=["reward", "kl_ref"])  # fmt: skip
    names = {"reward": "reward", "kl_ref": "KL, nats"}
    wide.columns = [f"{names[value]}, {reward}" for value, reward in wide.columns]
    order = pd.MultiIndex.from_frame(last[["method", "switch"]].drop_duplicates())
    return wide.loc[order].reset_index()
