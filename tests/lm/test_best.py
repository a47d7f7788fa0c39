"""Which epoch a reward model is left at; tests/lm/test_sft.py has the same of a policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trl
from transformers import MixtralConfig, MixtralForSequenceClassification

from lib.lm.models import load_reward_model
from lib.lm.pairs import Pairs
from lib.lm.reward import RewardTraining, tiny_reward_model, train
from tests.tiny_lm import SIZE, tiny_tokenizer

EOS, PAD = 256, 257
HOW = RewardTraining(learning_rate=3e-3, epochs=3, batch=8, centre=0.0)


def mixtral():
    """Its experts are stored under other names than they have in the model."""
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=SIZE, hidden_size=16, intermediate_size=16,
                           num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                           num_local_experts=2, max_position_embeddings=64, num_labels=1,
                           pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)  # fmt: skip
    return MixtralForSequenceClassification(config)


def contrary():
    """Validation pairs that contradict the training pairs: each epoch makes their loss higher."""
    rows = [[10 + i] for i in range(32)]
    pairs = Pairs(rows, [[3, 4, EOS]] * 32, [[5, 6, EOS]] * 32, (EOS,))
    labels = {"train": np.array([[1, 0]] * 32), "validation": np.array([[0, 1]] * 32)}
    return {split: pairs for split in labels}, labels


@pytest.mark.parametrize("made", [lambda: tiny_reward_model(SIZE, 64, PAD), mixtral],
                         ids=["tiny", "mixtral"])  # fmt: skip
def test_a_reward_model_is_left_at_its_lowest_validation_loss(tmp_path, made):
    pairs, preferred = contrary()
    record = train(made(), tiny_tokenizer(), pairs, preferred, tmp_path, HOW)
    losses = [row["loss"] for row in record["epochs"]]
    assert record["kept"]["loss"] == losses[0] < losses[-1] - 0.1
    model, _ = load_reward_model(tmp_path)
    rows = pairs["validation"]
    better, worse = (
        model(torch.tensor([p + r for p, r in zip(rows.prompts, side, strict=True)])).logits[:, 0]
        for side in (rows.second, rows.first)
    )
    loss = -torch.nn.functional.logsigmoid(better - worse).mean().item()
    assert loss == pytest.approx(losses[0], abs=1e-5)


def test_a_reward_model_without_a_finite_loss_is_an_error(tmp_path):
    pairs, preferred = contrary()
    model = tiny_reward_model(SIZE, 64, PAD)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.nan
    with pytest.raises(RuntimeError, match="no finite validation loss .*learning_rate 0.003"):
        train(model, tiny_tokenizer(), pairs, preferred, tmp_path, HOW)


class Counted(trl.RewardConfig):
    """As on a machine with two GPUs: transformers counts both, and TRL refuses more than one."""

    def __post_init__(self):
        super().__post_init__()
        assert self.n_gpu < 2  # sets what is replaced below
        self._n_gpu = 2


def test_a_training_takes_one_gpu_of_several_and_gives_the_forward_pass_back(tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "RewardConfig", Counted)
    pairs, preferred = contrary()
    model = tiny_reward_model(SIZE, 64, PAD)
    train(model, tiny_tokenizer(), pairs, preferred, tmp_path, HOW)
    assert not {"forward", "_original_forward"} & set(vars(model))
