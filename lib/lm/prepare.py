"""From a policy and prompts to a folder that the length chapters can run on.

`python -m lib.lm.prepare --policy FOLDER_OR_NAME --prompts FILE_OR_NAME --out FOLDER` samples two
responses to every prompt, labels them by each task's rule, and trains a reward model for each task.
The folder then holds policy/, pairs.parquet, reward-min/, reward-mode/, reward-skew/ and
prepared.json, which says what it was made of. What is there already is kept.

With `--preferences FILE_OR_NAME` in place of `--prompts`, pairs and labels are those of the
file, and the one task is "given".
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch

from lib.lm import length, pairs, reward
from lib.lm.models import ids, load_policy, load_reward_model, load_tokenizer, resolve
from lib.lm.network import Network
from lib.lm.policy import Scorer
from lib.lm.text import (
    Preferences,
    as_text,
    encode_prompts,
    encode_responses,
    example,
    load_preferences,
    load_prompts,
)
from lib.randomness import uniforms
from lib.runs import provenance, write_atomically

VALIDATION = 0.1  # share of the prompts, where the file names no split


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.preferences:
        options.tasks = (length.GIVEN,)
    try:
        prepare(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(options: argparse.Namespace) -> None:
    """All steps, each skipped where its result exists."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    record = read_record(out)
    model, source = load_policy(options.policy, options.revision, device=options.device)
    tokenizer, _ = load_tokenizer(options.policy, options.revision, eos=options.eos)
    record |= {"policy": asdict(source), "commit": provenance.commit(), "arguments": {
        k: str(v) for k, v in vars(options).items()}}  # fmt: skip
    folder, _ = resolve(options.policy, options.revision)
    if folder.resolve() != (out / "policy").resolve() and not (out / "policy").exists():
        shutil.copytree(folder, out / "policy", symlinks=False)
        tokenizer.save_pretrained(out / "policy")  # with the EOS that was named, if one was
    if not (out / "pairs.parquet").exists():
        make = _pairs if options.prompts else _given
        record["pairs"] = make(options, model, tokenizer)
    found = ids(tokenizer, model)
    splits = {s: pairs.load(out / "pairs.parquet", s, found.eos) for s in pairs.SPLITS}
    for task in options.tasks:
        if not (out / f"reward-{task}" / "model.safetensors").exists():
            record[f"reward-{task}"] = train_reward(
                options, task, splits, tokenizer, model, out / f"reward-{task}"
            )
            write_record(out, record)
    write_record(out, record)
    print(f"prepared: {out}")


def _pairs(options: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Samples pairs.parquet; returns its record."""
    started = perf_counter()
    found = ids(tokenizer, model)
    scorer = Scorer(Network(model), found.eos, found.pad)
    splits = {
        split: pairs.sample_pairs(scorer, prompts, options.max_tokens, options.seed + i)
        for i, (split, prompts) in enumerate(_prompts(options, tokenizer).items())
    }
    pairs.save(options.out / "pairs.parquet", splits)
    lengths = splits["train"].lengths
    return {
        "count": {split: len(p) for split, p in splits.items()}, "seed": options.seed,
        "max_tokens": options.max_tokens, "seconds": round(perf_counter() - started, 1),
        "length": {"mean": lengths.mean(), "sd": lengths.std()},
    }  # fmt: skip


def _given(options: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """pairs.parquet from the user's own preferences; returns its record."""
    read = load_preferences(options.preferences, config=options.config, split=options.split,
                            revision=options.prompts_revision)  # fmt: skip
    splits, _, record = given_pairs(read, options, tokenizer, ids(tokenizer, model).eos)
    pairs.save(options.out / "pairs.parquet", splits)
    return record


def given_pairs(
    read: Preferences, options: argparse.Namespace, tokenizer: Any, eos: tuple[int, ...]
) -> tuple[dict[str, pairs.Pairs], dict[str, pd.DataFrame], dict[str, Any]]:
    """Preferences as pairs by split, the first response preferred; a tenth is held out.

    Args: options: max_prompt, max_tokens, seed.
    Returns: the pairs, their instructions as text, and a record of what was read and left out.
    """
    print(example(tokenizer, read, max_prompt_tokens=options.max_prompt,
                  max_response_tokens=options.max_tokens))  # fmt: skip
    coded = encode_prompts(tokenizer, read.prompts, options.max_prompt)
    sides = [
        encode_responses(tokenizer, [side[i] for i in coded.kept], options.max_tokens).ids
        for side in (read.chosen, read.rejected)
    ]
    last = (uniforms([options.seed], 0, 0, (len(coded.ids),))[0] < VALIDATION).tolist()
    splits, texts = {}, {}
    for name, wanted in (("train", False), ("validation", True)):
        rows = [i for i, x in enumerate(last) if x is wanted]
        columns = ([column[i] for i in rows] for column in (coded.ids, *sides))
        splits[name] = pairs.Pairs(*columns, eos)
        kept = [as_text(read.prompts[coded.kept[i]]) for i in rows]
        texts[name] = pd.DataFrame({"instruction": kept})
    record = {"count": {split: len(p) for split, p in splits.items()}, "seed": options.seed,
              "source": asdict(read.source), "dropped": read.counts,
              "too long": coded.too_long, "max_tokens": options.max_tokens}  # fmt: skip
    return splits, texts, record


def _prompts(options: argparse.Namespace, tokenizer: Any) -> dict[str, list[list[int]]]:
    """Token ids by split: the file's own column `split`, or a tenth drawn for validation."""
    read = load_prompts(options.prompts, column=options.column, config=options.config,
                        split=options.split, revision=options.prompts_revision)  # fmt: skip
    print(example(tokenizer, read, max_prompt_tokens=options.max_prompt))
    coded = encode_prompts(tokenizer, read.prompts, options.max_prompt)
    split = split_of(options.prompts, len(read.prompts))
    if split is None:
        last = uniforms([options.seed], 0, 0, (len(read.prompts),))[0] < VALIDATION
        split = ["validation" if x else "train" for x in last.tolist()]
    few = _evenly(len(coded.ids), options.limit)
    rows = [(coded.ids[i], split[coded.kept[i]]) for i in few]
    return {name: [row for row, s in rows if s == name] for name in pairs.SPLITS}


def _evenly(count: int, limit: int | None) -> list[int]:
    """At most `limit` of the numbers below `count`, evenly spread: of every split its share."""
    size = count if limit is None else min(count, limit)
    return [i * count // size for i in range(size)]


def split_of(prompts: str, count: int) -> list[str] | None:
    """The column `split` of a parquet file of `count` prompts, where it has one."""
    if not prompts.endswith(".parquet"):
        return None
    table = pd.read_parquet(prompts)
    return table["split"].tolist() if "split" in table and len(table) == count else None


def train_reward(
    options: argparse.Namespace, task: str, splits: dict[str, pairs.Pairs], tokenizer: Any,
    policy: Any, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Trains the reward model of one task's pairs; returns its record.

    Args: options: reward_model, max_prompt, max_tokens, rate, epochs, seed, device.
    """
    target = float(splits["train"].lengths.mean())
    splits = pairs.of_task(splits, task)
    preferred = {s: p.preferred(task, target) for s, p in splits.items()}
    for split, labels in preferred.items():
        if not labels.any():
            raise ValueError(f"{task}: none of the {len(labels)} {split} pairs is without a tie: "
                             "give more prompts")  # fmt: skip
    if options.reward_model == "tiny":
        rows = policy.get_input_embeddings().weight.shape[0]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        model = reward.tiny_reward_model(rows, options.max_prompt + options.max_tokens, pad)
    else:
        model, _ = load_reward_model(options.reward_model, device=options.device, new_head=True)
    how = reward.RewardTraining(options.rate, options.epochs, seed=options.seed)
    made = reward.train(model, tokenizer, splits, preferred, folder, how, options.device)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    ties = {s: int((~p.any(-1)).sum()) for s, p in preferred.items()}
    print(f"{folder.name}: accuracy {made['kept']['accuracy']:.3f} on held-out pairs")
    return {**made, "ties": ties, "target": target}


def read_record(out: Path) -> dict[str, Any]:
    """What is known of a folder's making: its prepared.json, or nothing."""
    path = out / "prepared.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(out: Path, record: dict[str, Any]) -> None:
    """prepared.json of a folder."""
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(out / "prepared.json", lambda temporary: temporary.write_text(text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lib.lm.prepare", description=__doc__)
    parser.add_argument("--policy", required=True, help="folder in the hub's format, or a hub name")
    parser.add_argument("--revision", help="of the policy on the hub (default: newest, recorded)")
    parser.add_argument("--eos", help="token that ends a response, for a tokenizer without one")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--prompts", help="JSONL, CSV or parquet file, or a data set")
    data.add_argument("--preferences", help="the same with pairs of your own in place of prompts")
    parser.add_argument("--column", help="of the prompts, where the name is not a usual one")
    parser.add_argument("--config", help="of a data set that has several")
    parser.add_argument("--split", help="of a data set that has several")
    parser.add_argument("--prompts-revision", help="of a data set on the hub (default: newest)")
    parser.add_argument("--limit", type=int, help="prompts at most, evenly from the file")
    parser.add_argument("--out", type=Path, required=True, help="folder to prepare")
    parser.add_argument("--tasks", nargs="+", default=length.TASKS, choices=length.TASKS)
    add_shared(parser)
    return parser


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The options of reward models, lengths, seed and device, which `prepare_full` has as well."""
    parser.add_argument("--reward-model", default="tiny", help='"tiny", or a model to start from')
    parser.add_argument("--rate", type=float, default=1e-3, help="of the reward models")
    parser.add_argument("--epochs", type=int, default=6, help="of the reward models, at most")
    parser.add_argument("--max-tokens", type=int, default=96, help="cap of a response")
    parser.add_argument("--max-prompt", type=int, default=160, help="longer prompts are dropped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
