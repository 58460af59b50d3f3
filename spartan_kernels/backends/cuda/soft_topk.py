"""Soft top-k in CUDA C++: by rows, and lists that share a budget."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension
from spartan_kernels.backends.cuda.lists import TensorList, launch_list, solve_list
from spartan_kernels.backends.cuda.masked_weight import block_scores
from spartan_kernels.backends.cuda.rows import Rows, as_lists
from spartan_kernels.backends.shared import check_rows, costs_of_row, row_gradients
from spartan_kernels.blocks import score_list
from spartan_kernels.groups import refuse_group
from spartan_kernels.operands import SoftTopk, SoftTopkBackward, SoftTopkGlobal, SoftTopkGlobalBackward, SolveMasks


def soft_topk_forward(o: SoftTopk) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (centre, shift) for each row of values [rows, n]."""
    check_rows(o.values, o.budget, o.costs, o.beta)
    mask = torch.empty_like(o.values, memory_format=torch.contiguous_format)
    threshold = torch.empty((o.values.shape[0], 2), dtype=torch.float64, device=o.values.device)
    if as_lists(o.values):
        for r, (v, k) in enumerate(zip(o.values, o.budget, strict=True)):
            launch_list([v], k, costs_of_row(o.costs, r), o.beta, False, ([mask[r]], None), None, threshold[r])
        return mask, threshold
    rows = Rows(o.values, o.costs)
    k = o.budget.contiguous()
    extension.call(
        extension.native.cuda.soft_topk_rows,
        o.values,
        rows.dtype,
        rows.rows,
        k.data_ptr(),
        o.beta.data_ptr(),
        mask.data_ptr(),
        threshold.data_ptr(),
    )
    return mask, threshold


def soft_topk_backward(o: SoftTopkBackward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    g, saved = o.grad.to(o.values.dtype).contiguous(), o.threshold.contiguous()
    if as_lists(o.values):
        found = [
            soft_topk_global_backward(
                SoftTopkGlobalBackward([g[r]], [v], saved[r], costs_of_row(o.costs, r), o.beta, o.cost_grad)
            )
            for r, v in enumerate(o.values)
        ]
        of_values, of_costs, of_budget, of_beta = zip(*found, strict=True)
        grad_costs = torch.stack([c[0] for c in of_costs]) if o.cost_grad else o.values.new_empty(0)
        return torch.stack([v[0] for v in of_values]), grad_costs, torch.stack(of_budget), torch.stack(of_beta)
    return _backward_by_rows(g, Rows(o.values, o.costs), saved, o.beta, o.cost_grad)


def _backward_by_rows(
    g: torch.Tensor, rows: Rows, saved: torch.Tensor, beta: torch.Tensor, cost_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = row_gradients(g, cost_grad)
    extension.call(
        extension.native.cuda.soft_topk_rows_backward,
        g,
        rows.dtype,
        rows.rows,
        g.data_ptr(),
        saved.data_ptr(),
        beta.data_ptr(),
        *(extension.pointer(grad if grad.numel() else None) for grad in grads),
    )
    return grads


def soft_topk_global_forward(o: SoftTopkGlobal) -> tuple[list[torch.Tensor], torch.Tensor]:
    """m for a list that shares one budget."""
    refuse_group(o.group, "cuda")
    masks = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in o.values]
    threshold = torch.zeros(2, dtype=torch.float64, device=o.values[0].device)
    solve_list(o.values, o.budget, o.costs, o.beta, False, (masks, None), None, threshold)
    return masks, threshold


def soft_topk_global_backward(
    o: SoftTopkGlobalBackward,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta of a list that shares one budget."""
    refuse_group(o.group, "cuda")
    problem = TensorList(o.values, o.costs)
    g = [grad.to(v.dtype).contiguous() for grad, v in zip(o.grads, o.values, strict=True)]
    grad_values = [torch.empty_like(v) for v in problem.values]
    grad_costs = [torch.empty_like(v) for v in problem.values] if o.cost_grad else []
    scalars = torch.zeros(2, dtype=torch.float64, device=o.values[0].device)
    if problem.length:
        saved = o.threshold.contiguous()
        _table, workspace, first = problem.arguments(g, grad_values, grad_costs)
        extension.call(
            extension.native.cuda.soft_topk_global_backward,
            o.values[0],
            *first,
            saved.data_ptr(),
            o.beta.data_ptr(),
            scalars.data_ptr(),
            workspace.data_ptr(),
        )
    return grad_values, grad_costs, scalars[0].clone(), scalars[1].clone()


def solve_masks_(o: SolveMasks) -> None:
    """Soft and hard mask of a training step, in place."""
    values, absolute = score_list(o, block_scores)
    refuse_group(o.group, "cuda")
    soft, threshold = o.soft, None
    if not soft:
        soft, threshold = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in values], o.state[6:]
    solve_list(values, o.budget, o.costs, o.beta, absolute, (soft, o.hard), o.state, threshold)
