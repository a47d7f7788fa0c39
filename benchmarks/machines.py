"""What is measured of a device: a clock that waits for it, memory, speed of products and copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from time import perf_counter

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bandit import peak_memory, sgemm_peak

PRODUCT = 8192  # of the square matrices whose product sets a GPU's peak
COPIED = {"cuda": 2 * 10**9, "cpu": 10**8}  # bytes of the copy that sets the bandwidth
REPEATS = 8


def synchronise(device: str) -> None:
    """Waits until a GPU has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Gives back what the process keeps of a GPU's memory without using it."""
    if device == "cuda":
        torch.cuda.empty_cache()


def reset_memory(device: str) -> None:
    """From here on `most_memory` counts; on a CPU it counts from the start of the process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def most_memory(device: str) -> float:
    """MB that the process has held at most: of tensors on a GPU, in all on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_memory()


def product_peak(device: str, dtype: str) -> float:
    """FLOP/s of a large matrix product in this process; on a CPU in float32, whatever `dtype`."""
    if device == "cpu":
        return sgemm_peak()
    a, b = torch.randn(2, PRODUCT, PRODUCT, device=device, dtype=getattr(torch, dtype))
    return 2 * PRODUCT**3 / _fastest(lambda: a @ b, device)


def copy_peak(device: str) -> float:
    """Bytes a second, read and written, of a large copy within the device's memory."""
    a, b = torch.zeros(2, COPIED[device], dtype=torch.uint8, device=device)
    return 2 * COPIED[device] / _fastest(lambda: b.copy_(a), device)


def _fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the best of several, after one to warm up."""
    work()
    best = float("inf")
    for _ in range(REPEATS):
        synchronise(device)
        started = perf_counter()
        work()
        synchronise(device)
        best = min(best, perf_counter() - started)
    return best


def graphs_compiled() -> int:
    """How many graphs the compiler has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graphs_skipped() -> int:
    """How many compiled graphs could not be made CUDA graphs by the compiler, where it was asked to
    (transformers asks; this book's decoder captures its own), and are launched kernel by kernel."""
    if not torch.cuda.is_available():
        return 0
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def _packed_flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * prod(x) * weight[0]


@contextmanager
def counting(device: str) -> Iterator[FlopCounterMode]:
    """Counts matrix products. On a GPU attention is computed by them meanwhile: not every PyTorch
    can count its kernels where several heads share keys."""
    math = sdpa_kernel(SDPBackend.MATH) if device == "cuda" else nullcontext()
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # of `lib.lm.packed`
    packed = {} if product is None else {product: _packed_flops}
    with math, FlopCounterMode(display=False, custom_mapping=packed) as counter:
        yield counter


def label(device: str, threads: int) -> str:
    """Threads, and the GPU by its name."""
    return f"{threads}, {torch.cuda.get_device_name()}" if device == "cuda" else str(threads)
