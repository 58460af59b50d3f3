"""Hard top-k: a weighted selection by v/a that never exceeds its budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch

from spartan_kernels.arguments import number
from spartan_kernels.groups import group_name
from spartan_kernels.operands import HardTopk, HardTopkGlobal, HardTopkIndices
from spartan_kernels.ops._define import define
from spartan_kernels.ops._problem import global_problem, row_problem
from spartan_kernels.ops._shards import shards
from spartan_kernels.ops._vmap import fold_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _like(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values, dtype=torch.bool, memory_format=torch.contiguous_format)


hard_topk_forward = define(
    "hard_topk_forward", HardTopk, "Tensor", lambda o: _like(o.values), fold_rows("values", "budget")
)
hard_topk_indices_forward = define(
    "hard_topk_indices_forward",
    HardTopkIndices,
    "(Tensor, Tensor)",
    lambda o: (_like(o.values), o.values.new_empty((o.values.shape[0], o.k), dtype=torch.int64)),
    fold_rows("values"),
)
hard_topk_global_forward = define(
    "hard_topk_global_forward", HardTopkGlobal, "Tensor[]", lambda o: [_like(v) for v in o.values]
)


@overload
def hard_topk(
    values: torch.Tensor,
    budget: float | torch.Tensor,
    costs: float | torch.Tensor | None = None,
    dim: int = -1,
    *,
    return_indices: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def hard_topk(
    values: torch.Tensor,
    budget: int,
    costs: None = None,
    dim: int = -1,
    *,
    return_indices: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def hard_topk(
    values: torch.Tensor,
    budget: float | torch.Tensor,
    costs: float | torch.Tensor | None = None,
    dim: int = -1,
    *,
    return_indices: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The entries taken in descending v/a until the next one would exceed the budget, along one dimension.

    h_i = 1 for the longest prefix, in descending v_i / a_i with ties to the lowest index, whose costs sum to at most k.
    Every backend finds the same bits: v and a are taken in float32 (in float64 where that is what they are), and their
    quotient is rounded to nearest.

    Args:
        values: v, any shape, floating point. An entry of -inf is masked: it is never kept, and costs nothing.
        budget: k, a number or a tensor shaped like `values` without `dim`; in [0, sum of the costs of entries that are
            not -inf].
        costs: a > 0; None (ones), a number, one per entry of `dim`, or shaped like `values`.
        dim: the dimension that shares a budget.
        return_indices: return the indices of k entries along `dim` too, in ascending order. The budget is then an int
            in [0, n] for all rows, and there are no costs. A row with fewer than k entries that are not -inf is no
            error: its mask keeps those, and its indices have the first entries of -inf among them.
        backend: "auto" or the name of a backend.

    Returns:
        bool, shape of `values`. With unit costs exactly floor(k) entries are True, also on ties. With `return_indices`
        the mask and the indices, int64, shaped like `values` but k along `dim`, as PyTorch's pooling returns both;
        `mask.gather(dim, indices)` is False where an index is that of a masked entry.

    Raises:
        TypeError, ValueError: as `soft_topk`. On a GPU a budget above the sum keeps all entries that are not -inf.

    Source: Tai, Tian, Lim, "Spartan", NeurIPS 2022: the projection of the forward pass.
    """
    with torch.no_grad():
        rows, row_budget, row_costs, restore = row_problem(values, budget, costs, dim)
        if return_indices:
            k = _count(budget, costs, rows.shape[1])
            mask, indices = hard_topk_indices_forward(HardTopkIndices(rows, k, backend or ""))
            return restore(mask), restore(indices)
        return restore(hard_topk_forward(HardTopk(rows, row_budget, row_costs, backend or "")))


def _count(budget: float | torch.Tensor, costs: float | torch.Tensor | None, length: int) -> int:
    """The budget as the number of indices of every row."""
    if costs is not None:
        raise ValueError(f"costs must be None with return_indices=True; got {costs!r}")
    if isinstance(budget, (float, torch.Tensor)):
        raise TypeError(f"budget must be an int, one for all rows, with return_indices=True; got {budget!r}")
    if not 0 <= budget <= length:
        raise ValueError(f"budget must be in [0, {length}]; got {budget}")
    return budget


def hard_topk_global(
    values: Sequence[torch.Tensor],
    budget: float | torch.Tensor,
    costs: Sequence[float | torch.Tensor] | None = None,
    *,
    absolute: bool = False,
    group: ProcessGroup | str | None = None,
    backend: str | None = None,
) -> list[torch.Tensor]:
    """`hard_topk` under one budget over many tensors; the index that breaks ties counts through the list.

    Args:
        values: tensors of any shapes, of one dtype and device; or DTensors, as in `soft_topk_global`. Entries of -inf
            are masked, as in `hard_topk`.
        budget: k, a number or 0-dim tensor, for all of them together.
        costs: None (ones), or for each tensor a number, a 0-dim tensor or a tensor of its shape.
        absolute: choose by |values| (no copy is made).
        group: a `torch.distributed` process group (or its name) whose ranks each pass their own part, which may be
            empty; the index that breaks ties counts through the ranks in their order, on each through the list of its
            parts. None for this process alone, and with DTensors, whose mesh has it. Served by the native,
            Triton and reference backends.
        backend: "auto" or the name of a backend.

    Returns:
        One bool mask for each tensor, of its shape; a DTensor placed as its values where they are one.

    Raises:
        TypeError, ValueError: as `soft_topk_global`.
    """
    with torch.no_grad():
        parts = shards(values, costs, group)
        tensors, cost_list = global_problem(parts.values, parts.costs)
        k = number("budget", budget, tensors[0].device)
        name = group_name(parts.group)
        o = HardTopkGlobal(tensors, k, cost_list, absolute, name, backend or "")
        return parts.restore(hard_topk_global_forward(o))
