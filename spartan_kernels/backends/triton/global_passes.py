"""Kernels that pass over a list of tensors: one persistent grid, sums in float64 by thread, added in a fixed order.

Every pass leaves at once when the control block says that there is nothing left for it to find.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.configs import SIZES
from spartan_kernels.backends.triton.primitives import (
    INFINITY,
    lane_max,
    lane_min,
    lane_sum,
    limits_of_keys,
    logistic,
    logit_at,
    ordered_key,
    value_of_key,
)
from spartan_kernels.backends.triton.tables import (
    COST_STRIDE,
    COSTS,
    FIRST_CHUNK,
    LENGTH,
    OUTPUT,
    chunk_at,
    load_chunk,
    load_costs,
    load_ratio,
    locate,
    own_chunks,
    pointer_at,
    store_chunk,
)

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
REWRITE = tl.constexpr(12)  # trials of the search after the masks were written and missed the budget; 0: they met it
LOWEST = tl.constexpr(13)
HIGHEST = tl.constexpr(14)
READS = tl.constexpr(15)  # surveys that read the values, the second write and its search
REST = tl.constexpr(16)  # the threshold is T + REST: what float64 has no digits left for
LIVE = tl.constexpr(17)  # cost of what is not masked by -inf, if the first survey finds less than all; else 0
CONTROL = tl.constexpr(18)
# ... and in int64, the search for the key at which the budget runs out, from LO to LAST in BINS bins of 2^SHIFT keys.
LO = tl.constexpr(0)
SHIFT = tl.constexpr(1)
LAST = tl.constexpr(2)
HARD_DONE = tl.constexpr(3)
BUDGET = tl.constexpr(4)
ABOVE = tl.constexpr(5)  # fixed-point cost of all above the range
ROOM = tl.constexpr(6)  # what is left for the entries at the cut, when found
EVERYTHING = tl.constexpr(7)
COLLECTED = tl.constexpr(8)  # the candidates are all of the entries in the range
HISTOGRAM = tl.constexpr(16)
BINS = tl.constexpr(2048)
MOMENTS = tl.constexpr(6)  # mass, slope, curvature, lowest, highest, cost of what is not masked


@triton.jit
def fixed_point(a, live, scale, HAS_COSTS: tl.constexpr):
    """Costs as integers: sums that are exact, so neither their order nor the range of bins matters.

    Counts need 64 bits only beyond a chunk.
    """
    if HAS_COSTS:
        cost = tl.where(live, (a.to(tl.float64) * scale).to(tl.int64), 0)
    else:
        cost = live.to(tl.int32)
    return cost


@triton.jit
def moment_logit(t, beta, sign, lowest, highest):
    """(centre, slope, shift) of the negated logit of the smaller side of the budget, float32."""
    centre, shift = logit_at(t, beta, lowest, highest)
    return centre, (-sign * beta).to(tl.float32), (-sign * shift).to(tl.float32)


@triton.jit
def moments_of(u, a, live, centre, slope, shift):
    """a m, a s and a s (1 - 2 m) of entries, m on the smaller side of the budget; 0 where there is none."""
    x = slope * (u - centre) + shift
    # within these limits neither side overflows nor cancels, and what they add to a sum is lost in its rounding
    x = tl.maximum(x, -85.0, propagate_nan=tl.PropagateNan.ALL)
    z = tl.exp(tl.minimum(x, 85.0, propagate_nan=tl.PropagateNan.ALL))
    m = 1.0 / (1.0 + z)
    rest = z * m
    mass = tl.where(live, a * m, 0.0)
    s = mass * rest
    return mass, s, s * (rest - m)


@triton.jit
def chunk_moments(u, a, live, centre, slope, shift, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Sums by thread of `moments_of` a chunk."""
    mass, s, bend = moments_of(u, a, live, centre, slope, shift)
    return (
        lane_sum(mass, LANES, VECTOR, tl.float64),
        lane_sum(s, LANES, VECTOR, tl.float64),
        lane_sum(bend, LANES, VECTOR, tl.float64),
    )


@triton.jit(do_not_specialize=SIZES)
def _total_cost_kernel(
    table_ptr, partial_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The sum of the costs; arrays alone are read."""
    total = tl.zeros((LANES,), tl.float64)
    whole_tensors = tl.sum(total, 0)
    begin, end = own_chunks(n_chunks)
    row = locate(table_ptr, n_tensors, begin, FIRST_CHUNK)
    for chunk in range(begin, end):
        row, row_ptr, start, live, whole = chunk_at(table_ptr, n_tensors, row, chunk, CHUNK)
        if tl.load(row_ptr + COST_STRIDE) == 0:
            count = tl.minimum(tl.load(row_ptr + LENGTH) - start, CHUNK)
            whole_tensors += count.to(tl.float64) * tl.load(pointer_at(row_ptr + COSTS, DTYPE, False)).to(tl.float64)
        else:
            a = load_costs(row_ptr, start, live, whole, DTYPE, ALIGNED, CHUNK)
            total += lane_sum(tl.where(live, a, 0.0).to(tl.float64), LANES, VECTOR, tl.float64)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0) + whole_tensors)


@triton.jit
def _count_candidates(
    select_ptr, keys_ptr, prices_ptr, found, scale, first, last, shift,
    HAS_COSTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The range of keys once more, from this program's candidates instead of the values."""
    for start in range(0, found, CHUNK):
        at = start + tl.arange(0, CHUNK)
        key = tl.load(keys_ptr + at, at < found, other=0).to(tl.uint32, bitcast=True)
        inside = (at < found) & (key >= first) & (key <= last)
        a = tl.full((CHUNK,), 1.0, tl.float32)
        if HAS_COSTS:
            a = tl.load(prices_ptr + at, at < found, other=1.0)
        cost = fixed_point(a, inside, scale, HAS_COSTS)
        bins = ((key - first) >> shift).to(tl.int32)
        tl.atomic_add(select_ptr + HISTOGRAM + bins, cost.to(tl.int64), inside, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def _survey_kernel(
    table_ptr, solve_ptr, select_ptr, partial_ptr, tally_ptr, keys_ptr, prices_ptr, n_tensors, n_chunks, capacity,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, ALIGNED: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The moments at t, and the cost above and within the range of keys, in one read.

    The entries in the range are kept by program: unless they were too many, the ranges inside it need no further read.
    """
    program = tl.program_id(0)
    keys_ptr += program.to(tl.int64) * capacity
    prices_ptr += program.to(tl.int64) * capacity
    soft_open = SOFT and tl.load(solve_ptr + SOFT_DONE) == 0.0
    hard_open = HARD and tl.load(select_ptr + HARD_DONE) == 0
    collected = HARD and tl.load(select_ptr + COLLECTED) != 0
    beta, sign, scale = tl.load(solve_ptr + BETA), tl.load(solve_ptr + SIGN), tl.load(solve_ptr + SCALE)
    centre, slope, shift = moment_logit(
        tl.load(solve_ptr + T), beta, sign, tl.load(solve_ptr + LOWEST), tl.load(solve_ptr + HIGHEST)
    )
    lo, bits = tl.load(select_ptr + LO), tl.load(select_ptr + SHIFT).to(tl.uint32)
    first, last = lo.to(tl.uint32), tl.load(select_ptr + LAST).to(tl.uint32)
    if HARD:
        if hard_open and collected:  # before the walk, which then keeps fewer numbers in registers
            kept = tl.load(tally_ptr + program).to(tl.int32)
            _count_candidates(select_ptr, keys_ptr, prices_ptr, kept, scale, first, last, bits, HAS_COSTS, CHUNK)
    selecting = hard_open and not collected
    from_here, up_to = limits_of_keys(first, last)
    mass = tl.zeros((LANES,), tl.float64)
    weight, bend = mass, mass
    lowest = tl.full((LANES,), float("inf"), tl.float32)
    highest = -lowest
    cost_of_live = mass
    above = tl.zeros((LANES,), tl.int64 if HAS_COSTS else tl.int32)  # counts by thread
    found = lo.to(tl.int32) * 0
    if soft_open or selecting:
        begin, end = own_chunks(n_chunks)
        row = locate(table_ptr, n_tensors, begin, FIRST_CHUNK)
        for chunk in range(begin, end):
            row, row_ptr, start, live, whole = chunk_at(table_ptr, n_tensors, row, chunk, CHUNK)
            u, a, live = load_ratio(row_ptr, start, live, whole, DTYPE, HAS_COSTS, ABSOLUTE, ALIGNED, CHUNK)
            if SOFT:
                if soft_open:
                    if not ABSOLUTE:
                        cost_of_live += lane_sum(tl.where(live, a, 0.0), LANES, VECTOR, tl.float64)
                    m0, m1, m2 = chunk_moments(u, a, live, centre, slope, shift, LANES, VECTOR)
                    mass += m0
                    weight += m1
                    bend += m2
                    lowest = tl.minimum(lowest, lane_min(tl.where(live, u, INFINITY), LANES, VECTOR))
                    highest = tl.maximum(highest, lane_max(tl.where(live, u, -INFINITY), LANES, VECTOR))
            if HARD:
                if selecting:
                    cost = fixed_point(a, live, scale, HAS_COSTS)
                    above += lane_sum(tl.where(u > up_to, cost, 0), LANES, VECTOR, above.dtype)
                    inside = live & (u >= from_here) & (u <= up_to)
                    more = tl.sum(inside.to(tl.int32), 0)
                    if more > 0:
                        key = ordered_key(u)
                        bins = ((key - first) >> bits).to(tl.int32)
                        # a constant takes no registers
                        more_cost = cost.to(tl.int64) if HAS_COSTS else tl.full((CHUNK,), 1, tl.int64)
                        tl.atomic_add(select_ptr + HISTOGRAM + bins, more_cost, inside, sem="relaxed")
                        if found < capacity:
                            at = found + tl.cumsum(inside.to(tl.int32), 0) - 1
                            keep = inside & (at < capacity)
                            tl.store(keys_ptr + at, key.to(tl.int32, bitcast=True), keep)
                            if HAS_COSTS:
                                tl.store(prices_ptr + at, a, keep)
                        found = tl.minimum(found + more, 1 << 30)
    if SOFT:
        own = partial_ptr + program * MOMENTS
        tl.store(own, tl.sum(mass, 0))
        tl.store(own + 1, tl.sum(weight, 0))
        tl.store(own + 2, tl.sum(bend, 0))
        tl.store(own + 3, tl.min(lowest, 0).to(tl.float64))
        tl.store(own + 4, tl.max(highest, 0).to(tl.float64))
        tl.store(own + 5, INFINITY if ABSOLUTE else tl.sum(cost_of_live, 0))
    if HARD:
        if selecting:
            tl.store(tally_ptr + program, found.to(tl.int64))
            tl.atomic_add(select_ptr + ABOVE, tl.sum(above.to(tl.int64), 0), sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def _ties_kernel(
    table_ptr, solve_ptr, select_ptr, tally_ptr, keys_ptr, prices_ptr, n_tensors, n_chunks, capacity,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Cost at the cut in every program's run, when some of it may be kept: ties go to the lowest index."""
    program = tl.program_id(0).to(tl.int64)
    scale, key_of_cut = tl.load(solve_ptr + SCALE), tl.load(select_ptr + LO).to(tl.uint32)
    cut = value_of_key(key_of_cut)
    if tl.load(select_ptr + ROOM) > 0:
        tied = tl.zeros((LANES,), tl.int64)
        if tl.load(select_ptr + COLLECTED) != 0:
            keys_ptr += program * capacity
            prices_ptr += program * capacity
            found = tl.load(tally_ptr + program).to(tl.int32)
            for start in range(0, found, CHUNK):
                at = start + tl.arange(0, CHUNK)
                key = tl.load(keys_ptr + at, at < found, other=0).to(tl.uint32, bitcast=True)
                a = tl.full((CHUNK,), 1.0, tl.float32)
                if HAS_COSTS:
                    a = tl.load(prices_ptr + at, at < found, other=1.0)
                cost = fixed_point(a, (at < found) & (key == key_of_cut), scale, HAS_COSTS)
                tied += lane_sum(cost, LANES, VECTOR, tl.int64)
        else:
            begin, end = own_chunks(n_chunks)
            row = locate(table_ptr, n_tensors, begin, FIRST_CHUNK)
            for chunk in range(begin, end):
                row, row_ptr, start, live, whole = chunk_at(table_ptr, n_tensors, row, chunk, CHUNK)
                u, a, live = load_ratio(row_ptr, start, live, whole, DTYPE, HAS_COSTS, ABSOLUTE, ALIGNED, CHUNK)
                cost = fixed_point(a, live & (u == cut), scale, HAS_COSTS)
                tied += lane_sum(cost, LANES, VECTOR, tl.int64)
        tl.store(tally_ptr + tl.num_programs(0) + program, tl.sum(tied, 0))


@triton.jit(do_not_specialize=SIZES)
def _write_kernel(
    table_ptr, solve_ptr, select_ptr, tally_ptr, partial_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, ALIGNED: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, AGAIN: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The masks, and the sum of a m as written; AGAIN: the soft ones only, and only if that sum missed the budget."""
    program = tl.program_id(0).to(tl.int64)
    beta, sign = tl.load(solve_ptr + BETA), tl.load(solve_ptr + SIGN)
    scale, target = tl.load(solve_ptr + SCALE), tl.load(solve_ptr + TARGET)
    constant = tl.load(solve_ptr + QUOTA) * beta <= 0.0
    centre, shift = logit_at(tl.load(solve_ptr + T), beta, tl.load(solve_ptr + LOWEST), tl.load(solve_ptr + HIGHEST))
    centre = tl.where(constant, 0.0, centre)
    shift -= beta * tl.load(solve_ptr + REST)
    poison = tl.load(solve_ptr + POISON).to(tl.float32)
    shift = tl.where(constant, sign * target, shift).to(tl.float32) + poison
    slope = tl.where(constant, 0.0, beta.to(tl.float32))
    cut, room = value_of_key(tl.load(select_ptr + LO).to(tl.uint32)), tl.load(select_ptr + ROOM)
    cut = tl.where(tl.load(select_ptr + EVERYTHING) != 0, -INFINITY, cut)
    before = room * 0  # cost at the cut before the chunk, walking back from the end of the run
    if HARD and AGAIN == 0:
        if room > 0:
            at = tl.arange(0, BLOCK)
            before = tl.sum(tl.load(tally_ptr + tl.num_programs(0) + at, at <= program, other=0), 0)
    mass = tl.zeros((LANES,), tl.float64)
    if AGAIN == 0 or tl.load(solve_ptr + REWRITE) != 0.0:
        begin, end = own_chunks(n_chunks)
        row = locate(table_ptr, n_tensors, begin, FIRST_CHUNK)
        for step in range(begin, end):
            chunk = begin + end - 1 - step
            row, row_ptr, start, live, whole = chunk_at(table_ptr, n_tensors, row, chunk, CHUNK)
            u, a, kept = load_ratio(row_ptr, start, live, whole, DTYPE, HAS_COSTS, ABSOLUTE, ALIGNED, CHUNK)
            if SOFT:
                m, rest = logistic(slope * (u - centre) + shift)
                if not ABSOLUTE:
                    m, rest = tl.where(kept, m, poison), tl.where(kept, rest, 0.0)
                store_chunk(pointer_at(row_ptr + OUTPUT, DTYPE, ALIGNED), start, live, whole, m.to(DTYPE), CHUNK)
                mass += lane_sum(tl.where(live, a * tl.where(sign > 0, m, rest), 0.0), LANES, VECTOR, tl.float64)
            if HARD and AGAIN == 0:
                keep = u > cut
                if room > 0:
                    cost = fixed_point(a, kept & (u == cut), scale, HAS_COSTS)
                    here = tl.sum(cost, 0).to(tl.int64)
                    before -= here
                    if before + here <= room:
                        keep = u >= cut
                    elif before < room:
                        keep = keep | ((u == cut) & (before + tl.cumsum(cost, 0) <= room))
                output = pointer_at(row_ptr + OUTPUT + 1, tl.uint8, ALIGNED)
                store_chunk(output, start, live, whole, keep.to(tl.uint8), CHUNK)
    if SOFT and AGAIN == 0:
        tl.store(partial_ptr + program * MOMENTS, tl.sum(mass, 0))


@triton.jit(do_not_specialize=SIZES)
def _gradient_sums_kernel(
    table_ptr, threshold_ptr, beta_ptr, partial_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums of g s, a s, and of both times u - c, of this program's chunks."""
    beta, centre = tl.load(beta_ptr).to(tl.float32), tl.load(threshold_ptr).to(tl.float32)
    shift = tl.load(threshold_ptr + 1).to(tl.float32)
    gs = tl.zeros((LANES,), tl.float64)
    weight, gsu, asu = gs, gs, gs
    begin, end = own_chunks(n_chunks)
    row = locate(table_ptr, n_tensors, begin, FIRST_CHUNK)
    for chunk in range(begin, end):
        row, row_ptr, start, live, whole = chunk_at(table_ptr, n_tensors, row, chunk, CHUNK)
        u, a, kept = load_ratio(row_ptr, start, live, whole, DTYPE, HAS_COSTS, False, ALIGNED, CHUNK)
        g = load_chunk(pointer_at(row_ptr + OUTPUT, DTYPE, ALIGNED), start, live, whole, 0.0, CHUNK).to(tl.float32)
        away = tl.where(kept, u - centre, 0.0)
        m, rest = logistic(beta * away + shift)
        s = tl.where(kept, m * rest, 0.0)
        gs += lane_sum(g * s, LANES, VECTOR, tl.float64)
        weight += lane_sum(a * s, LANES, VECTOR, tl.float64)
        gsu += lane_sum(g * s * away, LANES, VECTOR, tl.float64)
        asu += lane_sum(a * s * away, LANES, VECTOR, tl.float64)
    own = partial_ptr + 4 * tl.program_id(0)
    tl.store(own, tl.sum(gs, 0))
    tl.store(own + 1, tl.sum(weight, 0))
    tl.store(own + 2, tl.sum(gsu, 0))
    tl.store(own + 3, tl.sum(asu, 0))


@triton.jit(do_not_specialize=SIZES)
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


@triton.jit(do_not_specialize=SIZES)
def _gradient_write_kernel(
    table_ptr, threshold_ptr, beta_ptr, scalars_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, COST_GRAD: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    beta, centre = tl.load(beta_ptr).to(tl.float32), tl.load(threshold_ptr).to(tl.float32)
    shift, r = tl.load(threshold_ptr + 1).to(tl.float32), tl.load(scalars_ptr).to(tl.float32)
    begin, end = own_chunks(n_chunks)
    row = locate(table_ptr, n_tensors, begin, FIRST_CHUNK)
    for step in range(begin, end):
        chunk = begin + end - 1 - step
        row, row_ptr, start, live, whole = chunk_at(table_ptr, n_tensors, row, chunk, CHUNK)
        u, a, kept = load_ratio(row_ptr, start, live, whole, DTYPE, HAS_COSTS, False, ALIGNED, CHUNK)
        g = load_chunk(pointer_at(row_ptr + OUTPUT, DTYPE, ALIGNED), start, live, whole, 0.0, CHUNK).to(tl.float32)
        m, rest = logistic(beta * (u - centre) + shift)
        pull = tl.where(kept, beta * m * rest * (g / a - r), 0.0)
        store_chunk(pointer_at(row_ptr + OUTPUT + 1, DTYPE, ALIGNED), start, live, whole, pull.to(DTYPE), CHUNK)
        if COST_GRAD:
            output = pointer_at(row_ptr + OUTPUT + 2, DTYPE, ALIGNED)
            of_costs = tl.where(kept, -pull * u - r * m, 0.0).to(DTYPE)
            store_chunk(output, start, live, whole, of_costs, CHUNK)
