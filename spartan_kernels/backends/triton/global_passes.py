"""Kernels that pass over a list of tensors: one persistent grid, sums in float64 by thread, added in a fixed order.

Every pass leaves at once when the control block says that there is nothing left for it to find.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.configs import SIZES
from spartan_kernels.backends.triton.primitives import (
    INFINITY,
    LOG2_E,
    QUOTA,
    SIGN,
    TARGET,
    T,
    binary_logistic,
    lane_max,
    lane_min,
    lane_sum,
    limits_of_keys,
    logit_at,
    moments_of,
    ordered_key,
    value_of_key,
)
from spartan_kernels.backends.triton.tables import (
    FIRST_CHUNK,
    OUTPUT,
    VALUES,
    chunk_at,
    chunks_of,
    costs_at,
    load_chunk,
    load_ratio,
    locate,
    own_chunks,
    pointer_at,
    store_chunk,
)

# The control block in float64: after the words of the search for the soft threshold ...
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
BEST_T = tl.constexpr(18)  # of a search that checks each of its steps: the trial with the smallest miss, and that
BEST_REST = tl.constexpr(19)
BEST_MISS = tl.constexpr(20)
FINE = tl.constexpr(21)  # its steps are those of REST, measured from T
CONTROL = tl.constexpr(22)
# ... and in int64, the search for the key at which the budget runs out, from LO to LAST in BINS bins of 2^SHIFT keys.
LO = tl.constexpr(0)
SHIFT = tl.constexpr(1)
LAST = tl.constexpr(2)
HARD_DONE = tl.constexpr(3)
BUDGET = tl.constexpr(4)
ABOVE = tl.constexpr(5)  # fixed-point cost of what this survey finds above the range, beside BASE
ROOM = tl.constexpr(6)  # what is left for the entries at the cut, when found
EVERYTHING = tl.constexpr(7)
COLLECTED = tl.constexpr(8)  # the candidates are all of the entries in the range
TICKET = tl.constexpr(10)  # programs of a launch that are done
BASE = tl.constexpr(9)  # fixed-point cost above the range that was known before
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
def moment_logit(t, rest, beta, sign, lowest, highest):
    """(centre, slope, shift) of the negated logit of the smaller side at t + rest, float32, as a power of two."""
    centre, shift = logit_at(t, beta, lowest, highest)
    shift -= beta * rest
    return centre, (-sign * beta * LOG2_E).to(tl.float32), (-sign * shift * LOG2_E).to(tl.float32)


@triton.jit
def chunk_moments(u, a, live, centre, slope, shift, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Sums by thread of `moments_of` a chunk."""
    mass, s, third = moments_of(u, a, live, centre, slope, shift)
    return (
        lane_sum(mass, LANES, VECTOR, tl.float64),
        lane_sum(s, LANES, VECTOR, tl.float64),
        lane_sum(third, LANES, VECTOR, tl.float64),
    )


@triton.jit
def _chunk_cost(
    costs_ptr, origin, length, chunk,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    start, live = chunk_at(origin, length, chunk, CHUNK, WHOLE)
    a = load_chunk(costs_ptr, start, live, 0.0, CHUNK, WHOLE).to(tl.float64)
    return lane_sum(a, LANES, VECTOR, tl.float64)


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
    while begin < end:
        row_ptr, begin, stop, whole, length, origin = chunks_of(table_ptr, row, begin, end, CHUNK)
        costs_ptr, many, number = costs_at(row_ptr, DTYPE, True, ALIGNED)
        if many:
            for chunk in range(begin, whole):
                total += _chunk_cost(costs_ptr, origin, length, chunk, CHUNK, LANES, VECTOR, True)
            if whole < stop:
                total += _chunk_cost(costs_ptr, origin, length, whole, CHUNK, LANES, VECTOR, False)
        else:
            before, after = (begin - origin).to(tl.int64) * CHUNK, (stop - origin).to(tl.int64) * CHUNK
            whole_tensors += (tl.minimum(length, after) - before).to(tl.float64) * number.to(tl.float64)
        begin = stop
        row += 1
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


@triton.jit
def _survey_chunk(
    mass, weight, third, cost_of_live, lowest, highest, above, found,
    values_ptr, costs_ptr, many, number, origin, length, chunk, soft_open, selecting,
    centre, slope, shift, scale, from_here, up_to, first, bits,
    select_ptr, keys_ptr, prices_ptr, capacity,
    HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to the sums of a survey, the histogram and the candidates."""
    start, live = chunk_at(origin, length, chunk, CHUNK, WHOLE)
    u, a, live = load_ratio(values_ptr, costs_ptr, many, number, start, live, HAS_COSTS, ABSOLUTE, CHUNK, WHOLE)
    if SOFT:
        if soft_open:
            if not ABSOLUTE:
                cost_of_live += lane_sum(tl.where(live, a, 0.0), LANES, VECTOR, tl.float64)
            m0, m1, m2 = chunk_moments(u, a, live, centre, slope, shift, LANES, VECTOR)
            mass += m0
            weight += m1
            third += m2
            lowest = tl.minimum(lowest, lane_min(tl.where(live, u, INFINITY), LANES, VECTOR))
            highest = tl.maximum(highest, lane_max(tl.where(live, u, -INFINITY), LANES, VECTOR))
    if HARD:
        if selecting:
            if HAS_COSTS:
                cost = fixed_point(a, live, scale, HAS_COSTS)
                above += lane_sum(tl.where(u > up_to, cost, 0), LANES, VECTOR, tl.int64)
                more = tl.sum((live & (u >= from_here) & (u <= up_to)).to(tl.int32), 0)
            else:  # two counts in a number: 4096 for an entry above the range, 1 for one in it
                both = tl.where(live, tl.where(u > up_to, 4096.0, tl.where(u >= from_here, 1.0, 0.0)), 0.0)
                counts = lane_sum(both, LANES, VECTOR, tl.int32)
                above += counts >> 12
                more = tl.sum(counts & 4095, 0)
            if more > 0:
                inside = live & (u >= from_here) & (u <= up_to)
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
    return mass, weight, third, cost_of_live, lowest, highest, above, found


@triton.jit
def survey(
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
    t, rest = tl.load(solve_ptr + T), tl.load(solve_ptr + REST)
    centre, slope, shift = moment_logit(t, rest, beta, sign, tl.load(solve_ptr + LOWEST), tl.load(solve_ptr + HIGHEST))
    lo, bits = tl.load(select_ptr + LO), tl.load(select_ptr + SHIFT).to(tl.uint32)
    first, last = lo.to(tl.uint32), tl.load(select_ptr + LAST).to(tl.uint32)
    if HARD:
        if hard_open and collected:  # before the walk, which then keeps fewer numbers in registers
            kept = tl.load(tally_ptr + program).to(tl.int32)
            _count_candidates(select_ptr, keys_ptr, prices_ptr, kept, scale, first, last, bits, HAS_COSTS, CHUNK)
    selecting = hard_open and not collected
    from_here, up_to = limits_of_keys(first, last)
    mass = tl.zeros((LANES,), tl.float64)
    weight, third = mass, mass
    lowest = tl.full((LANES,), float("inf"), tl.float32)
    highest = -lowest
    cost_of_live = mass
    above = tl.zeros((LANES,), tl.int64 if HAS_COSTS else tl.int32)  # counts by thread
    found = lo.to(tl.int32) * 0
    if soft_open or selecting:
        begin, end = own_chunks(n_chunks)
        row = locate(table_ptr, n_tensors, begin, FIRST_CHUNK)
        while begin < end:
            row_ptr, begin, stop, whole, length, origin = chunks_of(table_ptr, row, begin, end, CHUNK)
            values_ptr = pointer_at(row_ptr + VALUES, DTYPE, ALIGNED)
            costs_ptr, many, number = costs_at(row_ptr, DTYPE, HAS_COSTS, ALIGNED)
            for chunk in range(begin, whole):
                mass, weight, third, cost_of_live, lowest, highest, above, found = _survey_chunk(
                    mass, weight, third, cost_of_live, lowest, highest, above, found,
                    values_ptr, costs_ptr, many, number, origin, length, chunk, soft_open, selecting,
                    centre, slope, shift, scale, from_here, up_to, first, bits,
                    select_ptr, keys_ptr, prices_ptr, capacity,
                    HAS_COSTS, ABSOLUTE, SOFT, HARD, CHUNK, LANES, VECTOR, True,
                )  # fmt: skip
            if whole < stop:
                mass, weight, third, cost_of_live, lowest, highest, above, found = _survey_chunk(
                    mass, weight, third, cost_of_live, lowest, highest, above, found,
                    values_ptr, costs_ptr, many, number, origin, length, whole, soft_open, selecting,
                    centre, slope, shift, scale, from_here, up_to, first, bits,
                    select_ptr, keys_ptr, prices_ptr, capacity,
                    HAS_COSTS, ABSOLUTE, SOFT, HARD, CHUNK, LANES, VECTOR, False,
                )  # fmt: skip
            begin = stop
            row += 1
    if SOFT:
        own = partial_ptr + program * MOMENTS
        tl.store(own, tl.sum(mass, 0))
        tl.store(own + 1, tl.sum(weight, 0))
        tl.store(own + 2, tl.sum(weight - 2 * third, 0))  # of a s (1 - 2 m)
        tl.store(own + 3, tl.min(lowest, 0).to(tl.float64))
        tl.store(own + 4, tl.max(highest, 0).to(tl.float64))
        tl.store(own + 5, INFINITY if ABSOLUTE else tl.sum(cost_of_live, 0))
    if HARD:
        if selecting:
            tl.store(tally_ptr + program, found.to(tl.int64))
            tl.atomic_add(select_ptr + ABOVE, tl.sum(above.to(tl.int64), 0), sem="relaxed")


@triton.jit
def _tied_chunk(
    values_ptr, costs_ptr, many, number, origin, length, chunk, cut, scale,
    HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, CHUNK: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    start, live = chunk_at(origin, length, chunk, CHUNK, WHOLE)
    u, a, live = load_ratio(values_ptr, costs_ptr, many, number, start, live, HAS_COSTS, ABSOLUTE, CHUNK, WHOLE)
    return lane_sum(fixed_point(a, live & (u == cut), scale, HAS_COSTS), LANES, VECTOR, tl.int64)


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
            while begin < end:
                row_ptr, begin, stop, whole, length, origin = chunks_of(table_ptr, row, begin, end, CHUNK)
                values_ptr = pointer_at(row_ptr + VALUES, DTYPE, ALIGNED)
                costs_ptr, many, number = costs_at(row_ptr, DTYPE, HAS_COSTS, ALIGNED)
                for chunk in range(begin, whole):
                    tied += _tied_chunk(
                        values_ptr, costs_ptr, many, number, origin, length, chunk, cut, scale,
                        HAS_COSTS, ABSOLUTE, CHUNK, LANES, VECTOR, True,
                    )  # fmt: skip
                if whole < stop:
                    tied += _tied_chunk(
                        values_ptr, costs_ptr, many, number, origin, length, whole, cut, scale,
                        HAS_COSTS, ABSOLUTE, CHUNK, LANES, VECTOR, False,
                    )  # fmt: skip
                begin = stop
                row += 1
        tl.store(tally_ptr + tl.num_programs(0) + program, tl.sum(tied, 0))


@triton.jit
def _write_chunk(
    mass, before, values_ptr, costs_ptr, many, number, soft_ptr, hard_ptr, origin, length, chunk,
    centre, slope, shift, poison, sign, scale, cut, room,
    HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr, AGAIN: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The masks of one chunk, what they add to the sum, and the cost at the cut before it."""
    start, live = chunk_at(origin, length, chunk, CHUNK, WHOLE)
    u, a, kept = load_ratio(values_ptr, costs_ptr, many, number, start, live, HAS_COSTS, ABSOLUTE, CHUNK, WHOLE)
    if SOFT:
        m, rest = binary_logistic(slope * (u - centre) + shift)
        if not ABSOLUTE:
            m, rest = tl.where(kept, m, poison), tl.where(kept, rest, 0.0)
        store_chunk(soft_ptr, start, live, m.to(soft_ptr.dtype.element_ty), CHUNK, WHOLE)
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
        store_chunk(hard_ptr, start, live, keep.to(tl.uint8), CHUNK, WHOLE)
    return mass, before


@triton.jit
def write_masks(
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
    shift = (tl.where(constant, sign * target, shift) * LOG2_E).to(tl.float32) + poison
    slope = tl.where(constant, 0.0, (beta * LOG2_E).to(tl.float32))
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
        row = locate(table_ptr, n_tensors, end - 1, FIRST_CHUNK)
        while begin < end:
            row_ptr, first, stop, whole, length, origin = chunks_of(table_ptr, row, begin, end, CHUNK)
            values_ptr = pointer_at(row_ptr + VALUES, DTYPE, ALIGNED)
            costs_ptr, many, number = costs_at(row_ptr, DTYPE, HAS_COSTS, ALIGNED)
            soft_ptr = pointer_at(row_ptr + OUTPUT, DTYPE, ALIGNED)
            hard_ptr = pointer_at(row_ptr + OUTPUT + 1, tl.uint8, ALIGNED, VECTOR)
            if whole < stop:
                mass, before = _write_chunk(
                    mass, before, values_ptr, costs_ptr, many, number, soft_ptr, hard_ptr, origin, length, whole,
                    centre, slope, shift, poison, sign, scale, cut, room,
                    HAS_COSTS, ABSOLUTE, SOFT, HARD, AGAIN, CHUNK, LANES, VECTOR, False,
                )  # fmt: skip
            for step in range(first, whole):
                mass, before = _write_chunk(
                    mass, before, values_ptr, costs_ptr, many, number, soft_ptr, hard_ptr, origin, length,
                    first + whole - 1 - step, centre, slope, shift, poison, sign, scale, cut, room,
                    HAS_COSTS, ABSOLUTE, SOFT, HARD, AGAIN, CHUNK, LANES, VECTOR, True,
                )  # fmt: skip
            end = first
            row -= 1
    if SOFT and AGAIN == 0:
        tl.store(partial_ptr + program * MOMENTS, tl.sum(mass, 0))


@triton.jit
def _gradient_sums_chunk(
    gs, weight, gsu, asu, values_ptr, costs_ptr, many, number, grad_ptr, origin, length, chunk, slope, centre, shift,
    HAS_COSTS: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    start, live = chunk_at(origin, length, chunk, CHUNK, WHOLE)
    u, a, kept = load_ratio(values_ptr, costs_ptr, many, number, start, live, HAS_COSTS, False, CHUNK, WHOLE)
    g = load_chunk(grad_ptr, start, live, 0.0, CHUNK, WHOLE).to(tl.float32)
    away = tl.where(kept, u - centre, 0.0)
    m, rest = binary_logistic(slope * away + shift)
    s = tl.where(kept, m * rest, 0.0)
    gs += lane_sum(g * s, LANES, VECTOR, tl.float64)
    weight += lane_sum(a * s, LANES, VECTOR, tl.float64)
    gsu += lane_sum(g * s * away, LANES, VECTOR, tl.float64)
    asu += lane_sum(a * s * away, LANES, VECTOR, tl.float64)
    return gs, weight, gsu, asu


@triton.jit(do_not_specialize=SIZES)
def _gradient_sums_kernel(
    table_ptr, threshold_ptr, beta_ptr, partial_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums of g s, a s, and of both times u - c, of this program's chunks."""
    slope, centre = (tl.load(beta_ptr).to(tl.float64) * LOG2_E).to(tl.float32), tl.load(threshold_ptr).to(tl.float32)
    shift = (tl.load(threshold_ptr + 1) * LOG2_E).to(tl.float32)
    gs = tl.zeros((LANES,), tl.float64)
    weight, gsu, asu = gs, gs, gs
    begin, end = own_chunks(n_chunks)
    row = locate(table_ptr, n_tensors, begin, FIRST_CHUNK)
    while begin < end:
        row_ptr, begin, stop, whole, length, origin = chunks_of(table_ptr, row, begin, end, CHUNK)
        values_ptr = pointer_at(row_ptr + VALUES, DTYPE, ALIGNED)
        costs_ptr, many, number = costs_at(row_ptr, DTYPE, HAS_COSTS, ALIGNED)
        grad_ptr = pointer_at(row_ptr + OUTPUT, DTYPE, ALIGNED)
        for chunk in range(begin, whole):
            gs, weight, gsu, asu = _gradient_sums_chunk(
                gs, weight, gsu, asu, values_ptr, costs_ptr, many, number, grad_ptr, origin, length, chunk,
                slope, centre, shift, HAS_COSTS, CHUNK, LANES, VECTOR, True,
            )  # fmt: skip
        if whole < stop:
            gs, weight, gsu, asu = _gradient_sums_chunk(
                gs, weight, gsu, asu, values_ptr, costs_ptr, many, number, grad_ptr, origin, length, whole,
                slope, centre, shift, HAS_COSTS, CHUNK, LANES, VECTOR, False,
            )  # fmt: skip
        begin = stop
        row += 1
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


@triton.jit
def _gradient_write_chunk(
    values_ptr, costs_ptr, many, number, grad_ptr, pull_ptr, costs_pull_ptr, origin, length, chunk,
    beta, slope, centre, shift, r,
    HAS_COSTS: tl.constexpr, COST_GRAD: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    start, live = chunk_at(origin, length, chunk, CHUNK, WHOLE)
    u, a, kept = load_ratio(values_ptr, costs_ptr, many, number, start, live, HAS_COSTS, False, CHUNK, WHOLE)
    g = load_chunk(grad_ptr, start, live, 0.0, CHUNK, WHOLE).to(tl.float32)
    m, rest = binary_logistic(slope * (u - centre) + shift)
    pull = tl.where(kept, beta * m * rest * (g / a - r), 0.0)
    store_chunk(pull_ptr, start, live, pull.to(pull_ptr.dtype.element_ty), CHUNK, WHOLE)
    if COST_GRAD:
        of_costs = tl.where(kept, -pull * u - r * m, 0.0)
        store_chunk(costs_pull_ptr, start, live, of_costs.to(pull_ptr.dtype.element_ty), CHUNK, WHOLE)


@triton.jit(do_not_specialize=SIZES)
def _gradient_write_kernel(
    table_ptr, threshold_ptr, beta_ptr, scalars_ptr, n_tensors, n_chunks,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, COST_GRAD: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    beta, centre = tl.load(beta_ptr).to(tl.float32), tl.load(threshold_ptr).to(tl.float32)
    slope = (tl.load(beta_ptr).to(tl.float64) * LOG2_E).to(tl.float32)
    shift, r = (tl.load(threshold_ptr + 1) * LOG2_E).to(tl.float32), tl.load(scalars_ptr).to(tl.float32)
    begin, end = own_chunks(n_chunks)
    row = locate(table_ptr, n_tensors, end - 1, FIRST_CHUNK)
    while begin < end:
        row_ptr, first, stop, whole, length, origin = chunks_of(table_ptr, row, begin, end, CHUNK)
        values_ptr = pointer_at(row_ptr + VALUES, DTYPE, ALIGNED)
        costs_ptr, many, number = costs_at(row_ptr, DTYPE, HAS_COSTS, ALIGNED)
        grad_ptr = pointer_at(row_ptr + OUTPUT, DTYPE, ALIGNED)
        pull_ptr = pointer_at(row_ptr + OUTPUT + 1, DTYPE, ALIGNED)
        costs_pull_ptr = pointer_at(row_ptr + OUTPUT + 2, DTYPE, ALIGNED)
        if whole < stop:
            _gradient_write_chunk(
                values_ptr, costs_ptr, many, number, grad_ptr, pull_ptr, costs_pull_ptr, origin, length, whole,
                beta, slope, centre, shift, r, HAS_COSTS, COST_GRAD, CHUNK, False,
            )  # fmt: skip
        for step in range(first, whole):
            _gradient_write_chunk(
                values_ptr, costs_ptr, many, number, grad_ptr, pull_ptr, costs_pull_ptr, origin, length,
                first + whole - 1 - step, beta, slope, centre, shift, r, HAS_COSTS, COST_GRAD, CHUNK, True,
            )  # fmt: skip
        end = first
        row -= 1
