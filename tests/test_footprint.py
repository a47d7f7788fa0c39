"""The formulas against parameter counts, hand-computed numbers and what must hold for any model."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Phi3Config

from lib import footprint
from lib.bandit.network import GPT_NANO
from lib.bandit.reference import load
from lib.footprint import GIB, MACHINES, PRESETS, Machine, Preset, Shape
from lib.lengths import Prepared
from lib.lm import lora
from lib.lm.config import DTYPES, TINY, length_run
from lib.lm.engine import LengthEngine
from lib.lm.models import load_policy
from lib.lm.network import Network
from lib.lm.policy import Scorer
from lib.lm.reward import RewardModel
from lib.lm.static import Twin
from lib.untracked import Untracked
from tests.lm_folder import prepared_folder

SIDES = 2 * (4 * (8 + 8) + 2 * (8 + 32))  # query, key, value, output; two of the MLP; two layers
SMALL = Shape("small", 1000, width=8, layers=2, inner=32, keys=8, vocabulary=50, sides=SIDES)


def on_paper(config):
    """A model of a configuration without its numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_sizes_are_those_of_the_configurations():
    pythia = dict(vocab_size=50_304, num_hidden_layers=24, num_attention_heads=16)
    large = GPTNeoXConfig(hidden_size=2048, intermediate_size=8192, **pythia)
    medium = GPTNeoXConfig(hidden_size=1024, intermediate_size=4096, **pythia)
    small = LlamaConfig(
        vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, tie_word_embeddings=True,
    )  # fmt: skip
    assert Shape.of("Pythia-1.4B", on_paper(large)) == footprint.PYTHIA_14
    assert Shape.of("Pythia-410M", on_paper(medium)) == footprint.PYTHIA_410
    assert Shape.of("SmolLM2-135M", on_paper(small)) == footprint.SMOLLM2
    # no `intermediate_size`, and matrices that are no nn.Linear
    sides = 12 * ((768 + 3 * 768) + (768 + 768) + 2 * (768 + 3072))
    assert Shape.of("GPT-2", on_paper(GPT2Config())) == Shape(
        "GPT-2", 124_439_808, 768, 12, 3072, 768, 50_257, sides, tied=True
    )


def test_a_gate_that_lies_in_one_matrix_with_what_it_gates_is_seen():
    config = Phi3Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    assert Shape.of("Phi-3", on_paper(config)).gated
    assert not Shape.of("GPT-2", on_paper(GPT2Config(n_layer=1))).gated


def test_the_sizes_of_a_folder_are_those_of_its_own_models():
    found = footprint.of_folder(Prepared())
    for shape, known in ((found.policy, footprint.TINY), (found.reward, footprint.TINY_REWARD)):
        for name in ("parameters", "width", "layers", "inner", "vocabulary"):
            assert getattr(shape, name) == getattr(known, name), name
    assert found.response == PRESETS["tiny"].response
    assert 8 < found.prompt < PRESETS["tiny"].prompt  # which is a round number above it


def test_a_layers_activations_by_hand():
    """Widths, and the MLP twice, or four times with a gate."""
    assert SMALL.layer_numbers() == 11 * 8 + 2 * 32
    assert SMALL.layer_numbers(4) == 10 * 8 + 2 * 32
    assert SMALL.activations() == 2 * 2 * SMALL.layer_numbers()
    assert SMALL.activations(4) == 4 * 2 * SMALL.layer_numbers(4)
    assert SMALL.activations(checkpointing=True) == 4 * 2 * 8 + 2 * SMALL.layer_numbers()
    assert replace(SMALL, gated=True).layer_numbers() == 17 * 8 + 4 * 32


def test_memory_by_hand():
    found = footprint.memory(Preset(SMALL, replace(SMALL, parameters=100), 3, 5))
    n = 64 * 8
    embedding = 2 * 50 * SMALL.width  # bytes that float32 takes beyond 16 bits
    assert found["weights"] * GIB == 8000 + embedding and found["gradients"] * GIB == 4000
    assert found["moments"] * GIB == 8000 and found["reference"] * GIB == 2000 + embedding
    assert found["reward model"] * GIB == 200 + embedding
    assert found["activations"] * GIB == n * SMALL.activations()
    assert found["logits"] * GIB == 12 * n * 50
    assert found["keys and values"] * GIB == 2 * n * 2 * 2 * 8
    total = 22_200 + 3 * embedding + n * SMALL.activations() + 12 * n * 50 + 2 * n * 2 * 2 * 8
    assert found["total"] * GIB == pytest.approx(total)


def test_keys_and_values_have_the_size_and_lora_leaves_a_small_minibatch_whole():
    preset = Preset(SMALL, SMALL, 3, 5)
    four, two = (footprint.memory(preset, size)["keys and values"] for size in (4, 2))
    assert four == 2 * two
    # the minibatch has fewer tokens than go at once: all of them, with adapters or without
    plain, lora = (footprint.memory(preset, lora=on)["activations"] for on in (False, True))
    assert plain == lora


@pytest.mark.parametrize("tied", [False, True])
def test_16_bits_hold_the_weights_three_times(tied):
    """In float32; for the decoder; and what autocast keeps of one token for the backward pass."""
    config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=3, intermediate_size=128,
                         num_attention_heads=4, tie_word_embeddings=tied)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    network = Network(model, dtype="bfloat16")
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    decoder = sum(x.numel() * x.element_size() for x in Twin(network, alone=True).casts)
    graph = footprint.stored(network, samples=1, length=1)
    preset = Preset(Shape.of("any", model), SMALL, 3, 5)
    said = footprint.memory(preset)["weights"] * GIB
    assert own + decoder + graph == pytest.approx(said, rel=0.05)
    assert footprint.memory(preset, size=4, compiled=False)["weights"] * GIB == own


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [LlamaConfig, GPTNeoXConfig])
def test_a_compiled_decoder_holds_float32_weights_twice(config, tied):
    """And of a tied head one more: the twin's is no embedding. Counted, to the byte."""
    model = AutoModelForCausalLM.from_config(config(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, intermediate_size=128,
        num_attention_heads=4, tie_word_embeddings=tied,
    ))  # fmt: skip
    shape, casts = Shape.of("any", model), Twin(Network(model), alone=True).casts
    assert shape.tied is tied
    held = [*model.parameters(), *(x for x in casts if isinstance(x, torch.nn.Parameter))]
    said = footprint.memory(Preset(shape, SMALL, 3, 5), size=4)
    assert sum(4 * p.numel() for p in held) == said["weights"] * GIB
    grown = footprint.memory(Preset(shape, SMALL, 3, 5), size=4, compiled=False)
    changed = {name for name in said if said[name] != grown[name]}
    assert changed == {"weights", "total"}


@pytest.mark.parametrize("method", ["dpo_offline", "dpo"])
def test_every_method_samples_and_scores(tmp_path, monkeypatch, method):
    """An offline one when it is evaluated: the formula need not ask which it is."""
    seen = []
    for owner, name in ((Scorer, "sample"), (RewardModel, "score")):
        what = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, what=what, name=name: seen.append(name) or
                            what(*a))  # fmt: skip
    run = length_run(method, "min", 1e-3, 0, prepared=str(prepared_folder(tmp_path)), updates=2,
                     batch=8, minibatch=8, max_tokens=12, prompts=4, evaluations=1)  # fmt: skip
    seen.clear()  # the folder's pairs were sampled
    LengthEngine().run([run], Untracked())
    assert set(seen) == {"sample", "score"}


def test_the_bandits_policy_is_the_one_that_is_trained():
    assert footprint.NANO.parameters == sum(p.numel() for p in load().values())
    assert footprint.NANO.width == GPT_NANO.width and footprint.NANO.layers == GPT_NANO.layers


def test_lora_by_hand():
    """Rank 16; the matrices and their adapters in 16 bits, the embedding of 50 x 8 in 32."""
    assert SMALL.adapters == 16 * SIDES
    found = footprint.memory(Preset(SMALL, SMALL, 3, 5), size=4, lora=True)
    assert found["reference"] == 0
    assert found["weights"] * GIB == 2 * 1000 + 2 * 50 * 8 + 8 * SMALL.adapters
    assert found["gradients"] * GIB == 4 * SMALL.adapters
    assert found["moments"] * GIB == 8 * SMALL.adapters


@pytest.mark.parametrize("tied", [False, True])
def test_lora_holds_what_the_formula_says(tied):
    """Counted on models that have adapters: their number exactly, all bytes within 2%."""
    configs = (
        GPTNeoXConfig(vocab_size=512, hidden_size=64, num_hidden_layers=3, intermediate_size=256,
                      num_attention_heads=4, tie_word_embeddings=tied),
        LlamaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=3, intermediate_size=128,
                    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied),
    )  # fmt: skip
    for config in configs:
        model = AutoModelForCausalLM.from_config(config)
        shape = Shape.of("any", model)
        lora.attach(model, footprint.LORA_RANK, 0, "bfloat16")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == shape.adapters
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        said = footprint.memory(Preset(shape, SMALL, 3, 5), lora=True)["weights"] * GIB
        assert held + 4 * trained == pytest.approx(said, rel=0.02)


def test_checkpointing_keeps_the_layers_inputs():
    """Of four layers of width 128; and what stands before and after the layers."""
    model, _ = load_policy(TINY / "policy")
    kept = footprint.stored(Network(model, checkpointing=True)) / 4
    assert 4 * 128 <= kept <= (4 + 3) * 128


@pytest.mark.parametrize("name", PRESETS)
def test_each_way_takes_less(name):
    totals = [footprint.memory(PRESETS[name], **how)["total"] for how in footprint.WAYS.values()]
    assert totals == sorted(totals, reverse=True)


@given(st.integers(1, 4096), st.integers(1, 512), st.sampled_from(sorted(PRESETS)))
def test_more_tokens_at_once_take_no_less(micro_batch, response, name):
    preset = replace(PRESETS[name], response=response)
    less = footprint.memory(preset, micro_batch=micro_batch)["total"]
    assert less <= footprint.memory(preset, micro_batch=2 * micro_batch)["total"]
    more = replace(preset, response=response + 1)
    assert less <= footprint.memory(more, micro_batch=micro_batch)["total"]


def test_a_t4_needs_lora_for_the_papers_policy():
    assert footprint.way(PRESETS["pythia"], footprint.T4) == "with checkpointing and LoRA"
    assert footprint.way(PRESETS["pythia"], footprint.H100) == "as the loop does"
    assert footprint.way(PRESETS["pythia"], Machine("none", 1, 1e12, 1e9)) == "not at all"


def test_two_gib_are_left_for_the_driver():
    card = Machine("card", 16, 1, 1)
    assert footprint.fits(14.0, card) and not footprint.fits(14.01, card)


def test_machines_have_a_dtype_that_runs_know():
    assert {machine.dtype for machine in MACHINES} <= set(DTYPES)
    assert [Machine("any", 1, 1, 1, dtype).size for dtype in DTYPES] == [4, 2, 2]


def test_seconds_by_hand():
    """A machine whose only limit is arithmetic."""
    machine = Machine("arithmetic", 1, 1e6 / footprint.COMPUTE, 1e18)
    preset = Preset(replace(SMALL, layers=0), SMALL, 3, 5)
    found = footprint.seconds(preset, machine)
    assert found["training"] == pytest.approx(6 * 1000 * 64 * 8 / 1e6)
    assert found["scoring"] == pytest.approx(2 * 2000 * 64 * 8 / 1e6)
    assert found["sampling"] == pytest.approx(2 * 1000 * 64 * 8 / 1e6)
    again = footprint.seconds(preset, machine, checkpointing=True)
    assert again["training"] == pytest.approx(found["training"] * 4 / 3)


def test_training_with_lora_takes_a_third_less():
    """No gradient of the weights: four of the six products of a token."""
    machine = Machine("arithmetic", 1, 1e6 / footprint.COMPUTE, 1e18)
    preset = Preset(SMALL, SMALL, 3, 5)
    plain, lora = (footprint.seconds(preset, machine, lora=on)["training"] for on in (False, True))
    assert lora == pytest.approx(plain * 4 / 6)


def test_decoding_waits_for_the_slowest_limit():
    preset = Preset(SMALL, SMALL, 3, 5)
    slow = Machine("reads slowly", 1, 1e15, 1e3 / footprint.BANDWIDTH)
    read = 2 * (1000 + 64 * 5.5 * SMALL.cache)
    assert footprint.seconds(preset, slow)["sampling"] == pytest.approx(5 * read / 1e3, rel=1e-3)
    fast = Machine("launches", 1, 1e18, 1e18, launch=0.1)
    assert footprint.seconds(preset, fast)["sampling"] == pytest.approx(5 * 2 * 0.1)


def test_tables_have_every_preset_and_machine():
    assert list(footprint.memory_table().columns[1:]) == list(PRESETS)
    assert len(footprint.time_table()) == len(PRESETS) * len(MACHINES)
    assert footprint.fit_table()["preset"].tolist() == list(PRESETS)


def test_shares_of_sampling_are_those_of_the_table():
    table = footprint.time_table({"pythia": PRESETS["pythia"]})
    phases = table[["sampling, s", "scoring, s", "training, s"]]
    shares = phases["sampling, s"] / phases.sum(axis=1)
    found = footprint.sampling_share(PRESETS["pythia"])
    assert found == pytest.approx((shares.min(), shares.max()))


def test_estimates_are_written_with_two_digits():
    table = pd.DataFrame({"a": [123.4, 1.234, 0.0234, 0.0002, 0.0], "b": ["x"] * 5})
    assert footprint.written(table)["a"].tolist() == ["123", "1.2", "0.023", "< 0.001", "0"]


def smol(layers):
    return LlamaConfig(
        vocab_size=64, hidden_size=144, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=384,
    )  # fmt: skip


def neox(layers):
    return GPTNeoXConfig(vocab_size=64, hidden_size=128, num_hidden_layers=layers,
                         num_attention_heads=2, intermediate_size=512)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [smol, neox])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_pytorch_keeps_about_what_the_formula_says(config, dtype, checkpointing):
    """What another layer keeps of another token: weights that autocast casts do not count, nor what
    stands before the layers and after them."""
    size, kept = 4 if dtype == "float32" else 2, []
    for layers in (2, 4):
        model = AutoModelForCausalLM.from_config(config(layers))
        network = Network(model, dtype=dtype, checkpointing=checkpointing)
        few, many = (n * footprint.stored(network, samples=n, length=48) for n in (2, 6))
        kept.append((many - few) / 4)
    shape = Shape.of("any", model)
    said = [replace(shape, layers=n).activations(size, checkpointing) for n in (2, 4)]
    assert kept[1] - kept[0] == pytest.approx(said[1] - said[0], rel=0.06)


def test_a_run_is_measured_beside_its_estimate(tmp_path):
    folder = prepared_folder(tmp_path)
    took, tokens = footprint.measured(str(folder), updates=2, max_tokens=12)
    assert set(took) == {"sampling", "scoring", "training"} and min(took.values()) > 0
    assert 0 <= tokens <= 12
    table = footprint.beside(PRESETS["tiny"], footprint.this_machine(), took)
    assert table["phase"].tolist() == [*took, "together"]
    assert table["measured, s"].iloc[-1] == pytest.approx(sum(took.values()))
