"""The compiled extension: tensors to pointers, shapes and strides. The only file that calls `_native`."""

from __future__ import annotations

import ctypes
import importlib
import json
import threading
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import torch

from spartan_kernels.arguments import block_grid, require_beta
from spartan_kernels.blocks import score_list
from spartan_kernels.groups import gather, process_group

_native: Any = None
_import_error: str | None = None
try:
    _native = importlib.import_module("spartan_kernels._native")
except ImportError as error:
    _import_error = str(error)


@cache
def unavailable() -> str | None:
    """Why the extension cannot be used, or None."""
    if _native is not None:
        return None
    record = Path(__file__).resolve().parent.parent / "_build.json"
    reason = json.loads(record.read_text())["reason"] if record.exists() else None
    return f"the extension was not built: {reason}" if reason else f"the extension does not load: {_import_error}"


def build_info() -> dict[str, Any]:
    """How the extension was built and what it runs on here."""
    if _native is None:
        return {"available": False, "reason": unavailable()}
    return {
        "available": True,
        "reason": None,
        "compiler": _native.compiler,
        "instruction_set": _native.cpu.instruction_set(),
        "openmp": _native.cpu.parallel_available(),
        "cuda": _native.cuda_version,
        "cuda_archs": _native.cuda_archs,
        "cuda_reason": _native.cuda_reason,
    }


def _compute(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, in the dtype the kernels compute in: float64, or float32 for everything narrower."""
    return tensor.detach().to(_computed_in(tensor.dtype)).contiguous()


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}


_scratch = _Scratch()
_KEPT_BYTES = 16 << 20


def _workspace(size: int, use: str = "kernel") -> torch.Tensor:
    """Scratch of this thread, kept up to 16 MiB for each use: fresh pages cost as much as a pass over the data."""
    if size > _KEPT_BYTES:
        return torch.empty(size, dtype=torch.uint8)
    tensor = _scratch.tensors.get(use)
    if tensor is None or tensor.numel() < size:
        tensor = _scratch.tensors[use] = torch.empty(size, dtype=torch.uint8)
    return tensor


_ROW_BYTES = 7 * 8  # of a TableRow (csrc/ops.h)
# Dtype of csrc/ops.h
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


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
            words[1::7] = array("q", [_pointer(c) for c in self.arrays])
        words[2::7] = array("q", self.unit.tobytes())
        words[3::7] = self.lengths
        for column, tensors in enumerate(extra, start=4):
            if tensors:
                words[column::7] = array("q", [t.data_ptr() for t in tensors])
        return words, (_DTYPES[self.dtype], words.buffer_info()[0], count)

    def rest(self) -> tuple[int, int, int, Any]:
        """The arguments that every kernel takes last."""
        element = 8 if self.dtype == torch.float64 else 4
        size = _native.cpu.workspace_bytes(len(self.values), sum(self.lengths), element, self.ranks is not None)
        workspace = _workspace(size)
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


_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # ops.h, Dtype
_LONGEST_STORED = 131_072  # longer rows of 16-bit numbers are widened whole


class _Rows:
    """Rows of one tensor: the arguments that every row kernel takes first, and the workspace that it takes last."""

    def __init__(self, values: torch.Tensor, costs: torch.Tensor | None) -> None:
        rows, length = values.shape
        self.dtype = values.dtype
        if self.dtype not in _DTYPES or (values.element_size() == 2 and length > _LONGEST_STORED):
            self.dtype = torch.float32
        self.values = self.brought(values)
        if self.values.stride(-1) != 1 and length > 1:
            self.values = self.values.contiguous()
        self.costs = None if costs is None or costs.dim() == 0 else self.brought(costs).contiguous()
        unit = float(costs) if costs is not None and costs.dim() == 0 else 1.0
        cost_stride = length if self.costs is not None and self.costs.dim() == 2 else 0
        address, stride = self.values.data_ptr(), self.values.stride(0)
        table = _native.cpu.Rows(address, _pointer(self.costs), unit, rows, length, stride, cost_stride)
        self.arguments = (_DTYPES[self.dtype], table)
        threads = torch.get_num_threads()
        self.scratch = _workspace(_native.cpu.rows_workspace_bytes(length, self.values.element_size(), threads))
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
        _pointer(grad_costs),
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


class _Weight:
    """A weight in blocks, and the arguments that every masked-weight kernel takes first."""

    def __init__(self, weight: torch.Tensor, rows: int, columns: int) -> None:
        self.weight = _compute(weight)
        self.element = self.weight.element_size()
        if weight.dim() < 2:
            shape = (1, weight.numel(), 1)
        else:
            shape = (weight.shape[0], weight.shape[1], weight[0, 0].numel() if weight.numel() else 1)
        self.blocks = _native.Blocks(*shape, rows, columns)

    def workspace(self) -> torch.Tensor:
        return _workspace(_native.cpu.blocks_workspace_bytes(self.blocks))


def _mask_arguments(
    soft: torch.Tensor | None, hard: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return None if soft is None else _compute(soft), None if hard is None else hard.contiguous()


def _cost_arguments(costs: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    return (None, float(costs)) if costs.dim() == 0 else (_compute(costs), 1.0)


def masked_weight_forward(
    weight: torch.Tensor,
    soft: torch.Tensor | None,
    hard: torch.Tensor | None,
    beta: torch.Tensor,
    costs: torch.Tensor,
    rows: int,
    columns: int,
    straight_through: bool,
) -> torch.Tensor:
    """theta * m * h."""
    w = _Weight(weight, rows, columns)
    m, h = _mask_arguments(soft, hard)
    result = torch.empty_like(w.weight)
    _native.cpu.masked_weight(
        w.element, w.blocks, w.weight.data_ptr(), _pointer(m), _pointer(h), result.data_ptr(), torch.get_num_threads()
    )
    return result.to(weight.dtype)


def masked_weight_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    soft: torch.Tensor | None,
    hard: torch.Tensor | None,
    beta: torch.Tensor,
    costs: torch.Tensor,
    rows: int,
    columns: int,
    straight_through: bool,
) -> torch.Tensor:
    """G_i m_b + sign(theta_i) beta s_b g_b / a_b."""
    result = torch.empty_like(weight, dtype=_computed_in(weight.dtype), memory_format=torch.contiguous_format)
    _backward_into(result, _compute(grad), weight, soft, hard, beta, costs, rows, columns, straight_through)
    return result.to(weight.dtype)


def masked_weight_backward_(grad: torch.Tensor, *operands: Any) -> None:
    """The same, in the memory of grad."""
    g = _compute(grad)
    _backward_into(g, g, *operands)
    if g.data_ptr() != grad.data_ptr():
        grad.copy_(g)


def _backward_into(
    result: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    soft: torch.Tensor | None,
    hard: torch.Tensor | None,
    beta: torch.Tensor,
    costs: torch.Tensor,
    rows: int,
    columns: int,
    straight_through: bool,
) -> None:
    w = _Weight(weight, rows, columns)
    m, h = _mask_arguments(soft, hard)
    array, unit = _cost_arguments(costs)
    workspace = w.workspace()
    _native.cpu.masked_weight_backward(
        w.element,
        w.blocks,
        grad.data_ptr(),
        w.weight.data_ptr(),
        _pointer(m),
        _pointer(h),
        float(beta),
        _pointer(array),
        unit,
        straight_through,
        result.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        torch.get_num_threads(),
    )


def masked_weight_coupling(
    grad: torch.Tensor,
    weight: torch.Tensor,
    soft: torch.Tensor,
    beta: torch.Tensor,
    costs: torch.Tensor,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """[sum_b (1 - m_b) g_b m_b, sum_b a_b s_b] of this weight."""
    w = _Weight(weight, rows, columns)
    g, m = _compute(grad), _compute(soft)
    array, unit = _cost_arguments(costs)
    sums, workspace = torch.empty(2, dtype=torch.float64), w.workspace()
    _native.cpu.masked_weight_coupling(
        w.element,
        w.blocks,
        g.data_ptr(),
        w.weight.data_ptr(),
        m.data_ptr(),
        float(beta),
        _pointer(array),
        unit,
        sums.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        torch.get_num_threads(),
    )
    return sums


def masked_weight_correct_(
    grad: torch.Tensor, weight: torch.Tensor, soft: torch.Tensor, scale: torch.Tensor, rows: int, columns: int
) -> None:
    """grad_i -= sign(theta_i) s_b scale."""
    w = _Weight(weight, rows, columns)
    g, m = _compute(grad), _compute(soft)
    _native.cpu.masked_weight_correct(
        w.element, w.blocks, g.data_ptr(), w.weight.data_ptr(), m.data_ptr(), float(scale), torch.get_num_threads()
    )
    if g.data_ptr() != grad.data_ptr():
        grad.copy_(g)


def add_block_signs_(grad: torch.Tensor, weight: torch.Tensor, pull: torch.Tensor, rows: int, columns: int) -> None:
    """grad_i += sign(theta_i) pull_b."""
    w = _Weight(weight, rows, columns)
    g, p = _compute(grad), _compute(pull).to(w.weight.dtype)
    _native.cpu.add_block_signs(
        w.element, w.blocks, g.data_ptr(), w.weight.data_ptr(), p.data_ptr(), torch.get_num_threads()
    )
    if g.data_ptr() != grad.data_ptr():
        grad.copy_(g)


def block_scores(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Sum of |theta| over each block."""
    w = _Weight(weight, rows, columns)
    scores = torch.empty(block_grid(weight.shape, (rows, columns)), dtype=w.weight.dtype)
    _native.cpu.block_scores(w.element, w.blocks, w.weight.data_ptr(), scores.data_ptr(), torch.get_num_threads())
    return scores.to(weight.dtype)
