"""Tables of the chapter negative_gradient, on results whose numbers are known."""

import numpy as np
import pandas as pd
import pytest

from lib import optima, pushes


def rows(chosen=-3.0, rejected=-13.0, seeds=(5, 6), rate=0.01, reward=0.5):
    return pd.DataFrame([
        {"seed": s, "run": f"{rate}-{s}", "update": u, "learning_rate": rate, "completions": 10,
         "reward": reward * u / 100, "kl_ref": u / 5, "loss": 30.0, "chosen_logratio": chosen,
         "rejected_logratio": rejected, "held_out_chosen_logratio": chosen,
         "held_out_rejected_logratio": rejected, "effective_samples": 1.5 + s}
        for s in seeds for u in (0, 50, 100)
    ])  # fmt: skip


def test_moves_solve_the_identity_of_the_mean_log_ratio():
    moves = pushes.moves(rows())
    assert moves["forward_kl"].tolist() == pytest.approx([12.0, 12.0])  # (3 + 9 * 13) / 10
    assert moves["margin"].tolist() == [10, 10]
    assert (0.9 * moves["margin"] - moves["forward_kl"]).to_numpy() == pytest.approx(
        moves["chosen"].to_numpy()
    )


def test_moves_are_empty_where_held_out_pairs_were_not_followed():
    blank = rows().assign(held_out_chosen_logratio=np.nan)
    assert pushes.moves(blank).empty
    assert pushes.moves(rows().drop(columns="held_out_chosen_logratio")).empty


def test_ends_and_reached_show_the_mean_over_seeds():
    lines = {"R1": {"IPO (offline)": rows()}}
    end = pushes.ends(lines).iloc[0]
    assert (end["final reward"], end["learning rate"], end["seeds"]) == (
        "0.50 (0.50 to 0.50)", "0.01", 2)  # fmt: skip
    row = pushes.reached(lines, optima.optima(1)).iloc[0]
    assert row["reward, asked for"] == "0.53" and row["KL, reached"].startswith("20.0")
    assert pushes.reached({"R1": {"DPO (offline)": rows()}}, optima.optima(1)).iloc[0][
        "reward, asked for"] == "none"  # fmt: skip


def test_pushed_up_agrees_with_the_win_ratio():
    table = pushes.pushed_up([1.0, 0.1]).set_index(["reward", "beta"])
    assert table.loc[("R2", 1.0), "tokens pushed up"] == "none"
    assert table.loc[("R1", 1.0), "tokens pushed up"] == "69 to 71"
    assert table.loc[("R2", 0.1), "share of the reference's tokens"] > 0.4


def test_chosen_terms_hold_the_floor_of_the_loss():
    table = pushes.chosen_terms({"R1": {10: rows()}})
    assert table["least possible"].item() == pytest.approx(80 / 3)
    assert table["KL(ref, policy)"].item() == pytest.approx(12)


def test_by_rate_puts_the_rate_in_place_of_the_update():
    both = pd.concat([rows(rate=0.01), rows(rate=0.1, reward=0.7)])
    table = pushes.by_rate(both).groupby("update")["reward"].mean()
    assert table.to_dict() == pytest.approx({0.01: 0.5, 0.1: 0.7})


def test_numbers_for_the_prose():
    assert pushes.last_mean({}, "reward") == "-" and pushes.low_runs({}) == "-"
    assert pushes.last_mean({"a": rows()}, "effective_samples") == "7.0"
    assert pushes.low_runs({"a": rows(reward=0.05)}) == "2 of 2"
    assert set(pushes.exact_numbers()) >= {"best_of_10_R1", "uniform_R2", "ipo_margin"}
