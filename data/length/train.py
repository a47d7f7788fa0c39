"""Train the tokenizer and the tiny policy on the pairs: `python data/length/train.py`.

The full-scale chapter's other widths: `python data/length/train.py --width 256 --tokenizer
data/length/policy --output data/full_scale/policy-256`.

Writes policy/ (weights as safetensors, configuration, tokenizer) and in it training.json (command,
commit, machine, settings, losses by epoch, lengths of samples). Run make.py first.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch
from transformers import set_seed

from lib.lm import tiny
from lib.lm.models import load_tokenizer
from lib.lm.sft import Example, SFTRun, Trained, response_loss, settings, sft
from lib.runs import provenance

RUN = SFTRun(learning_rate=1e-3, schedule="linear", batch=16, epochs=10, patience=2, dropout=0.1)
SAMPLES = 256  # validation prompts that the trained policy answers
BFLOAT16_FROM = 2_000_000  # parameters above which weights ship in two bytes each
CHECKED = 64  # validation pairs on which the tests compute the loss again
LIBRARIES = ("transformers", "tokenizers", "trl", "datasets", "accelerate")


def texts() -> list[str]:
    """Prompts and responses of the training split: what the tokenizer is trained on."""
    table = pd.read_parquet(tiny.PAIRS)
    table = table[table["split"] == "train"]
    return [*table["prompt"], *table["response"]]


@torch.inference_mode()
def sample(model, tokenizer, prompts: Sequence[list[int]], seed: int) -> list[list[int]]:
    """One response for each prompt, 64 at a time, padded on the left; cut after its EOS."""
    set_seed(seed)
    tokenizer.padding_side, eos, found = "left", tokenizer.eos_token_id, []
    for start in range(0, len(prompts), 64):
        batch = tokenizer.pad({"input_ids": prompts[start : start + 64]}, return_tensors="pt")
        out = model.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()
        found += [row[: row.index(eos) + 1] if eos in row else row for row in out]
    tokenizer.padding_side = "right"
    return found


def lengths(samples: list[list[int]], eos: int) -> dict[str, float]:
    """Mean and standard deviation of tokens without EOS, and the share that ended by itself."""
    length = pd.Series([len(row) - (row[-1] == eos) for row in samples])
    ended = sum(row[-1] == eos for row in samples) / len(samples)
    return {"responses": len(samples), "mean": length.mean(), "sd": length.std(), "ended": ended}


def origin(run: SFTRun) -> dict:
    """How, when and on what machine the policy was trained."""
    environment = provenance.environment(run.device, "float32")
    environment["versions"] |= {name: metadata.version(name) for name in LIBRARIES}
    return {
        "command": " ".join(["python", *sys.argv]),
        "settings": dataclasses.asdict(run),
        "commit": provenance.commit(),
        "date": provenance.now(),
        "environment": environment,
        "data_sha256": hashlib.sha256(tiny.PAIRS.read_bytes()).hexdigest(),
    }


def outcome(trained: Trained, model, tokenizer, validation: list[Example], seed: int) -> dict:
    """Losses in nats a response token, and what samples of the policy look like."""
    prompts = pd.Series([example.prompt for example in validation])
    prompts = prompts.sample(min(SAMPLES, len(prompts)), random_state=seed).tolist()
    samples = sample(model, tokenizer, prompts, seed)
    for prompt, response in list(zip(prompts, samples, strict=True))[:20]:
        print(tokenizer.decode([*prompt, *response]).replace("\n", "\\n"))
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "losses": list(trained.losses),
        "chosen_update": trained.chosen_update,
        "validation_loss": response_loss(model, validation),
        f"validation_loss_first_{CHECKED}": response_loss(model, validation[:CHECKED]),
        "sampled_lengths": lengths(samples, tokenizer.eos_token_id),
        "seconds": trained.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=tiny.POLICY, help="folder of the policy")
    parser.add_argument("--width", type=int, default=tiny.WIDTH, help="of the policy")
    parser.add_argument("--tokenizer", help="folder of one that is kept (default: a new one)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE",
                        help="settings of lib.lm.sft.SFTRun other than the book's")  # fmt: skip
    options = parser.parse_args()
    changes = {name: json.loads(value) for name, value in (s.split("=") for s in options.set)}
    run = settings(dataclasses.asdict(RUN) | changes)
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(options.tokenizer)[0] if options.tokenizer else \
        tiny.train_tokenizer(texts())  # fmt: skip
    train, validation = (tiny.examples(tokenizer, split) for split in ("train", "validation"))
    model, source = tiny.new_policy(tokenizer, run.seed, options.width), origin(run)
    trained = sft(model, tokenizer, train, validation, run)
    if model.num_parameters() > BFLOAT16_FROM:
        model.to(torch.bfloat16)  # what is written is what was measured
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    source["pairs"] = {"train": len(train), "validation": len(validation)}
    source |= outcome(trained, model.float(), tokenizer, validation, run.seed)
    (options.output / "training.json").write_text(json.dumps(source, indent=1) + "\n")
    print(f"validation loss {source['validation_loss']:.4f} nats a token: {options.output}")


if __name__ == "__main__":
    main()
