"""Soft and hard top-k of rows too long for registers: one program for each, which reads its row from the L2 cache.

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
    ordered_key,
    overdrawn,
    smaller_side,
)
from spartan_kernels.backends.triton.soft_topk_rows import (
    MAX_TRIALS,
    TOLERANCE,
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
def _store_tile(pointer, start, n, entries, TILE: tl.constexpr):
    """The counterpart of `_load_tile`, to a row without gaps."""
    at = start + tl.arange(0, TILE)
    if start + TILE <= n:
        tl.store(pointer + at, entries)
    else:
        tl.store(pointer + at, entries, at < n)


@triton.jit
def _load_ratio(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS: tl.constexpr, TILE: tl.constexpr):
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
def _extent(
    values_ptr, costs_ptr, n, stride_vn, stride_cn,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of what is live: sum of the costs, smallest and largest entry, mean (NaN where one is not finite), variance."""
    total = tl.zeros((LANES,), tl.float64)
    first, second = total, total
    count = tl.zeros((LANES,), tl.int32)
    lowest = tl.full((LANES,), float("inf"), tl.float32)
    highest = -lowest
    origin = tl.load(values_ptr).to(tl.float32)
    if HAS_COSTS:
        origin = origin / tl.load(costs_ptr).to(tl.float32)
    origin = tl.where(origin == -INFINITY, 0.0, origin)
    for start in range(0, n, TILE):
        u, a, live = _load_ratio(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        # relative to one of the entries the spread does not cancel
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
    mean, square = tl.sum(first, 0) / tl.maximum(number, 1.0), tl.sum(second, 0) / tl.maximum(number, 1.0)
    low, high = tl.min(lowest, 0).to(tl.float64), tl.max(highest, 0).to(tl.float64)
    mean = tl.where(high == INFINITY, float("nan"), mean)
    # hardly more than 0 where nothing is live, all of which is kept
    return tl.maximum(cost, 1e-300), low, high, origin.to(tl.float64) + mean, square - mean * mean


@triton.jit
def _long_soft_topk_forward_kernel(
    values_ptr, costs_ptr, budget_ptr, beta_ptr, mask_ptr, threshold_ptr,
    n, stride_vm, stride_vn, stride_cm, stride_cn, stride_bm,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * stride_vm
    costs_ptr += row * stride_cm
    total, lowest, highest, mean, variance = _extent(
        values_ptr, costs_ptr, n, stride_vn, stride_cn, HAS_COSTS, TILE, LANES, VECTOR
    )
    beta = load_beta(beta_ptr)
    budget = tl.load(budget_ptr + row * stride_bm)
    sign, quota, target = smaller_side(clamped_budget(budget, total), total)
    constant = quota * beta <= 0.0
    poison = mean * 0.0 + overdrawn(budget, total)
    low, high = lowest - sign * target / beta, highest - sign * target / beta
    t = first_threshold(mean, variance, beta, sign, target, low, high)
    residual = total * 0.0 + INFINITY
    best_miss = residual
    best_centre, best_shift = logit_at(t, beta, lowest, highest)
    anchor = best_centre
    pending = (quota * beta > 0.0) & (poison == 0.0)
    fine, finer = pending != pending, pending != pending
    trial = 0
    while (trial < MAX_TRIALS) & pending:
        if finer:
            anchor, low, high = finer_bracket(low, high, lowest, highest, -sign * target / beta, beta)
            t = low + (high - low) / 2
            residual = total * 0.0 + INFINITY
            fine = fine | finer
        centre, shift = fine_logit(t, anchor, fine, beta, lowest, highest)
        slope, offset = (-sign * beta * LOG2_E).to(tl.float32), (-sign * shift * LOG2_E).to(tl.float32)
        mass = tl.zeros((LANES,), tl.float64)
        weight, third = mass, mass
        for start in range(0, n, TILE):
            u, a, live = _load_ratio(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
            m0, m1, m2 = chunk_moments(u, a, live, centre, slope, offset, LANES, VECTOR)
            mass += m0
            weight += m1
            third += m2
        found = tl.sum(mass, 0)
        miss = tl.abs(found - quota)
        nearer = miss < best_miss
        best_centre, best_shift = tl.where(nearer, centre, best_centre), tl.where(nearer, shift, best_shift)
        best_miss = tl.minimum(miss, best_miss)
        tried = t
        t, low, high, residual, stuck = halley_step(
            t, low, high, residual, found, tl.sum(weight, 0), tl.sum(weight - 2 * third, 0), beta, sign, quota, total,
            target,
        )  # fmt: skip
        pending, finer = search_ends(miss > quota * TOLERANCE, stuck, tried, low, high, beta, fine)
        trial += 1

    centre, shift = best_centre, best_shift
    centre = tl.where(constant, 0.0, centre)
    shift = tl.where(constant, sign * target, shift) + poison
    slope, offset = tl.where(constant, 0.0, (beta * LOG2_E).to(tl.float32)), (shift * LOG2_E).to(tl.float32)
    for start in range(0, n, TILE):
        u, _, live = _load_ratio(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        m, _ = binary_logistic(slope * (u - centre) + offset)
        m = tl.where(live, m, poison.to(tl.float32)).to(mask_ptr.dtype.element_ty)
        _store_tile(mask_ptr + row * n, start, n, m, TILE)
    tl.store(threshold_ptr + 2 * row, centre.to(tl.float64))
    tl.store(threshold_ptr + 2 * row + 1, shift)


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
    beta = tl.load(beta_ptr).to(tl.float32)
    slope = (tl.load(beta_ptr).to(tl.float64) * LOG2_E).to(tl.float32)
    centre = tl.load(threshold_ptr + 2 * row).to(tl.float32)
    shift = (tl.load(threshold_ptr + 2 * row + 1) * LOG2_E).to(tl.float32)
    gs = tl.zeros((LANES,), tl.float64)
    weight, gsu, asu = gs, gs, gs
    for start in range(0, n, TILE):
        u, a, live = _load_ratio(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        g = _load_tile(grad_ptr, stride_gn, start, n, 0.0, TILE)
        away = tl.where(live, u - centre, 0.0)
        m, rest = binary_logistic(slope * away + shift)
        s = tl.where(live, m * rest, 0.0)
        gs += lane_sum(g * s, LANES, VECTOR, tl.float64)
        weight += lane_sum(a * s, LANES, VECTOR, tl.float64)
        # sum (g - a r) s vanishes, so u may be measured from the threshold
        gsu += lane_sum(g * s * away, LANES, VECTOR, tl.float64)
        asu += lane_sum(a * s * away, LANES, VECTOR, tl.float64)
    total = tl.sum(weight, 0)
    r = tl.where(total > 0.0, tl.sum(gs, 0) / total, total * 0.0)  # a NaN row stays NaN
    tl.store(grad_budget_ptr + row, r)
    tl.store(grad_beta_ptr + row, tl.sum(gsu, 0) - r * tl.sum(asu, 0))
    r = r.to(tl.float32)
    for start in range(0, n, TILE):
        u, a, live = _load_ratio(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        g = _load_tile(grad_ptr, stride_gn, start, n, 0.0, TILE)
        m, rest = binary_logistic(slope * (u - centre) + shift)
        pull = tl.where(live, beta * m * rest * (g / a - r), 0.0)
        _store_tile(grad_values_ptr + row * n, start, n, pull.to(grad_values_ptr.dtype.element_ty), TILE)
        if COST_GRAD:
            of_costs = tl.where(live, -pull * u - r * m, 0.0).to(grad_costs_ptr.dtype.element_ty)
            _store_tile(grad_costs_ptr + row * n, start, n, of_costs, TILE)


@triton.jit
def _long_hard_topk_forward_kernel(
    values_ptr, costs_ptr, budget_ptr, mask_ptr, n, stride_vm, stride_vn, stride_cm, stride_cn, stride_bm,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The largest key from which on upwards the row costs more than its budget, two bits for each pass over the row."""
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * stride_vm
    costs_ptr += row * stride_cm
    budget = tl.load(budget_ptr + row * stride_bm).to(tl.float64)
    total = budget * 0.0 + n  # with masked entries it is less, and the cut is below all that are live
    if HAS_COSTS:
        costs = tl.zeros((TILE,), tl.float64)
        for start in range(0, n, TILE):
            u, a, live = _load_ratio(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
            costs += tl.where(live, a, 0.0).to(tl.float64)
        total = tl.sum(costs, 0)
    budget = clamped_budget(budget, total)
    budget = tl.where(budget >= total, INFINITY, budget)  # then nothing is over it, and the cut is the smallest key
    digits = tl.arange(0, 4)
    cut = tl.zeros((4,), tl.int64)
    shift = 30
    while shift >= 0:
        least = (cut + (digits.to(tl.int64) << shift)).to(tl.uint32)
        spent = tl.zeros((TILE, 4), tl.float64 if HAS_COSTS else tl.int32)
        for start in range(0, n, TILE):
            u, a, live = _load_ratio(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
            chosen = live[:, None] & (ordered_key(u)[:, None] >= least[None, :])
            if HAS_COSTS:
                spent += tl.where(chosen, a[:, None], 0.0).to(tl.float64)
            else:
                spent += chosen.to(tl.int32)
        over = (tl.sum(spent, 0).to(tl.float64) > budget) & (digits > 0)
        cut += tl.sum(over.to(tl.int64), 0) << shift
        shift -= 2
    cut_key = tl.max(cut, 0).to(tl.uint32)

    spent = tl.zeros((TILE,), tl.float64)
    for start in range(0, n, TILE):
        u, a, live = _load_ratio(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        spent += tl.where(live & (ordered_key(u) > cut_key), a, 0.0).to(tl.float64)
    room = budget - tl.sum(spent, 0)
    before = cut_key.to(tl.float64) * 0.0
    for start in range(0, n, TILE):
        u, a, live = _load_ratio(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        key = ordered_key(u)
        cost = tl.where(live & (key == cut_key), a, 0.0).to(tl.float64)
        fits = before + tl.cumsum(cost, 0) <= room
        before += tl.sum(cost, 0)
        keep = live & ((key > cut_key) | ((key == cut_key) & fits))
        _store_tile(mask_ptr + row * n, start, n, keep.to(tl.uint8), TILE)


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


def hard_forward(
    values: torch.Tensor, budget: torch.Tensor, costs: torch.Tensor | None, mask: torch.Tensor
) -> torch.Tensor:
    """h for each row of values [rows, n], into the bool tensor `mask`."""
    rows, n = values.shape
    with torch.cuda.device_of(values):
        _long_hard_topk_forward_kernel[(rows,)](
            values, values if costs is None else costs, budget, mask.view(torch.uint8),
            n, *values.stride(), *cost_strides(costs), budget.stride(0),
            HAS_COSTS=costs is not None, TILE=LONG_ROW_TILE // 2, num_warps=LONG_ROW_WARPS, **FUSED,
        )  # fmt: skip
    return mask


def _compile_cases() -> list[CompileCase]:
    cases = []
    doubles = {"budget_ptr", "beta_ptr", "threshold_ptr", "grad_budget_ptr", "grad_beta_ptr"}
    kernels = (_long_soft_topk_forward_kernel, _long_soft_topk_backward_kernel, _long_hard_topk_forward_kernel)
    for kernel in kernels:
        hard = kernel is _long_hard_topk_forward_kernel
        for dtype, costs in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            constants = {
                "HAS_COSTS": costs, "COST_GRAD": costs, "TILE": LONG_ROW_TILE // (2 if hard else 1), "LANES": LANES,
                "VECTOR": vector_length(dtype), "stride_vn": 1, "stride_gn": 1, "stride_cn": 1,
            }  # fmt: skip
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            signature = {
                name: "*fp64" if name in doubles else f"*{name_of(dtype)}" if name.endswith("_ptr") else "i32"
                for name in kernel.arg_names
                if name not in constants
            }
            if hard:
                signature["mask_ptr"] = "*u8"
            label = f"{'costs, ' if costs else ''}{name_of(dtype)}"
            even = ("n", "stride_vm", "stride_gm", "stride_cm")
            case = CompileCase(
                kernel, signature, constants, LONG_ROW_WARPS, label, divisible=even, vector_loads=not hard
            )
            cases.append(case)
    return cases


COMPILE_CASES = _compile_cases()
