"""Hard top-k on the compiled extension: by rows, and lists that share a budget."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension
from spartan_kernels.backends.native.lists import TensorList
from spartan_kernels.backends.native.rows import Rows


def hard_topk_forward(values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None) -> torch.Tensor:
    """h for each row of values [rows, n]."""
    rows = Rows(values, costs)
    mask = torch.empty(values.shape, dtype=torch.bool)
    extension.native.cpu.hard_topk_rows(
        *rows.arguments, budget.data_ptr(), budget.stride(0), mask.data_ptr(), *rows.rest
    )
    return mask


def hard_topk_global_forward(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], absolute: bool, group: str
) -> list[torch.Tensor]:
    """h for a list that shares one budget."""
    problem = TensorList(values, costs, group)
    hard = [torch.empty(v.shape, dtype=torch.bool) for v in problem.values]
    _table, first = problem.first(hard)
    extension.native.cpu.hard_topk_global(*first, float(budget), absolute, *problem.rest())
    return hard
