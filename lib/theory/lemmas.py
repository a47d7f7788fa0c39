"""Checks of section E.1 (Lemmas E.1 to E.3, E.1.2, E.1.4) and of early stopping (section 5).

As in `lib.theory.cases`: n random cases and a seed in, what was `Found` out. Chapter: theory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lib import losses
from lib.divergences import categorical_kl
from lib.theory import contrast, draws, early
from lib.theory import identities as ids
from lib.theory.dynamics import OBJECTIVES, descend, reverse_push
from lib.theory.found import Found, equal, positive, same_sign, together

BETA, TAU = 0.1, 0.05  # DPO's and IPO's, as in the bandit
MEMBERS = (4, 60)  # targets of each kind in the family of early stopping: at least, at most


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0]


def _problems(n: int, seed: int):
    """Random (policy logits, ref, reward, beta): reward and beta (m, V) and (m, 1)."""
    generator = torch.Generator().manual_seed(seed)
    for logp, ref in draws.pairs(n, seed):
        reward = torch.rand(logp.shape, generator=generator, dtype=torch.float64)
        beta = 10 ** (2 * torch.rand(len(logp), 1, generator=generator, dtype=torch.float64) - 1.5)
        yield logp.clone().requires_grad_(), ref, reward, beta


# Lemma E.1


def rl_identity(n: int, seed: int) -> Found:
    """Value and gradient of E r - beta KL(pi || ref) against beta log Z - beta KL(pi || pi*)."""
    parts = []
    for leaf, ref, reward, beta in _problems(n, seed):
        best, log_z = ids.optimal_policy(ref, reward, beta)
        logp, b = leaf.log_softmax(-1), beta[:, 0]
        objective = ids.expected(logp, reward) - b * categorical_kl(logp, ref)
        reverse = b * log_z - b * categorical_kl(logp, best)
        parts.append(equal(objective.detach(), reverse.detach()))
        push = beta * reverse_push(logp.detach(), best)
        parts.append(equal(_gradient(objective, leaf), push))
    return together(*parts)


def wl_reverse_kl(n: int, seed: int) -> Found:
    """At pi* the gradient of the reverse KL is 0; is that of on-policy weighted likelihood?"""
    parts = []
    for _, ref, reward, beta in _problems(n, seed):
        best, _ = ids.optimal_policy(ref, reward, beta)
        push = ids.weighted_likelihood_push(best, (reward / beta).exp() / (1 / beta).exp())
        parts.append(equal(push, torch.zeros_like(push), optimum=best.exp(), push=push))
    return together(*parts)


def wl_is_policy_gradient(n: int, seed: int) -> Found:
    """Weighted likelihood on own samples is the gradient of E_pi F: Eq. (6) with beta = 0."""
    parts = []
    for leaf, _, reward, _ in _problems(n, seed):
        logp = leaf.log_softmax(-1)
        exact = _gradient(ids.expected(logp, reward), leaf)
        parts.append(equal(ids.weighted_likelihood_push(logp.detach(), reward), exact))
    return together(*parts)


def wl_path(n: int, seed: int) -> Found:
    """k full fits with F = exp(r / beta) end at the optimum of Eq. (6) with beta / k."""
    parts, rounds = [], 3
    for _, ref, reward, beta in _problems(n, seed):
        policy = ref
        for _ in range(rounds):
            policy = ids.next_policy(policy, (reward / beta).clamp(max=200).exp())
        parts.append(equal(policy.exp(), ids.optimal_policy(ref, reward, beta / rounds)[0].exp()))
    return together(*parts)


def _equation_6(printed: bool, n: int, seed: int) -> Found:
    """Eq. (6) against the last line of the proof, -beta log Z + beta KL(pi || pi*)."""
    parts = []
    for leaf, ref, reward, _ in _problems(n, seed):
        logp = leaf.detach()
        loss = ids.printed_loss if printed else lambda *a: -ids.rl_objective(*a)
        claimed = -ids.rl_as_reverse_kl(logp, ref, reward, BETA)
        parts.append(equal(loss(logp, ref, reward, BETA), claimed, pi=logp.exp(), ref=ref.exp()))
    return together(*parts)


# Lemma E.2


def _scores(n: int, seed: int):
    """Models with shared parameters: log pi = softmax(features @ theta), 5 completions.

    Yields p (n, 5) and the gradients grad log pi(y) (n, 5, d) = feature - mean feature, d = 1 to 8.
    """
    generator = torch.Generator().manual_seed(seed)
    for width in (1, 2, 4, 8):
        m = -(-n // 4)
        features = torch.randn(m, 5, width, generator=generator, dtype=torch.float64)
        p = draws.distributions(m, 5, generator).exp()
        yield p, features - (p[..., None] * features).sum(1, keepdim=True)


def _products(scores: Tensor) -> Tensor:
    return scores @ scores.transpose(-1, -2)


def margin_exists(n: int, seed: int) -> Found:
    """y_w = 0: some y_l other than y_w has c2 (|g_l|^2 - g_l . g_w) > 0, so (8) holds strictly."""
    parts = []
    for p, g in _scores(n, seed):
        extra = contrast.extra_margin(g[:, :1], g[:, 1:], 1.0)
        parts.append(positive(extra.amax(-1), _products(g).abs().amax((1, 2)) > 1e-9, p=p))
    return together(*parts)


def aligned_exists(n: int, seed: int) -> Found:
    """y_w = 0: some other y_l has g_w . g_l <= 0."""
    parts = [positive(1e-12 - _products(g)[:, 0, 1:].amin(-1), p=p) for p, g in _scores(n, seed)]
    return together(*parts)


def _extra(printed: bool, n: int, seed: int) -> Found:
    """The proof's Delta against the margin's change when the update is really made (rate 1)."""
    parts, (c1, c2) = [], (0.7, 0.3)
    for _, g in _scores(n, seed):
        w, l = g[:, 0], g[:, 1]  # noqa: E741
        made = ((c1 * w - c2 * l) * (w - l)).sum(-1) - (c1 * w * (w - l)).sum(-1)
        said = (contrast.printed_extra_margin(w, l, c1, c2) if printed
                else contrast.extra_margin(w, l, c2))  # fmt: skip
        parts.append(equal(said, made, g_w=w, g_l=l, printed=said, true=made))
    return together(*parts)


def _weights(logp: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(2, len(logp), generator=generator, dtype=torch.float64)
    c1, c2 = torch.exp(4 * drawn - 3)
    return c1, c2


def _least_lead(logp: Tensor, c1: Tensor, c2: Tensor, rate: float, steps: int) -> Tensor:
    """Least lead of the margin with c2 over the margin with c2 = 0 (categories 0 and 1): (n,)."""
    ahead, behind, least = logp, logp, torch.full_like(c1, torch.inf)
    for _ in range(steps):
        ahead = descend(ahead, contrast.pair_push(ahead, 0, 1, c1, c2), rate)
        behind = descend(behind, contrast.pair_push(behind, 0, 1, c1, 0 * c2), rate)
        lead = ahead[:, 0] - ahead[:, 1] - behind[:, 0] + behind[:, 1]
        least = torch.minimum(least, lead)
    return least


def margin_steps(n: int, seed: int) -> Found:
    """Independent logits, y_w and y_l fixed, small steps: (8) after each of 50."""
    parts = []
    for rate in (0.01, 0.1):
        for logp, _ in draws.pairs(n // 4 + 5, seed):
            c1, c2 = _weights(logp, seed)
            least = _least_lead(logp, c1, c2, rate, 50)
            parts.append(positive(least + 1e-9, p=logp.exp(), c1=c1, c2=c2))
    return together(*parts)


def margin_induction(n: int, seed: int) -> Found:
    """Ahead at t, so ahead at t + 1? Three categories, logits (-100, -40, 0), c1 = 3, rate 1."""
    logits = torch.tensor([[-100.0, -40.0, 0.0]], dtype=torch.float64)
    c1, c2 = logits.new_tensor([3.0]), logits.new_tensor([0.1])
    least = _least_lead(logits.log_softmax(-1), c1, c2, 1.0, 60)
    return positive(least, logits=logits, c1=c1, c2=c2, lead=least)


def aligned_lift(n: int, seed: int) -> Found:
    """The first-order change of log pi(y_w) by the push on y_l: sign and formula, by autograd."""
    parts = []
    for logp, _ in draws.pairs(n, seed):
        rate = torch.zeros(len(logp), 1, dtype=torch.float64, requires_grad=True)
        after = (logp - rate * contrast.score(logp, 1)).log_softmax(-1)
        slope = _gradient(after[:, 0], rate)[:, 0]
        parts.append(equal(slope, contrast.lift(logp, 0, 1)))
        aligned = (contrast.score(logp, 0) * contrast.score(logp, 1)).sum(-1) < -1e-9
        parts.append(positive(slope, aligned, p=logp.exp()))
    return together(*parts)


def tie() -> Tensor:
    """log p of three categories with g_w . g_l = 0: p_w = p_l = a, 6 a^2 - 6 a + 1 = 0."""
    a = (3 - 3**0.5) / 6
    return torch.tensor([a, a, 1 - 2 * a], dtype=torch.float64).log()


def aligned_tie(n: int, seed: int) -> Found:
    """(9) as printed, with <= 0: at g_w . g_l = 0 and c1 = 0, a step of any size lowers y_w."""
    logp, rates = tie(), torch.logspace(-4, 0, 9, dtype=torch.float64)
    after = (logp - rates[:, None] * contrast.score(logp, 1)).log_softmax(-1)
    return positive(after[:, 0] - logp[0], p=logp.exp().expand(9, -1), rate=rates)


def rejected_falls(n: int, seed: int) -> Found:
    """(10): the push on y_l lowers log pi(y_l), one step of size 0.1, aligned or not."""
    parts = []
    for logp, _ in draws.pairs(n, seed):
        c1, c2 = _weights(logp, seed)
        change = [descend(logp, contrast.pair_push(logp, 0, 1, c1, c), 0.1)[:, 1]
                  for c in (0 * c2, c2)]  # fmt: skip
        parts.append(positive(change[0] - change[1], p=logp.exp()))
    return together(*parts)


# E.1.2: where the mass goes


def mode_first(n: int, seed: int) -> Found:
    """Among categories other than y_l none gains more than the likeliest, by the push on y_l."""
    parts = []
    for logp, _ in draws.pairs(n, seed, (3, 4, 8, 32)):
        gains = contrast.freed_mass(logp, 0)[:, 1:]
        mode = logp[:, 1:].argmax(-1, keepdim=True)
        parts.append(positive(gains.gather(-1, mode)[:, 0] - gains.amax(-1), p=logp.exp()))
    return together(*parts)


def mode_most(n: int, seed: int) -> Found:
    """The likeliest other category gains more than half of what y_l loses (y_l is the first)."""
    parts = []
    for logp, _ in draws.pairs(n, seed, (3, 4, 8, 32)):
        share = contrast.mode_share(logp, 0)
        clear = (logp[:, 0] > -14) & (logp.exp().amax(-1) < 1 - 1e-6)  # no loss of digits
        parts.append(positive(share - 0.5, clear, p=logp.exp(), share=share))
    return together(*parts)


def _other(logp: Tensor) -> Callable[[Tensor], Tensor]:
    """Outside the pair, a value at the likeliest category minus that at the least likely one."""
    mode, least = logp[:, 2:].argmax(-1, keepdim=True), logp[:, 2:].argmin(-1, keepdim=True)
    return lambda x: (x[:, 2:].gather(-1, mode) - x[:, 2:].gather(-1, least))[:, 0]


def mode_pair(n: int, seed: int) -> Found:
    """DPO and IPO, c1 = c2: the mode gains on other categories outside the pair."""
    parts = []
    for logp, _ in draws.pairs(n, seed, (4, 8, 32)):
        push = contrast.pair_push(logp, 0, 1, 1.0, 1.0)
        parts.append(positive(_other(logp)(push) - 1e-12, p=logp.exp()))
    return together(*parts)


def mode_weights(n: int, seed: int) -> Found:
    """The mode gains on the others by (c2 - c1)(p_m - p_k): none at c1 = c2, (eq-pair-push)."""
    parts = []
    for logp, _ in draws.pairs(n, seed, (4, 8, 32)):
        c1, c2 = _weights(logp, seed)
        apart, push = _other(logp), contrast.pair_push(logp, 0, 1, c1, c2)
        parts.append(equal(apart(push), (c2 - c1) * apart(logp.exp())))
    return together(*parts)


def freed_formula(n: int, seed: int) -> Found:
    """p_k (p_k + p_l - sum p^2) and -p_l (1 - 2 p_l + sum p^2), against autograd."""
    parts = []
    for logp, _ in draws.pairs(n, seed):
        rate = torch.zeros(len(logp), 1, dtype=torch.float64, requires_grad=True)
        after = (logp - rate * contrast.score(logp, 0)).softmax(-1)
        slope = torch.stack([_gradient(mass, rate)[:, 0] for mass in after.unbind(-1)], -1)
        p, square = logp.exp(), (logp.exp() ** 2).sum(-1, keepdim=True)
        closed = p * (p + p[:, :1] - square)
        closed[:, 0] = -p[:, 0] * (1 - 2 * p[:, 0] + square[:, 0])
        parts += [equal(closed, slope), equal(contrast.freed_mass(logp, 0), slope)]
    return together(*parts)


# Lemma E.3


def offline_identity(n: int, seed: int) -> Found:
    """Value and gradient of Eq. (11) against Z KL(ref F / Z || pi) + Z H."""
    parts = []
    for leaf, ref, weight, _ in _problems(n, seed):
        logp = leaf.log_softmax(-1)
        loss, kl = ids.offline_loss(logp, ref, weight), ids.offline_as_forward_kl(logp, ref, weight)
        parts.append(equal(loss.detach(), kl.detach()))
        target, log_z = ids.reweighted(ref, weight)
        push = log_z.exp()[:, None] * (target.exp() - logp.detach().exp())
        parts.append(equal(-_gradient(loss, leaf), push))
    return together(*parts)


def offline_condition(n: int, seed: int) -> Found:
    """Z > 0 where sum_y F > 0, as printed: F positive only where pi_ref has no mass."""
    ref = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    weight = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    return positive((ref * weight).sum(-1) - 1e-9, weight.sum(-1) > 0, pi_ref=ref, F=weight)


# E.1.4


def _form(loss: Callable, weight: Callable, hyper: float, n: int, seed: int) -> Found:
    """The loss's gradient with respect to logits against -weight (e_w - e_l)."""
    parts = []
    for logp, ref in draws.pairs(n, seed):
        leaf = logp.clone().requires_grad_()
        prefer = torch.zeros(2, 2, dtype=torch.bool)
        prefer[0, 1] = True
        item = loss(leaf.log_softmax(-1)[:, :2], ref[:, :2], prefer, hyper)
        c = weight((logp - ref)[:, 0] - (logp - ref)[:, 1], hyper)
        parts.append(equal(-_gradient(item, leaf), contrast.pair_push(logp, 0, 1, c, c)))
    return together(*parts)


def _margins(n: int, seed: int) -> Tensor:
    """Margins h of random policies and references, in nats."""
    ratios = [logp - ref for logp, ref in draws.pairs(n, seed)]
    return torch.cat([ratio[:, 0] - ratio[:, 1] for ratio in ratios])


def dpo_sign(n: int, seed: int) -> Found:
    h = _margins(n, seed)
    return positive(contrast.dpo_weight(h, BETA), h=h)


def ipo_sign(n: int, seed: int) -> Found:
    h = _margins(n, seed)
    return positive(contrast.ipo_weight(h, TAU), h=h, weight=contrast.ipo_weight(h, TAU))


def ipo_sign_region(n: int, seed: int) -> Found:
    """IPO's weight is positive exactly while h < 1 / (2 tau)."""
    h = _margins(n, seed)
    return same_sign(contrast.ipo_weight(h, TAU), 0.5 / TAU - h, h=h)


# Section 5: early stopping


def _early(column: str, n: int, seed: int) -> Found:
    table = early.compared(max(MEMBERS[0], min(n // 500, MEMBERS[1])), seed)
    values = table[column].dropna()
    broken = values.index[values == 0]
    example = ""
    if len(broken):
        row = table.loc[broken[0]]
        times = " and ".join(f"{row[f'time_{o}']:.1f} ({o})" for o in OBJECTIVES)
        example = f"{row['start']} start, {row['count']} likely categories: half at {times}"
    return Found(len(values), len(broken), 0.0, example)


CHECKS = {f.__name__.replace("_", "-"): f for f in (
    rl_identity, wl_reverse_kl, wl_is_policy_gradient, wl_path,
    margin_exists, margin_steps, margin_induction, aligned_exists, aligned_lift, aligned_tie,
    rejected_falls, mode_first, mode_most, mode_pair, mode_weights, freed_formula,
    offline_identity, offline_condition, dpo_sign, ipo_sign, ipo_sign_region,
)} | {
    "early-subset": partial(_early, "subset_reverse"),
    "early-sooner": partial(_early, "sooner"),
    "early-wider": partial(_early, "wider"),
    "rl-bracket": partial(_equation_6, True),
    "rl-bracket-corrected": partial(_equation_6, False),
    "extra-printed": partial(_extra, True),
    "extra-corrected": partial(_extra, False),
    "dpo-form": partial(_form, losses.dpo, lambda *a: contrast.dpo_weight(*a), BETA),
    "ipo-form": partial(_form, losses.ipo, contrast.ipo_weight, TAU),
}  # fmt: skip
