"""From policies and a judge to a folder that the full-scale chapter can run on.

Pairs made here: the first policy answers every prompt twice, `--strong` once, and `--judge` says
which answer of two is better:

    python -m lib.lm.prepare_full --policy 128=data/length/policy --policy 64=FOLDER \\
        --prompts FILE_OR_NAME --strong FOLDER_OR_NAME --judge FOLDER_OR_NAME --out FOLDER

Pairs that exist, such as the relabelled AlpacaFarm pairs and UltraFeedback's:

    python -m lib.lm.prepare_full --policy sft=FOLDER_OR_NAME --similar FILE_OR_NAME \\
        --distinct FILE_OR_NAME --out FOLDER

The folder then holds policy-NAME/ for each, similar.parquet, distinct.parquet (the first response
is the preferred one), a reward model for each, and prepared.json, which says what it was made of.
What is there already is kept, and so are the judge's scores; a command that asks for something else
is refused. Pairs are kept as token ids: all
policies of a folder, and a reward model that is no tiny one, must have the same tokenizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from lib.commands import command, until_stopped
from lib.lm import pairs as files
from lib.lm.batches import padded, unpadded
from lib.lm.full_scale import KINDS, SCORES
from lib.lm.gold import Judge, Kept, load_judge
from lib.lm.length import GIVEN
from lib.lm.models import ids, load_policy, load_tokenizer, resolve
from lib.lm.pairs import SPLITS, Pairs
from lib.lm.prepare import (
    BATCHES,
    CUT,
    EOS_HELP,
    REWARD,
    add_shared,
    check_model,
    check_policy,
    check_reward_model,
    check_splits,
    copy_policy,
    example_of,
    given_pairs,
    is_trained,
    naming_columns,
    ordinary,
    read_record,
    refuse_other,
    save_pairs,
    settle,
    source_of,
    split_of,
    train_reward,
    warn_of_another_end,
    write_record,
    writing,
)
from lib.lm.sampler import KeptSamples, Sampler
from lib.lm.text import (
    Prompt,
    as_text,
    encode_prompts,
    encode_responses,
    load_preferences,
    load_prompts,
)
from lib.randomness import uniforms
from lib.runs import provenance, write_atomically

BATCH = 64  # prompts that the strong model answers, and responses judged, at once
STRONG, SPLIT = 1, 2  # streams of random numbers
ANSWERERS = {"similar": ("first", "second"), "distinct": ("strong", "first")}
# Settings that pairs depend on: those made here, and those that were read.
MADE = ("prompts", "strong", "strong_temperature", "judge", "pairs", "held_out", "eos")
READ = ("split", "revision", "eos")
SHORT = "You are a helpful assistant who gives short answers in plain English."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command(_parser(), prepare, arguments)


def prepare(options: argparse.Namespace) -> None:
    """All steps, each skipped where its result exists. Raises: ValueError for what does not fit."""
    made = (options.prompts, options.strong, options.judge)
    given = (options.similar, options.distinct)
    if all(made) == any(given) or (any(made) and not all(made)):
        raise ValueError("give --prompts, --strong and --judge to make pairs, or --similar and/or "
                         "--distinct to read them")  # fmt: skip
    if options.eos and not options.copy:
        raise ValueError("--eos is written into the copies of the policies: not with --no-copy")
    settle(options)
    weak, out = options.policy[0][1], options.out
    tokenizer, _ = load_tokenizer(weak, eos=options.eos)
    warn_of_another_end(tokenizer)
    _check_tokenizers(options)
    check_reward_model(options, tokenizer, weak)
    folders = {name: resolve(source)[0] for name, source in options.policy}
    for name, source in options.policy:
        check_policy(out / f"policy-{name}", folders[name], source, None)
    record = read_record(out)
    _check_kept(options, record)
    model, source = load_policy(weak, device=options.device)
    check_model(model, options)
    if all(made):  # all that is read, before anything is written
        prompts = None if _are_made(out) else _prompts(options, tokenizer)
    else:
        read = _read(options, tokenizer, ids(tokenizer, model).eos)
    out.mkdir(parents=True, exist_ok=True)
    record |= {"commit": provenance.commit(), "arguments": _arguments(options, record)}
    if not _are_made(out):  # else it is the one that answered then
        record["policy"] = asdict(source)
    for name, folder in folders.items() if options.copy else ():
        own = load_tokenizer(folder, eos=options.eos)[0] if options.eos else None
        copy_policy(folder, out / f"policy-{name}", own)
    if not all(made):
        _keep(out, read, record)
    elif prompts:
        _make(options, prompts, model, tokenizer, record)
    for kind in KINDS:
        if (out / f"{kind}.parquet").exists() and not is_trained(out / f"reward-{kind}"):
            splits = {s: files.load(out / f"{kind}.parquet", s, ids(tokenizer, model).eos)
                      for s in SPLITS}  # fmt: skip
            record[f"reward-{kind}"] = train_reward(
                options, GIVEN, splits, tokenizer, model, out / f"reward-{kind}"
            )
            write_record(out, record)
    write_record(out, record)
    print(f"prepared: {out}")


def _are_made(out: Path) -> bool:
    return all((out / f"{kind}.parquet").exists() for kind in KINDS)


def _check_kept(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Raises: ValueError for settings that what is in the folder was not made with."""
    for kind in KINDS:
        if not (options.out / f"{kind}.parquet").exists():
            continue
        source = record.get(kind, {}).get("source")
        if bool(options.prompts) == bool(source) and kind in record:
            raise ValueError(f"{options.out} holds {kind} pairs that were "
                             f"{'read' if source else 'made here'}: name a new --out")  # fmt: skip
        if options.prompts and _are_made(options.out):
            sources = {"prompts": record["source"]} if "source" in record else {}
            refuse_other(options, record, "pairs", (*MADE, *CUT), sources)
        if getattr(options, kind):
            refuse_other(options, record, f"{kind} pairs", (kind, *READ, *CUT),
                         {kind: source} if source else {})  # fmt: skip
        if is_trained(options.out / f"reward-{kind}"):
            refuse_other(options, record, f"the reward model of {kind} pairs", (*REWARD, *CUT))


def _arguments(options: argparse.Namespace, record: dict[str, Any]) -> dict[str, str]:
    """The options as text; of pairs that were read before and are not named now, what was said."""
    now = {name: str(value) for name, value in vars(options).items()}
    then = record.get("arguments", {})
    return now | {kind: then[kind] for kind in KINDS if kind in then and not getattr(options, kind)}


def _check_tokenizers(options: argparse.Namespace) -> None:
    """Raises: ValueError for a policy, of the options or of the folder, that would read the pairs'
    token ids as another text than the first one does."""
    (_, weak), *others = options.policy
    expected = _reading(weak, options.eos)
    there = sorted((folder.name, str(folder)) for folder in options.out.glob("policy-*"))
    given = [(*policy, options.eos) for policy in others]
    for name, source, eos in (*given, *((*copy, None) for copy in there)):  # a copy has its own
        if _reading(source, eos) != expected:
            raise ValueError(
                f"{name} ({source!r}) has another tokenizer than {weak!r}, and the pairs of a "
                "folder are token ids: prepare a folder of its own"
            )


def _reading(source: str, eos: str | None) -> tuple[dict[str, int], list[list[int]], int]:
    """What the tokenizer of a policy reads: its vocabulary, a formatted prompt, and its EOS."""
    tokenizer, _ = load_tokenizer(source, eos=eos)
    return ordinary(tokenizer), encode_prompts(tokenizer, ["a"], 10_000).ids, tokenizer.eos_token_id


# --- pairs made here ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Answers to the prompts of a split, by the name of who answered: token ids and texts.

    The text of a strong answer that did not end by itself is None: it cannot be compared.
    """

    prompts: list[list[int]]
    instructions: list[Prompt]
    ids: dict[str, list[list[int]]]
    texts: dict[str, list[str | None]]


def _make(
    options: argparse.Namespace, prompts: dict[str, tuple[list, list[Prompt]]], model: Any,
    tokenizer: Any, record: dict[str, Any],
) -> None:  # fmt: skip
    """similar.parquet and distinct.parquet by the judge's labels. Args: prompts: of `_prompts`."""
    started, how = perf_counter(), _how(options)
    for s, (_, texts) in prompts.items():
        _check_strong(_strong_file(options, s), texts, how)
    judge = Kept(load_judge(options.judge, device=options.device), options.scores)
    found = ids(tokenizer, model)
    splits = {s: _answers(options, s, p, how, model, tokenizer) for s, p in prompts.items()}
    scores = {s: {name: _judged(judge, a.instructions, texts) for name, texts in a.texts.items()}
              for s, a in splits.items()}  # fmt: skip
    for kind, (one, two) in ANSWERERS.items():
        labelled = {s: _labelled(a, scores[s], one, two, found.eos) for s, a in splits.items()}
        save_pairs(options.out / f"{kind}.parquet", {s: p for s, (p, _) in labelled.items()},
                   {s: more for s, (_, more) in labelled.items()})  # fmt: skip
        wins = {s: float((more["answerer"] == one).mean()) for s, (_, more) in labelled.items()}
        record[kind] = {"count": {s: len(p) for s, (p, _) in labelled.items()},
                        f"share preferred: {one}": wins}  # fmt: skip
    record |= {"judge": asdict(judge.source), "seed": options.seed, **source_of(options.prompts),
               "seconds": round(perf_counter() - started, 1)}  # fmt: skip
    write_record(options.out, record)
    (options.out / BATCHES).unlink(missing_ok=True)


def _prompts(options: argparse.Namespace, tokenizer: Any) -> dict[str, tuple[list, list[Prompt]]]:
    """Ids and texts of the prompts by split, `--pairs` and `--held-out` of them, drawn by seed."""
    with naming_columns():
        read = load_prompts(options.prompts)
    print(example_of(tokenizer, read, options.max_prompt))
    coded = encode_prompts(tokenizer, read.prompts, options.max_prompt)
    split = split_of(options.prompts, read)
    order = uniforms([options.seed], SPLIT, 0, (len(coded.ids),))[0].argsort().tolist()
    wanted = {"train": options.pairs, "validation": options.held_out}
    chosen: dict[str, list[int]] = {}
    for name, count in wanted.items():
        taken = {tuple(coded.ids[i]) for rows in chosen.values() for i in rows}
        rows = [i for i in order if tuple(coded.ids[i]) not in taken
                and (split is None or split[coded.kept[i]] == name)][:count]  # fmt: skip
        if len(rows) < count:
            raise ValueError(f"{options.prompts!r} has {len(rows)} {name} prompts left, "
                             f"{count} were asked for")  # fmt: skip
        chosen[name] = rows
    return {name: ([coded.ids[i] for i in rows], [read.prompts[coded.kept[i]] for i in rows])
            for name, rows in chosen.items()}  # fmt: skip


def _answers(
    options: argparse.Namespace, split: str, prompts: tuple[list, list[Prompt]], how: str,
    model: Any, tokenizer: Any,
) -> Answers:  # fmt: skip
    """Two answers of the policy and one of the strong model (`_how`) to every prompt, as text."""
    coded, texts = prompts
    found = ids(tokenizer, model)
    number = SPLITS.index(split)
    weak = Sampler(model, found, options.max_prompt + options.max_tokens, options)
    policy = resolve(options.policy[0][1])[1].resolved
    with tqdm(total=2 * len(coded), desc="sampling", unit="response") as bar:
        kept = KeptSamples(weak, options.out / BATCHES, policy, bar)
        sampled = files.sample_pairs(kept, coded, options.max_tokens, options.seed + 1 + number)
    coded_answers = {"first": sampled.first, "second": sampled.second}  # as they were sampled
    answers = {name: tokenizer.batch_decode(side, skip_special_tokens=True)
               for name, side in coded_answers.items()}  # fmt: skip
    strong = [text or None for text in _kept_strong(options, split, texts, how)]
    coded_answers["strong"] = encode_responses(
        tokenizer, [text or "" for text in strong], options.max_tokens
    ).ids
    return Answers(coded, texts, coded_answers, answers | {"strong": strong})


def _how(options: argparse.Namespace) -> str:
    """What the strong model's answers depend on besides the prompts, as JSON."""
    return json.dumps({
        "strong": resolve(options.strong)[1].resolved, "system": SHORT, "seed": options.seed,
        "strong_temperature": options.strong_temperature, "max_tokens": options.max_tokens,
    })  # fmt: skip


def _strong_file(options: argparse.Namespace, split: str) -> Path:
    return options.out / f".strong-{split}.parquet"


def _check_strong(kept: Path, prompts: list[Prompt], how: str) -> None:
    """Raises: ValueError if a file has answers to other prompts, or ones that were made otherwise;
    it names what differs."""
    if not kept.exists():
        return
    table, asked = pd.read_parquet(kept), json.loads(how)
    then = json.loads(table["how"].iloc[0]) if "how" in table else {}
    other = [name for name, value in asked.items() if then.get(name) != value]
    if "prompt" not in table or table["prompt"].tolist() != list(map(as_text, prompts)):
        other.append("prompts")
    if other:
        raise ValueError(
            f"the answers in {str(kept)!r} were made with other {', '.join(other)}: remove them to "
            "have new ones, or prepare a folder of its own"
        )


def _kept_strong(
    options: argparse.Namespace, split: str, prompts: list[Prompt], how: str
) -> list[str]:
    """The strong model's answers, kept in the folder: they take the longest."""
    kept = _strong_file(options, split)
    if not kept.exists():
        texts = list(_strong(options, prompts, SPLITS.index(split)))
        made = {"prompt": list(map(as_text, prompts)), "text": texts, "how": how}
        with writing(kept):
            write_atomically(kept, pd.DataFrame(made).to_parquet)
    return pd.read_parquet(kept)["text"].tolist()


def _strong(options: argparse.Namespace, prompts: list[Prompt], number: int) -> Iterator[str]:
    """The strong model's answers, told to be short, at its temperature; "" for one that was cut."""
    model, source = load_policy(options.strong, device=options.device)
    tokenizer, _ = load_tokenizer(options.strong)
    found = ids(tokenizer, model)
    longest = 10 * options.max_prompt
    scorer = Sampler(model, found, longest + options.max_tokens, options,
                     options.strong_temperature)  # fmt: skip
    system = [{"role": "system", "content": SHORT}]
    asked = [system + ([{"role": "user", "content": p}] if isinstance(p, str) else p)
             for p in prompts]  # fmt: skip
    with tqdm(total=len(asked), desc="strong answers", unit="response") as bar:
        scorer = KeptSamples(scorer, options.out / BATCHES, source.resolved, bar)
        for start in range(0, len(asked), BATCH):
            part = encode_prompts(tokenizer, asked[start : start + BATCH], longest).ids
            heads, mask = padded(part, found.pad, "left", options.device)
            numbers = uniforms([options.seed], STRONG, 1000 * number + start // BATCH,
                               (len(part), options.max_tokens))[0].to(options.device)  # fmt: skip
            out = scorer.sample(heads, mask, numbers)
            for row in unpadded(out.completions, out.mask):
                ended = row[-1] in found.eos
                yield tokenizer.decode(row, skip_special_tokens=True).strip() if ended else ""


def _judged(judge: Judge, prompts: list[Prompt], texts: list[str | None]) -> np.ndarray:
    """(N,) gold rewards, NaN for no answer; kept batch by batch, so that a second call goes on."""
    rows = [i for i, text in enumerate(texts) if text is not None]
    rows.sort(key=lambda i: len(texts[i]))  # alike lengths together: little padding
    scores = np.full(len(texts), np.nan)
    for start in tqdm(range(0, len(rows), BATCH), desc="judging", unit="batch"):
        part = rows[start : start + BATCH]
        scores[part] = judge.score([prompts[i] for i in part], [texts[i] for i in part])
    return scores


def _labelled(
    answers: Answers, scores: dict[str, np.ndarray], one: str, two: str, eos: tuple[int, ...]
) -> tuple[Pairs, pd.DataFrame]:
    """Pairs with the better answer first, and what is known of them; ties are dropped."""
    rows = np.flatnonzero(np.nan_to_num(scores[one] - scores[two])).tolist()
    order = [(one, two) if scores[one][i] > scores[two][i] else (two, one) for i in rows]
    sides = [[answers.ids[names[side]][i] for i, names in zip(rows, order, strict=True)]
             for side in (0, 1)]  # fmt: skip
    gold = [[scores[names[side]][i] for i, names in zip(rows, order, strict=True)]
            for side in (0, 1)]  # fmt: skip
    more = pd.DataFrame({
        "instruction": [as_text(answers.instructions[i]) for i in rows],
        "answerer": [names[0] for names in order], "gold_first": gold[0], "gold_second": gold[1],
    })  # fmt: skip
    return Pairs([answers.prompts[i] for i in rows], *sides, eos), more


# --- pairs that exist -----------------------------------------------------------------------------


def _read(
    options: argparse.Namespace, tokenizer: Any, eos: tuple[int, ...]
) -> dict[str, tuple[dict[str, Pairs], dict[str, pd.DataFrame], dict[str, Any]]]:
    """The pairs of files or data sets that the folder lacks, as `given_pairs` has them, by kind;
    the first response is the preferred one."""
    found, where = {}, {"split": options.split, "revision": options.revision}
    for kind in KINDS:
        name = getattr(options, kind)
        if not name or (options.out / f"{kind}.parquet").exists():
            continue
        with naming_columns():
            read = load_preferences(name, **where)
        found[kind] = given_pairs(read, options, tokenizer, eos, split_of(name, read, **where))
        check_splits(found[kind][0])
    return found


def _keep(out: Path, read: dict[str, tuple], record: dict[str, Any]) -> None:
    """A file for each kind of pairs that `_read` found."""
    for kind, (splits, texts, record[kind]) in read.items():
        save_pairs(out / f"{kind}.parquet", splits, texts)
        write_record(out, record)


def _named(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source) or "/" in name:
        raise argparse.ArgumentTypeError("a policy is NAME=FOLDER_OR_NAME, the NAME without '/', "
                                         f"got {text!r}")  # fmt: skip
    return name, source


def _parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m lib.lm.prepare_full", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=_named, action="append", required=True,
                        help="NAME=FOLDER_OR_NAME; the first answers the prompts")
    parser.add_argument("--no-copy", dest="copy", action="store_false",
                        help="the policies stay where they are")
    # fmt: on
    parser.add_argument("--eos", help=EOS_HELP)
    parser.add_argument("--prompts", help="JSONL, CSV or parquet file, or a data set")
    parser.add_argument("--strong", help="the stronger model: folder or hub name")
    parser.add_argument("--strong-temperature", type=float, default=0.8)
    parser.add_argument("--judge", help="a language model, or a reward model: folder or hub name")
    parser.add_argument("--scores", type=Path, default=SCORES, help="file that keeps its scores")
    parser.add_argument("--similar", help="pairs of one policy's samples: a file or a data set")
    parser.add_argument("--distinct", help="pairs of models of different strength")
    parser.add_argument("--split", help="of a data set that has several")
    parser.add_argument("--revision", help="of a data set on the hub (default: newest, recorded)")
    parser.add_argument("--pairs", type=int, default=2048, help="training pairs that are made")
    parser.add_argument("--held-out", type=int, default=256, help="pairs for evaluation")
    parser.add_argument("--out", type=Path, required=True, help="folder to prepare")
    add_shared(parser)
    return parser


if __name__ == "__main__":
    sys.exit(until_stopped(main, "what is finished is kept; the same command goes on from there"))
