"""One fine-tuning run of a language model as a frozen configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from lib import methods
from lib.allowed import LATER, check_fields
from lib.finetune import Schedule, exact_div
from lib.lm.length import GIVEN, TASKS, check_task

TINY = Path(__file__).parents[2] / "data" / "length"
PREPARED = Path(__file__).parents[2] / ".prepared"  # of the larger presets, made where they run
PRESETS = ("smollm2", "pythia")
LABELS = ("learned", "rule")
DTYPES = ("float32", "bfloat16", "float16")
DECODERS = (None, "growing", "static", "compiled")
MINIBATCH = 64  # M, completions of one update (Table 4)

# Fields that override a hyperparameter of the method; None keeps the method's default.
HYPER = ("beta", "tau", "temperature", "clip", "top_k", "standardise", "weights", "kl_start",
         "kl_target", "value_weight", "lam", "margin_over")  # fmt: skip


@dataclass(frozen=True)
class LengthRun:
    """A run of one method on a length problem (section 3.2, appendices F, G, J).

    Args:
        method: a name of `lib.methods.METHODS`.
        task: "min" (shorter is better), "mode" (nearer the reference policy's mean length is),
            "skew" (as min, but the preference data are cut short), "given" (preferences of your
            own: the reported reward is then the proxy, since no rule says what is better).
        learning_rate: of Adam.
        seed: of prompts, samples, data order and evaluation.
        label: "learned" (a reward model's score is the training reward) or "rule" (the gold one).
        completions: C, completions of a prompt. batch: B, completions of one sampling. minibatch:
            M, of one update. inner_steps: T, passes over one sampling. iterations: samplings.
            Offline methods have one iteration, whose batch is all the data they see.
        evaluations: rows of the result table after the one at update 0. prompts: validation
            prompts of an evaluation.
        prepared: "tiny", which is shipped, one of PRESETS (in `.prepared/`), or a folder that
            `lib.lm.prepare` made of a policy and prompts of your own: reference policy, pairs and
            reward models.
        max_tokens: cap of a completion, EOS included. sampling_temperature: of completions.
        dtype: of the matrix products, and of matrices that do not train; weights that train are
            float32 in either case.
        beta ... lam, margin_over: hyperparameters of the method, None for its default
            (margin_over: see `lib.bandit.config.BanditRun`).
        lora_rank: train matrices of this rank beside every linear layer (LoRA) in place of the
            weights; None trains the weights.
        checkpointing: keep each layer's input for the backward pass, and compute the rest again.
        decoder: how keys and values are kept while sampling (`lib.lm.decode`), None for the
            device's own.
        held_out: validation pairs whose log-probabilities an evaluation follows.
    Raises: ValueError that names the value and the allowed ones.
    """

    method: str
    task: str
    learning_rate: float
    seed: int
    label: str = "learned"
    completions: int = 1
    batch: int = MINIBATCH
    minibatch: int = MINIBATCH
    inner_steps: int = 1
    iterations: int = 100
    evaluations: int = 20
    prompts: int = 64
    prepared: str = "tiny"
    max_tokens: int = 96
    sampling_temperature: float = 1.0
    dtype: str = "float32"
    clip_norm: float = 1.0
    beta: float | None = None
    tau: float | None = None
    temperature: float | None = None
    clip: float | None = None
    top_k: int | None = None
    standardise: str | None = None
    weights: str | None = None
    kl_start: float | None = None
    kl_target: float | None = None
    value_weight: float | None = None
    lam: float | None = None
    lora_rank: int | None = field(default=None, metadata=LATER)
    checkpointing: bool = field(default=False, metadata=LATER)
    decoder: str | None = field(default=None, metadata=LATER)
    held_out: int = field(default=64, metadata=LATER)
    margin_over: str | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        method = methods.get(self.method)
        check_task(self.task)
        choices = {"label": LABELS, "dtype": DTYPES, "decoder": DECODERS}
        check_fields(self, choices, self._ranges())
        if self.task == GIVEN and self.label == "rule":
            raise ValueError("preferences that were given follow no rule: label must be 'learned'")
        over = method.resolve(self.overrides).get("standardise")
        if over == "prompt" and self.completions < 2:
            raise ValueError("one reward has no standard deviation: completions must be at least 2 "
                             "(or standardise='batch')")  # fmt: skip
        if over in ("batch", "running") and self.batch < 2:
            raise ValueError("one reward has no standard deviation: batch must be at least 2")
        if "pairs" in method.needs and self.completions < 2:
            raise ValueError(f"{self.method} learns from pairs: completions must be at least 2, "
                             f"got {self.completions}")  # fmt: skip
        if not method.on_policy and (self.iterations, self.inner_steps) != (1, 1):
            raise ValueError(f"{self.method} is offline: iterations and inner_steps must be 1, "
                             f"got {self.iterations} and {self.inner_steps}")  # fmt: skip
        if not method.on_policy and self.completions != 2:
            raise ValueError(f"{self.method} is offline and the data are pairs: completions must "
                             f"be 2, got {self.completions}")  # fmt: skip
        self.schedule  # noqa: B018 (its own checks)

    def _ranges(self) -> dict[str, tuple[float, float]]:
        ranges = {
            "learning_rate": (0.0, 10.0),
            "seed": (0, 2**31 - 1),
            "completions": (1, 1000),
            "evaluations": (1, 10_000),
            "prompts": (1, 100_000),
            "held_out": (1, 100_000),
            "max_tokens": (1, 100_000),
            "sampling_temperature": (1e-3, 100.0),
            "clip_norm": (1e-6, float("inf")),
        }
        if self.top_k is not None:
            ranges["top_k"] = (1, self.completions)
        if self.lora_rank is not None:
            ranges["lora_rank"] = (1, 10_000)
        return ranges

    @property
    def called(self) -> str:
        """What a reader of a progress bar knows it by."""
        return f"{self.method}@{self.task}"

    @property
    def overrides(self) -> dict[str, Any]:
        """The method hyperparameters that this run sets itself."""
        return {name: v for name in HYPER if (v := getattr(self, name)) is not None}

    @property
    def hyper(self) -> dict[str, Any]:
        return methods.get(self.method).resolve(self.overrides)

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            iterations=self.iterations, batch=self.batch, minibatch=self.minibatch,
            completions=self.completions, inner_steps=self.inner_steps,
        )  # fmt: skip

    @property
    def updates(self) -> int:
        return self.schedule.updates

    @property
    def sets(self) -> int:
        """B as a multiple of M: minibatches drawn at once."""
        return self.schedule.minibatches

    @property
    def folder(self) -> Path:
        """Where policy, pairs and reward models lie."""
        return prepared_folder(self.prepared)

    @property
    def policy_folder(self) -> Path:
        return self.folder / "policy"

    @property
    def pairs_file(self) -> Path:
        return self.folder / "pairs.parquet"

    @property
    def reward_folder(self) -> Path:
        return self.folder / f"reward-{self.task}"

    @property
    def points(self) -> list[int]:
        """The updates that get a row: 0 and `evaluations`, evenly to the last."""
        points = np.linspace(0, self.updates, min(self.updates, self.evaluations) + 1)
        return sorted({int(round(p)) for p in points})

    def data_files(self) -> tuple[Path, ...]:
        """The files that the run reads: part of its identity.

        Tokenizer and generation config say which tokens end a response. The shipped policy's do
        not count: runs of it were published without.
        """
        files = [*weights(self.policy_folder), self.pairs_file]
        if self.label == "learned":
            files += weights(self.reward_folder)
        if self.prepared != "tiny":
            files += model_files(self.policy_folder)
        return tuple(files)


def prepared_folder(name: str) -> Path:
    """The folder of a preset, or a folder by its path."""
    return {"tiny": TINY, **{p: PREPARED / p for p in PRESETS}}.get(name, Path(name).expanduser())


def prepared_tasks(name: str) -> tuple[str, ...]:
    """The tasks that a prepared folder has reward models for; all rules if it is not there yet."""
    folder = prepared_folder(name)
    if not folder.is_dir():
        return TASKS
    return tuple(t for t in (*TASKS, GIVEN) if (folder / f"reward-{t}").is_dir())


def weights(folder: Path) -> list[Path]:
    """The files of a model. Raises: FileNotFoundError if there is none."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"no .safetensors in {folder}: prepare it with lib.lm.prepare")
    return [*found, folder / "config.json"]


def weight_bytes(folder: Path) -> int:
    """How large a model is on disk; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def parameters(folder: Path) -> int:
    """How many numbers the weights of a model on disk are; 0 where there is none."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as stored:
            count += sum(prod(stored.get_slice(name).get_shape()) for name in [*stored.keys()])
    return count


def model_files(folder: Path) -> list[Path]:
    """All that is read of a model's folder: weights, configurations and tokenizer."""
    from lib.lm.models import FILES  # with transformers, which takes seconds to import

    found = {file for pattern in FILES for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def length_run(
    method: str, task: str, learning_rate: float, seed: int, *, updates: int = 100,
    batch: int | None = None, inner_steps: int = 1, run: type[LengthRun] = LengthRun,
    **options: Any,
) -> LengthRun:  # fmt: skip
    """A `LengthRun` of `updates` updates, with the completions that the method needs by default.

    A larger B or T means fewer samplings, not more updates. C is 4 for best-of-N, 2 for pairs, and
    1 for the others (Tables 8 to 10).
    Args: batch: B, one minibatch by default. run: its class, for problems with fields of their own.
    Raises: ValueError if `updates` is not a multiple of the updates on one sampling, or for an
        option that is no field of a run.
    """
    entry, known = methods.get(method), run.__dataclass_fields__.keys()
    if unknown := options.keys() - known:
        raise ValueError(f"unknown option {sorted(unknown)}; choose from {sorted(known)}")
    minibatch = options.get("minibatch", MINIBATCH)
    if not entry.on_policy:
        options |= {"completions": 2, "iterations": 1, "batch": updates * minibatch}
        return run(method, task, learning_rate, seed, **options)
    default = {"selected": 4, "pair": 2}.get(entry.unit, 1)
    options.setdefault("completions", default)
    batch = minibatch if batch is None else batch
    steps = exact_div(batch, minibatch, "batch in minibatches") * inner_steps
    options.setdefault("iterations", exact_div(updates, steps, f"{updates} updates in samplings"))
    return run(
        method, task, learning_rate, seed, batch=batch, inner_steps=inner_steps, **options
    )
