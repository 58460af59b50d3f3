"""Gradients of the products with a weight that is stored densely and masked by blocks."""

from __future__ import annotations

from typing import Any

import torch

from spartan.functional.autograd import differentiable, differentiable_once, gradients, wanted
from spartan_kernels.operands import MaskedLinear, MaskedLinearBackward, SampledMatmul
from spartan_kernels.ops import masked_linear, sampled_matmul
from spartan_kernels.ops.masked_matmul import SAVES_INPUT, masked_linear_backward, masked_linear_forward

__all__ = ["kept_for_activation", "masked_linear", "sampled_matmul"]

_DIFFERENTIABLE = ("x", "weight", "gate", "bias")


def kept_for_activation(activation: str, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor | None:
    """What the activation's gradient is computed from."""
    if activation in SAVES_INPUT:
        return z
    return y if activation else None


def _setup_linear(ctx: Any, o: MaskedLinear, output: Any) -> None:
    y, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    if o.activation in SAVES_INPUT and not o.save:  # a transform of torch.func hid that there would be a gradient
        z = masked_linear_forward(*o._replace(activation="", save=False, slope=None))[0]
    x = o.x if ctx.needs.weight or ctx.needs.gate else None
    kept = kept_for_activation(o.activation, y, z)
    ctx.save_for_backward(x, o.weight, o.gate, o.slope, kept, *o.layout, *o.backward_layout)
    ctx.buffers = len(o.layout)
    ctx.settings = {name: getattr(o, name) for name in ("activation", "rows", "columns", "density", "backend")}


def _backward_linear(ctx: Any, grad: torch.Tensor | None, grad_z: None) -> dict[str, Any]:
    if grad is None:
        return {}
    x, weight, gate, slope, kept, *index = ctx.saved_tensors
    o = MaskedLinearBackward(
        grad=grad,
        x=grad if x is None else x,  # not read where only the gradient of x is needed
        weight=weight,
        gate=gate,
        layout=index[: ctx.buffers],
        backward_layout=index[ctx.buffers :],
        saved=grad if kept is None else kept,  # not read without an activation
        needs=wanted(ctx.needs, _DIFFERENTIABLE),
        slope=slope,
        **ctx.settings,
    )
    return gradients(ctx.needs, _DIFFERENTIABLE, masked_linear_backward(*o))


def _setup_sampled(ctx: Any, o: SampledMatmul, output: Any) -> None:
    ctx.save_for_backward(o.a, o.b, *o.layout)
    ctx.settings = {"activation": "", "rows": o.rows, "columns": o.columns, "backend": o.backend}


def _backward_sampled(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    """G on the active blocks is a weight that is masked by blocks: G b^T = (b G^T)^T and a^T G are its products."""
    a, b, *layout = ctx.saved_tensors
    weight: dict[str, Any] = {
        "weight": grad,
        "gate": grad.new_ones(layout[0].shape[0] - 1, layout[2].shape[0] - 1),
        "layout": layout,
        "backward_layout": [],
        **ctx.settings,
    }
    found = {}
    if ctx.needs.a:
        found["a"] = masked_linear_forward(*MaskedLinear(x=b, bias=None, save=False, **weight))[0].mT
    if ctx.needs.b:
        needs, empty = [True, False, False, False], grad.new_empty(0)
        of_b = MaskedLinearBackward(grad=a.mT, x=b, saved=empty, needs=needs, **weight)
        found["b"] = masked_linear_backward(*of_b)[0]
    return found


differentiable("masked_linear_forward", _setup_linear, _backward_linear)
differentiable("sampled_matmul_forward", _setup_sampled, _backward_sampled)
differentiable_once("masked_linear_backward", "masked_linear")
