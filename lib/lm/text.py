"""Prompts and preferences of the user's own: read, checked, counted, and turned into token ids.

Conventions, here and nowhere else: a response is what follows the prompt's last token; it ends in
exactly one EOS, or is capped at a number of tokens and then has none; its length counts its tokens
without EOS. A prompt that is too long is dropped and counted, never cut.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lib.lm.layouts import (
    LAYOUTS,
    Prompt,
    as_pair,
    as_prompt,
    last,
    table,
    unusable,
    without_repeated_prompt,
)
from lib.lm.models import Source, TokenizerError, brief
from lib.lm.reading import TextError, read_rows

# The format of a prompt for tokenizers without a chat template.
PLAIN_TURN = "{role}:\n{content}\n\n"
PLAIN_ROLES = {"system": "System", "user": "Instruction", "assistant": "Response"}
PLAIN_ANSWER = "Response:\n"

SHOWN = 256  # rows whose lengths `example` reports


@dataclass(frozen=True)
class Prompts:
    """Prompts, in the order of the file.

    Args:
        prompts: text or message lists, all of one kind.
        source: what they were read from.
        rows: rows read.
        counts: rows dropped, by reason.
    """

    prompts: list[Prompt]
    source: Source
    rows: int
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Preferences:
    """Pairs of responses of which the first is preferred, in the order of the file.

    Args:
        prompts: text or message lists, all of one kind.
        chosen, rejected: the responses alone, without the prompt.
        scores: those of chosen and rejected where the file has them, else None. A `preference` in
            [1, 2] gives (2 - preference, preference - 1) to response_1 and response_2.
        source: what they were read from.
        rows: rows read.
        counts: rows dropped as `ties` (equal scores), `empty` (prompt or response), `identical`
            (responses); and rows kept of which it is said that the `prompt repeated` at the start
            of the responses was taken off, or that the scores prefer the other (`contradicted`).
    """

    prompts: list[Prompt]
    chosen: list[str]
    rejected: list[str]
    scores: list[tuple[float, float]] | None
    source: Source
    rows: int
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class EncodedPrompts:
    """Args:
    ids: token ids of each prompt that fits, up to where the response begins.
    kept: index of each in what was given, to take the responses that belong to them.
    too_long: how many were dropped.
    """

    ids: list[list[int]]
    kept: list[int]
    too_long: int


@dataclass(frozen=True)
class EncodedResponses:
    """Args:
    ids: token ids of each response, with its EOS unless capped.
    lengths: tokens without EOS.
    capped: whether it reached the cap and so has no EOS.
    """

    ids: list[list[int]]
    lengths: list[int]
    capped: list[bool]


def load_prompts(
    source: str | Path,
    *,
    column: str | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> Prompts:
    """Prompts of a file or data set (see `read_rows`), as text or message lists.

    Args:
        column: where they are; default: the first there is of `COLUMNS["prompt"]`.
    Raises: TextError that names the file, the row and what is wrong with it; HubError.
    """
    rows, origin = read_rows(source, config=config, split=split, revision=revision, limit=limit)
    asked = {} if column is None else {"prompt": column}
    found = table(rows, asked, (("prompt",),), origin.name)
    prompts = [as_prompt(row["prompt"], where) for where, row in found]
    kept = [prompt for prompt in prompts if last(prompt).strip()]
    counts = {"empty": len(prompts) - len(kept)}
    if not kept:
        raise TextError(f"{origin.name!r} has no prompt: all {len(rows)} are empty")
    return Prompts(kept, origin, len(rows), counts)


def load_preferences(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> Preferences:
    """Preferences of a file or data set (see `read_rows`), in any of `LAYOUTS`.

    Prompt and responses are text or message lists; message lists of chosen and rejected may begin
    with the prompt, which is then what both begin with.

    Args:
        columns: the file's names of our `COLUMNS`, where it has others.
    Raises: TextError that names the file, the row and what is wrong with it; HubError.
    """
    rows, origin = read_rows(source, config=config, split=split, revision=revision, limit=limit)
    found = table(rows, columns or {}, LAYOUTS, origin.name)
    counts = Counter({"ties": 0, "empty": 0, "identical": 0, "prompt repeated": 0,
                      "contradicted": 0})  # fmt: skip
    pairs = without_repeated_prompt([as_pair(row, where) for where, row in found], counts)
    kept = []
    for pair in pairs:
        reason = unusable(pair)
        counts["contradicted"] += reason is None and pair.contradicted
        if reason is None:
            kept.append(pair)
        else:
            counts[reason] += 1
    if not kept:
        raise TextError(f"{origin.name!r} has no usable pair in its {len(rows)} rows: "
                        f"{_said(counts)}")  # fmt: skip
    scores = None if kept[0].scores is None else [pair.scores for pair in kept]
    return Preferences(
        [pair.prompt for pair in kept], [pair.chosen for pair in kept],
        [pair.rejected for pair in kept], scores, origin, len(rows), dict(counts),
    )  # fmt: skip


def as_text(prompt: Prompt) -> str:
    """A prompt as one column holds it: text, or its messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def from_text(text: str) -> Prompt:
    """The prompt that `as_text` wrote. Text that only looks like messages is text."""
    if not text.startswith('[{"'):
        return text
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return text
    messages = all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found)
    return found if messages else text


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The text of a prompt up to where the response begins: by the chat template, else `PLAIN_*`.

    Raises: TextError if the template refuses it.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if tokenizer.chat_template is None:
        turns = [PLAIN_TURN.format(role=PLAIN_ROLES.get(m["role"], m["role"].capitalize()),
                                   content=m["content"]) for m in messages]  # fmt: skip
        return "".join(turns) + PLAIN_ANSWER
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise whatever it likes
        roles = [message["role"] for message in messages]
        raise TextError(f"the chat template refuses a prompt of the roles {roles}: {brief(error)}"
                        ) from error  # fmt: skip


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_tokens: int
) -> EncodedPrompts:
    """Prompts as token ids, those of more than `max_tokens` dropped and counted.

    Raises: TextError if none fits, or the chat template refuses one.
    """
    _at_least_one(max_tokens)
    texts = [render(tokenizer, prompt) for prompt in prompts]
    bound = max_tokens * _longest_token(tokenizer)  # no longer text can fit: not tokenised at all
    candidates = [i for i, text in enumerate(texts) if len(text) <= bound]
    coded = rendered_ids(tokenizer, [texts[i] for i in candidates])
    fits = [(i, ids) for i, ids in zip(candidates, coded, strict=True) if len(ids) <= max_tokens]
    if prompts and not fits:
        shortest = min(map(len, coded), default=None)
        raise TextError(f"none of {len(prompts)} prompts fits in {max_tokens} tokens"
                        + (f": the shortest has {shortest}" if shortest else ""))  # fmt: skip
    return EncodedPrompts([ids for _, ids in fits], [i for i, _ in fits], len(texts) - len(fits))


def rendered_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of rendered prompts. A chat template writes the BOS itself, where there is one."""
    start = [] if tokenizer.chat_template is not None else _start(tokenizer)
    return [start + ids for ids in _tokens(tokenizer, texts)]


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[str], max_tokens: int
) -> EncodedResponses:
    """Responses as token ids with EOS, those of `max_tokens` or more tokens cut there, without EOS.

    Special tokens at the end of a text are taken off; their names elsewhere in it are text, so that
    no EOS stands inside a response.
    Raises: TokenizerError without EOS.
    """
    _at_least_one(max_tokens)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise TokenizerError("the tokenizer has no EOS: name one with load_tokenizer(..., eos=...)")
    bound = (max_tokens + 1) * _longest_token(tokenizer)  # what comes later cannot matter
    texts = [_without_end(tokenizer, response)[:bound] for response in responses]
    coded = _tokens(tokenizer, texts, split_special_tokens=True)
    if any(eos in ids for ids in coded):
        number = next(i for i, ids in enumerate(coded, 1) if eos in ids)
        raise TextError(f"response {number} holds {tokenizer.eos_token!r} before its end, and this "
                        "tokenizer cannot read it as text: take it out")  # fmt: skip
    capped = [len(ids) >= max_tokens for ids in coded]
    cut = [ids[:max_tokens] for ids in coded]
    done = [ids if cap else [*ids, eos] for ids, cap in zip(cut, capped, strict=True)]
    return EncodedResponses(done, [len(ids) for ids in cut], capped)


def example(
    tokenizer: PreTrainedTokenizerBase,
    data: Prompts | Preferences,
    *,
    max_prompt_tokens: int = 512,
    max_response_tokens: int = 512,
    index: int = 0,
) -> str:
    """One example as the model will see it, special tokens visible, with lengths and counts.

    Lengths are those of the first `SHOWN` rows that fit; `index` counts among them.
    Raises: TextError; TokenizerError.
    """
    prompts = encode_prompts(tokenizer, data.prompts[:SHOWN], max_prompt_tokens)
    if not 0 <= index < len(prompts.ids):
        raise TextError(f"index must be 0 to {len(prompts.ids) - 1}, got {index}")
    sides = {"prompt": (prompts.ids, [len(ids) for ids in prompts.ids])}
    capped = 0
    for side in ("chosen", "rejected") if isinstance(data, Preferences) else ():
        texts = [getattr(data, side)[i] for i in prompts.kept]
        coded = encode_responses(tokenizer, texts, max_response_tokens)
        sides[side], capped = (coded.ids, coded.lengths), capped + sum(coded.capped)
    what = "pairs" if isinstance(data, Preferences) else "prompts"
    template = "the tokenizer's chat template" if tokenizer.chat_template else "the plain format"
    lines = [
        f"{len(data)} {what} of {data.source.name} ({data.rows} rows; {_said(data.counts)})",
        f"Prompts are formatted by {template}. Example {index}:",
    ]
    for side, (ids, lengths) in sides.items():
        lines += [f"--- {side}: {_size(ids[index], lengths[index])}",
                  _shortened(tokenizer.decode(ids[index]))]  # fmt: skip
    lines.append(f"--- tokens of the first {len(prompts.ids)} that fit: median (5% to 95%)")
    lines += [f"{side}: {_spread(lengths)}" for side, (_, lengths) in sides.items()]
    lines.append(f"of the first {min(SHOWN, len(data))} rows: {prompts.too_long} prompts of more "
                 f"than {max_prompt_tokens} tokens dropped, {capped} responses cut at "
                 f"{max_response_tokens} (no EOS)")  # fmt: skip
    return "\n".join(lines)


def _at_least_one(max_tokens: int) -> None:
    if isinstance(max_tokens, bool) or max_tokens != int(max_tokens) or max_tokens < 1:
        raise TextError(f"max_tokens must be a whole number, 1 or more, got {max_tokens!r}")


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], **more: Any
) -> list[list[int]]:
    """Token ids of texts and of nothing else: no padding, cutting or tokens added."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, **more)[
        "input_ids"
    ]


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS, for tokenizers that begin every text with one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()))


def _without_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """`text` without the special tokens that it ends in."""
    ends = tuple(token for token in tokenizer.all_special_tokens if token)
    while text.rstrip().endswith(ends):
        text = text.rstrip()
        text = text[: -max(len(end) for end in ends if text.endswith(end))]
    return text


def _size(ids: list[int], length: int) -> str:
    return f"{length} tokens and EOS" if len(ids) > length else f"{length} tokens"


def _shortened(text: str, room: int = 600) -> str:
    half = room // 2
    return text if len(text) <= room else f"{text[:half]} [...] {text[-half:]}"


def _spread(lengths: list[int]) -> str:
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    return f"{middle:.0f} ({low:.0f} to {high:.0f}), longest {max(lengths)}"


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "all kept"
