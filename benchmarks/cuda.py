"""On a GPU: the on-policy DPO step of `benchmarks.lm` against TRL's trainer, and decoding alone.

Decoding is compared with transformers' generate and with what the memory allows: a step cannot be
faster than its weights, keys and values can be read. Architectures of the book's larger presets,
with random weights.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from benchmarks import Result, Unmeasured
from benchmarks.bandit import Effort
from benchmarks.lm import (
    COMPLETIONS,
    LENGTH,
    NEVER,
    PROMPTS,
    Architecture,
    about,
    at_once,
    described,
    graphs,
    ours,
    prepare,
    theirs,
)
from benchmarks.machines import (
    copy_peak,
    free,
    graphs_compiled,
    graphs_skipped,
    label,
    most_memory,
    reset_memory,
    synchronise,
)
from benchmarks.turns import Lost, in_turn
from lib.lm.models import load_policy
from lib.lm.network import Network
from lib.lm.policy import Scorer, has_dtype
from lib.lm.sampler import keys_and_values

ROWS, PROMPT, NEW = 64, 64, 128  # of decoding alone: completions, tokens of a prompt, new ones
STEPS, SLOW = 5, 3  # timed, of what is compiled and of what is not: a GPU's time hardly varies
POSITIONS = 2048


@dataclass(frozen=True)
class Preset:
    """A preset's architecture. Args: make: its class of configuration. options: of it."""

    size: str
    make: type[PreTrainedConfig]
    options: Mapping[str, Any]

    @property
    def vocabulary(self) -> int:
        return self.options["vocab_size"]

    def config(self) -> PreTrainedConfig:
        return self.make(
            **self.options, max_position_embeddings=POSITIONS, bos_token_id=None,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip


PRESETS: dict[str, Preset] = {
    "smollm2": Preset("SmolLM2-135M", LlamaConfig, {
        "vocab_size": 49_152, "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "tie_word_embeddings": True,
    }),
    "pythia": Preset("Pythia-1.4B", GPTNeoXConfig, {
        "vocab_size": 50_304, "hidden_size": 2048, "num_hidden_layers": 24,
        "num_attention_heads": 16, "intermediate_size": 8192, "use_parallel_residual": True,
        "rotary_pct": 0.25, "tie_word_embeddings": False,
    }),
}  # fmt: skip


# --- decoding alone -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """Seconds of each sampling, MB at most, bytes that a step must read, bytes a second of a copy,
    graphs compiled while it was timed, and graphs that could not be made CUDA graphs."""

    times: list[float]
    memory: float
    read: float
    bandwidth: float
    compiled: int
    skipped: int


def decode_ours(
    folder: Path, decoder: str, steps: int, threads: int, device: str = "cpu",
    turn: Callable[[], None] = at_once,
) -> Decoded:  # fmt: skip
    """The loop's decoders, with float32 weights that are cast at the start of every sampling."""
    torch.set_num_threads(threads)
    if decoder != "compiled":
        turn()
    model, _ = load_policy(folder / "policy", device=device)
    scorer = Scorer(Network(model, dtype="bfloat16"), (NEVER,), 0, decoder=decoder, longest=PROMPT)
    prompts = _prompts(model)
    numbers = torch.rand(ROWS, NEW, device=device)

    def draw() -> Tensor:
        return scorer.sample(prompts, torch.ones_like(prompts).bool(), numbers).completions

    return _decoded(model, draw, steps, device, turn if decoder == "compiled" else at_once)


def decode_theirs(
    folder: Path, steps: int, threads: int, device: str = "cpu",
    turn: Callable[[], None] = at_once,
) -> Decoded:  # fmt: skip
    """transformers' generate, all in bfloat16; it compiles its step on a GPU."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.bfloat16)
    model = model.to(device).eval()
    prompts = _prompts(model)
    how = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW, pad_token_id=0,
        cache_implementation="static",
    )  # fmt: skip

    def draw() -> Tensor:
        mask = torch.ones_like(prompts)
        return model.generate(prompts, attention_mask=mask, generation_config=how)[:, PROMPT:]

    return _decoded(model, draw, steps, device, turn)


def _prompts(model: PreTrainedModel) -> Tensor:
    return torch.randint(2, model.config.vocab_size, (ROWS, PROMPT), device=model.device)


def _decoded(
    model: PreTrainedModel, draw: Callable[[], Tensor], steps: int, device: str,
    turn: Callable[[], None],
) -> Decoded:  # fmt: skip
    """One sampling before the turn, which compiles, one after it, and `steps` that are timed."""
    draw()
    free(device)
    turn()
    draw()
    reset_memory(device)
    before, times = graphs_compiled(), []
    for _ in range(steps):
        synchronise(device)
        started = perf_counter()
        completions = draw()
        synchronise(device)
        times.append(perf_counter() - started)
        assert completions.shape == (ROWS, NEW), f"completions {tuple(completions.shape)}"
    memory, compiled = most_memory(device), graphs_compiled() - before
    return Decoded(times, memory, bytes_of_a_step(model), copy_peak(device), compiled,
                   graphs_skipped())  # fmt: skip


def bytes_of_a_step(model: PreTrainedModel) -> float:
    """What a decoding step reads at least, in 16 bits: every weight but an embedding that is no
    head as well, and the keys and values so far, at their mean length."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(p.numel() for p in model.parameters())
    weights -= 0 if embedding is head else embedding.numel()
    return 2 * (weights + ROWS * (PROMPT + NEW / 2) * keys_and_values(model.config))


def decoding(folder: Path, device: str) -> dict[str, Callable[..., Decoded]]:
    """Decoding's settings, the baseline first."""
    of = partial(decode_ours, folder, threads=1, device=device)
    compiled = "compiled" if device == "cuda" else "static"
    return {
        GENERATE: partial(decode_theirs, folder, steps=STEPS, threads=1, device=device),
        f"decode {compiled}": partial(of, compiled, STEPS),
        "decode growing": partial(of, "growing", SLOW),
    }


GENERATE = "decode transformers"


# --- the step -------------------------------------------------------------------------------------

DYNAMIC, STATIC = "TRL bfloat16", "TRL bfloat16, static cache (mended)"
THROUGHOUT = "TRL bfloat16 throughout, static cache"
DEFAULT = "TRL bfloat16, gradient checkpointing (its default)"
BEST = (DYNAMIC, STATIC, DEFAULT)  # float32 weights and moments, as ours


def stepping(folder: Path, device: str, small: bool) -> dict[str, Callable[..., Any]]:
    """The step's settings. Who holds most memory while waiting comes early; `small`: all of them.
    """
    of = {"folder": folder, "threads": 1, "device": device}
    compiled = "compiled" if device == "cuda" else "static"
    trl, mine = partial(theirs, dtype="bfloat16", **of), partial(ours, **of)
    settings = {
        THROUGHOUT: partial(trl, steps=STEPS, cache="static", throughout=True),
        STATIC: partial(trl, steps=STEPS, cache="static"),
        DYNAMIC: partial(trl, steps=SLOW),
        DEFAULT: partial(trl, steps=SLOW, checkpointing=True),
        f"ours bfloat16, {compiled}": partial(mine, dtype="bfloat16", steps=STEPS,
                                              decoder=compiled),
        "ours bfloat16, growing": partial(mine, dtype="bfloat16", steps=SLOW, decoder="growing"),
        f"ours float32, {compiled}": partial(mine, dtype="float32", steps=STEPS, decoder=compiled),
    }  # fmt: skip
    large = [name for name in settings if small or (name != DEFAULT and "float32" not in name)]
    return {name: settings[name] for name in large}


# --- the comparison -------------------------------------------------------------------------------

Turns = Callable[[Mapping[str, Callable[..., Any]], Callable[[], None]], Iterator[tuple[str, Any]]]


def compare(
    name: str, shape: Architecture, device: str = "cuda", small: bool = True,
    turns: Turns = in_turn,
) -> Iterator[Result | Unmeasured]:  # fmt: skip
    """A line for each setting as soon as it is measured; TRL's come before ours.

    Args: small: whether the model is, so that slow settings take little time.
    """
    measured: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        settings = {**decoding(folder, device), **stepping(folder, device, small)}
        for setting, found in turns(settings, partial(prepare, folder, shape, device)):
            if isinstance(found, Lost):
                part = "decode" if setting.startswith("decode") else "dpo_step"
                yield Unmeasured(f"lm/{part}/{name}/{device}/{_short(setting)}", str(found))
            elif setting.startswith("decode"):
                measured[setting] = _decoding_about(found)
                yield _decoding_line(name, shape, device, setting, measured)
            else:
                measured[setting] = about([found])
                yield from _step_lines(name, shape, device, setting, measured)


def _short(setting: str) -> str:
    """A setting as part of a name."""
    words = setting.removeprefix("ours ").removeprefix("decode ").partition(" (")[0]
    return words.replace(", ", "_").replace(" ", "_")


def _decoding_about(found: Decoded) -> dict[str, Any]:
    spent = median(found.times)
    limit = NEW * found.read / found.bandwidth
    return {"seconds": spent, "times": found.times, "memory_mb": found.memory,
            "tokens_per_second": ROWS * NEW / spent, "bytes_of_a_step": found.read,
            "copy_bytes_per_second": found.bandwidth, "limit_seconds": limit,
            "share_of_limit": limit / spent, "compiled": found.compiled,
            "skipped": found.skipped}  # fmt: skip


def _decoding_line(
    name: str, shape: Architecture, device: str, setting: str, measured: dict[str, dict[str, Any]]
) -> Result:
    """Against transformers' generate; that itself, or what there is without it, against the limit.
    """
    mine = measured[setting]
    where = (f"{mine['share_of_limit']:.0%} of the speed at which memory can be read "
             f"({mine['bytes_of_a_step'] / 1e9:.3g} GB a step at "
             f"{mine['copy_bytes_per_second'] / 1e9:.0f} GB/s); {mine['tokens_per_second']:.0f} "
             f"tokens/s; {mine['memory_mb']:.0f} MB")  # fmt: skip
    where = "; ".join([where, *graphs(mine)])
    baseline, theirs = "what its memory allows", mine["limit_seconds"]
    if setting != GENERATE and GENERATE in measured:
        baseline = "transformers' generate (bfloat16, static cache, compiled on a GPU)"
        theirs = measured[GENERATE]["seconds"]
    work = f"{shape.size}, {ROWS} rows, {NEW} new tokens after {PROMPT}"
    return Result(
        f"lm/decode/{name}/{device}/{_short(setting)}", theirs / mine["seconds"],
        f"{baseline} ({work})", mine["seconds"], theirs, label(device, 1), where, details=mine,
    )  # fmt: skip


def _step_lines(
    name: str, shape: Architecture, device: str, setting: str, measured: dict[str, dict[str, Any]]
) -> Iterator[Result | Unmeasured]:
    """TRL's setting against the first of them that was measured; ours against its best one, and in
    lines of their own against those that a reader may take instead: with the cache as released,
    the default, and without float32 weights."""
    start = f"lm/dpo_step/{name}/{device}/{_short(setting)}"
    known = [other for other in measured if other.startswith("TRL")]
    best = min((s for s in known if s in BEST), key=lambda s: measured[s]["seconds"], default=None)
    if not setting.startswith("ours"):
        baselines = {"": known[0]}
    elif best is None:
        yield Unmeasured(start, f"nothing of TRL's to compare with; {measured[setting]}")
        return
    else:
        more = {"/dynamic": DYNAMIC, "/default": DEFAULT, "/throughout": THROUGHOUT}
        more = {end: other for end, other in more.items() if other in known and other != best}
        baselines = {"": best, **more}
    mine = measured[setting]
    for end, baseline in baselines.items():
        other = measured[baseline]
        yield Result(
            start + end, other["seconds"] / mine["seconds"],
            f"OnlineDPOTrainer ({baseline}; {shape.size}; {described(other, 'product')})",
            mine["seconds"], other["seconds"], label(device, 1), described(mine, "product"),
            details={"own": mine, "baseline": other, "tokens": PROMPTS * COMPLETIONS * LENGTH},
        )  # fmt: skip


def on_gpu(name: str, effort: Effort) -> Iterator[Result | Unmeasured]:
    """As many steps whatever the effort. One line that says so where there is no GPU, or one that
    only emulates bfloat16, in which all settings but one are."""
    lacking = None
    if not torch.cuda.is_available():
        lacking = "there is no CUDA GPU here"
    elif not has_dtype(torch.device("cuda"), "bfloat16"):
        lacking = "the GPU here has no bfloat16 of its own"
    if lacking is not None:
        yield Unmeasured(f"lm/{name}/cuda", lacking, failed=False)
        return
    try:
        yield from compare(name, PRESETS[name], small=name == "smollm2")
    except Exception as error:  # the other preset's turn still comes
        traceback.print_exc()
        yield Unmeasured(f"lm/{name}/cuda", f"{type(error).__name__}: {error}")


BENCHMARKS: dict[str, Callable[[Effort], Iterator[Result | Unmeasured]]] = {
    f"lm/{name}/cuda": partial(on_gpu, name) for name in PRESETS
}
