"""The extension's CUDA kernels: tensors to pointers, shapes and the current stream. Nothing here waits for the GPU.

The CUDA half of native.py, which imports the extension for both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from spartan_kernels.arguments import block_grid, clamp_budget, inspectable, require_beta, require_costs, require_finite
from spartan_kernels.backends import native
from spartan_kernels.blocks import score_list
from spartan_kernels.groups import refuse_group

_native: Any = native._native

_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # ops.h, Dtype


@cache
def unavailable() -> str | None:
    """Why the CUDA kernels cannot be used, or None."""
    if _native is None:
        return native.unavailable()
    if _native.cuda_version is None:
        return f"the extension was built without CUDA kernels: {_native.cuda_reason}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if problem := _native.cuda.problem():
        return f"the CUDA {_native.cuda_version} runtime of the extension cannot work here: {problem}"
    built = [(int(arch[:-1]), int(arch[-1])) for arch in _native.cuda_archs.split(",")]
    devices = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    if any(_runs(device, built) for device in devices):
        return None
    found = ", ".join(f"{major}.{minor}" for major, minor in devices)
    return f"the extension was built for CUDA architectures {_native.cuda_archs}; the devices here are {found}"


def _runs(device: tuple[int, int], built: list[tuple[int, int]]) -> bool:
    """Binary code runs on later minor versions; of the newest there is PTX, which later devices compile."""
    return device >= max(built) or any(device[0] == major and device[1] >= minor for major, minor in built)


def _stream(like: torch.Tensor) -> tuple[int, int]:
    return torch.cuda.current_stream(like.device).cuda_stream, like.device.index


def _call(function: Callable[..., None], like: torch.Tensor, *arguments: Any) -> None:
    """Launch on the device and current stream of `like`, and leave the caller's current device as it was."""
    with torch.cuda.device_of(like):
        function(*arguments, *_stream(like))


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().contiguous()


class _Rows:
    """Rows of one tensor; costs of every shape are one array with two strides."""

    def __init__(self, values: torch.Tensor, costs: torch.Tensor | None) -> None:
        self.values = values.detach() if values.stride(-1) == 1 else values.detach().contiguous()
        self.costs = _contiguous(costs)
        rows, length = values.shape
        step = int(costs is not None and costs.dim() > 0)
        stride = length if costs is not None and costs.dim() == 2 else 0
        self.dtype = _DTYPES[values.dtype]
        apart = self.values.stride(0)
        self.rows = _native.cuda.Rows(self.values.data_ptr(), _pointer(self.costs), rows, length, apart, stride, step)


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
    _call(
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
    _call(
        _native.cuda.soft_topk_rows_backward,
        g,
        rows.dtype,
        rows.rows,
        g.data_ptr(),
        saved.data_ptr(),
        beta.data_ptr(),
        grad_values.data_ptr(),
        _pointer(grad_costs),
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
    _call(_native.cuda.hard_topk_rows, values, rows.dtype, rows.rows, k.data_ptr(), mask.data_ptr())
    return mask


class _List:
    """A list of tensors as the extension's table: one row of seven 64-bit words for each (ops.h, cuda::TableRow)."""

    def __init__(self, values: list[torch.Tensor], costs: list[torch.Tensor]) -> None:
        self.values = [v.detach().contiguous() for v in values]
        self.costs = [c.contiguous() for c in costs]
        self.dtype = _DTYPES[values[0].dtype]
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
    _table, workspace, first = problem.arguments(*masks)
    _call(
        _native.cuda.topk_global,
        values[0],
        *first,
        budget.data_ptr(),
        beta.data_ptr(),
        absolute,
        _pointer(state),
        _pointer(threshold),
        workspace.data_ptr(),
    )


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
        _call(
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
    return [Launch(*note) for note in _native.cuda.topk_global_launches(_DTYPES[dtype], soft, hard, cost_arrays)]


def backward_launch_plan(dtype: torch.dtype, *, cost_arrays: bool = False, cost_grad: bool = False) -> list[Launch]:
    """The same for the gradient of `soft_topk_global`."""
    notes = _native.cuda.soft_topk_global_backward_launches(_DTYPES[dtype], cost_arrays, cost_grad)
    return [Launch(*note) for note in notes]


class _Weight:
    """A weight in blocks, and the arguments that every masked-weight kernel takes first."""

    def __init__(self, weight: torch.Tensor, rows: int, columns: int) -> None:
        self.weight = weight.detach().contiguous()
        if weight.dim() < 2:
            shape = (1, weight.numel(), 1)
        else:
            shape = (weight.shape[0], weight.shape[1], weight[0, 0].numel() if weight.numel() else 1)
        self.first = (_DTYPES[weight.dtype], _native.Blocks(*shape, rows, columns))


class _Costs:
    """One cost for each block, or one number for all."""

    def __init__(self, costs: torch.Tensor) -> None:
        self.kept = costs.contiguous()
        pointer = self.kept.data_ptr()
        self.arguments = (0, pointer) if costs.dim() == 0 else (pointer, 0)


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
    m, h = _contiguous(soft), _contiguous(hard)
    result = torch.empty_like(w.weight)
    _call(
        _native.cuda.masked_weight,
        weight,
        *w.first,
        w.weight.data_ptr(),
        _pointer(m),
        _pointer(h),
        result.data_ptr(),
    )
    return result


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
    w, a = _Weight(weight, rows, columns), _Costs(costs)
    g, m, h = grad.to(weight.dtype).contiguous(), _contiguous(soft), _contiguous(hard)
    result = torch.empty_like(w.weight)
    _call(
        _native.cuda.masked_weight_backward,
        weight,
        *w.first,
        g.data_ptr(),
        w.weight.data_ptr(),
        _pointer(m),
        _pointer(h),
        beta.data_ptr(),
        *a.arguments,
        straight_through,
        result.data_ptr(),
    )
    return result


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
    w, a = _Weight(weight, rows, columns), _Costs(costs)
    g, m = grad.contiguous(), soft.contiguous()
    sums = torch.empty(2, dtype=torch.float64, device=weight.device)
    workspace = torch.empty(_native.cuda.coupling_workspace, dtype=torch.float64, device=weight.device)
    _call(
        _native.cuda.masked_weight_coupling,
        weight,
        *w.first,
        g.data_ptr(),
        w.weight.data_ptr(),
        m.data_ptr(),
        beta.data_ptr(),
        *a.arguments,
        sums.data_ptr(),
        workspace.data_ptr(),
    )
    return sums


def masked_weight_correct_(
    grad: torch.Tensor, weight: torch.Tensor, soft: torch.Tensor, scale: torch.Tensor, rows: int, columns: int
) -> None:
    """grad_i -= sign(theta_i) s_b scale."""
    w = _Weight(weight, rows, columns)
    g, m = grad.contiguous(), soft.contiguous()
    _call(
        _native.cuda.masked_weight_correct,
        weight,
        *w.first,
        g.data_ptr(),
        w.weight.data_ptr(),
        m.data_ptr(),
        scale.data_ptr(),
    )
    if g.data_ptr() != grad.data_ptr():
        grad.copy_(g)


def block_scores(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Sum of |theta| over each block."""
    w = _Weight(weight, rows, columns)
    grid = block_grid(weight.shape, (rows, columns))
    scores = torch.empty(grid, dtype=weight.dtype, device=weight.device)
    _call(_native.cuda.block_scores, weight, *w.first, w.weight.data_ptr(), scores.data_ptr())
    return scores
