"""The small worked examples that the chapter draws: one table for each figure. Chapter: theory."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib import losses
from lib.bandit.reference import histogram, reward_table
from lib.divergences import categorical_kl
from lib.theory import contrast, draws, dynamics, identities, regions

START = (0.46, 0.02, 0.22, 0.16, 0.10, 0.04)  # of the example that is followed step by step
TARGET = (0.04, 0.30, 0.30, 0.03, 0.30, 0.03)
SHOWN = (0, 2, 6, 20, 200)  # steps


def logs(*mass: float) -> Tensor:
    """Log-probabilities of a distribution given by its masses.

    Raises: ValueError unless they are positive and sum to 1.
    """
    if min(mass) <= 0 or abs(sum(mass) - 1) > 1e-9:
        raise ValueError(f"masses must be positive and sum to 1, got {mass}")
    return torch.tensor(mass, dtype=torch.float64).log()


def step_by_step(rate: float = 1.0) -> pd.DataFrame:
    """Both objectives on six categories: objective, step, category, p, q, push."""
    start, target, rows = logs(*START), logs(*TARGET), []
    for objective, push in dynamics.OBJECTIVES.items():
        path = dynamics.trajectory(start, target, objective, rate, max(SHOWN))
        for step in SHOWN:
            pushed = push(path[step], target)
            rows += [(objective, step, k + 1, float(path[step, k].exp()), TARGET[k],
                      float(pushed[k])) for k in range(len(START))]  # fmt: skip
    return pd.DataFrame(rows, columns=["objective", "step", "category", "p", "q", "push"])


def push_grid(kl: float = 0.5, points: int = 61) -> pd.DataFrame:
    """Both pushes on a category of mass p with target q, at a given KL(p || q): p, q, pushes."""
    p, q = np.meshgrid(np.linspace(0.005, 0.6, points), np.linspace(0.005, 0.6, points))
    return pd.DataFrame({"p": p.ravel(), "q": q.ravel(), "forward": (q - p).ravel(),
                         "reverse": (p * (np.log(q / p) + kl)).ravel()})  # fmt: skip


def case1_grid(beta: float, points: int = 201) -> pd.DataFrame:
    """Case 1 in the (p, q1) plane with q2 = q1 - beta: p, q1, margin; true where it is positive."""
    p, q1 = np.meshgrid(np.linspace(0.0025, 0.5, points),
                        np.linspace(beta + 1e-6, (1 + beta) / 2, points))  # fmt: skip
    mean = regions.log_mean(torch.tensor(q1), torch.tensor(q1 - beta)).numpy()
    return pd.DataFrame({"beta": beta, "p": p.ravel(), "q1": q1.ravel(),
                         "margin": np.log(p / mean).ravel()})  # fmt: skip


def case23_lines(ratio: float = 0.5, points: int = 200) -> pd.DataFrame:
    """Bounds on q = q1 = q2 against p1, with p2 = ratio p1: the curves of Theorem 5.2's plane.

    always: above it Delta_r > Delta_f whatever the other categories. rises: above it Delta_r > 0.
    mean: I(p1, p2). Also p1, p2 and e p1.
    """
    p1 = torch.linspace(0.002, 0.999 / (1 + ratio), points, dtype=torch.float64)
    p2 = ratio * p1
    return pd.DataFrame({
        "p1": p1, "p2": p2, "e p1": math.e * p1,
        "mean": regions.log_identric(p1, p2).exp(),
        "always": regions.threshold(p1, p2), "rises": regions.threshold(p1, p2, 1.0),
    })  # fmt: skip


def case3_cloud(c1: float = 0.1, n: int = 400, seed: int = 0) -> pd.DataFrame:
    """Random distributions that satisfy case 3's premises for a c1: kl, height = q / I, gap.

    q holds c1 p2 times a random factor on the pair, and p's proportions elsewhere, one of them
    thinned by a random factor, which is what raises KL(p || q).
    """
    generator = torch.Generator().manual_seed(seed)
    p = draws.ordered(draws.distributions(4 * n, 4, generator))
    p = p[(p.exp() > 0.01).all(-1) & (p[:, 0] > p[:, 1])][:n]
    drawn = torch.rand(2, len(p), generator=generator, dtype=torch.float64)
    pair = math.log(c1) + p[:, 1] - 2 * drawn[0]
    rest = (p[:, 2:] - torch.stack([drawn[1] * 60, 0 * drawn[1]], -1)).log_softmax(-1)
    left = torch.log1p(-2 * pair.exp())
    q = torch.cat([pair[:, None], pair[:, None], left[:, None] + rest], -1)
    mean = regions.log_identric(p[:, 0].exp(), p[:, 1].exp())
    return pd.DataFrame({"kl": categorical_kl(p, q), "height": (pair - mean).exp(),
                         "gap": regions.gap(p, q)})  # fmt: skip


def one_token(reward_function: str) -> tuple[Tensor, Tensor]:
    """log pi_ref (100,) of the 1-token bandit, and its rewards (100,), in float64."""
    return torch.from_numpy(histogram()).log(), reward_table(reward_function).double()


def toward_optimum(reward_function: str = "R2", beta: float = 0.2, steps: int = 999,
                   rate: float = 0.3) -> pd.DataFrame:  # fmt: skip
    """KL(pi || pi*) on the 1-token bandit: update, reverse KL descent, weighted likelihood.

    Weights are exp((r - 1) / beta), the rate of either is scaled to its own first gradient.
    """
    ref, reward = one_token(reward_function)
    best, _ = identities.optimal_policy(ref, reward, beta)
    weight = ((reward - 1) / beta).exp()
    pushes = {
        "reverse KL": lambda logp: dynamics.reverse_push(logp, best),
        "weighted likelihood": lambda logp: identities.weighted_likelihood_push(logp, weight),
    }
    found = {"update": np.arange(steps + 1)}
    for name, push in pushes.items():
        logp, scale, kls = ref, rate / push(ref).abs().max(), []
        for _ in range(steps + 1):
            kls.append(float(categorical_kl(logp, best)))
            logp = dynamics.descend(logp, push(logp), float(scale))
        found[name] = kls
    return pd.DataFrame(found)


def lift_grid(points: int = 241) -> pd.DataFrame:
    """The push on y_l and y_w, in the (p_w, p_l) plane: p_w, p_l, and d log p_w by who
    holds the rest: `one` other category, or `four` equal ones."""
    w, l = np.meshgrid(np.linspace(0.002, 0.998, points), np.linspace(0.002, 0.998, points))  # noqa: E741
    rest = 1 - w - l
    pair = w + l - w**2 - l**2
    grid = pd.DataFrame({"p_w": w.ravel(), "p_l": l.ravel(), "one": (pair - rest**2).ravel(),
                         "four": (pair - rest**2 / 4).ravel()})  # fmt: skip
    return grid.where((rest >= 0).ravel()[:, None] | grid.columns.isin(["p_w", "p_l"]))


def freed(mass: tuple[float, ...] = (0.36, 0.22, 0.12, 0.10, 0.08, 0.12),
          rejected: int = 5, preferred: int = 3) -> pd.DataFrame:  # fmt: skip
    """Rates of change of six categories: category, p, by the push on y_l alone, on both.

    In units of what y_l loses. proportional: if what y_l loses were shared in proportion to p.
    """
    logp = logs(*mass)
    alone = contrast.freed_mass(logp, rejected)
    both = contrast.pair_push(logp, preferred, rejected, 1.0, 1.0)
    p = logp.exp()
    both = p * (both - (p * both).sum())
    share = p / (1 - p[rejected])
    share[rejected] = -1.0
    return pd.DataFrame({"category": range(1, len(mass) + 1), "p": p,
                         "alone": alone / -alone[rejected], "pair": both / -both[rejected],
                         "proportional": share})  # fmt: skip


def weights(beta: float = 0.1, tau: float = 0.05) -> pd.DataFrame:
    """The weight c of DPO and of IPO against the margin h, each as a share of that at h = 0."""
    h = torch.linspace(-20, 30, 101, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    dpo, ipo = contrast.dpo_weight(h, beta), contrast.ipo_weight(h, tau)
    return pd.DataFrame({"margin": h, "DPO": dpo / contrast.dpo_weight(zero, beta),
                         "IPO": ipo / contrast.ipo_weight(zero, tau)})  # fmt: skip


def rest_gradients(n: int = 12, beta: float = 0.1, tau: float = 0.05, seed: int = 0) -> dict:
    """The largest gradient of the population losses at the optima claimed for them, by autograd.

    Noisy preferences between n completions: Bradley-Terry for DPO, whose optimum is r / beta, any
    for IPO, whose optimum is `contrast.ipo_rest`. moved: the furthest that each parts two of them.
    """
    generator = torch.Generator().manual_seed(seed)
    reward, mu = torch.rand(2, n, generator=generator, dtype=torch.float64)
    mu = mu / mu.sum()
    draw = torch.rand(n, n, generator=generator, dtype=torch.float64).triu(1)
    prefer = draw + (1 - draw.T).tril(-1) + torch.eye(n, dtype=torch.float64) / 2
    seen = mu[:, None] * mu * (1 - torch.eye(n, dtype=torch.float64))
    cases = {
        "DPO": (losses.dpo, reward / beta, torch.sigmoid(reward[:, None] - reward), beta),
        "IPO": (losses.ipo, contrast.ipo_rest(prefer, mu, tau), prefer, tau),
    }
    found = {}
    for name, (loss, ratio, wins, hyper) in cases.items():
        leaf = ratio.clone().requires_grad_()
        value = loss(leaf, torch.zeros_like(leaf), wins * seen, hyper)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        found[name] = {"gradient": float(gradient.abs().max()),
                       "moved": float(ratio.max() - ratio.min())}  # fmt: skip
    return found


def resting(n: int = 8, tau: float = 0.05) -> pd.DataFrame:
    """IPO's optimum on n ranked completions, by which pairs it sees: rank, log-ratio to the worst.

    Columns: rank (0 is the worst), "all pairs", "neighbours only"; nats.
    """
    below = torch.tril(torch.ones(n, n, dtype=torch.float64), -1)
    everyone = contrast.ipo_rest(below + torch.eye(n) / 2, torch.full((n,), 1 / n).double(), tau)
    chain = contrast.pair_rest(torch.diag(torch.ones(n - 1, dtype=torch.float64), -1), tau)
    return pd.DataFrame({"rank": range(n), "all pairs": everyone - everyone[0],
                         "neighbours only": chain - chain[0]})  # fmt: skip
