"""One run over two processes (gloo, CPU) against the same run in one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pandas as pd
import pytest
import torch

from lib.lm import parallel, run
from lib.runs import ROOT
from tests import lm_parallel
from tests.lm_folder import prepared_folder

pytestmark = pytest.mark.filterwarnings("ignore:std")  # of one prompt's length

def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launched(count: int, *arguments: str) -> subprocess.CompletedProcess:
    """torchrun on the arguments in `count` processes of one thread, from the root."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count),
               "--master_addr", "127.0.0.1", "--master_port", str(free_port())]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=300)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder, and in it what one process and two find."""
    root = prepared_folder(tmp_path_factory.mktemp("prepared"))
    lm_parallel.compute(root)
    done = launched(2, "-m", "tests.lm_parallel", str(root))
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("method", lm_parallel.METHODS)
@pytest.mark.parametrize("index", [0, 1])
def test_every_process_has_the_whole_first_sampling_of_one(folder, method, index):
    alone, shared = (torch.load(folder / f"{n}-{method}-{i}.pt") for n, i in ((1, 0), (2, index)))
    for name in ("completions", "mask"):
        assert torch.equal(alone[name], shared[name]), name
    for name in ("logp", "rewards", "scale"):
        torch.testing.assert_close(alone[name], shared[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", lm_parallel.METHODS)
def test_two_processes_end_with_the_numbers_of_one(folder, method):
    one, first, second = (
        pd.read_parquet(folder / f"{n}-{method}-{i}.parquet") for n, i in ((1, 0), (2, 0), (2, 1))
    )
    kept = [c for c in one if not c.startswith("seconds_")]
    pd.testing.assert_frame_equal(first[kept], second[kept])  # they hold one policy
    if "pair_accuracy" in kept:
        kept.remove("pair_accuracy")  # margins of the first update are 0: rounding ranks them
    pd.testing.assert_frame_equal(one[kept], first[kept], rtol=1e-4, atol=1e-4)
    assert one["kl_ref"].iloc[-1] > 1e-3  # the runs went somewhere


@pytest.mark.parametrize("index", [0, 1])
def test_pairs_that_are_all_tied_leave_the_policy_where_it_was(folder, index):
    """Adam's moments would go on moving it where a gradient is 0, and not where there is none."""
    for count, process in ((1, 0), (2, index)):
        before, after = torch.load(folder / f"{count}-tied-{process}.pt")
        assert torch.equal(before, after)


def command(folder, count, *more):
    """`lib.lm.run` for two short updates."""
    return launched(count, "-m", "lib.lm.run", "--method", "reinforce", "--task", "min", "--rate",
                    "1e-2", "--updates", "2", "--prepared", str(folder), "--device", "cpu",
                    "--label", "rule", "--option", "batch=8", "--option", "minibatch=8",
                    "--option", "max_tokens=8", "--option", "prompts=4", *more)  # fmt: skip


def test_the_command_says_how_many_processes_there_are_and_writes_once(folder, tmp_path):
    out = tmp_path / "table.parquet"
    done = command(folder, 2, "--output", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("processes: 2") == 1
    assert pd.read_parquet(out)["update"].tolist() == [0, 1, 2]


def test_an_option_that_is_none_is_refused(folder, capsys):
    options = ["--method", "dpo", "--task", "min", "--rate", "1e-3", "--prepared", str(folder)]
    assert run.main([*options, "--option", "batches=8"]) == 2
    assert "unknown option ['batches']; choose from ['batch'" in capsys.readouterr().err
    assert run.main([*options, "--option", "batch"]) == 2
    assert "--option must be NAME=VALUE, got 'batch'" in capsys.readouterr().err


def test_fewer_processes_than_asked_for_are_an_error():
    with pytest.raises(RuntimeError, match="2 processes were asked for, 1 run: .*torchrun"):
        parallel.start(2, cpu=True)


def test_alone_nothing_is_divided_or_initialised():
    x = torch.arange(5)
    assert parallel.place() == (0, 1)
    assert torch.equal(parallel.mine(x), x) and parallel.total(x) is x
    assert not torch.distributed.is_initialized()
