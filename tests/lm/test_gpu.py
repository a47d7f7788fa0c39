"""A GPU computes what a CPU does: the same responses, and the same run up to rounding."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import pytest
import torch

from lib.lm import decode, lora
from lib.lm.config import TINY, length_run
from lib.lm.engine import LengthEngine
from lib.lm.models import load_policy
from lib.lm.network import Network
from lib.lm.problem import LengthProblem
from lib.lm.static import StaticDecoder
from lib.timing import Clock
from lib.untracked import Untracked
from tests.tiny_lm import half_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

METHODS = ("dpo_offline", "rwr_offline", "best_of_n", "rwr", "ppo_token", "dpo")
SMALL = {"prompts": 16, "held_out": 16, "minibatch": 16, "max_tokens": 48, "evaluations": 3}


def table(method: str, device: str, **options):
    config = length_run(method, "min", 3e-4, 5, updates=3, **{**SMALL, "batch": 16, **options})
    return LengthEngine(device).run([config], Untracked())[0]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_update_is_that_of_a_cpu(method):
    """In float32; the responses are drawn from the same numbers, and so are the same."""
    there, here = (table(method, device, decoder="growing") for device in ("cuda", "cpu"))
    assert list(there) == list(here)
    assert_alike(there, here, [n for n in here if not n.startswith("seconds_")])
    assert there["length"][0] == here["length"][0]


def assert_alike(one, other, names):
    """Up to the first update: after it a token may fall the other way."""
    for name in names:
        np.testing.assert_allclose(one[name][:2], other[name][:2], rtol=2e-2, atol=2e-3,
                                   err_msg=name)  # fmt: skip


@pytest.mark.parametrize("method", ["dpo", "ppo_token"])
def test_a_compiled_decoder_trains_as_a_growing_one(method):
    compiled, growing = (table(method, "cuda", decoder=d) for d in ("compiled", "growing"))
    assert_alike(compiled, growing, ("length", "proxy", "kl_ref", "loss"))


@pytest.mark.parametrize("method", ["dpo_offline", "ppo_token", "dpo"])
def test_16_bits_stay_near_32(method):
    """With the default decoder; log-probabilities of a sampling are found again, or it raises."""
    half, whole = (table(method, "cuda", dtype=d) for d in (half_of("cuda"), "float32"))
    assert abs(half["held_out_accuracy"].iloc[-1] - whole["held_out_accuracy"].iloc[-1]) < 0.2
    assert abs(half["length"].iloc[0] - whole["length"].iloc[0]) < 8
    assert np.isfinite(half["loss"]).iloc[1:].all()


@pytest.mark.parametrize("rank", [0, 4])
def test_a_graph_is_made_anew_for_longer_prompts(rank):
    """Of adapters too; prompts of another width that fit use the old one."""
    model, _ = load_policy(TINY / "policy", device="cuda")
    if rank:
        lora.attach(model, rank, 0)
    decoder = StaticDecoder(network := Network(model), compiled=True)
    eos, graphs = torch.tensor([model.config.eos_token_id], device="cuda"), []
    for width in (5, 9, 70, 5):
        prompts = torch.randint(3, 2000, (4, width), device="cuda")
        given = prompts, torch.ones_like(prompts).bool(), torch.rand(8, 40, device="cuda"), eos, 0
        one, other = decode.sample(network, *given), decoder.sample(*given)
        assert torch.equal(one.completions, other.completions), f"width {width}"
        graphs.append(decoder.steps.slates[8, 40, 1].graph)  # others may be an earlier test's
    assert graphs[0] is graphs[1] and graphs[1] is not graphs[2] and graphs[2] is graphs[3]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ["dpo", "ppo_token", "best_of_n"])
def test_an_update_on_planned_data_does_not_wait(name):
    """The second on a sampling, in a micro-batch for each prompt: a first one may wait."""
    config = length_run(name, "min", 3e-4, 5, updates=2, batch=32, decoder="growing", **SMALL)
    problem = LengthProblem(config, "cuda")
    state, method, hyper = problem.initial_state(), problem.method, config.hyper
    policy = state.behaviour = state.policy
    data = problem.collect(state, method)
    data = policy.planned(data.labelled(method.prepare(data, hyper)), method)
    policy.budget, half = 1, data.groups // 2
    first, second = data.narrow(0, half), data.narrow(half, half)
    policy.update(first, method, hyper, method.items(first))
    items = method.items(second)
    assert len(policy._micro_batches(second)) > 1 and not policy.fresh
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            items.item()
        policy.update(second, method, hyper, items)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_phases_take_as_long_as_the_gpu_works():
    """Products that are only asked for, and not waited for, are in their phase."""
    clock, x = Clock("cuda"), torch.randn(8192, 8192, device="cuda")
    (x @ x).sum().item()  # the first product of a process takes longer
    with clock.measure("training"):
        x = x @ x
        with clock.measure("scoring"):
            for _ in range(8):
                x = x @ x
        asked = perf_counter()
    torch.cuda.synchronize()
    waited, seconds = perf_counter() - asked, clock.seconds
    assert seconds["scoring"] > 4 * seconds["training"] > 0
    assert seconds["scoring"] > 0.8 * waited
