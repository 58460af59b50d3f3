"""Soft top-k: by rows, in registers or from the L2 cache; lists of tensors, and longer rows, by the global solve."""

from __future__ import annotations

import torch

from spartan_kernels.backends.shared import check_rows, costs_of_row
from spartan_kernels.backends.triton import long_rows, soft_topk_rows
from spartan_kernels.backends.triton.configs import fits_in_registers, fits_one_program
from spartan_kernels.backends.triton.lists import (
    soft_topk_global_backward,
    soft_topk_global_forward,
    solve_masks_,
)
from spartan_kernels.operands import SoftTopk, SoftTopkBackward, SoftTopkGlobal, SoftTopkGlobalBackward

__all__ = [
    "soft_topk_backward",
    "soft_topk_forward",
    "soft_topk_global_backward",
    "soft_topk_global_forward",
    "solve_masks_",
]


def soft_topk_forward(o: SoftTopk) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (c, d) for each row of values [rows, n]."""
    check_rows(o.values, o.budget, o.costs, o.beta)
    if o.values.numel() == 0:
        return torch.empty_like(o.values), o.budget.new_zeros((o.values.shape[0], 2))
    if fits_in_registers(o.values, o.costs):
        return soft_topk_rows.forward(o)
    if fits_one_program(o.values):
        return long_rows.forward(o)
    rows = [
        soft_topk_global_forward(SoftTopkGlobal([row], o.budget[i], costs_of_row(o.costs, i), o.beta))
        for i, row in enumerate(o.values)
    ]
    return torch.stack([masks[0] for masks, _ in rows]), torch.stack([threshold for _, threshold in rows])


def soft_topk_backward(o: SoftTopkBackward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    if o.values.numel() == 0:
        none = o.threshold.new_zeros(o.values.shape[0])
        return torch.empty_like(o.values), o.values.new_empty(o.values.shape if o.cost_grad else 0), none, none.clone()
    if fits_in_registers(o.values, o.costs):
        return soft_topk_rows.backward(o)
    if fits_one_program(o.values):
        return long_rows.backward(o)
    rows = [
        soft_topk_global_backward(
            SoftTopkGlobalBackward([o.grad[i]], [row], o.threshold[i], costs_of_row(o.costs, i), o.beta, o.cost_grad)
        )
        for i, row in enumerate(o.values)
    ]
    grad_costs = torch.stack([row[1][0] for row in rows]) if o.cost_grad else o.values.new_empty(0)
    return (
        torch.stack([row[0][0] for row in rows]),
        grad_costs,
        torch.stack([row[2] for row in rows]),
        torch.stack([row[3] for row in rows]),
    )
