"""The reference policy: a histogram of Cauchy samples, and the network fitted to it."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.bandit.config import DATA, REWARD_FUNCTIONS, VOCABULARY, reference_file
from lib.bandit.network import GPT_NANO, Parameters, logits
from lib.divergences import categorical_kl

LOCATION, SCALE, DRAWS = -0.7, 0.4, 10_000  # appendix I.1
FIT_STEPS, FIT_RATE = 400, 0.01  # Adam at 0.01 (appendix I.3)


def histogram(kind: str = "squashed") -> np.ndarray:
    """Token probabilities of the reference policy: (100,), appendix I.1 and Figure 2.

    10,000 draws of Cauchy(-0.7, 0.4) are brought into (-1, 1), by tanh ("squashed", the released
    code) or by clipping ("clipped", the text), and counted in 100 equal bins. Tokens that never
    came up get half a count, so that no log-probability is infinite.
    """
    draws = LOCATION + SCALE * np.random.default_rng(0).standard_cauchy(DRAWS)
    inside = {"squashed": np.tanh, "clipped": lambda x: np.clip(x, -1, 1)}[kind](draws)
    counts, _ = np.histogram(inside, bins=VOCABULARY, range=(-1, 1))
    counts = np.maximum(counts, 0.5)
    return counts / counts.sum()


def reward_table(reward_function: str) -> Tensor:
    """exp(-((a - peak) / 10)^2) for every token: (100,), appendix I.1."""
    tokens = torch.arange(VOCABULARY, dtype=torch.float64)
    return torch.exp(-(((tokens - REWARD_FUNCTIONS[reward_function]) / 10) ** 2)).float()


def fit(kind: str = "squashed", seed: int = 0) -> tuple[Parameters, list[float]]:
    """Fits GPT-nano to the histogram at every position: min KL(histogram || pi), Adam at 0.01.

    Prefixes are drawn from the histogram; the rate decays linearly to 0, since at a constant 0.01
    the fit keeps jumping. Returns the parameters of one run and the loss per step in nats a token.
    """
    target = torch.tensor(histogram(kind), dtype=torch.float32)
    parameters = {k: v[None].requires_grad_() for k, v in GPT_NANO.initial(seed).items()}
    optimiser = torch.optim.Adam(parameters.values(), lr=FIT_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, FIT_STEPS)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(FIT_STEPS):
        shape = (1, VOCABULARY, GPT_NANO.context)
        tokens = torch.multinomial(target, VOCABULARY * GPT_NANO.context, True,
                                   generator=generator).view(shape)  # fmt: skip
        tokens[0, :, 0] = torch.arange(VOCABULARY)  # every context once
        loss = categorical_kl(target.log(), logits(parameters, tokens).log_softmax(-1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return {k: v.detach() for k, v in parameters.items()}, losses


@cache
def load(kind: str = "squashed", seed: int = 0) -> Parameters:
    """The fitted reference network: shipped with the book, or fitted now for another seed.

    Returns: parameters with a leading run dimension of 1.
    """
    file = reference_file(kind, seed)
    return load_file(file) if file.exists() else fit(kind, seed)[0]


def ship() -> None:
    """Fits and stores the networks that the book ships: `python -m lib.bandit.reference`."""
    DATA.mkdir(parents=True, exist_ok=True)
    for kind in ("squashed", "clipped"):
        parameters, losses = fit(kind)
        save_file(parameters, reference_file(kind, 0), metadata={"histogram": kind, "seed": "0",
                  "kl_nats_per_token": f"{np.mean(losses[-10:]):.2e}"})  # fmt: skip
        print(f"{kind}: KL(histogram || pi_ref) {np.mean(losses[-10:]):.2e} nats a token")


if __name__ == "__main__":
    ship()
