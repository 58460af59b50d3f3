"""Gradient of the product with a weight in packed blocks."""

from __future__ import annotations

from typing import Any

import torch

from spartan.functional.autograd import differentiable, differentiable_once, needed, without_gradient
from spartan.functional.masked_matmul import kept_for_activation
from spartan_kernels.operands import PackedLinear, PackedLinearBackward
from spartan_kernels.ops import block_sparse_linear
from spartan_kernels.ops.block_sparse import block_sparse_linear_backward, block_sparse_linear_forward
from spartan_kernels.ops.masked_matmul import SAVES_INPUT

__all__ = ["block_sparse_linear"]


def _setup(ctx: Any, o: PackedLinear, output: Any) -> None:
    y, z = output
    if z is not None:
        ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    if o.activation in SAVES_INPUT and not o.save:  # a transform of torch.func hid that there would be a gradient
        z = block_sparse_linear_forward(o._replace(activation="", save=False))[0]
    ctx.in_features = o.x.shape[-1]
    x = o.x if ctx.needs.values else None
    ctx.save_for_backward(x, o.values, kept_for_activation(o.activation, y, z))
    ctx.index = o.layout, o.positions  # integers that nothing differentiates
    ctx.activation, ctx.backend = o.activation, o.backend


def _backward(ctx: Any, grad: torch.Tensor | None, grad_z: None) -> Any:
    if grad is None:
        return [None] * len(ctx.needs)
    x, values, kept = ctx.saved_tensors
    if x is None:  # only its shape is read
        x = grad.new_zeros(()).expand(*grad.shape[:-1], ctx.in_features)
    kept = grad if kept is None else kept  # not read without an activation
    (layout, positions), needs = ctx.index, list(ctx.needs)
    o = PackedLinearBackward(grad, x, values, layout, positions, kept, ctx.activation, needs, ctx.backend)
    return needed(ctx.needs, block_sparse_linear_backward(o))


differentiable("block_sparse_linear_forward", ("x", "values", "bias"), _setup, _backward)
differentiable_once("block_sparse_linear_backward", "block_sparse_linear")
without_gradient(
    "block_sparse_linear_float8_forward",
    "spartan.block_sparse_linear has no gradient through a weight in 8 bits (float8): it is for inference; train with"
    " the weight as it was before `to_float8`",
)
