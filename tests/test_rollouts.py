"""Where logits meet tokens, masks, and views that keep the groups of a prompt together."""

from __future__ import annotations

import pytest
import torch

from lib.rollouts import Rollout, sequence_logp, token_logp

# Distributions over 3 tokens at the 4 positions of a prompt token and 3 completion tokens
TABLE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5], [0.7, 0.2, 0.1]])
TOKENS = torch.tensor([2, 0, 1, 2])  # prompt, then the completion 0, 1, 2


def logits(rows=slice(None)):
    return TABLE[rows].log() + torch.tensor([[5.0], [-3.0], [0.0], [1.0]])[rows]  # any constant


def test_logits_at_t_score_token_t_plus_1():
    """The first completion token by the prompt's logits, the last by those of the one before."""
    got = token_logp(logits(), TOKENS).exp()
    assert got.tolist() == pytest.approx([0.5, 0.6, 0.5])


def test_the_unused_last_position_may_be_left_out():
    torch.testing.assert_close(token_logp(logits(slice(3)), TOKENS), token_logp(logits(), TOKENS))


def test_no_shift_scores_token_t_by_logits_that_have_read_it():
    got = token_logp(logits(), TOKENS, shift=False).exp()
    assert got.tolist() == pytest.approx([0.1, 0.25, 0.1])


@pytest.mark.parametrize(("rows", "shift"), [(2, True), (3, False), (2, False)])
def test_positions_that_fit_neither_reading_are_refused(rows, shift):
    with pytest.raises(ValueError, match=f"{rows} logit positions do not fit 4 tokens"):
        token_logp(logits(slice(rows)), TOKENS, shift=shift)


def test_token_logp_keeps_leading_dimensions():
    raw = torch.randn(2, 5, 4, 7)
    tokens = torch.randint(7, (2, 5, 4))
    got = token_logp(raw, tokens)
    one = raw[1, 3].log_softmax(-1)
    expected = [one[t, tokens[1, 3, t + 1]].item() for t in range(3)]
    assert got.shape == (2, 5, 3)
    assert got[1, 3].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mask", "total"),
    [([1, 1, 1, 1], -10.0), ([1, 1, 0, 0], -3.0), ([0, 0, 1, 1], -7.0), ([0, 0, 0, 0], 0.0)],
    ids=["whole", "right padding", "left padding", "empty"],
)
def test_sequence_logp_sums_what_counts(mask, total):
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0]).requires_grad_()
    got = sequence_logp(logp, torch.tensor(mask).bool())
    assert got.item() == total
    (gradient,) = torch.autograd.grad(got, logp)
    assert gradient.tolist() == mask


def numbered(lead=1, ref=True):
    """A rollout of 4 groups of 3 completions in which every number tells its group."""
    groups, count, length = 4, 3, 2
    runs = (2,) if lead else ()
    group = torch.arange(groups).float()

    def filled(*tail):
        return group.view(-1, *[1] * len(tail)).expand(*runs, groups, *tail).clone()

    tokens = filled(count, length)
    return Rollout(
        prompts=filled().long(), completions=tokens.long(), mask=tokens >= 0, logp=-tokens,
        ref=-tokens if ref else None, rewards=filled(count), scale=torch.ones(runs), lead=lead,
        labels={"weight": filled(count), "prefer": filled(count, count)},
    )  # fmt: skip


@pytest.mark.parametrize("lead", [0, 1])
def test_narrow_keeps_whole_groups_of_everything(lead):
    whole = numbered(lead)
    part = whole.narrow(1, 2)
    assert (whole.groups, part.groups) == (4, 2)
    named = [part.prompts, part.completions, -part.logp, -part.ref, part.rewards]
    for x in (*named, part.labels["weight"], part.labels["prefer"]):
        assert x.shape[lead] == 2
        assert sorted(set(x.flatten().tolist())) == [1, 2]
        assert (x.select(lead, 0) == 1).all()
    assert part.rewards.shape[-1] == 3
    assert part.scale.shape == whole.scale.shape


def test_narrow_is_a_view():
    whole = numbered()
    part = whole.narrow(2, 1)
    assert part.logp.untyped_storage().data_ptr() == whole.logp.untyped_storage().data_ptr()
    assert whole.narrow(0, 4) is whole


def test_narrow_without_a_reference():
    assert numbered(ref=False).narrow(1, 1).ref is None


def test_narrow_beyond_the_groups_is_an_error():
    with pytest.raises((RuntimeError, IndexError)):
        numbered().narrow(3, 2)


def test_labelled_replaces_the_labels_only():
    whole = numbered()
    other = whole.labelled({"advantage": whole.rewards})
    assert list(other.labels) == ["advantage"]
    assert other.logp is whole.logp
