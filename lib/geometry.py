"""How reference policy, reward and data lie to each other: conditions [C1] and [C2], measured.

A completion of the bandit is 9 tokens, its reward the mean of theirs, and the tokens of pi_ref are
independent (up to the network's fit). So the target exp(r / temperature), normalised over all
100^9 completions, is a product of one categorical per token, and every divergence here is exact:
9 times that of a token. All in nats per completion. Chapter: problems.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib.advantages import select_best
from lib.bandit.config import REWARD_FUNCTIONS, VOCABULARY, BanditRun
from lib.bandit.network import GPT_NANO
from lib.bandit.policy import Scorer
from lib.bandit.problem import BanditProblem
from lib.bandit.reference import histogram, load, reward_table
from lib.cards import markdown
from lib.divergences import categorical_kl
from lib.rollouts import sequence_logp
from lib.tables import interval_text

LENGTH = 9
STACK = 10  # runs whose data are drawn side by side
LIKELY = 0.5  # a token whose reward is above this counts as near the peak


def _log_histogram() -> Tensor:
    return torch.from_numpy(histogram()).log()


def target(reward_function: str, temperature: float, length: int = LENGTH) -> Tensor:
    """log q(a), one token's factor of exp(r / temperature) normalised over completions: (100,).

    exp(r(y) / temperature) = prod_t exp(R(y_t) / (length * temperature)), so
    q(a) = exp(R(a) / (length * temperature)) / sum_b exp(R(b) / (length * temperature)).
    """
    rewards = reward_table(reward_function).double()
    return (rewards / (length * temperature)).log_softmax(-1)


def alignment(temperatures: Iterable[float], length: int = LENGTH) -> pd.DataFrame:
    """[C1] as a divergence between pi_ref and exp(r / temperature), in both directions.

    Columns: reward_function, temperature, from_reference = KL(pi_ref || target), to_target =
    KL(target || pi_ref), reward = the target's mean reward.
    """
    reference, rows = _log_histogram(), []
    for name in REWARD_FUNCTIONS:
        rewards = reward_table(name).double()
        for temperature in temperatures:
            q = target(name, temperature, length)
            rows.append({
                "reward_function": name,
                "temperature": float(temperature),
                "from_reference": length * categorical_kl(reference, q).item(),
                "to_target": length * categorical_kl(q, reference).item(),
                "reward": (q.exp() @ rewards).item(),
            })  # fmt: skip
    return pd.DataFrame(rows)


def frontier(betas: Iterable[float], length: int = LENGTH) -> pd.DataFrame:
    """The most reward that any policy can have at each KL to pi_ref: the optima of Eq. (2).

    pi(a) is proportional to pi_ref(a) exp(R(a) / (length * beta)) at every position.
    Columns: reward_function, beta, kl = KL(pi || pi_ref), reward.
    """
    reference, rows = _log_histogram(), []
    for name in REWARD_FUNCTIONS:
        rewards = reward_table(name).double()
        for beta in betas:
            policy = (reference + rewards / (length * beta)).log_softmax(-1)
            kl = length * categorical_kl(policy, reference).item()
            rows.append((name, float(beta), kl, (policy.exp() @ rewards).item()))
    return pd.DataFrame(rows, columns=["reward_function", "beta", "kl", "reward"])


def distances(length: int = LENGTH, completions: int = 10) -> pd.DataFrame:
    """How far each peak is from pi_ref, and how much of it sampling sees: one row per reward.

    Columns: reward_function, peak, nats = -length log pi_ref(peak) (the KL of putting all mass
    there), near = pi_ref's mass on tokens with a reward above 1/2, seen = chance that at least one
    of `completions` samples holds such a token at a given position, mean = pi_ref's mean reward.
    """
    policy, rows = histogram(), []
    for name, peak in REWARD_FUNCTIONS.items():
        rewards = reward_table(name).double().numpy()
        near = float(policy[rewards > LIKELY].sum())
        rows.append({
            "reward_function": name, "peak": peak, "nats": -length * float(np.log(policy[peak])),
            "near": near, "seen": 1 - (1 - near) ** completions, "mean": float(policy @ rewards),
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("reward_function")


def token_table() -> pd.DataFrame:
    """One row per token: pi_ref by both histograms, the fitted network's mean, R1 and R2."""
    network = _next_token_logp().exp().mean((0, 1)).numpy()
    return pd.DataFrame({
        "token": np.arange(VOCABULARY),
        "squashed": histogram("squashed"),
        "clipped": histogram("clipped"),
        "network": network,
        **{name: reward_table(name).numpy() for name in REWARD_FUNCTIONS},
    })  # fmt: skip


def _reference_samples():
    """One completion of the fitted network for each context, with its distributions."""
    scorer = Scorer(load(), 1, GPT_NANO)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(1, VOCABULARY, LENGTH, generator=generator)
    return scorer.sample(torch.arange(VOCABULARY)[None], numbers, keep=True)


def _next_token_logp() -> Tensor:
    """(100 contexts, 9 positions, 100 tokens) log-probabilities along sampled prefixes."""
    return _reference_samples().distributions[0]


def fit() -> dict[str, float]:
    """How well the network fits the histogram, nats per completion, and how it varies.

    from_network = KL(pi_ref || histogram), exact per token along prefixes the network drew;
    per_token its ninth; worst the largest per-token KL at any of the 100 contexts x 9 positions.
    """
    kl = categorical_kl(_next_token_logp(), _log_histogram().float())  # (100, 9)
    return {"from_network": kl.sum(-1).mean().item(), "per_token": kl.mean().item(),
            "worst": kl.max().item()}  # fmt: skip


def _problems(reward_function: str, seeds: Sequence[int]) -> Iterable[BanditProblem]:
    for start in range(0, len(seeds), STACK):
        runs = [BanditRun("ipo_offline", reward_function, 0.01, seed, iterations=1,
                          inner_steps=100) for seed in seeds[start : start + STACK]]  # fmt: skip
        problem = BanditProblem(runs)
        problem.initial_state()
        yield problem


def coverage(seeds: Sequence[int]) -> pd.DataFrame:
    """[C2]: mean log pi_ref of the data's responses; the data that offline runs train on.

    y_w is the best of a prompt's 10 completions, y_l the others. One row per reward function and
    seed: chosen_logp, rejected_logp (nats), chosen_reward, rejected_reward.
    """
    rows = []
    for name in REWARD_FUNCTIONS:
        drawn = [_means(problem.fixed) for problem in _problems(name, seeds)]
        columns = {key: torch.cat([d[key] for d in drawn]).tolist() for key in drawn[0]}
        rows.append(pd.DataFrame({"reward_function": name, "seed": list(seeds), **columns}))
    return pd.concat(rows, ignore_index=True)


def _means(data) -> dict[str, Tensor]:
    """Per run: log pi_ref and reward of the best completion and, in the mean, of the others."""
    density, best = sequence_logp(data.ref, data.mask), select_best(data.rewards)
    others = best.shape[-1] - 1

    def split(values: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (values * best).sum(-1).mean(-1)
        return chosen, (values * ~best).sum(-1).mean(-1) / others

    logp, reward = split(density), split(data.rewards)
    return {"chosen_logp": logp[0], "rejected_logp": logp[1],
            "chosen_reward": reward[0], "rejected_reward": reward[1]}  # fmt: skip


def examples(seed: int) -> pd.DataFrame:
    """The completions of a run's first prompt, drawn from pi_ref, with what they earn.

    Columns: prompt, completion (9 tokens), log pi_ref (nats), R1, R2.
    """
    first = {name: next(iter(_problems(name, [seed]))).fixed for name in REWARD_FUNCTIONS}
    data = first["R1"]  # the same completions under both: they depend on the seed alone
    return pd.DataFrame({
        "prompt": data.prompts[0, 0].item(),
        "completion": [" ".join(map(str, tokens)) for tokens in data.completions[0, 0].tolist()],
        "log pi_ref": sequence_logp(data.ref, data.mask)[0, 0].tolist(),
        **{name: rollout.rewards[0, 0].tolist() for name, rollout in first.items()},
    })  # fmt: skip


def alignment_text(table: pd.DataFrame) -> str:
    """The table of `alignment` in Markdown: a row per temperature, R1 and R2 side by side."""
    rows = []
    for temperature, part in table.groupby("temperature", sort=False):
        found = part.set_index("reward_function")
        cells = [found.loc[name, column] for column in ("from_reference", "to_target")
                 for name in REWARD_FUNCTIONS]  # fmt: skip
        rows.append([f"{temperature:g}", *(f"{x:.2f}" for x in [*cells, found["reward"].mean()])])
    columns = ["temperature", "ref to target, R1", "R2", "target to ref, R1", "R2", "reward"]
    return markdown(pd.DataFrame(rows, columns=columns), "rrrrrr")


def coverage_text(table: pd.DataFrame) -> str:
    """The table of `coverage` in Markdown: mean and 95% interval over seeds."""
    words = {
        "chosen_logp": "log pi_ref of y_w, nats", "rejected_logp": "log pi_ref of y_l, nats",
        "chosen_reward": "reward of y_w", "rejected_reward": "reward of y_l",
    }  # fmt: skip
    rows = {name: table[table["reward_function"] == name] for name in REWARD_FUNCTIONS}
    return markdown(pd.DataFrame({
        "": list(words.values()),
        **{name: [interval_text(own[column], digits=1 if column.endswith("logp") else 3)
                  for column in words] for name, own in rows.items()},
    }))  # fmt: skip
