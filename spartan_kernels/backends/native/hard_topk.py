"""Hard top-k on the compiled extension: by rows, and lists that share a budget."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension
from spartan_kernels.backends.native.lists import TensorList
from spartan_kernels.backends.native.rows import Budgets, Rows
from spartan_kernels.backends.native.unmasked import Unmasked
from spartan_kernels.backends.shared import costs_of_row, with_indices
from spartan_kernels.operands import HardTopk, HardTopkGlobal, HardTopkIndices, as_declared


def hard_topk_forward(o: HardTopk) -> torch.Tensor:
    """h for each row of values [rows, n]."""
    rows, budgets = Rows(o.values, o.costs), Budgets(o.budget)
    mask = extension.empty(o.values.shape, torch.bool)
    try:
        extension.native.cpu.hard_topk_rows(*rows.arguments, *budgets.arguments, mask.data_ptr(), *rows.rest)
    except extension.native.NotFinite:
        if not rows.long:
            raise
        o = as_declared(o)
        for i, row in enumerate(o.values):
            listed = HardTopkGlobal([row], o.budget[i], costs_of_row(o.costs, i), absolute=False)
            (mask[i],) = hard_topk_global_forward(listed)
    return mask


def hard_topk_indices_forward(o: HardTopkIndices) -> tuple[torch.Tensor, torch.Tensor]:
    """h for each row of values [rows, n], and the indices of k entries of each."""
    rows = Rows(o.values, None)
    mask = extension.empty(o.values.shape, torch.bool)
    indices = extension.empty((o.values.shape[0], o.k), torch.int64)
    try:
        extension.native.cpu.hard_topk_indices_rows(
            *rows.arguments, o.k, mask.data_ptr(), indices.data_ptr(), *rows.rest
        )
    except extension.native.NotFinite:
        if not rows.long:
            raise
        return with_indices(o, hard_topk_forward)
    return mask, indices


def hard_topk_global_forward(o: HardTopkGlobal) -> list[torch.Tensor]:
    """h for a list that shares one budget."""
    try:
        return _hard_of_list(o)
    except extension.native.NotFinite:
        rest = Unmasked(o.values, o.costs)
        return rest.whole(_hard_of_list(o._replace(values=rest.values, costs=rest.costs)))


def _hard_of_list(o: HardTopkGlobal) -> list[torch.Tensor]:
    problem = TensorList(o.values, o.costs, o.group)
    hard = [extension.empty(v.shape, torch.bool) for v in problem.values]
    _table, first = problem.first(hard)
    extension.native.cpu.hard_topk_global(*first, float(o.budget), o.absolute, *problem.rest())
    return hard
