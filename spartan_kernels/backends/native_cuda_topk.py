"""Soft and hard top-k in CUDA C++: lists and rows to tables of pointers, and what the kernels move."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from spartan_kernels.arguments import clamp_budget, inspectable, require_beta, require_costs, require_finite
from spartan_kernels.backends import native, native_cuda
from spartan_kernels.backends.native_cuda_weight import block_scores
from spartan_kernels.blocks import score_list
from spartan_kernels.counts import SolveCounts
from spartan_kernels.groups import refuse_group

_native: Any = native_cuda._native


class _Rows:
    """Rows of one tensor; costs of every shape are one array with two strides."""

    def __init__(self, values: torch.Tensor, costs: torch.Tensor | None) -> None:
        self.values = values.detach() if values.stride(-1) == 1 else values.detach().contiguous()
        self.costs = native_cuda.contiguous(costs)
        rows, length = values.shape
        step = int(costs is not None and costs.dim() > 0)
        stride = length if costs is not None and costs.dim() == 2 else 0
        self.dtype = native_cuda.DTYPES[values.dtype]
        apart = self.values.stride(0)
        self.rows = _native.cuda.Rows(
            self.values.data_ptr(), native.pointer(self.costs), rows, length, apart, stride, step
        )


def _inspect_rows(
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


def _as_lists(values: torch.Tensor) -> bool:
    return values.shape[1] > _LONGEST_ROW and values.shape[0] <= _FEW_ROWS


def _row_costs(costs: torch.Tensor | None, row: int) -> list[torch.Tensor]:
    if costs is None:
        return []
    return [costs[row] if costs.dim() == 2 else costs]


def soft_topk_forward(
    values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (centre, shift) for each row of values [rows, n]."""
    _inspect_rows(values, budget, costs, beta)
    mask = torch.empty_like(values, memory_format=torch.contiguous_format)
    threshold = torch.empty((values.shape[0], 2), dtype=torch.float64, device=values.device)
    if _as_lists(values):
        for r, (v, k) in enumerate(zip(values, budget, strict=True)):
            _launch_list([v], k, _row_costs(costs, r), beta, False, ([mask[r]], None), None, threshold[r])
        return mask, threshold
    rows = _Rows(values, costs)
    k = budget.contiguous()
    native_cuda.call(
        _native.cuda.soft_topk_rows,
        values,
        rows.dtype,
        rows.rows,
        k.data_ptr(),
        beta.data_ptr(),
        mask.data_ptr(),
        threshold.data_ptr(),
    )
    return mask, threshold


def soft_topk_backward(
    grad: torch.Tensor,
    values: torch.Tensor,
    threshold: torch.Tensor,
    costs: torch.Tensor | None,
    beta: torch.Tensor,
    cost_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    g, saved = grad.to(values.dtype).contiguous(), threshold.contiguous()
    if _as_lists(values):
        found = [
            soft_topk_global_backward([g[r]], [v], saved[r], _row_costs(costs, r), beta, cost_grad, "")
            for r, v in enumerate(values)
        ]
        of_values, of_costs, of_budget, of_beta = zip(*found, strict=True)
        grad_costs = torch.stack([c[0] for c in of_costs]) if cost_grad else values.new_empty(0)
        return torch.stack([v[0] for v in of_values]), grad_costs, torch.stack(of_budget), torch.stack(of_beta)
    return _backward_by_rows(g, _Rows(values, costs), saved, beta, cost_grad)


def _backward_by_rows(
    g: torch.Tensor, rows: _Rows, saved: torch.Tensor, beta: torch.Tensor, cost_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_values = torch.empty_like(g)
    grad_costs = torch.empty_like(g) if cost_grad else None
    of_budget = torch.empty(len(g), dtype=torch.float64, device=g.device)
    of_beta = torch.empty_like(of_budget)
    native_cuda.call(
        _native.cuda.soft_topk_rows_backward,
        g,
        rows.dtype,
        rows.rows,
        g.data_ptr(),
        saved.data_ptr(),
        beta.data_ptr(),
        grad_values.data_ptr(),
        native.pointer(grad_costs),
        of_budget.data_ptr(),
        of_beta.data_ptr(),
    )
    return grad_values, g.new_empty(0) if grad_costs is None else grad_costs, of_budget, of_beta


def hard_topk_forward(values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None) -> torch.Tensor:
    """h for each row of values [rows, n]."""
    _inspect_rows(values, budget, costs, None)
    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    if _as_lists(values):
        beta = torch.ones((), dtype=torch.float64, device=values.device)
        for r, (v, k) in enumerate(zip(values, budget, strict=True)):
            _launch_list([v], k, _row_costs(costs, r), beta, False, (None, [mask[r]]), None, None)
        return mask
    rows = _Rows(values, costs)
    k = budget.contiguous()
    native_cuda.call(_native.cuda.hard_topk_rows, values, rows.dtype, rows.rows, k.data_ptr(), mask.data_ptr())
    return mask


class _List:
    """A list of tensors as the extension's table: one row of seven 64-bit words for each (ops.h, cuda::TableRow)."""

    def __init__(self, values: list[torch.Tensor], costs: list[torch.Tensor]) -> None:
        self.values = [v.detach().contiguous() for v in values]
        self.costs = [c.contiguous() for c in costs]
        self.dtype = native_cuda.DTYPES[values[0].dtype]
        self.length = sum(v.numel() for v in values)

    def arguments(self, *extra: list[torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
        """The table in host memory, the workspace, and what every kernel of a list takes first."""
        words = torch.zeros((len(self.values), 7), dtype=torch.int64)
        columns = [[v.data_ptr() for v in self.values], [c.data_ptr() for c in self.costs]]
        columns += [[int(c.dim() > 0) for c in self.costs], [v.numel() for v in self.values]]
        columns += [[t.data_ptr() for t in tensors or []] for tensors in extra]
        for index, column in enumerate(columns):
            if column:
                words[:, index] = torch.tensor(column, dtype=torch.int64)
        size = _native.cuda.global_workspace_bytes(words.data_ptr(), len(words))
        workspace = torch.empty(size, dtype=torch.uint8, device=self.values[0].device)
        return words, workspace, (self.dtype, words.data_ptr(), len(words))


def _inspect_list(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], beta: torch.Tensor | None
) -> None:
    if not inspectable(values[0]):
        return
    if beta is not None:
        require_beta(beta)
    for index, tensor in enumerate(values):
        require_finite(f"values[{index}]", tensor)
    for cost in costs:
        require_costs(cost)
    entries = zip(costs or [v.new_ones(()) for v in values], values, strict=True)
    clamp_budget(budget, sum(float(c.expand_as(v).sum(dtype=torch.float64)) for c, v in entries))


def _solve_list(
    values: list[torch.Tensor],
    budget: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor,
    absolute: bool,
    masks: tuple[list[torch.Tensor] | None, list[torch.Tensor] | None],
    state: torch.Tensor | None,
    threshold: torch.Tensor | None,
) -> None:
    _inspect_list(values, budget, costs, beta)
    _launch_list(values, budget, costs, beta, absolute, masks, state, threshold)


def _launch_list(
    values: list[torch.Tensor],
    budget: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor,
    absolute: bool,
    masks: tuple[list[torch.Tensor] | None, list[torch.Tensor] | None],
    state: torch.Tensor | None,
    threshold: torch.Tensor | None,
) -> None:
    problem = _List(values, costs)
    if problem.length == 0:
        return
    global _last
    _table, workspace, first = problem.arguments(*masks)
    _last = workspace
    native_cuda.call(
        _native.cuda.topk_global,
        values[0],
        *first,
        budget.data_ptr(),
        beta.data_ptr(),
        absolute,
        native.pointer(state),
        native.pointer(threshold),
        workspace.data_ptr(),
    )


_last: torch.Tensor | None = None


def last_solve() -> SolveCounts | None:
    """What the last solve over a list in this process had to do; None before the first.

    For benchmarks: it waits for the device. After a replay of a CUDA graph it tells of that replay, if no other solve
    was called since the graph was captured.
    """
    if _last is None:
        return None
    passes, rewrites, trials = _last[:12].view(torch.int32).tolist()  # Counts of csrc/cuda/global_solve.cuh
    return SolveCounts(passes - trials, rewrites, trials)


def soft_topk_global_forward(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], beta: torch.Tensor, group: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """m for a list that shares one budget."""
    refuse_group(group, "cuda")
    masks = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in values]
    threshold = torch.zeros(2, dtype=torch.float64, device=values[0].device)
    _solve_list(values, budget, costs, beta, False, (masks, None), None, threshold)
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
    refuse_group(group, "cuda")
    problem = _List(values, costs)
    g = [grad.to(v.dtype).contiguous() for grad, v in zip(grads, values, strict=True)]
    grad_values = [torch.empty_like(v) for v in problem.values]
    grad_costs = [torch.empty_like(v) for v in problem.values] if cost_grad else []
    scalars = torch.zeros(2, dtype=torch.float64, device=values[0].device)
    if problem.length:
        saved = threshold.contiguous()
        _table, workspace, first = problem.arguments(g, grad_values, grad_costs)
        native_cuda.call(
            _native.cuda.soft_topk_global_backward,
            values[0],
            *first,
            saved.data_ptr(),
            beta.data_ptr(),
            scalars.data_ptr(),
            workspace.data_ptr(),
        )
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
    refuse_group(group, "cuda")
    _solve_list(values, budget, costs, beta, absolute, (soft, hard), state, None)


def hard_topk_global_forward(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], absolute: bool, group: str
) -> list[torch.Tensor]:
    """h for a list that shares one budget."""
    refuse_group(group, "cuda")
    hard = [torch.empty(v.shape, dtype=torch.bool, device=v.device) for v in values]
    beta = torch.ones((), dtype=torch.float64, device=values[0].device)
    _solve_list(values, budget, costs, beta, absolute, (None, hard), None, None)
    return hard


class Launch(NamedTuple):
    """One launch of a call over a list: bytes for each entry in one pass over them, and the passes it makes.

    `cold` and `warm` passes: when the solve starts afresh and when it continues from its state. More than 2048 ties at
    the hard threshold, and a trial that misses the budget, cost one pass more.
    """

    kernel: str
    read: int
    written: int
    cold: int
    warm: int


def launch_plan(dtype: torch.dtype, *, soft: bool = True, hard: bool = True, cost_arrays: bool = False) -> list[Launch]:
    """What `solve_masks_`, or one of its masks alone, launches and moves, from the code that launches it."""
    return [
        Launch(*note) for note in _native.cuda.topk_global_launches(native_cuda.DTYPES[dtype], soft, hard, cost_arrays)
    ]


def backward_launch_plan(dtype: torch.dtype, *, cost_arrays: bool = False, cost_grad: bool = False) -> list[Launch]:
    """The same for the gradient of `soft_topk_global`."""
    notes = _native.cuda.soft_topk_global_backward_launches(native_cuda.DTYPES[dtype], cost_arrays, cost_grad)
    return [Launch(*note) for note in notes]
