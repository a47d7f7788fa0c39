"""Lengths, rules and the Skew data on hand-written tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.lm.batches import padded, unpadded
from lib.lm.length import gold, lengths, truncated
from lib.lm.pairs import Pairs, load, save, skew_mean

EOS, OTHER = 9, 8  # a second id that ends a response


def test_length_counts_tokens_without_eos():
    ids = torch.tensor([[1, 2, EOS, 0], [1, 2, 3, 4], [EOS, 0, 0, 0], [5, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert lengths(ids, mask, torch.tensor([EOS])).tolist() == [2, 4, 0, 1]
    several = torch.tensor([EOS, 4])
    assert lengths(ids, mask, several).tolist() == [2, 3, 0, 1]


def test_gold_rewards_by_hand():
    length = torch.tensor([0, 3, 10])
    assert gold("min", length, 4.0).tolist() == [0, -3, -10]
    assert gold("skew", length, 4.0).tolist() == [0, -3, -10]
    assert gold("mode", length, 4.0).tolist() == [-4, -1, -6]
    with pytest.raises(ValueError, match="task must be one of .*'max'"):
        gold("max", length, 4.0)


def test_truncation_cuts_95_in_100_and_ends_them_with_eos():
    whole = [list(range(100, 400)) for _ in range(4000)]  # capped: no EOS
    out, cut = truncated(whole, EOS, 20.0, seed=0)
    again, _ = truncated(whole, EOS, 20.0, seed=0)
    assert out == again and out != truncated(whole, EOS, 20.0, seed=1)[0]
    assert 0.94 < cut / 4000 < 0.96
    bodies = [row[:-1] for row in out if row[-1] == EOS]
    assert len(bodies) == cut and all(body == row[: len(body)] for body, row in
                                      zip(bodies, whole, strict=False))  # fmt: skip
    assert np.mean([len(b) for b in bodies]) == pytest.approx(20.5, abs=1.0)
    assert min(len(b) for b in bodies) >= 1
    assert all(row == whole[0] for row in out if row[-1] != EOS)


def test_a_response_shorter_than_its_cut_stays_as_it_is():
    out, cut = truncated([[1, 2, EOS]] * 100, EOS, 1e6, seed=0)
    assert cut == 0 and out == [[1, 2, EOS]] * 100


def pairs():
    return Pairs([[1], [2], [3]], [[5, EOS], [5, 6, 7], [5, 6, EOS]],
                 [[5, 6, 7, EOS], [5, EOS], [6, 5, OTHER]], (EOS, OTHER))  # fmt: skip


def test_labels_by_rule_and_ties():
    p = pairs()
    assert p.lengths.tolist() == [[1, 3], [3, 1], [2, 2]]
    assert p.preferred("min", 3).tolist() == [[1, 0], [0, 1], [0, 0]]
    assert p.preferred("mode", 3).tolist() == [[0, 1], [1, 0], [0, 0]]
    assert p.preferred("mode", 2).tolist() == [[0, 0]] * 3
    assert skew_mean(p) == pytest.approx(0.5)


def test_pairs_survive_a_file(tmp_path):
    save(tmp_path / "pairs.parquet", {"train": pairs(), "validation": pairs()})
    back = load(tmp_path / "pairs.parquet", "train", (EOS, OTHER))
    assert back == pairs()
    with pytest.raises(ValueError, match="split must be one of"):
        load(tmp_path / "pairs.parquet", "test", (EOS,))


def test_padding_by_hand():
    ids, mask = padded([[1, 2], [3]], 0, "left")
    assert ids.tolist() == [[1, 2], [0, 3]] and mask.tolist() == [[True, True], [False, True]]
    ids, mask = padded([[1, 2], [3]], 0)
    assert ids.tolist() == [[1, 2], [3, 0]]
    assert unpadded(ids, mask) == [[1, 2], [3]]
    with pytest.raises(ValueError, match="side must be 'left' or 'right', got 'up'"):
        padded([[1]], 0, "up")
    with pytest.raises(ValueError, match="no rows"):
        padded([], 0)
