"""Products with block-sparse weights as people import them: with gradients."""

from __future__ import annotations

from typing import Any

import torch

from spartan._autograd import differentiable, differentiable_once
from spartan_kernels.ops import block_sparse_linear, masked_linear, sampled_matmul
from spartan_kernels.ops.block_sparse import block_sparse_linear_backward, block_sparse_linear_forward
from spartan_kernels.ops.masked_matmul import SAVES_INPUT, masked_linear_backward, masked_linear_forward

__all__ = ["block_sparse_linear", "masked_linear", "sampled_matmul"]


def _kept_for_activation(activation: str, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor | None:
    """What the activation's gradient is computed from."""
    if activation in SAVES_INPUT:
        return z
    return y if activation else None


def _setup_linear(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, gate, layout, backward_layout, bias, activation, rows, columns, save, density, slope, backend = inputs
    y, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    needs = ctx.needs[0], ctx.needs[1], ctx.needs[2], ctx.needs[5]
    if activation in SAVES_INPUT and not save:  # a transform of torch.func hid that there would be a gradient
        z = masked_linear_forward(
            x, weight, gate, layout, backward_layout, bias, "", rows, columns, False, density, None, backend
        )[0]
    x = x if needs[1] or needs[2] else None
    kept = _kept_for_activation(activation, y, z)
    ctx.save_for_backward(x, weight, gate, slope, kept, *layout, *backward_layout)
    ctx.buffers = len(layout)
    ctx.rest = activation, rows, columns, list(needs), density, backend


def _backward_linear(ctx: Any, grad: torch.Tensor | None, grad_z: None) -> Any:
    if grad is None:
        return (None,) * 13
    x, weight, gate, slope, kept, *index = ctx.saved_tensors
    x = grad if x is None else x  # not read where only the gradient of x is needed
    kept = grad if kept is None else kept  # nor is this, without an activation
    *rest, backend = ctx.rest
    layout, backward_layout = index[: ctx.buffers], index[ctx.buffers :]
    grads = masked_linear_backward(grad, x, weight, gate, layout, backward_layout, kept, *rest, slope, backend)
    needs = ctx.rest[3]
    dx, dweight, dgate, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, dweight, dgate, None, None, dbias, *[None] * 7


def _setup_sampled(ctx: Any, inputs: Any, output: Any) -> None:
    a, b, layout, rows, columns, backend = inputs
    ctx.save_for_backward(a, b, *layout)
    ctx.rest = rows, columns, backend


def _backward_sampled(ctx: Any, grad: torch.Tensor) -> Any:
    """G on the active blocks is a weight that is masked by blocks: G b^T = (b G^T)^T and a^T G are its products."""
    a, b, *layout = ctx.saved_tensors
    rows, columns, backend = ctx.rest
    gate = grad.new_ones(layout[0].shape[0] - 1, layout[2].shape[0] - 1)
    da = db = None
    if ctx.needs[0]:
        da = masked_linear_forward(b, grad, gate, layout, [], None, "", rows, columns, False, -1.0, None, backend)[0].mT
    if ctx.needs[1]:
        needs, empty = [True, False, False, False], grad.new_empty(0)
        rest = empty, "", rows, columns, needs, -1.0, None, backend
        db = masked_linear_backward(a.mT, b, grad, gate, layout, [], *rest)[0]
    return da, db, None, None, None, None


def _setup_packed(ctx: Any, inputs: Any, output: Any) -> None:
    x, values, layout, positions, bias, activation, out, save, backend = inputs
    y, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    if activation in SAVES_INPUT and not save:
        z = block_sparse_linear_forward(x, values, layout, positions, bias, "", out, False, backend)[0]
    ctx.in_features = x.shape[-1]
    x = x if ctx.needs[1] else None
    ctx.save_for_backward(x, values, positions, _kept_for_activation(activation, y, z), *layout)
    ctx.rest = activation, [ctx.needs[0], ctx.needs[1], ctx.needs[4]], backend


def _backward_packed(ctx: Any, grad: torch.Tensor | None, grad_z: None) -> Any:
    if grad is None:
        return (None,) * 9
    x, values, positions, kept, *layout = ctx.saved_tensors
    if x is None:  # only its shape is read
        x = grad.new_zeros(()).expand(*grad.shape[:-1], ctx.in_features)
    kept = grad.new_empty(0) if kept is None else kept
    grads = block_sparse_linear_backward(grad, x, values, layout, positions, kept, *ctx.rest)
    dx, dvalues, dbias = (g if need else None for g, need in zip(grads, ctx.rest[1], strict=True))
    return dx, dvalues, None, None, dbias, None, None, None, None


differentiable("masked_linear_forward", _setup_linear, _backward_linear)
differentiable("sampled_matmul_forward", _setup_sampled, _backward_sampled)
differentiable("block_sparse_linear_forward", _setup_packed, _backward_packed)
differentiable_once("masked_linear_backward", "masked_linear")
differentiable_once("block_sparse_linear_backward", "block_sparse_linear")
