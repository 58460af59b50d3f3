"""Hard top-k in CUDA C++: by rows, and lists that share a budget."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension
from spartan_kernels.backends.cuda.lists import launch_list, solve_list
from spartan_kernels.backends.cuda.rows import Rows, as_lists, inspect_rows, row_costs
from spartan_kernels.groups import refuse_group


def hard_topk_forward(values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None) -> torch.Tensor:
    """h for each row of values [rows, n]."""
    inspect_rows(values, budget, costs, None)
    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    if as_lists(values):
        beta = torch.ones((), dtype=torch.float64, device=values.device)
        for r, (v, k) in enumerate(zip(values, budget, strict=True)):
            launch_list([v], k, row_costs(costs, r), beta, False, (None, [mask[r]]), None, None)
        return mask
    rows = Rows(values, costs)
    k = budget.contiguous()
    extension.call(extension.native.cuda.hard_topk_rows, values, rows.dtype, rows.rows, k.data_ptr(), mask.data_ptr())
    return mask


def hard_topk_global_forward(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], absolute: bool, group: str
) -> list[torch.Tensor]:
    """h for a list that shares one budget."""
    refuse_group(group, "cuda")
    hard = [torch.empty(v.shape, dtype=torch.bool, device=v.device) for v in values]
    beta = torch.ones((), dtype=torch.float64, device=values[0].device)
    solve_list(values, budget, costs, beta, absolute, (None, hard), None, None)
    return hard
