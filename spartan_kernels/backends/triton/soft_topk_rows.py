"""Soft top-k by rows: a tile of whole rows stays in registers through the whole solve. One read, one write.

An entry of -inf is masked: it is not live, as what lies past a row's end is not, and its mask is 0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from spartan_kernels.backends.shared import row_gradients
from spartan_kernels.backends.triton.configs import (
    MAX_RESIDENT_ROW,
    MAX_RESIDENT_ROW_WITH_COSTS,
    CompileCase,
    forward_entries,
    name_of,
    row_tile,
)
from spartan_kernels.backends.triton.launches import Launch, start
from spartan_kernels.backends.triton.primitives import (
    INFINITY,
    LN_2,
    LOG2_E,
    binary_logistic,
    halley_step,
    load_beta,
    logit_at,
    moments_of,
    reciprocal,
)
from spartan_kernels.backends.triton.row_odds import (
    TOLERANCE,
    first_round,
    moment_start,
    more_rounds,
    order_start,
    row_range,
    sides_of,
)
from spartan_kernels.operands import SoftTopk, SoftTopkBackward

MAX_TRIALS = tl.constexpr(400)  # that only a bisection comes near
FINEST_LOGIT = tl.constexpr(1e-12)  # a bracket that moves no logit by more is resolved
# A step of float64 at the threshold that moves a logit by more than COARSE may miss the budget.
COARSE = tl.constexpr(1e-8)
EPSILON = tl.constexpr(2.3e-16)


@triton.jit
def load_rows(
    values_ptr, costs_ptr, n_rows, n, stride_vm, stride_vn, stride_cm, stride_cn,
    HAS_COSTS: tl.constexpr, DENSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """u = v / a and a in float32, row numbers [BLOCK_M], output offsets and which entries exist; u is -inf elsewhere.

    DENSE: rows of BLOCK_N values one after the other, which the compiler must know to load short rows as vectors.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    if DENSE:
        inside = tl.broadcast_to((row < n_rows)[:, None], (BLOCK_M, BLOCK_N))
        offsets = row[:, None] * BLOCK_N + column
        u = tl.load(values_ptr + offsets, inside, other=-INFINITY).to(tl.float32)
    else:
        inside = (row < n_rows)[:, None] & (column < n)
        offsets = row[:, None] * n + column
        where = row[:, None] * stride_vm + column * stride_vn
        u = tl.load(values_ptr + where, inside, other=-INFINITY).to(tl.float32)
    if HAS_COSTS:
        a = tl.load(costs_ptr + row[:, None] * stride_cm + column * stride_cn, inside, other=1.0).to(tl.float32)
        u = tl.div_rn(u, a)
    else:
        a = tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32)
    return u, a, row, offsets, inside


@triton.jit
def live_counts(live):
    """Live entries of each row, float64."""
    return tl.sum(live.to(tl.int32), 1).to(tl.float64)


@triton.jit
def row_totals(a, live, HAS_COSTS: tl.constexpr):
    """Sum of the costs of each row, float64; hardly above 0 where nothing is live, all of which is kept."""
    if HAS_COSTS:
        total = tl.sum(tl.where(live, a, 0.0).to(tl.float64), 1)
    else:
        total = live_counts(live)
    return tl.maximum(total, 1e-300)


@triton.jit
def _moments(u, a, centre, shift, beta, sign):
    """Sums of a m, a s and a s (1 - 2 m) of each row, m on the smaller side of its budget."""
    slope, offset = (-sign * beta * LOG2_E).to(tl.float32), (-sign * shift * LOG2_E).to(tl.float32)
    m0, m1, m2 = moments_of(u, a, u != -INFINITY, centre[:, None], slope[:, None], offset[:, None])
    mass, weight, third = tl.sum(m0, 1), tl.sum(m1, 1).to(tl.float64), tl.sum(m2, 1).to(tl.float64)
    return mass.to(tl.float64), weight, weight - 2 * third


@triton.jit
def row_bounds(u):
    """Smallest and largest of the live entries of each row, float64; 0 and -inf where none is."""
    lowest = tl.min(tl.where(u == -INFINITY, INFINITY, u), 1).to(tl.float64)
    return tl.where(lowest == INFINITY, 0.0, lowest), tl.max(u, 1).to(tl.float64)


@triton.jit
def fine_logit(t, anchor, fine, beta, lowest, highest):
    """`logit_at`; where `fine`, t is measured from the anchor, which is the centre."""
    near, _ = logit_at(t, beta, lowest, highest)
    centre = tl.where(fine, anchor, near)
    return centre, beta * (tl.where(fine, 0.0, centre.to(tl.float64)) - t)


@triton.jit
def search_ends(missed, stuck, tried, low, high, beta, fine):
    """Whether a search goes on, and whether it does so in finer steps than those of float64 at its threshold.

    By entries of 1e13 a threshold in float64 has no digits left for the fraction of 1 / beta that decides how much of
    them is kept.
    """
    ended = stuck | (beta * tl.maximum(high - low, tl.abs(tried - low)) <= FINEST_LOGIT)
    finer = missed & ended & (fine == 0) & (beta * tl.abs(low) * EPSILON > COARSE)
    return missed & ((ended == 0) | finer), finer


@triton.jit
def finer_bracket(low, high, lowest, highest, edge, beta):
    """The anchor of a finer search, and the bracket measured from it: of the old one, and of the data's range."""
    centre, _ = logit_at(low + (high - low) / 2, beta, lowest, highest)
    anchor = centre.to(tl.float64)
    from_low = tl.maximum(low - anchor - tl.abs(low) * EPSILON, (lowest - anchor) + edge)
    from_high = tl.minimum(high - anchor + tl.abs(high) * EPSILON, (highest - anchor) + edge)
    return centre, from_low, from_high


@triton.jit
def solve_rows(
    u, a, lowest, highest, t, low, high, active, beta, sign, quota, target, total, BLOCK_M: tl.constexpr
):  # fmt: skip
    """(centre, shift) of each active row, by Halley's steps from t within [low, high].

    In float32 the sum is a staircase that can step over the quota: then the nearest trial is the answer.
    """
    previous = tl.full((BLOCK_M,), float("inf"), tl.float64)
    best_miss = previous
    best_centre, best_shift = logit_at(t, beta, lowest, highest)
    anchor = tl.zeros((BLOCK_M,), tl.float32)
    fine = tl.zeros((BLOCK_M,), tl.int1)
    finer = fine
    trial = 0
    pending = tl.max(active.to(tl.int32), 0)
    while (trial < MAX_TRIALS) & (pending > 0):
        if pending > 1:
            centre, from_low, from_high = finer_bracket(low, high, lowest, highest, -sign * target / beta, beta)
            anchor, fine = tl.where(finer, centre, anchor), fine | finer
            low, high = tl.where(finer, from_low, low), tl.where(finer, from_high, high)
            t = tl.where(finer, low + (high - low) / 2, t)
            previous = tl.where(finer, INFINITY, previous)
        centre, shift = fine_logit(t, anchor, fine, beta, lowest, highest)
        mass, slope, curvature = _moments(u, a, centre, shift, beta, sign)
        miss = tl.abs(mass - quota)
        nearer = active & (miss < best_miss)
        best_centre, best_shift = tl.where(nearer, centre, best_centre), tl.where(nearer, shift, best_shift)
        best_miss = tl.where(nearer, miss, best_miss)
        tried = t
        t, low, high, previous, stuck = halley_step(
            t, low, high, previous, mass, slope, curvature, beta, sign, quota, total, target
        )
        more, finer = search_ends(miss > quota * TOLERANCE, stuck, tried, low, high, beta, fine)
        active, finer = active & more, active & finer
        trial += 1
        pending = tl.max(active.to(tl.int32) + finer.to(tl.int32), 0)
    return best_centre, best_shift


@triton.jit
def _search_wide(u, a, lowest, highest, active, beta, sign, budget, total, BLOCK_M: tl.constexpr):
    """`solve_rows`, for what float32 has no digits left for, from the middle of the values."""
    lowest, highest, sign = lowest.to(tl.float64), highest.to(tl.float64), sign.to(tl.float64)
    quota = tl.where(sign > 0, budget, total - budget)
    target = tl.log(quota / (total - quota))
    low, high = lowest - sign * target / beta, highest - sign * target / beta
    t = tl.where(active, low + (high - low) / 2, 0.0)
    return solve_rows(u, a, lowest, highest, t, low, high, active, beta, sign, quota, target, total, BLOCK_M)


@triton.jit
def _search(
    u, a, lowest, highest, active, beta, budget, total, sign, quota, rest,
    HAS_COSTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(centre, w, offset) of each active row: 1 / m = 1 + 2^(-beta (u - centre) / log 2 + offset) w^sign."""
    sharp = beta.to(tl.float32)
    per_beta = reciprocal(sharp)
    if BLOCK_N == 4 and not HAS_COSTS:
        t = order_start(u, lowest, sign, quota, per_beta)
    else:
        t = moment_start(u, lowest, highest, sign, quota, rest, per_beta)
    centre, w, left = first_round(u, a, t, lowest, highest, active, sharp, sign, quota, rest)
    offset = tl.zeros_like(w)
    if tl.max(left.to(tl.int32), 0) > 0:
        centre, w, left = more_rounds(u, a, centre, w, lowest, highest, left, sharp, sign, quota, rest, per_beta)
        if tl.max(left.to(tl.int32), 0) > 0:
            wide, shift = _search_wide(u, a, lowest, highest, left, beta, sign, budget, total, BLOCK_M)
            centre, w = tl.where(left, wide, centre), tl.where(left, 1.0, w)
            offset = tl.where(left, (-shift * LOG2_E).to(tl.float32), 0.0)
    return centre, w, offset


@triton.jit
def _soft_topk_forward_kernel(
    values_ptr, costs_ptr, budget_ptr, beta_ptr, mask_ptr, threshold_ptr,
    n_rows, n, stride_vm, stride_vn, stride_cm, stride_cn, stride_bm,
    HAS_COSTS: tl.constexpr, DENSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    u, a, row, offsets, inside = load_rows(
        values_ptr, costs_ptr, n_rows, n, stride_vm, stride_vn, stride_cm, stride_cn, HAS_COSTS, DENSE, BLOCK_M, BLOCK_N
    )
    beta = load_beta(beta_ptr)
    lowest, highest = row_range(u)
    live = u != -INFINITY  # NaN is live: it must be seen
    budget = tl.load(budget_ptr + row * stride_bm, row < n_rows, other=0.0).to(tl.float64)
    if HAS_COSTS:  # in parts of all costs, whose products do not overflow
        per_total = 1.0 / row_totals(a, live, True)
        a *= per_total.to(tl.float32)[:, None]
        budget, total = budget * per_total, tl.full((BLOCK_M,), 1.0, tl.float64)
    else:
        total = live_counts(live)
    sign, quota, rest, poison = sides_of(budget, total)
    # NaN where an entry is NaN or +inf, too
    poison += tl.where(highest == -INFINITY, 0.0, highest * 0.0)
    searched = tl.where(beta > 0.0, quota, 0.0) > 0.0
    active = (row < n_rows) & searched & (poison == 0.0)
    centre, w, offset = _search(
        u, a, lowest, highest, active, beta, budget, total, sign, quota, rest, HAS_COSTS, BLOCK_M, BLOCK_N
    )

    centre = tl.where(searched, centre, 0.0)
    w = tl.where(searched, w, tl.maximum(rest, 1e-30) * reciprocal(quota)) + poison
    # times a slope that is not zero, what is at -inf has the mask 0; so it has with a factor that is not zero
    slope = tl.where(searched, (-beta * LOG2_E).to(tl.float32), -1.4e-45)
    factor = tl.maximum(tl.where(sign > 0, w, reciprocal(w)), 1e-38, propagate_nan=tl.PropagateNan.ALL)
    odds = tl.exp2(slope[:, None] * (u - centre[:, None]) + offset[:, None]) * factor[:, None]
    m = tl.minimum(reciprocal(1.0 + odds), 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(mask_ptr + offsets, m.to(mask_ptr.dtype.element_ty), inside)
    tl.store(threshold_ptr + 2 * row, centre.to(tl.float64), row < n_rows)
    tl.store(threshold_ptr + 2 * row + 1, -(offset + sign * tl.log2(w)).to(tl.float64) * LN_2, row < n_rows)


@triton.jit
def _soft_topk_backward_kernel(
    grad_ptr, values_ptr, threshold_ptr, costs_ptr, beta_ptr,
    grad_values_ptr, grad_costs_ptr, grad_budget_ptr, grad_beta_ptr,
    n_rows, n, stride_gm, stride_gn, stride_vm, stride_vn, stride_cm, stride_cn,
    HAS_COSTS: tl.constexpr, COST_GRAD: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    u, a, row, offsets, inside = load_rows(
        values_ptr, costs_ptr, n_rows, n, stride_vm, stride_vn, stride_cm, stride_cn, HAS_COSTS, DENSE, BLOCK_M, BLOCK_N
    )
    column = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    where = offsets if DENSE else row[:, None] * stride_gm + column * stride_gn
    g = tl.load(grad_ptr + where, inside, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr).to(tl.float32)
    centre = tl.load(threshold_ptr + 2 * row, row < n_rows, other=0.0).to(tl.float32)[:, None]
    shift = (tl.load(threshold_ptr + 2 * row + 1, row < n_rows, other=0.0) * LOG2_E).to(tl.float32)[:, None]
    # times a slope that is not zero, and with a finite shift, what is at -inf has the mask 0, and s = 0
    slope = tl.where(beta == 0.0, 1e-44, beta * LOG2_E)
    m, rest = binary_logistic(slope * (u - centre) + tl.minimum(shift, 3e38, propagate_nan=tl.PropagateNan.ALL))
    s = m * rest
    least, _ = row_bounds(u)
    lowest = least.to(tl.float32)[:, None]
    u = tl.maximum(u, lowest)
    highest = tl.max(u, 1)[:, None]
    weight = tl.sum(a * s, 1)
    r = tl.where(weight > 0.0, tl.sum(g * s, 1) / weight, 0.0)
    r = tl.where(weight == weight, r, weight)[:, None]  # a NaN row stays NaN
    pull = beta * s * (g / a - r)
    tl.store(grad_values_ptr + offsets, pull.to(grad_values_ptr.dtype.element_ty), inside)
    if COST_GRAD:
        tl.store(grad_costs_ptr + offsets, (-pull * u - r * m).to(grad_costs_ptr.dtype.element_ty), inside)
    tl.store(grad_budget_ptr + row, tl.sum(r, 1).to(tl.float64), row < n_rows)
    # sum (g - a r) s vanishes, so u may be measured from the threshold, if that lies in the data (not for flat masks)
    origin = tl.minimum(tl.maximum(centre, lowest), highest)
    slope = tl.sum((g - a * r) * s * (u - origin), 1).to(tl.float64)
    tl.store(grad_beta_ptr + row, slope, row < n_rows)


def cost_strides(costs: torch.Tensor | None) -> tuple[int, int]:
    """Row and entry stride of costs that are None, [], [n] or [rows, n]."""
    if costs is None or costs.dim() == 0:
        return 0, 0
    return (0, costs.stride(0)) if costs.dim() == 1 else (costs.stride(0), costs.stride(1))


def dense(block_n: int, *tensors: torch.Tensor) -> bool:
    """Whether the rows of all tensors [rows, n] follow each other without gaps and fill tiles of `block_n`."""
    return all(t.shape[1] == block_n and t.is_contiguous() for t in tensors)


def forward_launch(o: SoftTopk, mask: torch.Tensor, threshold: torch.Tensor) -> Launch:
    """Values read once, the mask written once."""
    values, budget, costs = o.values, o.budget, o.costs
    rows, n = values.shape
    block_m, block_n, warps = row_tile(n, forward_entries(n))
    array_costs = 0 if costs is None or costs.dim() == 0 else costs.nbytes
    return Launch(
        _soft_topk_forward_kernel,
        triton.cdiv(rows, block_m),
        (
            values, values if costs is None else costs, budget, o.beta, mask, threshold,
            rows, n, *values.stride(), *cost_strides(costs), budget.stride(0),
        ),
        {
            "HAS_COSTS": costs is not None, "DENSE": dense(block_n, values),
            "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps,
        },
        values.nbytes + array_costs,
        mask.nbytes,
    )  # fmt: skip


def forward(o: SoftTopk) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (c, d) for each row of values [rows, n] with n at most `MAX_RESIDENT_ROW`."""
    mask = torch.empty(o.values.shape, dtype=o.values.dtype, device=o.values.device)
    threshold = torch.empty((o.values.shape[0], 2), dtype=torch.float64, device=o.values.device)
    start(forward_launch(o, mask, threshold))
    return mask, threshold


def backward_launch(
    o: SoftTopkBackward, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> Launch:
    """Gradient and values read once, what goes to `grads` written once; no gradient of the costs where it is empty."""
    grad, values, costs = o.grad, o.values, o.costs
    rows, n = values.shape
    block_m, block_n, warps = row_tile(n)
    array_costs = 0 if costs is None or costs.dim() == 0 else costs.nbytes
    return Launch(
        _soft_topk_backward_kernel,
        triton.cdiv(rows, block_m),
        (
            grad, values, o.threshold.contiguous(), values if costs is None else costs, o.beta, *grads,
            rows, n, *grad.stride(), *values.stride(), *cost_strides(costs),
        ),
        {
            "HAS_COSTS": costs is not None, "COST_GRAD": grads[1].numel() > 0, "DENSE": dense(block_n, values, grad),
            "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps,
        },
        grad.nbytes + values.nbytes + array_costs,
        grads[0].nbytes + grads[1].nbytes,
    )  # fmt: skip


def backward(o: SoftTopkBackward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    grads = row_gradients(o.values, o.cost_grad)
    start(backward_launch(o, grads))
    return grads


def _compile_cases() -> list[CompileCase]:
    cases = []
    inputs = {"values_ptr", "costs_ptr", "mask_ptr", "grad_ptr", "grad_values_ptr", "grad_costs_ptr"}
    for dtype, n, costs in (
        (torch.float32, 4, False),
        (torch.float32, 32, False),
        (torch.float32, 256, False),
        (torch.float32, 1024, False),
        (torch.float32, 4096, False),
        (torch.float32, MAX_RESIDENT_ROW, False),
        (torch.float32, MAX_RESIDENT_ROW_WITH_COSTS, True),
        (torch.bfloat16, 4096, False),
    ):
        for kernel in (_soft_topk_forward_kernel, _soft_topk_backward_kernel):
            backwards = kernel is _soft_topk_backward_kernel
            block_m, block_n, warps = row_tile(n) if backwards else row_tile(n, forward_entries(n))
            constants: dict[str, Any] = {"HAS_COSTS": costs, "BLOCK_M": block_m, "BLOCK_N": block_n}
            constants["DENSE"] = True
            if backwards:
                constants["COST_GRAD"] = costs
            signature = {
                name: f"*{name_of(dtype)}" if name in inputs else "*fp64" if name.endswith("_ptr") else "i32"
                for name in kernel.arg_names
                if name not in constants
            }
            # PyTorch's innermost stride is 1, and Triton specialises on it
            for name in [s for s in ("stride_vn", "stride_gn", "stride_cn") if s in signature]:
                del signature[name]
                constants[name] = 1
            label = f"rows of {n}, {'costs, ' if costs else ''}{name_of(dtype)}"
            even = ("stride_gm", "stride_cm") if n % 16 == 0 else ()
            case = CompileCase(kernel, signature, constants, warps, label, divisible=even, vector_loads=n > 4)
            cases.append(case)
    return cases


COMPILE_CASES = _compile_cases()
