"""The short answers take their strong wording only where the results support it."""

import pandas as pd
import pytest

from lib import advice, overview
from tests.test_overview import Handmade, rows


def ends(value):
    return [value + d for d in (-0.01, 0.0, 0.01, 0.0)]


def chapters(far=(0.9, 0.3), near=(0.9, 0.9), sampled=(0.99, 0.97), stale=(0.9, 0.3)):
    """far, near: offline DPO and RWR; sampled: on-policy; stale: their reward at the largest k."""
    offline, on_policy = Handmade(), Handmade()
    for reward, values in (("R1", far), ("R2", near)):
        for name, value in zip(("dpo_offline", "rwr_offline"), values, strict=True):
            offline.rows[f"{name}@{reward}"] = rows(ends(value))
        for name, value, old in zip(("dpo", "rwr"), sampled, stale, strict=True):
            on_policy.rows[f"{name}@{reward}"] = rows(ends(value))
            on_policy.rows[f"{name}@{reward}[sets=50]"] = rows(ends(old))
    return {"negative_gradient": offline, "on_policy": on_policy}


def test_strong_wording_with_the_numbers_behind_it():
    first, second, third = advice.short_answers(chapters()).splitlines()
    assert first.startswith("- **Sample while you train, if you can.**")
    assert "+0.09 (+0.09 to +0.09) where the reward lies far" in first and "matters little" in first
    assert "between 0.97 and 0.99" in first
    assert "take a loss with a negative gradient" in second and "with DPO and" in second
    assert third.startswith("- **If the data are fixed, ask where the reward is.**")
    assert "0.90 (DPO, worst run 0.89)" in third and "0.30 (RWR, worst run 0.29)" in third


@pytest.mark.parametrize(("results", "absent"), [
    ({"sampled": (0.9, 0.9)}, "if you can"),  # no gain over offline
    ({"sampled": (0.85, 0.8), "far": (0.7, 0.3)}, "if you can"),  # a gain on R1, a loss on R2
    ({"sampled": (0.99, 0.5)}, "matters little"),
    ({"stale": (0.3, 0.9)}, "take a loss"),  # the loss without a negative gradient bears it better
    ({"stale": (0.9, 0.89)}, "take a loss"),  # both alike
    ({"near": (0.9, 0.3)}, "ask where"),  # a negative gradient helps under both rewards
    ({"far": (0.3, 0.3)}, "ask where"),
])  # fmt: skip
def test_neutral_wording_where_the_results_do_not_support_more(results, absent):
    assert absent in advice.short_answers(chapters())
    assert absent not in advice.short_answers(chapters(**results))


def test_one_seed_has_no_interval_and_supports_nothing():
    found = chapters()
    for chapter in found.values():
        chapter.rows = {name: table[table["seed"] == 5] for name, table in chapter.rows.items()}
    text = advice.short_answers(found)
    for strong in ("if you can", "take a loss", "ask where"):
        assert strong not in text


def test_without_results_each_answer_says_so():
    assert advice.short_answers({}).lower().count(overview.NOT_YET) == 3


def test_a_gap_counts_beyond_the_margin_only():
    assert advice._beyond(pd.Series([0.04, 0.041, 0.042]))
    assert not advice._beyond(pd.Series([0.01, 0.011, 0.012]))
