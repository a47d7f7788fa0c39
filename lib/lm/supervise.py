"""Supervised fine-tuning of any policy on responses: what comes before preferences.

`python -m lib.lm.supervise --policy FOLDER_OR_NAME --responses FILE_OR_NAME --out FOLDER` trains on
the responses, EOS included, keeps the epoch of the lowest validation loss, and writes the policy in
the hub's format, which `lib.lm.prepare --policy` takes. Prompt and response are text or message
lists, each in a column or together as `messages`, whose last one is then the response. A column
`split` says what is "train" and what "validation"; without one a tenth of the prompts is drawn.
Rows whose column `capped` is true are left out: their text does not end where its writer meant to.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lib.allowed import between, one_of
from lib.commands import command, until_stopped
from lib.lm.layouts import COLUMNS, as_prompt, last, table
from lib.lm.models import ids, load_policy, load_tokenizer
from lib.lm.pairs import SPLITS
from lib.lm.prepare import (
    EOS_HELP,
    RANGES,
    SPLIT,
    check_device,
    drawn,
    named,
    split_names,
    warn_of_another_end,
    writing_new,
)
from lib.lm.reading import TextError, read_rows
from lib.lm.sft import Example, SFTRun, Trained, response_loss, sft
from lib.lm.text import as_text, encode_prompts, encode_responses
from lib.runs import provenance

LAYOUT, CAPPED, MESSAGES = ("prompt", "response"), "capped", "messages"
PACKAGES = ("transformers", "tokenizers", "trl", "accelerate")
RUN = SFTRun(learning_rate=5e-5, schedule="linear", batch=32, epochs=2, patience=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command(_parser(), supervise, arguments)


def supervise(options: argparse.Namespace) -> Trained:
    """Trains the policy and writes it. Raises: ValueError, before training, for what is wrong."""
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"--out {options.out} is there already: name a new folder")
    check_device(options.device)
    for name in ("max_tokens", "max_prompt"):
        between(named(name), getattr(options, name), *RANGES[name])
    run = replace(RUN, learning_rate=options.rate, epochs=options.epochs, batch=options.batch,
                  seed=options.seed, device=options.device)  # fmt: skip
    tokenizer, _ = load_tokenizer(options.policy, options.revision, eos=options.eos)
    warn_of_another_end(tokenizer)
    data, read = examples(options, tokenizer)
    model, source = load_policy(options.policy, options.revision, device=options.device)
    ids(tokenizer, model)  # which must fit together
    options.out.mkdir(parents=True, exist_ok=True)
    check_room(options.out, model)
    counts = {split: len(rows) for split, rows in data.items()}
    updates = run.epochs * math.ceil(counts["train"] / run.batch)
    run = replace(run, warmup_steps=min(run.warmup_steps, updates // 10))
    print(f"{counts['train']:,} responses to learn from, {counts['validation']:,} held out; {read}")
    first = data["train"][0]
    whole = tokenizer.decode([*first.prompt, *first.response])
    print(f"an example as the model reads it:\n{whole}")
    trained = sft(model, tokenizer, data["train"], data["validation"], run)
    after = response_loss(model, data["validation"], run.batch)  # of what is written, as before it
    environment = provenance.environment(options.device, "float32", PACKAGES)
    record = {"policy": asdict(source), **read, "pairs": counts, "settings": asdict(run),
              "losses": trained.losses, "chosen_update": trained.chosen_update,
              "validation_loss": after, "seconds": round(trained.seconds, 1),
              "commit": provenance.commit(), "date": provenance.now(),
              "environment": environment}  # fmt: skip
    text = json.dumps(record, indent=1) + "\n"
    with writing_new(options.out):
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
        (options.out / "training.json").write_text(text)
    before = trained.losses[0]["validation"]
    print(f"held-out loss {before:.3f} before, {after:.3f} after, nats a token: {options.out}")
    return trained


def check_room(folder: Path, model: Any) -> None:
    """Raises: OSError where a folder has no room for a model: before it is trained."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    if needed > (free := shutil.disk_usage(folder).free):
        raise OSError(f"{folder} has room for {free / 2**30:.2f} GiB, the policy takes "
                      f"{needed / 2**30:.2f}")  # fmt: skip


def examples(
    options: argparse.Namespace, tokenizer: Any
) -> tuple[dict[str, list[Example]], dict[str, Any]]:
    """Prompts and responses as token ids by split, and a record of what was read and left out.

    Raises: ValueError for a file that `prepare` would refuse, or one without responses that fit.
    """
    where = {"config": options.config, "split": options.split,
             "revision": options.responses_revision}  # fmt: skip
    rows, source = read_rows(options.responses, **where)
    if MESSAGES in rows[0] and LAYOUT[0] not in rows[0]:
        rows = [_in_two(row, f"{source.name!r}, row {i}") for i, row in enumerate(rows, 1)]
    for wanted in LAYOUT:
        if not (names := {*COLUMNS[wanted]}) & rows[0].keys():
            raise TextError(f"{source.name!r} has the columns {list(rows[0])} and no {wanted}: "
                            f"name it one of {sorted(names)}, or give both as {MESSAGES!r}"
                            )  # fmt: skip
    found = table(rows, {}, (LAYOUT,), source.name)
    prompts = [as_prompt(ours["prompt"], at) for at, ours in found]
    said = [_response(ours["response"], at) for at, ours in found]
    capped = [_is_capped(row, at) for row, (at, _) in zip(rows, found, strict=True)]
    if any(SPLIT in row for row in rows):
        names = split_names(source.name, rows, [at for at, _ in found], prompts)
        split = [names[as_text(prompt)] for prompt in prompts]
    else:
        split = drawn([as_text(prompt) for prompt in prompts], options.seed)
    full = [i for i in range(len(rows)) if last(prompts[i]).strip() and said[i].strip()]
    kept = [i for i in full if not capped[i] and split[i] in SPLITS]
    heads = encode_prompts(tokenizer, [prompts[i] for i in kept], options.max_prompt)
    kept = [kept[i] for i in heads.kept]
    bodies = encode_responses(tokenizer, [said[i] for i in kept], options.max_tokens)
    data: dict[str, list[Example]] = {name: [] for name in SPLITS}
    for i, head, body, long in zip(kept, heads.ids, bodies.ids, bodies.capped, strict=True):
        if not long:
            data[split[i]].append(Example(head, body))
    left = {"empty": len(rows) - len(full), "capped": sum(capped),
            "too long": heads.too_long + sum(bodies.capped)}  # fmt: skip
    if none := [name for name, examples in data.items() if not examples]:
        raise TextError(f"no response of {source.name!r} is left for {none}: of {len(rows)} rows "
                        f"these were left out: {left}")  # fmt: skip
    return data, {"responses": asdict(source), "left out": left}


def _in_two(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of one message list as one of prompt and response."""
    if not isinstance(talk := row.get(MESSAGES), list) or len(talk) < 2:
        raise TextError(f"{where}: {MESSAGES!r} must be a list of messages, a prompt's and the "
                        f"assistant's answer, got {str(talk)[:80]}")  # fmt: skip
    return {**row, "prompt": talk[:-1], "response": talk[-1:]}


def _response(value: Any, where: str) -> str:
    """A response as text, of one message of the assistant if it is a list."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content") if value[0].get("role") == "assistant" else None
    if not isinstance(value, str):
        raise TextError(f"{where}: a response must be text, or one message of the assistant")
    return value


def _is_capped(row: dict[str, Any], where: str) -> bool:
    """Whether a row says that its response was cut; text as a CSV file has it will do."""
    text = str(row.get(CAPPED, False)).lower()
    return one_of(f"{where}: {CAPPED}", text, ("true", "false")) == "true"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lib.lm.supervise", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--policy", required=True, help="folder in the hub's format, or a hub name")
    parser.add_argument("--revision", help="of the policy on the hub (default: newest, recorded)")
    parser.add_argument("--eos", help=EOS_HELP)
    parser.add_argument("--responses", required=True, help="JSONL, CSV or parquet file, or a data "
                        "set, with the columns prompt and response, or messages")  # fmt: skip
    parser.add_argument("--config", help="of a data set that has several")
    parser.add_argument("--split", help="of a data set that has several")
    parser.add_argument("--responses-revision", help="of a data set on the hub (default: newest)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained policy")
    parser.add_argument("--rate", type=float, default=RUN.learning_rate, help="peak, of AdamW")
    parser.add_argument("--epochs", type=int, default=RUN.epochs, help="at most")
    parser.add_argument("--batch", type=int, default=RUN.batch, help="responses of an update")
    parser.add_argument("--max-tokens", type=int, default=256, help="longer responses (with their "
                        "EOS) are left out")  # fmt: skip
    parser.add_argument("--max-prompt", type=int, default=160, help="longer prompts are left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        choices=("cpu", "cuda"))  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(until_stopped(main, "nothing is kept"))
