"""Every objective against numbers by hand, an independent reference, and its identities."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib import losses
from lib.methods import METHODS
from lib.rollouts import Rollout, sequence_logp, token_logp


def leaf(*values):
    return torch.tensor(values).requires_grad_()


def value_and_gradient(item, *leaves):
    return item.detach(), torch.autograd.grad(item.sum(), leaves)


def test_best_of_n_is_minus_log_of_the_selected():
    logp = leaf([-1.0, -2.0, -3.0])
    item, (gradient,) = value_and_gradient(
        losses.best_of_n(logp, torch.tensor([[False, True, False]])), logp
    )
    assert item.tolist() == [[0.0, 2.0, 0.0]]
    assert gradient.tolist() == [[0.0, -1.0, 0.0]]


def test_negative_gradient_pushes_down_only_above_the_threshold():
    # log 0.01 = -4.6 below the best's -1: -2 is pushed, -5.5 just so, -7 is not
    logp = leaf([-1.0, -2.0, -5.5, -7.0])
    selected = torch.tensor([[True, False, False, False]])
    item, (gradient,) = value_and_gradient(
        losses.best_of_n_negative(logp, selected, beta=0.5, threshold=0.01), logp
    )
    assert item.tolist() == [[1.0, -1.0, -2.75, 0.0]]
    assert gradient.tolist() == [[-1.0, 0.5, 0.5, 0.0]]


def test_negative_gradient_threshold_is_a_share_of_the_best():
    """At threshold 0 everything is pushed down, at 1 only what is likelier than the best."""
    logp = torch.tensor([[-3.0, -2.0, -40.0]])
    selected = torch.tensor([[True, False, False]])
    everything = losses.best_of_n_negative(logp, selected, 1.0, 0.0)
    likelier = losses.best_of_n_negative(logp, selected, 1.0, 1.0)
    assert everything.tolist() == [[3.0, -2.0, -40.0]]
    assert likelier.tolist() == [[3.0, -2.0, 0.0]]


def test_rwr_and_reinforce_are_weighted_log_likelihoods():
    logp = leaf([-1.0, -2.0])
    item, (gradient,) = value_and_gradient(losses.rwr(logp, torch.tensor([[0.5, 3.0]])), logp)
    assert item.tolist() == [[0.5, 6.0]]
    assert gradient.tolist() == [[-0.5, -3.0]]
    item, (gradient,) = value_and_gradient(
        losses.reinforce(logp, torch.tensor([[2.0, -1.0]])), logp
    )
    assert item.tolist() == [[2.0, -2.0]]
    assert gradient.tolist() == [[-2.0, 1.0]]  # descent raises the better, lowers the worse


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.1, 1.0, -1.1, -1.1),
        (1.5, 1.0, -1.2, 0.0),  # enough: clipped
        (0.5, 1.0, -0.5, -0.5),
        (1.5, -1.0, 1.5, 1.5),  # the pessimistic bound: not clipped
        (0.5, -1.0, 0.8, 0.0),
    ],
)
def test_ppo_by_hand(ratio, advantage, expected, slope):
    logp = torch.tensor([[log(ratio) - 4]], dtype=torch.float64).requires_grad_()
    item, (gradient,) = value_and_gradient(
        losses.ppo(logp, torch.full_like(logp, -4.0), torch.tensor([[advantage]]), 0.2), logp
    )
    assert item.item() == pytest.approx(expected, rel=1e-6)
    assert gradient.item() == pytest.approx(slope, rel=1e-6)


def test_ppo_is_clipped_where_the_ratio_overflows():
    logp = leaf([0.0, 0.0])  # float32: exp(100) is inf
    item, (gradient,) = value_and_gradient(
        losses.ppo(logp, torch.full_like(logp, -100.0), torch.tensor([[1.0, 0.0]]), 0.2), logp
    )
    torch.testing.assert_close(item, torch.tensor([[-1.2, 0.0]]))
    assert gradient.tolist() == [[0.0, 0.0]]


def test_ppo_equals_a_loop_in_value_and_gradient():
    generator = torch.Generator().manual_seed(0)
    old, advantage = (
        torch.randn(2, 3, 4, generator=generator),
        torch.randn(2, 3, 4, generator=generator),
    )
    logp = (old + 0.4 * torch.randn(2, 3, 4, generator=generator)).requires_grad_()
    expected, slopes = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    for i in range(2):
        for j in range(3):
            for k in range(4):
                ratio = torch.exp(logp[i, j, k] - old[i, j, k]).item()
                a = advantage[i, j, k].item()
                outside = ratio > 1.2 if a > 0 else ratio < 0.8
                bound = 1.2 if a > 0 else 0.8
                expected[i, j, k] = -(bound if outside else ratio) * a
                slopes[i, j, k] = 0.0 if outside else -ratio * a
    item, (gradient,) = value_and_gradient(losses.ppo(logp, old, advantage, 0.2), logp)
    assert (slopes == 0).any() and (slopes != 0).any()
    torch.testing.assert_close(item, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, slopes, rtol=1e-5, atol=1e-6)


def test_pairs_by_hand():
    logp, ref = leaf([-1.0, -3.0]), torch.tensor([[-2.0, -2.0]])  # margin 2
    prefer = torch.tensor([[[False, True], [False, False]]])
    dpo, (gradient,) = value_and_gradient(losses.dpo(logp, ref, prefer, 0.5), logp)
    assert dpo[0, 0, 1].item() == pytest.approx(0.31326168)  # log(1 + e^-1)
    assert dpo.count_nonzero() == 1
    slope = -0.5 * 0.26894142  # -beta sigmoid(-beta h)
    assert gradient[0].tolist() == pytest.approx([slope, -slope])
    ipo, (gradient,) = value_and_gradient(losses.ipo(logp, ref, prefer, 0.1), logp)
    assert ipo[0, 0, 1].item() == pytest.approx(9.0)  # (2 - 5)^2
    assert ipo.count_nonzero() == 1
    assert gradient[0].tolist() == pytest.approx([-6.0, 6.0])


def test_pairs_of_tokens_by_hand():
    """Two tokens against one: the one place that both have counts, with margin 2 - 0.5."""
    logp, ref = leaf([[-1.0, -5.0], [-2.5, -9.0]]), torch.tensor([[[-3.0, -1.0], [-3.0, 0.0]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    prefer = torch.tensor([[[False, True], [False, False]]])
    dpo, (gradient,) = value_and_gradient(losses.dpo_token(logp, ref, mask, prefer, 2.0), logp)
    assert dpo[0, 0, 1].item() == pytest.approx(0.04858735)  # log(1 + e^-3)
    assert dpo.count_nonzero() == 1
    slope = -2.0 * 0.04742587  # -beta sigmoid(-beta h)
    expected = torch.tensor([[slope, 0.0], [-slope, 0.0]])
    torch.testing.assert_close(gradient[0], expected)
    ipo, (gradient,) = value_and_gradient(losses.ipo_token(logp, ref, mask, prefer, 0.5), logp)
    assert ipo[0, 0, 1].item() == pytest.approx(0.0625)  # (0.5 * 1.5 - 1)^2
    torch.testing.assert_close(gradient[0], torch.tensor([[-0.25, 0.0], [0.25, 0.0]]))


def test_pairs_of_tokens_average_over_the_places_that_both_have():
    generator = torch.Generator().manual_seed(1)
    logp, ref = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([[5, 3, 1], [2, 4, 4]])[..., None]
    prefer = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.8]])
    prefer = prefer[..., :, None] > prefer[..., None, :]
    forms = (
        (losses.dpo_token, 0.3, lambda h: -torch.nn.functional.logsigmoid(0.3 * h)),
        (losses.ipo_token, 0.2, lambda h: (0.2 * h - 2.5) ** 2),
    )
    for loss, weight, form in forms:
        got = loss(logp, ref, mask, prefer, weight)
        for group, first, second in prefer.nonzero().tolist():
            shared = int(min(mask[group, first].sum(), mask[group, second].sum()))
            own = (logp - ref)[group, :, :shared]
            expected = form(own[first] - own[second]).mean()
            torch.testing.assert_close(got[group, first, second], expected)
        assert got[~prefer].count_nonzero() == 0
        assert loss(logp, logp, mask, prefer, weight)[prefer].tolist() == pytest.approx(
            [form(torch.zeros(())).item()] * int(prefer.sum()))  # fmt: skip


def test_pair_margin_has_a_row_for_each_first_completion():
    margin = losses.pair_margin(torch.tensor([-1.0, -4.0]), torch.tensor([-2.0, -3.0]))
    assert margin.tolist() == [[0.0, 2.0], [-2.0, 0.0]]


@given(st.floats(0.01, 10.0), st.lists(st.floats(-90, 0), min_size=3, max_size=3))
def test_identities_at_the_reference(weight, values):
    logp = torch.tensor([values])
    prefer = torch.ones(3, 3, dtype=torch.bool).triu(1)[None]
    assert losses.dpo(logp, logp, prefer, weight)[prefer].tolist() == pytest.approx([log(2)] * 3)
    expected = 1 / (4 * weight**2)
    assert losses.ipo(logp, logp, prefer, weight)[prefer].tolist() == pytest.approx(
        [expected] * 3, rel=1e-5
    )


@pytest.mark.parametrize("name", ["dpo", "ipo", "dpo_offline", "ipo_offline"])
def test_ties_carry_no_loss_and_all_tied_is_zero(name):
    """No untied pair: loss and gradient are 0, not 0 / 0."""
    method = METHODS[name]
    batch = rollout(rewards=torch.full((1, 2, 3), 0.7))
    batch = batch.labelled(method.prepare(batch, method.hyper))
    logp = (batch.logp + 1.0).requires_grad_()
    item, metrics = method.loss(batch, logp, method.hyper)
    loss = item.flatten(1).sum(-1) / method.items(batch)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.tolist() == [0.0]
    assert gradient.count_nonzero() == 0
    assert all(value.isfinite().all() for value in metrics.values())


def rollout(rewards, length=4, seed=0):
    """Random log-probabilities for given rewards (R, P, C)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*rewards.shape, length)
    logp = -3 * torch.rand(shape, generator=generator)
    ref = -3 * torch.rand(shape, generator=generator)
    return Rollout(
        prompts=torch.zeros(rewards.shape[:2], dtype=torch.long),
        completions=torch.zeros(shape, dtype=torch.long),
        mask=torch.ones(shape, dtype=torch.bool),
        logp=logp, ref=ref, rewards=rewards, scale=torch.ones(len(rewards)), lead=1,
    )  # fmt: skip


# The peer: TRL's DPOTrainer, on token ids and a randomly initialised GPT-NeoX

EXAMPLES = [  # prompt, chosen, rejected: of unequal length, so that padding is at work
    ([1, 2, 3], [4, 5, 6, 7], [8, 9]),
    ([10], [11, 12], [13, 14, 15, 16, 17]),
    ([18, 19], [20], [21, 22, 23]),
]


def tiny_model(seed):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, initializer_range=0.5,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def peer(loss_type, weight, folder):
    """A DPOTrainer whose data set is token ids, and one batch of its own collator."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class OnIds(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    words = Tokenizer(models.WordLevel({str(i): i for i in range(32)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0")
    columns = zip(*EXAMPLES, strict=True)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    arguments = DPOConfig(
        str(folder), loss_type=[loss_type], beta=weight, bf16=False, use_cpu=True, report_to=[],
        gradient_checkpointing=False, per_device_train_batch_size=3,
    )  # fmt: skip
    trainer = OnIds(
        tiny_model(0), ref_model=tiny_model(1), args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_dict(dict(zip(names, columns, strict=True))),
    )  # fmt: skip
    return trainer, next(iter(trainer.get_train_dataloader()))


def ours(model, reference, batch, loss, weight, average):
    """Mean of `loss` over the pairs of a batch of TRL's collator (chosen first, then rejected)."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()

    def pairs(network):
        logits = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total = sequence_logp(token_logp(logits, ids), mask)
        total = total / mask.sum(-1) if average else total
        return torch.stack(total.chunk(2), -1)  # (pairs as prompts, [chosen, rejected])

    with torch.no_grad():
        ref = pairs(reference)
    prefer = torch.tensor([[False, True], [False, False]])
    return loss(pairs(model), ref, prefer, weight).sum() / len(ref)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("loss_type", "loss", "weight", "average"),
    [
        ("sigmoid", losses.dpo, 0.1, False),
        ("sigmoid", losses.dpo, 0.7, False),
        ("ipo", losses.ipo, 0.1, True),  # TRL's IPO is over log-probabilities per token
    ],
)
def test_equals_dpo_trainer_in_value_and_gradient(loss_type, loss, weight, average, tmp_path):
    trainer, batch = peer(loss_type, weight, tmp_path)
    expected = trainer.compute_loss(trainer.model, dict(batch))
    expected.backward()
    theirs = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    model = tiny_model(0)
    mine = ours(model, tiny_model(1), batch, loss, weight, average)
    mine.backward()
    assert abs(expected.item() - log(2)) > 1e-2  # away from the identity
    assert mine.item() == pytest.approx(expected.item(), rel=1e-5)
    assert theirs
    for name, parameter in model.named_parameters():
        off = (parameter.grad - theirs[name]).norm() / theirs[name].norm()
        assert off < 1e-5, name


def test_value_loss_by_hand():
    old, returns = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 1.0, -2.0])
    values = torch.tensor([2.0, 1.0, 0.9])  # the first has left the interval of 0.2 round the old
    found = losses.value(values, old, returns, 0.2)
    assert found.tolist() == pytest.approx([1.8**2 / 2, 0.0, 2.9**2 / 2])


@pytest.mark.parametrize("loss", [losses.dpo, losses.ipo])
def test_a_number_as_hyperparameter_is_taken_on_any_device(loss):
    """The meta device refuses tensors of another device as a GPU does."""
    logp, prefer = torch.zeros(4, 2, device="meta"), torch.ones(4, 2, 2, device="meta").bool()
    assert loss(logp, logp, prefer, 0.1).shape == (4, 2, 2)
