"""Small runs, checkpoints in memory, and an independent GPT-nano made of torch.nn parts."""

from __future__ import annotations

import json

import pandas as pd
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from lib.bandit.config import bandit_run
from lib.bandit.engine import BanditEngine
from lib.bandit.network import GPT_NANO, Architecture, Parameters
from lib.bandit.problem import BanditProblem
from lib.finetune import fine_tune
from lib.methods import get


def small(method="best_of_n", seed=0, rate=0.003, reward="R1", **options):
    """A run of few prompts and updates; the rest as the book's runs."""
    options = {"prompts": 3, "completions": 4, "evaluations": 2, **options}
    options.setdefault("iterations" if get(method).on_policy else "inner_steps", 4)
    return bandit_run(method, reward, rate, seed, **options)


def start(*runs):
    """Problem, state and the iterator over updates of a stack of exactly these runs."""
    problem = BanditProblem(runs)
    state = problem.initial_state()
    config = runs[0]
    return problem, state, fine_tune(state, problem, problem.method, config.schedule, config.hyper)


class Checkpoint:
    """Saves after the `due`-th update that it sees, as bytes and JSON; then acts as killed."""

    class Killed(Exception):
        pass

    def __init__(self, kill_at: int | None = None):
        self.kill_at, self.seen, self.stored = kill_at, 0, None

    def due(self) -> bool:
        self.seen += 1
        return self.seen == self.kill_at

    def save(self, tensors, meta) -> None:
        self.stored = save_tensors(tensors), json.dumps(meta)
        raise self.Killed

    def load(self):
        if self.stored is None:
            return None
        return load_tensors(self.stored[0]), json.loads(self.stored[1])

    def progress(self, *args, **kwargs) -> None:
        pass


def tables(*runs, checkpoint=None) -> list[pd.DataFrame]:
    """Result tables of one block of runs, without the columns of seconds."""
    made = BanditEngine().run(runs, checkpoint or Checkpoint())
    return [t.drop(columns=[c for c in t if c.startswith("seconds")]) for t in made]


def random_parameters(runs: int, seed: int = 0, arch: Architecture = GPT_NANO) -> Parameters:
    """Parameters of different runs in which gains, biases and positions all matter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: name.endswith("gain") + 0.3 * torch.randn(runs, *shape, generator=generator)
        for name, shape in arch.shapes().items()
    }


class PlainGPT(nn.Module):
    """One run's network from torch.nn.TransformerEncoderLayer: no folding, no run dimension."""

    def __init__(self, p: Parameters, run: int, arch: Architecture = GPT_NANO):
        super().__init__()
        own = {k: v[run].detach() for k, v in p.items()}
        self.token = nn.Embedding.from_pretrained(own["token"].clone(), freeze=False)
        self.position = nn.Parameter(own["position"].clone())
        self.blocks = nn.ModuleList(self._block(own, i, arch) for i in range(arch.layers))
        self.norm = nn.LayerNorm(arch.width)
        self.head = nn.Linear(arch.width, arch.vocabulary, bias=False)
        self._fill(self.norm, own["lnf.gain"], own["lnf.bias"])
        self._fill(self.head, own["head.weight"].T)

    @staticmethod
    def _fill(module, weight, bias=None):
        with torch.no_grad():
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)

    def _block(self, own, i, arch):
        block = nn.TransformerEncoderLayer(
            arch.width, arch.heads, 4 * arch.width, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=True,
        )  # fmt: skip
        with torch.no_grad():
            block.self_attn.in_proj_weight.copy_(own[f"{i}.qkv.weight"].T)
            block.self_attn.in_proj_bias.copy_(own[f"{i}.qkv.bias"])
        self._fill(block.self_attn.out_proj, own[f"{i}.out.weight"].T, own[f"{i}.out.bias"])
        self._fill(block.norm1, own[f"{i}.ln1.gain"], own[f"{i}.ln1.bias"])
        self._fill(block.norm2, own[f"{i}.ln2.gain"], own[f"{i}.ln2.bias"])
        self._fill(block.linear1, own[f"{i}.up.weight"].T, own[f"{i}.up.bias"])
        self._fill(block.linear2, own[f"{i}.down.weight"].T, own[f"{i}.down.bias"])
        return block

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (S, L) -> logits (S, L, V)."""
        length = tokens.shape[-1]
        x = self.token(tokens) + self.position[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))

    def gradients(self) -> Parameters:
        """Gradients under the names and in the layout of the stacked network."""
        found = {
            "token": self.token.weight.grad, "position": self.position.grad,
            "lnf.gain": self.norm.weight.grad, "lnf.bias": self.norm.bias.grad,
            "head.weight": self.head.weight.grad.T,
        }  # fmt: skip
        for i, b in enumerate(self.blocks):
            found |= {
                f"{i}.qkv.weight": b.self_attn.in_proj_weight.grad.T,
                f"{i}.qkv.bias": b.self_attn.in_proj_bias.grad,
                f"{i}.out.weight": b.self_attn.out_proj.weight.grad.T,
                f"{i}.out.bias": b.self_attn.out_proj.bias.grad,
                f"{i}.ln1.gain": b.norm1.weight.grad, f"{i}.ln1.bias": b.norm1.bias.grad,
                f"{i}.ln2.gain": b.norm2.weight.grad, f"{i}.ln2.bias": b.norm2.bias.grad,
                f"{i}.up.weight": b.linear1.weight.grad.T, f"{i}.up.bias": b.linear1.bias.grad,
                f"{i}.down.weight": b.linear2.weight.grad.T, f"{i}.down.bias": b.linear2.bias.grad,
            }  # fmt: skip
        return found
