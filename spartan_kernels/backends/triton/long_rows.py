"""Soft top-k of rows too long for registers: one program for each, which reads its row from the L2 cache.

An entry of -inf is masked: it is not live, as what lies past the row's end is not, and its mask is 0.
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
    vector_length,
)
from spartan_kernels.backends.triton.global_passes import chunk_moments
from spartan_kernels.backends.triton.launches import FUSED
from spartan_kernels.backends.triton.primitives import (
    INFINITY,
    LOG2_E,
    binary_logistic,
    clamped_budget,
    first_threshold,
    halley_step,
    lane_max,
    lane_min,
    lane_sum,
    load_beta,
    logit_at,
    overdrawn,
    smaller_side,
)
from spartan_kernels.backends.triton.row_odds import TOLERANCE
from spartan_kernels.backends.triton.soft_topk_rows import (
    MAX_TRIALS,
    cost_strides,
    fine_logit,
    finer_bracket,
    search_ends,
)
from spartan_kernels.operands import SoftTopk, SoftTopkBackward


@triton.jit
def _load_tile(pointer, stride, start, n, absent: tl.constexpr, TILE: tl.constexpr):
    """Entries of a row from `start`, float32; only the last tile has a mask, which forbids vector loads."""
    at = start + tl.arange(0, TILE)
    if start + TILE <= n:
        found = tl.load(pointer + at * stride)
    else:
        found = tl.load(pointer + at * stride, at < n, other=absent)
    return found.to(tl.float32)


@triton.jit
def store_tile(pointer, start, n, entries, TILE: tl.constexpr):
    """The counterpart of `_load_tile`, to a row without gaps."""
    at = start + tl.arange(0, TILE)
    if start + TILE <= n:
        tl.store(pointer + at, entries)
    else:
        tl.store(pointer + at, entries, at < n)


@triton.jit
def load_ratio_tile(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS: tl.constexpr, TILE: tl.constexpr):
    """u = v / a and a in float32, and which of them are live; u is -inf where it is not."""
    u = _load_tile(values_ptr, stride_vn, start, n, float("-inf"), TILE)
    if HAS_COSTS:
        a = _load_tile(costs_ptr, stride_cn, start, n, 1.0, TILE)
        u = tl.div_rn(u, a)
    else:
        a = tl.full((TILE,), 1.0, tl.float32)
    live = u != -INFINITY  # NaN is live: it must be seen
    return u, a, live


@triton.jit
def row_origin(values_ptr, costs_ptr, HAS_COSTS: tl.constexpr):
    """The first entry of a row: relative to one of them the spread does not cancel."""
    origin = tl.load(values_ptr).to(tl.float32)
    if HAS_COSTS:
        origin = origin / tl.load(costs_ptr).to(tl.float32)
    return tl.where(origin == -INFINITY, 0.0, origin)


@triton.jit
def extent_sums(
    values_ptr, costs_ptr, origin, begin, end, n, stride_vn, stride_cn,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of what is live in [begin, end): costs, number, sum and square from the origin, smallest and largest; float64."""
    total = tl.zeros((LANES,), tl.float64)
    first, second = total, total
    count = tl.zeros((LANES,), tl.int32)
    lowest = tl.full((LANES,), float("inf"), tl.float32)
    highest = -lowest
    for start in range(begin, end, TILE):
        u, a, live = load_ratio_tile(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        span = tl.where(live, u - origin, 0.0)
        count += lane_sum(live.to(tl.int32), LANES, VECTOR, tl.int32)
        if HAS_COSTS:
            total += lane_sum(tl.where(live, a, 0.0), LANES, VECTOR, tl.float64)
        first += lane_sum(span, LANES, VECTOR, tl.float64)
        second += lane_sum(span * span, LANES, VECTOR, tl.float64)
        lowest = tl.minimum(lowest, lane_min(tl.where(live, u, INFINITY), LANES, VECTOR))
        highest = tl.maximum(highest, lane_max(tl.where(live, u, -INFINITY), LANES, VECTOR))
    number = tl.sum(count, 0).to(tl.float64)
    cost = tl.sum(total, 0) if HAS_COSTS else number
    low, high = tl.min(lowest, 0).to(tl.float64), tl.max(highest, 0).to(tl.float64)
    return cost, number, tl.sum(first, 0), tl.sum(second, 0), low, high


@triton.jit
def search_of(budget, beta, origin, cost, number, first, second, lowest, highest):
    """What a search starts from: sign, quota, target, total, poison (NaN: no search), t, low and high."""
    # hardly more than 0 where nothing is live, all of which is kept
    total, count = tl.maximum(cost, 1e-300), tl.maximum(number, 1.0)
    mean = tl.where(highest == INFINITY, float("nan"), first / count)
    variance = second / count - mean * mean
    sign, quota, target = smaller_side(clamped_budget(budget, total), total)
    low, high = lowest - sign * target / beta, highest - sign * target / beta
    t = first_threshold(origin.to(tl.float64) + mean, variance, beta, sign, target, low, high)
    return sign, quota, target, total, mean * 0.0 + overdrawn(budget, total), t, low, high


@triton.jit
def moment_sums(
    values_ptr, costs_ptr, begin, end, n, stride_vn, stride_cn, centre, shift, beta, sign,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums of a m, a s and a s (1 - 2 m) over [begin, end), m on the smaller side of the budget."""
    slope, offset = (-sign * beta * LOG2_E).to(tl.float32), (-sign * shift * LOG2_E).to(tl.float32)
    mass = tl.zeros((LANES,), tl.float64)
    weight, third = mass, mass
    for start in range(begin, end, TILE):
        u, a, live = load_ratio_tile(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        m0, m1, m2 = chunk_moments(u, a, live, centre, slope, offset, LANES, VECTOR)
        mass += m0
        weight += m1
        third += m2
    return tl.sum(mass, 0), tl.sum(weight, 0), tl.sum(weight - 2 * third, 0)


@triton.jit
def search_row(
    values_ptr, costs_ptr, n, stride_vn, stride_cn, pending, t, low, high, lowest, highest,
    beta, sign, quota, total, target,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(centre, shift) of the best trial of a row, by one program."""
    residual = total * 0.0 + INFINITY
    best_miss = residual
    best_centre, best_shift = logit_at(t, beta, lowest, highest)
    anchor = best_centre
    fine, finer = pending != pending, pending != pending
    trial = 0
    while (trial < MAX_TRIALS) & pending:
        if finer:
            anchor, low, high = finer_bracket(low, high, lowest, highest, -sign * target / beta, beta)
            t = low + (high - low) / 2
            residual = total * 0.0 + INFINITY
            fine = fine | finer
        centre, shift = fine_logit(t, anchor, fine, beta, lowest, highest)
        mass, weight, bend = moment_sums(
            values_ptr, costs_ptr, 0, n, n, stride_vn, stride_cn, centre, shift, beta, sign,
            HAS_COSTS, TILE, LANES, VECTOR,
        )  # fmt: skip
        miss = tl.abs(mass - quota)
        nearer = miss < best_miss
        best_centre, best_shift = tl.where(nearer, centre, best_centre), tl.where(nearer, shift, best_shift)
        best_miss = tl.minimum(miss, best_miss)
        tried = t
        t, low, high, residual, stuck = halley_step(
            t, low, high, residual, mass, weight, bend, beta, sign, quota, total, target
        )
        pending, finer = search_ends(miss > quota * TOLERANCE, stuck, tried, low, high, beta, fine)
        trial += 1
    return best_centre, best_shift


@triton.jit
def write_soft(
    values_ptr, costs_ptr, mask_ptr, begin, end, n, stride_vn, stride_cn, centre, shift, beta, constant, poison,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The masks of [begin, end)."""
    slope, offset = tl.where(constant, 0.0, (beta * LOG2_E).to(tl.float32)), (shift * LOG2_E).to(tl.float32)
    for start in range(begin, end, TILE):
        u, _, live = load_ratio_tile(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        m, _ = binary_logistic(slope * (u - centre) + offset)
        m = tl.where(live, m, poison.to(tl.float32)).to(mask_ptr.dtype.element_ty)
        store_tile(mask_ptr, start, n, m, TILE)


@triton.jit
def _long_soft_topk_forward_kernel(
    values_ptr, costs_ptr, budget_ptr, beta_ptr, mask_ptr, threshold_ptr,
    n, stride_vm, stride_vn, stride_cm, stride_cn, stride_bm,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * stride_vm
    costs_ptr += row * stride_cm
    origin = row_origin(values_ptr, costs_ptr, HAS_COSTS)
    cost, number, first, second, lowest, highest = extent_sums(
        values_ptr, costs_ptr, origin, 0, n, n, stride_vn, stride_cn, HAS_COSTS, TILE, LANES, VECTOR
    )
    beta = load_beta(beta_ptr)
    sign, quota, target, total, poison, t, low, high = search_of(
        tl.load(budget_ptr + row * stride_bm), beta, origin, cost, number, first, second, lowest, highest
    )
    constant = quota * beta <= 0.0
    centre, shift = search_row(
        values_ptr, costs_ptr, n, stride_vn, stride_cn, (quota * beta > 0.0) & (poison == 0.0), t, low, high,
        lowest, highest, beta, sign, quota, total, target, HAS_COSTS, TILE, LANES, VECTOR,
    )  # fmt: skip
    centre = tl.where(constant, 0.0, centre)
    shift = tl.where(constant, sign * target, shift) + poison
    write_soft(
        values_ptr, costs_ptr, mask_ptr + row * n, 0, n, n, stride_vn, stride_cn, centre, shift, beta, constant,
        poison, HAS_COSTS, TILE,
    )  # fmt: skip
    tl.store(threshold_ptr + 2 * row, centre.to(tl.float64))
    tl.store(threshold_ptr + 2 * row + 1, shift)


@triton.jit
def load_logit(threshold_ptr, beta_ptr, row):
    """beta and, of the logit in powers of two, slope, centre and shift, all in float32."""
    beta = tl.load(beta_ptr)
    slope = (beta.to(tl.float64) * LOG2_E).to(tl.float32)
    centre = tl.load(threshold_ptr + 2 * row).to(tl.float32)
    return beta.to(tl.float32), slope, centre, (tl.load(threshold_ptr + 2 * row + 1) * LOG2_E).to(tl.float32)


@triton.jit
def gradient_sums(
    grad_ptr, values_ptr, costs_ptr, begin, end, n, stride_gn, stride_vn, stride_cn, slope, centre, shift,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums of g s and a s over [begin, end), and of both times u from the threshold, where sum (g - a r) s vanishes."""
    gs = tl.zeros((LANES,), tl.float64)
    weight, gsu, asu = gs, gs, gs
    for start in range(begin, end, TILE):
        u, a, live = load_ratio_tile(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        g = _load_tile(grad_ptr, stride_gn, start, n, 0.0, TILE)
        away = tl.where(live, u - centre, 0.0)
        m, rest = binary_logistic(slope * away + shift)
        s = tl.where(live, m * rest, 0.0)
        gs += lane_sum(g * s, LANES, VECTOR, tl.float64)
        weight += lane_sum(a * s, LANES, VECTOR, tl.float64)
        gsu += lane_sum(g * s * away, LANES, VECTOR, tl.float64)
        asu += lane_sum(a * s * away, LANES, VECTOR, tl.float64)
    return tl.sum(gs, 0), tl.sum(weight, 0), tl.sum(gsu, 0), tl.sum(asu, 0)


@triton.jit
def write_gradients(
    grad_ptr, values_ptr, costs_ptr, grad_values_ptr, grad_costs_ptr, begin, end, n, stride_gn, stride_vn, stride_cn,
    beta, slope, centre, shift, r, HAS_COSTS: tl.constexpr, COST_GRAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradients of the values, and of the costs, in [begin, end)."""
    for start in range(begin, end, TILE):
        u, a, live = load_ratio_tile(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        g = _load_tile(grad_ptr, stride_gn, start, n, 0.0, TILE)
        m, rest = binary_logistic(slope * (u - centre) + shift)
        pull = tl.where(live, beta * m * rest * (g / a - r), 0.0)
        store_tile(grad_values_ptr, start, n, pull.to(grad_values_ptr.dtype.element_ty), TILE)
        if COST_GRAD:
            of_costs = tl.where(live, -pull * u - r * m, 0.0).to(grad_costs_ptr.dtype.element_ty)
            store_tile(grad_costs_ptr, start, n, of_costs, TILE)


@triton.jit
def _long_soft_topk_backward_kernel(
    grad_ptr, values_ptr, threshold_ptr, costs_ptr, beta_ptr,
    grad_values_ptr, grad_costs_ptr, grad_budget_ptr, grad_beta_ptr,
    n, stride_gm, stride_gn, stride_vm, stride_vn, stride_cm, stride_cn,
    HAS_COSTS: tl.constexpr, COST_GRAD: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * stride_gm
    values_ptr += row * stride_vm
    costs_ptr += row * stride_cm
    beta, slope, centre, shift = load_logit(threshold_ptr, beta_ptr, row)
    gs, weight, gsu, asu = gradient_sums(
        grad_ptr, values_ptr, costs_ptr, 0, n, n, stride_gn, stride_vn, stride_cn, slope, centre, shift,
        HAS_COSTS, TILE, LANES, VECTOR,
    )  # fmt: skip
    r = tl.where(weight > 0.0, gs / weight, weight * 0.0)  # a NaN row stays NaN
    tl.store(grad_budget_ptr + row, r)
    tl.store(grad_beta_ptr + row, gsu - r * asu)
    write_gradients(
        grad_ptr, values_ptr, costs_ptr, grad_values_ptr + row * n, grad_costs_ptr + row * n, 0, n, n,
        stride_gn, stride_vn, stride_cn, beta, slope, centre, shift, r.to(tl.float32), HAS_COSTS, COST_GRAD, TILE,
    )  # fmt: skip


def _options(values: torch.Tensor, costs: torch.Tensor | None) -> dict[str, Any]:
    vector = vector_length(values.dtype)
    kind = {"HAS_COSTS": costs is not None, "TILE": LONG_ROW_TILE, "LANES": LANES, "VECTOR": vector}
    return kind | {"num_warps": LONG_ROW_WARPS, **FUSED}


def forward(o: SoftTopk) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (c, d) for each row of values [rows, n]."""
    rows, n = o.values.shape
    mask = torch.empty((rows, n), dtype=o.values.dtype, device=o.values.device)
    threshold = torch.empty((rows, 2), dtype=torch.float64, device=o.values.device)
    with torch.cuda.device_of(o.values):
        _long_soft_topk_forward_kernel[(rows,)](
            o.values, o.values if o.costs is None else o.costs, o.budget, o.beta, mask, threshold,
            n, *o.values.stride(), *cost_strides(o.costs), o.budget.stride(0), **_options(o.values, o.costs),
        )  # fmt: skip
    return mask, threshold


def backward(o: SoftTopkBackward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    rows, n = o.values.shape
    grads = row_gradients(o.values, o.cost_grad)
    with torch.cuda.device_of(o.values):
        _long_soft_topk_backward_kernel[(rows,)](
            o.grad, o.values, o.threshold.contiguous(), o.values if o.costs is None else o.costs, o.beta,
            *grads,
            n, *o.grad.stride(), *o.values.stride(), *cost_strides(o.costs),
            COST_GRAD=o.cost_grad, **_options(o.values, o.costs),
        )  # fmt: skip
    return grads


def _compile_cases() -> list[CompileCase]:
    cases = []
    types = dict.fromkeys(("budget", "beta", "threshold", "grad_budget", "grad_beta"), "*fp64")
    for kernel in (_long_soft_topk_forward_kernel, _long_soft_topk_backward_kernel):
        for dtype, costs in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            options = {
                "HAS_COSTS": costs, "COST_GRAD": costs, "TILE": LONG_ROW_TILE, "LANES": LANES,
                "VECTOR": vector_length(dtype), "stride_vn": 1, "stride_gn": 1, "stride_cn": 1,
                "num_warps": LONG_ROW_WARPS,
            }  # fmt: skip
            label = f"{'costs, ' if costs else ''}{name_of(dtype)}"
            even = ("n", "stride_vm", "stride_gm", "stride_cm")
            cases.append(compile_case(kernel, dtype, options, label, types, even, vector_loads=True))
    return cases


COMPILE_CASES = _compile_cases()
