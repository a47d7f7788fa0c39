"""The layouts of prompt and preference files, each brought to prompt, chosen and rejected."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lib.lm.models import brief
from lib.lm.reading import TextError

Messages = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...]
Prompt = str | Messages

# Our names of columns, and the names that files give them; the first that is there is taken.
COLUMNS = {
    "prompt": ("prompt", "instruction", "question", "query"),
    "response": ("response", "output", "completion", "answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "response_1": ("response_1", "output_1"),
    "response_2": ("response_2", "output_2"),
    "preference": ("preference",),
    "score_chosen": ("score_chosen", "chosen_score"),
    "score_rejected": ("score_rejected", "rejected_score"),
    "score_1": ("score_1",),
    "score_2": ("score_2",),
}
TEXT_COLUMNS = ("prompt", "response", "chosen", "rejected", "response_1", "response_2")
# What a preference file must have, one of: (chosen's message lists may hold the prompt)
LAYOUTS = (
    ("chosen", "rejected"),
    ("prompt", "response_1", "response_2", "preference"),
    ("prompt", "response_1", "response_2", "score_1", "score_2"),
)
INPUT = "input"  # further text of an `instruction`, which belongs to the prompt
SYSTEM = ("system", "system_prompt")  # a message before it, as Orca's pairs have one
ECHO = 20  # characters: a prompt this long is not repeated by chance


@dataclass(frozen=True)
class Pair:
    """A row in the one form that every layout is brought to."""

    prompt: Prompt
    chosen: str
    rejected: str
    scores: tuple[float, float] | None

    @property
    def contradicted(self) -> bool:
        return self.scores is not None and self.scores[0] < self.scores[1]


def unusable(pair: Pair) -> str | None:
    """Why a pair is dropped, None if it is not."""
    if pair.scores is not None and pair.scores[0] == pair.scores[1]:
        return "ties"
    if not all(text.strip() for text in (last(pair.prompt), pair.chosen, pair.rejected)):
        return "empty"
    return "identical" if pair.chosen.strip() == pair.rejected.strip() else None


def table(
    rows: list[dict[str, Any]],
    asked: Mapping[str, str],
    layouts: tuple[tuple[str, ...], ...],
    name: str,
) -> list[tuple[str, dict[str, Any]]]:
    """Rows by our names of columns, each with the words that say where it is.

    Raises: TextError for a missing column, or rows of several layouts.
    """
    names = _names(list(rows[0]), asked, layouts, name)
    system = next((column for column in SYSTEM if column in rows[0]), None)
    found = []
    for number, row in enumerate(rows, 1):
        where = f"{name!r}, row {number}"
        if absent := [theirs for theirs in names.values() if theirs not in row]:
            raise TextError(f"{where} has no {absent}, only {list(row)}, while row 1 has them: "
                            "a file holds one layout")  # fmt: skip
        ours = {our: row[theirs] for our, theirs in names.items()}
        more = row.get(INPUT) if names.get("prompt") == "instruction" else None
        if more and isinstance(more, str) and isinstance(ours["prompt"], str):
            ours["prompt"] = f"{ours['prompt']}\n\n{more}"
        if system and isinstance(ours.get("prompt"), str):
            ours["prompt"] = _after(row.get(system), ours["prompt"])
        found.append((where, ours))
    for column in set(TEXT_COLUMNS) & set(names):
        _check_kinds(found, column, names[column])
    return found


def _after(system: Any, prompt: str) -> Messages:
    """A prompt as messages, behind that of the system if it has any text."""
    messages = [{"role": "user", "content": prompt}]
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _names(
    there: list[str],
    asked: Mapping[str, str],
    layouts: tuple[tuple[str, ...], ...],
    name: str,
) -> dict[str, str]:
    """Our names of the columns that a file has -> its own. Raises: TextError."""
    if unknown := sorted(set(asked) - set(COLUMNS)):
        raise TextError(f"columns must be among {tuple(COLUMNS)}, got {unknown}")
    if absent := [theirs for theirs in asked.values() if theirs not in there]:
        raise TextError(f"{name!r} has no column {absent}; it has {there}")
    found = {our: next((n for n in known if n in there), None) for our, known in COLUMNS.items()}
    found |= asked
    for layout in layouts:
        wanted = {*layout, "prompt", *(_scored(found) if "chosen" in layout else ())}
        if all(found[our] for our in layout) and wanted.issuperset(asked):
            return {our: theirs for our, theirs in found.items() if theirs and our in wanted}
    looked = " or ".join(str(["/".join(COLUMNS[our]) for our in layout]) for layout in layouts)
    how = "column=..." if layouts == (("prompt",),) else "columns={'chosen': ..., ...}"
    given = f" with {dict(asked)}" if asked else ""
    raise TextError(f"{name!r} has the columns {there}{given}; looked for {looked}. Name them: "
                    f"{how}")  # fmt: skip


def _scored(found: Mapping[str, str | None]) -> tuple[str, ...]:
    """The score columns of chosen and rejected, if both are there."""
    both = ("score_chosen", "score_rejected")
    return both if all(found[our] for our in both) else ()


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "a message list" if isinstance(value, list) else f"{type(value).__name__} {value!r}"[:60]


def _check_kinds(table: list[tuple[str, dict[str, Any]]], column: str, theirs: str) -> None:
    """Raises: TextError unless every row's value is text, or every row's is a message list."""
    first = _kind(table[0][1][column])
    for where, row in table:
        kind = _kind(row[column])
        if kind not in ("text", "a message list"):
            raise TextError(f"{where}: {theirs!r} is {kind}, must be text or a list of messages")
        if kind != first:
            raise TextError(f"{where}: {theirs!r} is {kind}, in row 1 it is {first}: mixed formats "
                            "in one file")  # fmt: skip
    written = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from)['"]\s*:""")
    if first == "text" and all(written.match(row[column]) for _, row in table):
        raise TextError(f"{table[0][0]}: {theirs!r} holds message lists written out as text: give "
                        "JSON Lines or parquet, which can hold lists")  # fmt: skip


def _text(value: str, where: str) -> str:
    """Raises: TextError for half of a surrogate pair, which no tokenizer reads."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{where} holds text that is not Unicode: {brief(error)}") from None
    return value


def _messages(value: list[Any], where: str) -> Messages:
    """Raises: TextError for a list of anything else than messages of text."""
    for message in value:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(field), str) for field in ("role", "content")):
            raise TextError(f"{where}: a message must have 'role' and 'content' as text, got "
                            f"{repr(message)[:80]}")  # fmt: skip
    return [{"role": m["role"], "content": _text(m["content"], where)} for m in value]


def as_prompt(value: Any, where: str) -> Prompt:
    """A prompt as text or messages. Raises: TextError if there is none, or it ends in an answer."""
    if isinstance(value, str):
        return _text(value, where)
    messages = _messages(value, where)
    if not messages or messages[-1]["role"] == "assistant":
        raise TextError(f"{where}: a prompt must end in a message of the user, got the roles "
                        f"{[message['role'] for message in messages]}")  # fmt: skip
    return messages


def last(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _number(value: Any, where: str, column: str) -> float:
    """Raises: TextError for anything that is not a finite number (text of one is)."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise TextError(f"{where}: {column!r} must be a number, got {value!r}")
    return number


def as_pair(row: Mapping[str, Any], where: str) -> Pair:
    """A row of any layout. Raises: TextError."""
    better, worse, scores = _ordered(row, where)
    if isinstance(better, str) != isinstance(worse, str):
        raise TextError(f"{where}: one response is text and the other a message list")
    if isinstance(better, str):
        if "prompt" not in row:
            raise TextError(f"{where}: chosen and rejected are text, and there is no prompt "
                            f"({'/'.join(COLUMNS['prompt'])}): give it a column. Transcripts in "
                            "one text, as HH-RLHF has them, must be message lists")  # fmt: skip
        prompt = as_prompt(row["prompt"], where)
    else:
        prompt, better, worse = _from_messages(row.get("prompt"), better, worse, where)
    return Pair(prompt, _text(better, where), _text(worse, where), scores)


def _ordered(
    row: Mapping[str, Any], where: str
) -> tuple[str | list, str | list, tuple[float, float] | None]:
    """The better response, the worse, and their scores. Raises: TextError."""
    if "chosen" in row:
        columns = [column for column in ("score_chosen", "score_rejected") if column in row]
        scores = tuple(_number(row[column], where, column) for column in columns) or None
        return row["chosen"], row["rejected"], scores
    if "preference" in row:
        value = _number(row["preference"], where, "preference")
        if not 1 <= value <= 2:
            raise TextError(f"{where}: preference must be in [1, 2] (1: response_1 is preferred, "
                            f"2: response_2), got {row['preference']!r}")  # fmt: skip
        first, second = 2 - value, value - 1
    else:
        first, second = (_number(row[column], where, column) for column in ("score_1", "score_2"))
    if first >= second:
        return row["response_1"], row["response_2"], (first, second)
    return row["response_2"], row["response_1"], (second, first)


def _from_messages(given: Any, better: list, worse: list, where: str) -> tuple[Prompt, str, str]:
    """Prompt and responses of two message lists, which may begin with the prompt.

    Raises: TextError unless one message of the assistant follows the prompt in each.
    """
    better, worse = _messages(better, where), _messages(worse, where)
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
        shared += 1
    for rest in (better[shared:], worse[shared:]):
        if [message["role"] for message in rest] != ["assistant"]:
            raise TextError(f"{where}: after the {shared} messages that both begin with, each must "
                            "have one message of the assistant, got the roles "
                            f"{[message['role'] for message in rest]}")  # fmt: skip
    answers = better[shared]["content"], worse[shared]["content"]
    if not shared and given is None:
        raise TextError(f"{where}: neither a prompt column nor messages of a prompt")
    if not shared:
        return as_prompt(given, where), *answers
    prompt = as_prompt(better[:shared], where)
    if isinstance(given, list) and prompt[0]["role"] != "system":  # of a column of its own
        prompt = [m for m in _messages(given, where) if m["role"] == "system"] + prompt
    if given is not None and given != prompt and last(as_prompt(given, where)) != last(prompt):
        raise TextError(f"{where}: the prompt column and the messages before the responses are not "
                        "the same prompt")  # fmt: skip
    return prompt, *answers


def without_repeated_prompt(pairs: list[Pair], counts: Counter) -> Iterator[Pair]:
    """Pairs without the prompt at the start of their responses, where that is how the file is.

    A short prompt may open an answer by chance ("Hi" and "Hi there"): it is taken off only where
    at least half of the file's pairs repeat theirs.
    """
    repeated = [_repeats(last(pair.prompt), pair) for pair in pairs]
    layout = 2 * sum(repeated) >= len(pairs)
    for pair, repeats in zip(pairs, repeated, strict=True):
        start = last(pair.prompt)
        if repeats and (layout or len(start) >= ECHO):
            counts["prompt repeated"] += 1
            rest = (text[len(start):].lstrip() for text in (pair.chosen, pair.rejected))
            yield Pair(pair.prompt, *rest, pair.scores)
        else:
            yield pair


def _repeats(prompt: str, pair: Pair) -> bool:
    """Whether both responses begin with the prompt, as words of their own."""
    starts = (text.startswith(prompt) and
              (prompt[-1].isspace() or not text[len(prompt):] or text[len(prompt)].isspace())
              for text in (pair.chosen, pair.rejected))  # fmt: skip
    return bool(prompt.strip()) and all(starts)
