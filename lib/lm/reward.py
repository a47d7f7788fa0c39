"""Reward models: trained on pairs by TRL (Bradley-Terry), and scoring completions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lib.lm import parallel
from lib.lm.best import on_one_gpu, restore_best
from lib.lm.network import halve, products
from lib.lm.pairs import Pairs
from lib.lm.policy import Rows, has_dtype, token_budget
from lib.rollouts import Rollout


class RewardModel:
    """Scores completions. A score depends on its own tokens only: not on batch, side or neighbours.

    Args:
        model: a transformers sequence classifier of a causal architecture with one label; frozen.
        dtype: of its matrix products and matrices, those of the score's own head left out.
    Raises: ValueError if the model is none.
    """

    def __init__(self, model: PreTrainedModel, budget: int | None = None, dtype: str = "float32"):
        if getattr(model, "num_labels", None) != 1 or not hasattr(model, "score"):
            raise ValueError(
                f"{type(model).__name__} is no reward model: it must be a causal architecture's "
                "ForSequenceClassification with one label (num_labels=1)"
            )
        self.model, self.budget = model.eval(), budget or token_budget(model.device)
        self.dtype = dtype
        halve(model.requires_grad_(False).base_model, dtype)

    @torch.no_grad()
    def score(self, batch: Rollout) -> Tensor:
        """(P, C) scores. The head reads the state of a completion's last token.

        transformers looks for that token by comparing ids with the padding id, which goes wrong
        where padding is EOS; here the mask says where it is.
        """
        rows = Rows.of_rollout(batch)
        out = torch.zeros(len(rows.mask), device=self.model.device)
        for index in rows.buckets(self.budget):
            part = rows.pick(index)
            tokens, mask = part.whole()
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            with products(self.model.device, self.dtype):
                hidden = self.model.base_model(
                    input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
                ).last_hidden_state
            last = part.prompts.shape[1] + part.mask.sum(-1) - 1
            state = hidden[torch.arange(len(index), device=hidden.device), last]
            state = state.to(self.model.score.weight.dtype)
            out[rows.there(index)] = self.model.score(state).float()[:, 0]
        return parallel.total(out).view(batch.rewards.shape)


@dataclass(frozen=True)
class RewardTraining:
    """How a reward model is trained: one rate, constant; the epoch with the lowest validation loss.

    Args: batch: pairs of one update. centre: weight of the squared sum of a pair's scores, which
        keeps scores near 0 (Eisenstein et al. 2023); 0 leaves their level free.
    """

    learning_rate: float = 1e-3
    epochs: int = 6
    batch: int = 64
    seed: int = 0
    centre: float = 0.01


def tiny_reward_model(vocabulary: int, positions: int, pad: int, seed: int = 0) -> PreTrainedModel:
    """An untrained Pythia-like reward model of 2 layers and width 64, smaller than the policy."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=positions, num_labels=1, pad_token_id=pad,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPTNeoXForSequenceClassification(config)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: dict[str, Pairs],
    preferred: dict[str, np.ndarray],
    folder: Path,
    how: RewardTraining | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Trains `model` on the untied pairs of "train" by TRL's RewardTrainer, on token ids.

    Token ids, since text would be given an EOS that a capped response does not have.
    Args: preferred: (P, 2), 1 for the preferred response, by split.
    Returns: losses and accuracies by epoch, and the epoch that was kept. Saves model and tokenizer
        to `folder`.
    Raises: RuntimeError if no validation loss is finite.
    """
    from trl import RewardConfig, RewardTrainer  # for training alone: runs need only scores

    how = how or RewardTraining()
    data = {split: _ids(pairs[split], preferred[split]) for split in ("train", "validation")}
    arguments = RewardConfig(
        str(folder / "trainer"), learning_rate=how.learning_rate, num_train_epochs=how.epochs,
        per_device_train_batch_size=how.batch, per_device_eval_batch_size=how.batch,
        lr_scheduler_type="constant", weight_decay=0.0, seed=how.seed, report_to=[],
        center_rewards_coefficient=how.centre or None, max_length=None,
        bf16=device != "cpu" and has_dtype(torch.device(device), "bfloat16"),
        use_cpu=device == "cpu", gradient_checkpointing=device != "cpu", eval_strategy="epoch",
        save_strategy="epoch", save_total_limit=1, load_best_model_at_end=False,
        metric_for_best_model="eval_loss", greater_is_better=False, logging_strategy="epoch",
        save_only_model=True, disable_tqdm=True,
    )  # fmt: skip
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = _pad_that_ends_nothing(tokenizer, pairs["train"].eos)
    trainer = RewardTrainer(
        model, args=on_one_gpu(arguments), processing_class=padding, train_dataset=data["train"],
        eval_dataset=data["validation"],
    )  # fmt: skip
    trainer.train()
    restore_best(trainer.model, trainer, how.learning_rate)
    trainer.model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    epochs = [
        {"epoch": row["epoch"], "loss": row["eval_loss"], "accuracy": row["eval_accuracy"]}
        for row in trainer.state.log_history if "eval_loss" in row
    ]  # fmt: skip
    best = min(epochs, key=lambda row: row["loss"])
    seconds = trainer.state.log_history[-1].get("train_runtime")
    return {"how": asdict(how), "pairs": {k: len(v) for k, v in data.items()}, "epochs": epochs,
            "kept": best, "seconds": seconds}  # fmt: skip


def _ids(pairs: Pairs, preferred: np.ndarray) -> Any:
    """Prompt and response together, chosen and rejected, as a data set; ties are left out."""
    from datasets import Dataset

    rows = []
    for i in np.flatnonzero(preferred.any(-1)):
        both = (pairs.first[i], pairs.second[i])
        better = int(preferred[i].argmax())
        rows.append({"chosen_ids": pairs.prompts[i] + both[better],
                     "rejected_ids": pairs.prompts[i] + both[1 - better]})  # fmt: skip
    return Dataset.from_list(rows)


def _pad_that_ends_nothing(tokenizer: PreTrainedTokenizerBase, eos: Sequence[int]) -> str:
    """transformers looks for a text's last token from the right, past all that equals the padding:
    a padding token that is one of the EOS would hide every such EOS."""
    ends = {tokenizer.eos_token_id, *eos}
    if tokenizer.pad_token_id not in (None, *ends):
        return tokenizer.pad_token
    return next(t for t, i in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1])
                if i not in ends)  # fmt: skip
