"""The decision chart as a page shows it: `lib.decisions`' leaves as nested lists that open.

Markdown between lines of HTML, so that it reads the same in a notebook and in the book, on a phone
(one column, nothing is drawn) and aloud: question, answer, outcome, methods, evidence. The look is
in `book/assets/static/custom.css`. Chapter: index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from lib import methods
from lib.cards import link
from lib.chapter import BADGES
from lib.decisions import (
    MIN_SEEDS,
    NOT_YET,
    OUTCOMES,
    PLACES,
    SAMPLING,
    Entry,
    Leaf,
    Standing,
    by_side,
    label,
    recommended,
)

QUESTIONS = (
    "Can you sample while you train?",
    "Where is the reward's peak?",
    "Do the preference pairs come near the peak?",
)
CLASSES = dict(zip(OUTCOMES, ("reproduced", "partly", "not reproduced", "inconclusive",
                              "not judged"), strict=True))  # fmt: skip
SPACE = "\N{NO-BREAK SPACE}"


def chart(leaves: Sequence[Leaf]) -> str:
    """The whole tree as Markdown with HTML. Args: leaves: as `lib.decisions.leaves` has them."""
    at = {(leaf.choice, leaf.place): leaf for leaf in leaves}
    near, apart, close = PLACES
    answers = []
    for choice, answer in SAMPLING.items():
        pairs = _list([_leaf("No: they are what the model writes.", at[choice, apart]),
                       _leaf("Yes, they do.", at[choice, close])])  # fmt: skip
        peak = _list([_leaf("Near what the model writes.", at[choice, near]),
                      f"Far from it. *{QUESTIONS[2]}*\n\n{pairs}"])  # fmt: skip
        answers.append(f"**{answer}** *{QUESTIONS[1]}*\n\n{peak}")
    return f'<div class="chart">\n\n**{QUESTIONS[0]}**\n\n{_list(answers)}\n\n</div>'


def _list(items: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>\n\n{item}\n\n</li>" for item in items) + "\n</ul>"


def _leaf(answer: str, leaf: Leaf) -> str:
    """An answer that opens: what to take in the line that always shows, the evidence below it."""
    badge = f'<span class="verdict-{BADGES[CLASSES[leaf.outcome]]}">{_paper(leaf.outcome)}</span>'
    head = f"<summary>{answer} {take(leaf)} {badge}</summary>"
    return "\n\n".join(["<details>", head, *map(_standing, leaf.standings), _verdicts(leaf),
                        "</details>"])  # fmt: skip


def _paper(outcome: str) -> str:
    """An outcome as a label: it speaks of the paper's comparisons, not of the recommendation."""
    return outcome if outcome == NOT_YET or "paper" in outcome else f"paper: {outcome}"


def take(leaf: Leaf) -> str:
    """What a leaf recommends, in words that say how sure that is; where one sampling serves more
    updates on some of its problems than on others, by rule 4 for either."""
    if leaf.outcome == NOT_YET:
        return ""
    if not any(s.votes for s in leaf.standings):
        return f"Fewer than {MIN_SEEDS} seeds so far."
    rates = sorted({s.serves for s in leaf.standings if s.votes})
    if len(rates) == 1:
        return _take(leaf)
    parts = []
    for rate in rates:  # what bears four updates need not bear fifty
        own = tuple(s for s in leaf.standings if s.serves == rate)
        found = _take(replace(leaf, standings=own, recommended=recommended(own)))
        parts.append(f"For {rate} updates: {found[0].lower()}{found[1:]}")
    return " ".join(parts)


def _take(leaf: Leaf) -> str:
    """The same for problems on which one sampling serves as many updates."""
    if not leaf.recommended:
        return "No method leads on all its problems."
    safe = [name for name in leaf.recommended if not any(e.harms for e in leaf.found(name))]
    sunk = [name for name in leaf.recommended if _sunk(name, leaf)]
    risky = [name for name in leaf.recommended if name not in (*safe, *sunk)]
    leading = "Leading so far" if leaf.outcome == "inconclusive" else "Leading"
    words = {leading: safe, f"{leading}, but a run ended below the untrained model": risky,
             "Too scattered to judge, the mean is below the untrained model": sunk}  # fmt: skip
    return " ".join(f"{word}: {_by_side(some, leaf)}." for word, some in words.items() if some)


def _sunk(name: str, leaf: Leaf) -> bool:
    """Whether a method's mean lies below the untrained model, by more than the margin, on one of
    the leaf's problems where another's does not."""
    return any(e.mean < s.start - s.problem.margin <= max(other.mean for other in s.entries)
               for s in leaf.standings if s.votes for e in s.entries if label(e.method) == name)


def _by_side(labels: Sequence[str], leaf: Leaf) -> str:
    """ "on-policy DPO (1 of 3), IPO; offline DPO" from labels such as "DPO (offline)".

    In brackets, on how many of the leaf's problems a method ran, where it did not run on all.
    """
    voting = sum(s.votes for s in leaf.standings)

    def partly(name: str) -> str:
        ran = len(leaf.found(name))
        return f" ({ran} of {voting})" if ran < voting else ""

    return by_side(labels, partly)


def _standing(found: Standing) -> str:
    links = ", ".join(map(link, found.chapters))
    n = f"{found.n} seed{'s' if found.n > 1 else ''}"
    n += f", one sampling for {found.serves} updates" if found.serves > 1 else ""
    if not found.votes:
        return (f"**{found.problem.title}**: {n}; too few seeds to count. Seeds in which each came "
                f"first: {_counts(found.entries)}. Evidence: {links}.")  # fmt: skip
    behind = [e for e in found.entries if not e.leads]
    lines = [_entry(e, found) for e in found.entries if e.leads]
    lines += [f"- Behind (seeds in which it came first): {_counts(behind)}"] if behind else []
    lines += _memory(found.entries)
    start = f"untrained {found.start:.2f}{found.problem.unit}"
    if not found.solved:
        start += ", above which no method ends"
    head = f"**{found.problem.title}** ({start}): {n}. Evidence: {links}."
    return f"{head}\n\n" + "\n".join(lines)


def _counts(entries: Iterable[Entry]) -> str:
    return ", ".join(f"{label(e.method)} {e.first}" for e in entries)


def _entry(e: Entry, found: Standing) -> str:
    """ "DPO (offline): first in 17 of 20 (64% to 95%); final reward 0.87 (0.80 to 0.95) ..."."""
    what = "drawn" if methods.get(e.method).on_policy else "given"
    return (f"- **{label(e.method)}**: first in {e.first} of {found.n} "
            f"({100 * e.low:.0f}% to {100 * e.high:.0f}%); "
            f"final reward {e.mean:.2f} ({e.mean_low:.2f} to {e.mean_high:.2f})"
            f"{found.problem.unit}, worst run {e.worst:.2f}; {e.completions:,.0f} completions "
            f"{what}, {e.seconds:.1f}{SPACE}s")  # fmt: skip


def _memory(entries: Sequence[Entry]) -> list[str]:
    """The memory of the leading methods, which differs little between them."""
    values = [e.memory for e in entries if e.leads and np.isfinite(e.memory)]
    if not values:
        return []
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return [f"- Peak memory, estimated: {low if low == high else f'{low} to {high}'} MiB"]


def _verdicts(leaf: Leaf) -> str:
    if not leaf.verdicts:
        return "No comparison of the paper's claims bears on this answer."
    counts = ", ".join(f"{leaf.verdicts[v]} {v}" for v in BADGES if leaf.verdicts.get(v))
    return (f"The paper's comparisons that bear on this: {counts} "
            f"({', '.join(map(link, leaf.chapters))}).")  # fmt: skip


def table(leaves: Iterable[Leaf]) -> pd.DataFrame:
    """Every number of the chart, one row per leaf, problem and method."""
    rows = []
    for leaf in leaves:
        for found in leaf.standings:
            for e in found.entries:
                rows.append({
                    "sampling": leaf.choice, "peak": leaf.place[0], "pairs": leaf.place[1] or "",
                    "outcome": leaf.outcome, "problem": found.problem.name, "seeds": found.n,
                    **vars(e),
                })  # fmt: skip
    return pd.DataFrame(rows)
