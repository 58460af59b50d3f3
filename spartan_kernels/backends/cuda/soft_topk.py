"""Soft top-k in CUDA C++: by rows, and lists that share a budget."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension
from spartan_kernels.backends.cuda.lists import TensorList, launch_list, solve_list
from spartan_kernels.backends.cuda.masked_weight import block_scores
from spartan_kernels.backends.cuda.rows import Rows, as_lists, inspect_rows, row_costs
from spartan_kernels.blocks import score_list
from spartan_kernels.groups import refuse_group


def soft_topk_forward(
    values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (centre, shift) for each row of values [rows, n]."""
    inspect_rows(values, budget, costs, beta)
    mask = torch.empty_like(values, memory_format=torch.contiguous_format)
    threshold = torch.empty((values.shape[0], 2), dtype=torch.float64, device=values.device)
    if as_lists(values):
        for r, (v, k) in enumerate(zip(values, budget, strict=True)):
            launch_list([v], k, row_costs(costs, r), beta, False, ([mask[r]], None), None, threshold[r])
        return mask, threshold
    rows = Rows(values, costs)
    k = budget.contiguous()
    extension.call(
        extension.native.cuda.soft_topk_rows,
        values,
        rows.dtype,
        rows.rows,
        k.data_ptr(),
        beta.data_ptr(),
        mask.data_ptr(),
        threshold.data_ptr(),
    )
    return mask, threshold


def soft_topk_backward(
    grad: torch.Tensor,
    values: torch.Tensor,
    threshold: torch.Tensor,
    costs: torch.Tensor | None,
    beta: torch.Tensor,
    cost_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    g, saved = grad.to(values.dtype).contiguous(), threshold.contiguous()
    if as_lists(values):
        found = [
            soft_topk_global_backward([g[r]], [v], saved[r], row_costs(costs, r), beta, cost_grad, "")
            for r, v in enumerate(values)
        ]
        of_values, of_costs, of_budget, of_beta = zip(*found, strict=True)
        grad_costs = torch.stack([c[0] for c in of_costs]) if cost_grad else values.new_empty(0)
        return torch.stack([v[0] for v in of_values]), grad_costs, torch.stack(of_budget), torch.stack(of_beta)
    return _backward_by_rows(g, Rows(values, costs), saved, beta, cost_grad)


def _backward_by_rows(
    g: torch.Tensor, rows: Rows, saved: torch.Tensor, beta: torch.Tensor, cost_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_values = torch.empty_like(g)
    grad_costs = torch.empty_like(g) if cost_grad else None
    of_budget = torch.empty(len(g), dtype=torch.float64, device=g.device)
    of_beta = torch.empty_like(of_budget)
    extension.call(
        extension.native.cuda.soft_topk_rows_backward,
        g,
        rows.dtype,
        rows.rows,
        g.data_ptr(),
        saved.data_ptr(),
        beta.data_ptr(),
        grad_values.data_ptr(),
        extension.pointer(grad_costs),
        of_budget.data_ptr(),
        of_beta.data_ptr(),
    )
    return grad_values, g.new_empty(0) if grad_costs is None else grad_costs, of_budget, of_beta


def soft_topk_global_forward(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], beta: torch.Tensor, group: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """m for a list that shares one budget."""
    refuse_group(group, "cuda")
    masks = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in values]
    threshold = torch.zeros(2, dtype=torch.float64, device=values[0].device)
    solve_list(values, budget, costs, beta, False, (masks, None), None, threshold)
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
    refuse_group(group, "cuda")
    problem = TensorList(values, costs)
    g = [grad.to(v.dtype).contiguous() for grad, v in zip(grads, values, strict=True)]
    grad_values = [torch.empty_like(v) for v in problem.values]
    grad_costs = [torch.empty_like(v) for v in problem.values] if cost_grad else []
    scalars = torch.zeros(2, dtype=torch.float64, device=values[0].device)
    if problem.length:
        saved = threshold.contiguous()
        _table, workspace, first = problem.arguments(g, grad_values, grad_costs)
        extension.call(
            extension.native.cuda.soft_topk_global_backward,
            values[0],
            *first,
            saved.data_ptr(),
            beta.data_ptr(),
            scalars.data_ptr(),
            workspace.data_ptr(),
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
    refuse_group(group, "cuda")
    solve_list(values, budget, costs, beta, absolute, (soft, hard), state, None)
