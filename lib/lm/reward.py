"""Reward models: scores of completions by a sequence classifier with one label."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.lm.policy import TOKEN_BUDGET, Rows
from lib.rollouts import Rollout


class RewardModel:
    """Scores completions. A score depends on its own tokens only: not on batch, side or neighbours.

    Args: model: a transformers sequence classifier of a causal architecture with one label.
    Raises: ValueError if the model is none.
    """

    def __init__(self, model: PreTrainedModel, budget: int = TOKEN_BUDGET):
        if getattr(model, "num_labels", None) != 1 or not hasattr(model, "score"):
            raise ValueError(
                f"{type(model).__name__} is no reward model: it must be a causal architecture's "
                "ForSequenceClassification with one label (num_labels=1)"
            )
        self.model, self.budget = model.eval(), budget

    @torch.no_grad()
    def score(self, batch: Rollout) -> Tensor:
        """(P, C) scores. The head reads the state of a completion's last token.

        transformers looks for that token by comparing ids with the padding id, which goes wrong
        where padding is EOS; here the mask says where it is.
        """
        rows = Rows.of(batch)
        out = torch.zeros(len(rows.mask), device=self.model.device)
        for index in rows.buckets(self.budget):
            part = rows.pick(index)
            tokens = torch.cat([part.prompts, part.completions], 1)
            mask = torch.cat([part.prompt_mask, part.mask], 1)
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            hidden = self.model.base_model(
                input_ids=tokens, attention_mask=mask, position_ids=positions
            ).last_hidden_state
            last = part.prompts.shape[1] + part.mask.sum(-1) - 1
            state = hidden[torch.arange(len(index), device=hidden.device), last]
            out[index] = self.model.score(state).float()[:, 0]
        return out.view(batch.rewards.shape)
