"""Soft top-k on the compiled extension: by rows, and lists that share a budget."""

from __future__ import annotations

import torch

from spartan_kernels.arguments import require_beta
from spartan_kernels.backends import extension
from spartan_kernels.backends.native.lists import TensorList
from spartan_kernels.backends.native.masked_weight import block_scores
from spartan_kernels.backends.native.rows import Rows
from spartan_kernels.blocks import score_list


def soft_topk_forward(
    values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (centre, shift) for each row of values [rows, n]."""
    require_beta(beta)
    rows = Rows(values, costs)
    mask = rows.empty()
    threshold = torch.empty((values.shape[0], 2), dtype=torch.float64)
    extension.native.cpu.soft_topk_rows(
        *rows.arguments,
        budget.data_ptr(),
        budget.stride(0),
        float(beta),
        mask.data_ptr(),
        threshold.data_ptr(),
        *rows.rest,
    )
    return mask.to(values.dtype), threshold


def soft_topk_backward(
    grad: torch.Tensor,
    values: torch.Tensor,
    threshold: torch.Tensor,
    costs: torch.Tensor | None,
    beta: torch.Tensor,
    cost_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    rows = Rows(values, costs)
    g, t = rows.brought(grad).contiguous(), threshold.contiguous()
    grad_values = rows.empty()
    grad_costs = rows.empty() if cost_grad else None
    grad_budget, grad_beta = (torch.empty(values.shape[0], dtype=torch.float64) for _ in range(2))
    extension.native.cpu.soft_topk_rows_backward(
        *rows.arguments,
        g.data_ptr(),
        t.data_ptr(),
        float(beta),
        grad_values.data_ptr(),
        extension.pointer(grad_costs),
        grad_budget.data_ptr(),
        grad_beta.data_ptr(),
        *rows.rest,
    )
    returned = values.new_empty(0) if grad_costs is None else grad_costs.to(values.dtype)
    return grad_values.to(values.dtype), returned, grad_budget, grad_beta


def soft_topk_global_forward(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], beta: torch.Tensor, group: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """m for a list that shares one budget."""
    problem = TensorList(values, costs, group)
    masks = problem.empty()
    threshold = torch.empty(2, dtype=torch.float64)
    _table, first = problem.first(masks)
    extension.native.cpu.soft_topk_global(
        *first, float(budget), float(beta), False, 0, threshold.data_ptr(), *problem.rest()
    )
    return masks, threshold


def soft_topk_global_backward(
    grads: list[torch.Tensor],
    values: list[torch.Tensor],
    threshold: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor,
    cost_grad: bool,
    group: str,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta of a list that shares one budget."""
    problem = TensorList(values, costs, group)
    g = [grad.detach().to(problem.dtype).contiguous() for grad in grads]
    grad_values, grad_costs = problem.empty(), problem.empty() if cost_grad else []
    saved, scalars = threshold.contiguous(), torch.empty(2, dtype=torch.float64)
    _table, first = problem.first(g, grad_values, grad_costs)
    extension.native.cpu.soft_topk_global_backward(
        *first, saved.data_ptr(), float(beta), scalars.data_ptr(), *problem.rest()
    )
    return grad_values, grad_costs, scalars[0].clone(), scalars[1].clone()


def solve_masks_(
    values: list[torch.Tensor],
    budget: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor,
    absolute: bool,
    block_sizes: list[int],
    soft: list[torch.Tensor],
    hard: list[torch.Tensor],
    state: torch.Tensor,
    group: str,
) -> None:
    """Soft and hard mask of a training step, in place."""
    values, absolute = score_list(values, block_sizes, absolute, block_scores)
    problem = TensorList(values, costs, group)
    threshold = torch.empty(2, dtype=torch.float64)
    _table, first = problem.first(soft, hard)
    extension.native.cpu.soft_topk_global(
        *first, float(budget), float(beta), absolute, state.data_ptr(), threshold.data_ptr(), *problem.rest()
    )
