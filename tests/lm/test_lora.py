"""LoRA: the reference at the start, adapters alone after an update, one network for both."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lib.lm import lora
from lib.lm import problem as problem_module
from lib.lm.config import length_run
from lib.lm.engine import LengthEngine
from lib.lm.network import Network
from lib.lm.policy import Scorer
from lib.lm.problem import LengthProblem
from lib.runs import Checkpoint
from tests.bandit.helpers import Checkpoint as Watched
from tests.lm_folder import prepared_folder
from tests.tiny_lm import save_tiny_policy

RANK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared_folder(tmp_path_factory.mktemp("prepared"))


def small(folder, method="dpo", seed=0, **options):
    options = {"updates": 4, "minibatch": 8, "batch": 8, "max_tokens": 12, "prompts": 6,
               "evaluations": 2, "lora_rank": RANK, **options}  # fmt: skip
    return length_run(method, "min", 1e-2, seed, prepared=str(folder), **options)


def trained(config):
    (table,) = LengthEngine().run([config], Watched())
    return table


def started(problem):
    state = problem.initial_state()
    state.behaviour = state.policy.frozen()
    return state


def attached(tmp_path, rank=RANK, seed=0, dtype="float32", **config):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_policy(tmp_path, **config))
    lora.attach(model, rank, seed, dtype)
    return model


def by_name(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_every_linear_layer_but_the_head_has_a_matrix_of_the_rank(tmp_path):
    """Attention's two and the MLP's two, in each of two layers: rank (inputs + outputs) numbers."""
    model = attached(tmp_path, hidden=16, layers=2)
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trains) and len(trains) == 2 * 4 * 2
    inputs_and_outputs = (16 + 48) + (16 + 16) + (16 + 32) + (32 + 16)
    assert sum(p.numel() for p in trains.values()) == RANK * 2 * inputs_and_outputs
    assert not any("lora" in name for name, _ in model.get_output_embeddings().named_parameters())


def test_a_update_matches_the_formula(tmp_path):
    """W x + s B A x for a layer whose B is not 0."""
    model = attached(tmp_path)
    layer = model.gpt_neox.layers[0].mlp.dense_h_to_4h
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(5, 16)
    base = torch.nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), base + lora.SCALE * x @ a.T @ b.T)
    with lora.switched_off(model):
        assert torch.equal(layer(x), base)
    assert all(p.requires_grad for p in (a, b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_start_is_the_reference_bit_for_bit(folder, dtype):
    problem = LengthProblem(small(folder, dtype=dtype))
    alone = problem.reference  # a model of its own, without adapters
    state = started(problem)
    batch = problem.collect(state, problem.method)
    assert problem.reference is not alone and state.reference is problem.reference
    expected = alone.score(batch)
    assert torch.equal(state.policy.score(batch), expected)
    assert torch.equal(problem.reference.score(batch), expected) and expected.abs().max() > 1
    assert torch.equal(batch.ref, expected)


def test_an_update_changes_the_adapters_alone_and_the_reference_stays(folder):
    problem = LengthProblem(small(folder))
    state = started(problem)
    network, method = state.policy.network, problem.method
    assert problem.reference.network.model is network.model
    batch = problem.collect(state, method)
    batch = batch.labelled(method.prepare(batch, method.hyper))
    before, scores = by_name(network), problem.reference.score(batch)
    for _ in range(2):  # B is 0 at the first, so A has no gradient yet
        state.policy.update(batch, method, method.hyper, method.items(batch))
    changed = {name for name, p in by_name(network).items() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert torch.equal(problem.reference.score(batch), scores)
    assert not torch.equal(state.policy.score(batch), scores)


def test_an_offline_run_scores_with_its_own_reference(folder, monkeypatch):
    """And loads no third policy for it."""
    problem = LengthProblem(small(folder, "dpo_offline"))
    state = started(problem)
    monkeypatch.setattr(problem_module, "load_policy", None)
    problem_module.reference_scores.cache_clear()
    batch = problem.collect(state, problem.method)
    monkeypatch.undo()
    plain = LengthProblem(small(folder, "dpo_offline", lora_rank=None))
    assert torch.equal(batch.completions, plain.collect(state, problem.method).completions)
    expected = plain.collect(state, problem.method).ref
    torch.testing.assert_close(batch.ref, expected, atol=1e-5, rtol=1e-5)


def test_the_value_head_trains_whole(folder):
    problem = LengthProblem(small(folder, "ppo_token"))
    state = started(problem)
    network, method = state.policy.network, problem.method
    hyper = {**method.hyper, "kl_coefficient": 0.1}
    batch = problem.collect(state, method)
    batch = batch.labelled(method.prepare(batch, hyper))
    state.policy.update(batch, method, hyper, method.items(batch))
    assert network.value.weight.abs().min() > 0 and network.value.bias.abs() > 0


@pytest.mark.parametrize(("method", "dtype"), [("dpo", "float16"), ("ppo_token", "float32"),
                                               ("dpo_offline", "float32")])  # fmt: skip
def test_runs_of_all_kinds(folder, method, dtype):
    """The invariants of `lib.finetune` hold throughout; a second run has the same numbers."""
    options = {"dtype": dtype, "checkpointing": True, "decoder": "static"}
    one, two = (trained(small(folder, method, **options)) for _ in range(2))
    columns = [c for c in one if not c.startswith("seconds_")]
    assert one[columns].equals(two[columns])
    assert one["kl_ref"].iloc[0] == 0 < one["kl_ref"].iloc[-1]
    assert not one["diverged"].any()


def test_a_seed_draws_its_own_matrices(tmp_path):
    made = (attached(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    one, same, other = map(by_name, made)
    assert all(torch.equal(one[name], same[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {name for name in one if "lora_A" in name}


def test_drawing_them_leaves_the_global_numbers_be(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(save_tiny_policy(tmp_path))
    torch.manual_seed(5)
    lora.attach(model, RANK, 0)
    assert torch.equal(torch.rand(3), expected)


def test_frozen_matrices_take_16_bits_and_products_do_not_change(tmp_path):
    model = attached(tmp_path, dtype="bfloat16")
    halves = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert "gpt_neox.layers.0.mlp.dense_4h_to_h.base_layer.weight" in halves
    assert "lm_head.weight" in halves and "gpt_neox.embed_in.weight" not in halves
    assert not any("lora_" in name or "norm" in name for name in halves)
    tokens = torch.arange(12).view(2, 6)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    networks = [Network(m, dtype="bfloat16") for m in (model, whole)]
    states = [network.hidden(tokens, mask) for network in networks]
    assert torch.equal(*states)
    assert torch.equal(*(n.logits(h) for n, h in zip(networks, states, strict=True)))


def test_what_is_saved_is_adapters_alone_and_a_killed_run_ends_with_the_same_numbers(
    folder, tmp_path
):
    config = small(folder, "dpo", updates=6, evaluations=3)
    whole = trained(config)
    path = tmp_path / "checkpoint"

    class Killed(Checkpoint):
        def due(self):
            return True

        def progress(self, done_updates, total_updates, **shown):
            if done_updates == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LengthEngine().run([config], Killed(path, {"runs": ["x"]}))
    names = [name for name in load_file(path) if name.startswith("network.")]
    assert names and all("lora_" in name for name in names)

    class Resumed(Killed):
        def progress(self, done_updates, total_updates, **shown):
            pass

    (again,) = LengthEngine().run([config], Resumed(path, {"runs": ["x"]}))
    columns = [c for c in whole if not c.startswith("seconds_")]
    assert whole[columns].equals(again[columns])


def test_a_rank_must_be_a_number_of_rows(folder):
    with pytest.raises(ValueError, match="lora_rank must be between 1 and .*, got 0"):
        small(folder, lora_rank=0)


def test_a_base_scores_without_gradients(tmp_path):
    network = Network(attached(tmp_path))
    base = lora.Base(network)
    tokens = torch.tensor([[1, 2, 3]])
    hidden = base.hidden(tokens, tokens > 0)
    assert not hidden.requires_grad
    assert network.hidden(tokens, tokens > 0).requires_grad
    assert Scorer(base, (256,), 257).network.value is None
