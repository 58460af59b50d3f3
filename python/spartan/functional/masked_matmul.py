"""Gradients of the products with a weight that is stored densely and masked by blocks."""

from __future__ import annotations

from typing import Any

import torch

from spartan.functional.autograd import differentiable, differentiable_once, needed
from spartan_kernels.operands import MaskedLinear, MaskedLinearBackward, SampledMatmul
from spartan_kernels.ops import masked_linear, sampled_matmul
from spartan_kernels.ops.masked_matmul import SAVES_INPUT, masked_linear_backward, masked_linear_forward

__all__ = ["kept_for_activation", "masked_linear", "sampled_matmul"]


def kept_for_activation(activation: str, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor | None:
    """What the activation's gradient is computed from."""
    if activation in SAVES_INPUT:
        return z
    return y if activation else None


def _setup_linear(ctx: Any, o: MaskedLinear, output: Any) -> None:
    y, z = output
    if z is not None:
        ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    if o.activation in SAVES_INPUT and not o.save:  # a transform of torch.func hid that there would be a gradient
        z = masked_linear_forward(o._replace(activation="", save=False, slope=None))[0]
    x = o.x if ctx.needs.weight or ctx.needs.gate else None
    ctx.save_for_backward(x, o.weight, o.gate, o.slope, kept_for_activation(o.activation, y, z))
    ctx.index = o.layout, o.backward_layout  # integers that nothing differentiates
    ctx.settings = o.activation, o.rows, o.columns, o.density, o.backend


def _backward_linear(ctx: Any, grad: torch.Tensor | None, grad_z: None) -> Any:
    if grad is None:
        return [None] * len(ctx.needs)
    x, weight, gate, slope, kept = ctx.saved_tensors
    layout, backward_layout = ctx.index
    activation, rows, columns, density, backend = ctx.settings
    o = MaskedLinearBackward(
        grad,
        grad if x is None else x,  # not read where only the gradient of x is needed
        weight,
        gate,
        layout,
        backward_layout,
        grad if kept is None else kept,  # not read without an activation
        activation,
        rows,
        columns,
        list(ctx.needs),
        density,
        slope,
        backend,
    )
    return needed(ctx.needs, masked_linear_backward(o))


def _setup_sampled(ctx: Any, o: SampledMatmul, output: Any) -> None:
    ctx.save_for_backward(o.a, o.b)
    ctx.settings = o.layout, o.rows, o.columns, o.backend


def _backward_sampled(ctx: Any, grad: torch.Tensor) -> Any:
    """G on the active blocks is a weight that is masked by blocks: G b^T = (b G^T)^T and a^T G are its products."""
    a, b = ctx.saved_tensors
    layout, rows, columns, backend = ctx.settings
    gate = grad.new_ones(layout[0].shape[0] - 1, layout[2].shape[0] - 1)
    of_a = of_b = None
    if ctx.needs.a:
        forward = MaskedLinear(b, grad, gate, layout, [], None, "", rows, columns, save=False, backend=backend)
        of_a = masked_linear_forward(forward)[0].mT
    if ctx.needs.b:
        at, needs = a.mT, [True, False, False, False]
        backward = MaskedLinearBackward(at, b, grad, gate, layout, [], at, "", rows, columns, needs, backend=backend)
        of_b = masked_linear_backward(backward)[0]
    return of_a, of_b


differentiable("masked_linear_forward", ("x", "weight", "gate", "bias"), _setup_linear, _backward_linear)
differentiable("sampled_matmul_forward", ("a", "b"), _setup_sampled, _backward_sampled)
differentiable_once("masked_linear_backward", "masked_linear")
