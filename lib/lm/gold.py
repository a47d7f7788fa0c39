"""Gold rewards of the full-scale chapter: a model that judges, and that no method may train on.

A language model judges a response by how much likelier the instruction makes it; a reward model
(a sequence classifier) by its score. Either reads text, so that its tokenizer is its own. Scores
are kept by content: the same response to the same prompt is never scored twice.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lib.lm.batches import padded
from lib.lm.layouts import last
from lib.lm.models import (
    CAUSAL,
    Source,
    ids,
    load_policy,
    load_reward_model,
    load_tokenizer,
    resolve,
)
from lib.lm.network import Network
from lib.lm.policy import Scorer
from lib.lm.prefix import Prefixed, shared_prefix
from lib.lm.reward import RewardModel
from lib.lm.text import Prompt, encode_responses, render, rendered_ids
from lib.lm.unchanged import kept_while_unchanged
from lib.rollouts import Rollout

COPIED = 4  # a run of so many of the judge's tokens that stood there before is a copy
COPY = -7.0  # what a copied token counts, nats: about what a word out of place costs
MAX_TOKENS = 512  # of a response, in the judge's tokens; what comes later is not read
RULE = 1  # raised at each change of the formula: scores that were kept are of another rule then


class Judge(Protocol):
    """Scores responses; `source` says what it is made of."""

    source: Source

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """(N,) float: the gold reward of each response to its prompt."""


class Likelihood:
    """How likely a response is to its instruction, and how much likelier than to none; nats.

    1/n sum_t [2 log p(y_t | x, y_<t) - log p(y_t | empty instruction, y_<t)] over a response's n
    tokens, EOS among them: the log-likelihood, which wants fluent text, plus what the instruction
    adds to it, which a stock phrase does not have. A token that lies in a copy of the instruction,
    or of what the response has said already, counts `COPY`: repetition is likely, and says nothing.
    """

    def __init__(self, source: str | Path, revision: str | None = None, device: str = "cpu"):
        model, self.source = load_policy(source, revision, device=device)
        self.tokenizer, _ = load_tokenizer(source, revision)
        self.special = ids(self.tokenizer, model)
        self.network = Network(model, packs=False)  # as the published scores, to the last digit
        self.budget: int | None = None  # tokens read at once; None for the device's

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """(N,) nats a token."""
        return mean_value(*self.parts(prompts, responses))

    def parts(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p with and without the instruction (N, L) nats, copied tokens and mask (N, L)."""
        heads = prompt_ids(self.tokenizer, prompts)
        bodies = encode_responses(self.tokenizer, responses, MAX_TOKENS).ids
        tokens, mask = padded(bodies, self.special.pad)
        copied = torch.zeros_like(mask)
        texts = self._instructions(prompts)
        for row, (text, body) in enumerate(zip(texts, bodies, strict=True)):
            copied[row, : len(body)] = torch.tensor(copies(text, body))
        without = prompt_ids(self.tokenizer, [""]) * len(heads)
        return *(self._logp(some, tokens, mask) for some in (heads, without)), copied, mask

    def _instructions(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the last message, without the template: what a response could copy."""
        return self.tokenizer([last(p) for p in prompts], add_special_tokens=False)["input_ids"]

    def _logp(self, heads: list[list[int]], tokens: Tensor, mask: Tensor) -> Tensor:
        """log p of every response token after its head, (N, L) nats. What all heads begin with,
        the template and its system message, is read once."""
        prefix = shared_prefix(heads)
        own = [head[len(prefix) :] for head in heads]
        network = Prefixed(self.network, prefix)
        scorer = Scorer(network, self.special.eos, self.special.pad, self.budget)
        batch = as_rollout(own, tokens, mask, self.special.pad, str(network.device))
        return scorer.score(batch)[:, 0].cpu()


def mean_value(given: Tensor, without: Tensor, copied: Tensor, mask: Tensor) -> np.ndarray:
    """(N,) what `Likelihood` scores, from its parts (N, L)."""
    value = (2 * given - without).masked_fill(copied, COPY)
    return ((value * mask).sum(-1) / mask.sum(-1)).double().numpy()


class Score:
    """The score of a sequence classifier with one label: UltraRM's kind of reward model."""

    def __init__(self, source: str | Path, revision: str | None = None, device: str = "cpu"):
        model, self.source = load_reward_model(source, revision, device=device)
        self.tokenizer, _ = load_tokenizer(source, revision)
        self.model, self.device = RewardModel(model), device

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """(N,) scores."""
        heads = prompt_ids(self.tokenizer, prompts)
        bodies = encode_responses(self.tokenizer, responses, MAX_TOKENS).ids
        pad = self.tokenizer.pad_token_id or 0
        batch = as_rollout(heads, *padded(bodies, pad), pad, self.device)
        return self.model.score(batch)[:, 0].double().cpu().numpy()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Prompts in the tokenizer's own template, as a policy reads them; none is too long."""
    return rendered_ids(tokenizer, [render(tokenizer, prompt) for prompt in prompts])


def copies(instruction: Sequence[int], response: Sequence[int], run: int = COPIED) -> list[bool]:
    """Which tokens of a response lie in a run of `run` or more that stood there before: in the
    instruction, or earlier in the response itself."""
    seen = {tuple(instruction[i : i + run]) for i in range(len(instruction) - run + 1)}
    copied = [False] * len(response)
    for i in range(len(response) - run + 1):
        if (part := tuple(response[i : i + run])) in seen:
            copied[i : i + run] = [True] * run
        seen.add(part)
    return copied


def as_rollout(
    heads: list[list[int]], tokens: Tensor, mask: Tensor, pad: int, device: str
) -> Rollout:
    """One response (N, L) for each prompt as a rollout of which nothing else is known."""
    prompts, prompt_mask = padded(heads, pad, "left", device)
    zeros = torch.zeros(len(heads), 1, tokens.shape[1], device=device)
    return Rollout(
        prompts=prompts, prompt_mask=prompt_mask, completions=tokens[:, None].to(device),
        mask=mask[:, None].to(device), logp=zeros, ref=None, rewards=zeros[..., 0],
        scale=torch.tensor(0.0, device=device),
    )  # fmt: skip


class Kept:
    """A judge whose scores are kept in a file, by the judge's content, the rule by which it scores,
    prompt and response."""

    def __init__(self, judge: Judge, file: Path):
        self.judge, self.file, self.source = judge, file, judge.source
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as kept:
            kept.execute("create table if not exists scores (key text primary key, score real)")

    def _open(self) -> closing[sqlite3.Connection]:
        # several processes write: each waits for the others' short transactions
        return closing(sqlite3.connect(self.file, timeout=60, isolation_level=None))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """(N,) scores, those that are not in the file computed now."""
        keys = [self._key(p, r) for p, r in zip(prompts, responses, strict=True)]
        with self._open() as kept:
            known = {key: row[0] for key in set(keys)
                     if (row := kept.execute("select score from scores where key = ?",
                                             (key,)).fetchone())}  # fmt: skip
        missing = {key: i for i, key in enumerate(keys) if key not in known}
        if missing:
            rows = list(missing.values())
            new = self.judge.score([prompts[i] for i in rows], [responses[i] for i in rows])
            found = list(zip(missing, map(float, new), strict=True))
            known.update(found)
            with self._open() as kept:
                kept.execute("begin immediate")
                kept.executemany("insert or ignore into scores values (?, ?)", found)
                kept.execute("commit")
        return np.array([known[key] for key in keys])

    def _key(self, prompt: Prompt, response: str) -> str:
        rule = [RULE, COPIED, COPY, MAX_TOKENS]
        content = json.dumps([self.source.resolved, rule, prompt, response], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


def load_judge(source: str | Path, revision: str | None = None, device: str = "cpu") -> Judge:
    """`Likelihood` of a language model, `Score` of a sequence classifier: by its config.json.

    Raises: the kinds of `lib.lm.models.LoadError`.
    """
    config = resolve(source, revision)[0] / "config.json"
    names = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    kind = Likelihood if set(names or ()) & set(CAUSAL.values()) else Score
    return kind(source, revision, device)


@kept_while_unchanged("source", maxsize=2)
def kept_judge(source: str, device: str, file: Path) -> Kept:
    """A process's judge: loaded once."""
    return Kept(load_judge(source, device=device), file)
