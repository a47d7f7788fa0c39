"""Speed of the bandit engine: a run-step against two baselines, the machine's peak, scale, plans.

A run-step is one update of one run with its training metrics, and the evaluation of reward, KL and
all other metrics on 100 prompts. The engine runs it in blocks, as a grid does.
"""

from __future__ import annotations

import itertools
import multiprocessing
import re
import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import Result
from benchmarks.baselines import Batch, PlainRun, ReleasedRun, SingleRun, as_linear, stacked_name
from lib import methods
from lib.bandit.config import LEARNING_RATES, VOCABULARY, BanditRun, bandit_run
from lib.bandit.engine import BanditEngine
from lib.bandit.network import GPT_NANO
from lib.bandit.problem import EVALUATE, TRACKED, BanditProblem
from lib.finetune import State, fine_tune
from lib.methods import Hyper, Method
from lib.randomness import uniforms
from lib.rollouts import Rollout, sequence_logp
from lib.untracked import Untracked

BLOCK = BanditEngine.block_size
METHODS = ("best_of_n", "ipo")
TOLERANCE = 1e-4  # of a baseline's loss, gradient and metrics against the engine's
MEMORY_BUDGET = 1000  # MB of one process, however many runs
PEAK_SIZE = 2048  # of the square matrices whose product sets the peak


@dataclass(frozen=True)
class Effort:
    """How often things are repeated."""

    rounds: int  # ours and theirs alternate, so that a busy moment hits both
    steps: int  # of each in a round
    released: int  # steps of the slow baseline
    grids: tuple[int, ...]  # runs of the linearity benchmark
    machine: bool  # also measure all cores
    updates: int  # of the plan benchmark


FULL = Effort(rounds=4, steps=8, released=2, grids=(10, 100, 1000), machine=True, updates=20)
QUICK = Effort(rounds=1, steps=3, released=1, grids=(10, 20), machine=False, updates=4)


# --- timing ---------------------------------------------------------------------------------------


class Ticks(Untracked):
    """Stands in for a run's checkpoint: nothing to resume or save, notes when a row is done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def progress(self, done: int, total: int, **shown: str) -> None:
        self.times.append(perf_counter())


def grid(method: str, count: int, **options: Any) -> list[BanditRun]:
    """`count` runs of one method: the ten rates of the sweep, then the next seed."""
    return [
        bandit_run(method, "R1", LEARNING_RATES[i % len(LEARNING_RATES)], i // 10, **options)
        for i in range(count)
    ]


def engine_times(method: str, steps: int, _process: int = 0) -> list[float]:
    """Seconds of each run-step in one full block, evaluated at every update."""
    ticks = Ticks()
    configs = grid(method, BLOCK, iterations=steps + 1, evaluations=steps + 1)
    BanditEngine().run(configs, ticks)
    return [(b - a) / BLOCK for a, b in itertools.pairwise(ticks.times)]


def step_times(run: SingleRun, steps: int) -> list[float]:
    """Seconds of each of `steps` steps of a single run, after one to warm up."""
    times = []
    for _ in range(steps + (steps > 1)):
        started = perf_counter()
        run.step()
        times.append(perf_counter() - started)
    return times[-steps:]


def plain_times(
    method: str, cached: bool, threads: int, steps: int, _process: int = 0
) -> list[float]:
    """Seconds of each step of `PlainRun`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return step_times(PlainRun(bandit_run(method, "R1", 0.001, 0), cached), steps)
    finally:
        torch.set_num_threads(before)


def _ready(together: Any) -> None:
    torch.set_num_threads(1)
    together.wait()


def in_processes(work: Callable[[int], Any], count: int) -> list[Any]:
    """What `work` returns in each of `count` fresh processes of one thread, started together."""
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(count)
    with context.Pool(count, initializer=_ready, initargs=(together,)) as pool:
        found = pool.map(work, range(count), chunksize=1)
        pool.close()  # leaving the block kills processes, whose semaphores Python then warns of
        pool.join()
    return found


def sgemm_peak(repeats: int = 8) -> float:
    """FLOP/s of a large float32 matrix product in this process: the best of several."""
    a, b = torch.randn(2, PEAK_SIZE, PEAK_SIZE)
    best = float("inf")
    for _ in range(repeats):
        started = perf_counter()
        a @ b
        best = min(best, perf_counter() - started)
    return 2 * PEAK_SIZE**3 / best


# --- the baselines compute the same ---------------------------------------------------------------


def check_baselines(method: str) -> dict[str, float]:
    """Largest deviation of each baseline's loss, gradient and metrics from the engine's.

    Same parameters, same given samples; the policy is moved away from both the sampling policy and
    the reference, so that no KL is 0. Raises: AssertionError above TOLERANCE.
    """
    problem, state, data = _moved(method)
    metrics, completions = problem.evaluate(state), evaluation_completions(problem, state)
    loss, gradient = engine_gradient(problem, state, data)
    run = 1
    deviations = {}
    for baseline in (PlainRun, ReleasedRun):
        single, label = baseline(grid(method, 2)[run]), baseline.__name__
        single.policy.load_stacked(state.policy.parameters, run)
        single.generating.load_stacked(state.behaviour.parameters, run)
        if isinstance(single, PlainRun):
            single.fixed, single.held_out = (
                one_run(pairs, run) for pairs in (problem.fixed, problem.held_out)
            )
        for name, value in single.evaluate(completions[run]).items():
            deviations[f"{label} {name}"] = relative(torch.tensor(value), metrics[name][run])
        own = single.loss(one_run(data, run))
        own.backward()
        deviations[f"{label} loss"] = relative(own.detach(), loss[run])
        deviations[f"{label} gradient"] = relative(flat_gradient(single), gradient[run])
    bad = {name: value for name, value in deviations.items() if not value <= TOLERANCE}
    assert not bad, f"{method}: baselines differ from the engine: {bad}"
    return deviations


def _moved(method: str) -> tuple[BanditProblem, State, Rollout]:
    """Two runs whose policy has left the reference and the policy that drew the data."""
    configs = grid(method, 2)
    problem = BanditProblem(configs)
    state = problem.initial_state()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        state.behaviour = state.policy.frozen()
        state.policy.flat += 0.02 * torch.randn(state.policy.flat.shape, generator=generator)
    data = problem.collect(state, problem.method)
    return problem, state, data.labelled(problem.method.prepare(data, configs[0].hyper))


def evaluation_completions(problem: BanditProblem, state: State) -> Tensor:
    """What `problem.evaluate` draws from the policy: (R, 100, L)."""
    prompts = torch.arange(VOCABULARY).expand(len(problem.seeds), -1)
    shape = (VOCABULARY, problem.config.length)
    numbers = uniforms(problem.seeds, EVALUATE, state.updates, shape)
    return state.policy.sample(prompts, numbers).completions


def engine_gradient(problem: BanditProblem, state: State, data: Rollout) -> tuple[Tensor, Tensor]:
    """Loss (R,) and gradient (R, n) of the engine's own update, which is not applied."""
    policy, method = state.policy, problem.method
    seen: list[Tensor] = []
    policy.optimiser.step = lambda flat, gradient, alive: seen.append(gradient)
    _, metrics = policy.update(data, method, problem.config.hyper, method.items(data))
    return metrics["loss"], seen[0]


def flat_gradient(single: SingleRun) -> Tensor:
    """The gradient of a baseline's policy in the engine's order: (n,)."""
    parts = {
        stacked_name(name): as_linear(name, p.grad).flatten()
        for name, p in single.policy.named_parameters()
    }
    return torch.cat([parts[name] for name in GPT_NANO.shapes()])


def one_run(data: Rollout, run: int) -> Batch:
    """One run's share of a stacked rollout."""
    ref = None if data.ref is None else sequence_logp(data.ref, data.mask)[run]
    return Batch(data.prompts[run], data.completions[run], data.rewards[run], ref)


def relative(value: Tensor, expected: Tensor) -> float:
    """|value - expected| as a share of |expected| (of 1 if that is less), Euclidean norms."""
    return ((value - expected).norm() / expected.norm().clamp(min=1.0)).item()


# --- operations counted and timed -----------------------------------------------------------------


def forward_flops(sequences: int, length: int, cached: bool = False) -> int:
    """FLOPs of the matrix products of one forward pass (2 for each multiply-add).

    A token takes 12 d^2 multiply-adds a layer (queries, keys and values 3, output 1, feed-forward
    4 + 4), d V in the head, and in attention 2 d for each key: all `length` keys in a full pass,
    only those up to the token in a cached one. Left out: the fold of the layer norms' gains, 1 part
    in 100 of a cached pass and in 900 of a full one.
    """
    d, layers = GPT_NANO.width, GPT_NANO.layers
    keys = length * (length + 1) // 2 if cached else length**2
    per_sequence = length * (12 * d**2 * layers + d * GPT_NANO.vocabulary) + keys * 2 * d * layers
    return 2 * sequences * per_sequence


def run_step_flops(config: BanditRun, trained: int) -> int:
    """FLOPs of the matrix products of one on-policy run-step with all metrics.

    Sampling B completions with cached keys and values; scoring them under the reference where the
    method needs it; forward and backward (twice the forward) on the `trained` completions;
    evaluation: 100 completions drawn, and scored under the reference and the sampling policy, and
    the followed pairs of training and held-out prompts.
    """
    length, drawn = config.length, config.schedule.batch
    scored = drawn if "reference" in methods.get(config.method).needs else 0
    followed = config.completions * (min(TRACKED, config.prompts) + TRACKED * config.held_out)
    return (
        forward_flops(drawn + VOCABULARY, length, cached=True)
        + forward_flops(scored + 2 * VOCABULARY + followed, length)
        + 3 * forward_flops(trained, length)
    )


class Stepper:
    """One block whose update and evaluation can be called step by step."""

    def __init__(self, method: str):
        self.config = grid(method, BLOCK)[0]
        self.problem = BanditProblem(grid(method, BLOCK))
        self.state = self.problem.initial_state()
        self.updates = fine_tune(self.state, self.problem, self.problem.method,
                                 self.config.schedule, self.config.hyper)  # fmt: skip

    def step(self) -> None:
        """One run-step of every run."""
        next(self.updates)
        self.problem.evaluate(self.state)

    def counted(self) -> tuple[int, int]:
        """FLOPs of a run-step: analytic, and as torch counts the products that are executed."""
        trained = []
        policy, update = self.state.policy, self.state.policy.update

        def noted(batch: Rollout, method: Method, hyper: Hyper, *args: Any):
            groups, completions = batch.completions.shape[1:3]
            trained.append(groups * (method.carriers(hyper) or completions))
            return update(batch, method, hyper, *args)

        policy.update = noted
        with FlopCounterMode(display=False) as counter:
            self.step()
        policy.update = update
        return run_step_flops(self.config, trained[0]), counter.get_total_flops() // BLOCK


KINDS = {  # operations whose name contains a word, first match
    "softmax": ("softmax",),
    "GELU": ("gelu",),
    "layer norm": ("layer_norm",),
    "matrix products": ("mm",),
    "copies": ("copy", "cat", "fill", "clone", "zero"),
    "sums and products": ("sum", "mul", "add", "sub", "div", "exp", "where", "::ne"),
}


def kind(event: Any) -> str:
    """What an operation of a profile counts as; attention's products have a batch of their own."""
    matches = (label for label, words in KINDS.items() if any(word in event.name for word in words))
    label = next(matches, "the rest")
    batches = [shape[0] for shape in event.input_shapes if len(shape) == 3]
    own = label == "matrix products" and batches and max(batches) > BLOCK
    return "attention products" if own else label


@cache
def breakdown(method: str, steps: int = 2) -> dict[str, float]:
    """Share of a run-step's time by kind of operation, the largest first."""
    stepper = Stepper(method)
    stepper.step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for _ in range(steps):
            stepper.step()
    spent: dict[str, float] = defaultdict(float)
    for event in profiled.events():
        spent[kind(event)] += event.self_cpu_time_total
    total = sum(spent.values())
    return dict(sorted(((k, v / total) for k, v in spent.items()), key=lambda item: -item[1]))


def limits(method: str) -> str:
    """The breakdown as text."""
    return ", ".join(f"{name} {share:.0%}" for name, share in breakdown(method).items())


def page_faults(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, with its page faults and the share of its time in the kernel."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    result = work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    system, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    faults = after.ru_minflt - before.ru_minflt
    return result, {"page_faults": faults, "kernel_share": system / max(system + user, 1e-9)}


# --- benchmarks -----------------------------------------------------------------------------------


def best_setting(method: str) -> dict[tuple[bool, int], float]:
    """Seconds of a step of `PlainRun` by (cached, threads)."""
    settings = itertools.product((True, False), (1, 2))
    return {(c, t): median(plain_times(method, c, t, 3)) for c, t in settings}


def run_step(method: str, effort: Effort) -> Iterator[Result]:
    """A run-step inside a grid against both baselines, core for core, then on two cores."""
    deviations = check_baselines(method)
    settings = best_setting(method)
    cached, threads = min(settings, key=lambda s: settings[s] * s[1])
    ours, theirs = [], []
    for _ in range(effort.rounds):
        ours += engine_times(method, effort.steps)
        theirs += plain_times(method, cached, threads, effort.steps)
    mine, plain = median(ours), median(theirs)
    details = {
        "deviations": deviations,
        "settings": {f"cached={c} threads={t}": s for (c, t), s in settings.items()},
        "ours": ours,
        "theirs": theirs,
    }
    decoding = "cached" if cached else "uncached"
    yield Result(
        f"run_step/{method}/plain", plain * threads / mine,
        f"plain PyTorch, one run at a time ({decoding} sampling, threads: {threads}), per core",
        mine, plain, "1", limits(method), details=details,
    )  # fmt: skip
    slow = step_times(ReleasedRun(bandit_run(method, "R1", 0.001, 0)), effort.released)
    yield Result(
        f"run_step/{method}/released", median(slow) / mine,
        "released protocol, one sequence at a time (threads: 1), per core",
        mine, median(slow), "1", limits(method), details={"theirs": slow},
    )  # fmt: skip
    if effort.machine:
        yield whole_machine(method, effort, settings, cached)


def whole_machine(
    method: str, effort: Effort, settings: dict[tuple[bool, int], float], cached: bool
) -> Result:
    """Run-steps a second on two cores: two processes of ours against the better of two ways."""
    steps = effort.steps
    ours = in_processes(partial(engine_times, method, steps), 2)
    pair = in_processes(partial(plain_times, method, cached, 1, steps), 2)
    mine = median(itertools.chain(*ours)) / 2
    ways = {
        "one process of 2 threads": min(settings[True, 2], settings[False, 2]),
        "two processes of 1 thread": median(itertools.chain(*pair)) / 2,
    }
    best = min(ways, key=ways.get)
    return Result(
        f"run_step/{method}/plain/two_cores", ways[best] / mine,
        f"plain PyTorch, one run at a time ({best})", mine, ways[best],
        "2 processes x 1", "memory and cache shared by the cores; else as on one",
        details={"ways": ways},
    )  # fmt: skip


def peak(method: str, effort: Effort) -> Iterator[Result]:
    """The share of this process's sgemm peak that a run-step with all metrics reaches."""
    flops, executed = Stepper(method).counted()
    assert abs(flops / executed - 1) < 0.05, f"{method}: counted {flops}, torch {executed} FLOPs"
    peaks, times = [sgemm_peak()], []
    faults: dict[str, float] = {}
    for _ in range(effort.rounds):
        spent, faults = page_faults(partial(engine_times, method, effort.steps))
        times += spent
        peaks.append(sgemm_peak())
    top, seconds = max(peaks), median(times)
    shares = breakdown(method)
    dense = shares["matrix products"] * seconds  # the profile's share of the unprofiled time
    details = {
        "flops": flops, "flops_torch": executed, "peak_flops_per_second": peaks, "times": times,
        "shares": shares, "products_share_of_peak": flops / dense / top, **faults,
    }  # fmt: skip
    yield Result(
        f"peak/{method}", flops / seconds / top,
        f"sgemm ({top / 1e9:.0f} GFLOP/s at {PEAK_SIZE}; {flops / 1e9:.2f} GFLOP a step, "
        f"{flops / seconds / 1e9:.0f} GFLOP/s)", seconds, flops / top, "1",
        f"{limits(method)}; time in the kernel {faults['kernel_share']:.0%}",
        "the peak of", details,
    )  # fmt: skip


def grid_cost(runs: int, steps: int, _process: int = 0) -> tuple[float, float]:
    """Seconds of a whole grid in blocks, and this process's peak memory in MB."""
    engine = BanditEngine()
    configs = grid("best_of_n", runs, iterations=steps, evaluations=1)
    started = perf_counter()
    blocks = [configs[i : i + BLOCK] for i in range(0, runs, BLOCK)]
    tables = [table for block in blocks for table in engine.run(block, Ticks())]
    seconds = perf_counter() - started
    assert len(tables) == runs
    return seconds, peak_memory()


def peak_memory() -> float:
    """Most memory that this process has held, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, not inherited from the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def linearity(effort: Effort) -> Iterator[Result]:
    """Time of a run-step and peak memory as the grid grows; set-up and evaluation included."""
    steps = 2
    costs = {n: in_processes(partial(grid_cost, n, steps), 1)[0] for n in effort.grids}
    per_step = {n: seconds / (n * steps) for n, (seconds, _) in costs.items()}
    memory = {n: megabytes for n, (_, megabytes) in costs.items()}
    assert max(memory.values()) <= MEMORY_BUDGET, f"over {MEMORY_BUDGET} MB: {memory}"
    small, large = min(per_step), max(per_step)
    shown = ", ".join(f"{n} runs {memory[n]:.0f} MB" for n in memory)
    yield Result(
        f"linearity/{large}_runs", per_step[large] / per_step[small],
        f"{small} runs, set-up included", per_step[large], per_step[small], "1",
        f"blocks of {BLOCK}, one after another; peak memory {shown}, budget {MEMORY_BUDGET} MB",
        "the time per run-step of", {"seconds_per_run_step": per_step, "peak_mb": memory},
    )  # fmt: skip


PLANS: dict[str, tuple[str, dict[str, int]]] = {
    "offline": ("dpo_offline", {"inner_steps": 1}),
    "on_policy": ("ipo", {}),
    "inner_steps_10": ("ppo_sequence", {"inner_steps": 10}),
    "sets_10": ("ipo", {"sets": 10}),
}


def plan_config(name: str, updates: int) -> tuple[str, dict[str, int]]:
    """The method and options of one kind of run, cut to `updates` updates."""
    method, options = PLANS[name]
    inner, sets = options.get("inner_steps", 1), options.get("sets", 1)
    if methods.get(method).on_policy:
        options = {**options, "iterations": max(1, updates // (inner * sets))}
    else:
        options = {**options, "inner_steps": updates}
    return method, {**options, "evaluations": max(1, updates // 4)}


def plan(effort: Effort) -> Iterator[Result]:
    """What a plan says a block takes against what it takes."""
    engine = BanditEngine()
    for name in PLANS:
        method, options = plan_config(name, effort.updates)
        configs = grid(method, BLOCK, **options)
        started = perf_counter()
        engine.run(configs, Ticks())
        measured = perf_counter() - started
        estimate = engine.cost(configs)
        yield Result(
            f"plan/{name}", estimate / measured, f"a block of {method}", estimate, measured, "1",
            "the constants of BanditEngine.cost, set on an idle machine",
            "the measured time of", {"options": options},
        )  # fmt: skip


BENCHMARKS: dict[str, Callable[[Effort], Iterator[Result]]] = {
    **{f"run_step/{m}": partial(run_step, m) for m in METHODS},
    **{f"peak/{m}": partial(peak, m) for m in METHODS},
    "linearity": linearity,
    "plan": plan,
}
