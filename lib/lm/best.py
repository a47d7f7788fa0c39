"""A training by TRL: on one GPU, and it leaves the weights of its lowest validation loss."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel, TrainingArguments


def on_one_gpu(arguments: TrainingArguments) -> TrainingArguments:
    """The same arguments for one GPU at most: TRL refuses to train on several in one process, which
    is what transformers does wherever it sees them."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def restore_best(model: PreTrainedModel, trainer: Any, learning_rate: float) -> None:
    """Gives the trained `model` the weights of the epoch with the lowest validation loss, and the
    forward pass that it had: the trainer's multiplies in its own dtype.

    The trainer's own restoring (`load_best_model_at_end`) reads the file's names as they are and so
    misses weights that are stored under another name, like GPT-NeoX's output layer or Mixtral's
    experts: they would stay at the last epoch's.
    Raises: RuntimeError if no epoch had a finite loss; it names the learning rate.
    """
    best, checkpoint = trainer.state.best_metric, trainer.state.best_model_checkpoint
    if best is None or not math.isfinite(best) or checkpoint is None:
        raise RuntimeError(
            f"no finite validation loss (got {best}) at learning_rate {learning_rate}: lower it"
        )
    stored = type(model).from_pretrained(checkpoint, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(stored.state_dict())
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)
