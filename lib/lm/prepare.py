"""From a policy and prompts to a folder that the length chapters can run on.

`python -m lib.lm.prepare --policy FOLDER_OR_NAME --prompts FILE_OR_NAME --out FOLDER` samples two
responses to every prompt, labels them by each task's rule, and trains a reward model for each task.
The folder then holds policy/, pairs.parquet, reward-min/, reward-mode/, reward-skew/ and
prepared.json, which says what it was made of. What is there already is kept: the same command goes
on where it stopped, and one that asks for something else is refused.

With `--preferences FILE_OR_NAME` in place of `--prompts`, pairs and labels are those of the
file, and the one task is "given".

A column `split` of either file says what is "train" and what "validation" ("test" is left out);
without one a tenth of the prompts is drawn for validation.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn, TextIO

import pandas as pd
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from lib.allowed import between, one_of
from lib.commands import command, until_stopped
from lib.lm import length, pairs, reward
from lib.lm.config import DECODERS, DTYPES, PREPARED
from lib.lm.layouts import LAYOUTS, Prompt, as_pair, as_prompt, table
from lib.lm.models import (
    FILES,
    Source,
    brief,
    file_digest,
    folder_digest,
    ids,
    load_policy,
    load_reward_model,
    load_tokenizer,
    positions,
    resolve,
    stored_config,
)
from lib.lm.network import Network
from lib.lm.reading import TextError, read_rows
from lib.lm.sampler import KeptSamples, Sampler
from lib.lm.text import (
    Preferences,
    Prompts,
    as_text,
    encode_prompts,
    encode_responses,
    example,
    load_preferences,
    load_prompts,
)
from lib.randomness import uniforms
from lib.runs import provenance, write_atomically, write_folder_atomically

VALIDATION = 0.1  # share of the prompts, where the file names no split
SPLIT = "split"  # the column that names one
LEFT_OUT = "test"
MAX_TOKENS, MAX_PROMPT = 96, 160  # of a response and of a prompt, unless said otherwise
# Rate and epochs of the reward models: of a tiny one from random weights, of any that was trained.
TRAINING = {"tiny": (1e-3, 6), "other": (1e-5, 1)}
# What options may be, and the settings that pairs and reward models depend on.
RANGES = {
    "rate": (1e-12, 1.0), "epochs": (1, 1000), "max_tokens": (1, 100_000),
    "max_prompt": (1, 100_000), "seed": (0, 2**31 - 1), "limit": (1, 10**9), "pairs": (1, 10**9),
    "held_out": (1, 10**9), "strong_temperature": (1e-3, 100.0),
}  # fmt: skip
CUT = ("max_tokens", "max_prompt", "seed")
PAIRS = ("prompts", "preferences", "column", "config", "split", "prompts_revision", "limit", "eos")
REWARD = ("reward_model", "rate", "epochs")
COPIED = (*FILES, "training.json", "LICENSE*", "*.md")  # of a policy's folder
BATCHES = ".pairs.jsonl"  # of a prepared folder: what is sampled, until all is
EOS_HELP = ("token that ends a response, where the tokenizer names none, or another one than its "
            "chat template (Gemma, Phi-3)")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command(_parser(), prepare, arguments)


def made(given: Mapping[str, Any], plan_only: bool = False) -> str:
    """The folder that `prepare` makes with these options; what is in it already is kept.

    Args: given: as on the command line, such as {"policy": "my-model", "prompts": "my.jsonl"};
        without "out" in a folder whose name follows from the others. plan_only: nothing is made.
    Raises: ValueError for an option that there is none, or for a folder that is still to be made
        where nothing may be; what `prepare` raises.
    """
    parser = _parser()
    known = sorted({action.dest for action in parser._actions} - {"help"})
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"prepared: there is no {', '.join(unknown)}; there are {known}")
    parser.error = _refuse
    given = {"out": ""} | {name: value for name, value in given.items() if value is not None}
    words = [word for name, value in given.items()
             for word in (named(name), *map(str, value if isinstance(value, list) else [value]))]
    if not given["out"]:
        words[1] = str(PREPARED / _name_of(parser.parse_args(words)))
    options = parser.parse_args(words)
    if plan_only and not (options.out / "prepared.json").exists():
        raise ValueError(f"plan_only makes nothing, and {options.out} is not there yet: python -m "
                         f"lib.lm.prepare {shlex.join(words)}")  # fmt: skip
    prepare(options)
    return str(options.out)


def _name_of(options: argparse.Namespace) -> str:
    """The name of the folder of some options: the same however they are written, on any device."""
    dtype = options.dtype  # the device's own if it is None
    _settle_tasks(options)
    settle(options)
    values = vars(options) | {"dtype": dtype}
    for name in ("policy", "prompts", "preferences", "reward_model"):
        if values[name] and (path := Path(values[name]).expanduser()).exists():
            values[name] = path.resolve()
    values["tasks"] = sorted(options.tasks)
    counted = {name: str(value) for name, value in values.items()
               if name not in ("out", "device", "cut")}  # fmt: skip
    return f"own-{sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:10]}"


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"prepared: {message}")


def prepare(options: argparse.Namespace) -> None:
    """All steps, each skipped where its result exists. Raises: ValueError for what does not fit."""
    _settle_tasks(options)
    settle(options)
    tokenizer, _ = load_tokenizer(options.policy, options.revision, eos=options.eos)
    warn_of_another_end(tokenizer)
    check_reward_model(options, tokenizer, options.policy)
    out: Path = options.out
    folder, _ = resolve(options.policy, options.revision)
    _check_there(options, folder)
    model, source = load_policy(options.policy, options.revision, device=options.device)
    check_model(model, options)
    there = (out / "pairs.parquet").exists()
    read = None if there else _read(options, tokenizer, ids(tokenizer, model).eos)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _fill(options, folder, tokenizer, model, source, read)
    print(f"prepared: {out}")


def _read(options: argparse.Namespace, tokenizer: Any, eos: tuple[int, ...]) -> Any:
    """Prompts by split, or what `given_pairs` makes of preferences: read, and checked, before
    anything is written."""
    if options.prompts:
        read = _prompts(options, tokenizer)
        check_splits(read)
        return read
    read = _preferences(options, tokenizer, eos)
    check_splits(read[0])
    return read


def _check_there(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The record of what is in `--out`. Raises: ValueError if that is of something else."""
    record = read_record(options.out)
    check_policy(options.out / "policy", folder, options.policy, record.get("policy"))
    _check_kept(options, record)
    return record


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Waits for another command that fills the folder: each would remove what the other writes.
    The lock is the folder's own, so that no file stays; the kernel lets it go, however one ends."""
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another command that prepares {out}", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _fill(
    options: argparse.Namespace, folder: Path, tokenizer: Any, model: Any, source: Source, read: Any
) -> None:
    """Makes what `--out` lacks. Another command may have filled it meanwhile."""
    out, record = options.out, _check_there(options, folder)
    record |= {"policy": asdict(source), "commit": provenance.commit(), "arguments": {
        k: str(v) for k, v in vars(options).items()}}  # fmt: skip
    write_record(out, record)  # so that a killed copy says whose it was
    copy_policy(folder, out / "policy", tokenizer)
    if not (out / "pairs.parquet").exists():
        if options.prompts:
            record["pairs"] = _pairs(options, model, tokenizer, read, source.resolved)
        else:
            splits, _, record["pairs"] = read
            save_pairs(out / "pairs.parquet", splits)
        write_record(out, record)  # a killed training must not lose how they were made
    (out / BATCHES).unlink(missing_ok=True)
    found = ids(tokenizer, model)
    splits = {s: pairs.load(out / "pairs.parquet", s, found.eos) for s in pairs.SPLITS}
    for task in options.tasks:
        if not is_trained(out / f"reward-{task}"):
            record[f"reward-{task}"] = train_reward(
                options, task, splits, tokenizer, model, out / f"reward-{task}"
            )
            write_record(out, record)
    write_record(out, record)


def settle(options: argparse.Namespace) -> None:
    """Fills in the values that follow from others where they were not given.

    Raises: ValueError for a value that is none, a device that is not here, or an `--out` that is no
        folder.
    """
    rate, epochs = TRAINING["tiny" if options.reward_model == "tiny" else "other"]
    options.rate = rate if options.rate is None else options.rate
    options.epochs = epochs if options.epochs is None else options.epochs
    options.dtype = options.dtype or usual_dtype(options.device)
    options.cut = options.max_tokens is not None  # who names a cap may cut every response
    options.max_tokens = options.max_tokens if options.cut else MAX_TOKENS
    for name, (low, high) in RANGES.items():
        if (value := getattr(options, name, None)) is not None:
            between(named(name), value, low, high)
    check_device(options.device)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file: name a folder")


def _settle_tasks(options: argparse.Namespace) -> None:
    """Raises: ValueError for an option that given preferences do not have."""
    if not options.preferences:
        options.tasks = options.tasks or length.TASKS
        return
    if more := [n for n in ("limit", "column", "tasks") if getattr(options, n) is not None]:
        raise ValueError(f"{', '.join(map(named, more))} cannot be given with --preferences: all "
                         f"its pairs are taken, and its one task is {length.GIVEN!r}")  # fmt: skip
    options.tasks = (length.GIVEN,)


def named(option: str) -> str:
    """An option as it is typed."""
    return f"--{option.replace('_', '-')}"


def check_device(device: str) -> None:
    """Raises: ValueError for a GPU that is not here: a CPU in its place would take days."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA device is available here; there is 'cpu'")


def _check_kept(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Raises: ValueError for settings that what is in the folder was not made with."""
    source, then = record.get("pairs", {}).get("source"), record.get("arguments", {})
    kind = "prompts" if then.get("preferences") == "None" else "preferences"
    sources = {kind: source} if source else {}
    if (options.out / "policy").exists():  # whose tokenizer has the EOS that was named
        refuse_other(options, record, "a policy", ("eos",))
    if (options.out / "pairs.parquet").exists():
        refuse_other(options, record, "pairs", (*PAIRS, *CUT), sources)
    if any(is_trained(folder) for folder in options.out.glob("reward-*")):
        refuse_other(options, record, "reward models", (*REWARD, *CUT))


def refuse_other(
    options: argparse.Namespace, record: dict[str, Any], what: str, names: Iterable[str],
    sources: Mapping[str, dict[str, Any]] = {},
) -> None:  # fmt: skip
    """Raises: ValueError that names the settings that `what` of a folder was not made with.

    Args: names: of the settings that count; one that the record does not have is passed over.
        sources: what was read, by the setting that names it.
    """
    then = record.get("arguments", {}) | {name: s["name"] for name, s in sources.items()}
    other = [
        f"{named(name)} {then[name]}" + (f", not {now}" if str(now) != then[name] else
                                         " as it was then: it has changed since")
        for name in names if name in then
        if not _is_same(then[name], now := getattr(options, name), sources.get(name))
    ]  # fmt: skip
    if other:
        raise ValueError(f"{options.out} holds {what} made with {'; '.join(other)}: name a new "
                         "--out")  # fmt: skip


def _is_same(then: str, now: Any, source: dict[str, Any] | None) -> bool:
    """Whether a setting is the recorded one; files by their content where that is recorded."""
    if source and now and Path(now).expanduser().is_file():
        return file_digest(Path(now).expanduser()) == source["resolved"]
    if isinstance(now, str):  # one path can be written in several ways
        return Path(then).expanduser().resolve() == Path(now).expanduser().resolve()
    return then == str(now)


def usual_dtype(device: str) -> str:
    """bfloat16 on a GPU that has it, float16 on one that has not, float32 on a CPU."""
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def ordinary(tokenizer: Any) -> dict[str, int]:
    """A vocabulary without what was added to it, such as a padding token of one's own."""
    added = tokenizer.added_tokens_decoder
    return {token: i for token, i in tokenizer.get_vocab().items() if i not in added}


def check_reward_model(options: argparse.Namespace, tokenizer: Any, policy: str) -> None:
    """Raises: ValueError unless the reward models read the policy's token ids as it does, and have
    positions for a prompt and a response."""
    if options.reward_model == "tiny":
        return
    other, _ = load_tokenizer(options.reward_model, eos=getattr(options, "eos", None))
    if ordinary(other) != ordinary(tokenizer):
        raise ValueError(
            f"the reward model {options.reward_model!r} has another tokenizer than the policy "
            f"{policy!r}: start from one with the policy's, or from 'tiny'"
        )
    _check_positions(stored_config(resolve(options.reward_model)[0]), options, "reward model")


def check_model(model: Any, options: argparse.Namespace) -> None:
    """Raises: ValueError for a policy that the loop cannot train, or whose positions end before
    those of a prompt and a response: before pairs are sampled and reward models trained."""
    Network(model)
    _check_positions(model.config, options, "policy")


def _check_positions(config: Any, options: argparse.Namespace, name: str) -> None:
    longest = positions(config)
    if options.max_prompt + options.max_tokens > longest:
        raise ValueError(f"--max-prompt {options.max_prompt} and --max-tokens {options.max_tokens} "
                         f"are more than the {longest} tokens that the {name} takes")  # fmt: skip


def warn_of_another_end(tokenizer: Any) -> None:
    """Says so where the chat template ends an answer otherwise than by the tokenizer's EOS, as
    Gemma's and Phi-3's do: responses that are given would end as the policy's own never do."""
    if tokenizer.chat_template is None:
        return
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "qzq"}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception:  # a template may raise whatever it likes; it is told with the prompts
        return
    end = next(iter(tokenizer.tokenize(text.rpartition("qzq")[2].strip())), "")
    if end in tokenizer.get_added_vocab() and end != tokenizer.eos_token:
        print(f"warning: the chat template ends an answer with {end!r}, and the tokenizer's EOS is "
              f"{tokenizer.eos_token!r}. With --eos {end!r} responses that are given end as the "
              "policy's own do", file=sys.stderr)  # fmt: skip


def check_policy(there: Path, folder: Path, name: str, source: dict[str, Any] | None) -> None:
    """Raises: ValueError if a prepared folder holds another policy than the one that is given.

    Weights and configuration are compared: the tokenizer may have been given an EOS.
    Args: there: where the policy of the prepared folder is, or will be. folder: of the one that is
        given, whose `name` is said. source: what the record says of the one that is there.
    """
    patterns = ("model*.safetensors", "config.json")
    if there.exists() and folder_digest(there, patterns) != folder_digest(folder, patterns):
        holds = repr(source["name"]) if source else "another"
        raise ValueError(
            f"the policy in {str(there)!r} is {holds}, not {name!r}, and what was made of it is "
            "kept: prepare a folder of its own"
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises: OSError that names `path`, where what writes it says less (safetensors, parquet)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.__cause__ or error  # of a store that is full: it has words of its own
        text = getattr(reason, "strerror", None) or brief(reason)
        raise OSError(f"{path} cannot be written: {text}") from error


@contextmanager
def writing_new(folder: Path) -> Iterator[None]:
    """`writing` into an empty folder, which is empty again where it fails: a part is no policy."""
    try:
        with writing(folder):
            yield
    except OSError:
        for file in folder.glob("*"):
            file.unlink()
        raise


def copy_policy(folder: Path, to: Path, tokenizer: Any = None) -> None:
    """A copy of a policy, unless it is there; with `tokenizer` in place of its own, if given."""

    def others(_: str, names: list[str]) -> list[str]:
        """What stays: checkpoints, weights in other formats, and `to`, if it lies in `folder`."""
        return [name for name in names if not any(fnmatch(name, kept) for kept in COPIED)]

    def copied(new: Path) -> None:
        shutil.copytree(folder, new, symlinks=False, ignore=others)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)  # with the EOS that was named, if one was

    if folder.resolve() != to.resolve() and not to.exists():
        with writing(to):
            write_folder_atomically(to, copied)


def source_of(name: str) -> dict[str, Any]:
    """{"source": what a file holds}, to tell it again; nothing for a data set."""
    path = Path(name).expanduser()
    if not path.is_file():
        return {}
    return {"source": asdict(Source(name, None, file_digest(path)))}


def save_pairs(path: Path, splits: dict[str, pairs.Pairs], *more: Any) -> None:
    """`lib.lm.pairs.save`, whole or not at all: half a file would count as done.

    Raises: ValueError for a split without a pair, which would be kept and never be of use.
    """
    check_splits(splits)
    with writing(path):
        write_atomically(path, lambda new: pairs.save(new, splits, *more))


def check_splits(splits: Mapping[str, Sequence[Any]]) -> None:
    """Raises: ValueError for a split without a row."""
    if empty := [name for name, rows in splits.items() if not len(rows)]:
        raise ValueError(f"nothing is left for {' and '.join(empty)}: give more prompts, or a "
                         "larger --max-prompt")  # fmt: skip


def is_trained(folder: Path) -> bool:
    """Whether a reward model is there, and not what a killed training left."""
    return (folder / "config.json").exists()  # weights may be in several files


# --- pairs ----------------------------------------------------------------------------------------


def _pairs(
    options: argparse.Namespace, model: Any, tokenizer: Any, prompts: dict[str, list[list[int]]],
    policy: str,
) -> dict[str, Any]:  # fmt: skip
    """Samples pairs.parquet; returns its record. Batches that an earlier start drew are taken.

    Args: prompts: by split. policy: what names its content.
    """
    started = perf_counter()
    tokens = options.max_prompt + options.max_tokens
    sampler = Sampler(model, ids(tokenizer, model), tokens, options)
    count = 2 * sum(map(len, prompts.values()))
    with tqdm(total=count, desc="sampling", unit="response") as bar:
        kept = KeptSamples(sampler, options.out / BATCHES, policy, bar)
        if len(few := prompts["train"][: pairs.BATCH]) < len(prompts["train"]):  # before all are
            first = pairs.sample_pairs(kept, few, options.max_tokens, options.seed)
            _capped(_unended(first), options)
        splits = {
            split: pairs.sample_pairs(kept, some, options.max_tokens, options.seed + i)
            for i, (split, some) in enumerate(prompts.items())
        }
    capped = _capped([cut for p in splits.values() for cut in _unended(p)], options)
    save_pairs(options.out / "pairs.parquet", splits)
    lengths = splits["train"].lengths
    return {
        "count": {split: len(p) for split, p in splits.items()}, "seed": options.seed,
        "max_tokens": options.max_tokens, "capped": capped,
        "seconds": round(perf_counter() - started, 1),
        **source_of(options.prompts), "length": {"mean": lengths.mean(), "sd": lengths.std()},
    }  # fmt: skip


def _preferences(
    options: argparse.Namespace, tokenizer: Any, eos: tuple[int, ...]
) -> tuple[dict[str, pairs.Pairs], dict[str, pd.DataFrame], dict[str, Any]]:
    """The user's own preferences as pairs; see `given_pairs`."""
    where = {"config": options.config, "split": options.split,
             "revision": options.prompts_revision}  # fmt: skip
    with naming_columns():
        read = load_preferences(options.preferences, **where)
    split = split_of(options.preferences, read, **where)
    return given_pairs(read, options, tokenizer, eos, split)


@contextmanager
def naming_columns(option: str | None = None) -> Iterator[None]:
    """What a reader says of columns that it does not find, in words of a command.

    Args: option: that names the column, if the command has one.
    Raises: TextError.
    """
    try:
        yield
    except TextError as error:
        text, call, _ = str(error).partition(" Name them: ")
        how = f"Name it: {option} NAME" if option else "Rename the columns of the file"
        raise TextError(f"{text} {how}" if call else text) from None


def given_pairs(
    read: Preferences, options: argparse.Namespace, tokenizer: Any, eos: tuple[int, ...],
    split: list[str] | None = None,
) -> tuple[dict[str, pairs.Pairs], dict[str, pd.DataFrame], dict[str, Any]]:  # fmt: skip
    """Preferences as pairs by split, the first response preferred.

    Args: options: max_prompt, max_tokens, cut, seed. split: of each pair; None for a tenth of the
        prompts held out.
    Returns: the pairs, their instructions as text, and a record of what was read and left out.
    Raises: ValueError if most responses were cut at a length that nobody named.
    """
    print(example(tokenizer, read, max_prompt_tokens=options.max_prompt,
                  max_response_tokens=options.max_tokens))  # fmt: skip
    coded = encode_prompts(tokenizer, read.prompts, options.max_prompt)
    sides = [encode_responses(tokenizer, [side[i] for i in coded.kept], options.max_tokens)
             for side in (read.chosen, read.rejected)]  # fmt: skip
    capped = _capped([*sides[0].capped, *sides[1].capped], options)
    names = [split[i] for i in coded.kept] if split else drawn(map(tuple, coded.ids), options.seed)
    splits, texts = {}, {}
    for name in pairs.SPLITS:
        rows = [i for i, x in enumerate(names) if x == name]
        columns = ([column[i] for i in rows] for column in (coded.ids, *(s.ids for s in sides)))
        splits[name] = pairs.Pairs(*columns, eos)
        kept = [as_text(read.prompts[coded.kept[i]]) for i in rows]
        texts[name] = pd.DataFrame({"instruction": kept})
    record = {"count": {split: len(p) for split, p in splits.items()}, "seed": options.seed,
              "source": asdict(read.source), "dropped": read.counts, "too long": coded.too_long,
              "max_tokens": options.max_tokens, "capped": capped}  # fmt: skip
    return splits, texts, record


def _unended(found: pairs.Pairs) -> list[bool]:
    """Of both responses of each pair, whether it has no EOS."""
    return [not (r and r[-1] in found.eos) for r in (*found.first, *found.second)]


def _capped(cut: list[bool], options: argparse.Namespace) -> int:
    """How many responses were cut, which is said.

    Raises: ValueError if most were cut at a length that nobody named: as long as each other, they
        have no rule to be told apart by.
    """
    count = sum(cut)
    said = f"{count} of all {len(cut)} responses reach {options.max_tokens} tokens and are cut"
    if 2 * count > len(cut) and not options.cut:
        raise ValueError(f"{said}: name a larger --max-tokens, or {options.max_tokens} if that is "
                         "what you want (a policy that is fine-tuned on short answers ends more of "
                         "its own: lib.lm.supervise)")  # fmt: skip
    print(said)
    return count


def _prompts(options: argparse.Namespace, tokenizer: Any) -> dict[str, list[list[int]]]:
    """Token ids by split: the file's own column `split`, or a tenth drawn for validation."""
    where = {"config": options.config, "split": options.split,
             "revision": options.prompts_revision}  # fmt: skip
    with naming_columns("--column"):
        read = load_prompts(options.prompts, column=options.column, **where)
    print(example_of(tokenizer, read, options.max_prompt))
    coded = encode_prompts(tokenizer, read.prompts, options.max_prompt)
    split = split_of(options.prompts, read, column=options.column, **where)
    if split is None:
        split = drawn(map(as_text, read.prompts), options.seed)
    few = _evenly(len(coded.ids), options.limit)
    rows = [(coded.ids[i], split[coded.kept[i]]) for i in few]
    return {name: [row for row, s in rows if s == name] for name in pairs.SPLITS}


def example_of(tokenizer: Any, read: Prompts, max_prompt: int) -> str:
    """`lib.lm.text.example` of prompts, without its count of responses: there are none yet."""
    said = example(tokenizer, read, max_prompt_tokens=max_prompt)
    return said.rpartition(", 0 responses cut")[0] or said


def _evenly(count: int, limit: int | None) -> list[int]:
    """At most `limit` of the numbers below `count`, evenly spread: of every split its share."""
    size = count if limit is None else min(count, limit)
    return [i * count // size for i in range(size)]


def drawn(prompts: Iterable[Hashable], seed: int) -> list[str]:
    """The split of every row: a tenth of the prompts is for validation, each with all its rows."""
    rows = list(prompts)
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(rows))}
    last = (uniforms([seed], 0, 0, (len(number),))[0] < VALIDATION).tolist()
    return ["validation" if last[number[row]] else "train" for row in rows]


def split_of(
    source: str, read: Prompts | Preferences, *, column: str | None = None, **where: str | None
) -> list[str] | None:
    """The split of each of the prompts that were read, by the file's column, where it has one.

    Args: column, where: as `read` was read with.
    Raises: ValueError for a name that is none, or a prompt in two splits.
    """
    rows, _ = read_rows(source, **where)
    if not any(SPLIT in row for row in rows):
        return None
    alone = isinstance(read, Prompts)
    asked = {} if column is None else {"prompt": column}
    found = table(rows, asked, (("prompt",),) if alone else LAYOUTS, source)
    prompts = [as_prompt(ours["prompt"], at) if alone else as_pair(ours, at).prompt
               for at, ours in found]  # fmt: skip
    names = split_names(source, rows, [at for at, _ in found], prompts)
    return [names[as_text(prompt)] for prompt in read.prompts]


def split_names(
    source: str, rows: Sequence[dict[str, Any]], places: Sequence[str], prompts: Sequence[Prompt]
) -> dict[str, str]:
    """The split of each prompt, as text, by the rows' column.

    Args: places: words that say where each row is.
    Raises: ValueError for a name that is none, a prompt in two splits, or a split without rows.
    """
    names: dict[str, str] = {}
    for row, at, prompt in zip(rows, places, prompts, strict=True):
        name = one_of(f"{at}: {SPLIT}", row.get(SPLIT), (*pairs.SPLITS, LEFT_OUT))
        if (other := names.setdefault(as_text(prompt), name)) != name:
            raise ValueError(f"{at}: its prompt is in {name!r} and in {other!r}: what is held out "
                             "must not be trained on")  # fmt: skip
    if absent := [name for name in pairs.SPLITS if name not in names.values()]:
        raise ValueError(f"the column {SPLIT!r} of {source!r} has no row that is {absent}")
    return names


# --- reward models --------------------------------------------------------------------------------


class Epochs(io.TextIOBase):
    """A line for each epoch in place of what a trainer prints, which is all that it logged."""

    def __init__(self, name: str, to: TextIO):
        self.name, self.to = name, to

    def write(self, text: str) -> int:
        said = dict(re.findall(r"'(\w+)': '?([\w.+-]+)", text))
        if "eval_loss" in said:
            self.to.write(f"{self.name}, epoch {said['epoch']}: loss {said['eval_loss']}, accuracy "
                          f"{said['eval_accuracy']} on held-out pairs\n")  # fmt: skip
            self.to.flush()
        return len(text)


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
                             "give more prompts or, where responses are cut, a larger "
                             "--max-tokens")  # fmt: skip
    if options.reward_model == "tiny":
        rows = policy.get_input_embeddings().weight.shape[0]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        model = reward.tiny_reward_model(rows, options.max_prompt + options.max_tokens, pad)
    else:
        model, _ = load_reward_model(options.reward_model, device=options.device, new_head=True)
        ids(tokenizer, model)  # which are checked to be rows of its embedding
    how = reward.RewardTraining(options.rate, options.epochs, seed=options.seed)
    made: dict[str, Any] = {}
    ties = {s: int((~p.any(-1)).sum()) for s, p in preferred.items()}
    count = {s: f"{len(p) - ties[s]} of {len(p)} {s} pairs" for s, p in preferred.items()}
    print(f"{folder.name}: without a tie are {' and '.join(count.values())}; "
          f"epochs: {how.epochs}", flush=True)  # fmt: skip

    def trained(new: Path) -> None:
        with redirect_stdout(Epochs(folder.name, sys.stdout)):
            made.update(reward.train(model, tokenizer, splits, preferred, new, how, options.device))
        shutil.rmtree(new / "trainer", ignore_errors=True)

    with writing(folder):
        write_folder_atomically(folder, trained)
    print(f"{folder.name}: accuracy {made['kept']['accuracy']:.3f} on held-out pairs")
    return {**made, "ties": ties, "target": target}


def read_record(out: Path) -> dict[str, Any]:
    """What is known of a folder's making: its prepared.json, or nothing."""
    path = out / "prepared.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(out: Path, record: dict[str, Any]) -> None:
    """prepared.json of a folder."""
    text = json.dumps(record, indent=1) + "\n"
    with writing(out / "prepared.json"):
        write_atomically(out / "prepared.json", lambda temporary: temporary.write_text(text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lib.lm.prepare", description=__doc__)
    parser.add_argument("--policy", required=True, help="folder in the hub's format, or a hub name")
    parser.add_argument("--revision", help="of the policy on the hub (default: newest, recorded)")
    parser.add_argument("--eos", help=EOS_HELP)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--prompts", help="JSONL, CSV or parquet file, or a data set")
    data.add_argument("--preferences", help="the same with pairs of your own in place of prompts")
    parser.add_argument("--column", help="of the prompts, where the name is not a usual one")
    parser.add_argument("--config", help="of a data set that has several")
    parser.add_argument("--split", help="of a data set that has several")
    parser.add_argument("--prompts-revision", help="of a data set on the hub (default: newest)")
    parser.add_argument("--limit", type=int, help="prompts at most, evenly from the file")
    parser.add_argument("--out", type=Path, required=True, help="folder to prepare")
    parser.add_argument("--tasks", nargs="+", choices=length.TASKS,
                        help=f"default: {' '.join(length.TASKS)}")  # fmt: skip
    add_shared(parser)
    return parser


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The options of reward models, lengths, seed and device, which `prepare_full` has as well."""
    (rate, epochs), (low, once) = TRAINING.values()
    parser.add_argument("--reward-model", default="tiny", help='"tiny", or a model to start from')
    parser.add_argument("--rate", type=float, help="of the reward models (default: "
                        f"{rate:g} for the tiny one, {low:g} for others)")  # fmt: skip
    parser.add_argument("--epochs", type=int, help="of the reward models, at most (default: "
                        f"{epochs} for the tiny one, {once} for others)")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, help=f"cap of a response (default: {MAX_TOKENS}; "
                        "to be named if it cuts most responses of given pairs)")  # fmt: skip
    parser.add_argument("--max-prompt", type=int, default=MAX_PROMPT,
                        help="longer prompts are dropped")
    parser.add_argument("--dtype", choices=DTYPES, help="of the products while sampling (default: "
                        "bfloat16, on older GPUs float16, on a CPU float32)")  # fmt: skip
    parser.add_argument("--decoder", choices=[d for d in DECODERS if d], help="how keys and values "
                        "are kept (default: growing)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        choices=("cpu", "cuda"), help="the first GPU that is seen; another by "
                        "CUDA_VISIBLE_DEVICES")  # fmt: skip


if __name__ == "__main__":
    sys.exit(until_stopped(main, "what is finished is kept; the same command goes on from there"))
