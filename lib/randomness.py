"""Random numbers by address instead of by state: a run draws the same ones after a kill."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(seeds: Sequence[int], stream: int, counter: int, shape: tuple[int, ...]) -> Tensor:
    """(runs, *shape) numbers in [0, 1) from a counter-based generator (Philox).

    No state: the numbers of a sampling can be drawn again after a kill, and do not depend on what
    else is in the stack.

    Args: seeds: one per run; stream: what the numbers are for; counter: which draw of the stream.
    """
    drawn = [
        np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, counter]))
        .random(shape, dtype=np.float32) for seed in seeds
    ]  # fmt: skip
    return torch.from_numpy(np.stack(drawn))
