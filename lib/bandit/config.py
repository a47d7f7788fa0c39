"""One bandit run as a frozen configuration: every field is part of the run's identity."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lib import methods
from lib.allowed import LATER, check_fields
from lib.finetune import Schedule, exact_div

VOCABULARY = 100
REWARD_FUNCTIONS = {"R1": 70, "R2": 20}  # the token at which each one peaks (appendix I.1)
LEARNING_RATES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5)  # appendix I.3

DATA = Path(__file__).parents[2] / "data" / "bandit"

PROVIDES = frozenset(methods.NEEDS) - {"value_head"}

# Where the paper's text and its released code part; the first of each is this book's choice.
CONVENTIONS: dict[str, tuple[Any, ...]] = {
    "length": (9, 10, 1),
    "histogram": ("squashed", "clipped"),
    "reward_over": ("response", "prompt_and_response"),
    "shift": (True, False),
}
# Fields that override a hyperparameter of the method; None keeps the method's default.
HYPER = ("beta", "tau", "temperature", "clip", "threshold", "top_k", "gap", "standardise",
         "weights", "ratio_over", "kl_penalty", "margin_over")  # fmt: skip


def reference_file(histogram: str, seed: int) -> Path:
    """The file of the network fitted to a histogram from an initialisation."""
    return DATA / f"reference-{histogram}-{seed}.safetensors"


@dataclass(frozen=True)
class BanditRun:
    """A run of one method on the didactic bandit (paper section 3.2, appendix I).

    Args:
        method: a name of `lib.methods.METHODS`.
        reward_function: "R1" (peak in an unlikely region of pi_ref) or "R2" (in a likely one).
        learning_rate: of Adam.
        seed: of prompts, samples and evaluation.
        prompts: distinct prompts, each a single token.
        completions: C = N, completions of a prompt in one minibatch.
        sets: k; one sampling draws k sets of C completions for every prompt: B = prompts * C * k.
        inner_steps: T, passes over one sampling. Offline methods: all their updates.
        iterations: samplings; always 1 for offline methods, which draw once, from pi_ref.
        evaluations: rows of the result table after the one at update 0.
        beta ... kl_penalty, margin_over: hyperparameters of the method, None for its default.
            With margin_over="token" DPO and IPO compare tokens at one place of two completions,
            and IPO has tau inside its square (`lib.losses.ipo_token`).
        length: completion tokens. histogram: how Cauchy(-0.7, 0.4) is brought into (-1, 1).
        reward_over: what the training reward is the mean over. shift: score token t with the
            logits before it. dropout: in training, the released code's 0.1. reference_dropout: in
            the reference, whose log-probabilities are then other ones at every update.
        reference_seed: of the network fitted to the histogram.
        held_out: whether y_w and y_l of held-out prompts are followed as well.
        alone: train by itself and not in a stack, so that its seconds are those of one run.
    Raises: ValueError that names the value and the allowed ones.
    """

    method: str
    reward_function: str
    learning_rate: float
    seed: int
    prompts: int = 10
    completions: int = 10
    sets: int = 1
    inner_steps: int = 1
    iterations: int = 100
    evaluations: int = 25
    beta: float | None = None
    tau: float | None = None
    temperature: float | None = None
    clip: float | None = None
    threshold: float | None = None
    top_k: int | None = None
    gap: float | None = None
    standardise: str | None = None
    weights: str | None = None
    ratio_over: str | None = None
    kl_penalty: float | None = None
    length: int = 9
    histogram: str = "squashed"
    reward_over: str = "response"
    shift: bool = True
    dropout: float = 0.0
    reference_seed: int = 0
    held_out: bool = True
    alone: bool = False
    margin_over: str | None = field(default=None, metadata=LATER)
    reference_dropout: float = field(default=0.0, metadata=LATER)

    def __post_init__(self) -> None:
        method = methods.get(self.method)
        if lacking := method.needs - PROVIDES:
            raise ValueError(f"the bandit has no {sorted(lacking)}, which {self.method} needs")
        choices = {"reward_function": REWARD_FUNCTIONS, **CONVENTIONS}
        check_fields(self, choices, self._ranges())
        method.resolve(self.overrides)
        if self.length == 10 and not self.shift:
            raise ValueError("shift=False reads the last token too: length must be 9 or 1, got 10")
        if self.reference_dropout and not ("reference" in method.needs or self.kl_penalty):
            raise ValueError(f"{self.method} reads no reference: reference_dropout must be 0, "
                             f"got {self.reference_dropout}")  # fmt: skip
        if not method.on_policy and (self.iterations, self.sets) != (1, 1):
            raise ValueError(
                f"{self.method} is offline: iterations and sets must be 1 "
                f"(inner_steps counts its updates), got {self.iterations} and {self.sets}"
            )
        self.schedule  # noqa: B018 (its own checks)

    def _ranges(self) -> dict[str, tuple[float, float]]:
        ranges = {
            "learning_rate": (0.0, 10.0),
            "seed": (0, 2**31 - 1),
            "prompts": (1, VOCABULARY),
            "completions": (2, 1000),
            "sets": (1, 1000),
            "evaluations": (1, 10_000),
            "dropout": (0.0, 0.9),
            "reference_dropout": (0.0, 0.9),
            "reference_seed": (0, 2**31 - 1),
        }
        if self.top_k is not None:
            ranges["top_k"] = (1, self.completions)
        return ranges

    @property
    def overrides(self) -> dict[str, Any]:
        """The method hyperparameters that this run sets itself."""
        return {name: v for name in HYPER if (v := getattr(self, name)) is not None}

    @property
    def hyper(self) -> dict[str, Any]:
        return methods.get(self.method).resolve(self.overrides)

    @property
    def schedule(self) -> Schedule:
        minibatch = self.prompts * self.completions
        return Schedule(
            iterations=self.iterations,
            batch=minibatch * self.sets,
            minibatch=minibatch,
            completions=self.completions,
            inner_steps=self.inner_steps,
        )

    @property
    def updates(self) -> int:
        return self.schedule.updates

    @property
    def reference_file(self) -> Path:
        """Where the fitted reference network is shipped, if it is."""
        return reference_file(self.histogram, self.reference_seed)

    def data_files(self) -> tuple[Path, ...]:
        """The shipped files that the run reads: part of its identity."""
        return (self.reference_file,) if self.reference_file.exists() else ()

    @property
    def stack_key(self) -> tuple:
        """Runs that agree on this can be trained as one stack; the other fields vary by run."""
        free = () if self.alone else ("learning_rate", "seed", "reward_function")
        return tuple((f.name, getattr(self, f.name)) for f in fields(self) if f.name not in free)


def bandit_run(
    method: str, reward_function: str, learning_rate: float, seed: int, *, updates: int = 100,
    **options,
):  # fmt: skip
    """A `BanditRun` of 100 updates: one sampling for offline methods, 100 for on-policy ones.

    With `sets` = k there are 100 / k samplings: the same updates and completions for every k.
    Raises: ValueError if `updates` is not a multiple of k.
    """
    if methods.get(method).on_policy and "iterations" not in options:
        sets = options.get("sets", 1)
        options["iterations"] = exact_div(updates, sets, f"{updates} updates in sets")
    elif not methods.get(method).on_policy:
        options = {"iterations": 1, "inner_steps": updates, **options}
    return BanditRun(method, reward_function, learning_rate, seed, **options)
