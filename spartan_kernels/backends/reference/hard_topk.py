"""Hard top-k by sorting."""

from __future__ import annotations

import torch

from spartan_kernels.arguments import clamp_budget, require_costs, require_finite
from spartan_kernels.groups import gather_rows


def select(ratio: torch.Tensor, costs: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """The longest prefix of each row, in descending `ratio`, whose costs sum to at most its budget; bool [rows, n]."""
    order = ratio.sort(dim=-1, descending=True, stable=True).indices
    spent = costs.expand_as(ratio).gather(-1, order).to(torch.float64).cumsum(-1)
    return torch.zeros_like(ratio, dtype=torch.bool).scatter(-1, order, spent <= budget[:, None])


def hard_topk_forward(values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None) -> torch.Tensor:
    """h for each row of values [rows, n]."""
    require_finite("values", values)
    a = values.new_ones(()) if costs is None else costs
    require_costs(a)
    budget = clamp_budget(budget, a.expand_as(values).sum(-1, dtype=torch.float64))
    return select(values / a, a, budget)


def over_ranks(row: torch.Tensor, costs: torch.Tensor | None, group: str) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """The rows [1, n] of all ranks, one after the other, with the costs of their entries; and where this rank's lies."""
    a = row.new_ones(()) if costs is None else costs
    whole, own = gather_rows(row[0], group)
    whole_costs, _ = gather_rows(a.expand_as(row)[0], group)
    return whole[None], whole_costs[None], own


def hard_topk_global_forward(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], absolute: bool, group: str
) -> list[torch.Tensor]:
    """h for a list that shares one budget: one row, concatenated."""
    row = torch.cat([v.reshape(-1) for v in values])[None]
    a = torch.cat([c.expand_as(v).reshape(-1) for v, c in zip(values, costs, strict=True)])[None] if costs else None
    own = slice(0, row.shape[1])
    if group:
        row, a, own = over_ranks(row, a, group)
    mask = hard_topk_forward(row.abs() if absolute else row, budget[None], a)
    parts = mask[0, own].split([v.numel() for v in values])
    return [part.reshape(v.shape).clone() for part, v in zip(parts, values, strict=True)]
