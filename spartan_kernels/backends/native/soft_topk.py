"""Soft top-k on the compiled extension: by rows, and lists that share a budget."""

from __future__ import annotations

import torch

from spartan_kernels.arguments import require_beta
from spartan_kernels.backends import extension
from spartan_kernels.backends.native.lists import TensorList
from spartan_kernels.backends.native.masked_weight import block_scores
from spartan_kernels.backends.native.rows import Rows
from spartan_kernels.blocks import score_list
from spartan_kernels.operands import SoftTopk, SoftTopkBackward, SoftTopkGlobal, SoftTopkGlobalBackward, SolveMasks


def soft_topk_forward(o: SoftTopk) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (centre, shift) for each row of values [rows, n]."""
    require_beta(o.beta)
    rows = Rows(o.values, o.costs)
    mask = rows.empty()
    threshold = torch.empty((o.values.shape[0], 2), dtype=torch.float64)
    extension.native.cpu.soft_topk_rows(
        *rows.arguments,
        o.budget.data_ptr(),
        o.budget.stride(0),
        float(o.beta),
        mask.data_ptr(),
        threshold.data_ptr(),
        *rows.rest,
    )
    return mask.to(o.values.dtype), threshold


def soft_topk_backward(o: SoftTopkBackward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    rows = Rows(o.values, o.costs)
    g, t = rows.brought(o.grad).contiguous(), o.threshold.contiguous()
    grad_values = rows.empty()
    grad_costs = rows.empty() if o.cost_grad else None
    grad_budget, grad_beta = (torch.empty(o.values.shape[0], dtype=torch.float64) for _ in range(2))
    extension.native.cpu.soft_topk_rows_backward(
        *rows.arguments,
        g.data_ptr(),
        t.data_ptr(),
        float(o.beta),
        grad_values.data_ptr(),
        extension.pointer(grad_costs),
        grad_budget.data_ptr(),
        grad_beta.data_ptr(),
        *rows.rest,
    )
    returned = o.values.new_empty(0) if grad_costs is None else grad_costs.to(o.values.dtype)
    return grad_values.to(o.values.dtype), returned, grad_budget, grad_beta


def soft_topk_global_forward(o: SoftTopkGlobal) -> tuple[list[torch.Tensor], torch.Tensor]:
    """m for a list that shares one budget."""
    problem = TensorList(o.values, o.costs, o.group)
    masks = problem.empty()
    threshold = torch.empty(2, dtype=torch.float64)
    _table, first = problem.first(masks)
    extension.native.cpu.soft_topk_global(
        *first, float(o.budget), float(o.beta), False, 0, threshold.data_ptr(), *problem.rest()
    )
    return masks, threshold


def soft_topk_global_backward(
    o: SoftTopkGlobalBackward,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta of a list that shares one budget."""
    problem = TensorList(o.values, o.costs, o.group)
    g = [grad.detach().to(problem.dtype).contiguous() for grad in o.grads]
    grad_values, grad_costs = problem.empty(), problem.empty() if o.cost_grad else []
    saved, scalars = o.threshold.contiguous(), torch.empty(2, dtype=torch.float64)
    _table, first = problem.first(g, grad_values, grad_costs)
    extension.native.cpu.soft_topk_global_backward(
        *first, saved.data_ptr(), float(o.beta), scalars.data_ptr(), *problem.rest()
    )
    return grad_values, grad_costs, scalars[0].clone(), scalars[1].clone()


def solve_masks_(o: SolveMasks) -> None:
    """Soft and hard mask of a training step, in place."""
    values, absolute = score_list(o, block_scores)
    problem = TensorList(values, o.costs, o.group)
    threshold = torch.empty(2, dtype=torch.float64)
    _table, first = problem.first(o.soft, o.hard)
    extension.native.cpu.soft_topk_global(
        *first, float(o.budget), float(o.beta), absolute, o.state.data_ptr(), threshold.data_ptr(), *problem.rest()
    )
