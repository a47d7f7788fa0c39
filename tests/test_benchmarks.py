"""Benchmarks as a command, whose lines go to the JSON file; those of a GPU, small and on a CPU."""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from benchmarks import Result, Unmeasured, cuda, lm, machines, store, turns
from benchmarks import __main__ as command
from lib import footprint


def measured(monkeypatch, counts):
    """One process takes 32 seconds, several take 4."""
    monkeypatch.setattr(store, "measure", lambda n: (32.0 if n == 1 else 4.0, Counter(counts)))


def test_the_store_is_a_result_like_the_others(monkeypatch, tmp_path, capsys):
    measured(monkeypatch, {str(run): 1 for run in range(store.RUNS)})
    monkeypatch.setattr("sys.argv", ["benchmarks", "store", "--output", str(tmp_path / "out.json")])
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    assert command.main() == 0
    (line,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (line["name"], line["ratio"], line["ours"], line["theirs"]) == ("store", 8.0, 4.0, 32.0)
    assert "store: 8 times the speed of one process" in capsys.readouterr().out


def test_a_run_that_is_computed_twice_fails(monkeypatch):
    measured(monkeypatch, {str(run): 1 + (run == 3) for run in range(store.RUNS)})
    with pytest.raises(AssertionError, match="'3': 2"):
        list(store.shared(None))


# --- what needs a GPU -----------------------------------------------------------------------------

TINY = cuda.Preset("tiny", LlamaConfig, {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "tie_word_embeddings": True,
})  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Few and short completions, one timed step, and no time for peaks."""
    for module, names in ((lm, ("PROMPTS", "PROMPT", "LENGTH")), (cuda, ("PROMPTS", "LENGTH"))):
        for name in names:
            monkeypatch.setattr(module, name, 4)
    for name, value in {"ROWS": 4, "PROMPT": 6, "NEW": 5, "STEPS": 1, "SLOW": 1}.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(lm, "product_peak", lambda device, dtype: 1e9)
    monkeypatch.setitem(machines.COPIED, "cpu", 10**5)
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


def here(settings, start, skipped=(), failed=()):
    """The settings in this process, one after another; `turn` must be called once."""
    start()
    for name, setting in settings.items():
        if name not in skipped:
            called = []
            found = setting(turn=lambda called=called: called.append(1))
            assert called == [1], name
            yield name, turns.Lost("no memory") if name in failed else found


def test_a_line_for_every_setting_and_ours_against_the_best_of_trl(small):
    skipped, failed = (cuda.DEFAULT, "ours bfloat16, growing"), ("decode growing",)
    lines = list(cuda.compare("tiny", TINY, "cpu",
                              turns=partial(here, skipped=skipped, failed=failed)))  # fmt: skip
    found = {line.name.removeprefix("lm/"): line for line in lines}
    first = [f"decode/tiny/cpu/{x}" for x in ("transformers", "static", "growing")]
    assert list(found)[:3] == first
    lost = found.pop("decode/tiny/cpu/growing")
    assert str(lost) == "lm/decode/tiny/cpu/growing: FAILED: no memory"
    assert all(isinstance(line, Result) and line.ratio > 0 for line in found.values())
    trl = {name: found[f"dpo_step/tiny/cpu/{cuda._short(name)}"]
           for name in (cuda.THROUGHOUT, cuda.STATIC, cuda.DYNAMIC)}  # fmt: skip
    best = min(trl[cuda.STATIC].ours, trl[cuda.DYNAMIC].ours)
    for dtype in ("float32", "bfloat16"):
        ours = found[f"dpo_step/tiny/cpu/{dtype}_static"]
        assert (ours.theirs, ours.ratio) == (best, best / ours.ours)
        assert ours.details["own"]["flops"] > 10**6 and ours.details["own"]["compiled"] == 0
        other = found[f"dpo_step/tiny/cpu/{dtype}_static/throughout"]
        assert (other.ours, other.theirs) == (ours.ours, trl[cuda.THROUGHOUT].ours)
    generate, ours = (found[f"decode/tiny/cpu/{x}"] for x in ("transformers", "static"))
    assert ours.theirs == generate.ours and generate.theirs == generate.details["limit_seconds"]
    json.dumps([command.asdict(line) for line in lines])


def test_trls_trainer_says_nothing_between_the_lines(small, tmp_path, capfd, recwarn):
    logging.set_verbosity_warning()
    lm.prepare(tmp_path, TINY)
    capfd.readouterr()
    lm.theirs(tmp_path, "float32", 1, 1, checkpointing=True)
    assert tuple(capfd.readouterr()) == ("", "")
    assert [str(w.message) for w in recwarn if w.category is FutureWarning] == []
    assert logging.get_verbosity() == logging.ERROR  # whose handler writes past `capfd`


def test_presets_have_their_sizes_and_a_step_reads_all_but_an_embedding():
    sizes = {"smollm2": footprint.SMOLLM2, "pythia": footprint.PYTHIA_14}
    for name, preset in cuda.PRESETS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(preset.config())
        shape = sizes[name]
        assert model.num_parameters() == shape.parameters
        tokens = cuda.ROWS * (cuda.PROMPT + cuda.NEW / 2)
        weights = shape.parameters - (0 if name == "smollm2" else shape.vocabulary * shape.width)
        assert cuda.bytes_of_a_step(model) == 2 * (weights + tokens * shape.cache)


def waiting(log, name, turn):
    """Gets ready, and writes down when it is its turn."""
    time.sleep(0.1)
    turn()
    with log.open("a") as file:
        file.write(f"{name} ")
    return name


def failing(turn):
    turn()
    raise ValueError("no such thing")


def ending(turn):
    raise SystemExit(3)


def late(turn):
    time.sleep(60)


def test_settings_wait_for_their_turns_and_a_lost_one_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "READY_SECONDS", 2)
    monkeypatch.setattr(turns, "END_SECONDS", 1)
    log = tmp_path / "log"
    settings = {"first": partial(waiting, log, "first"), "failing": failing, "ending": ending,
                "late": late, "last": partial(waiting, log, "last")}  # fmt: skip
    found = turns.in_turn(settings, lambda: log.write_text("started "), method="fork")
    assert next(found) == ("first", "first") and log.read_text() == "started first "
    rest = {name: value if isinstance(value, str) else str(value) for name, value in found}
    assert rest == {"failing": "ValueError: no such thing", "ending": "its process ended with 3",
                    "late": "not ready in time", "last": "last"}  # fmt: skip


def test_without_a_gpu_its_benchmarks_are_one_line_each_and_no_failure(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["benchmarks", "--quick", "cuda", "--output", str(out)])
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    assert command.main() == 0
    names = [f"lm/{name}/cuda" for name in cuda.PRESETS]
    assert [line["name"] for line in json.loads(out.read_text())["results"]] == names
    assert capsys.readouterr().out.count("skipped: there is no CUDA GPU here") == 2


def test_a_gpu_without_bfloat16_is_one_line_each_and_no_failure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(cuda, "compare", lambda *_, **__: pytest.fail("it was measured"))
    for name in cuda.PRESETS:
        (line,) = cuda.on_gpu(name, None)
        assert line == Unmeasured(f"lm/{name}/cuda", "the GPU here has no bfloat16 of its own",
                                  failed=False)  # fmt: skip


@pytest.mark.parametrize(
    ("place", "said"), [("t.csv", "name it *.json"), ("file/t.json", "cannot be written")]
)
def test_an_output_that_cannot_be_written_is_said_first(
    monkeypatch, tmp_path, capsys, place, said
):  # fmt: skip
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["benchmarks", "--output", str(tmp_path / place)])
    with pytest.raises(SystemExit):
        command.main()
    assert f"--output {tmp_path / place}" in (error := capsys.readouterr().err) and said in error


def test_what_was_measured_is_kept_when_the_rest_is_not(monkeypatch, tmp_path):
    def some(effort):
        yield Unmeasured("one", "no memory")
        raise KeyboardInterrupt

    out = tmp_path / "out.json"
    monkeypatch.setattr(command, "BENCHMARKS", {"one": some})
    monkeypatch.setattr("sys.argv", ["benchmarks", "--output", str(out)])
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    with pytest.raises(KeyboardInterrupt):
        command.main()
    assert [line["name"] for line in json.loads(out.read_text())["results"]] == ["one"]
