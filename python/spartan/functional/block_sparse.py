"""Gradient of the product with a weight in packed blocks."""

from __future__ import annotations

from typing import Any

import torch

from spartan.functional.autograd import differentiable, differentiable_once, gradients, wanted
from spartan.functional.masked_matmul import kept_for_activation
from spartan_kernels.operands import PackedLinear, PackedLinearBackward
from spartan_kernels.ops import block_sparse_linear
from spartan_kernels.ops.block_sparse import block_sparse_linear_backward, block_sparse_linear_forward
from spartan_kernels.ops.masked_matmul import SAVES_INPUT

__all__ = ["block_sparse_linear"]

_DIFFERENTIABLE = ("x", "values", "bias")


def _setup(ctx: Any, o: PackedLinear, output: Any) -> None:
    y, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    if o.activation in SAVES_INPUT and not o.save:  # a transform of torch.func hid that there would be a gradient
        z = block_sparse_linear_forward(*o._replace(activation="", save=False))[0]
    ctx.in_features = o.x.shape[-1]
    x = o.x if ctx.needs.values else None
    ctx.save_for_backward(x, o.values, o.positions, kept_for_activation(o.activation, y, z), *o.layout)
    ctx.activation, ctx.backend = o.activation, o.backend


def _backward(ctx: Any, grad: torch.Tensor | None, grad_z: None) -> dict[str, Any]:
    if grad is None:
        return {}
    x, values, positions, kept, *layout = ctx.saved_tensors
    if x is None:  # only its shape is read
        x = grad.new_zeros(()).expand(*grad.shape[:-1], ctx.in_features)
    o = PackedLinearBackward(
        grad=grad,
        x=x,
        values=values,
        layout=layout,
        positions=positions,
        saved=grad.new_empty(0) if kept is None else kept,
        activation=ctx.activation,
        needs=wanted(ctx.needs, _DIFFERENTIABLE),
        backend=ctx.backend,
    )
    return gradients(ctx.needs, _DIFFERENTIABLE, block_sparse_linear_backward(*o))


differentiable("block_sparse_linear_forward", _setup, _backward)
differentiable_once("block_sparse_linear_backward", "block_sparse_linear")
