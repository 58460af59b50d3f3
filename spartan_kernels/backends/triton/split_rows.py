"""Soft top-k of rows so long that several programs share each: a fixed number of launches for any number of rows.

extent, start               smallest, largest, mean and spread of each row, and where its search begins
TRIALS x (trial, advance)   moments at t by every program of a row; one step of Halley's by one of them
finish                      the search to its end where that was not enough: one program for a row
write                       masks and thresholds

A program walks one part of one row: the grid is (rows, parts). A row that is solved leaves its programs nothing to do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from spartan_kernels.backends.shared import row_gradients
from spartan_kernels.backends.triton.configs import (
    LANES,
    LONG_ROW_TILE,
    LONG_ROW_WARPS,
    CompileCase,
    compile_case,
    name_of,
    power_of_two,
    row_parts,
    vector_length,
)
from spartan_kernels.backends.triton.launches import Launch
from spartan_kernels.backends.triton.long_rows import (
    extent_sums,
    gradient_sums,
    load_logit,
    moment_sums,
    row_origin,
    search_of,
    search_row,
    write_gradients,
    write_soft,
)
from spartan_kernels.backends.triton.primitives import (
    HIGH,
    INFINITY,
    LOW,
    QUOTA,
    RESIDUAL,
    SIGN,
    TARGET,
    TOTAL,
    T,
    halley_step,
    load_beta,
    logit_at,
)
from spartan_kernels.backends.triton.row_odds import TOLERANCE
from spartan_kernels.backends.triton.soft_topk_rows import cost_strides
from spartan_kernels.operands import SoftTopk, SoftTopkBackward

TRIALS = 4  # normal values take three
# What is known of a row, in float64: after the words of its search ...
LOWEST = tl.constexpr(8)
HIGHEST = tl.constexpr(9)
POISON = tl.constexpr(10)
OPEN = tl.constexpr(11)
CENTRE = tl.constexpr(12)
SHIFT = tl.constexpr(13)
STATE = tl.constexpr(14)
SUMS = tl.constexpr(6)  # of each part of a row, at most


@triton.jit
def part_of(n, part):
    """The row of this program, and where its part of it begins and ends."""
    begin = tl.program_id(1).to(tl.int64) * part
    return tl.program_id(0).to(tl.int64), begin, tl.minimum(begin + part, n)


@triton.jit
def _part_sums(partial_ptr):
    """Where the sums of this program's part are kept."""
    return partial_ptr + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * SUMS


@triton.jit
def _sum_of_parts(partial_ptr, row, parts, which, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    return tl.sum(tl.load(partial_ptr + (row * parts + at) * SUMS + which, at < parts, other=0.0), 0)


@triton.jit
def _split_extent_kernel(
    values_ptr, costs_ptr, partial_ptr, n, part, stride_vm, stride_vn, stride_cm, stride_cn,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, begin, end = part_of(n, part)
    values_ptr += row * stride_vm
    costs_ptr += row * stride_cm
    origin = row_origin(values_ptr, costs_ptr, HAS_COSTS)
    cost, number, first, second, lowest, highest = extent_sums(
        values_ptr, costs_ptr, origin, begin, end, n, stride_vn, stride_cn, HAS_COSTS, TILE, LANES, VECTOR
    )
    own = _part_sums(partial_ptr)
    tl.store(own, cost)
    tl.store(own + 1, number)
    tl.store(own + 2, first)
    tl.store(own + 3, second)
    tl.store(own + 4, lowest)
    tl.store(own + 5, highest)


@triton.jit
def _split_start_kernel(
    values_ptr, costs_ptr, budget_ptr, beta_ptr, partial_ptr, state_ptr, parts, stride_vm, stride_cm, stride_bm,
    HAS_COSTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    own = partial_ptr + (row * parts + at) * SUMS
    lowest = tl.min(tl.load(own + 4, at < parts, other=INFINITY), 0)
    highest = tl.max(tl.load(own + 5, at < parts, other=-INFINITY), 0)
    beta = load_beta(beta_ptr)
    sign, quota, target, total, poison, t, low, high = search_of(
        tl.load(budget_ptr + row * stride_bm), beta,
        row_origin(values_ptr + row * stride_vm, costs_ptr + row * stride_cm, HAS_COSTS),
        _sum_of_parts(partial_ptr, row, parts, 0, BLOCK), _sum_of_parts(partial_ptr, row, parts, 1, BLOCK),
        _sum_of_parts(partial_ptr, row, parts, 2, BLOCK), _sum_of_parts(partial_ptr, row, parts, 3, BLOCK),
        lowest, highest,
    )  # fmt: skip
    searched = quota * beta > 0.0
    state_ptr += row * STATE
    tl.store(state_ptr + T, t)
    tl.store(state_ptr + LOW, low)
    tl.store(state_ptr + HIGH, high)
    tl.store(state_ptr + RESIDUAL, INFINITY)
    tl.store(state_ptr + SIGN, sign)
    tl.store(state_ptr + QUOTA, quota)
    tl.store(state_ptr + TARGET, target)
    tl.store(state_ptr + TOTAL, total)
    tl.store(state_ptr + LOWEST, lowest)
    tl.store(state_ptr + HIGHEST, highest)
    tl.store(state_ptr + POISON, poison)
    tl.store(state_ptr + OPEN, (searched & (poison == 0.0)).to(tl.float64))
    tl.store(state_ptr + CENTRE, 0.0)
    tl.store(state_ptr + SHIFT, tl.where(searched, 0.0, sign * target))


@triton.jit
def _split_trial_kernel(
    values_ptr, costs_ptr, beta_ptr, partial_ptr, state_ptr, n, part, stride_vm, stride_vn, stride_cm, stride_cn,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, begin, end = part_of(n, part)
    state_ptr += row * STATE
    if tl.load(state_ptr + OPEN) != 0.0:
        beta = load_beta(beta_ptr)
        centre, shift = logit_at(
            tl.load(state_ptr + T), beta, tl.load(state_ptr + LOWEST), tl.load(state_ptr + HIGHEST)
        )
        mass, slope, bend = moment_sums(
            values_ptr + row * stride_vm, costs_ptr + row * stride_cm, begin, end, n, stride_vn, stride_cn,
            centre, shift, beta, tl.load(state_ptr + SIGN), HAS_COSTS, TILE, LANES, VECTOR,
        )  # fmt: skip
        own = _part_sums(partial_ptr)
        tl.store(own, mass)
        tl.store(own + 1, slope)
        tl.store(own + 2, bend)


@triton.jit
def _split_advance_kernel(beta_ptr, partial_ptr, state_ptr, parts, BLOCK: tl.constexpr):
    """One step of a row, or its solution."""
    row = tl.program_id(0).to(tl.int64)
    state_ptr += row * STATE
    if tl.load(state_ptr + OPEN) != 0.0:
        beta, t, quota = load_beta(beta_ptr), tl.load(state_ptr + T), tl.load(state_ptr + QUOTA)
        centre, shift = logit_at(t, beta, tl.load(state_ptr + LOWEST), tl.load(state_ptr + HIGHEST))
        mass = _sum_of_parts(partial_ptr, row, parts, 0, BLOCK)
        slope, bend = (
            _sum_of_parts(partial_ptr, row, parts, 1, BLOCK), _sum_of_parts(partial_ptr, row, parts, 2, BLOCK)
        )  # fmt: skip
        t, low, high, residual, _ = halley_step(
            t, tl.load(state_ptr + LOW), tl.load(state_ptr + HIGH), tl.load(state_ptr + RESIDUAL), mass, slope, bend,
            beta, tl.load(state_ptr + SIGN), quota, tl.load(state_ptr + TOTAL), tl.load(state_ptr + TARGET),
        )  # fmt: skip
        tl.debug_barrier()  # all is loaded
        tl.store(state_ptr + T, t)
        tl.store(state_ptr + LOW, low)
        tl.store(state_ptr + HIGH, high)
        tl.store(state_ptr + RESIDUAL, residual)
        tl.store(state_ptr + OPEN, (tl.abs(mass - quota) > quota * TOLERANCE).to(tl.float64))
        tl.store(state_ptr + CENTRE, centre.to(tl.float64))
        tl.store(state_ptr + SHIFT, shift)


@triton.jit
def _split_finish_kernel(
    values_ptr, costs_ptr, beta_ptr, state_ptr, n, stride_vm, stride_vn, stride_cm, stride_cn,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    state_ptr += row * STATE
    pending = tl.load(state_ptr + OPEN) != 0.0
    if pending:
        centre, shift = search_row(
            values_ptr + row * stride_vm, costs_ptr + row * stride_cm, n, stride_vn, stride_cn, pending,
            tl.load(state_ptr + T), tl.load(state_ptr + LOW), tl.load(state_ptr + HIGH),
            tl.load(state_ptr + LOWEST), tl.load(state_ptr + HIGHEST), load_beta(beta_ptr), tl.load(state_ptr + SIGN),
            tl.load(state_ptr + QUOTA), tl.load(state_ptr + TOTAL), tl.load(state_ptr + TARGET),
            HAS_COSTS, TILE, LANES, VECTOR,
        )  # fmt: skip
        tl.store(state_ptr + CENTRE, centre.to(tl.float64))
        tl.store(state_ptr + SHIFT, shift)


@triton.jit
def _split_write_kernel(
    values_ptr, costs_ptr, beta_ptr, state_ptr, mask_ptr, threshold_ptr,
    n, part, stride_vm, stride_vn, stride_cm, stride_cn, HAS_COSTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, begin, end = part_of(n, part)
    state_ptr += row * STATE
    beta, poison = load_beta(beta_ptr), tl.load(state_ptr + POISON)
    centre, shift = tl.load(state_ptr + CENTRE), tl.load(state_ptr + SHIFT) + poison
    write_soft(
        values_ptr + row * stride_vm, costs_ptr + row * stride_cm, mask_ptr + row * n, begin, end, n,
        stride_vn, stride_cn, centre.to(tl.float32), shift, beta, tl.load(state_ptr + QUOTA) * beta <= 0.0, poison,
        HAS_COSTS, TILE,
    )  # fmt: skip
    if begin == 0:
        tl.store(threshold_ptr + 2 * row, centre)
        tl.store(threshold_ptr + 2 * row + 1, shift)


@triton.jit
def _split_gradient_sums_kernel(
    grad_ptr, values_ptr, threshold_ptr, costs_ptr, beta_ptr, partial_ptr,
    n, part, stride_gm, stride_gn, stride_vm, stride_vn, stride_cm, stride_cn,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, begin, end = part_of(n, part)
    _, slope, centre, shift = load_logit(threshold_ptr, beta_ptr, row)
    gs, weight, gsu, asu = gradient_sums(
        grad_ptr + row * stride_gm, values_ptr + row * stride_vm, costs_ptr + row * stride_cm, begin, end, n,
        stride_gn, stride_vn, stride_cn, slope, centre, shift, HAS_COSTS, TILE, LANES, VECTOR,
    )  # fmt: skip
    own = _part_sums(partial_ptr)
    tl.store(own, gs)
    tl.store(own + 1, weight)
    tl.store(own + 2, gsu)
    tl.store(own + 3, asu)


@triton.jit
def _split_gradient_write_kernel(
    grad_ptr, values_ptr, threshold_ptr, costs_ptr, beta_ptr, partial_ptr,
    grad_values_ptr, grad_costs_ptr, grad_budget_ptr, grad_beta_ptr,
    n, part, stride_gm, stride_gn, stride_vm, stride_vn, stride_cm, stride_cn,
    HAS_COSTS: tl.constexpr, COST_GRAD: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the sums of all parts give, and the gradients of this one."""
    row, begin, end = part_of(n, part)
    parts = tl.num_programs(1)
    beta, slope, centre, shift = load_logit(threshold_ptr, beta_ptr, row)
    weight = _sum_of_parts(partial_ptr, row, parts, 1, BLOCK)
    # a NaN row stays NaN
    r = tl.where(weight > 0.0, _sum_of_parts(partial_ptr, row, parts, 0, BLOCK) / weight, weight * 0.0)
    if begin == 0:
        of_beta = (
            _sum_of_parts(partial_ptr, row, parts, 2, BLOCK) - r * _sum_of_parts(partial_ptr, row, parts, 3, BLOCK)
        )  # fmt: skip
        tl.store(grad_budget_ptr + row, r)
        tl.store(grad_beta_ptr + row, of_beta)
    write_gradients(
        grad_ptr + row * stride_gm, values_ptr + row * stride_vm, costs_ptr + row * stride_cm,
        grad_values_ptr + row * n, grad_costs_ptr + row * n, begin, end, n, stride_gn, stride_vn, stride_cn,
        beta, slope, centre, shift, r.to(tl.float32), HAS_COSTS, COST_GRAD, TILE,
    )  # fmt: skip


def _options(values: torch.Tensor, costs: torch.Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the kernels that walk, without and with sums by thread."""
    walk: dict[str, Any] = {"HAS_COSTS": costs is not None, "TILE": LONG_ROW_TILE, "num_warps": LONG_ROW_WARPS}
    return walk, walk | {"LANES": LANES, "VECTOR": vector_length(values.dtype)}


def forward_plan(o: SoftTopk, mask: torch.Tensor, threshold: torch.Tensor) -> list[Launch]:
    """All that is launched, for any number of rows."""
    values, costs = o.values, o.values if o.costs is None else o.costs
    rows, n = values.shape
    part, parts = row_parts(values)
    partial = torch.empty((rows, parts, int(SUMS)), dtype=torch.float64, device=values.device)
    state = torch.empty((rows, int(STATE)), dtype=torch.float64, device=values.device)
    walk, sums = _options(values, o.costs)
    one: dict[str, Any] = {"BLOCK": power_of_two(parts), "num_warps": 1}
    strides = (*values.stride(), *cost_strides(o.costs))
    begin = (values, costs, o.budget, o.beta, partial, state, parts, strides[0], strides[2], o.budget.stride(0))
    advance = Launch(_split_advance_kernel, rows, (o.beta, partial, state, parts), one)
    trial = Launch(_split_trial_kernel, (rows, parts), (values, costs, o.beta, partial, state, n, part, *strides), sums)
    write = (values, costs, o.beta, state, mask, threshold, n, part, *strides)
    return [
        Launch(_split_extent_kernel, (rows, parts), (values, costs, partial, n, part, *strides), sums),
        Launch(_split_start_kernel, rows, begin, one | {"HAS_COSTS": o.costs is not None}),
        *[trial, advance] * TRIALS,
        Launch(_split_finish_kernel, rows, (values, costs, o.beta, state, n, *strides), sums, when="rare"),
        Launch(_split_write_kernel, (rows, parts), write, walk),
    ]


def forward(o: SoftTopk) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (c, d) for each row of values [rows, n]."""
    mask = torch.empty(o.values.shape, dtype=o.values.dtype, device=o.values.device)
    threshold = torch.empty((o.values.shape[0], 2), dtype=torch.float64, device=o.values.device)
    with torch.cuda.device_of(o.values):
        for launch in forward_plan(o, mask, threshold):
            launch()
    return mask, threshold


def backward_plan(
    o: SoftTopkBackward, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> list[Launch]:
    """All that is launched: sums, and what follows from them."""
    values, costs = o.values, o.values if o.costs is None else o.costs
    rows, n = values.shape
    part, parts = row_parts(values)
    partial = torch.empty((rows, parts, int(SUMS)), dtype=torch.float64, device=values.device)
    walk, sums = _options(values, o.costs)
    inputs = (o.grad, values, o.threshold.contiguous(), costs, o.beta, partial)
    sizes = (n, part, *o.grad.stride(), *values.stride(), *cost_strides(o.costs))
    options = walk | {"COST_GRAD": o.cost_grad, "BLOCK": power_of_two(parts)}
    return [
        Launch(_split_gradient_sums_kernel, (rows, parts), (*inputs, *sizes), sums),
        Launch(_split_gradient_write_kernel, (rows, parts), (*inputs, *grads, *sizes), options),
    ]


def backward(o: SoftTopkBackward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    grads = row_gradients(o.values, o.cost_grad)
    with torch.cuda.device_of(o.values):
        for launch in backward_plan(o, grads):
            launch()
    return grads


def _compile_cases() -> list[CompileCase]:
    names = ("budget", "beta", "threshold", "partial", "state", "grad_budget", "grad_beta")
    types = dict.fromkeys(names, "*fp64")
    kernels = (
        _split_extent_kernel, _split_start_kernel, _split_trial_kernel, _split_advance_kernel, _split_finish_kernel,
        _split_write_kernel, _split_gradient_sums_kernel, _split_gradient_write_kernel,
    )  # fmt: skip
    cases = []
    for kernel in kernels:
        walks = "TILE" in kernel.arg_names
        for dtype, costs in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            if not walks and (costs or dtype != torch.float32):
                continue
            options = {
                "HAS_COSTS": costs, "COST_GRAD": costs, "TILE": LONG_ROW_TILE, "LANES": LANES, "BLOCK": 128,
                "VECTOR": vector_length(dtype), "stride_vn": 1, "stride_gn": 1, "stride_cn": 1,
                "num_warps": LONG_ROW_WARPS if walks else 1,
            }  # fmt: skip
            label = f"{'costs, ' if costs else ''}{name_of(dtype)}"
            even = ("n", "part", "stride_vm", "stride_gm", "stride_cm")
            cases.append(compile_case(kernel, dtype, options, label, types, even, vector_loads=walks))
    return cases


COMPILE_CASES = _compile_cases()
