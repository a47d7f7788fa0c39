"""What one GPU measured, beside what `lib.footprint` estimates. Chapter: own_model.

Every number is read from `data/gpu`, whose card says how it was measured. Memory is in GiB of
tensors, as PyTorch counts them, unless a name says otherwise; times are in seconds or, where a
column says so, in milliseconds (ms). A step is one update of on-policy DPO.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pandas as pd

from lib import experiments, footprint, methods
from lib.lm.length import TASKS
from lib.runs import ROOT

FOLDER = ROOT / "data" / "gpu"
H200 = footprint.Machine("H200", 141, 989e12, 4800e9)  # by its maker's data sheet
# What a step of the benchmark has: no reward model, 64 responses of 64 tokens to prompts of 32.
NONE = replace(footprint.NANO, name="none", parameters=0, vocabulary=0)
STEP = footprint.Preset(footprint.PYTHIA_14, NONE, 32, 64)
RESPONSES = 64
DECODERS = {
    "compiled": "this book's, compiled",
    "transformers": "transformers' generate: static cache, compiled",
    "growing": "this book's, keys and values in tensors that grow",
}
OURS = "bfloat16_compiled"
TRAINERS = {
    OURS: "this book's, compiled decoder",
    "TRL_bfloat16_static_cache": "TRL's, static cache, mended",
    "TRL_bfloat16": "TRL's, dynamic cache",
    "TRL_bfloat16_throughout_static_cache": "TRL's, static cache, all in bfloat16",
}
MB = 1e6 / footprint.GIB  # GiB


def record(name: str) -> dict[str, Any]:
    """One of the folder's JSON files: benchmarks, training, prepared or pilot."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def details(part: str) -> dict[str, dict[str, Any]]:
    """Setting -> what the benchmark found. Args: part: "decode" or "dpo_step"."""
    found = {}
    for line in record("benchmarks")["results"]:
        _, kind, _, _, setting, *other = line["name"].split("/")
        if kind == part and not other:
            found[setting] = line["details"].get("own", line["details"])
    return found


def decoding() -> pd.DataFrame:
    """Rows: DECODERS. `ms a token`: of all RESPONSES at once; `least ms`: the time of reading
    weights, keys and values once."""
    found, rows = details("decode"), []
    for name, title in DECODERS.items():
        one = found[name]
        rows.append({
            "decoder": title, "tokens a second": round(one["tokens_per_second"]),
            "ms a token": 1e3 * RESPONSES / one["tokens_per_second"],
            "least ms": 1e3 * one["bytes_of_a_step"] / one["copy_bytes_per_second"],
            "against generate": found["transformers"]["seconds"] / one["seconds"],
            "GiB": one["memory_mb"] * MB,
        })  # fmt: skip
    return pd.DataFrame(rows)


def phases(setting: str = OURS) -> dict[str, float]:
    """Seconds of an update by phase."""
    one = details("dpo_step")[setting]
    return {phase: share * one["seconds"] for phase, share in one["shares"].items()}


def steps() -> pd.DataFrame:
    """Rows: TRAINERS. `slower`: times as long as an update of OURS."""
    found, rows = details("dpo_step"), []
    for name, title in TRAINERS.items():
        one = found[name]
        rows.append({
            "trainer": title, "ms an update": 1e3 * one["seconds"],
            "slower": one["seconds"] / found[OURS]["seconds"],
            **{f"{phase}, ms": 1e3 * took for phase, took in phases(name).items()},
            "GiB": one["memory_mb"] * MB,
        })  # fmt: skip
    return pd.DataFrame(rows)


def beside() -> pd.DataFrame:
    """Estimated and measured: an update by phase, and its memory."""
    table = footprint.beside(STEP, H200, phases())
    table.columns = ["of an update", "estimated", "measured"]
    table["of an update"] += ", ms"
    table[["estimated", "measured"]] *= 1e3
    table.loc[len(table)] = ["memory, GiB", footprint.memory(STEP)["total"],
                             details("dpo_step")[OURS]["memory_mb"] * MB]  # fmt: skip
    return table.assign(factor=table["measured"] / table["estimated"])


# --- the pilot ------------------------------------------------------------------------------------


def pilot() -> pd.DataFrame:
    """Every evaluation of every run of the pilot: one seed, rates that nobody has chosen yet."""
    return pd.read_parquet(FOLDER / "pilot.parquet")


def ends() -> pd.DataFrame:
    """The pilot's runs after their last update, below what they all began with, by task."""
    table, parts = pilot(), []
    for task in TASKS:
        of = table[table["task"] == task]
        start = of[of["update"] == 0].iloc[[0]]
        parts += [start.assign(named="before", rate="-"), experiments.final(of)]
    rows = pd.concat(parts)
    return pd.DataFrame({
        "task": rows["task"].map(experiments.length.TITLES),
        "method": rows["named"].fillna(rows["method"].map(lambda name: methods.get(name).title)),
        "rate": rows["rate"].fillna(rows["learning_rate"].map("{:g}".format)),
        "length, tokens": rows["length"], "gold reward": rows["reward"], "proxy": rows["proxy"],
        "KL, nats": rows["kl_ref"],
    }).reset_index(drop=True)  # fmt: skip


def panels() -> dict[str, dict[str, dict[float, pd.DataFrame]]]:
    """The pilot as `lib.figures.curves.dial` draws it: title -> method -> rate -> rows of a run.
    Two panels a task, for reward and distance."""
    table, found = pilot(), {}
    for task in TASKS:
        parts: dict[str, dict[float, pd.DataFrame]] = {}
        for (name, rate), rows in table[table["task"] == task].groupby(["method", "learning_rate"]):
            parts.setdefault(methods.get(name).title, {})[rate] = rows
        title = experiments.length.TITLES[task]
        found |= {title: parts, f"{title}: distance": parts}
    return found


# --- the numbers of the sentences -----------------------------------------------------------------


def numbers() -> dict[str, float | str]:
    """By name, as the chapter's sentences have them."""
    training, prepared, about = record("training"), record("prepared"), record("pilot")
    found: dict[str, float | str] = {
        "sft_before": training["losses"][0]["validation"], "sft_after": training["validation_loss"],
        "sft_seconds": training["seconds"], "trl": training["environment"]["versions"]["trl"],
        "h200_commit": record("benchmarks")["environment"]["commit"][:10],
        "h200_torch": record("benchmarks")["environment"]["versions"]["torch"],
        "answer": prepared["pairs"]["length"]["mean"],
        "answer_sd": prepared["pairs"]["length"]["sd"],
    }  # fmt: skip
    models = {task: prepared[f"reward-{task}"] for task in TASKS}
    found |= {f"right_{task}": model["kept"]["accuracy"] for task, model in models.items()}
    found["reward_seconds"] = max(model["seconds"] for model in models.values())
    for row in beside().to_dict("records"):
        found[f"h200_{row['of an update'].partition(',')[0]}"] = row["factor"]
    ours, generate, growing = decoding().to_dict("records")
    found |= {"decode_ms": ours["ms a token"], "decode_least": ours["least ms"],
              "decode_rest": ours["ms a token"] - ours["least ms"],
              "decode_lead": ours["against generate"],
              "decode_growing": growing["ms a token"] / ours["ms a token"]}  # fmt: skip
    own, static, dynamic, half = steps().to_dict("records")
    found |= {"trl_static": static["slower"], "trl_dynamic": dynamic["slower"],
              "trl_half": half["slower"], "trl_half_less": static["GiB"] - half["GiB"]}  # fmt: skip
    found |= _of_pilot(about, pilot(), prepared["reward-mode"]["target"])
    return {name: v if isinstance(v, int | str) else float(v) for name, v in found.items()}


def _of_pilot(
    about: dict[str, Any], table: pd.DataFrame, target: float
) -> dict[str, float | str]:  # fmt: skip
    """Args: target: of the Mode task, tokens: its gold reward is minus the distance from it."""
    used, tensors = about["memory_gib"]["processes"], about["memory_gib"]["tensors"]
    missing = [run["method"] for run in about["missing"]]
    start, last = table[table["update"] == 0].iloc[0], experiments.final(table)
    mode = table[(table["task"] == "mode") & (table["update"] == 0)].iloc[0]
    # the variance of a distance: its mean square about the target less the square of its mean
    spread = mode["length_sd"] ** 2 + (mode["length"] - target) ** 2 - mode["reward"] ** 2
    found: dict[str, float | str] = {
        "pilot_runs": about["runs"], "pilot_planned": about["planned"],
        "pilot_missing": len(missing), "pilot_ppo": missing.count("ppo_token"),
        "process_low": min(used), "process_high": max(used), "process_jobs": len(used),
        "process_said": footprint.memory(footprint.PRESETS["smollm2"])["total"],
        "tensors_low": min(tensors), "tensors_high": max(tensors),
        "start_length": start["length"], "start_mode": mode["reward"],
        "start_error": (spread / about["configuration"]["prompts"]) ** 0.5,
        "ended_least": table["ended"].min(), "empty": int((last["length"] == 0).sum()),
        "same": int((last["length_sd"] == 0).sum()),
        **{f"most_{task}": last.loc[last["task"] == task, "length"].max()
           for task in ("min", "skew")},
    }  # fmt: skip
    for run in last[last["task"] == "mode"].itertuples():
        name = f"mode_{run.method}_{1e5 * run.learning_rate:.0f}"  # rates in 1e-5
        found |= {name: run.reward, f"{name}_kl": run.kl_ref}
    of = (table["task"] == "min") & (table["method"] == "dpo_offline")
    turned = table[of & (table["learning_rate"] == table["learning_rate"].max())]
    best = turned.loc[turned["proxy"].idxmax()]
    return found | {"turned_best": best["proxy"], "turned_length": best["length"],
                    "turned_end": turned["proxy"].iloc[-1]}  # fmt: skip
