"""One fine-tuning run of a language model, in one process or several.

`python -m lib.lm.run --method dpo --task min --rate 1e-3 --seed 0 --output table.parquet`, or
`torchrun --nproc_per_node 2 -m lib.lm.run ...` for two processes, which share the rows of a run.
Prints each evaluation; a run that was killed goes on if it had a `--checkpoint`. The trained policy
is kept with `--save FOLDER`, which transformers and `lib.lm.prepare --policy FOLDER` load.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import pandas as pd
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from lib import methods
from lib.allowed import between
from lib.commands import command, until_stopped
from lib.finetune import State
from lib.lm import parallel
from lib.lm.config import LABELS, LengthRun, length_run
from lib.lm.engine import LengthEngine
from lib.lm.length import GIVEN, TASKS
from lib.lm.models import load_tokenizer
from lib.lm.places import check_prepared, check_task, cut_otherwise, spelled
from lib.lm.prepare import check_device, writing_new
from lib.lm.problem import LengthProblem
from lib.runs import (
    Checkpoint,
    check_writable,
    code_fingerprint,
    combined,
    identity,
    provenance,
    write_atomically,
)
from lib.runs.configurations import canonical, checked
from lib.runs.planning import duration
from lib.runs.records import write_record
from lib.runs.store import read_checkpoint

OWN = ("method", "task", "learning_rate", "seed")  # fields that have an option of their own
SAID = {"iterations"}  # by --updates; and by an offline method, which draws once, and by its pairs
SAID_OFFLINE = SAID | {"batch", "completions", "inner_steps"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command(_parser(), train, arguments)


def train(options: argparse.Namespace) -> pd.DataFrame:
    """The result table of the run; the main process writes it, with what it is of in the file's
    metadata, and prints the last row. Every process returns the same.

    Raises: ValueError or OSError, before any work, for an option that is none, a device that is not
    here, a place that cannot be written, a folder of `--save` that is not new, or a `--checkpoint`
    of another run or other code.
    """
    check_device(options.device)
    config = configuration(options)
    _check_places(options)
    header, about = _header(config), _about(config)
    if options.checkpoint and options.checkpoint.exists():
        _refuse_other(options.checkpoint, header)
    accelerator = parallel.start(options.processes, cpu=options.device == "cpu")
    main = accelerator.is_main_process
    if main:
        print(f"processes: {accelerator.num_processes}, device: {accelerator.device}", flush=True)
        if said := cut_otherwise(config):
            print(f"warning: {said}", file=sys.stderr)
    try:
        engine = KeepingEngine(str(accelerator.device))
        (table,) = engine.run([config], _checkpoint(options, header))
        if main:
            _keep(options, config, engine, table, {**about, **header})
        if main and options.checkpoint:
            options.checkpoint.unlink(missing_ok=True)
        if main:
            print(table.iloc[-1].to_string())
    finally:
        accelerator.end_training()
    return table


def _about(config: LengthRun) -> dict[str, Any]:
    """What a run is of, asked before it begins: data and code may be others when it ends."""
    files = code_fingerprint(*LengthEngine.modules)
    return {"configuration": canonical(config), "commit": provenance.commit(),
            "dirty": provenance.uncommitted([*files])}  # fmt: skip


def _keep(
    options: argparse.Namespace, config: LengthRun, engine: KeepingEngine, table: pd.DataFrame,
    about: dict[str, Any],
) -> None:  # fmt: skip
    """Writes what was asked for: the policy, and the table with what it is of. If one cannot be
    written, the other is."""
    environment = provenance.environment(engine.device, config.dtype, engine.packages)
    about = {**about, "environment": environment, "finished": provenance.now()}
    try:
        if options.save:
            text = json.dumps(about, indent=1) + "\n"
            with writing_new(options.save):
                save(engine.kept.state.policy.network.model, config.policy_folder, options.save)
                write_atomically(options.save / "run.json", lambda path: path.write_text(text))
    finally:
        if options.output:
            write_record(options.output, table, about)


def _check_places(options: argparse.Namespace) -> None:
    """Makes the folders of what will be written, and tries them: not when all is trained.

    Raises: ValueError for a place that holds something else, or a table's name that does not end
        in .parquet; OSError where nothing can be written.
    """
    if options.save:
        if options.save.exists() and not options.save.is_dir():
            raise ValueError(f"--save {options.save} is a file: name a new folder")
        if options.save.exists() and any(options.save.iterdir()):
            raise ValueError(f"--save {options.save}: there is something already, name a new "
                             "folder")  # fmt: skip
    for name in ("output", "checkpoint"):
        if (file := getattr(options, name)) and file.is_dir():
            raise ValueError(f"--{name} {file} is a folder: name a file")
    if checkpoint := options.checkpoint:  # which is removed at the end, and there at a second start
        others = [x.resolve() for x in (options.output, options.save) if x]
        if {checkpoint.resolve(), *checkpoint.resolve().parents} & set(others):
            raise ValueError(f"--checkpoint {checkpoint} is the place of --output, or in that of "
                             "--save: name another file")  # fmt: skip
    if options.output and options.output.suffix != ".parquet":
        raise ValueError(f"--output {options.output}: the table is parquet, name it *.parquet")
    for name in ("save", "output", "checkpoint"):
        if place := getattr(options, name):
            check_writable(f"--{name} {place}", place if place.is_dir() else place.parent)


class KeptProblem(LengthProblem):
    """A run whose state can be looked at when it is over."""

    state: State

    def initial_state(self) -> State:
        self.state = super().initial_state()
        return self.state


class KeepingEngine(LengthEngine):
    """An engine that keeps the problem of its last run."""

    kept: KeptProblem

    def problem(self, config: LengthRun, device: str) -> KeptProblem:
        self.kept = KeptProblem(config, device)
        return self.kept


def save(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """A trained policy in the hub's format, in float32, with the tokenizer of `source`.

    What adapters add is added to their matrices, and the adapters are gone.
    """
    model.float()  # frozen matrices may be in 16 bits, whose rounding would eat what is added
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    model.save_pretrained(folder)
    load_tokenizer(source)[0].save_pretrained(folder)
    print(f"saved: {folder}")


def configuration(options: argparse.Namespace) -> LengthRun:
    """The run that the command line describes. Raises: ValueError for an option that is none."""
    between("--updates", options.updates, 1, 10**9)
    fields = {"label": options.label, "prepared": options.prepared}
    fields |= checked(LengthRun, dict(_option(text) for text in options.option))
    fields["prepared"] = spelled(check_prepared(fields["prepared"]))
    if fields["label"] == "learned":
        check_task(fields["prepared"], options.task)
    if "minibatch" in fields:
        between("minibatch", fields["minibatch"], 1, 10**9)  # which others are divided by
    said = SAID if methods.get(options.method).on_policy else SAID_OFFLINE
    if refused := sorted(said & fields.keys()):
        raise ValueError(f"--option {', '.join(refused)}: for {options.method} it follows from "
                         "--updates, minibatch and the method")  # fmt: skip
    return length_run(options.method, options.task, options.rate, options.seed,
                      updates=options.updates, **fields)  # fmt: skip


def _option(text: str) -> tuple[str, Any]:
    """"name=value" in two, the value as JSON where it is any."""
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--option must be NAME=VALUE, got {text!r}")
    if name in OWN:
        raise ValueError(f"--option {text}: give --{'rate' if name == 'learning_rate' else name}")
    if name not in (known := LengthRun.__dataclass_fields__.keys() - {*OWN}):
        raise ValueError(f"unknown option {[name]}; choose from {sorted(known)}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


class Silent(Checkpoint):
    """Of the other processes: reads what the main one saved, and writes nothing."""

    @property
    def stored(self) -> bool:
        return self.path.name != ""

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        return super().load() if self.stored else None

    def due(self) -> bool:
        return False

    def progress(self, done_updates: float, total_updates: float, **shown: Any) -> None:
        pass


class Printed(Silent):
    """Of the main process: says how far the run is and about how long it will take; saves if there
    is somewhere to."""

    first: tuple[float, float] | None = None  # updates and seconds at the first of these lines

    def due(self) -> bool:
        return self.stored and Checkpoint.due(self)

    def progress(self, done_updates: float, total_updates: float, **shown: Any) -> None:
        said = [f"{name} {value}" for name, value in shown.items()]
        now = monotonic()
        begun, since = self.first = self.first or (done_updates, now)
        if begun < done_updates < total_updates:
            left = (now - since) / (done_updates - begun) * (total_updates - done_updates)
            said.append(f"about {duration(left)} left")
        print(f"{done_updates} of {total_updates} updates: {', '.join(said)}", flush=True)


def _header(config: LengthRun) -> dict[str, Any]:
    """What a checkpoint of the run says of the run and of the code."""
    code = combined(code_fingerprint(*LengthEngine.modules))
    return {"runs": [identity(config)], "code": code}


def _checkpoint(options: argparse.Namespace, header: dict[str, Any]) -> Checkpoint:
    kind = Printed if parallel.place()[0] == 0 else Silent
    return kind(options.checkpoint or Path(), header)


def _refuse_other(path: Path, header: dict[str, Any]) -> None:
    """Raises: ValueError for a file that could not be resumed, and would be written over."""
    stored = read_checkpoint(path, say=False)
    known = stored["header"] if stored else {}
    if known == header:
        return
    what = "no checkpoint that can be read"
    if stored:
        what = "of other code" if known.get("runs") == header["runs"] else "of another run"
    raise ValueError(f"--checkpoint {path}: what is there is {what}, and would be written over: "
                     "name another file, or remove it to start from the beginning")  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lib.lm.run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--method", required=True, choices=methods.METHODS)
    parser.add_argument("--task", required=True, choices=(*TASKS, GIVEN))
    parser.add_argument("--rate", type=float, required=True, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--label", default="learned", choices=LABELS, help="training reward")
    parser.add_argument("--prepared", default="tiny", help='"tiny", or a folder of lib.lm.prepare')
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help="any other field of LengthRun, for example batch=256")  # fmt: skip
    parser.add_argument("--output", type=Path, help="parquet file of the result table")
    parser.add_argument("--save", type=Path, help="new folder for the trained policy")
    parser.add_argument("--checkpoint", type=Path, help="safetensors file to save to and resume")
    parser.add_argument("--processes", type=int, help="how many there must be (else: WORLD_SIZE)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        choices=("cpu", "cuda"))  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(until_stopped(main, "what --checkpoint saved is kept; the same command goes on"))
