"""One run over several processes: rows are divided, what was computed is summed.

Every process holds the same policy and the same state. A process fills in its share of a tensor of
zeros, and the sum over processes is the whole tensor, bit for bit; gradients are summed likewise,
so the global denominator of `lib.finetune` is all that they need. In one process, nothing happens.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch.distributed
from accelerate import Accelerator, PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

Array = TypeVar("Array", Tensor, np.ndarray)


def start(expected: int | None = None, cpu: bool = False) -> Accelerator:
    """Joins the processes that torchrun started, or stands alone.

    Args: expected: how many processes there must be; None for what WORLD_SIZE says, or 1.
    Raises: RuntimeError for another number: a launcher can start fewer than it was asked for.
    """
    expected = int(os.environ.get("WORLD_SIZE", 1)) if expected is None else expected
    accelerator = Accelerator(cpu=cpu)
    if accelerator.num_processes != expected:
        raise RuntimeError(
            f"{expected} processes were asked for, {accelerator.num_processes} run: start them "
            f"with torchrun --nproc_per_node {expected} -m ..."
        )
    return accelerator


def place() -> tuple[int, int]:
    """Index of this process and their number."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    state = PartialState()
    return state.process_index, state.num_processes


def mine(items: Array) -> Array:
    """This process's share: every n-th, so that items in order of length are shared evenly."""
    index, count = place()
    return items[index::count]


def total(x: Tensor) -> Tensor:
    """The sum over processes, in all of them."""
    return _reduced(x, "sum")


def largest(x: Tensor) -> Tensor:
    """The maximum over processes, in all of them."""
    return _reduced(x, "max")


def _reduced(x: Tensor, how: str) -> Tensor:
    if place()[1] == 1:
        return x
    numbers = x.int() if x.dtype == torch.bool else x
    return reduce(numbers, how).to(x.dtype)


def placed(part: Tensor, rows: Tensor, count: int) -> Tensor:
    """`part` (n, ...) of this process at its `rows` (n,) of the whole (count, ...)."""
    if place()[1] == 1:
        return part
    whole = part.new_zeros(count, *part.shape[1:])
    whole[rows] = part
    return total(whole)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces every gradient by the sum over processes.

    One that is missing counts as 0, but stays missing where all processes lack it: for a gradient
    of 0 Adam takes a step by its moments, for none it takes no step, as in one process.
    """
    parameters = list(parameters)
    if place()[1] == 1 or not parameters:
        return
    found = [p.grad is not None for p in parameters]
    somewhere = largest(torch.tensor(found, device=parameters[0].device)).tolist()
    for p in itertools.compress(parameters, somewhere):
        p.grad = total(torch.zeros_like(p) if p.grad is None else p.grad)
