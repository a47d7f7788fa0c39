"""Supervised fine-tuning of any policy on responses: what comes before preferences.

`python -m lib.lm.supervise --policy FOLDER_OR_NAME --responses FILE_OR_NAME --out FOLDER` trains on
the responses, EOS included, keeps the epoch of the lowest validation loss, and writes the policy in
the hub's format, which `lib.lm.prepare --policy` takes. A column `split` says what is "train" and
what "validation"; without one a tenth of the prompts is drawn. Rows whose column `capped` is true
are left out: their text does not end where its writer meant to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lib.lm.layouts import as_prompt, table
from lib.lm.models import load_policy, load_tokenizer
from lib.lm.pairs import SPLITS
from lib.lm.prepare import SPLIT, drawn
from lib.lm.reading import TextError, read_rows
from lib.lm.sft import Example, SFTRun, Trained, sft
from lib.lm.text import as_text, encode_prompts, encode_responses
from lib.runs import provenance, write_atomically

CAPPED = "capped"
RUN = SFTRun(learning_rate=5e-5, schedule="linear", batch=32, epochs=2, patience=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        supervise(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def supervise(options: argparse.Namespace) -> Trained:
    """Trains the policy and writes it. Raises: ValueError, before training, for what is wrong."""
    run = replace(RUN, learning_rate=options.rate, epochs=options.epochs, batch=options.batch,
                  seed=options.seed, device=torch.device(options.device).type)  # fmt: skip
    tokenizer, _ = load_tokenizer(options.policy, options.revision, eos=options.eos)
    data, read = examples(options, tokenizer)
    model, source = load_policy(options.policy, options.revision, device=options.device)
    counts = {split: len(rows) for split, rows in data.items()}
    print(f"{counts['train']:,} responses to learn from, {counts['validation']:,} held out")
    trained = sft(model, tokenizer, data["train"], data["validation"], run)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    record = {"policy": asdict(source), **read, "pairs": counts, "settings": asdict(run),
              "losses": trained.losses, "chosen_update": trained.chosen_update,
              "seconds": round(trained.seconds, 1), "commit": provenance.commit()}  # fmt: skip
    write_atomically(options.out / "training.json",
                     lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))  # fmt: skip
    losses = ", ".join(f"{row['validation']:.3f}" for row in trained.losses)
    print(f"validation loss by epoch, nats a token: {losses}; written: {options.out}")
    return trained


def examples(
    options: argparse.Namespace, tokenizer: Any
) -> tuple[dict[str, list[Example]], dict[str, Any]]:
    """Prompts and responses as token ids by split, and a record of what was read.

    Raises: TextError for a file without prompts and responses, or none that fits the caps.
    """
    rows, source = read_rows(options.responses, config=options.config, split=options.split,
                             revision=options.responses_revision)  # fmt: skip
    rows = [row for row in rows if not row.get(CAPPED)]
    found = table(rows, {}, (("prompt", "response"),), source.name)
    if lists := next((where for where, row in found if not isinstance(row["response"], str)), None):
        raise TextError(f"{lists}: a response must be text")
    prompts = [as_prompt(row["prompt"], where) for where, row in found]
    heads = encode_prompts(tokenizer, prompts, options.max_prompt)
    bodies = encode_responses(tokenizer, [found[i][1]["response"] for i in heads.kept],
                              options.max_tokens)  # fmt: skip
    if any(SPLIT in row for row in rows):
        names = [rows[i].get(SPLIT) for i in heads.kept]
    else:
        names = drawn([as_text(prompts[i]) for i in heads.kept], options.seed)
    data: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for head, body, capped, name in zip(heads.ids, bodies.ids, bodies.capped, names, strict=True):
        if not capped and name in data:
            data[name].append(Example(head, body))
    if empty := [split for split, rows in data.items() if not rows]:
        raise TextError(f"{source.name!r} has no response of at most {options.max_tokens} tokens "
                        f"for {empty}")  # fmt: skip
    return data, {"responses": asdict(source), "too long": heads.too_long + sum(bodies.capped)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lib.lm.supervise", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--policy", required=True, help="folder in the hub's format, or a hub name")
    parser.add_argument("--revision", help="of the policy on the hub (default: newest, recorded)")
    parser.add_argument("--eos", help="token that ends a response, for a tokenizer without one")
    parser.add_argument("--responses", required=True, help="JSONL, CSV or parquet file, or a data "
                        "set, with the columns prompt and response")  # fmt: skip
    parser.add_argument("--config", help="of a data set that has several")
    parser.add_argument("--split", help="of a data set that has several")
    parser.add_argument("--responses-revision", help="of a data set on the hub (default: newest)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained policy")
    parser.add_argument("--rate", type=float, default=RUN.learning_rate, help="peak, of AdamW")
    parser.add_argument("--epochs", type=int, default=RUN.epochs, help="at most")
    parser.add_argument("--batch", type=int, default=RUN.batch, help="responses of an update")
    parser.add_argument("--max-tokens", type=int, default=256, help="longer responses are left out")
    parser.add_argument("--max-prompt", type=int, default=160, help="longer prompts are left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
