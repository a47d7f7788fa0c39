"""What the judge measures: its scores of good answers, bad ones and tricks.

`python data/full_scale/calibrate.py --judge .prepared/smollm2-model` writes calibration.parquet:
64 validation prompts, each with its own answer (by the model that wrote the instruction data), two
samples of the tiny policy, and answers made from these that a good judge should tell apart.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pandas as pd
import torch

from lib.lm import tiny
from lib.lm.gold import Likelihood, mean_value
from lib.lm.models import ids, load_policy, load_tokenizer
from lib.lm.network import Network
from lib.lm.pairs import sample_pairs
from lib.lm.policy import Scorer
from lib.lm.text import encode_prompts

HERE = Path(__file__).resolve().parent
PROMPTS = 64
REFUSAL = "I'm sorry, but I can't help with that."


def variants(table: pd.DataFrame, sampled: list[str], seed: int = 0) -> dict[str, list[str]]:
    """Answers to the prompts of `table` (prompt, response, topic), by what was done to them."""
    draw, own = random.Random(seed), table["response"].tolist()
    shuffled = [" ".join(draw.sample(words, len(words))) for words in map(str.split, own)]
    half = [" ".join(words[: len(words) // 2]) for words in map(str.split, own)]
    return {
        "its own answer": own,
        "the answer to another prompt": own[1:] + own[:1],
        "a sample of the tiny policy": sampled,
        "its words shuffled": shuffled,
        "its first half": half,
        "it, said twice": [f"{text} {text}" for text in own],
        "the prompt, three times": [" ".join([p] * 3) for p in table["prompt"]],
        "the topic, three times": [" ".join([t] * 3) for t in table["topic"]],
        "one stock refusal": [REFUSAL] * len(own),
        "yes": ["Yes."] * len(own),
        "nothing": [""] * len(own),
    }


def sampled(prompts: list[str]) -> list[str]:
    """One answer of the tiny policy to every prompt."""
    model, _ = load_policy(tiny.POLICY)
    tokenizer, _ = load_tokenizer(tiny.POLICY)
    found = ids(tokenizer, model)
    scorer = Scorer(Network(model), found.eos, found.pad)
    coded = encode_prompts(tokenizer, prompts, tiny.POSITIONS - tiny.CAP).ids
    return tokenizer.batch_decode(sample_pairs(scorer, coded, tiny.CAP, seed=99).first,
                                  skip_special_tokens=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--judge", required=True, help="folder or hub name of a language model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = Likelihood(options.judge)
    table = tiny.pairs("validation").sample(PROMPTS, random_state=0)
    prompts, rows = table["prompt"].tolist(), []
    for name, texts in variants(table, sampled(prompts)).items():
        given, without, copied, mask = judge.parts(prompts, texts)
        count = mask.sum(-1)
        rows.append(pd.DataFrame({
            "answer": name, "prompt": prompts, "text": texts,
            "score": mean_value(given, without, copied, mask),
            "given": ((given * mask).sum(-1) / count).numpy(),
            "without": ((without * mask).sum(-1) / count).numpy(),
            "copied": (copied.sum(-1) / count).numpy(), "tokens": count.numpy(),
        }))  # fmt: skip
        print(f"{name}: {rows[-1]['score'].mean():.2f} nats a token", flush=True)
    pd.concat(rows, ignore_index=True).to_parquet(HERE / "calibration.parquet", compression="zstd",
                                                  index=False)  # fmt: skip


if __name__ == "__main__":
    main()
