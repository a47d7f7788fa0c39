"""The didactic bandit as a problem for `lib.finetune`: prompts, rewards, data and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lib.advantages import select_best
from lib.bandit.config import VOCABULARY, BanditRun
from lib.bandit.policy import Dropout, Scorer, StackedPolicy, flat_groups
from lib.bandit.reference import load, reward_table
from lib.divergences import entropy, sequence_kl
from lib.finetune import State
from lib.methods import Method, get
from lib.randomness import uniforms
from lib.rollouts import GROUPED, Rollout, sequence_logp
from lib.timing import Clock

# Streams of random numbers; a run's numbers depend on its seed, the stream and a counter only.
PROMPTS, TRAIN, EVALUATE, HELD_OUT, DROPOUT, REFERENCE_DROPOUT = range(6)
TRACKED = 10  # prompts whose y_w and y_l are followed, of however many are trained on
BINS = 20  # of the token marginal
# Completions decoded at once, in all runs together: bounds the memory of a sampling (the cache of
# keys and values takes 12 kB a completion).
DECODE_BUDGET = 20_000


def contexts(seeds: Sequence[int]) -> Tensor:
    """(runs, 100) all contexts in each run's own random order: the first ones are its prompts."""
    return uniforms(seeds, PROMPTS, 0, (VOCABULARY,)).argsort(-1)


class BanditProblem:
    """A stack of runs that agree on everything but seed, learning rate and reward function.

    Args:
        runs: configurations with one `stack_key`.
        device: where to train.
    """

    shown = {"reward": "reward"}

    def __init__(self, runs: Sequence[BanditRun], device: str = "cpu"):
        if len({run.stack_key for run in runs}) != 1:
            raise ValueError("runs of a stack may differ in seed, rate and reward function only")
        self.config, self.device, self.clock = runs[0], device, Clock(device)
        self.method: Method = get(self.config.method)
        self.seeds = [run.seed for run in runs]
        self.rates = torch.tensor([run.learning_rate for run in runs], device=device)
        self.rewards = torch.stack([reward_table(r.reward_function) for r in runs]).to(device)
        initial = load(self.config.histogram, self.config.reference_seed)
        self.initial = {k: v.to(device) for k, v in initial.items()}
        order = contexts(self.seeds).to(device)
        self.prompts = order[:, : self.config.prompts]
        self.unseen = order[:, VOCABULARY - TRACKED :]
        self.fixed: Rollout | None = None
        self.held_out: Rollout | None = None

    def initial_state(self) -> State:
        """Policy = reference = the fitted network; also draws the pairs that are followed."""
        config = self.config
        policy = StackedPolicy(
            self.initial, self.rates, shift=config.shift,
            dropout=self._dropout(config.dropout, DROPOUT),
            reference_dropout=self._dropout(config.reference_dropout, REFERENCE_DROPOUT),
        )  # fmt: skip
        state = State(policy, Scorer(self.initial, len(self.seeds), policy.arch, config.shift))
        self.fixed = self._draw(state.reference, self.prompts, TRAIN, 0, True).narrow(
            0, min(TRACKED, config.prompts)
        )
        self.held_out = self._draw(state.reference, self.unseen, HELD_OUT, 0, True)
        return state

    def _dropout(self, rate: float, stream: int) -> Dropout | None:
        return Dropout(rate, partial(uniforms, self.seeds, stream)) if rate else None

    def collect(self, state: State, method: Method) -> Rollout:
        """k sets of C completions for every prompt, drawn from `state.behaviour`, with rewards.

        The groups are ordered set by set, so that a minibatch is one set. A set's random numbers
        depend on its place in the run alone: every B sees the same ones.
        """
        config, reference = self.config, state.reference if "reference" in method.needs else None
        if self.config.kl_penalty:
            reference = state.reference
        sets = range(state.iteration * config.sets, (state.iteration + 1) * config.sets)
        parts = [
            self._draw(state.behaviour, self.prompts, TRAIN, s, reference is not None, reference)
            for s in sets
        ]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _draw(
        self, scorer: Scorer, prompts: Tensor, stream: int, counter: int,
        scored: bool, reference: Scorer | None = None,
    ) -> Rollout:  # fmt: skip
        """One set of C completions for each of `prompts` (R, P), labelled with rewards."""
        runs, groups = prompts.shape
        shape = (groups * self.config.completions, self.config.length)
        numbers = uniforms(self.seeds, stream, counter, shape).to(self.device)
        repeated = prompts.repeat_interleave(self.config.completions, -1)
        step = max(1, DECODE_BUDGET // runs)
        with self.clock.measure("sampling"):
            parts = [
                scorer.sample(repeated[:, i : i + step], numbers[:, i : i + step])
                for i in range(0, shape[0], step)
            ]
        completions = torch.cat([p.completions for p in parts], 1)
        grid = (runs, groups, self.config.completions, self.config.length)
        logp = torch.cat([p.logp for p in parts], 1)
        if not self.config.shift:  # the released code scores its samples without the shift
            with torch.no_grad(), self.clock.measure("scoring"):
                logp = scorer.score(repeated, completions)
        ref = None
        if scored:
            same = reference is None or reference.parameters is scorer.parameters
            with torch.no_grad(), self.clock.measure("scoring"):
                ref = logp if same else reference.score(repeated, completions)
            ref = ref.view(grid)
        return Rollout(
            prompts=prompts,
            completions=completions.view(grid),
            mask=torch.ones(grid, dtype=torch.bool, device=self.device),
            logp=logp.view(grid),
            ref=ref,
            rewards=self.label(prompts, completions.view(grid)),
            scale=torch.stack([p.scale for p in parts]).amax(0),
            lead=1,
        )

    def resumable(self, state: State) -> bool:
        """Always: the sampler is saved beside the policy."""
        return True

    def save(self, state: State) -> dict[str, Tensor]:
        """Policy and sampler, for `load`."""
        tensors = {f"policy.{k}": v for k, v in state.policy.state_dict().items()}
        return tensors | {
            f"behaviour.{k}": v.contiguous() for k, v in state.behaviour.parameters.items()
        }

    def load(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        part = {p: {k[len(p) + 1 :]: v for k, v in tensors.items() if k.startswith(p + ".")}
                for p in ("policy", "behaviour")}  # fmt: skip
        policy = state.policy
        policy.load_state_dict(part["policy"])
        sampler = {k: v.to(self.device) for k, v in part["behaviour"].items()}
        state.behaviour = Scorer(sampler, len(policy.flat), policy.arch, policy.shift)

    def label(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Mean token reward. prompts (R, P), completions (R, P, C, L) -> (R, P, C).

        With `reward_over="prompt_and_response"`, the released code's convention, the prompt's own
        token counts too, so that the best completion's reward depends on its prompt.
        """
        tokens = self._token_rewards(completions)
        if self.config.reward_over == "response":
            return tokens.mean(-1)
        first = self._token_rewards(prompts)[..., None]
        return (tokens.sum(-1) + first) / (self.config.length + 1)

    def _token_rewards(self, tokens: Tensor) -> Tensor:
        return self.rewards.gather(1, tokens.flatten(1)).view(tokens.shape)

    @torch.no_grad()
    def evaluate(self, state: State) -> dict[str, Tensor]:
        """Metrics of the current policy, each (R,), on one completion for each of 100 contexts.

        `reward` is the text's (mean over the response) whatever the training reward is.
        """
        config, policy, runs = self.config, state.policy, len(self.seeds)
        prompts = torch.arange(VOCABULARY, device=self.device).expand(runs, -1)
        numbers = uniforms(self.seeds, EVALUATE, state.updates, (VOCABULARY, config.length))
        samples = policy.sample(prompts, numbers.to(self.device), keep=True)
        logp = samples.distributions
        counted = torch.ones_like(samples.completions, dtype=torch.bool)
        reference = state.reference.distributions(prompts, samples.completions)
        generating = reference  # at the start, and for good where all data are drawn at the start
        if self.method.on_policy and state.behaviour is not None:
            generating = state.behaviour.distributions(prompts, samples.completions)
        probabilities = logp.exp()
        expected = torch.einsum("rslv,rv->rsl", probabilities, self.rewards)
        return {
            "reward": expected.mean((1, 2)),
            "kl_ref": sequence_kl(logp, reference, counted).mean(-1),
            "kl_gen": sequence_kl(logp, generating, counted).mean(-1),
            "entropy": entropy(logp).sum(-1).mean(-1),
            "support_share": self._support_share(probabilities),
            **self._log_ratios(policy, self.fixed, ""),
            **(self._log_ratios(policy, self.held_out, "held_out_") if config.held_out else {}),
            **self._marginal(probabilities),
        }

    def _support_share(self, probabilities: Tensor) -> Tensor:
        """Mass on tokens that the fixed data hold at the same prompt and position: (R,)."""
        data = self.fixed.completions  # (R, P, C, L)
        rows = self.fixed.prompts[..., None, None].expand(*self.fixed.prompts.shape,
                                                          *probabilities.shape[2:])  # fmt: skip
        mass = probabilities.gather(1, rows)  # (R, P, L, V): of the followed prompts
        seen = torch.zeros_like(mass).scatter_(-1, data.transpose(-1, -2), 1.0)
        return (mass * seen).sum(-1).mean((1, 2))

    def _log_ratios(self, policy: Scorer, pairs: Rollout, prefix: str) -> dict[str, Tensor]:
        """Mean log pi - log pi_ref (nats) of y_w (best of N) and y_l (the other N - 1)."""
        logp = policy.score(*flat_groups(pairs)).view_as(pairs.ref)
        ratio = sequence_logp(logp - pairs.ref, pairs.mask)
        best = select_best(pairs.rewards)
        return {
            f"{prefix}chosen_logratio": (ratio * best).sum(-1).mean(-1),
            f"{prefix}rejected_logratio": (ratio * ~best).sum(-1).mean(-1) / (best.shape[-1] - 1),
        }

    def _marginal(self, probabilities: Tensor) -> dict[str, Tensor]:
        """The policy's mass on each of 20 bins of 5 tokens, over contexts and positions."""
        mass = probabilities.mean((1, 2)).unflatten(-1, (BINS, -1)).sum(-1)
        return {f"mass_{5 * i:02d}": mass[:, i] for i in range(BINS)}


def _joined(parts: list[Rollout]) -> Rollout:
    """One rollout whose groups are those of `parts`, in order."""

    def cat(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values, 1)

    scale = torch.stack([part.scale for part in parts]).amax(0)
    return Rollout(**{name: cat(name) for name in GROUPED}, scale=scale, lead=1)
