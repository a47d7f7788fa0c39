"""What each loss would reach on the bandit with unlimited data and an unrestricted policy: exact.

Completions are independent tokens of pi_ref, and a method sees a completion through its reward
alone, so everything follows from the law of that reward. Three results are used:

- best-of-N: maximum likelihood reaches the law of the best of N draws (appendix I.2.1);
- RWR: pi proportional to pi_ref exp(standardised reward / temperature) (appendix I.2.5);
- IPO: pi proportional to pi_ref exp(p / tau), p the probability of beating a draw from pi_ref
  (Azar et al. 2024, the solution of Eq. 20 of the paper).

DPO has no such optimum here: preferences are certain, so its loss falls for ever as margins grow.
Chapter: negative_gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib import methods
from lib.bandit.reference import histogram, reward_table

RESOLUTION = 20_000  # steps of the grid on which token rewards are added up


@dataclass(frozen=True)
class Law:
    """The law of a completion's mean reward under pi_ref.

    Args:
        scores: (S,) mean rewards, ascending. mass: (S,) their probabilities.
    """

    scores: np.ndarray
    mass: np.ndarray

    @property
    def beaten(self) -> np.ndarray:
        """(S,) probability that a draw from pi_ref scores less; a tie counts one half."""
        return np.cumsum(self.mass) - self.mass / 2

    def best_of(self, n: int) -> np.ndarray:
        """(S,) the probabilities of the best score of n draws."""
        return np.diff(np.cumsum(self.mass).clip(0, 1) ** n, prepend=0.0)

    def tilted(self, log_weight: np.ndarray) -> np.ndarray:
        """(S,) the law under pi proportional to pi_ref exp(log_weight)."""
        weight = np.exp(log_weight - log_weight[self.mass > 0].max()) * self.mass
        return weight / weight.sum()

    def self_ranked(self, tau: float) -> np.ndarray:
        """(S,) the law whose log-ratio to pi_ref is (the share of itself that a score beats) / tau.

        That share u is uniform under the law sought, so dF_ref / du is proportional to
        exp(-u / tau), and u follows from F_ref in closed form.
        """
        below = np.cumsum(self.mass).clip(0, 1)
        u = -tau * np.log1p(-below * -np.expm1(-1 / tau))
        law = np.diff(u, prepend=0.0)
        return law / law.sum()

    def summary(self, law: np.ndarray) -> tuple[float, float]:
        """Mean reward of `law`, and its KL to pi_ref in nats."""
        held = law > 0
        return float(law @ self.scores), float(law[held] @ np.log(law[held] / self.mass[held]))


def _sum_law(one: np.ndarray, count: int) -> np.ndarray:
    """The law of the sum of `count` independent steps, from the law of one.

    Added up step by step, which few steps have: a Fourier transform would leave 1e-17 of noise
    everywhere, and RWR weighs the far tail by more than its inverse.
    """
    total, steps = np.ones(1), np.flatnonzero(one)
    for _ in range(count):
        wider = np.zeros(len(total) + len(one) - 1)
        for step in steps:
            wider[step : step + len(total)] += one[step] * total
        total = wider
    return total / total.sum()


def _token_grid(reward_function: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pi_ref (100,), each token's step on the grid (100,), and the law of one token's step."""
    policy = histogram()
    rewards = reward_table(reward_function).double().numpy()
    step = np.rint(rewards * RESOLUTION).astype(int)
    return policy, step, np.bincount(step, policy, RESOLUTION + 1)


def _one_token(reward_function: str) -> tuple[np.ndarray, np.ndarray]:
    """Rewards that one token can have, ascending, and each token's place among them: (100,).

    Tokens at the same distance from the peak share a reward.
    """
    rewards = reward_table(reward_function).double().numpy()
    return np.unique(rewards, return_inverse=True)


def reward_law(reward_function: str, length: int = 9) -> Law:
    """The law of the mean reward of `length` tokens; exact for one, on a grid for more.

    The grid moves a token's reward by at most 1 / (2 RESOLUTION).
    """
    policy, _, one = _token_grid(reward_function)
    if length == 1:
        scores, place = _one_token(reward_function)
        return Law(scores, np.bincount(place, policy))
    mass = _sum_law(one, length)
    return Law(np.arange(len(mass)) / RESOLUTION / length, mass)


def win_ratio(reward_function: str, length: int = 9, completions: int = 10) -> np.ndarray:
    """N P(best of N | the completion holds token a at a given position): (100,).

    1 for a token that does not matter, N for one that always wins. Its mean under pi_ref is 1.
    """
    law = reward_law(reward_function, length)
    wins = law.best_of(completions)
    ratio = np.divide(wins, law.mass, out=np.zeros_like(wins), where=law.mass > 1e-15)
    if length == 1:
        return ratio[_one_token(reward_function)[1]]
    _, step, one = _token_grid(reward_function)
    rest = _sum_law(one, length - 1)
    return np.array([rest @ ratio[s : s + len(rest)] for s in step])


def break_even(beta: float, completions: int = 10) -> float:
    """The win ratio above which best-of-N + negative gradient pushes a token up, on balance.

    Per prompt, the loss pulls a token up 1 time for each time it is in the best completion and
    pushes it down beta times for each time it is in one of the others: (1 + beta) P(best) - beta.
    """
    return completions * beta / (1 + beta)


def optima(length: int = 9, completions: int = 10) -> pd.DataFrame:
    """Reward and KL to pi_ref of what each offline loss would reach: one row per method and reward.

    Columns: method, reward_function, reward, kl (nats per completion).
    """
    temperature = methods.get("rwr_offline").hyper["temperature"]
    tau = methods.get("ipo_offline").hyper["tau"]
    rows = []
    for name in ("R1", "R2"):
        law = reward_law(name, length)
        mean = law.mass @ law.scores
        deviation = np.sqrt(law.mass @ (law.scores - mean) ** 2)
        reached = {
            "best_of_n_offline": law.best_of(completions),
            "rwr_offline": law.tilted((law.scores - mean) / deviation / temperature),
            "ipo_offline": law.tilted(law.beaten / tau),
        }
        rows += [(method, name, *law.summary(found)) for method, found in reached.items()]
    return pd.DataFrame(rows, columns=["method", "reward_function", "reward", "kl"])


def ipo_floor(completions: int = 10, tau: float = 0.05) -> float:
    """The least that IPO's loss can be on the pairs of N ranked completions.

    No log-ratios give every pair the margin 1 / (2 tau): the least squares solution spaces ranks by
    1 / (tau N), so that a pair d ranks apart has the margin d / (tau N).
    """
    distance = np.arange(1, completions)
    margin, target = distance / (tau * completions), 0.5 / tau
    pairs = completions - distance
    return float((pairs * (margin - target) ** 2).sum() / pairs.sum())


def ipo_optima(tau: float = 0.05, length: int = 9) -> pd.DataFrame:
    """Where IPO's loss is at rest, by whose completions it ranks: pi_ref's or the policy's own.

    Against pairs from a law mu the loss is least at log(pi / pi_ref) = p_mu / tau + constant, p_mu
    the probability of beating a draw from mu. Offline mu = pi_ref; on-policy mu = pi itself.

    Columns: pairs from, reward_function, reward, kl (nats per completion). Chapter: complementary.
    """
    rows = []
    for name in ("R1", "R2"):
        law = reward_law(name, length)
        rows.append(("pi_ref", name, *law.summary(law.tilted(law.beaten / tau))))
        rows.append(("the policy", name, *law.summary(law.self_ranked(tau))))
    return pd.DataFrame(rows, columns=["pairs from", "reward_function", "reward", "kl"])


def peak_distance(reward_function: str, length: int = 9) -> float:
    """KL to pi_ref, in nats, of writing nothing but the reward's peak token."""
    peak = int(reward_table(reward_function).argmax())
    return float(-length * np.log(histogram()[peak]))


def best_of(n: int, reward_function: str, length: int = 9) -> float:
    """Mean reward of the best of `n` draws from pi_ref."""
    law = reward_law(reward_function, length)
    return law.summary(law.best_of(n))[0]


def uniform_reward(reward_function: str, first: int, last: int) -> float:
    """Mean reward of completions whose tokens are uniform on first ... last (inclusive)."""
    return float(reward_table(reward_function)[first : last + 1].mean())


def ipo_moves(completions: int = 10, tau: float = 0.05) -> dict[str, float]:
    """Log-ratios at IPO's optimum, in nats, for a reward without ties: the same for every reward.

    There log pi - log pi_ref = p / tau - log Z with p uniform on (0, 1) under pi_ref, and the best
    of N draws has p = N / (N + 1) in the mean. Returns: forward_kl = KL(pi_ref || pi); margin of
    y_w over y_l, the best and the mean of the others; chosen, the log-ratio of y_w.
    """
    best = completions / (completions + 1)
    others = (completions / 2 - best) / (completions - 1)
    log_z = np.log(tau * np.expm1(1 / tau))
    return {
        "forward_kl": float(log_z - 0.5 / tau),
        "margin": (best - others) / tau,
        "chosen": float(best / tau - log_z),
    }
