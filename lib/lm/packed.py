"""What a CPU multiplies by, laid out for it once and not at every product.

A step of decoding multiplies a few rows by every matrix of the model: PyTorch's products would lay
each weight out anew at every token. Here weights are packed by oneDNN once for many products.
Rounding differs, the arithmetic does not. Nothing changes elsewhere than on a CPU, nor for a model
that is not `large`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lib.lm.attention import many_queries
from lib.lm.outputs import Outputs

# Bytes of float32 weights below which a processor's cache holds them, and nothing is done here.
FITS = 2**25
PIECE = 2**18  # logits of which all is computed at once: 1 MB


def large(model: nn.Module) -> bool:
    """Whether a model stands on a CPU whose cache does not hold the weights of its linear layers:
    for this module, and for `Chosen`."""
    weights = [m.weight for m in model.modules() if type(m) is nn.Linear]
    here = all(w.device.type == "cpu" for w in weights)
    return here and 4 * sum(w.numel() for w in weights) >= FITS


@contextmanager
def packed(
    model: nn.Module, dtype: str, rows: int, outputs: Outputs | None = None
) -> Iterator[torch.dtype | None]:
    """A `large` model's linear layers with packed weights, which must not change inside. Where
    gradients are wanted the transposed weights, which pass them back, are packed as well; in
    bfloat16 those alone whose outputs are known, since others gain 1% of a step at most. It attends
    by `many_queries`.

    Args: dtype: of the products. rows: that are multiplied at once, roughly. outputs: where
        products are noted, or where gradients are wanted taken from.
    Yields: that dtype, or None where nothing is packed.
    """
    of, trains = getattr(torch, dtype), torch.is_grad_enabled()
    layers = [m for m in model.modules() if type(m) is nn.Linear] if large(model) else []
    if not all(_packable(m, of) for m in layers):  # keys would be of another dtype than queries
        layers = []
    attention = many_queries(of) if layers else nullcontext()
    if trains and of != torch.float32:
        layers = [m for m in layers if outputs is not None and m in outputs]
    try:
        for layer in layers:
            layer.forward = _packed_forward(layer, of, rows, outputs)
        with attention:
            yield of if layers else None
    finally:
        for layer in filter(is_packed, layers):
            del layer.forward  # the class's own again


def is_packed(layer: nn.Module) -> bool:
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def takes(layer: nn.Module) -> bool:
    """Whether a packed layer takes its products from `Outputs`."""
    return is_packed(layer) and layer.forward.args[1] is None


def _packable(layer: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether a linear layer's forward pass is its class's own, and its weight a plain one."""
    return (
        "forward" not in vars(layer) and type(layer.weight) is nn.Parameter
        and layer.weight.dtype in (torch.float32, dtype) and _packs(dtype)
    )  # fmt: skip


def _packed_forward(
    layer: nn.Linear, dtype: torch.dtype, rows: int, outputs: Outputs | None
) -> partial[Tensor]:
    weight, bias = (x if x is None else x.detach().to(dtype) for x in (layer.weight, layer.bias))
    trains = torch.is_grad_enabled()
    known = trains and outputs is not None and layer in outputs
    ahead = None if known else _pack(weight, rows)
    back = _pack(weight.t().contiguous(), rows) if trains else None
    return partial(_forward, layer, ahead, back, bias, outputs)


def _forward(
    layer: nn.Linear, ahead: Tensor | None, back: Tensor | None, bias: Tensor | None,
    outputs: Outputs | None, x: Tensor,
) -> Tensor:  # fmt: skip
    """The layer's own pass where the product is in another dtype, or wants what was not packed.
    x (..., inputs) -> (..., outputs)."""
    cast = torch.is_autocast_enabled("cpu")
    of = torch.get_autocast_dtype("cpu") if cast else x.dtype
    if of != (ahead if back is None else back).dtype or (back is None and torch.is_grad_enabled()):
        return type(layer).forward(layer, x)
    if back is None:
        out = _product(ahead, bias, x)
        if outputs is not None:
            outputs.note(layer, out)
        return out
    if ahead is not None:
        product = partial(_product, ahead, bias)
    elif (known := outputs.take(layer, x.shape[:-1])) is not None:
        product = partial(_given, known)
    else:
        return type(layer).forward(layer, x)
    return _Differentiable.apply(x, layer.weight, layer.bias, back, product)


def _pack(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")


def _given(known: Tensor, _: Tensor) -> Tensor:
    return known


class _Differentiable(torch.autograd.Function):
    """A layer's product and its gradients, each in the dtype of what it is the gradient of.

    x (..., inputs), weight and bias of the layer, the weight's transpose as it is packed, and what
    gives the product of an x in that dtype. -> (..., outputs). The weight's gradient is added in
    place to what its `grad` has in that dtype: `torch.autograd.grad` would not find it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, _: Tensor | None, back: Tensor,
        product: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.weight, ctx.back, ctx.dtype = weight, back, x.dtype
        x = x.to(back.dtype)
        ctx.save_for_backward(x)
        out = product(x)
        return out.new_empty(0).set_(out)  # no view: a model may write to what its layer gave

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, live = ctx.saved_tensors, ctx.weight, None
        rows, x = (t.reshape(-1, t.shape[-1]) for t in (grad, x))
        if not (rows[0].any() and rows[-1].any()):
            # Padding, or what the last layer made of a prompt: nothing is learned from it
            live = rows.any(-1).nonzero()[:, 0]
            rows, x = rows[live], x[live]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _product(ctx.back, None, rows.contiguous()).to(ctx.dtype)
            if live is not None:
                count = grad.shape[:-1].numel()
                dx = dx.new_zeros(count, dx.shape[-1]).index_copy_(0, live, dx)
            dx = dx.view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            dw = _added(weight.grad, rows.t(), x, weight.dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0, dtype=weight.dtype)
        return dx, dw, db, None, None


def _added(held: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A product that is a gradient in `dtype`; None where it was added to the one that is held."""
    if held is None or held.dtype != a.dtype:
        return a.mm(b).to(dtype)
    held.addmm_(a, b)
    return None


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether PyTorch has oneDNN's packed products in `dtype`. Tried and not assumed."""
    try:
        emulated = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if dtype not in (torch.float32, torch.bfloat16)[: 1 if emulated else 2]:
            return False
        eye, x = torch.eye(32, dtype=dtype), torch.arange(64.0).view(2, 32).to(dtype)
        return torch.equal(_product(_pack(eye, 2), None, x), x)
    except (AttributeError, RuntimeError):  # no such operation, or not on this machine
        return False


class Chosen(torch.autograd.Function):
    """Log-probabilities of tokens: logits (N, V) in the dtype of the products, which are divided by
    a temperature, and tokens (N,) -> (N,) nats.

    The gradient takes the place of the logits, which nobody may read again: to be handed another by
    the system would take longer than the arithmetic does. Copies are of `PIECE` logits at most.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        logp, norms = [], []
        for rows, of in _pieces(logits.detach(), tokens[:, None]):
            scaled = rows.float() if temperature == 1 else rows.float() / temperature
            logp.append(scaled.log_softmax(-1).gather(-1, of))
            norms.append(scaled.gather(-1, of) - logp[-1])
        ctx.save_for_backward(logits, tokens, torch.cat(norms))
        ctx.temperature = temperature
        return torch.cat(logp)[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens, norms = ctx.saved_tensors
        grad = grad[:, None] / ctx.temperature
        for rows, of, norm, share in _pieces(logits, tokens[:, None], norms, grad):
            own = rows.float()  # itself, if it is in float32
            if ctx.temperature != 1:
                own.div_(ctx.temperature)
            own.sub_(norm).exp_().mul_(-share).scatter_add_(-1, of, share)
            rows.copy_(own)
        return logits, None, None


def _pieces(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of logits (N, V) and of the others, so many that they stay in a processor's cache."""
    count = max(1, PIECE // logits.shape[-1])
    return zip(*(x.split(count) for x in (logits, *others)), strict=True)
