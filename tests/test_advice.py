"""The short answers take their strong wording only where the results support it."""

import re

import pandas as pd
import pytest

from lib import advice, decisions, overview
from lib.decisions import MIN_SEEDS
from tests.test_overview import Handmade, rows

FAR = next(p for p in decisions.PROBLEMS if p.name == "R1")


def told(chapters):
    """The answers, each with its numbers on the line of its sentence."""
    _, *found = re.split(r"^- ", advice.short_answers(chapters), flags=re.MULTILINE)
    return ["- " + " ".join(answer.split()) for answer in found]


def ends(value, seeds=MIN_SEEDS):
    return [value + d for d in (-0.01, 0.0, 0.01, 0.0, 0.0)[:seeds]]


def chapters(far=(0.9, 0.3), near=(0.9, 0.9), sampled=(0.99, 0.97), stale=(0.9, 0.3)):
    """far, near: offline DPO and RWR; sampled: on-policy; stale: their reward at the largest k."""
    offline, on_policy = Handmade(), Handmade()
    for reward, values in (("R1", far), ("R2", near)):
        for name, value in zip(("dpo_offline", "rwr_offline"), values, strict=True):
            offline.rows[f"{name}@{reward}"] = rows(ends(value))
        for name, value, old in zip(("dpo", "rwr"), sampled, stale, strict=True):
            on_policy.rows[f"{name}@{reward}"] = rows(ends(value))
            on_policy.rows[f"{name}@{reward}[sets=2]"] = rows(ends(0.0))
            on_policy.rows[f"{name}@{reward}[sets=50]"] = rows(ends(old))
    return {"negative_gradient": offline, "on_policy": on_policy}


def lengths(offline, sampled, stale, seeds=MIN_SEEDS, task="min"):
    """A chapter of a length problem: final rewards of DPO and RWR, offline, on-policy, stale."""
    found = Handmade()
    for name, values in (("dpo", (offline[0], sampled[0], stale[0])),
                         ("rwr", (offline[1], sampled[1], stale[1]))):  # fmt: skip
        for setting, value in zip((f"{name}_offline@{task}", f"{name}@{task}",
                                   f"{name}@{task}[sets=4]"), values, strict=True):  # fmt: skip
            found.rows[setting] = rows(ends(value, seeds))
    return {"complementary_length": found}


def test_strong_wording_with_the_numbers_behind_it():
    _, first, second, third = told(chapters())
    assert first.startswith("- **Sample while you train, if you can.**")
    gap = "+0.09 (+0.09 to +0.09) | 0.97 to 0.99 | 100 and 100 |"
    assert f"| bandit R1 | far | DPO 0.99 (0.98) | DPO 0.90 (0.89) | {gap}" in first
    assert f"| bandit R2 | near | DPO 0.99 (0.98) | DPO 0.90 (0.89) | {gap}" in first
    assert "matters little" in first
    assert "take a loss with a negative gradient" in second
    assert ("Level with the best at the end on every problem that ran them (so many): DPO (2) with "
            "one sampling for 50 updates. Old samples slow RWR more than DPO on bandit R1 (one "
            "sampling for 50 updates; DPO and RWR ran).") in second  # fmt: skip
    assert "| bandit R1 | 50 | mean reward over training | DPO: -0.04" in second
    assert third.startswith("- **If the data are fixed, ask where the reward is.**")
    assert "| bandit R1 | far | DPO 0.90 (0.89) | RWR 0.30 (0.29) | +0.60" in third


def test_the_default_is_who_failed_least_often_and_says_where():
    first, *_ = told(chapters(sampled=(0.99, 0.99), near=(-0.3, -0.3)))
    assert "- *If you can sample while you train:* take DPO (2 of 2) or RWR (2 of 2)." in first
    assert ("- *If your data are fixed:* DPO (1 of 1), which needs pairs, comes with a warning: a "
            "run of it ended below the untrained model on bandit R2.") in first  # fmt: skip
    assert "On bandit R2 no method ends above" not in first  # the on-policy ones do
    both = "bandit R1, bandit R2 | \N{EN DASH}"
    assert f"| RWR (on-policy) | a reward for every answer | {both}" in first
    assert f"| DPO (on-policy) | pairs of fresh answers (a judge) | {both}" in first
    assert "| DPO (offline) | pairs | bandit R1 | \N{EN DASH} | bandit R2 |" in first
    assert "| untrained | 0.00 | 0.00 |" in first
    assert "| DPO (on-policy) | **0.99** | **0.99** |" in first
    assert "| RWR (offline) | 0.30 | -0.30\N{DAGGER} |" in first


def test_where_a_default_is_behind_and_what_nobody_solved_is_told():
    offline = Handmade()
    for reward, values in (("R1", (0.9, 0.2)), ("R2", (0.9, 0.9)), ("min", (-5.0, -3.0))):
        for name, value in zip(("dpo_offline", "rwr_offline"), values, strict=True):
            offline.rows[f"{name}@{reward}"] = rows(ends(value))
    first, *_ = told({"negative_gradient": offline, "negative_gradient_length": offline})
    # RWR led on half, which is not most
    assert ("- *If your data are fixed:* DPO (2 of 2), which needs pairs, comes with a warning: a "
            "run of it ended below the untrained model on Min Length.") in first  # fmt: skip
    assert ("On Min Length no method ends above the untrained model: being level there counts for "
            "none.") in first  # fmt: skip
    assert "Of the on-policy methods 0, of the offline ones 1 were run" in first
    offline.rows["rwr_offline@min"] = rows(ends(0.5))
    first, *_ = told({"negative_gradient": offline, "negative_gradient_length": offline})
    assert ("take RWR (2 of 3; behind on bandit R1: 0.20, the best 0.90) if you have a reward for "
            "every answer. DPO (2 of 3; behind on Min Length: -5.00, the best 0.50 tokens), which "
            "needs pairs, comes with a warning") in first  # fmt: skip
    assert advice.seeds(decisions.collect({"negative_gradient": offline})) == f"{MIN_SEEDS}"


def test_a_problem_that_nobody_sampled_on_is_in_the_matrix():
    offline = chapters()["negative_gradient"]
    table = advice.matrix(advice._standings(advice.decisions.collect(
        {"negative_gradient": offline}), "fixed"))  # fmt: skip
    assert list(table["method"]) == ["untrained", "DPO (offline)", "RWR (offline)"]
    first, *_ = told({"negative_gradient": offline})
    assert "If your data are fixed" in first and "sample while you train" not in first
    assert "| DPO (offline) | **0.90** | **0.90** |" in first


def test_a_method_that_gains_by_old_samples_is_told():
    _, _, second, _ = told(chapters(sampled=(0.5, 0.5), stale=(0.9, 0.3)))
    assert "DPO even learns faster with old samples on bandit R1." in second
    assert "RWR even" not in second


def test_a_sentence_sorts_the_problems_and_the_numbers_are_folded_away():
    skewed = lengths((-30.0, -2.0), (-1.0, -1.0), (-1.0, -1.0), task="skew")
    text = advice.short_answers({**chapters(near=(0.9, 0.9)), **skewed})
    assert "the rule was" not in text  # nothing of the two kinds of pairs is undecided
    assert ("against the best without: ahead on bandit R1; behind on Skew Length; "
            "alike on bandit R2.") in text  # fmt: skip
    assert "slow RWR more than DPO on bandit R1" in text
    sentences = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert text.count("<details>") == text.count("</details>") == 4
    assert "(+" in text and "(+" not in sentences


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


def test_fewer_seeds_than_count_support_nothing():
    found = chapters()
    for chapter in found.values():
        chapter.rows = {name: table[table["seed"] < 4 + MIN_SEEDS]
                        for name, table in chapter.rows.items()}  # fmt: skip
    text = advice.short_answers(found)
    for strong in ("if you can", "take a loss", "ask where"):
        assert strong not in text
    assert f"Too few seeds to say: bandit R1 ({MIN_SEEDS - 1}), bandit R2" in text
    assert f"**One default?** No method with {MIN_SEEDS} seeds was run" in text
    assert "**If sampling is slow:** no loss is told apart from another." in text
    assert advice.seeds(advice.decisions.collect(found)) == f"fewer than {MIN_SEEDS}"
    assert advice.seeds(advice.decisions.collect({})) == "not computed yet"


def test_the_language_model_is_told_in_tokens():
    both = chapters() | lengths((-5.0, -40.0), (-1.0, -3.0), (-2.0, -40.0))
    _, first, second, third = told(both)
    assert "| Min Length | far | DPO -1.00 (-1.01) | DPO -5.00 (-5.01) | +4.00 (+4.00" in first
    assert "if you can" in first and "take a loss" in second and "ask where" in third
    assert "| DPO -5.00 (-5.01) | RWR -40.00 (-40.01) | +35.00 (+35.00 to +35.00) tokens" in third


@pytest.mark.parametrize(("rewards", "lost"), [
    ((((-5.0, -40.0), (-20.0, -30.0), (-2.0, -40.0))), "if you can"),  # sampling ends worse
    ((((-5.0, -40.0), (-1.0, -3.0), (-40.0, -3.0))), "take a loss"),  # RWR bears it better
    ((((-40.0, -5.0), (-1.0, -3.0), (-2.0, -40.0))), "ask where"),  # no gain where it is far
])  # fmt: skip
def test_a_problem_that_disagrees_takes_the_strong_wording_away(rewards, lost):
    strong = {"if you can", "take a loss", "ask where"}
    text = advice.short_answers(chapters() | lengths(*rewards))
    assert {words for words in strong if words in text} == strong - {lost}
    few = advice.short_answers(chapters() | lengths(*rewards, seeds=2))
    assert {words for words in strong if words in few} == strong  # two seeds have no say
    assert few.count("Min Length (2)") == 3


@pytest.mark.parametrize(("offline", "words"), [
    ((-30.0, -2.0), "ask who wrote the pairs.** Push bad answers down if your model did"),
    ((-2.1, -2.0), "If the data are fixed:**"),  # no loss where the pairs come near the reward
    ((-2.0, -30.0), "ask where the reward is"),  # a negative gradient helps there as well
])  # fmt: skip
def test_fixed_data_hang_on_who_wrote_the_pairs_where_the_results_turn_on_it(offline, words):
    skewed = lengths(offline, (-1.0, -1.0), (-1.0, -1.0), task="skew")
    *_, third = told({**chapters(), **skewed})
    assert words in third
    assert "| Skew Length | far, pairs near it |" in third


def test_what_the_problems_that_differ_have_in_common_is_told_with_those_that_do_not():
    both = lengths((-2.1, -2.0), (-1.0, -1.0), (-1.0, -1.0))["complementary_length"]
    skewed = lengths((-30.0, -2.0), (-1.0, -1.0), (-1.0, -1.0), task="skew")
    both.rows |= skewed["complementary_length"].rows
    *_, third = told({**chapters(), "complementary_length": both})
    assert third.startswith("- **If the data are fixed:**")
    assert "the rule was: push down if both answers of a pair are your own model's" in third
    assert "But one of these kinds also holds a problem on which neither is ahead." in third


def test_rare_sampling_is_told_by_the_final_gold_reward_where_a_judge_looked():
    judged = Handmade()
    for name, fresh, old in (("reinforce", -2.0, -2.5), ("rwr", -2.0, -0.5)):
        for dial, value in (("", fresh), (",sets=4", old)):
            setting = f"{name}@similar[judged=True{dial}]"
            judged.rows[setting] = rows(ends(0.0)).assign(gold=value)
    _, _, second, _ = told({"full_scale": judged})
    assert second.startswith("- **If sampling is slow, mind the loss.**")
    assert "RWR even ends higher with old samples on pairs of one model." in second
    assert "cost REINFORCE more final reward than RWR on pairs of one model" in second
    assert ("| pairs of one model | 4 | final gold reward | RWR: +1.50 (+1.50 to +1.50) nats a "
            "token, n = 5 | REINFORCE: -0.50") in second  # fmt: skip
    both = advice.short_answers({**chapters(), "full_scale": judged})
    assert "take a loss" not in both and "take a loss" in advice.short_answers(chapters())


def test_offline_dpo_comes_with_a_warning_where_its_answers_no_longer_end():
    found = lengths((-5.0, -9.0), (-1.0, -2.0), (-2.0, -3.0))
    table = found["complementary_length"].rows["dpo_offline@min"]
    for share, warned in ((0.53, True), (0.97, False)):
        table["ended"] = share
        *_, third = told({**chapters(), **found})
        assert ("Offline DPO can stop ending its answers: after training 53% on Min Length still "
                "end." in third) is warned  # fmt: skip


def test_a_method_whose_seeds_scatter_is_called_neither_best_nor_worst():
    rare = {"rwr": [-1.0, -1.2, -0.8], "reinforce": [4.0, -9.0, 5.0],
            "ppo_token": [-7.0, -7.2, -6.8]}  # fmt: skip
    values = {name: pd.Series(x) for name, x in rare.items()}
    assert values["reinforce"].mean() > values["rwr"].mean()
    assert advice._extremes(values) == ("rwr", "ppo_token")
    flipped = {name: -x for name, x in values.items()}
    assert advice._extremes(flipped) == ("ppo_token", "rwr")
    one_seed = {name: x[:1] for name, x in values.items()}  # no interval: by their values
    assert advice._extremes(one_seed) == ("reinforce", "ppo_token")


def test_without_results_each_answer_says_so():
    assert advice.short_answers({}).lower().count(overview.NOT_YET) == 4


def test_a_gap_counts_beyond_the_margin_only():
    assert advice._beyond(FAR, pd.Series([0.04, 0.041, 0.042]))
    assert not advice._beyond(FAR, pd.Series([0.01, 0.011, 0.012]))


def test_the_loss_matters_where_it_does_on_any_problem_that_counts():
    """The bandit's on-policy methods are alike, those of a length problem are not."""
    apart = lengths((-5.0, -40.0), (-1.0, -40.0), (-2.0, -41.0))
    _, first, *_ = told({**chapters(), **apart})
    assert ("Which on-policy loss you take matters little (means within 2 margins) on bandit R1 "
            "and bandit R2; on Min Length their means are far apart.") in first  # fmt: skip
    assert "| 0.97 to 0.99 |" in first and "| -40.00 to -1.00 |" in first


def test_a_record_names_the_problems_that_count_and_did_not_run_the_method():
    standings = advice._standings(decisions.collect(chapters()), "fresh")
    first, second = standings
    entry = next(e for e in first.entries if e.method == "dpo")
    missed = advice._missed([(first, entry)], standings)
    assert missed == (second.problem,)
    record = advice.Record("DPO", ((first, entry),), missed).record
    assert record == f"DPO (1 of 1; not run on {second.problem.title})"


def test_the_default_says_where_a_method_was_not_run():
    found = {**chapters(sampled=(0.99, 0.99)), **lengths((5.0, 3.0), (9.0, 8.9), (8.0, 8.1))}
    del found["complementary_length"].rows["rwr@min"]
    told = advice.default(decisions.collect(found))
    assert "not run on Min Length" in told and told.count("not run on") == 1
