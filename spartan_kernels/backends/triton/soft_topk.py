"""Soft top-k: rows that fit in registers by one kernel, longer ones and lists of tensors by the global solve."""

from __future__ import annotations

import torch

from spartan_kernels.arguments import clamp_budget, inspectable, require_beta, require_costs, require_finite
from spartan_kernels.backends.triton import soft_topk_rows


def _check(values: torch.Tensor, costs: torch.Tensor | None, beta: torch.Tensor, budget: torch.Tensor) -> None:
    if not inspectable(values):
        return
    require_finite("values", values)
    require_beta(beta)
    a = values.new_ones(()) if costs is None else costs
    require_costs(a)
    clamp_budget(budget, a.expand_as(values).sum(-1, dtype=torch.float64))


def soft_topk_forward(
    values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (c, d) for each row of values [rows, n]."""
    _check(values, costs, beta, budget)
    if values.numel() == 0:
        return torch.empty_like(values), budget.new_zeros((values.shape[0], 2))
    return soft_topk_rows.forward(values, budget, costs, beta)


def soft_topk_backward(
    grad: torch.Tensor,
    values: torch.Tensor,
    threshold: torch.Tensor,
    costs: torch.Tensor | None,
    beta: torch.Tensor,
    cost_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    if values.numel() == 0:
        none = threshold.new_zeros(values.shape[0])
        return torch.empty_like(values), values.new_empty(values.shape if cost_grad else 0), none, none.clone()
    return soft_topk_rows.backward(grad, values, threshold, costs, beta, cost_grad)
