"""Soft top-k: by rows, in registers, from the L2 cache, or shared by several programs; lists by the global solve."""

from __future__ import annotations

import torch

from spartan_kernels.backends.shared import check_rows
from spartan_kernels.backends.triton import long_rows, soft_topk_rows, split_rows
from spartan_kernels.backends.triton.configs import fits_in_registers, fits_one_program
from spartan_kernels.backends.triton.lists import (
    soft_topk_global_backward,
    soft_topk_global_forward,
    solve_masks_,
)
from spartan_kernels.operands import SoftTopk, SoftTopkBackward

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
    return split_rows.forward(o)


def soft_topk_backward(o: SoftTopkBackward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    if o.values.numel() == 0:
        none = o.threshold.new_zeros(o.values.shape[0])
        return torch.empty_like(o.values), o.values.new_empty(o.values.shape if o.cost_grad else 0), none, none.clone()
    if fits_in_registers(o.values, o.costs):
        return soft_topk_rows.backward(o)
    if fits_one_program(o.values):
        return long_rows.backward(o)
    return split_rows.backward(o)
