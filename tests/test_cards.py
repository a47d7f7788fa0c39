"""Table 1, the methods' cards, what losses do to completions, and the paper's tables."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import torch

from lib import cards
from lib.bandit.config import BanditRun
from lib.bandit.engine import stack
from lib.finetune import fine_tune
from lib.methods import METHODS, NEEDS


def test_table_1_says_what_the_registry_says():
    lines = cards.table_1(["reinforce", "dpo_offline"]).splitlines()
    assert lines[2:] == [
        "| REINFORCE | `reinforce` | yes | no | yes |",
        "| DPO (offline) | `dpo_offline` | no | n/a | yes |",
    ]
    assert len(cards.table_1().splitlines()) == len(METHODS) + 2


@pytest.mark.parametrize("name", METHODS)
def test_every_metric_is_in_the_glossary(name):
    assert set(cards.logged(METHODS[name])) <= set(cards.METRICS)


def test_the_glossary_names_no_metric_that_nothing_logs():
    logged = {metric for method in METHODS.values() for metric in cards.logged(method)}
    assert set(cards.METRICS) == logged | {"loss", "grad_norm"}


def test_every_evaluated_column_is_in_the_glossary():
    run = BanditRun("ipo_offline", "R1", 0.01, 0, prompts=2, completions=2, iterations=1)
    training = stack([run])
    columns = set(training.problem.evaluate(training.state)) | {"diverged"}
    named = set(cards.EVALUATION) - {"mass_00 ... mass_95"}
    assert {c for c in columns if not c.startswith("mass_")} == named


def test_every_column_of_a_length_evaluation_is_in_the_glossary(tmp_path):
    from lib.lm.config import length_run
    from lib.lm.problem import LengthProblem
    from tests.lm_folder import prepared_folder

    run = length_run("dpo", "min", 1e-3, 0, prepared=str(prepared_folder(tmp_path)), max_tokens=12)
    problem = LengthProblem(run)
    assert {*problem.evaluate(problem.initial_state()), "diverged"} == set(cards.LENGTH_EVALUATION)


def test_needs_are_in_words():
    assert set(cards.NEEDS) == set(NEEDS)
    card = cards.card("best_of_n_offline", "best_of_n")
    assert "the best completion only" in card
    assert "`best_of_n`: a reward for every completion" in card


def test_pushes_by_hand():
    """Four completions at policy = reference: best-of-N pulls one up, DPO pushes by rank."""
    table = cards.pushes()
    assert table.loc["Best-of-N"].tolist() == [1, 0, 0, 0]
    assert table.loc["Best-of-N + negative gradient"].tolist() == [1, -1, -1, -1]
    assert table.loc["DPO"].tolist() == pytest.approx([1, 1 / 3, -1 / 3, -1])
    rewards = torch.tensor([0.9, 0.5, 0.4, 0.1])
    centred = (rewards - rewards.mean()) / (rewards - rewards.mean()).abs().max()
    assert table.loc["REINFORCE"].tolist() == pytest.approx(centred.tolist(), abs=1e-6)
    assert len(table) == 8  # one row for both forms of PPO


def test_a_row_with_red_is_a_method_with_a_negative_gradient():
    for name, method in METHODS.items():
        assert (cards.push(method) < 0).any().item() == method.negative_gradient, name


def test_markdown_escapes_bars():
    text = cards.markdown(pd.DataFrame({"a": ["x|y"], "b": [1]}), "lr")
    assert text == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_paper_tables_are_all_there():
    text = cards.paper_tables()
    assert re.findall(r"\*\*Table (\d+)\.", text) == [str(n) for n in range(4, 11)]
    assert "| beta | 0.01, 0.05, 0.1, 0.5 | KL weight |" in text


def test_source_without_docstring_from_a_line_on():
    text = cards.source(fine_tune, start="while")
    assert text.startswith("```python\nwhile state.iteration < schedule.iterations:\n")
    assert '"""' not in text and "state.updates += 1" in text
    with pytest.raises(ValueError, match="no line of fine_tune starts with 'until'"):
        cards.source(fine_tune, start="until")
