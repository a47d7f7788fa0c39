"""Offline DPO and IPO, update by update, against TRL's DPOTrainer on the same pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.lm.batches import padded
from lib.lm.network import Network
from lib.lm.policy import CausalPolicy
from lib.methods import METHODS
from lib.rollouts import Rollout
from tests.tiny_lm import save_tiny_policy

EOS, PAD, PAIRS, UPDATES, LENGTH = 256, 257, 4, 6, 5
LOGGED = "loss", "grad_norm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), initializer_range=0.3)


def examples(equal):
    """`UPDATES * PAIRS` pairs of token ids; of one length where IPO is to be compared."""
    generator = torch.Generator().manual_seed(0)

    def ids(low, high):
        n = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(0, 250, (n,), generator=generator).tolist()

    sizes = (LENGTH - 1, LENGTH - 1) if equal else (1, 9)
    return [
        {"prompt_ids": ids(1, 7), "chosen_ids": [*ids(*sizes), EOS],
         "rejected_ids": [*ids(*sizes), EOS]}
        for _ in range(UPDATES * PAIRS)
    ]  # fmt: skip


def trained_by_trl(folder, rows, loss_type, beta, output):
    """Parameters after each update of TRL's trainer, taking the pairs in their order, and
    the losses and gradient norms that it logs."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    seen = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append([p.detach().clone() for p in model.parameters()])

    arguments = DPOConfig(
        str(output), loss_type=[loss_type], beta=beta, learning_rate=1e-3, weight_decay=0.0,
        lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=1e6, bf16=False,
        use_cpu=True, report_to=[], gradient_checkpointing=False, save_strategy="no",
        per_device_train_batch_size=PAIRS, num_train_epochs=1, disable_tqdm=True,
        logging_steps=1,
    )  # fmt: skip
    load = AutoModelForCausalLM.from_pretrained
    trainer = InOrder(
        load(folder), ref_model=load(folder), args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[Record()],
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return seen, [[entry[name] for name in LOGGED] for entry in logs]


def trained_here(folder, rows, method, hyper):
    policy = CausalPolicy(
        Network(AutoModelForCausalLM.from_pretrained(folder)), (EOS,), PAD, 1e-3, clip_norm=1e6
    )
    prompts, prompt_mask = padded([row["prompt_ids"] for row in rows], PAD, "left")
    both = [ids for row in rows for ids in (row["chosen_ids"], row["rejected_ids"])]
    ids, mask = padded(both, PAD)
    shape = (len(rows), 2, ids.shape[1])
    data = Rollout(
        prompts=prompts, prompt_mask=prompt_mask, completions=ids.view(shape),
        mask=mask.view(shape), logp=torch.zeros(shape), ref=None,
        rewards=torch.tensor([[1.0, 0.0]]).repeat(len(rows), 1), scale=torch.tensor(20.0),
    )  # fmt: skip
    reference = policy.score(data)
    data = Rollout(**{**vars(data), "logp": reference, "ref": reference})
    data = data.labelled(method.prepare(data, hyper))
    seen, logs = [], []
    for i in range(UPDATES):
        batch = data.narrow(i * PAIRS, PAIRS)
        _, metrics = policy.update(batch, method, hyper, method.items(batch))
        seen.append([(p.detach().clone(), p.grad.clone()) for p in policy.parameters])
        logs.append([metrics[name].item() for name in LOGGED])
    return seen, logs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_first_updates_equal_dpo_trainers(folder, loss, tmp_path):
    """TRL's IPO averages over tokens: at one length n its beta is our tau times n, and its loss
    ours by n squared."""
    rows = examples(equal=loss == "ipo")
    theirs, told = trained_by_trl(folder, rows, loss, 0.5 if loss == "ipo" else 0.1, tmp_path)
    name, hyper = ("ipo_offline", {"tau": 0.5 / LENGTH}) if loss == "ipo" else ("dpo_offline", {})
    ours, logs = trained_here(folder, rows, METHODS[name], METHODS[name].resolve(hyper))
    assert len(theirs) == len(ours) == len(told) == UPDATES
    scale = LENGTH**2 if loss == "ipo" else 1  # which the steps of Adam do not show
    np.testing.assert_allclose(np.divide(logs, scale), told, rtol=1e-5)
    start = list(AutoModelForCausalLM.from_pretrained(folder).parameters())
    floor = 1e-4 if loss == "ipo" else 1e-6  # our IPO gradient is 25 times theirs
    known = [torch.ones_like(p, dtype=torch.bool) for p in start]
    for a, b in zip(theirs, ours, strict=True):
        assert max((p - q).abs().max().item() for (p, _), q in zip(b, start, strict=True)) > 5e-4
        for i, (p, (q, gradient)) in enumerate(zip(a, b, strict=True)):
            # a gradient that is 0 but for rounding (the keys' biases) becomes a step of Adam's
            known[i] &= gradient.abs() > floor
            torch.testing.assert_close(p[known[i]], q[known[i]], atol=1e-5, rtol=1e-5)
    assert sum(k.sum().item() for k in known) > 0.3 * sum(k.numel() for k in known)
