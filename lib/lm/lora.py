"""LoRA: small matrices that train beside frozen weights (Hu et al. 2022). Chapter: length.

A linear layer W x becomes W x + s B A x with A (r, inputs), B (outputs, r) and s = `SCALE`. B is 0
at the start, so the policy then is the reference, and the reference stays what the layers compute
with the adapters off: nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from lib.lm.network import Network, halve

SCALE = 2  # s; peft's alpha is s r


def attach(model: PreTrainedModel, rank: int, seed: int, dtype: str = "float32") -> None:
    """Adapters on every linear layer but the head; the model's own weights are frozen, in place.

    Args: seed: of A. dtype: of the matrix products (see `halve`).
    """
    how = LoraConfig(r=rank, lora_alpha=SCALE * rank, lora_dropout=0.0, target_modules="all-linear")
    with torch.random.fork_rng(devices=()):  # peft draws A on the CPU
        torch.manual_seed(seed)
        inject_adapter_in_model(how, model)
    halve(model, dtype)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model without what its adapters add."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class Base(Network):
    """A network as it is without its adapters; all weights are shared with it.

    For scoring: it has no value head, and gradients do not pass through it.
    """

    def __init__(self, network: Network):
        nn.Module.__init__(self)
        self.model, self.value = network.model, None
        self.temperature, self.dtype = network.temperature, network.dtype
        self.packs = network.packs
        self.checkpointing, self.continues = False, network.continues

    @torch.no_grad()
    def hidden(
        self, tokens: Tensor, mask: Tensor, cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        with switched_off(self.model):
            return super().hidden(tokens, mask, cache, positions)
