"""Supervised fine-tuning on token ids by TRL's SFTTrainer: where the length problems start."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib.allowed import check_fields
from lib.lm.best import on_one_gpu, restore_best
from lib.lm.models import positions
from lib.lm.policy import has_dtype

SCHEDULES = ("constant", "linear", "cosine")
DEVICES = ("cpu", "cuda")
IGNORED = -100  # the label of a token that carries no loss


class Example(NamedTuple):
    """Token ids of a prompt, which carries no loss, and of its response with the EOS, which does.

    A response that was cut at the cap has no EOS: nothing may teach the policy to stop there.
    """

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class SFTRun:
    """How a policy is fine-tuned on given responses; used by the problems chapter.

    Args:
        learning_rate: peak rate of AdamW. schedule: how it changes, one of `SCHEDULES`.
        batch: pairs an update. epochs: passes over the data at most.
        patience: epochs without a lower validation loss after which training stops.
        weight_decay: of AdamW. warmup_steps: updates until the peak rate.
        dropout: while training; the policy that results has none.
        seed: of the order of the pairs and of dropout. device: "cpu" or "cuda", where products are
            in bfloat16 if the GPU has it.
    Raises: ValueError that names the value and the allowed ones.
    """

    learning_rate: float = 1e-3
    schedule: str = "constant"
    batch: int = 64
    epochs: int = 20
    patience: int = 2
    weight_decay: float = 0.1
    warmup_steps: int = 20
    dropout: float = 0.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        ranges = {"learning_rate": (0, 1), "batch": (1, 4096), "epochs": (1, 1000),
                  "patience": (1, 1000), "weight_decay": (0, 1), "warmup_steps": (0, 10_000),
                  "dropout": (0, 0.9), "seed": (0, 2**31 - 1)}  # fmt: skip
        check_fields(self, {"schedule": SCHEDULES, "device": DEVICES}, ranges)


@dataclass(frozen=True)
class Trained:
    """What `sft` did: a row of `losses` for each epoch, the update kept, and the seconds.

    `losses` hold epoch, update, train and validation, in nats a response token. Epoch 0 is
    `response_loss` before training; later rows, by which the epoch is chosen, are TRL's means of
    batch means.
    """

    losses: tuple[dict[str, float], ...]
    chosen_update: int
    seconds: float


def sft(model, tokenizer, train: Sequence[Example], validation: Sequence[Example],
        run: SFTRun) -> Trained:  # fmt: skip
    """Fine-tunes `model` in place on train's responses and leaves it at its lowest validation loss.

    -1/n sum_t log pi(y_t | x, y_<t) over the n response tokens of a batch, EOS among them (paper
    section 3.1: the reference policy of the language-model problems); nats a token. Nothing is
    truncated.
    Raises: ValueError for an example that the model cannot take; RuntimeError for a validation
    loss that is not finite.
    """
    check(model, train)
    check(model, validation)
    start, before = time.perf_counter(), response_loss(model, validation, run.batch)
    set_dropout(model, run.dropout)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, tokenizer, train, validation, run, folder)
        trainer.train()
        restore_best(model, trainer, run.learning_rate)
    set_dropout(model, 0.0)
    model.eval()
    rows = ({"epoch": 0, "update": 0, "validation": before}, *_losses(trainer.state.log_history))
    return Trained(rows, trainer.state.best_global_step, time.perf_counter() - start)


def check(model, examples: Sequence[Example]) -> None:
    """ValueError, naming the example, for an empty or too long one or ids without an embedding."""
    rows = model.get_input_embeddings().num_embeddings
    longest = positions(model.config)
    if not examples:
        raise ValueError("no examples: supervised fine-tuning needs training and validation pairs")
    for number, (prompt, response) in enumerate(examples):
        ids = [*prompt, *response]
        if not prompt or not response:
            raise ValueError(f"example {number}: empty {'response' if prompt else 'prompt'}")
        if len(ids) > longest:
            raise ValueError(f"example {number}: {len(ids)} tokens, the model takes {longest}")
        if not 0 <= min(ids) <= max(ids) < rows:
            raise ValueError(f"example {number}: token ids from {min(ids)} to {max(ids)}, "
                             f"the model has 0 to {rows - 1}")  # fmt: skip


def columns(example: Example) -> dict[str, list[int]]:
    """The columns that SFTTrainer reads: the mask is 1 exactly on the response and its EOS."""
    prompt, response = example
    mask = [0] * len(prompt) + [1] * len(response)
    return {"input_ids": [*prompt, *response], "completion_mask": mask}


@torch.no_grad()
def response_loss(model, examples: Sequence[Example], batch: int = 64) -> float:
    """-mean log pi(y_t | x, y_<t) over all response tokens of all examples; nats a token.

    Unlike a mean of batch means it does not depend on the size of a batch.
    """
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    ordered = sorted(examples, key=lambda e: len(e.prompt) + len(e.response))
    for start in range(0, len(ordered), batch):
        ids, mask, labels = padded(ordered[start : start + batch])
        device = model.get_input_embeddings().weight.device
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(device),
            ignore_index=IGNORED, reduction="sum")  # fmt: skip
        total, count = total + loss.item(), count + int((labels[:, 1:] != IGNORED).sum())
    model.train(was_training)
    return total / count


def padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels, (examples, longest), padded on the right.

    The mask comes from the lengths: an EOS that is also the padding token keeps its label.
    """
    shape = (len(examples), max(len(e.prompt) + len(e.response) for e in examples))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, (prompt, response) in enumerate(examples):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(response)
    return ids, mask, labels


def set_dropout(model, rate: float) -> None:
    """The same dropout everywhere in a model, in its modules and its configuration."""
    held = ("dropout", "hidden_dropout", "attention_dropout")  # by layers that apply it themselves
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        for name in held:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)
    for name in held:
        if hasattr(model.config, name):
            setattr(model.config, name, rate)


def _trainer(model, tokenizer, train, validation, run: SFTRun, folder: str):
    from datasets import Dataset  # slow to import, and part of the `llm` extra
    from transformers import EarlyStoppingCallback, ProgressCallback
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
    from trl import SFTTrainer

    class Stopping(EarlyStoppingCallback):
        """Its own start warns that the best weights are not loaded: `restore_best` does that."""

        def on_train_begin(self, *_, **__) -> None:
            pass

    class Progress(ProgressCallback):
        """A bar, and a line for a validation loss in place of all that is logged."""

        def on_log(self, args, state, control, logs=None, **_) -> None:
            if self.training_bar is not None and "eval_loss" in logs:
                self.training_bar.write(f"epoch {round(logs['epoch'])}: validation loss "
                                        f"{logs['eval_loss']:.3f}")  # fmt: skip

    trainer = SFTTrainer(
        model=model,
        args=on_one_gpu(_arguments(run, folder)),
        train_dataset=Dataset.from_list([columns(example) for example in train]),
        eval_dataset=Dataset.from_list([columns(example) for example in validation]),
        processing_class=tokenizer,
        callbacks=[Stopping(run.patience)],
    )
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.add_callback(Progress())
    return trainer


def _arguments(run: SFTRun, folder: str):
    from trl import SFTConfig

    return SFTConfig(
        output_dir=folder,
        learning_rate=run.learning_rate,
        # transformers' plain "constant" leaves the warm-up out
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(run.schedule, run.schedule),
        warmup_steps=run.warmup_steps,
        weight_decay=run.weight_decay,
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=run.batch,
        num_train_epochs=run.epochs,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # a loss that is not a number must show as one
        load_best_model_at_end=False,  # `restore_best` does, and completely
        metric_for_best_model="eval_loss",
        save_total_limit=1,
        save_only_model=True,
        completion_only_loss=True,
        max_length=None,
        seed=run.seed,
        use_cpu=run.device == "cpu",
        bf16=run.device == "cuda" and has_dtype(torch.device("cuda"), "bfloat16"),
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        report_to="none",
    )


def _losses(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """One row for each epoch out of the trainer's log, which has training and validation apart."""
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        row = rows.setdefault(round(entry["epoch"]), {})
        row |= {"epoch": round(entry["epoch"]), "update": entry["step"]}
        for name, key in {"train": "loss", "validation": "eval_loss"}.items():
            if key in entry:
                row[name] = entry[key]
    return [row for row in rows.values() if "validation" in row]


def settings(values: dict[str, Any]) -> SFTRun:
    """An `SFTRun` from a mapping; ValueError that lists the settings for an unknown one."""
    known = [field.name for field in fields(SFTRun)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown settings {unknown}; there are {known}")
    return SFTRun(**values)
