"""Hard top-k in CUDA C++: by rows, and lists that share a budget."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension
from spartan_kernels.backends.cuda.lists import launch_list, solve_list
from spartan_kernels.backends.cuda.rows import Rows, as_lists
from spartan_kernels.backends.shared import check_rows, costs_of_row, with_indices
from spartan_kernels.groups import refuse_group
from spartan_kernels.operands import HardTopk, HardTopkGlobal, HardTopkIndices


def hard_topk_forward(o: HardTopk) -> torch.Tensor:
    """h for each row of values [rows, n]."""
    check_rows(o.values, o.budget, o.costs, None)
    mask = torch.empty(o.values.shape, dtype=torch.bool, device=o.values.device)
    if as_lists(o.values):
        beta = torch.ones((), dtype=torch.float64, device=o.values.device)
        for r, (v, k) in enumerate(zip(o.values, o.budget, strict=True)):
            launch_list([v], k, costs_of_row(o.costs, r), beta, False, (None, [mask[r]]), None, None)
        return mask
    rows = Rows(o.values, o.costs)
    k = o.budget.contiguous()
    extension.call(extension.native.cuda.hard_topk_rows, o.values, rows.dtype, rows.rows, k.data_ptr(), mask.data_ptr())
    return mask


def hard_topk_indices_forward(o: HardTopkIndices) -> tuple[torch.Tensor, torch.Tensor]:
    """h for each row of values [rows, n], and the indices of k entries of each."""
    return with_indices(o, hard_topk_forward)


def hard_topk_global_forward(o: HardTopkGlobal) -> list[torch.Tensor]:
    """h for a list that shares one budget."""
    refuse_group(o.group, "cuda")
    hard = [torch.empty(v.shape, dtype=torch.bool, device=v.device) for v in o.values]
    beta = torch.ones((), dtype=torch.float64, device=o.values[0].device)
    solve_list(o.values, o.budget, o.costs, beta, o.absolute, (None, hard), None, None)
    return hard
