"""The operators with their gradients: closed formulas, registered on the operators of `spartan_kernels`."""

from __future__ import annotations

from typing import Any

import torch

from spartan_kernels.ops import (
    hard_topk,
    hard_topk_global,
    masked_linear,
    masked_weight,
    soft_topk,
    soft_topk_global,
)
from spartan_kernels.ops.masked_matmul import masked_linear_backward
from spartan_kernels.ops.masked_weight import masked_weight_backward
from spartan_kernels.ops.soft_topk import soft_topk_backward, soft_topk_global_backward

__all__ = ["hard_topk", "hard_topk_global", "masked_linear", "masked_weight", "soft_topk", "soft_topk_global"]


def _reduce_to(elementwise: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum an elementwise gradient down to the shape that was broadcast."""
    return elementwise.sum_to_size(like.shape)


def _setup_rows(ctx: Any, inputs: Any, output: Any) -> None:
    values, _, costs, beta, backend = inputs
    ctx.save_for_backward(values, output[1], costs, beta)
    ctx.mark_non_differentiable(output[1])
    ctx.backend = backend


def _backward_rows(ctx: Any, grad_mask: torch.Tensor, grad_threshold: torch.Tensor) -> Any:
    values, threshold, costs, beta = ctx.saved_tensors
    grad_values, grad_costs, grad_budget, grad_beta = soft_topk_backward(
        grad_mask, values, threshold, costs, beta, ctx.needs_input_grad[2], ctx.backend
    )
    return (
        grad_values,
        grad_budget,
        _reduce_to(grad_costs, costs) if ctx.needs_input_grad[2] else None,
        grad_beta.sum(),
        None,
    )


def _setup_global(ctx: Any, inputs: Any, output: Any) -> None:
    values, _, costs, beta, group, backend = inputs
    threshold = output[1]
    ctx.save_for_backward(*values, *costs, threshold, beta)
    ctx.mark_non_differentiable(threshold)
    ctx.counts = len(values), len(costs)
    ctx.cost_grad = any(cost.requires_grad for cost in costs)
    ctx.group, ctx.backend = group, backend


def _backward_global(ctx: Any, grad_masks: Any, grad_threshold: torch.Tensor) -> Any:
    n_values, n_costs = ctx.counts
    saved = list(ctx.saved_tensors)
    values, costs, (threshold, beta) = saved[:n_values], saved[n_values:-2], saved[-2:]
    grads = [torch.zeros_like(v) if g is None else g for g, v in zip(grad_masks, values, strict=True)]
    grad_values, grad_costs, grad_budget, grad_beta = soft_topk_global_backward(
        grads, values, threshold, costs, beta, ctx.cost_grad, ctx.group, ctx.backend
    )
    reduced = [_reduce_to(g, c) for g, c in zip(grad_costs, costs, strict=True)] if ctx.cost_grad else [None] * n_costs
    return grad_values, grad_budget, reduced, grad_beta, None, None


def _setup_weight(ctx: Any, inputs: Any, output: Any) -> None:
    weight, soft, hard, beta, costs, rows, columns, straight_through, backend = inputs
    ctx.save_for_backward(weight, soft, hard, beta, costs)
    ctx.rest = rows, columns, straight_through, backend


def _backward_weight(ctx: Any, grad: torch.Tensor) -> Any:
    return (masked_weight_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 8)


def _setup_linear(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, gate, bias, forward_mask, backward_mask, activation, rows, columns, backend = inputs
    ctx.save_for_backward(x, weight, gate, bias, forward_mask, backward_mask)
    ctx.rest = activation, rows, columns
    ctx.backend = backend


def _backward_linear(ctx: Any, grad: torch.Tensor) -> Any:
    needs = list(ctx.needs_input_grad[:4])
    grads = masked_linear_backward(grad, *ctx.saved_tensors, *ctx.rest, needs, ctx.backend)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 6)


torch.library.register_autograd("spartan::soft_topk_forward", _backward_rows, setup_context=_setup_rows)
torch.library.register_autograd("spartan::soft_topk_global_forward", _backward_global, setup_context=_setup_global)
torch.library.register_autograd("spartan::masked_weight_forward", _backward_weight, setup_context=_setup_weight)
torch.library.register_autograd("spartan::masked_linear_forward", _backward_linear, setup_context=_setup_linear)
