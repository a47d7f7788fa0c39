"""Memory and time of fine-tuning a language model, by formula: every number here is an estimate.

P, P_s: parameters of the policy and of the reward model. d, l, f, k, v: width, layers, width of the
MLP, width of all key heads together, vocabulary. Bytes of training with Adam, float32 weights and
products in 16 bits, as the book's loop does it (chapter own_model, eq-memory): weights 4 P, their
16-bit copies twice, 2 P + 2 v d that a compiled decoder keeps and 2 P that autocast makes for the
backward pass, gradients 4 P, two moments 8 P; a frozen reference 2 P + 2 v d, whose embedding alone
stays float32, and the reward model alike; for each token of a micro-batch 2 l (a d + c f), or,
checkpointed, 4 l d + 2 (a d + c f); keys and values 4 l k for each token of the completions, held
by a compiled decoder from one sampling to the next. a = 11 and c = 2, or 17 and 4 for an
architecture like LLaMA's: what PyTorch was counted to keep where a batch has padding. (The count of
Korthikanti et al. 2023, without dropout and without stored attention scores, is a = 8 and c = 2; it
has no copies in it, and no norms in float32.) With products in float32 there is one copy, 4 P, that
a compiled decoder keeps; a head that is tied to the embedding is held apart from it there, 4 v d.
With LoRA of A parameters: weights 2 P + 2 v d, adapters (4 + 4 + 4 + 8) A, no reference. All
methods take the same: an offline one is evaluated on samples and by the reward model as well.
Gradients are counted beside all activations, as where a minibatch goes through in pieces; in one
piece they come as activations go.
Seconds (eq-time): 2 P operations a token to score or to sample, 6 P to train (8 P checkpointed), at
a share of the peak; a decoding step also reads weights and cache, and starts every layer's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from lib import stats
from lib.lm.config import MINIBATCH, length_run
from lib.lm.engine import LengthEngine
from lib.lm.models import load_reward_model
from lib.lm.network import LOGIT_BUDGET, Network, matrices
from lib.lm.policy import TOKEN_BUDGET
from lib.lm.sampler import keys_and_values
from lib.untracked import Untracked

if TYPE_CHECKING:
    from lib.lengths import Prepared

GIB = 2**30
COMPUTE = 0.4  # share of the peak that matrix products reach
BANDWIDTH = 0.6  # share of the memory's speed that a decoding step reaches
LAUNCH = 5e-4  # seconds to start a layer's operations one by one (one response, a CPU core)
GRAPH = 5e-5  # the same as part of a CUDA graph: some 15 kernels of 3 microseconds
LORA_RANK = 16
GATES = ("gate_proj.weight", "gate_up_proj.weight")  # of an MLP as LLaMA's; the latter is Phi-3's
RESERVED = 2.0  # GiB for driver, kernels and fragments


@dataclass(frozen=True)
class Shape:
    """What the formulas need of an architecture.

    Args: parameters: all of them. width, layers; inner: width of the MLP; keys: width of all key
        heads together; vocabulary; sides: inputs plus outputs of all linear layers but the head.
        gated: whether it is built as LLaMA: an MLP with a gate (three matrices, not two), and
        norms that divide by the root mean square. tied: whether the head is the embedding.
    """

    name: str
    parameters: int
    width: int
    layers: int
    inner: int
    keys: int
    vocabulary: int
    sides: int
    gated: bool = False
    tied: bool = False

    @classmethod
    def of(cls, name: str, model: Any) -> Shape:
        """The shape of a loaded transformers model."""
        config = model.config.get_text_config()
        keys = keys_and_values(config) // (2 * config.num_hidden_layers)
        gated = any(name.endswith(GATES) for name, _ in model.named_parameters())
        head = model.get_output_embeddings()  # a reward model has none
        shapes = [m.weight.shape for m in matrices(model) if m is not head]
        # GPT-2's configuration and its kin's do not say it: then the widest matrix does
        inner = getattr(config, "intermediate_size", None) or max(map(max, shapes))
        tied = head is not None and head.weight is model.get_input_embeddings().weight
        return cls(name, model.num_parameters(), config.hidden_size, config.num_hidden_layers,
                   inner, keys, config.vocab_size, sum(map(sum, shapes)), gated, tied)  # fmt: skip

    def layer_numbers(self, size: int = 2) -> int:
        """Numbers per token that a layer keeps for the backward pass, in the dtype of products.

        Args: size: bytes of such a number.
        """
        widths = 10 if size == 4 else 17 if self.gated else 11
        return widths * self.width + (4 if self.gated else 2) * self.inner

    def activations(self, size: int = 2, checkpointing: bool = False) -> int:
        """Bytes per token that the backward pass needs; with checkpointing each layer's input,
        which is float32, is kept, and one layer at a time is computed again."""
        if checkpointing:
            return 4 * self.layers * self.width + size * self.layer_numbers(size)
        return size * self.layers * self.layer_numbers(size)

    @property
    def cache(self) -> int:
        """Numbers of keys and values per token."""
        return 2 * self.layers * self.keys

    @property
    def adapters(self) -> int:
        """Parameters of LoRA: rank (inputs + outputs) of every linear layer but the head."""
        return LORA_RANK * self.sides

    def frozen(self, size: int) -> int:
        """Bytes of weights that do not train, where products have `size` bytes a number: the
        embedding is float32 in either case."""
        if size == 4:
            return 4 * self.parameters
        return 2 * self.parameters + 2 * self.vocabulary * self.width

    def trained(self, size: int, compiled: bool = True) -> int:
        """Bytes of weights that train and of the copies that a decoder and the backward pass keep;
        in float32 a decoder that is compiled alone, with a head of its own."""
        if size == 2:
            return (4 + 2) * self.parameters + self.frozen(2)
        head = self.vocabulary * self.width if self.tied else 0
        return 4 * self.parameters + 4 * compiled * (self.parameters + head)


@dataclass(frozen=True)
class Machine:
    """Args: memory, GiB. flops: dense peak of products in `dtype`, a second. bandwidth: bytes a
    second. launch: seconds to start a layer's operations in a decoding step."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    dtype: str = "bfloat16"
    launch: float = GRAPH

    @property
    def size(self) -> int:
        """Bytes of a number in products."""
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Preset:
    """Args: policy and reward model; tokens of a prompt and, at most, of a response."""

    policy: Shape
    reward: Shape
    prompt: int
    response: int


# Sizes by the published configurations; machines by their makers' data sheets.
PYTHIA_14 = Shape("Pythia-1.4B", 1_414_647_808, 2048, 24, 8192, 2048, 50_304, 786_432)
PYTHIA_410 = Shape("Pythia-410M", 405_334_016, 1024, 24, 4096, 1024, 50_304, 393_216)
SMOLLM2 = Shape("SmolLM2-135M", 134_515_008, 576, 30, 1536, 192, 49_152, 305_280, gated=True,
                tied=True)  # fmt: skip
TINY = Shape("tiny", 1_317_632, 128, 4, 512, 128, 2048, 8192)
TINY_REWARD = Shape("tiny reward model", 231_232, 64, 2, 256, 64, 2048, 2048)
NANO = Shape("GPT-nano", 94_992, 48, 3, 192, 48, 100, 2304)
BANDIT = Preset(NANO, replace(NANO, name="none: the reward is known", parameters=0), 1, 9)
BANDIT_BATCH = 100  # completions of one update
PRESETS = {
    "tiny": Preset(TINY, TINY_REWARD, 24, 96),
    "smollm2": Preset(SMOLLM2, SMOLLM2, 48, 96),
    "pythia": Preset(PYTHIA_14, PYTHIA_410, 128, 256),
}
MISTRAL = Shape("Mistral-7B", 7_241_732_096, 4096, 32, 14_336, 1024, 32_000, 2_621_440, gated=True)
LLAMA_13 = Shape("LLaMA-13B", 13_015_864_320, 5120, 40, 13_824, 5120, 32_000, 3_911_680,
                 gated=True)  # fmt: skip
FULL_SCALE = {
    "similar pairs: Pythia-1.4B": PRESETS["pythia"],
    "distinct pairs: Mistral-7B, UltraRM-13B": Preset(MISTRAL, LLAMA_13, 256, 512),
}
T4 = Machine("T4", 16, 65e12, 320e9, dtype="float16")  # it has no bfloat16
A100 = Machine("A100", 80, 312e12, 2039e9)
H100 = Machine("H100", 80, 989e12, 3350e9)
MACHINES = (T4, A100, H100)


def memory(
    preset: Preset, size: int = 2, *, checkpointing: bool = False, lora: bool = False,
    micro_batch: int = TOKEN_BUDGET["cuda"], batch: int = MINIBATCH, compiled: bool = True,
) -> dict[str, float]:
    """GiB by use, and their sum as `total`: whatever the method, see above.

    With LoRA the matrices are frozen in 16 bits, only the adapters have gradients and moments, and
    the reference is the same model with the adapters off.
    Args: size: bytes of a number in products. micro_batch: tokens that pass through the network at
        once, rows times the longest (`TOKEN_BUDGET` of a GPU in the loop). batch: completions of an
        update, which are drawn together. compiled: whether the decoder is, as on a GPU.
    """
    policy, p, a = preset.policy, preset.policy.parameters, preset.policy.adapters
    size = 2 if lora else size
    drawn = batch * (preset.prompt + preset.response)
    tokens = min(micro_batch, drawn)
    uses = {
        "weights": policy.frozen(2) + (4 + 2 + 2) * a if lora else policy.trained(size, compiled),
        "gradients": 4 * (a if lora else p),
        "moments": 8 * (a if lora else p),
        "reference": 0 if lora else policy.frozen(size),
        "reward model": preset.reward.frozen(size),
        "activations": tokens * policy.activations(size, checkpointing),
        # as they are, normalised, and their gradient; float32
        "logits": 3 * 4 * min(LOGIT_BUDGET, tokens * policy.vocabulary),
        "keys and values": size * drawn * policy.cache,
    }
    return {name: use / GIB for name, use in {**uses, "total": sum(uses.values())}.items()}


def seconds(
    preset: Preset,
    machine: Machine,
    *,
    checkpointing: bool = False,
    lora: bool = False,
    batch: int = MINIBATCH,
) -> dict[str, float]:
    """Seconds by phase of one update on `batch` fresh responses of `preset.response` tokens.

    With LoRA the weights' own gradients are not computed (2 P less).
    """
    p, cache = preset.policy.parameters, preset.policy.cache
    tokens, rate = batch * (preset.prompt + preset.response), COMPUTE * machine.flops
    read = machine.size * (p + batch * (preset.prompt + preset.response / 2) * cache)
    step = max(read / (BANDWIDTH * machine.bandwidth), 2 * p * batch / rate,
               machine.launch * preset.policy.layers)  # fmt: skip
    return {
        "sampling": preset.response * step + 2 * p * batch * preset.prompt / rate,
        "scoring": 2 * (p + preset.reward.parameters) * tokens / rate,
        "training": (6 + 2 * checkpointing - 2 * lora) * p * tokens / rate,
    }


def fits(total: float, machine: Machine) -> bool:
    return total + RESERVED <= machine.memory


WAYS = {
    "as the loop does": {},
    "with checkpointing": {"checkpointing": True},
    "with checkpointing and LoRA": {"checkpointing": True, "lora": True},
}


def way(preset: Preset, machine: Machine) -> str:
    """The first of `WAYS` that fits a machine, or "not at all"."""
    totals = {name: memory(preset, machine.size, **o)["total"] for name, o in WAYS.items()}
    return next((name for name, total in totals.items() if fits(total, machine)), "not at all")


def memory_table(presets: Mapping[str, Preset] = PRESETS) -> pd.DataFrame:
    """GiB by use for each preset, as the loop trains it with 16-bit products; estimated."""
    columns = {name: memory(preset) for name, preset in presets.items()}
    return pd.DataFrame(columns).rename_axis("GiB (estimated)").reset_index()


def fit_table(presets: Mapping[str, Preset] = PRESETS) -> pd.DataFrame:
    """The first of `WAYS` that fits, with its GiB, by preset and machine; estimated."""
    rows = []
    for name, preset in presets.items():
        cells = {}
        for machine in MACHINES:
            how = way(preset, machine)
            total = memory(preset, machine.size, **WAYS.get(how, {}))["total"]
            cells[f"{machine.name}, {machine.memory:g} GB"] = f"{how} ({total:.1f} GiB)"
        rows.append({"preset": name, **cells})
    return pd.DataFrame(rows)


def time_table(presets: Mapping[str, Preset] = PRESETS) -> pd.DataFrame:
    """Seconds of one update by phase, and minutes of 100, each in its `way`; estimated."""
    rows = []
    for name, preset in presets.items():
        for machine in MACHINES:
            found = seconds(preset, machine, **WAYS.get(way(preset, machine), {}))
            rows.append({"preset": name, "machine": machine.name,
                         **{f"{phase}, s": value for phase, value in found.items()},
                         "100 updates, minutes": 100 * sum(found.values()) / 60})  # fmt: skip
    return pd.DataFrame(rows)


def sampling_share(preset: Preset) -> tuple[float, float]:
    """The least and the largest share of an update that sampling takes on `MACHINES`, each in its
    `way`; estimated."""
    shares = []
    for machine in MACHINES:
        found = seconds(preset, machine, **WAYS.get(way(preset, machine), {}))
        shares.append(found["sampling"] / sum(found.values()))
    return min(shares), max(shares)


def written(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers with two digits that mean something: an estimate has no more."""

    def text(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        if 0 < value < 0.001:
            return "< 0.001"
        return f"{value:.0f}" if value >= 10 else f"{value:.2g}"

    return table.map(text)


# --- an estimate beside a measurement -------------------------------------------------------------


def of_folder(prepared: Prepared) -> Preset:
    """The sizes of a prepared folder: of its policy, of its first reward model, and the mean length
    of its prompts."""
    first = min(prepared.folder.glob("reward-*"))
    reward = Shape.of(f"reward model of {prepared.name}", load_reward_model(first)[0])
    policy = Shape.of(prepared.name, prepared.policy.network.model)
    prompt = sum(map(len, prompts := prepared.data("min").prompts["train"])) / len(prompts)
    return Preset(policy, reward, round(prompt), prepared.cap)


def this_machine(device: str = "cpu") -> Machine:
    """This machine with the peak that float32 matrix products reach now, on torch's threads or on
    its GPU, whose memory is timed as well, by a copy."""
    cuda = device != "cpu"
    size = 8192 if cuda else 1024
    a = torch.rand(size, size, device=device)
    peak = 2 * size**3 / _timed(lambda: a @ a, cuda)
    if not cuda:
        return Machine("this CPU", float("inf"), peak, 2e10, "float32", LAUNCH)
    large = torch.empty(GIB, dtype=torch.uint8, device=device)
    bandwidth = 2 * GIB / _timed(large.clone, cuda)
    return Machine("this GPU", float("inf"), peak, bandwidth, "float32", GRAPH)


def _timed(work: Callable[[], Any], cuda: bool, times: int = 4) -> float:
    """Seconds of `work`, the mean of some calls after a first one, which also starts threads."""
    work()
    if cuda:
        torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(times):
        work()
    if cuda:
        torch.cuda.synchronize()
    return (perf_counter() - start) / times


def measured(prepared: str, device: str = "cpu", updates: int = 2, **options: Any):
    """Seconds of an update by phase, on-policy DPO on the Min task, and the tokens of a response.

    The mean over `updates` updates of a run that is not kept. Returns: (seconds, tokens).
    """
    run = length_run("dpo", "min", 1e-4, 0, updates=updates, prepared=prepared, evaluations=1,
                     prompts=8, **options)  # fmt: skip
    (table,) = LengthEngine(device).run([run], Untracked())
    last = table.iloc[-1]
    took = {phase: float(last[f"seconds_{phase}"]) / updates for phase in stats.PHASES}
    return took, float(table["length"].mean())


def stored(network: Network, samples: int = 4, length: int = 64) -> float:
    """Bytes per token that PyTorch keeps for the backward pass of the hidden states, counted.

    Storages that several tensors share count once, parameters not at all. A token is padding, since
    attention takes other ways where none is.
    Args: network: with weights that train; its own dtype of products.
    """
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in own:
            kept[at] = tensor  # held, so that its place is not given to another one
        return tensor

    tokens = torch.arange(samples * length, device=network.device) % network.vocabulary
    tokens = tokens.view(samples, length)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 0] = False
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.hidden(tokens, mask)
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / tokens.numel()


def beside(preset: Preset, machine: Machine, took: Mapping[str, float]) -> pd.DataFrame:
    """Estimated and measured seconds of an update by phase."""
    guess = seconds(preset, machine)
    rows = [{"phase": phase, "estimated, s": guess[phase], "measured, s": value}
            for phase, value in took.items()]  # fmt: skip
    total = {"phase": "together", **pd.DataFrame(rows).drop(columns="phase").sum()}
    return pd.DataFrame([*rows, total])
