"""How reference policy, gold reward and preference data of a length problem lie to each other.

Conditions [C1] and [C2] of the paper's Table 2 as numbers, for any folder that `lib.lm.prepare`
made. Lengths are response tokens without EOS; log-probabilities are in nats. Chapter: length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib import stats
from lib.experiments.length import PROFILES, preset
from lib.lm.batches import padded, unpadded
from lib.lm.config import PRESETS, TINY, prepared_folder, weight_bytes
from lib.lm.length import GIVEN, TASKS, gold
from lib.lm.models import TokenIds, load_tokenizer
from lib.lm.pairs import Pairs, as_tensors
from lib.lm.policy import Scorer
from lib.lm.problem import Data, frozen_scorer, task_data
from lib.randomness import uniforms
from lib.rollouts import Rollout, sequence_logp

TITLES = {"min": "Min", "mode": "Mode", "skew": "Skew"}
NEAR = 5  # tokens from the gold reward's peak that count as near it
BEST_OF = 4  # responses of a prompt, of which the best is looked at
SCORED = 128  # pairs whose log-probabilities are computed
# The paper's Table 2: whether the peaks of r* and pi_ref overlap, and how far D_pref and pi_ref do.
TABLE_2 = {"min": ("disjoint", "high"), "mode": ("overlap", "high"), "skew": ("disjoint", "low")}
_SIGNS = re.compile(r"([\\`*_{}\[\]()#+!|<>$~&^-])")
PARTS = ("policy", "pairs.parquet", *(f"reward-{task}" for task in TASKS))


@dataclass(frozen=True)
class Prepared:
    """A prepared folder as this chapter reads it; each part is loaded at first use.

    Args: name: "tiny", which is shipped, one of `lib.lm.config.PRESETS`, or a folder that
        `lib.lm.prepare` made of prompts: preferences of your own follow no rule. Or the options
        by which it is made first (`lib.lm.prepare.made`).
    Raises: FileNotFoundError that names what is missing and how it is made.
    """

    name: str | Mapping[str, Any] = "tiny"

    def __post_init__(self) -> None:
        if isinstance(self.name, Mapping):
            from lib.lm.prepare import made  # with the libraries that train

            object.__setattr__(self, "name", made(self.name))
        if absent := [part for part in PARTS if not (self.folder / part).exists()]:
            what, out = f"lacks {', '.join(absent)}", str(self.folder)
            how = "--policy FOLDER_OR_NAME --prompts FILE_OR_NAME"
            if (self.folder / f"reward-{GIVEN}").exists():
                what, out = "is made of preferences, which follow no rule", "A_NEW_FOLDER"
            elif (self.folder / "pairs.parquet").exists():
                what += f" and needs all tasks ({', '.join(TASKS)})"
                how = f"with the options that it was made with, and --tasks {' '.join(TASKS)}"
            raise FileNotFoundError(
                f"prepared must be 'tiny', one of {PRESETS} or a folder that lib.lm.prepare made "
                f"of prompts; {self.name!r} ({self.folder}) {what}. Make it: python -m "
                f"lib.lm.prepare {how} --out {out}"
            )

    @property
    def folder(self) -> Path:
        return prepared_folder(self.name)

    @property
    def device(self) -> str:
        return device_for(self.folder / "policy")

    @cached_property
    def record(self) -> dict[str, Any]:
        """prepared.json: what the folder was made of. Empty if there is none."""
        return _json(self.folder / "prepared.json")

    @property
    def labelled(self) -> str:
        """ "4,698 to 4,855": how many labelled pairs its reward models learned from."""
        counts = sorted({self.record[f"reward-{task}"]["pairs"]["train"] for task in TASKS})
        return " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))

    @cached_property
    def training(self) -> dict[str, Any]:
        """policy/training.json: how the shipped policy was trained; empty for other policies."""
        return _json(self.folder / "policy" / "training.json")

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder / "policy")[0]

    @cached_property
    def policy(self) -> Scorer:
        """pi_ref: the SFT policy, frozen."""
        return reference_policy(self.folder / "policy", self.data("min").ids)

    def data(self, task: str) -> Data:
        """Prompts and pairs of a task, as every run on this folder reads them."""
        return task_data(self.folder / "policy", self.folder / "pairs.parquet", task)

    @property
    def target(self) -> float:
        """Mean length of the policy's responses: where the Mode task's reward peaks."""
        return self.data("mode").target

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) lengths of the policy's own responses: both of every training pair."""
        return self.data("min").pairs["train"].lengths.ravel()

    @property
    def cap(self) -> int:
        """Tokens of a response at most, EOS included; the longest there is if nothing says it."""
        pairs = self.data("min").pairs["train"]
        longest = max(map(len, [*pairs.first, *pairs.second]))
        return int(self.record.get("pairs", {}).get("max_tokens", longest))

    def gold(self, task: str, lengths: np.ndarray) -> np.ndarray:
        """The gold reward of responses by their lengths, tokens (`lib.lm.length.gold`)."""
        return gold(task, torch.tensor(lengths), self.target).double().numpy()

    def peak(self, task: str) -> float:
        """The length that the gold reward prefers to every other."""
        return self.target if task == "mode" else 0.0


def device_for(policy: Path) -> str:
    """Where a page's models run: a small one gains nothing from a GPU, and the CPU is always
    there."""
    large = weight_bytes(policy) > 2e8
    return "cuda" if large and torch.cuda.is_available() else "cpu"


def reference_policy(policy: Path, ids: TokenIds) -> Scorer:
    """A stored policy as pages sample from it and score with it: frozen, in float32."""
    return frozen_scorer(policy, ids, 1.0, "float32", device_for(policy))


def at(profile: str, prepared: str | Mapping[str, Any] | None = None) -> Prepared:
    """`Prepared` of what is asked for, else of what the length chapters run on at a profile; "auto"
    is the one that the pages are about."""
    if prepared is None:
        prepared = preset(PROFILES["full" if profile == "auto" else profile])
    return Prepared(prepared)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# --- what the data look like ----------------------------------------------------------------------


def samples(prepared: Prepared, count: int = 8, seed: int = 0) -> pd.DataFrame:
    """Responses sampled now, at temperature 1, to prompts that no training pair has.

    Columns: prompt, response, tokens (without EOS), ends (in EOS, or at the cap).
    """
    data, policy = prepared.data("min"), prepared.policy
    prompts = data.prompts["validation"]
    chosen = uniforms([seed], 0, 0, (len(prompts),))[0].argsort()[:count].tolist()
    ids, mask = padded([prompts[i] for i in chosen], data.ids.pad, "left", prepared.device)
    numbers = uniforms([seed], 1, 0, (len(chosen), prepared.cap))[0].to(prepared.device)
    drawn = policy.sample(ids, mask, numbers)
    rows = unpadded(drawn.completions, drawn.mask)
    ended = [bool(row) and row[-1] in data.ids.eos for row in rows]
    text = prepared.tokenizer.batch_decode
    return pd.DataFrame({
        "prompt": text([prompts[i] for i in chosen], skip_special_tokens=True),
        "response": text(rows, skip_special_tokens=True),
        "tokens": [len(row) - end for row, end in zip(rows, ended, strict=True)],
        "ends": ["EOS" if end else "cap" for end in ended],
    })  # fmt: skip


def quoted(table: pd.DataFrame) -> pd.DataFrame:
    """Sampled text as Markdown may show it: its signs mean nothing, a new line is a stroke."""

    def plain(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return _SIGNS.sub(r"\\\1", " / ".join(value.split("\n"))) or "(nothing)"

    return table.map(plain)


def spelled(prepared: Prepared, index: int = 0) -> str:
    """A held-out prompt and its two responses as the model reads them, special tokens visible."""
    pairs, lines = prepared.data("min").pairs["validation"], []
    parts = {"prompt": pairs.prompts, "first response": pairs.first,
             "second response": pairs.second}  # fmt: skip
    for name, rows in parts.items():
        ids = rows[index]
        ends = " and EOS" if ids[-1] in pairs.eos else ""
        count = len(ids) - bool(ends)
        lines += [f"--- {name}: {count} tokens{ends}", prepared.tokenizer.decode(ids)]
    return "\n".join(lines)


def distributions(prepared: Prepared) -> pd.DataFrame:
    """Figure 3: lengths of preferred, dispreferred and the policy's own responses, by task.

    Columns: task, side ("preferred", "dispreferred", "policy"), length, share (of the side).
    Tied pairs are in neither of the first two.
    """
    tables = []
    for task in TASKS:
        better, worse = _sides(prepared, task)
        sides = {"preferred": better, "dispreferred": worse, "policy": prepared.lengths}
        for side, lengths in sides.items():
            shares = np.bincount(lengths, minlength=prepared.cap + 1) / len(lengths)
            tables.append(pd.DataFrame({
                "task": task, "side": side, "length": np.arange(len(shares)), "share": shares,
            }))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def _sides(prepared: Prepared, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the preferred and of the dispreferred responses of the untied training pairs."""
    pairs = prepared.data(task).pairs["train"]
    preferred = pairs.preferred(task, prepared.target).astype(bool)
    untied = preferred.any(-1)
    return pairs.lengths[preferred], pairs.lengths[untied][~preferred[untied]]


def counts(prepared: Prepared) -> pd.DataFrame:
    """One row per task: training pairs, ties, mean lengths, responses without EOS, and cut ones."""
    own, rows = prepared.data("min").pairs["train"], []
    for task in TASKS:
        pairs = prepared.data(task).pairs["train"]
        better, worse = _sides(prepared, task)
        responses = [*pairs.first, *pairs.second]
        cut = [a != b for a, b in zip(responses, [*own.first, *own.second], strict=True)]
        rows.append({
            "task": TITLES[task], "pairs": len(pairs), "ties": len(pairs) - len(better),
            "mean length, preferred": better.mean(), "dispreferred": worse.mean(),
            "without EOS, %": 100 * np.mean([r[-1] not in pairs.eos for r in responses]),
            "cut on purpose, %": 100 * np.mean(cut),
        })  # fmt: skip
    return pd.DataFrame(rows)


def story(prepared: Prepared) -> pd.DataFrame:
    """Where policy and pairs come from: what the folder's own records say, and what is counted."""
    trained, made, pairs = prepared.training, prepared.record, prepared.data("min").pairs
    lengths = prepared.lengths
    policy = prepared.policy.network.model
    rows = {
        "policy": f"{type(policy).__name__}, {policy.num_parameters():,} parameters",
        "its source": made.get("policy", {}).get("resolved", "not recorded")[:19],
        "trained by": trained.get("command", "not recorded here"),
        "training pairs / validation pairs": _joined(trained.get("pairs")),
        "validation loss, nats a token": f"{trained.get('validation_loss', float('nan')):.3f}",
        "update that was kept": str(trained.get("chosen_update", "-")),
        "seconds of training": f"{trained.get('seconds', float('nan')):.0f}",
        "preference pairs, train / validation": f"{len(pairs['train']):,} / "
        f"{len(pairs['validation']):,}",
        "lengths of their responses": f"{lengths.mean():.1f} (sd {lengths.std():.1f}), "
        f"cap {prepared.cap}",
    }
    return pd.DataFrame({"what": rows.keys(), "value": rows.values()})


def reading(prepared: Prepared) -> str:
    """Whether the sentences that interpret figures and tables fit what is shown, as MyST."""
    if prepared.name == "tiny":
        return ("```{note}\nComputed now from the shipped policy, pairs and reward models "
                f"(`data/length`, {len(prepared.lengths):,} responses).\n```")  # fmt: skip
    return (f"```{{warning}}\nComputed now from `{prepared.name}`. **The sentences that interpret "
            "figures and tables were written for the shipped policy and may not hold here.**\n```")


def _joined(numbers: dict[str, int] | None) -> str:
    return " / ".join(f"{n:,}" for n in numbers.values()) if numbers else "-"


# --- [C1]: gold reward and pi_ref -----------------------------------------------------------------


def geometry(prepared: Prepared) -> pd.DataFrame:
    """[C1] by task, from the lengths that pi_ref writes: the index is the task.

    Columns: peak (tokens); near = P(|length - peak| <= 5) with its interval low, high; nats =
    -log near, the least KL of a policy that stays there (`frontier`); reward = E[gold]; best =
    E[gold of the best of 4].
    """
    rows = []
    for task in TASKS:
        rewards = prepared.gold(task, prepared.lengths)
        hits = np.abs(prepared.lengths - prepared.peak(task)) <= NEAR
        near, low, high = stats.share(hits.sum(), len(hits))
        rows.append({
            "task": task, "peak": prepared.peak(task), "near": near, "low": low, "high": high,
            "nats": -np.log(near) if near else np.inf, "reward": rewards.mean(),
            "best": best_of(rewards, BEST_OF),
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("task")


def best_of(rewards: np.ndarray, count: int) -> float:
    """E[max of `count` draws] of the empirical law of `rewards` (n,), exactly.

    sum_i r_(i) [(i / n)^count - ((i - 1) / n)^count], r_(1) <= ... <= r_(n).
    """
    edges = (np.arange(len(rewards) + 1) / len(rewards)) ** count
    return float(np.sort(rewards) @ np.diff(edges))


def frontier(prepared: Prepared, betas: Iterable[float]) -> pd.DataFrame:
    """The most gold reward that any policy can have at each KL to pi_ref, by its lengths alone.

    P is the law of length under pi_ref, over prompts and samples. Among the laws of length with
    KL(Q || P) = k the largest E[gold] has Q(l) proportional to P(l) exp(gold(l) / beta), and no
    policy's KL is below that of its lengths (chapter length, eq-length-frontier).
    Columns: task ("min", "mode"), beta, kl (nats), reward (tokens).
    """
    lengths, counted = np.unique(prepared.lengths, return_counts=True)
    log_p, rows = np.log(counted / counted.sum()), []
    for task in ("min", "mode"):
        rewards = prepared.gold(task, lengths)
        for beta in betas:
            logits = log_p + rewards / beta
            log_q = logits - np.logaddexp.reduce(logits)
            q = np.exp(log_q)
            rows.append((task, float(beta), float(q @ (log_q - log_p)), float(q @ rewards)))
    return pd.DataFrame(rows, columns=["task", "beta", "kl", "reward"])


def empty_nats(prepared: Prepared) -> np.ndarray:
    """(n,) -log pi_ref(EOS | x) for the validation prompts: the price of answering nothing."""
    data = prepared.data("min")
    prompts, mask = padded(data.prompts["validation"], data.ids.pad, "left", prepared.device)
    ends = torch.full((len(prompts), 1, 1), data.ids.eos[0], device=prompts.device)
    logp = prepared.policy.score(rollout(prompts, mask, ends, torch.ones_like(ends).bool()))
    return -logp[:, 0, 0].cpu().double().numpy()


# --- [C2]: preference data and pi_ref -------------------------------------------------------------


def rollout(prompts: Tensor, prompt_mask: Tensor, completions: Tensor, mask: Tensor) -> Rollout:
    """Given completions (P, C, L) as a rollout to be scored; rewards and log-probs are zeros."""
    zeros = torch.zeros(mask.shape, device=mask.device)
    return Rollout(prompts=prompts, prompt_mask=prompt_mask, completions=completions, mask=mask,
                   logp=zeros, ref=None, rewards=zeros[..., 0], scale=zeros.sum())  # fmt: skip


def pairs_rollout(prepared: Prepared, pairs: Pairs, index: Tensor) -> Rollout:
    """Some pairs as a rollout to be scored, two completions a prompt."""
    return rollout(*as_tensors(pairs, index, prepared.data("min").ids.pad, prepared.device))


def coverage(prepared: Prepared, count: int = SCORED) -> pd.DataFrame:
    """[C2]: log pi_ref of the data's responses, one row per pair, ties left out.

    The same `count` prompts of the training pairs for every task. Columns: task, and for y_w
    (chosen_*) and y_l (rejected_*): logp (nats a response, EOS included), token (nats a token),
    end (of the EOS alone, NaN where there is none), length.
    """
    size = len(prepared.data("min").pairs["train"])
    index = uniforms([0], 0, 0, (size,))[0].argsort()[:count]
    own = _densities(prepared, prepared.data("min").pairs["train"], index)
    cut = _densities(prepared, prepared.data("skew").pairs["train"], index)
    tables = [_by_preference(prepared, task, index, cut if task == "skew" else own)
              for task in TASKS]  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def _densities(prepared: Prepared, pairs: Pairs, index: Tensor) -> dict[str, np.ndarray]:
    """(n, 2) each: what `coverage` says of both responses of some pairs."""
    batch = pairs_rollout(prepared, pairs, index)
    logp = prepared.policy.score(batch)
    total, size = sequence_logp(logp, batch.mask), batch.mask.sum(-1)
    last = logp.gather(-1, size[..., None] - 1)[..., 0]
    ended = torch.isin(batch.completions, prepared.policy.eos).any(-1)
    found = {"logp": total, "token": total / size, "end": torch.where(ended, last, torch.nan)}
    return {**{name: values.cpu().double().numpy() for name, values in found.items()},
            "length": pairs.lengths[index.numpy()]}  # fmt: skip


def _by_preference(
    prepared: Prepared, task: str, index: Tensor, densities: dict[str, np.ndarray]
) -> pd.DataFrame:
    pairs = prepared.data(task).pairs["train"]
    preferred = pairs.preferred(task, prepared.target)[index.numpy()].astype(bool)
    untied = preferred.any(-1)
    found: dict[str, Any] = {"task": task}
    for name, values in densities.items():
        found[f"chosen_{name}"] = values[preferred]
        found[f"rejected_{name}"] = values[untied][~preferred[untied]]
    return pd.DataFrame(found)


def overlap(prepared: Prepared) -> pd.DataFrame:
    """[C2] by lengths; the index is the task.

    Columns: overlap = sum_l min(P_data(l), P_ref(l)), 1 for the same law and 0 for laws that share
    no length; near = share of the data's responses within 5 tokens of the gold reward's peak.
    """
    rows, bins = [], prepared.cap + 1
    own = np.bincount(prepared.lengths, minlength=bins) / len(prepared.lengths)
    for task in TASKS:
        lengths = prepared.data(task).pairs["train"].lengths.ravel()
        data = np.bincount(lengths, minlength=bins) / len(lengths)
        near = np.mean(np.abs(lengths - prepared.peak(task)) <= NEAR)
        rows.append({"task": task, "overlap": np.minimum(own, data).sum(), "near": near})
    return pd.DataFrame(rows).set_index("task")


def table_2(prepared: Prepared, covered: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table 2 beside the numbers, a column per task. Args: covered: of `coverage`."""
    near, lengths, columns = geometry(prepared), overlap(prepared), {}
    for task in TASKS:
        of, where = covered[covered["task"] == task], near.loc[task]
        mean = {name: np.nanmean(of[[f"chosen_{name}", f"rejected_{name}"]].to_numpy())
                for name in ("logp", "token", "end")}  # fmt: skip
        columns[TITLES[task]] = {
            "[C1] peaks of reward and policy, in the paper": TABLE_2[task][0],
            f"the policy's responses within {NEAR} tokens of the peak": f"{100 * where.near:.1f}%",
            "the least KL of staying there, nats": f"{where.nats:.1f}",
            "[C2] overlap of data and policy, in the paper": TABLE_2[task][1],
            "overlap of their lengths": f"{lengths.overlap[task]:.2f}",
            f"the data's responses within {NEAR} tokens of it": f"{100 * lengths.near[task]:.1f}%",
            "log-probability of a response of the data": f"{mean['logp']:.0f}",
            "of a token": f"{mean['token']:.2f}",
            "of its EOS": f"{mean['end']:.2f}",
        }  # fmt: skip
    return pd.DataFrame(columns).rename_axis("").reset_index()


def numbers(prepared: Prepared, covered: pd.DataFrame) -> dict[str, Any]:
    """What the prose quotes of this room, by name. Args: covered: of `coverage`."""
    table = pd.read_parquet(TINY / "responses.parquet", columns=["topic", "template"])
    found: dict[str, Any] = {
        "target": prepared.target, "sft_pairs": f"{len(table):,}",
        "sft_topics": table["topic"].nunique(), "sft_templates": table["template"].nunique(),
    }  # fmt: skip
    for task, row in geometry(prepared).iterrows():
        found |= {f"{name}_{task}": float(row[name]) for name in ("nats", "reward", "best")}
        near, low, high = (100 * row[name] for name in ("near", "low", "high"))
        found[f"near_{task}"] = f"{near:.1f}% ({low:.1f} to {high:.1f})"
    empty = empty_nats(prepared)
    found |= {"empty": empty.mean(), "empty_low": empty.min(), "empty_high": empty.max()}
    for task, row in overlap(prepared).iterrows():
        found |= {f"overlap_{task}": row.overlap, f"data_near_{task}": f"{100 * row.near:.1f}%"}
    for task, rows in covered.groupby("task"):
        gap = stats.interval(rows.chosen_token - rows.rejected_token)
        found[f"gap_{task}"] = "{:+.2f} ({:+.2f} to {:+.2f})".format(*gap)
    return found


def glued(values: dict[str, Any], glue: Any, names: Sequence[str] = ()) -> None:
    """Makes numbers available to the prose; NumPy's scalars as Python's."""
    for name in names or values:
        value = values[name]
        glue(name, value.item() if isinstance(value, np.generic) else value, display=False)
