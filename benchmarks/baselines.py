"""The bandit without the book's engine, twice, as the engine's benchmarks compare with it.

`PlainRun` is "plain PyTorch, one run at a time": what a careful user writes with torch.nn, all
completions of one run in a batch. `ReleasedRun` is "released protocol, one sequence at a time":
batch size 1, token by token, no cache, a Python loop over pairs. Of `lib` they use only the
rewards, the reference network and a run's configuration; `benchmarks.bandit` checks that for
given parameters and samples they compute the engine's losses, gradients and metrics.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.bandit.config import VOCABULARY, BanditRun
from lib.bandit.network import GPT_NANO, Architecture
from lib.bandit.reference import load, reward_table

FOLLOWED = 10  # prompts whose y_w and y_l are followed
BINS = 20  # of the token marginal


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, arch: Architecture):
        super().__init__()
        d = arch.width
        self.heads = arch.heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """x (S, L, d) -> (S, L, d). With a `cache` of keys and values x is the next position."""
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = k, v
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPTNano(nn.Module):
    """minGPT's gpt-nano with the exact GELU."""

    def __init__(self, arch: Architecture = GPT_NANO):
        super().__init__()
        self.token = nn.Embedding(arch.vocabulary, arch.width)
        self.position = nn.Embedding(arch.context, arch.width)
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.layers))
        self.lnf = nn.LayerNorm(arch.width)
        self.head = nn.Linear(arch.width, arch.vocabulary, bias=False)

    def forward(self, tokens: Tensor, start: int = 0, caches: list | None = None) -> Tensor:
        """Next-token logits of tokens (S, L) at positions from `start`: (S, L, V)."""
        positions = torch.arange(start, start + tokens.shape[1])
        x = self.token(tokens) + self.position(positions)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return self.head(self.lnf(x))

    def load_stacked(self, parameters: Mapping[str, Tensor], run: int = 0) -> GPTNano:
        """Takes the parameters of one run of the engine's stack."""
        with torch.no_grad():
            for name, value in self.named_parameters():
                value.copy_(as_linear(name, parameters[stacked_name(name)][run]))
        return self


def stacked_name(name: str) -> str:
    """The engine's name of a parameter of `GPTNano`: "blocks.0.ln1.weight" -> "0.ln1.gain"."""
    name = name.removeprefix("blocks.")
    if name in ("token.weight", "position.weight"):
        return name.removesuffix(".weight")
    return name.replace("weight", "gain") if "ln" in name else name


def as_linear(name: str, value: Tensor) -> Tensor:
    """nn.Linear keeps (out, in) where the engine keeps (in, out); also its own inverse."""
    embedding = name.startswith(("token", "position"))
    return value.T if value.dim() == 2 and not embedding else value


@dataclass
class Batch:
    """prompts (P,); completions (P, C, L); rewards (P, C); ref (P, C) nats per completion."""

    prompts: Tensor
    completions: Tensor
    rewards: Tensor
    ref: Tensor | None = None


class SingleRun:
    """One on-policy run of best_of_n or ipo, all metrics at every step.

    Subclasses say how to sample, score and evaluate. Raises: ValueError for another method.
    """

    def __init__(self, config: BanditRun):
        if config.method not in ("best_of_n", "ipo"):
            raise ValueError(f"method must be 'best_of_n' or 'ipo', got {config.method!r}")
        self.config, self.generator = config, torch.Generator().manual_seed(config.seed)
        self.reward_table = reward_table(config.reward_function)
        self.reference = GPTNano().load_stacked(load(config.histogram, config.reference_seed))
        self.reference.requires_grad_(False)
        self.policy = copy.deepcopy(self.reference).requires_grad_(True)
        self.generating = copy.deepcopy(self.reference)
        # The fused form is the fastest of torch.optim.Adam's three here.
        self.adam = torch.optim.Adam(
            self.policy.parameters(), lr=config.learning_rate, fused=True
        )
        order = torch.randperm(VOCABULARY, generator=self.generator)
        self.prompts, self.unseen = order[: config.prompts], order[-FOLLOWED:]

    def step(self) -> dict[str, float]:
        """One run-step: sample, one update, evaluate. Returns the metrics."""
        self.generating.load_state_dict(self.policy.state_dict())
        batch = self.draw(self.generating, self.prompts, self.config.method == "ipo")
        loss = self.loss(batch)
        self.adam.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in self.policy.parameters()]).norm()
        self.adam.step()
        return {"loss": loss.item(), "grad_norm": norm.item(), **self.evaluate()}

    def draw(self, model: GPTNano, prompts: Tensor, scored: bool) -> Batch:
        """C completions for each of `prompts` (P,), with rewards and reference scores."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """The method's loss, averaged over selected completions or over untied pairs."""
        raise NotImplementedError

    def evaluate(self, completions: Tensor | None = None) -> dict[str, float]:
        """Metrics on one completion for each of 100 contexts: drawn now, or as given (100, L)."""
        raise NotImplementedError


class PlainRun(SingleRun):
    """Plain PyTorch, one run at a time. `cached`: decode with cached keys and values."""

    def __init__(self, config: BanditRun, cached: bool = True):
        super().__init__(config)
        self.cached = cached
        self.fixed = self.draw(self.reference, self.prompts[:FOLLOWED], True)
        self.held_out = self.draw(self.reference, self.unseen, True)

    @torch.no_grad()
    def sample(self, model: GPTNano, prompts: Tensor, keep: bool = False):
        """prompts (S,) -> completions (S, L), and their distributions (S, L, V) if `keep`."""
        tokens, kept = prompts[:, None], []
        caches = [[] for _ in model.blocks] if self.cached else None
        for t in range(self.config.length):
            logits = model(tokens[:, -1:], t, caches) if self.cached else model(tokens)
            logp = logits[:, -1].log_softmax(-1)
            drawn = torch.multinomial(logp.exp(), 1, generator=self.generator)
            tokens = torch.cat([tokens, drawn], 1)
            if keep:
                kept.append(logp)
        return tokens[:, 1:], torch.stack(kept, 1) if keep else None

    def distributions(self, model: GPTNano, prompts: Tensor, completions: Tensor) -> Tensor:
        """Log-probabilities of every token along given prefixes: (S, L, V)."""
        return model(torch.cat([prompts[:, None], completions[:, :-1]], 1)).log_softmax(-1)

    def score(self, model: GPTNano, prompts: Tensor, completions: Tensor) -> Tensor:
        """log pi(y|x) of completions (P, C, L) of prompts (P,): (P, C)."""
        flat = completions.flatten(0, 1)
        repeated = prompts.repeat_interleave(completions.shape[1])
        logp = self.distributions(model, repeated, flat).gather(-1, flat[..., None])
        return logp.sum((-2, -1)).view(completions.shape[:2])

    @torch.no_grad()
    def draw(self, model: GPTNano, prompts: Tensor, scored: bool) -> Batch:
        repeated = prompts.repeat_interleave(self.config.completions)
        flat, _ = self.sample(model, repeated)
        completions = flat.view(len(prompts), self.config.completions, -1)
        batch = Batch(prompts, completions, self.reward_table[completions].mean(-1))
        if scored:
            batch.ref = self.score(self.reference, prompts, completions)
        return batch

    def loss(self, batch: Batch) -> Tensor:
        if self.config.method == "best_of_n":  # the others get no gradient: leave them out
            best = batch.completions[torch.arange(len(batch.prompts)), batch.rewards.argmax(-1)]
            return -self.score(self.policy, batch.prompts, best[:, None]).mean()
        ratio = self.score(self.policy, batch.prompts, batch.completions) - batch.ref
        margin = ratio[:, :, None] - ratio[:, None, :]
        untied = batch.rewards[:, :, None] > batch.rewards[:, None, :]
        return (margin[untied] - 0.5 / self.config.hyper["tau"]).square().mean()

    @torch.no_grad()
    def evaluate(self, completions: Tensor | None = None) -> dict[str, float]:
        prompts = torch.arange(VOCABULARY)
        if completions is None:
            completions, logp = self.sample(self.policy, prompts, keep=True)
        else:
            logp = self.distributions(self.policy, prompts, completions)
        p = logp.exp()
        reference = self.distributions(self.reference, prompts, completions)
        generating = self.distributions(self.generating, prompts, completions)
        mass = p.mean((0, 1)).view(BINS, -1).sum(-1)
        metrics = {
            "reward": (p @ self.reward_table).mean(),
            "kl_ref": (p * (logp - reference)).sum((1, 2)).mean(),
            "kl_gen": (p * (logp - generating)).sum((1, 2)).mean(),
            "entropy": -(p * logp).sum((1, 2)).mean(),
            "support_share": self.support_share(p),
            **self.log_ratios(self.fixed, ""),
            **self.log_ratios(self.held_out, "held_out_"),
            **{f"mass_{5 * i:02d}": mass[i] for i in range(BINS)},
        }
        return {name: value.item() for name, value in metrics.items()}

    def support_share(self, p: Tensor) -> Tensor:
        """Mass on tokens seen in the fixed data at the same prompt and position."""
        p = p[self.fixed.prompts]
        seen = torch.zeros_like(p).scatter_(-1, self.fixed.completions.transpose(1, 2), 1.0)
        return (p * seen).sum(-1).mean()

    def log_ratios(self, pairs: Batch, prefix: str) -> dict[str, Tensor]:
        """Mean log pi - log pi_ref of the best completion and of the others."""
        ratio = self.score(self.policy, pairs.prompts, pairs.completions) - pairs.ref
        best = ratio.gather(1, pairs.rewards.argmax(-1, keepdim=True))[:, 0]
        others = (ratio.sum(-1) - best) / (ratio.shape[1] - 1)
        return {
            f"{prefix}chosen_logratio": best.mean(),
            f"{prefix}rejected_logratio": others.mean(),
        }


class ReleasedRun(SingleRun):
    """Released protocol, one sequence at a time: batch size 1, token by token, no cache.

    It follows fewer metrics than the engine (reward and both KLs), which is to its advantage.
    """

    def next_logp(self, model: GPTNano, prefix: Tensor) -> Tensor:
        """Log-probabilities of the token after `prefix` (t,): (V,)."""
        return model(prefix[None])[0, -1].log_softmax(-1)

    def score(self, model: GPTNano, prompt: Tensor, completion: Tensor) -> Tensor:
        """log pi(y|x) of one completion (L,)."""
        tokens, total = torch.cat([prompt.view(1), completion]), 0.0
        for t in range(len(completion)):
            total = total + self.next_logp(model, tokens[: t + 1])[completion[t]]
        return total

    @torch.no_grad()
    def sample(self, model: GPTNano, prompt: Tensor) -> Tensor:
        """One completion (L,) of one prompt."""
        tokens = prompt.view(1)
        for _ in range(self.config.length):
            p = self.next_logp(model, tokens).exp()
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=self.generator)])
        return tokens[1:]

    @torch.no_grad()
    def draw(self, model: GPTNano, prompts: Tensor, scored: bool) -> Batch:
        shape = (len(prompts), self.config.completions)
        completions = torch.empty(*shape, self.config.length, dtype=torch.long)
        rewards, ref = torch.empty(shape), torch.empty(shape) if scored else None
        for i, j in itertools.product(*map(range, shape)):
            completions[i, j] = self.sample(model, prompts[i])
            rewards[i, j] = self.reward_table[completions[i, j]].mean()
            if scored:
                ref[i, j] = self.score(self.reference, prompts[i], completions[i, j])
        return Batch(prompts, completions, rewards, ref)

    def loss(self, batch: Batch) -> Tensor:
        total, count = 0.0, 0
        for i, prompt in enumerate(batch.prompts):
            rewards, completions = batch.rewards[i].tolist(), batch.completions[i]
            if self.config.method == "best_of_n":
                best = max(range(len(rewards)), key=rewards.__getitem__)
                total, count = total - self.score(self.policy, prompt, completions[best]), count + 1
                continue
            ratio = [self.score(self.policy, prompt, y) - ref
                     for y, ref in zip(completions, batch.ref[i], strict=True)]  # fmt: skip
            order = sorted(range(len(rewards)), key=rewards.__getitem__, reverse=True)
            for better, worse in itertools.combinations(order, 2):
                if rewards[better] > rewards[worse]:
                    margin = ratio[better] - ratio[worse]
                    total, count = total + (margin - 0.5 / self.config.hyper["tau"]) ** 2, count + 1
        return total / count

    @torch.no_grad()
    def evaluate(self, completions: Tensor | None = None) -> dict[str, float]:
        sums = dict.fromkeys(("reward", "kl_ref", "kl_gen"), 0.0)
        for prompt in torch.arange(VOCABULARY):
            tokens = prompt.view(1)
            for t in range(self.config.length):
                logp = self.next_logp(self.policy, tokens)
                p = logp.exp()
                sums["reward"] += (p @ self.reward_table).item() / self.config.length
                for name, other in (("ref", self.reference), ("gen", self.generating)):
                    sums[f"kl_{name}"] += (p * (logp - self.next_logp(other, tokens))).sum().item()
                drawn = torch.multinomial(p, 1, generator=self.generator)
                following = drawn if completions is None else completions[prompt, t].view(1)
                tokens = torch.cat([tokens, following])
        return {name: value / VOCABULARY for name, value in sums.items()}
