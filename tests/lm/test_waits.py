"""Inside an update the host does not wait for the device: nothing is read back from it. (In 16 bits
the first on a sampling checks itself, and does; so does one that is shared between processes.)

On a CPU nobody waits; what would make a GPU's host wait is asked for all the same, and seen here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionMaskInterface, AutoModelForCausalLM, MistralConfig

from lib.lm import network as network_module
from lib.lm.attention import SDPA, masks_unread
from lib.lm.network import Network
from lib.lm.policy import CausalPolicy
from lib.methods import METHODS
from tests.lm.test_policy import EOS, PAD, prepared, rollout
from tests.tiny_lm import SIZE, save_tiny_policy

# Operations whose result is a number on the host, or has a shape that depends on values
OPERATIONS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal",
              "repeat_interleave.Tensor"}  # fmt: skip
METHODS_OF_TENSORS = {"cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__",
                      "__index__"}  # fmt: skip


class _Operations(TorchDispatchMode):
    def __init__(self, waits: list[str]):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool
            for group in args[1:2] if isinstance(group, (list, tuple)) for x in group
        )  # fmt: skip
        if name in OPERATIONS or str(func).removeprefix("aten.") in OPERATIONS or by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, waits: list[str]):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in METHODS_OF_TENSORS:
            self.waits.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits(work) -> list[str]:
    """What `work` reads from the device."""
    seen: list[str] = []
    with _Operations(seen), _Calls(seen):
        work()
    return seen


def test_what_would_wait_is_seen():
    x = torch.arange(3.0)
    for work in (x.tolist, x.cpu, x.sum().item, lambda: bool(x.sum()), lambda: x[x > 1],
                 x.nonzero, x.unique, lambda: x.equal(x), lambda: int(x.sum()),
                 lambda: x.index_put_((x > 1,), x[0])):  # fmt: skip
        assert waits(work), work
    assert not waits(lambda: (x @ x, x[torch.tensor([0, 2])], x.clone().mul_(2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), initializer_range=0.3)


def on_a_gpu(model, method, monkeypatch, **options) -> CausalPolicy:
    """A policy that takes the way of a GPU."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(network_module, "masks_unread", lambda device: masks_unread(gpu))
    network = Network(model, value_head="value_head" in method.needs, packs=False, **options)
    network.continues = False
    return CausalPolicy(network, (EOS,), PAD, 1e-2, budget=20)


def learned(policy, method):
    data = policy.planned(prepared(policy, method, rollout()), method)
    policy.update(data, method, method.hyper, method.items(data))  # the first makes the moments
    return data.narrow(1, 4)


@pytest.mark.parametrize("dtype, checkpointing", [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("name", METHODS)
def test_no_update_waits(folder, name, dtype, checkpointing, monkeypatch):
    method = METHODS[name]
    policy = on_a_gpu(AutoModelForCausalLM.from_pretrained(folder), method, monkeypatch,
                      dtype=dtype, checkpointing=checkpointing)  # fmt: skip
    batch = learned(policy, method)
    assert len(policy._micro_batches(batch)) > 1
    seen = waits(lambda: policy.update(batch, method, method.hyper, method.items(batch)))
    assert not seen


def test_nor_does_one_of_a_model_with_a_window(monkeypatch):
    config = MistralConfig(
        vocab_size=SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    method = METHODS["dpo"]
    policy = on_a_gpu(AutoModelForCausalLM.from_config(config), method, monkeypatch)
    batch = learned(policy, method)
    assert not waits(lambda: policy.update(batch, method, method.hyper, method.items(batch)))


def test_masks_are_as_usual_on_a_cpu_and_after_an_error():
    usual = AttentionMaskInterface()[SDPA]
    with masks_unread(torch.device("cpu")):
        assert AttentionMaskInterface()[SDPA] is usual
    with pytest.raises(ZeroDivisionError), masks_unread(torch.device("cuda")):
        raise ZeroDivisionError
    assert AttentionMaskInterface()[SDPA] is usual


def test_masks_that_could_be_spared_are_built_unread_and_change_nothing(folder):
    """Of rows without padding."""
    network = Network(AutoModelForCausalLM.from_pretrained(folder), packs=False)
    tokens, found = torch.arange(12).view(3, 4), []

    def read():
        with torch.no_grad():
            found.append(network.hidden(tokens, torch.ones_like(tokens, dtype=torch.bool)))

    assert waits(read)
    with masks_unread(torch.device("cuda")):
        assert not waits(read)
    torch.testing.assert_close(*found)
    assert waits(read)  # as usual again
