"""Soft top-k: by rows, in registers or from the L2 cache; lists of tensors, and longer rows, by the global solve."""

from __future__ import annotations

import torch

from spartan_kernels.arguments import clamp_budget, inspectable, require_beta, require_costs, require_finite
from spartan_kernels.backends.triton import long_rows, soft_topk_rows
from spartan_kernels.backends.triton.configs import fits_in_registers, fits_one_program
from spartan_kernels.backends.triton.global_solve import (
    soft_topk_global_backward,
    soft_topk_global_forward,
    solve_masks_,
)

__all__ = [
    "soft_topk_backward",
    "soft_topk_forward",
    "soft_topk_global_backward",
    "soft_topk_global_forward",
    "solve_masks_",
]


def _check(values: torch.Tensor, costs: torch.Tensor | None, beta: torch.Tensor, budget: torch.Tensor) -> None:
    if not inspectable(values):
        return
    require_finite("values", values)
    require_beta(beta)
    a = values.new_ones(()) if costs is None else costs
    require_costs(a)
    clamp_budget(budget, a.expand_as(values).sum(-1, dtype=torch.float64))


def rows_of_costs(costs: torch.Tensor | None, values: torch.Tensor) -> list[list[torch.Tensor]]:
    """For each row the costs of a list that holds this row alone."""
    if costs is None:
        return [[] for _ in values]
    return [[costs if costs.dim() < 2 else costs[index]] for index in range(values.shape[0])]


def soft_topk_forward(
    values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (c, d) for each row of values [rows, n]."""
    _check(values, costs, beta, budget)
    if values.numel() == 0:
        return torch.empty_like(values), budget.new_zeros((values.shape[0], 2))
    if fits_in_registers(values, costs):
        return soft_topk_rows.forward(values, budget, costs, beta)
    if fits_one_program(values):
        return long_rows.forward(values, budget, costs, beta)
    rows = [
        soft_topk_global_forward([row], k, cost, beta, "")
        for row, k, cost in zip(values, budget, rows_of_costs(costs, values), strict=True)
    ]
    return torch.stack([masks[0] for masks, _ in rows]), torch.stack([threshold for _, threshold in rows])


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
    if fits_in_registers(values, costs):
        return soft_topk_rows.backward(grad, values, threshold, costs, beta, cost_grad)
    if fits_one_program(values):
        return long_rows.backward(grad, values, threshold, costs, beta, cost_grad)
    rows = [
        soft_topk_global_backward([g], [row], c, cost, beta, cost_grad, "")
        for g, row, c, cost in zip(grad, values, threshold, rows_of_costs(costs, values), strict=True)
    ]
    grad_costs = torch.stack([row[1][0] for row in rows]) if cost_grad else values.new_empty(0)
    return (
        torch.stack([row[0][0] for row in rows]),
        grad_costs,
        torch.stack([row[2] for row in rows]),
        torch.stack([row[3] for row in rows]),
    )
