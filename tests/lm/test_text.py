"""Prompts and preferences: every format, layout and error, and what becomes of them as tokens."""

import gzip
import json
import os
import time
from pathlib import Path

import datasets
import pandas as pd
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lib.lm import reading, text
from lib.lm.models import HubError, SourceError, TokenizerError
from lib.lm.text import TextError
from tests.tiny_lm import EOS, PAD, TEMPLATE, tiny_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [
    {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."},
    {"prompt": "Add 1 and 1.", "chosen": "2", "rejected": "NA"},
    {"prompt": "Say 2024-01-01,\nquoted \"so\".", "chosen": "ünïcode ✓", "rejected": "null"},
]  # fmt: skip
PREFERENCES = {"ties": 0, "empty": 0, "identical": 0, "prompt repeated": 0, "contradicted": 0}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory) -> None:
    """What `datasets` prepares from folders goes nowhere else."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def lines(tmp_path):
    """Writes rows, or text as it is, as a JSON Lines file."""

    def write(*rows, name="rows.jsonl") -> Path:
        done = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(done) + "\n", encoding="utf-8")
        return tmp_path / name

    return write


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def pair(prompt="p", chosen="good", rejected="bad", **more) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def write_as(kind: str, rows: list[dict], folder: Path) -> Path:
    """The same rows in one of the formats."""
    path, table = folder / f"rows.{kind}", pd.DataFrame(rows)
    content = "".join(json.dumps(row) + "\n" for row in rows)
    match kind:
        case "jsonl" | "json":
            path.write_text(content)
        case "jsonl.gz" | "json.gz":
            path.write_bytes(gzip.compress(content.encode()))
        case "list.json":
            path.write_text("\n " + json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
        case "bom.jsonl":
            path.write_text(content, "utf-8-sig")
        case "csv":
            table.to_csv(path, index=False)
        case "csv.gz":
            table.to_csv(path, index=False)
        case "tsv":
            table.to_csv(path, index=False, sep="\t")
        case "parquet":
            table.to_parquet(path)
        case "hub":
            path.mkdir()
            table.to_parquet(path / "train-00000-of-00001.parquet")
        case "saved":
            datasets.Dataset.from_list(rows).save_to_disk(path)
        case "saved_splits":
            datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return path


KINDS = ["jsonl", "json", "jsonl.gz", "json.gz", "list.json", "bom.jsonl", "csv", "csv.gz", "tsv",
         "parquet", "hub", "saved", "saved_splits"]  # fmt: skip


# ---- formats


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_text(kind, tmp_path):
    path = write_as(kind, ROWS, tmp_path)
    data = text.load_preferences(path)
    assert [data.prompts, data.chosen, data.rejected] == [
        [row[column] for row in ROWS] for column in ("prompt", "chosen", "rejected")
    ]
    assert (data.rows, data.scores, data.counts) == (3, None, PREFERENCES)
    assert data.source.name == str(path) and data.source.resolved.startswith("sha256:")
    assert text.load_prompts(path).prompts == data.prompts


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "sv" not in kind])
def test_every_format_but_csv_holds_message_lists(kind, tmp_path):
    rows = [{"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}]
    data = text.load_preferences(write_as(kind, rows, tmp_path))
    assert (data.prompts, data.chosen, data.rejected) == ([[user("hi")]], ["a"], ["b"])


@pytest.mark.parametrize("kind", KINDS)
def test_limit_reads_the_first_rows(kind, tmp_path):
    path = write_as(kind, ROWS, tmp_path)
    assert text.load_prompts(path, limit=2).prompts == [row["prompt"] for row in ROWS[:2]]
    assert text.load_prompts(path, limit=99).rows == 3


def test_limit_stops_before_what_comes_later(lines):
    assert len(text.load_prompts(lines({"prompt": "a"}, "{broken"), limit=1)) == 1


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_bad_limit(lines, limit):
    with pytest.raises(TextError, match=f"limit must be .* got {limit}"):
        text.load_prompts(lines({"prompt": "a"}), limit=limit)


def test_resolved_is_the_content(lines):
    first = text.load_prompts(lines({"prompt": "a"})).source.resolved
    assert text.load_prompts(lines({"prompt": "a"}, name="b.jsonl")).source.resolved == first
    assert text.load_prompts(lines({"prompt": "b"})).source.resolved != first


def test_splits_must_be_named_where_there_are_several(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    assert text.load_prompts(tmp_path, split="test").prompts == ["test"]
    with pytest.raises(TextError, match=r"one of \['train', 'test'\], got None"):
        text.load_prompts(tmp_path)
    with pytest.raises(TextError, match="dev"):
        text.load_prompts(tmp_path, split="dev")


def test_configurations_must_be_named_where_there_are_several(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    blocks = "".join(f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{blocks}---\n")
    assert text.load_prompts(tmp_path, config="two").prompts == ["two"]
    with pytest.raises(TextError, match=r"\['one', 'two'\]"):
        text.load_prompts(tmp_path)


@pytest.mark.parametrize("given", [{"split": "train"}, {"revision": "v1"}, {"config": "x"}])
def test_a_file_has_no_split_or_revision(lines, given):
    with pytest.raises(TextError, match="which has none"):
        text.load_prompts(lines({"prompt": "a"}), **given)


# ---- files that cannot be read


@pytest.mark.parametrize("source", ["./none.jsonl", "none.parquet", "/none/at/all", "x.csv.gz", ""])
def test_missing_file(source):
    with pytest.raises(TextError, match=f"there is no file {source!r}"):
        text.load_prompts(source)


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.parquet.gz", "rows.xlsx", "rows.pkl"])
def test_unknown_format(lines, name):
    with pytest.raises(TextError, match=r"format of .* is unknown.*\.jsonl"):
        text.load_prompts(lines({"prompt": "a"}, name=name))


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_empty_file(tmp_path, content, name):
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match="is empty"):
        text.load_prompts(tmp_path / name)


@pytest.mark.parametrize("content", ["", "prompt\n"])
def test_empty_csv(tmp_path, content):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(TextError, match="is empty"):
        text.load_prompts(tmp_path / "rows.csv")


def test_empty_folder(tmp_path):
    with pytest.raises(TextError, match="cannot be read as a data set"):
        text.load_prompts(tmp_path)


@pytest.mark.parametrize("bad", ["{", "prompt: b", '{"prompt": "b"', "{'prompt': 'b'}"])
def test_broken_line_is_named(lines, bad):
    with pytest.raises(TextError, match="rows.jsonl', line 3 is not JSON"):
        text.load_prompts(lines({"prompt": "a"}, "", bad, {"prompt": "c"}))


@pytest.mark.parametrize("row", ['"text"', "5", "null", '["a"]'])
def test_row_that_is_no_object(lines, row):
    with pytest.raises(TextError, match="rows.jsonl', row 2 is .* not an object"):
        text.load_prompts(lines({"prompt": "a"}, row))


def test_csv_with_uneven_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen\na,b\nc,d,e\n")
    with pytest.raises(TextError, match="rows.csv' cannot be read as .csv.*line 3"):
        text.load_prompts(path)
    path.write_text("prompt,chosen\na,b,c\nd,e,f\n")
    with pytest.raises(TextError, match="more fields than its header"):
        text.load_prompts(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_text_that_is_not_utf8(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"prompt": "caf\xe9"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(TextError, match="is not UTF-8"):
        text.load_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "rows.parquet"])
@pytest.mark.parametrize("content", [b"not packed", gzip.compress(b'{"prompt": "a"}')[:-9]])
def test_damaged_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match="cannot be read as"):
        text.load_prompts(tmp_path / name)


def test_half_a_surrogate_pair(lines):
    with pytest.raises(TextError, match="row 2 holds text that is not Unicode"):
        text.load_prompts(lines({"prompt": "a"}, '{"prompt": "\\ud800"}'))


def test_a_line_of_ten_megabytes(lines):
    path = lines({"prompt": "short"}, {"prompt": "word " * 2_000_000})
    started = time.process_time()
    prompts = text.load_prompts(path).prompts
    coded = text.encode_prompts(tiny_tokenizer(), prompts, 100)
    assert (coded.kept, coded.too_long) == ([0], 1)
    responses = text.encode_responses(tiny_tokenizer(), prompts, 100)
    assert responses.capped == [False, True]
    assert time.process_time() - started < 3  # tokenised whole, it would take over twenty


# ---- the hub


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("load", [text.load_prompts, text.load_preferences])
def test_hub_offline(offline, load):
    with pytest.raises(HubError, match="'owner/none' can neither be fetched.*local file"):
        load("owner/none")


def test_not_a_name_of_the_hub(offline):
    with pytest.raises(SourceError, match="'a b' is neither here nor a name of the hub"):
        text.load_prompts("a b")


@pytest.mark.parametrize(
    ("error", "says"), [(GatedRepoError, "is gated"), (RepositoryNotFoundError, "no such name")]
)
def test_hub_refuses(monkeypatch, error, says):
    def refuse(*args, **kwargs):
        raise error.__new__(error)

    monkeypatch.setattr(reading.HfApi, "dataset_info", refuse)
    with pytest.raises(HubError, match=says):
        text.load_prompts("owner/name")


def test_hub_is_read_at_the_commit_that_was_found(monkeypatch):
    asked = {}

    class Info:
        sha = COMMIT

    def load(name, config, *, split, revision):
        asked.update(name=name, config=config, split=split, revision=revision)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(reading.HfApi, "dataset_info", lambda *args, **kwargs: Info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = text.load_preferences("owner/name", split="train", revision="main", config="c", limit=2)
    assert asked == {"name": "owner/name", "config": "c", "split": "train", "revision": COMMIT}
    assert data.source == text.Source("owner/name", "main", COMMIT)
    assert data.rows == 2


def test_hub_from_the_cache_alone_resolves_to_the_content(offline, monkeypatch):
    rows = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    resolved = text.load_prompts("owner/name").source.resolved
    assert resolved.startswith("sha256:")
    assert text.load_prompts("owner/name", limit=1).source.resolved != resolved


# ---- layouts of prompts


@pytest.mark.parametrize("column", ["prompt", "instruction", "question", "query"])
def test_prompt_columns_that_are_found(lines, column):
    assert text.load_prompts(lines({column: "a", "other": "b"})).prompts == ["a"]


def test_named_column_comes_first(lines):
    path = lines({"prompt": "a", "ask": "b"})
    assert text.load_prompts(path, column="ask").prompts == ["b"]
    with pytest.raises(TextError, match=r"no column \['asks'\]; it has \['prompt', 'ask'\]"):
        text.load_prompts(path, column="asks")


def test_unknown_columns_are_named(lines):
    with pytest.raises(TextError) as raised:
        text.load_prompts(lines({"a": "x", "b": "y"}))
    assert "['a', 'b']" in str(raised.value) and "prompt/instruction" in str(raised.value)
    with pytest.raises(TextError, match=r"columns \['prompt', 'good'\]; looked for .*'rejected'"):
        text.load_preferences(lines({"prompt": "x", "good": "y"}))
    with pytest.raises(TextError, match=r"must be among .*'chosen'.*got \['better'\]"):
        text.load_preferences(lines(pair()), columns={"better": "chosen"})


def test_input_of_an_instruction_belongs_to_the_prompt(lines):
    rows = [{"instruction": "Translate.", "input": "Haus"}, {"instruction": "Hello", "input": ""},
            {"instruction": "Bye", "input": None}]  # fmt: skip
    assert text.load_prompts(lines(*rows)).prompts == ["Translate.\n\nHaus", "Hello", "Bye"]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_stands_before_the_prompt(lines, column):
    """As in Orca's pairs, some of whose rows have none."""
    rows = [pair(prompt="a") | {column: "Be brief."}, pair(prompt="b") | {column: ""}]
    assert text.load_preferences(lines(*rows)).prompts == [
        [{"role": "system", "content": "Be brief."}, user("a")], [user("b")]]  # fmt: skip
    sides = {side: [user("a"), assistant(side)] for side in ("chosen", "rejected")}
    talk = pair(prompt="a", **sides)
    (prompt,) = text.load_preferences(lines(talk | {column: "Be brief."})).prompts
    assert prompt == [{"role": "system", "content": "Be brief."}, user("a")]
    prompts = [{key: row[key] for key in ("prompt", column)} for row in rows]
    assert text.load_prompts(lines(*prompts)).prompts[1] == [user("b")]


def test_message_prompts(lines):
    messages = [{"role": "system", "content": "Be brief."}, user("hi"), assistant("a"), user("b")]
    more = [message | {"name": None} for message in messages]
    assert text.load_prompts(lines({"prompt": more})).prompts == [messages]


def test_empty_prompts_are_dropped_and_counted(lines):
    data = text.load_prompts(lines({"prompt": "a"}, {"prompt": " \n"}, {"prompt": ""}))
    assert (data.prompts, data.rows, data.counts) == (["a"], 3, {"empty": 2})
    with pytest.raises(TextError, match="has no prompt: all 1 are empty"):
        text.load_prompts(lines({"prompt": ""}))


@pytest.mark.parametrize("value", [5, 1.5, None, True, {"role": "user", "content": "x"}])
def test_prompt_that_is_not_text(lines, value):
    with pytest.raises(TextError, match="row 2: 'prompt' is .*must be text or a list of messages"):
        text.load_prompts(lines({"prompt": "a"}, {"prompt": value}))


@pytest.mark.parametrize(
    "messages",
    [["hi"], [{"from": "human", "value": "hi"}], [{"role": "user"}], [user(None)],
     [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]],
)  # fmt: skip
def test_messages_that_are_none(lines, messages):
    with pytest.raises(TextError, match="row 1: a message must have 'role' and 'content'"):
        text.load_prompts(lines({"prompt": messages}))


@pytest.mark.parametrize("messages", [[], [user("a"), assistant("b")]])
def test_prompt_that_ends_in_an_answer(lines, messages):
    with pytest.raises(TextError, match="row 1: a prompt must end in a message of the user"):
        text.load_prompts(lines({"prompt": messages}))


def test_mixed_formats(lines):
    with pytest.raises(TextError, match="row 2.*'prompt' is a message list, in row 1 it is text"):
        text.load_prompts(lines({"prompt": "a"}, {"prompt": [user("b")]}))
    with pytest.raises(TextError, match=r"row 2 has no \['rejected'\], only \['prompt', 'chosen'"):
        text.load_preferences(lines(pair(), {"prompt": "a", "chosen": "b"}))
    with pytest.raises(TextError, match="row 1: one response is text and the other"):
        text.load_preferences(lines(pair(chosen=[assistant("x")])))


def test_message_lists_written_out_in_csv(tmp_path):
    rows = [{"prompt": [user("hi")]}]
    with pytest.raises(TextError, match="message lists written out as text: give JSON Lines"):
        text.load_prompts(write_as("csv", rows, tmp_path))


# ---- layouts of preferences


def equivalent(prompt: str, good: str, bad: str) -> dict[str, dict]:
    """One preference in every layout."""
    both = {"response_1": bad, "response_2": good}
    repeated = {"chosen": f"{prompt} {good}", "rejected": f"{prompt}\n{bad}"}
    return {
        "text": {"prompt": prompt, "chosen": good, "rejected": bad},
        "repeated": {"prompt": prompt, **repeated},
        "messages": {"chosen": [user(prompt), assistant(good)],
                     "rejected": [user(prompt), assistant(bad)]},
        "messages and prompt": {"prompt": prompt, "chosen": [user(prompt), assistant(good)],
                                "rejected": [user(prompt), assistant(bad)]},
        "prompt messages, text": {"prompt": [user(prompt)], "chosen": good, "rejected": bad},
        "prompt messages, answers": {"prompt": [user(prompt)], "chosen": [assistant(good)],
                                     "rejected": [assistant(bad)]},
        "preference": {"prompt": prompt, **both, "preference": 1.9},
        "scores": {"prompt": prompt, **both, "score_1": -3, "score_2": 0.5},
        "chosen scores": {"prompt": prompt, "chosen": good, "rejected": bad,
                          "score_chosen": 8, "score_rejected": 2},
        "outputs": {"instruction": prompt, "output_1": bad, "output_2": good, "preference": 2},
    }  # fmt: skip


def as_text(prompt: text.Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


@pytest.mark.parametrize("layout", equivalent("", "", ""))
def test_every_layout_says_the_same(lines, layout):
    facts = [("Name a colour.", "Blue.", "Seven."), ("Add.", "2", "3")]
    data = text.load_preferences(lines(*(equivalent(*fact)[layout] for fact in facts)))
    found = zip(map(as_text, data.prompts), data.chosen, data.rejected, strict=True)
    assert list(found) == facts
    assert data.counts == PREFERENCES | {"prompt repeated": 2 * (layout == "repeated")}


def test_scores_are_kept_better_first(lines):
    layouts = equivalent("p", "good", "bad")
    assert text.load_preferences(lines(layouts["text"])).scores is None
    assert text.load_preferences(lines(layouts["scores"])).scores == [(0.5, -3)]
    assert text.load_preferences(lines(layouts["chosen scores"])).scores == [(8, 2)]
    assert text.load_preferences(lines(layouts["preference"])).scores == [pytest.approx((0.9, 0.1))]


def test_columns_of_other_names(lines):
    path = lines({"q": "a", "yes": "b", "no": "c"})
    columns = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    data = text.load_preferences(path, columns=columns)
    assert (data.prompts, data.chosen, data.rejected) == (["a"], ["b"], ["c"])


def test_named_columns_choose_the_layout(lines):
    both = pair() | {"good": "x", "bad": "y", "preference": 2}
    names = {"response_1": "good", "response_2": "bad"}
    assert text.load_preferences(lines(both)).chosen == ["good"]
    assert text.load_preferences(lines(both), columns=names).chosen == ["y"]
    with pytest.raises(TextError, match=r"with \{'score_1': 'good'\}; looked for"):
        text.load_preferences(lines(both), columns={"score_1": "good"})


def test_a_system_message_and_turns_before_are_the_prompt(lines):
    start = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    row = {"chosen": [*start, assistant("d")], "rejected": [*start, assistant("e")]}
    data = text.load_preferences(lines(row))
    assert (data.prompts, data.chosen, data.rejected) == ([start], ["d"], ["e"])


def test_preference_near_one_is_the_first_response(lines):
    rows = [{"prompt": "p", "response_1": "one", "response_2": "two", "preference": value}
            for value in (1, 1.499999, 1.5, 1.500001, 2.0)]  # fmt: skip
    data = text.load_preferences(lines(*rows))
    assert data.chosen == ["one", "one", "two", "two"]
    assert data.rejected == ["two", "two", "one", "one"]
    assert data.counts == PREFERENCES | {"ties": 1}


@pytest.mark.parametrize("value", [0, 0.99, 2.01, -1])
def test_preference_out_of_range(lines, value):
    row = {"prompt": "p", "response_1": "a", "response_2": "b", "preference": value}
    with pytest.raises(TextError, match=rf"row 1: preference must be in \[1, 2\].*{value}"):
        text.load_preferences(lines(row))


@pytest.mark.parametrize("value", ['"x"', "null", "NaN", "Infinity", "true", "[1]"])
def test_preference_that_is_no_number(lines, value):
    row = '{"prompt": "p", "response_1": "a", "response_2": "b", "preference": %s}'
    with pytest.raises(TextError, match="row 2: 'preference' must be a number"):
        text.load_preferences(lines(row % "1", row % value))


def test_numbers_of_a_csv(tmp_path):
    rows = [{"prompt": "p", "response_1": "1", "response_2": "2", "preference": 1.75}]
    assert text.load_preferences(write_as("csv", rows, tmp_path)).chosen == ["2"]


def test_dropped_and_counted(lines):
    rows = [
        pair(score_chosen=1, score_rejected=1),
        pair(chosen="", score_chosen=2, score_rejected=1),
        pair(rejected=" \n", score_chosen=2, score_rejected=1),
        pair(prompt="", score_chosen=2, score_rejected=1),
        pair(rejected="good ", score_chosen=2, score_rejected=1),
        pair(score_chosen=1, score_rejected=2),
        pair(score_chosen=2, score_rejected=1),
    ]
    data = text.load_preferences(lines(*rows))
    counts = {"ties": 1, "empty": 3, "identical": 1, "prompt repeated": 0, "contradicted": 1}
    assert (len(data), data.rows, data.counts) == (2, 7, counts)
    assert data.scores == [(1, 2), (2, 1)]
    with pytest.raises(TextError, match="no usable pair in its 1 rows: 1 ties"):
        text.load_preferences(lines(rows[0]))


def test_identical_message_lists_are_dropped(lines):
    same, row = [user("a"), assistant("b")], pair([user("a")], [assistant("b")], [assistant("c")])
    data = text.load_preferences(lines(row, pair([user("a")], same, same)))
    assert (len(data), data.counts["identical"]) == (1, 1)


def test_prompt_that_opens_an_answer_by_chance_stays(lines):
    rows = [pair("Hi", "Hi there", "Hi you"), *[pair()] * 3]
    data = text.load_preferences(lines(*rows))
    assert data.chosen[0] == "Hi there" and data.counts["prompt repeated"] == 0
    rows[0] = pair("Hello, who are you today?", *["Hello, who are you today? " + c for c in "ab"])
    data = text.load_preferences(lines(*rows))
    assert (data.chosen[0], data.rejected[0], data.counts["prompt repeated"]) == ("a", "b", 1)


def test_prompt_repeated_in_one_response_alone_stays(lines):
    data = text.load_preferences(lines(pair("Say it.", "Say it. Now", "Never")))
    assert data.chosen == ["Say it. Now"]


def test_nothing_after_a_repeated_prompt_is_empty(lines):
    rows = [pair("Hi.", "Hi. a", "Hi. b"), pair("Hi.", "Hi.", "Hi. b")]
    data = text.load_preferences(lines(*rows))
    assert (data.chosen, data.counts["empty"], data.counts["prompt repeated"]) == (["a"], 1, 2)


def test_text_pairs_without_a_prompt(lines):
    with pytest.raises(TextError, match="row 1: chosen and rejected are text.*no prompt"):
        text.load_preferences(lines({"chosen": "a", "rejected": "b"}))
    answers = {"chosen": [assistant("a")], "rejected": [assistant("b")]}
    with pytest.raises(TextError, match="row 1: neither a prompt column nor messages"):
        text.load_preferences(lines(answers))


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([user("a"), assistant("b"), user("c"), assistant("d")],
         [user("a"), assistant("x"), user("c"), assistant("d")]),
        ([user("a"), assistant("b")], [user("x"), assistant("b")]),
        ([user("a"), user("b")], [user("a"), user("c")]),
        ([user("a"), assistant("b")], []),
    ],
)  # fmt: skip
def test_message_lists_that_are_no_pair(lines, chosen, rejected):
    with pytest.raises(TextError, match="row 1: after the . messages .* got the roles"):
        text.load_preferences(lines({"chosen": chosen, "rejected": rejected}))


def test_prompt_column_and_messages_disagree(lines):
    row = pair("x", [user("a"), assistant("b")], [user("a"), assistant("c")])
    with pytest.raises(TextError, match="row 1: the prompt column and .* not the same"):
        text.load_preferences(lines(row))


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
distinct = st.tuples(words, words, words).filter(lambda row: row[1].strip() != row[2].strip())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(distinct, min_size=1, max_size=5), st.sampled_from(["jsonl", "json.gz", "parquet"]))
def test_any_text_comes_back_as_it_was(tmp_path_factory, facts, kind):
    rows = [pair(*fact) for fact in facts]
    data = text.load_preferences(write_as(kind, rows, tmp_path_factory.mktemp("any")))
    if not data.counts["prompt repeated"]:
        assert list(zip(data.prompts, data.chosen, data.rejected, strict=True)) == facts
    assert data.rows == len(facts) == len(data) + data.counts["empty"] + data.counts["identical"]


# ---- tokens


TOKENIZERS = {
    "template": dict(template=TEMPLATE),
    "plain": {},
    "pad is EOS": dict(pad=EOS),
    "no pad": dict(pad=None),
    "left": dict(side="left"),
}


@pytest.mark.parametrize("options", TOKENIZERS.values(), ids=TOKENIZERS)
def test_responses_end_in_one_eos(options):
    tokenizer = tiny_tokenizer(**options)
    coded = text.encode_responses(tokenizer, ["abc", "", "abcd", "abcdef"], 4)
    assert [tokenizer.decode(ids) for ids in coded.ids] == ["abc<eos>", "<eos>", "abcd", "abcd"]
    assert (coded.lengths, coded.capped) == ([3, 0, 4, 4], [False, False, True, True])


@pytest.mark.parametrize(
    "end", [EOS, EOS + EOS, f"{EOS}\n", f" {EOS} {EOS}", f"{EOS}{PAD}{PAD}", PAD]
)
def test_special_tokens_at_the_end_of_a_response_are_no_second_eos(end):
    tokenizer = tiny_tokenizer()
    coded = text.encode_responses(tokenizer, ["abc" + end], 20)
    assert tokenizer.decode(coded.ids[0]).replace(" ", "") == "abc<eos>"
    assert coded.ids[0].count(256) == 1 and 257 not in coded.ids[0]


def test_eos_inside_a_response_is_text():
    tokenizer = tiny_tokenizer()
    coded = text.encode_responses(tokenizer, ["a<eos>b <turn>"], 50)
    assert coded.ids[0].count(256) == 1 and coded.ids[0][-1] == 256 and 258 not in coded.ids[0]
    assert tokenizer.decode(coded.ids[0]).startswith("a<eos>b")
    assert tokenizer("a<eos>")["input_ids"][-1] == 256  # and it stays as it was elsewhere


def test_eos_inside_a_prompt_is_a_token():
    coded = text.encode_prompts(tiny_tokenizer(), ["a<eos>b"], 100)
    assert coded.ids[0].count(256) == 1 and coded.ids[0][-1] != 256


@settings(max_examples=100, deadline=None)
@given(words, st.integers(1, 30))
def test_eos_exactly_once_unless_capped(response, most):
    tokenizer = tiny_tokenizer()
    coded = text.encode_responses(tokenizer, [response], most)
    whole = len(response.encode())
    (ids,), (length,), (capped,) = coded.ids, coded.lengths, coded.capped
    assert capped == (whole >= most) and length == min(whole, most) <= most
    assert ids.count(256) == (not capped) and len(ids) == length + (not capped)
    if not capped:
        assert ids[-1] == 256 and tokenizer.decode(ids[:-1]) == response


def test_padding_side_and_saved_truncation_change_nothing():
    prompts, responses = ["a", "abcdefgh"], ["x", "uvwxyz"]
    expected = tiny_tokenizer()
    changed = tiny_tokenizer(side="left", pad=EOS)
    changed.truncation_side = "left"
    changed.backend_tokenizer.enable_truncation(3)
    changed.backend_tokenizer.enable_padding(length=40)
    for encode, given_ in ((text.encode_prompts, prompts), (text.encode_responses, responses)):
        assert encode(changed, given_, 200) == encode(expected, given_, 200)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_prompts_end_where_the_response_begins(template):
    tokenizer = tiny_tokenizer(template=template)
    coded = text.encode_prompts(tokenizer, ["hi", [user("hi")]], 100)
    assert coded.ids[0] == coded.ids[1] and coded.too_long == 0
    end = "<turn>assistant\n" if template else text.PLAIN_ANSWER
    assert tokenizer.decode(coded.ids[0]).endswith(end)
    assert 256 not in coded.ids[0]


def test_plain_format_of_a_conversation():
    messages = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"),
                {"role": "tool", "content": "d"}]  # fmt: skip
    assert text.render(tiny_tokenizer(), messages) == (
        "System:\ns\n\nInstruction:\na\n\nResponse:\nb\n\nInstruction:\nc\n\nTool:\nd\n\nResponse:\n"
    )


def test_long_prompts_are_dropped_not_cut():
    tokenizer = tiny_tokenizer()
    size = len(text.render(tokenizer, ""))
    coded = text.encode_prompts(tokenizer, ["abcd", "abc", "a", "é" * 2], size + 3)
    assert (coded.kept, coded.too_long) == ([1, 2], 2)
    assert [len(ids) for ids in coded.ids] == [size + 3, size + 1]
    with pytest.raises(TextError, match=f"none of 1 prompts fits in 9 tokens.*{size + 1}"):
        text.encode_prompts(tokenizer, ["a"], 9)
    assert text.encode_prompts(tokenizer, [], 3) == text.EncodedPrompts([], [], 0)


def test_bos_begins_a_plain_prompt_of_tokenizers_that_use_one():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<turn>"
    assert text.encode_prompts(tokenizer, ["a"], 50).ids[0][0] != 258
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<turn> $A <eos>", special_tokens=[("<turn>", 258), (EOS, 256)]
    )
    ids = text.encode_prompts(tokenizer, ["a"], 50).ids[0]
    assert ids[0] == 258 and ids.count(258) == 1 and 256 not in ids
    assert text.encode_responses(tokenizer, ["a"], 50).ids == [[64, 256]]


def test_text_that_only_looks_like_messages_is_text():
    conversation = [user("a"), assistant('b [{"'), user("c")]
    for prompt in ("a", "", conversation, '[{"', '[{"a": 1}] is a list', '[{"a": 1}]',
                   '[{"role": "user", "content": "a"}, 1]'):  # fmt: skip
        assert text.from_text(text.as_text(prompt)) == prompt


def test_template_that_refuses_a_prompt():
    tokenizer = tiny_tokenizer(template="{{ raise_exception('only the user may speak') }}")
    with pytest.raises(TextError, match=r"refuses .*\['system', 'user'\]: only the user"):
        text.encode_prompts(tokenizer, [[{"role": "system", "content": "s"}, user("a")]], 100)


@pytest.mark.parametrize("most", [0, -1, 1.5, True])
def test_bad_max_tokens(most):
    for encode in (text.encode_prompts, text.encode_responses):
        with pytest.raises(TextError, match=f"max_tokens must be .* got {most}"):
            encode(tiny_tokenizer(), ["a"], most)


def test_tokenizer_without_eos():
    with pytest.raises(TokenizerError, match=r"no EOS: name one with load_tokenizer\(..., eos"):
        text.encode_responses(tiny_tokenizer(eos=None), ["a"], 5)


# ---- what is shown


def test_example_of_preferences(lines):
    rows = [*ROWS, pair("p" * 90), pair(chosen="same", rejected="same")]
    data = text.load_preferences(lines(*rows))
    shown = text.example(tiny_tokenizer(template=TEMPLATE), data, max_prompt_tokens=90,
                         max_response_tokens=6)  # fmt: skip
    assert "<turn>user\nName a colour.<turn><turn>assistant\n" in shown
    assert "--- chosen: 5 tokens and EOS\nBlue.<eos>\n" in shown
    assert "--- rejected: 6 tokens\nSeven.\n" in shown
    assert "4 pairs of" in shown and "(5 rows; 1 identical)" in shown
    assert "1 prompts of more than 90 tokens dropped, 2 responses cut at 6" in shown
    assert "the tokenizer's chat template" in shown
    with pytest.raises(TextError, match="index must be 0 to 3, got 4"):
        text.example(tiny_tokenizer(), data, index=4)


def test_example_of_prompts(lines):
    shown = text.example(tiny_tokenizer(), text.load_prompts(lines({"prompt": "word " * 300})),
                         max_prompt_tokens=5000)  # fmt: skip
    assert "the plain format" in shown and "[...]" in shown and len(shown) < 1500
    assert "1 prompts of" in shown and "all kept" in shown


# ---- real preferences


def real_preferences() -> Path:
    """The file that PREFBOOK_PREFERENCES names, else the one beside the checkout; or skips."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("PREFBOOK_PREFERENCES",
                               beside / "alpaca_eval_preferences.jsonl.gz"))  # fmt: skip
    if not path.is_file():
        pytest.skip(f"no preferences at {path}: name a file with PREFBOOK_PREFERENCES")
    return path


def test_real_preferences():
    data = text.load_preferences(real_preferences(), limit=7000)
    assert len(data) + sum(data.counts[r] for r in ("ties", "empty", "identical")) == data.rows
    assert all(better >= worse for better, worse in data.scores)
    assert 0.9 * data.rows < len(data)
    raw = reading.read_rows(real_preferences(), limit=100)[0]
    kept = {(row["prompt"], row["response_1"] if row["preference"] < 1.5 else row["response_2"])
            for row in raw if row["preference"] != 1.5}  # fmt: skip
    assert len(kept & set(zip(data.prompts, data.chosen, strict=True))) >= 0.9 * len(kept)
    coded = text.encode_responses(tiny_tokenizer(), data.chosen[:200], 512)
    assert 0 < sum(coded.capped) < 200 and max(coded.lengths) == 512
    assert "chosen" in text.example(tiny_tokenizer(), data)
