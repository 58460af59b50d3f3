"""Soft and hard top-k on the compiled extension: lists and rows to tables of pointers, shapes and strides."""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

import torch

from spartan_kernels.arguments import require_beta
from spartan_kernels.backends import native
from spartan_kernels.backends.native_weight import block_scores
from spartan_kernels.blocks import score_list
from spartan_kernels.groups import gather, process_group

_native: Any = native._native

_ROW_BYTES = 7 * 8  # of a TableRow (csrc/ops.h)


class _Ranks:
    """The exchange of a solve over the ranks of a process group; keeps what the extension reads last."""

    def __init__(self, name: str) -> None:
        self.name, self.last = name, torch.empty(0)
        group = process_group(name)
        self.native = _native.Ranks(group.rank(), group.size(), self._gather)

    def _gather(self, address: int, count: int) -> int:
        own = torch.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype=torch.uint8)
        self.last = gather(own, self.name)
        return self.last.data_ptr()


class _List:
    """A list of tensors as the extension's table: one row of seven 64-bit words for each (ops.h, TableRow)."""

    def __init__(self, values: list[torch.Tensor], costs: list[torch.Tensor], group: str = "") -> None:
        self.values = [v if v.is_contiguous() else v.contiguous() for v in values]
        self.arrays = [c.contiguous() if c.dim() else None for c in costs]
        self.unit = array("d", [1.0 if c.dim() else float(c) for c in costs] or [1.0]) * (1 if costs else len(values))
        self.lengths = array("q", [v.numel() for v in values])
        self.dtype = values[0].dtype
        self.ranks = _Ranks(group) if group else None

    def empty(self) -> list[torch.Tensor]:
        """Room for one entry for each value, in the values' dtype."""
        return [torch.empty_like(v) for v in self.values]

    def first(self, *extra: list[torch.Tensor]) -> tuple[array[int], tuple[int, int, int]]:
        """The table, to be kept alive, and the arguments that every kernel takes first."""
        count = len(self.values)
        words = array("q", bytes(_ROW_BYTES * count))
        words[0::7] = array("q", [v.data_ptr() for v in self.values])
        if self.arrays:
            words[1::7] = array("q", [native.pointer(c) for c in self.arrays])
        words[2::7] = array("q", self.unit.tobytes())
        words[3::7] = self.lengths
        for column, tensors in enumerate(extra, start=4):
            if tensors:
                words[column::7] = array("q", [t.data_ptr() for t in tensors])
        return words, (native.DTYPES[self.dtype], words.buffer_info()[0], count)

    def rest(self) -> tuple[int, int, int, Any]:
        """The arguments that every kernel takes last."""
        element = 8 if self.dtype == torch.float64 else 4
        size = _native.cpu.workspace_bytes(len(self.values), sum(self.lengths), element, self.ranks is not None)
        workspace = native.workspace(size)
        ranks = None if self.ranks is None else self.ranks.native
        return workspace.data_ptr(), workspace.numel(), torch.get_num_threads(), ranks


def soft_topk_global_forward(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], beta: torch.Tensor, group: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """m for a list that shares one budget."""
    problem = _List(values, costs, group)
    masks = problem.empty()
    threshold = torch.empty(2, dtype=torch.float64)
    _table, first = problem.first(masks)
    _native.cpu.soft_topk_global(*first, float(budget), float(beta), False, 0, threshold.data_ptr(), *problem.rest())
    return masks, threshold


def soft_topk_global_backward(
    grads: list[torch.Tensor],
    values: list[torch.Tensor],
    threshold: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor,
    cost_grad: bool,
    group: str,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta of a list that shares one budget."""
    problem = _List(values, costs, group)
    g = [grad.detach().to(problem.dtype).contiguous() for grad in grads]
    grad_values, grad_costs = problem.empty(), problem.empty() if cost_grad else []
    saved, scalars = threshold.contiguous(), torch.empty(2, dtype=torch.float64)
    _table, first = problem.first(g, grad_values, grad_costs)
    _native.cpu.soft_topk_global_backward(*first, saved.data_ptr(), float(beta), scalars.data_ptr(), *problem.rest())
    return grad_values, grad_costs, scalars[0].clone(), scalars[1].clone()


def solve_masks_(
    values: list[torch.Tensor],
    budget: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor,
    absolute: bool,
    block_sizes: list[int],
    soft: list[torch.Tensor],
    hard: list[torch.Tensor],
    state: torch.Tensor,
    group: str,
) -> None:
    """Soft and hard mask of a training step, in place."""
    values, absolute = score_list(values, block_sizes, absolute, block_scores)
    problem = _List(values, costs, group)
    threshold = torch.empty(2, dtype=torch.float64)
    _table, first = problem.first(soft, hard)
    _native.cpu.soft_topk_global(
        *first, float(budget), float(beta), absolute, state.data_ptr(), threshold.data_ptr(), *problem.rest()
    )


def hard_topk_global_forward(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], absolute: bool, group: str
) -> list[torch.Tensor]:
    """h for a list that shares one budget."""
    problem = _List(values, costs, group)
    hard = [torch.empty(v.shape, dtype=torch.bool) for v in problem.values]
    _table, first = problem.first(hard)
    _native.cpu.hard_topk_global(*first, float(budget), absolute, *problem.rest())
    return hard


_LONGEST_STORED = 131_072  # longer rows of 16-bit numbers are widened whole


class _Rows:
    """Rows of one tensor: the arguments that every row kernel takes first, and the workspace that it takes last."""

    def __init__(self, values: torch.Tensor, costs: torch.Tensor | None) -> None:
        rows, length = values.shape
        self.dtype = values.dtype
        if self.dtype not in native.DTYPES or (values.element_size() == 2 and length > _LONGEST_STORED):
            self.dtype = torch.float32
        self.values = self.brought(values)
        if self.values.stride(-1) != 1 and length > 1:
            self.values = self.values.contiguous()
        self.costs = None if costs is None or costs.dim() == 0 else self.brought(costs).contiguous()
        unit = float(costs) if costs is not None and costs.dim() == 0 else 1.0
        cost_stride = length if self.costs is not None and self.costs.dim() == 2 else 0
        address, stride = self.values.data_ptr(), self.values.stride(0)
        table = _native.cpu.Rows(address, native.pointer(self.costs), unit, rows, length, stride, cost_stride)
        self.arguments = (native.DTYPES[self.dtype], table)
        threads = torch.get_num_threads()
        self.scratch = native.workspace(_native.cpu.rows_workspace_bytes(length, self.values.element_size(), threads))
        self.rest = (self.scratch.data_ptr(), self.scratch.numel(), threads)

    def brought(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self.dtype)

    def empty(self) -> torch.Tensor:
        return torch.empty(self.values.shape, dtype=self.dtype)


def soft_topk_forward(
    values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (centre, shift) for each row of values [rows, n]."""
    require_beta(beta)
    rows = _Rows(values, costs)
    mask = rows.empty()
    threshold = torch.empty((values.shape[0], 2), dtype=torch.float64)
    _native.cpu.soft_topk_rows(
        *rows.arguments,
        budget.data_ptr(),
        budget.stride(0),
        float(beta),
        mask.data_ptr(),
        threshold.data_ptr(),
        *rows.rest,
    )
    return mask.to(values.dtype), threshold


def soft_topk_backward(
    grad: torch.Tensor,
    values: torch.Tensor,
    threshold: torch.Tensor,
    costs: torch.Tensor | None,
    beta: torch.Tensor,
    cost_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    rows = _Rows(values, costs)
    g, t = rows.brought(grad).contiguous(), threshold.contiguous()
    grad_values = rows.empty()
    grad_costs = rows.empty() if cost_grad else None
    grad_budget, grad_beta = (torch.empty(values.shape[0], dtype=torch.float64) for _ in range(2))
    _native.cpu.soft_topk_rows_backward(
        *rows.arguments,
        g.data_ptr(),
        t.data_ptr(),
        float(beta),
        grad_values.data_ptr(),
        native.pointer(grad_costs),
        grad_budget.data_ptr(),
        grad_beta.data_ptr(),
        *rows.rest,
    )
    returned = values.new_empty(0) if grad_costs is None else grad_costs.to(values.dtype)
    return grad_values.to(values.dtype), returned, grad_budget, grad_beta


def hard_topk_forward(values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None) -> torch.Tensor:
    """h for each row of values [rows, n]."""
    rows = _Rows(values, costs)
    mask = torch.empty(values.shape, dtype=torch.bool)
    _native.cpu.hard_topk_rows(*rows.arguments, budget.data_ptr(), budget.stride(0), mask.data_ptr(), *rows.rest)
    return mask
