"""Methods as the registry has them (Table 1, a card each); tables of the paper from `data`."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lib.methods import METHODS, Method, get
from lib.rollouts import Rollout

DATA = Path(__file__).parents[1] / "data"
MARK = {True: "yes", False: "no", None: "n/a"}

# What a method can ask of a problem (`lib.methods.NEEDS`), in words.
NEEDS = {
    "rewards": "a reward for every completion",
    "pairs": "which of two completions is better",
    "chosen": "the best completion only",
    "reference": "log-probabilities under the reference",
    "old": "log-probabilities under the policy that sampled",
    "value_head": "a value head",
}

# Every training metric that some method logs, and what it is.
METRICS = {
    "loss": "the mean loss over items (see the method's unit)",
    "grad_norm": "Euclidean norm of the gradient, before Adam",
    "pushed_share": "share of completions that the negative term pushes down at this update",
    "effective_samples": "(sum of the weights)^2 / (sum of their squares): how many completions "
    "carry the update; 1 means a single one does",
    "clip_fraction": "share of completions (of tokens, where ratios are per token) whose ratio is "
    "outside 1 - eps to 1 + eps",
    "value_loss": "the value head's part of the loss",
    "pair_accuracy": "share of pairs that the implicit reward ranks as the labels do; "
    "0 where all are tied",
    "pair_margin": "mean of h over the pairs, in nats",
    "pairs": "number of untied pairs in the minibatch; 1 where all are tied",
}

# Every column of a result table that evaluation fills.
EVALUATION = {
    "reward": "mean reward: exact expectation of each token along sampled prefixes, 100 contexts",
    "kl_ref": "KL(pi || pi_ref) in nats per completion, exact per token along sampled prefixes",
    "kl_gen": "KL(pi || pi_gen): the same to the policy that drew the current data",
    "entropy": "entropy of the policy in nats per completion",
    "support_share": "policy's mass on tokens that the data hold at the same prompt and position",
    "chosen_logratio": "log pi(y_w) - log pi_ref(y_w), the best of each followed prompt's "
    "completions, which were drawn from pi_ref",
    "rejected_logratio": "the same, mean of the other completions",
    "held_out_chosen_logratio": "as chosen_logratio, on fresh completions of ten prompts that are "
    "not trained on (at 100 trained prompts: of ten that are)",
    "held_out_rejected_logratio": "as rejected_logratio, on the same fresh completions",
    "mass_00 ... mass_95": "policy's mass on each bin of 5 tokens",
    "diverged": "the run went non-finite and is frozen since",
}

# The same of a length problem.
LENGTH_EVALUATION = {
    "reward": "gold reward in tokens: -length, or -|length - target| on Mode Length; a completion "
    "for each of the validation prompts",
    "proxy": "training reward of the same completions: the reward model's score, or the rule's",
    "length": "mean completion length in tokens, without EOS",
    "length_sd": "its standard deviation over completions",
    "ended": "share of completions that end in EOS before the cap",
    "kl_ref": "KL(pi || pi_ref) in nats per completion, exact per token along sampled prefixes",
    "entropy": "entropy of the policy in nats per completion, the same way",
    "chosen_logratio": "log pi(y_w) - log pi_ref(y_w) on held-out pairs, nats",
    "rejected_logratio": "the same of y_l",
    "held_out_accuracy": "share of held-out pairs whose y_w has the larger log-ratio",
    "diverged": "the run went non-finite and is frozen since",
}


def markdown(table: pd.DataFrame, align: str = "") -> str:
    """A table in Markdown. `align`: one of l, r, c per column (left by default)."""
    rules = {"l": "---", "r": "---:", "c": ":---:"}
    marks = [rules[a] for a in align.ljust(len(table.columns), "l")]
    rows = [list(table.columns), marks, *table.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
                     for row in rows)  # fmt: skip


def table_1(names: Iterable[str] = tuple(METHODS)) -> str:
    """Table 1 of the paper from the registry, as Markdown."""
    rows = [
        (f"{m.title}", f"`{m.name}`", MARK[m.on_policy], MARK[m.sample_reuse],
         MARK[m.negative_gradient]) for m in map(get, names)
    ]  # fmt: skip
    columns = ["method", "name", "on-policy", "sample reuse", "negative gradient"]
    return markdown(pd.DataFrame(rows, columns=columns), "llccc")


def short(name: str) -> str:
    """A method's title without what its place on the page says."""
    return get(name).title.partition(" (")[0]


def link(chapter: str) -> str:
    """A chapter's name as a link to it, in a page of the book."""
    return f"[{chapter.replace('_', ' ')}]({chapter}.ipynb)"


def value(x: Any) -> str:
    """A hyperparameter's value as a reader would type it."""
    return f"`{x!r}`" if isinstance(x, str) else f"{x:g}"


def card(*names: str) -> str:
    """What the registry says of methods that share a loss, as a Markdown list."""
    found = [get(name) for name in names]
    first = found[0]
    hyper = ", ".join(f"`{k}` = {value(v)}" for k, v in first.hyper.items())
    items = {"selected": "selected completion", "pair": "preferred pair",
             "completion": "completion", "token": "token"}  # fmt: skip
    lines = [
        "- **names** " + ", ".join(f"`{m.name}` (paper {m.paper})" for m in found),
        f"- **needs** {'; '.join(_needs(found))}",
        f"- **loss is a mean over** every {items[first.unit]}",
        f"- **hyperparameters** {hyper or 'none'} (and the learning rate)",
        f"- **logs** {_logged(first)}",
    ]
    return "\n".join(lines)


def _needs(found: list[Method]) -> list[str]:
    first = sorted(found[0].needs, key=list(NEEDS).index)
    words = [NEEDS[need] for need in first]
    more = [
        f"`{m.name}`: {', '.join(NEEDS[n] for n in sorted(m.needs))}"
        for m in found[1:] if m.needs != found[0].needs
    ]  # fmt: skip
    return words + more


def _logged(method: Method) -> str:
    own = [name for name in logged(method) if name not in ("loss", "grad_norm")]
    return ", ".join(f"`{name}`" for name in ("loss", "grad_norm", *own))


def few_completions() -> Rollout:
    """One prompt with a few one-token completions, policy = reference = sampler."""
    rewards = torch.tensor([[0.9, 0.5, 0.4, 0.1]])
    logp = torch.linspace(-2.0, -2.3, rewards.shape[-1]).view(1, -1, 1)
    return Rollout(
        prompts=torch.zeros(1, dtype=torch.long),
        completions=torch.arange(rewards.shape[-1]).view(1, -1, 1),
        mask=torch.ones_like(logp, dtype=torch.bool),
        logp=logp, ref=logp, values=torch.zeros_like(logp), rewards=rewards,
        scale=torch.tensor(2.3),
    )  # fmt: skip


def _labelled(method: Method, batch: Rollout) -> Rollout:
    return batch.labelled(method.prepare(batch, method.hyper))


def logged(method: Method) -> list[str]:
    """The names of the training metrics that a method's loss returns."""
    batch = _labelled(method, few_completions())
    found = list(method.loss(batch, batch.logp, method.hyper)[1])
    return [*found, "value_loss"] if method.critic else found


def push(method: Method, batch: Rollout | None = None) -> Tensor:
    """-d loss / d log pi(y) for each completion: (P, C); positive is pushed up, negative down."""
    batch = _labelled(method, few_completions() if batch is None else batch)
    logp = batch.logp.clone().requires_grad_()
    item, _ = method.loss(batch, logp, method.hyper)
    (item.sum() / method.items(batch)).backward()
    return -logp.grad.sum(-1)


def pushes(names: Iterable[str] = tuple(METHODS)) -> pd.DataFrame:
    """The first update's push on each completion, as a share of the method's largest push.

    One row per loss (variants push alike at the first update), columns by falling reward.
    """
    batch = few_completions()
    columns = [f"reward {r:g}" for r in batch.rewards[0].tolist()]
    rows: dict[str, list[float]] = {}
    for method in map(get, names):
        pushed = push(method, batch)[0]
        rows.setdefault(short(method.name), (pushed / pushed.abs().max()).tolist())
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def paper_tables() -> str:
    """Tables 4 to 10 of the paper, as Markdown."""
    parts = []
    for (number, caption), rows in pd.read_csv(DATA / "hyperparameters.csv", dtype=str).groupby(
        ["table", "caption"], sort=False
    ):
        parts += [f"**Table {number}.** {caption}.", markdown(rows[["name", "values",
                                                                    "description"]])]  # fmt: skip
    return "\n\n".join(parts)


def glossary(words: dict[str, str]) -> str:
    """Names and what they mean, as a Markdown table."""
    rows = [(f"`{name}`", text) for name, text in words.items()]
    return markdown(pd.DataFrame(rows, columns=["column", "what it is"]))


def source(thing: Callable, start: str = "") -> str:
    """The code of a function without its docstring, as a Markdown block.

    Args: start: leave out what comes before the line that begins with this.
    Raises: ValueError if no line does.
    """
    text = textwrap.dedent(inspect.getsource(thing))
    body = ast.parse(text).body[0].body
    first, lines = body[0], text.splitlines()
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        del lines[first.lineno - 1 : first.end_lineno]
    if start:
        starts = [i for i, line in enumerate(lines) if line.strip().startswith(start)]
        if not starts:
            raise ValueError(f"no line of {thing.__name__} starts with {start!r}")
        lines = textwrap.dedent("\n".join(lines[starts[0] :])).splitlines()
    return "```python\n" + "\n".join(lines) + "\n```"
