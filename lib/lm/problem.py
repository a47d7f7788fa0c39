"""A length problem for `lib.training`: prompts, preference data, rewards and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lib.finetune import State
from lib.lm import length, lora
from lib.lm.batches import padded
from lib.lm.config import DTYPES, LengthRun
from lib.lm.models import (
    TokenIds,
    load_policy,
    load_reward_model,
    load_tokenizer,
    positions,
    stored_config,
    stored_ids,
)
from lib.lm.network import Network, halve
from lib.lm.pairs import SPLITS, Pairs, as_tensors, load, of_task
from lib.lm.policy import CausalPolicy, Scorer
from lib.lm.reward import RewardModel
from lib.lm.unchanged import kept_while_unchanged
from lib.methods import Method, get
from lib.randomness import uniforms
from lib.rollouts import Rollout, sequence_logp
from lib.timing import Clock

# Streams of random numbers; a run's numbers depend on its seed, the stream and a counter only.
PROMPTS, TRAIN, EVALUATE = range(3)
SMALL_SHARE = 8  # a run on less than 1 in 8 of the pairs does not have all of them scored


@dataclass(frozen=True)
class Data:
    """What all runs of one policy and task share: loaded once in a process."""

    ids: TokenIds
    prompts: dict[str, list[list[int]]]  # token ids, by split
    pairs: dict[str, Pairs]  # by split; of the task's own distribution
    target: float  # mean length of the SFT policy's responses, tokens


@kept_while_unchanged("policy", "file", maxsize=4)
def task_data(policy: Path, file: Path, task: str) -> Data:
    """Prompts and pairs of a task: a policy's folder, and the file of its pairs."""
    found = stored_ids(load_tokenizer(policy)[0], policy)
    pairs = {s: load(file, s, found.eos) for s in SPLITS}
    prompts = {split: p.prompts for split, p in pairs.items()}
    target = float(pairs["train"].lengths.mean())
    return Data(found, prompts, of_task(pairs, task), target)


@kept_while_unchanged("policy", "file", maxsize=4)
def reference_scores(
    policy: Path, file: Path, task: str, temperature: float, dtype: str, device: str
) -> tuple[Tensor, float]:
    """log pi_ref of a task's training pairs (N, 2, L), nats per token, and the seconds it took.

    The data are fixed and all offline runs of a process share them: they are scored once.
    """
    clock = Clock(device)
    with clock.measure("scoring"):
        data = task_data(policy, file, task)
        scorer = frozen_scorer(policy, data.ids, temperature, dtype, device)
        everything = torch.arange(len(data.pairs["train"]))
        batch = unlabelled(data.pairs["train"], everything, data.ids.pad, device)
        scores = scorer.score(batch)
    return scores, clock.seconds["scoring"]


def frozen_scorer(
    policy: Path, ids: TokenIds, temperature: float, dtype: str, device: str
) -> Scorer:
    """A stored policy that stays as it is."""
    model, _ = load_policy(policy, device=device)
    network = Network(model, temperature, dtype=dtype).requires_grad_(False)
    halve(network, dtype)
    return Scorer(network, ids.eos, ids.pad)


def unlabelled(pairs: Pairs, index: Tensor, pad: int, device: str) -> Rollout:
    """Some pairs as a rollout without rewards, whose log-probabilities are not known yet."""
    prompts, prompt_mask, tokens, mask = as_tensors(pairs, index, pad, device)
    return Rollout(
        prompts=prompts, prompt_mask=prompt_mask, completions=tokens, mask=mask,
        logp=torch.zeros(tokens.shape, device=device), ref=None,
        rewards=torch.zeros(tokens.shape[:2], device=device),
        scale=torch.tensor(20.0, device=device),
    )  # fmt: skip


def check_length(config: LengthRun) -> None:
    """Raises: ValueError where a completion may be longer than the policy, or the reward model that
    scores it, has positions for."""
    prompts = task_data(config.policy_folder, config.pairs_file, config.task).prompts
    folders = {"policy": config.policy_folder}
    if config.label == "learned" and config.reward_folder.is_dir():
        folders["reward model"] = config.reward_folder
    takes = {name: positions(stored_config(folder)) for name, folder in folders.items()}
    name, longest = min(takes.items(), key=lambda item: item[1])
    room = longest - max(map(len, chain(*prompts.values())))
    if config.max_tokens > room:
        raise ValueError(f"max_tokens must be at most {room}: the {name} takes {longest} tokens, "
                         f"the longest prompt among them; got {config.max_tokens}")  # fmt: skip


class LengthProblem:
    """One run of a method on a length problem."""

    def __init__(self, config: LengthRun, device: str = "cpu"):
        self.config, self.device, self.clock = config, device, Clock(device)
        self.method: Method = get(config.method)
        self.data = task_data(config.policy_folder, config.pairs_file, config.task)
        self.reference = self._scorer()
        self.reward = None
        if config.label == "learned":
            model, _ = load_reward_model(config.reward_folder, device=device)
            self.reward = RewardModel(model, dtype=config.dtype)
        self.held_out = self._held_out()

    @property
    def shown(self) -> dict[str, str]:
        """See `lib.training.TrainedProblem`."""
        gold = {} if self.config.task == length.GIVEN else {"gold": "reward"}
        return gold | {"proxy": "proxy"}

    def _scorer(self) -> Scorer:
        config = self.config
        return frozen_scorer(config.policy_folder, self.data.ids, config.sampling_temperature,
                             config.dtype, self.device)  # fmt: skip

    def _policy(self) -> CausalPolicy:
        config = self.config
        model, _ = load_policy(config.policy_folder, device=self.device)
        if config.lora_rank:
            lora.attach(model, config.lora_rank, config.seed, config.dtype)
        network = Network(model, config.sampling_temperature, "value_head" in self.method.needs,
                          config.dtype, config.checkpointing)  # fmt: skip
        return CausalPolicy(network, self.data.ids.eos, self.data.ids.pad, config.learning_rate,
                            config.clip_norm, decoder=config.decoder,
                            longest=max(map(len, chain(*self.data.prompts.values()))))  # fmt: skip

    def initial_state(self) -> State:
        """Policy = reference = the SFT policy. With LoRA they are one network, and the reference
        that was scored with so far is let go before the policy is loaded."""
        config, method = self.config, self.method
        if config.lora_rank:
            self.reference = None
        policy = self._policy()
        if config.lora_rank:
            self.reference = Scorer(lora.Base(policy.network), self.data.ids.eos, self.data.ids.pad)
        controller = method.controller(config.hyper) if method.controller else None
        return State(policy, self.reference, controller=controller)

    # --- data -------------------------------------------------------------------------------------

    def collect(self, state: State, method: Method) -> Rollout:
        """Completions of `state.behaviour` with rewards, or the run's share of the fixed pairs."""
        if not method.on_policy:
            paid = dict(self.clock.seconds)
            data = self._offline(method)
            if state.step:  # a resumed run: it has paid for its data
                self.clock.restore(paid)
            return data
        config = self.config
        minibatches = config.schedule.minibatches
        first = state.iteration * minibatches
        parts = [self._draw(state.behaviour, i) for i in range(first, first + minibatches)]
        batch = _joined(parts, self.data.ids.pad)
        if "reference" in method.needs:
            with self.clock.measure("scoring"):
                batch = replace(batch, ref=self.reference.score(batch))
        with self.clock.measure("scoring"):
            return replace(batch, rewards=self.proxy(batch))

    def _draw(self, policy: CausalPolicy, number: int) -> Rollout:
        """The run's minibatch `number`: its prompts and random numbers do not depend on B."""
        config = self.config
        groups = config.minibatch // config.completions
        chosen = self._order("train", number * groups, groups)
        prompts, prompt_mask = padded([self.data.prompts["train"][i] for i in chosen],
                                      self.data.ids.pad, "left", self.device)  # fmt: skip
        shape = (config.minibatch, config.max_tokens)
        numbers = uniforms([config.seed], TRAIN, number, shape)[0].to(self.device)
        with self.clock.measure("sampling"):
            return self._sampled(policy, prompts, prompt_mask, numbers, config.completions)

    def _sampled(
        self, policy: Scorer, prompts: Tensor, prompt_mask: Tensor, numbers: Tensor, count: int
    ) -> Rollout:
        """`count` completions for each prompt as a rollout without rewards."""
        samples = policy.sample(prompts, prompt_mask, numbers)
        shape = (len(prompts), count, numbers.shape[1])
        return Rollout(
            prompts=prompts, prompt_mask=prompt_mask,
            completions=samples.completions.view(shape), mask=samples.mask.view(shape),
            logp=samples.logp.view(shape), ref=None,
            values=None if samples.values is None else samples.values.view(shape),
            rewards=torch.zeros(shape[:2], device=self.device), scale=samples.scale,
        )  # fmt: skip

    def _order(self, split: str, start: int, count: int) -> list[int]:
        """Prompts `start` to `start + count` of an endless, reshuffled walk through a split."""
        size = len(self.data.prompts[split])
        seed = self.config.seed
        epochs = range(start // size, (start + count - 1) // size + 1)
        walk = [uniforms([seed], PROMPTS, e, (size,))[0].argsort() for e in epochs]
        offset = start - epochs[0] * size
        return torch.cat(walk)[offset : offset + count].tolist()

    def _offline(self, method: Method) -> Rollout:
        """The pairs of the run in its own order, repeated where it has more updates than pairs."""
        pairs, groups = self.data.pairs["train"], self.config.batch // 2
        pool = self._pool(len(pairs))
        walk = [uniforms([self.config.seed], PROMPTS, e, (len(pool),))[0].argsort()
                for e in range(-(-groups // len(pool)))]  # fmt: skip
        index = pool[torch.cat(walk)[:groups]]
        batch = self._labelled_pairs(pairs, index)
        logp = self._reference_scores(batch, index)
        batch = replace(batch, logp=logp, ref=logp)
        if "rewards" in method.needs:
            with self.clock.measure("scoring"):
                batch = replace(batch, rewards=self.proxy(batch))
        return batch

    def _pool(self, count: int) -> Tensor:
        """Indices of the training pairs that the run may see: all `count` of them."""
        return torch.arange(count)

    def _reference_scores(self, batch: Rollout, index: Tensor) -> Tensor:
        """log pi_ref of the pairs at `index`, read from what this process has scored already.

        A run that takes a small part of the data scores that part alone; so does one with LoRA,
        whose reference is its policy's network: a third model would have to be loaded.
        """
        config, total = self.config, len(self.data.pairs["train"])
        if config.lora_rank or SMALL_SHARE * len(index) < total:
            with self.clock.measure("scoring"):
                return self.reference.score(batch)
        # Min and Mode label the same responses; who comes first does not pay for the others
        data = "min" if config.task == "mode" else config.task
        with self.clock.aside():
            known, seconds = reference_scores(
                config.policy_folder, config.pairs_file, data, config.sampling_temperature,
                config.dtype, self.device,
            )  # fmt: skip
        self.clock.charge("scoring", seconds * len(index) / total)
        return known[index, :, : batch.mask.shape[-1]]

    def _labelled_pairs(self, pairs: Pairs, index: Tensor) -> Rollout:
        """Reward 1 for the preferred response and 0 for the other; a tie is 0 twice."""
        batch = unlabelled(pairs, index, self.data.ids.pad, self.device)
        preferred = pairs.preferred(self.config.task, self.data.target)[index.numpy()]
        rewards = torch.tensor(preferred, dtype=torch.float32, device=self.device)
        return replace(batch, rewards=rewards)

    # --- rewards ----------------------------------------------------------------------------------

    def lengths(self, batch: Rollout) -> Tensor:
        """(P, C) response tokens without EOS."""
        return length.lengths(batch.completions, batch.mask, self.reference.eos)

    def gold(self, batch: Rollout) -> Tensor:
        """(P, C) gold reward, tokens; the proxy where no rule says what is better."""
        if self.config.task == length.GIVEN:
            return self.proxy(batch)
        return length.gold(self.config.task, self.lengths(batch), self.data.target)

    def proxy(self, batch: Rollout) -> Tensor:
        """(P, C) what the methods are trained on: the reward model's score, or the rule's.

        Raises: FloatingPointError for a score that is not finite, which a method would take for the
            best of all or for a tie.
        """
        scores = self.reward.score(batch) if self.reward else self.gold(batch)
        if not scores.isfinite().all():
            raise FloatingPointError(
                f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores of the reward model "
                f"are not finite in {self.config.dtype}: dtype must be another one of {DTYPES}"
            )
        return scores

    # --- evaluation -------------------------------------------------------------------------------

    def _held_out(self) -> Rollout:
        pairs = self.data.pairs["validation"]
        preferred = pairs.preferred(self.config.task, self.data.target)
        untied = torch.tensor(preferred.any(-1)).nonzero()[:, 0]
        batch = self._labelled_pairs(pairs, untied[: self.config.held_out])
        return replace(batch, ref=self.reference.score(batch))

    @torch.no_grad()
    def evaluate(self, state: State) -> dict[str, Tensor]:
        """Metrics of the present policy on one completion of each validation prompt.

        `reward` is the gold reward whatever the training reward is.
        """
        config = self.config
        chosen = self.data.prompts["validation"][: config.prompts]
        prompts, prompt_mask = padded(chosen, self.data.ids.pad, "left", self.device)
        numbers = uniforms([config.seed], EVALUATE, state.updates,
                           (len(chosen), config.max_tokens))[0].to(self.device)  # fmt: skip
        batch = self._sampled(state.policy, prompts, prompt_mask, numbers, 1)
        kl, spread = state.policy.divergences(batch, self.reference)
        long = self.lengths(batch).float()
        ended = torch.isin(batch.completions, self.reference.eos) & batch.mask
        proxy = self.proxy(batch)
        return {
            "reward": (proxy if config.task == length.GIVEN else self.gold(batch)).mean(),
            "proxy": proxy.mean(),
            "length": long.mean(),
            "length_sd": long.std(),
            "ended": ended.any(-1).float().mean(),
            "kl_ref": kl.sum(-1).mean(),
            "entropy": spread.sum(-1).mean(),
            **self._pair_metrics(state.policy),
            **self._judged(batch, state.updates),
        }

    def _judged(self, batch: Rollout, update: int) -> dict[str, Tensor]:
        """Metrics of the sampled completions that a kind of problem adds."""
        return {}

    def _pair_metrics(self, policy: Scorer) -> dict[str, Tensor]:
        """Held-out pairs: log pi - log pi_ref (nats) of y_w and y_l, and how often y_w's is larger.

        The share is the accuracy of the policy's implicit reward (Rafailov et al. 2023).
        """
        pairs = self.held_out
        ratio = sequence_logp(policy.score(pairs) - pairs.ref, pairs.mask)
        chosen = (ratio * pairs.rewards).sum(-1)
        rejected = (ratio * (1 - pairs.rewards)).sum(-1)
        right = (chosen > rejected).float() + 0.5 * (chosen == rejected)
        return {
            "chosen_logratio": chosen.mean(),
            "rejected_logratio": rejected.mean(),
            "held_out_accuracy": right.mean(),
        }

    # --- resuming ---------------------------------------------------------------------------------

    def resumable(self, state: State) -> bool:
        """Between samplings, or at any time where the data are fixed: the sampler is not kept."""
        return state.step == 0 or not self.method.on_policy

    def save(self, state: State) -> dict[str, Tensor]:
        return state.policy.state()

    def load(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        state.policy.load_state(tensors)


def _joined(parts: list[Rollout], pad: int) -> Rollout:
    """Minibatches as one rollout; their prompts are padded on the left to one width."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.prompts.shape[1] for part in parts)

    def widened(x: Tensor, fill: int | bool) -> Tensor:
        return torch.nn.functional.pad(x, (width - x.shape[1], 0), value=fill)

    def cat(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    names = ("completions", "mask", "logp", "values", "rewards")
    return Rollout(
        prompts=torch.cat([widened(p.prompts, pad) for p in parts]),
        prompt_mask=torch.cat([widened(p.prompt_mask, False) for p in parts]),
        ref=None, scale=torch.stack([p.scale for p in parts]).amax(),
        **{name: cat(name) for name in names},
    )  # fmt: skip
