"""A prepared folder of a tiny policy, tiny reward models and a few prompts, for tests of lib.lm."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.lm import pairs
from lib.lm.length import TASKS
from lib.lm.network import Network
from lib.lm.policy import Scorer
from tests.tiny_lm import save_tiny_policy, save_tiny_reward_model

WORDS = ("tea", "rain", "a long walk", "stars", "bread and salt", "ink")


def prepared_folder(root: Path, prompts: int = 24, max_tokens: int = 12) -> Path:
    """Policy, prompts, pairs and reward models of random weights, as `lib.lm.prepare` lays out."""
    folder = save_tiny_policy(root / "policy", initializer_range=0.3)
    texts = [f"{WORDS[i % len(WORDS)]} {i}" for i in range(prompts)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = Scorer(Network(AutoModelForCausalLM.from_pretrained(folder)), (256,), 257)
    coded = tokenizer(texts)["input_ids"]
    cut = 2 * prompts // 3
    sampled = {
        split: pairs.sample_pairs(scorer, part, max_tokens, seed=i)
        for i, (split, part) in enumerate({"train": coded[:cut], "validation": coded[cut:]}.items())
    }
    pairs.save(root / "pairs.parquet", sampled)
    for i, task in enumerate(TASKS):
        save_tiny_reward_model(root / f"reward-{task}", seed=i)
    return root
