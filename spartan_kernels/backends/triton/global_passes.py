"""Kernels that pass over a list of tensors: one persistent grid, sums in float64 by program, added in a fixed order.

Every pass leaves at once when the control block says that there is nothing left for it to find.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.primitives import INFINITY, logistic, logit_at, ordered_key
from spartan_kernels.backends.triton.tables import chunk_at, load_ratio, output_at

# The control block in float64: the search for the soft threshold ...
T = tl.constexpr(0)
LOW = tl.constexpr(1)
HIGH = tl.constexpr(2)
RESIDUAL = tl.constexpr(3)
SIGN = tl.constexpr(4)
QUOTA = tl.constexpr(5)
TARGET = tl.constexpr(6)
TOTAL = tl.constexpr(7)
SOFT_DONE = tl.constexpr(8)
BETA = tl.constexpr(9)
POISON = tl.constexpr(10)
SCALE = tl.constexpr(11)  # fixed-point units in one unit of cost: a power of two
REWRITE = tl.constexpr(12)
# ... and in int64, the search for the key at which the budget runs out, in BINS bins of 2^SHIFT keys from LO.
LO = tl.constexpr(0)
SHIFT = tl.constexpr(1)
SPENT = tl.constexpr(2)  # fixed-point cost of all above the range
HARD_DONE = tl.constexpr(3)
BUDGET = tl.constexpr(4)
ABOVE = tl.constexpr(5)
ROOM = tl.constexpr(6)  # what is left for the entries at the cut, when found
EVERYTHING = tl.constexpr(7)
HISTOGRAM = tl.constexpr(16)
BINS = tl.constexpr(2048)
MOMENTS = tl.constexpr(6)  # mass, slope, curvature, lowest, highest, poison


@triton.jit
def fixed_point(a, live, scale, HAS_COSTS: tl.constexpr):
    """Costs as int64: sums that are exact, so neither their order nor the range of bins matters."""
    if HAS_COSTS:
        return tl.where(live, (a.to(tl.float64) * scale).to(tl.int64), 0)
    return live.to(tl.int64)


@triton.jit
def chunk_moments(u, a, live, t, beta, sign):
    """Sums of a m, a s and a s (1 - 2 m) of a chunk at t, m on the smaller side of the budget."""
    centre, shift = logit_at(t, beta)
    x = beta.to(tl.float32) * (u - centre) + shift.to(tl.float32)
    m, rest = logistic(x * sign.to(tl.float32))
    mass = tl.where(live, a * m, 0.0)
    slope = mass * rest
    # the mass of a sharp mask is mostly ones, beside which float32 would lose what its few slopes decide
    return (
        tl.sum(mass.to(tl.float64), 0),
        tl.sum(slope, 0).to(tl.float64),
        tl.sum(slope * (rest - m), 0).to(tl.float64),
    )


@triton.jit
def _total_cost_kernel(
    table_ptr, partial_ptr, n_tensors, n_chunks, DTYPE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    total = tl.load(partial_ptr) * 0.0
    for chunk in range(tl.program_id(0).to(tl.int64), n_chunks, tl.num_programs(0)):
        row_ptr, offsets, live = chunk_at(table_ptr, n_tensors, chunk, CHUNK)
        _, a = load_ratio(row_ptr, offsets, live, DTYPE, True, False)
        total += tl.sum(tl.where(live, a, 0.0).to(tl.float64), 0)
    tl.store(partial_ptr + tl.program_id(0), total)


@triton.jit
def _survey_kernel(
    table_ptr, solve_ptr, select_ptr, partial_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The moments at t, and the cost above and within the range of keys, in one read."""
    soft_open = SOFT and tl.load(solve_ptr + SOFT_DONE) == 0.0
    hard_open = HARD and tl.load(select_ptr + HARD_DONE) == 0
    t, beta = tl.load(solve_ptr + T), tl.load(solve_ptr + BETA)
    sign, scale = tl.load(solve_ptr + SIGN), tl.load(solve_ptr + SCALE)
    lo, shift = tl.load(select_ptr + LO), tl.load(select_ptr + SHIFT).to(tl.uint32)
    last = tl.minimum(lo + (BINS << tl.load(select_ptr + SHIFT)) - 1, 0xFFFFFFFF).to(tl.uint32)
    first = lo.to(tl.uint32)
    zero = t * 0.0
    mass, slope, curvature, poison = zero, zero, zero, zero
    lowest, highest = zero + INFINITY, zero - INFINITY
    above = lo * 0
    if soft_open or hard_open:
        for chunk in range(tl.program_id(0).to(tl.int64), n_chunks, tl.num_programs(0)):
            row_ptr, offsets, live = chunk_at(table_ptr, n_tensors, chunk, CHUNK)
            u, a = load_ratio(row_ptr, offsets, live, DTYPE, HAS_COSTS, ABSOLUTE)
            if SOFT:
                if soft_open:
                    m0, m1, m2 = chunk_moments(u, a, live, t, beta, sign)
                    mass += m0
                    slope += m1
                    curvature += m2
                    poison += tl.sum(u * 0.0, 0).to(tl.float64)
                    lowest = tl.minimum(lowest, tl.min(tl.where(live, u, INFINITY), 0).to(tl.float64))
                    highest = tl.maximum(highest, tl.max(tl.where(live, u, -INFINITY), 0).to(tl.float64))
            if HARD:
                if hard_open:
                    key = ordered_key(u)
                    cost = fixed_point(a, live, scale, HAS_COSTS)
                    above += tl.sum(tl.where(key > last, cost, 0), 0)
                    inside = live & (key >= first) & (key <= last)
                    bins = ((key - first) >> shift).to(tl.int32)
                    tl.atomic_add(select_ptr + HISTOGRAM + bins, cost, inside, sem="relaxed")
    if SOFT:
        own = partial_ptr + MOMENTS * tl.program_id(0)
        tl.store(own, mass)
        tl.store(own + 1, slope)
        tl.store(own + 2, curvature)
        tl.store(own + 3, lowest)
        tl.store(own + 4, highest)
        tl.store(own + 5, poison)
    if HARD:
        tl.atomic_add(select_ptr + ABOVE, above, sem="relaxed")


@triton.jit
def _ties_kernel(
    table_ptr, solve_ptr, select_ptr, ties_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Cost at the cut in every chunk, when some of it may be kept: ties go to the lowest index."""
    scale, cut = tl.load(solve_ptr + SCALE), tl.load(select_ptr + LO).to(tl.uint32)
    if tl.load(select_ptr + ROOM) > 0:
        for chunk in range(tl.program_id(0).to(tl.int64), n_chunks, tl.num_programs(0)):
            row_ptr, offsets, live = chunk_at(table_ptr, n_tensors, chunk, CHUNK)
            u, a = load_ratio(row_ptr, offsets, live, DTYPE, HAS_COSTS, ABSOLUTE)
            cost = fixed_point(a, live & (ordered_key(u) == cut), scale, HAS_COSTS)
            tl.store(ties_ptr + chunk, tl.sum(cost, 0))


@triton.jit
def _tie_prefix_kernel(select_ptr, ties_ptr, n_chunks, BLOCK: tl.constexpr):
    """Cost at the cut before every chunk, in place; one program."""
    before = tl.load(select_ptr + ROOM) * 0
    if tl.load(select_ptr + ROOM) > 0:
        for start in range(0, n_chunks, BLOCK):
            at = start + tl.arange(0, BLOCK)
            cost = tl.load(ties_ptr + at, at < n_chunks, other=0)
            tl.store(ties_ptr + at, before + tl.cumsum(cost, 0) - cost, at < n_chunks)
            before += tl.sum(cost, 0)


@triton.jit
def _write_kernel(
    table_ptr, solve_ptr, select_ptr, ties_ptr, partial_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, AGAIN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The masks, and the sum of a m as written; AGAIN: the soft ones only, and only if that sum missed the budget."""
    t, beta, sign = tl.load(solve_ptr + T), tl.load(solve_ptr + BETA), tl.load(solve_ptr + SIGN)
    scale, target = tl.load(solve_ptr + SCALE), tl.load(solve_ptr + TARGET)
    constant = tl.load(solve_ptr + QUOTA) * beta <= 0.0
    centre, shift = logit_at(t, beta)
    centre = tl.where(constant, 0.0, centre)
    shift = (tl.where(constant, sign * target, shift) + tl.load(solve_ptr + POISON)).to(tl.float32)
    slope = tl.where(constant, 0.0, beta.to(tl.float32))
    cut, room = tl.load(select_ptr + LO).to(tl.uint32), tl.load(select_ptr + ROOM)
    everything = tl.load(select_ptr + EVERYTHING) != 0
    mass = t * 0.0
    if AGAIN == 0 or tl.load(solve_ptr + REWRITE) != 0.0:
        for chunk in range(tl.program_id(0).to(tl.int64), n_chunks, tl.num_programs(0)):
            row_ptr, offsets, live = chunk_at(table_ptr, n_tensors, chunk, CHUNK)
            u, a = load_ratio(row_ptr, offsets, live, DTYPE, HAS_COSTS, ABSOLUTE)
            if SOFT:
                m, rest = logistic(slope * (u - centre) + shift)
                tl.store(output_at(row_ptr, 0, DTYPE) + offsets, m.to(DTYPE), live)
                mass += tl.sum(tl.where(live, a * tl.where(sign > 0, m, rest), 0.0).to(tl.float64), 0)
            if HARD and AGAIN == 0:
                key = ordered_key(u)
                keep = (key > cut) | everything
                if room > 0:
                    cost = fixed_point(a, live & (key == cut), scale, HAS_COSTS)
                    within = tl.load(ties_ptr + chunk) + tl.cumsum(cost, 0)
                    keep = keep | ((key == cut) & (within <= room))
                tl.store(output_at(row_ptr, 1, tl.uint8) + offsets, keep.to(tl.uint8), live)
    if SOFT and AGAIN == 0:
        tl.store(partial_ptr + MOMENTS * tl.program_id(0), mass)


@triton.jit
def _gradient_sums_kernel(
    table_ptr, threshold_ptr, beta_ptr, partial_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums of g s, a s, and of both times u - c, of this program's chunks."""
    beta, centre = tl.load(beta_ptr).to(tl.float32), tl.load(threshold_ptr).to(tl.float32)
    shift = tl.load(threshold_ptr + 1).to(tl.float32)
    zero = tl.load(beta_ptr).to(tl.float64) * 0.0
    gs, weight, gsu, asu = zero, zero, zero, zero
    for chunk in range(tl.program_id(0).to(tl.int64), n_chunks, tl.num_programs(0)):
        row_ptr, offsets, live = chunk_at(table_ptr, n_tensors, chunk, CHUNK)
        u, a = load_ratio(row_ptr, offsets, live, DTYPE, HAS_COSTS, False)
        g = tl.load(output_at(row_ptr, 0, DTYPE) + offsets, live, other=0.0).to(tl.float32)
        m, rest = logistic(beta * (u - centre) + shift)
        s = tl.where(live, m * rest, 0.0)
        gs += tl.sum(g * s, 0).to(tl.float64)
        weight += tl.sum(a * s, 0).to(tl.float64)
        gsu += tl.sum(g * s * (u - centre), 0).to(tl.float64)
        asu += tl.sum(a * s * (u - centre), 0).to(tl.float64)
    own = partial_ptr + 4 * tl.program_id(0)
    tl.store(own, gs)
    tl.store(own + 1, weight)
    tl.store(own + 2, gsu)
    tl.store(own + 3, asu)


@triton.jit
def _gradient_totals_kernel(partial_ptr, scalars_ptr, n_programs, BLOCK: tl.constexpr):
    """The multiplier r and the gradient of beta; one program."""
    at = tl.arange(0, BLOCK)
    gs = tl.sum(tl.load(partial_ptr + 4 * at, at < n_programs, other=0.0), 0)
    weight = tl.sum(tl.load(partial_ptr + 4 * at + 1, at < n_programs, other=0.0), 0)
    gsu = tl.sum(tl.load(partial_ptr + 4 * at + 2, at < n_programs, other=0.0), 0)
    asu = tl.sum(tl.load(partial_ptr + 4 * at + 3, at < n_programs, other=0.0), 0)
    r = tl.where(weight > 0.0, gs / weight, weight * 0.0)  # NaN stays NaN
    tl.store(scalars_ptr, r)
    tl.store(scalars_ptr + 1, gsu - r * asu)


@triton.jit
def _gradient_write_kernel(
    table_ptr, threshold_ptr, beta_ptr, scalars_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, COST_GRAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    beta, centre = tl.load(beta_ptr).to(tl.float32), tl.load(threshold_ptr).to(tl.float32)
    shift, r = tl.load(threshold_ptr + 1).to(tl.float32), tl.load(scalars_ptr).to(tl.float32)
    for chunk in range(tl.program_id(0).to(tl.int64), n_chunks, tl.num_programs(0)):
        row_ptr, offsets, live = chunk_at(table_ptr, n_tensors, chunk, CHUNK)
        u, a = load_ratio(row_ptr, offsets, live, DTYPE, HAS_COSTS, False)
        g = tl.load(output_at(row_ptr, 0, DTYPE) + offsets, live, other=0.0).to(tl.float32)
        m, rest = logistic(beta * (u - centre) + shift)
        pull = beta * m * rest * (g / a - r)
        tl.store(output_at(row_ptr, 1, DTYPE) + offsets, pull.to(DTYPE), live)
        if COST_GRAD:
            tl.store(output_at(row_ptr, 2, DTYPE) + offsets, (-pull * u - r * m).to(DTYPE), live)
