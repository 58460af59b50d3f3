"""Rows of one tensor as the CUDA kernels take them, and which of them are solved as lists."""

from __future__ import annotations

import torch

from spartan_kernels.arguments import clamp_budget, inspectable, require_beta, require_costs, require_finite
from spartan_kernels.backends import extension


class Rows:
    """Rows of one tensor; costs of every shape are one array with two strides."""

    def __init__(self, values: torch.Tensor, costs: torch.Tensor | None) -> None:
        self.values = values.detach() if values.stride(-1) == 1 else values.detach().contiguous()
        self.costs = extension.contiguous(costs)
        rows, length = values.shape
        step = int(costs is not None and costs.dim() > 0)
        stride = length if costs is not None and costs.dim() == 2 else 0
        self.dtype = extension.DTYPES[values.dtype]
        apart = self.values.stride(0)
        self.rows = extension.native.cuda.Rows(
            self.values.data_ptr(), extension.pointer(self.costs), rows, length, apart, stride, step
        )


def inspect_rows(
    values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None, beta: torch.Tensor | None
) -> None:
    """Raise for values, costs, budgets or beta that cannot be used, where the host may look at them."""
    if not inspectable(values):
        return
    require_finite("values", values)
    if beta is not None:
        require_beta(beta)
    a = values.new_ones(()) if costs is None else costs
    require_costs(a)
    clamp_budget(budget, a.expand_as(values).sum(-1, dtype=torch.float64))


# Longer rows, where they are too few to give every multiprocessor one, are each solved by the whole device.
_LONGEST_ROW = 131_072

_FEW_ROWS = 64


def as_lists(values: torch.Tensor) -> bool:
    """Whether the rows are few and long."""
    return values.shape[1] > _LONGEST_ROW and values.shape[0] <= _FEW_ROWS


def row_costs(costs: torch.Tensor | None, row: int) -> list[torch.Tensor]:
    """The costs of one row as those of a list that holds this row alone."""
    if costs is None:
        return []
    return [costs[row] if costs.dim() == 2 else costs]
