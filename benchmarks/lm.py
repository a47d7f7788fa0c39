"""An on-policy DPO step of a language model against TRL's OnlineDPOTrainer.

A step draws 2 completions of exactly 64 tokens for each of 32 prompts, scores them under the
reference, and takes one update. Both sides have the same model (Pythia's architecture, random
weights), prompts, temperature 1, constant-time reward and Adam; the learning rate is 0, so that
the policy stays what it is. Each side runs in processes of its own. On a GPU: `benchmarks.cuda`.
"""

from __future__ import annotations

import gc
import importlib
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from transformers.cache_utils import StaticLayer
from transformers.utils import logging

from benchmarks import Result, Unmeasured
from benchmarks.bandit import Effort, in_processes
from benchmarks.machines import (
    counting,
    free,
    graphs_compiled,
    graphs_skipped,
    most_memory,
    product_peak,
    reset_memory,
    synchronise,
)
from lib.finetune import State, fine_tune
from lib.lm import pairs
from lib.lm.config import LengthRun, length_run
from lib.lm.problem import LengthProblem
from lib.rollouts import Rollout
from lib.timing import Clock

PROMPTS, COMPLETIONS, PROMPT, LENGTH = 32, 2, 32, 64
NEVER = -1  # a token id that no completion has: nothing ends before LENGTH
WARM_UP = 1  # steps that are not counted
ROUNDS, SLOW = 2, 2  # rounds at most; steps of a setting that is far from the others


class Architecture(Protocol):
    """What is asked of a model to be measured: its configuration, and words for its size."""

    size: str
    vocabulary: int

    def config(self) -> PreTrainedConfig: ...


@dataclass(frozen=True)
class Shape:
    """A Pythia architecture: width / 64 heads, feed-forward 4 x width."""

    width: int
    layers: int
    vocabulary: int

    @property
    def size(self) -> str:
        return f"width {self.width}, {self.layers} layers, vocabulary {self.vocabulary}"

    def config(self) -> GPTNeoXConfig:
        return GPTNeoXConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, num_hidden_layers=self.layers,
            num_attention_heads=max(4, self.width // 64), intermediate_size=4 * self.width,
            max_position_embeddings=PROMPT + LENGTH, bos_token_id=None, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip


SHAPES = {"tiny": Shape(128, 4, 2048), "small": Shape(512, 6, 8192)}


@dataclass(frozen=True)
class Measured:
    """What one process found: seconds of each step, of each phase in all, MB at most, FLOPs, the
    peak of products, graphs compiled while it was timed (none, one hopes), and graphs that could
    not be made CUDA graphs. FLOPs are 0 where counting them failed."""

    times: list[float]
    phases: dict[str, float]
    memory: float
    flops: int
    peak: float
    compiled: int = 0
    skipped: int = 0


def prepare(folder: Path, shape: Architecture, device: str = "cpu") -> None:
    """Policy, tokenizer (one word a token) and prompts, as `lib.lm.prepare` lays them out."""
    torch.manual_seed(0)
    with torch.device(device):  # a large model's random numbers take long on a CPU
        AutoModelForCausalLM.from_config(shape.config()).save_pretrained(folder / "policy")
    gc.collect()
    free(device)
    words = {f"w{i}": i for i in range(shape.vocabulary)}
    model = Tokenizer(models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="w0", eos_token="w1", model_max_length=PROMPT + LENGTH
    ).save_pretrained(folder / "policy")
    ids = torch.randint(2, shape.vocabulary, (PROMPTS, PROMPT)).tolist()
    data = pairs.Pairs(ids, [[2]] * PROMPTS, [[2, 3]] * PROMPTS, (1,))
    pairs.save(folder / "pairs.parquet", {split: data for split in pairs.SPLITS})


def at_once() -> None:
    """The turn of a process that need not wait for others."""


def first_token(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward: it takes no time, and hardly ever ties."""
    return [float(ids[0]) for ids in completion_ids]


# --- ours -----------------------------------------------------------------------------------------


class FixedLength(LengthProblem):
    """Completions that do not end early, rewarded by `first_token`."""

    def __init__(self, config: LengthRun, device: str = "cpu"):
        super().__init__(config, device)
        self.reference.eos = torch.tensor([NEVER], device=device)

    def initial_state(self) -> State:
        state = super().initial_state()
        state.policy.eos = self.reference.eos
        return state

    def proxy(self, batch: Rollout) -> Tensor:
        return batch.completions[..., 0].float()


def ours(
    folder: Path, dtype: str, threads: int, steps: int, decoder: str | None = None,
    device: str = "cpu", turn: Callable[[], None] = at_once, _process: int = 0,
) -> Measured:  # fmt: skip
    """Steps of `lib.finetune`: collect and update. On a CPU without those, one in ten, that compute
    anew what others take over from their sampling.

    Args: turn: returns when the device may be used; a decoder is compiled before that.
    """
    torch.set_num_threads(threads)
    count = WARM_UP + steps + 1
    config = length_run(
        "dpo", "min", 0.0, 0, updates=count, minibatch=PROMPTS * COMPLETIONS,
        batch=PROMPTS * COMPLETIONS, max_tokens=LENGTH, label="rule", dtype=dtype,
        prepared=str(folder), decoder=decoder,
    )  # fmt: skip
    if decoder != "compiled":
        turn()
    problem = FixedLength(config, device)
    state = problem.initial_state()
    if decoder == "compiled":
        problem._draw(state.policy, 0)
        free(device)
        turn()
    updates = fine_tune(state, problem, problem.method, config.schedule, config.hyper)
    times = []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            problem.clock.seconds.update(dict.fromkeys(problem.clock.seconds, 0.0))
            reset_memory(device)
            before = graphs_compiled()
        synchronise(device)
        started = perf_counter()
        with problem.clock.measure("training"):
            next(updates)
        synchronise(device)
        times.append(perf_counter() - started)
    memory, phases = most_memory(device), dict(problem.clock.seconds)  # counting FLOPs takes time
    compiled = graphs_compiled() - before
    state.policy.decoder = "growing"  # operations of a compiled step cannot be counted
    flops = 0
    try:
        with counting(device) as counter:
            next(updates)
        flops = counter.get_total_flops()
    except Exception:  # the times are known
        traceback.print_exc()
    return Measured(times[WARM_UP:], phases, memory, flops, product_peak(device, dtype), compiled,
                    graphs_skipped())  # fmt: skip


# --- TRL's ----------------------------------------------------------------------------------------


class Ticks(TrainerCallback):
    """Times the steps of a trainer; counts the FLOPs of the last one.

    Args: begin: called when the model is where it trains. last: called before the last step.
    """

    def __init__(self, clock: Clock, begin: Callable[[], None] = at_once,
                 last: Callable[[], None] = at_once):  # fmt: skip
        self.clock, self.begin, self.last = clock, begin, last
        self.times, self.memory, self.graphs, self.flops = [], 0.0, 0, 0
        self.phases: dict[str, float] = {}
        self.counting = counting(clock.device)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        model.generation_config.eos_token_id = None  # which `train` took from the tokenizer
        self.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        device = self.clock.device
        if state.global_step == WARM_UP:
            self.clock.seconds.update(dict.fromkeys(self.clock.seconds, 0.0))
            reset_memory(device)
            self.graphs = graphs_compiled()
        if state.global_step == state.max_steps - 1:
            self.phases, self.memory = dict(self.clock.seconds), most_memory(device)
            self.graphs = graphs_compiled() - self.graphs
            self.last()
            self.counter = self.counting.__enter__()
        synchronise(device)
        self.started = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronise(self.clock.device)
        self.times.append(perf_counter() - self.started)
        if state.global_step == state.max_steps:
            self.flops = self.counter.get_total_flops()
            self.counting.__exit__(None, None, None)


def theirs(
    folder: Path, dtype: str, threads: int, steps: int, checkpointing: bool = False,
    cache: str | None = None, throughout: bool = False, device: str = "cpu",
    turn: Callable[[], None] = at_once, _process: int = 0,
) -> Measured:  # fmt: skip
    """Steps of `trl.experimental.online_dpo.OnlineDPOTrainer`.

    Args: cache: transformers' implementation; it compiles the decoding step of a "static" one on a
        GPU, here before the `turn` to use the device, and needs `_one_dtype`. throughout: weights,
        gradients and moments in `dtype` as well, not the products alone.
    """
    torch.set_num_threads(threads)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    importlib.import_module("trl.experimental.online_dpo")  # seconds, which need no device
    if cache is None:
        turn()
    clock = Clock(device)
    ticks = Ticks(clock)
    trainer = _trainer(folder, dtype, WARM_UP + steps + 1, checkpointing, ticks, cache, throughout,
                       device)  # fmt: skip
    if cache is not None:
        ticks.begin = partial(_compiled, trainer, device, turn)
        ticks.last = partial(setattr, trainer.generation_config, "disable_compile", True)
    with _timed(trainer, clock), _one_dtype() if cache == "static" else nullcontext():
        try:
            trainer.train()
        except Exception:
            if not ticks.phases:
                raise
            traceback.print_exc()  # in the step that is counted: the times are known
            ticks.counting.__exit__(None, None, None)
    times, phases = ticks.times[WARM_UP : WARM_UP + steps], ticks.phases
    phases["training"] = sum(times) - phases["sampling"] - phases["scoring"]
    return Measured(times, phases, ticks.memory, ticks.flops, product_peak(device, dtype),
                    ticks.graphs, graphs_skipped())  # fmt: skip


@contextmanager
def _one_dtype() -> Iterator[None]:
    """A static cache of transformers 5.23 fails where products are in 16 bits and weights are not:
    rotary positions leave keys in float32, and values are not. Here keys follow the values."""
    update = StaticLayer.update

    def updated(self: StaticLayer, keys: Tensor, values: Tensor, *args: Any, **more: Any) -> Any:
        return update(self, keys.to(values.dtype), values, *args, **more)

    StaticLayer.update = updated
    try:
        yield
    finally:
        StaticLayer.update = update


def _compiled(trainer: Any, device: str, turn: Callable[[], None]) -> None:
    """Generates once, which compiles the decoding step, and waits for the turn."""
    trainer.model.train()  # as it is in a step: a compiled graph holds for one mode
    trainer._generate(trainer.model, trainer.train_dataset["prompt"][:PROMPTS])
    free(device)
    turn()


def _trainer(
    folder: Path, dtype: str, steps: int, checkpointing: bool, ticks: Ticks,
    cache: str | None = None, throughout: bool = False, device: str = "cpu",
) -> Any:  # fmt: skip
    """The trainer with the same prompts and reward, and nothing that it does not need: it prints
    nothing between the lines of the results."""
    warnings.filterwarnings("ignore", module="torch.utils.data")  # no pinned memory on a CPU
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    from datasets import Dataset, disable_progress_bars
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    prompts = [tokenizer.decode(ids) for ids in pairs.load(folder / "pairs.parquet", "train",
                                                           (1,)).prompts]  # fmt: skip
    arguments = OnlineDPOConfig(
        str(folder / "trainer"), learning_rate=0.0, beta=0.1, max_new_tokens=LENGTH,
        max_length=PROMPT + LENGTH, temperature=1.0, per_device_train_batch_size=PROMPTS,
        gradient_checkpointing=checkpointing, bf16=dtype == "bfloat16" and not throughout,
        use_cpu=device == "cpu", max_steps=steps, save_strategy="no", logging_strategy="no",
        report_to=[], disable_tqdm=True, weight_decay=0.0, max_grad_norm=1.0, seed=0,
        cache_implementation=cache,
    )  # fmt: skip
    held = getattr(torch, dtype) if throughout else torch.float32
    trainer = OnlineDPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=held), args=arguments,
        reward_funcs=first_token, train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer, callbacks=[ticks],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.generation_config.eos_token_id = None
    trainer.eos_token_ids = [NEVER]
    return trainer


@contextmanager
def _timed(trainer: Any, clock: Clock) -> Iterator[None]:
    """Generation counts as sampling, forward passes without a gradient as scoring."""
    generate, forward = trainer._generate, trainer._forward

    def timed_generate(*args: Any, **more: Any) -> Any:
        with clock.measure("sampling"):
            out = generate(*args, **more)
        assert out[2].shape == (PROMPTS * COMPLETIONS, LENGTH), f"completions {out[2].shape}"
        assert bool(out[3].all()), "a completion ended early"
        return out

    def timed_forward(*args: Any, **more: Any) -> Any:
        with clock.measure("training" if torch.is_grad_enabled() else "scoring"):
            return forward(*args, **more)

    trainer._generate, trainer._forward = timed_generate, timed_forward
    yield


# --- the comparison -------------------------------------------------------------------------------

SETTINGS: dict[str, Callable[..., Measured]] = {
    "ours float32": partial(ours, dtype="float32"),
    "ours bfloat16": partial(ours, dtype="bfloat16"),
    "ours float32, compiled decoder": partial(ours, dtype="float32", decoder="compiled"),
    "ours bfloat16, compiled decoder": partial(ours, dtype="bfloat16", decoder="compiled"),
    "TRL float32": partial(theirs, dtype="float32"),
    "TRL bfloat16": partial(theirs, dtype="bfloat16"),
    "TRL float32, gradient checkpointing (its default)":
        partial(theirs, dtype="float32", checkpointing=True),
}  # fmt: skip


def settings_here() -> dict[str, Callable[..., Measured]]:
    """SETTINGS, without bfloat16 on a CPU that has none: emulated, it is ten times slower."""
    emulated = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return {name: s for name, s in SETTINGS.items() if not (emulated and "bfloat16" in name)}


def measure(shape: Shape, threads: int, steps: int, rounds: int) -> dict[str, list[Measured]]:
    """Each setting in a fresh process, in turn, so that a busy moment hits all."""
    settings = settings_here()
    found: dict[str, list[Measured]] = {name: [] for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), shape)
        for number in range(rounds):
            for name, setting in settings.items():
                slow = "default" in name  # without a cache
                if slow and number:
                    continue
                work = partial(_work, setting, Path(folder), threads, SLOW if slow else steps)
                found[name] += in_processes(work, 1)
    return found


def _work(
    setting: Callable, folder: Path, threads: int, steps: int, process: int
) -> Measured:
    return setting(folder, threads=threads, steps=steps, _process=process)


def seconds(found: list[Measured]) -> float:
    return median(t for m in found for t in m.times)


def about(found: list[Measured]) -> dict[str, Any]:
    """One setting in numbers: seconds, shares of the phases, memory, FLOPs, share of the peak."""
    first, spent = found[0], seconds(found)
    whole = sum(sum(m.phases.values()) for m in found)
    shares = {k: sum(m.phases[k] for m in found) / whole for k in ("sampling", "scoring",
                                                                    "training")}  # fmt: skip
    top = max(m.peak for m in found)
    return {"seconds": spent, "times": [m.times for m in found], "shares": shares,
            "memory_mb": max(m.memory for m in found), "flops": first.flops,
            "peak_flops_per_second": top, "compiled": sum(m.compiled for m in found),
            "skipped": sum(m.skipped for m in found),
            "share_of_peak": first.flops / spent / top}  # fmt: skip


def described(numbers: dict[str, Any], peak: str = "sgemm") -> str:
    parts = [", ".join(f"{name} {share:.0%}" for name, share in numbers["shares"].items()),
             f"{numbers['memory_mb']:.0f} MB"]  # fmt: skip
    if numbers["flops"]:
        parts.append(f"{numbers['flops'] / 1e9:.1f} GFLOP at {numbers['share_of_peak']:.0%} of the "
                     f"{peak} peak")  # fmt: skip
    return "; ".join([*parts, *graphs(numbers)])


def graphs(numbers: dict[str, Any]) -> list[str]:
    """What went wrong with compiled graphs, if anything did."""
    words = {"compiled": "graphs compiled while it was timed", "skipped": "are no CUDA graphs"}
    return [f"{numbers[name]} {text}" for name, text in words.items() if numbers[name]]


def dpo_step(name: str, threads: int, effort: Effort) -> Iterator[Result | Unmeasured]:
    """Our step in both dtypes against TRL's better one; in float32 also against TRL's in float32
    and TRL's default."""
    shape = SHAPES[name]
    if left_out := SETTINGS.keys() - settings_here().keys():
        yield Unmeasured(f"lm/dpo_step/{name}/bfloat16/threads_{threads}", "this CPU has no "
                         f"bfloat16: {len(left_out)} settings", failed=False)  # fmt: skip
    found = measure(shape, threads, effort.steps, min(ROUNDS, effort.rounds))
    numbers = {setting: about(m) for setting, m in found.items()}
    trl = [s for s in ("TRL float32", "TRL bfloat16") if s in numbers]
    best = min(trl, key=lambda s: numbers[s]["seconds"])
    default = next(s for s in numbers if "default" in s)
    compared = [(setting, best, "") for setting in numbers if setting.startswith("ours")]
    more = {"/float32": "TRL float32", "/default": default}
    compared += [("ours float32", x, suffix) for suffix, x in more.items() if x != best]
    for setting, baseline, suffix in compared:
        mine, other = numbers[setting], numbers[baseline]
        short = setting.removeprefix("ours ").replace(", ", "_").replace(" ", "_")
        yield Result(
            f"lm/dpo_step/{name}/{short}/threads_{threads}{suffix}",
            other["seconds"] / mine["seconds"],
            f"OnlineDPOTrainer ({baseline}; {shape.size}; {described(other)})",
            mine["seconds"], other["seconds"], str(threads), described(mine),
            details={"settings": numbers, "tokens": PROMPTS * COMPLETIONS * LENGTH},
        )  # fmt: skip


BENCHMARKS: dict[str, Callable[[Effort], Iterator[Result | Unmeasured]]] = {
    f"lm/{name}/threads_{threads}": partial(dpo_step, name, threads)
    for name in SHAPES for threads in (1, 2)
}  # fmt: skip
