"""Kernels of one program that decide between the passes over a list: start, step, last resort, what is remembered."""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.configs import SIZES
from spartan_kernels.backends.triton.global_passes import (
    ABOVE,
    BASE,
    BEST_MISS,
    BEST_REST,
    BEST_T,
    BETA,
    BINS,
    BUDGET,
    COLLECTED,
    EVERYTHING,
    FINE,
    HARD_DONE,
    HIGHEST,
    HISTOGRAM,
    LAST,
    LIVE,
    LO,
    LOWEST,
    MOMENTS,
    POISON,
    READS,
    REST,
    REWRITE,
    ROOM,
    SCALE,
    SHIFT,
    SOFT_DONE,
    chunk_moments,
    moment_logit,
)
from spartan_kernels.backends.triton.primitives import (
    HIGH,
    INFINITY,
    LOG2_E,
    LOW,
    QUOTA,
    RESIDUAL,
    SIGN,
    TARGET,
    TOTAL,
    T,
    clamped_budget,
    first_threshold,
    halley_step,
    load_beta,
    logit_at,
    moments_of,
    ordered_key,
    overdrawn,
    smaller_side,
    value_of_key,
)
from spartan_kernels.backends.triton.soft_topk_rows import fine_logit, finer_bracket, search_ends
from spartan_kernels.backends.triton.tables import (
    VALUES,
    chunk_at,
    chunks_of,
    costs_at,
    gather_ratio,
    load_ratio,
    pointer_at,
)

# |M - q| / q that written masks may have, and the residual whose Halley step, once checked, is exact to rounding.
TOLERANCE = tl.constexpr(4e-7)
LAST_STEP = tl.constexpr(2e-3)
FARTHEST = tl.constexpr(8.5e37)  # a centre that float32 still holds, where the entries are not known yet
LARGEST = tl.constexpr(3.4028234663852886e38)
LIVE_ROUNDING = tl.constexpr(2.5e-7)  # of the cost of what is not masked: a sum of float32 sums
MAX_TRIALS = tl.constexpr(400)
FULL_SHIFT = tl.constexpr(21)  # 2048 bins of 2^21 keys are all keys
MESSAGE = tl.constexpr(
    8
)  # words that a rank sends of a survey before its histogram: moments, cost above, most candidates
FACTS = tl.constexpr(
    2
)  # words that a rank sends before its sample: its cost, and the entries that each of them stands for
SAMPLE_MARGIN = tl.constexpr(5.0)  # standard deviations of a rank in the sample, each side of the range


@triton.jit
def sampled(
    table_ptr, n_tensors, length, DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    """u, a and mask of entries spread over the list, one drawn from each of SAMPLE equal parts; all of a short list."""
    index = tl.arange(0, SAMPLE).to(tl.int64)
    part = tl.maximum(length // SAMPLE, 1)
    # a multiplicative hash of 24 bits: a fixed stride could follow the rows of a matrix
    draw = (index.to(tl.uint32) * 2654435761) >> 8
    entry = tl.where(length > SAMPLE, index * part + (draw.to(tl.int64) * part >> 24), index)
    live = entry < length
    return gather_ratio(table_ptr, n_tensors, tl.where(live, entry, 0), live, DTYPE, HAS_COSTS, ABSOLUTE)


@triton.jit
def sampled_by_ranks(facts_ptr, sample_ptr, ranks, SHARE: tl.constexpr, SAMPLE: tl.constexpr):
    """The same from what `_facts_kernel` drew on each rank, with costs weighted by the entries that one stands for.

    Returns:
        u, a, mask, and how many equal weights would tell as much (Kish's effective size of the sample).
    """
    index = tl.arange(0, SAMPLE)
    rank = index // SHARE
    mine = rank < ranks
    message = rank.to(tl.int64) * (FACTS + SHARE)
    entry_ptr = sample_ptr + 2 * (message + FACTS) + index % SHARE  # two float32 in a word
    u, a = tl.load(entry_ptr, mine, other=0.0), tl.load(entry_ptr + SHARE, mine, other=0.0)
    live = a != 0.0
    weight = tl.where(live, tl.load(facts_ptr + message + 1, mine, other=0.0), 0.0)
    sum_of_squares = tl.maximum(tl.sum(weight * weight, 0), 1e-300)
    effective = tl.maximum(tl.sum(weight, 0) * tl.sum(weight, 0) / sum_of_squares, 1.0)
    return u, a * weight.to(tl.float32), live, effective


@triton.jit
def _sample_range(u, a, live, share, count, cost):
    """Keys between which the budget runs out, SAMPLE_MARGIN standard deviations of its rank either way."""
    margin = cost / count * (tl.sqrt(count * share * (1 - share)) * SAMPLE_MARGIN + 16)
    key = ordered_key(u)
    upper = (count * 0.0).to(tl.uint32)
    lower = upper
    bit = (upper + 1) << 31
    for _ in range(32):
        spent = tl.sum(tl.where(live & (key >= (upper | bit)), a, 0.0), 0).to(tl.float64)
        upper = tl.where(spent > share * cost - margin, upper | bit, upper)
        spent = tl.sum(tl.where(live & (key >= (lower | bit)), a, 0.0), 0).to(tl.float64)
        lower = tl.where(spent > share * cost + margin, lower | bit, lower)
        bit = bit >> 1
    # with less than the margin to spend, nothing is known about the top
    upper = tl.where(share * cost > margin, upper.to(tl.int64), 0xFFFFFFFF)
    return lower.to(tl.int64), upper


@triton.jit
def _sample_threshold(u, a, live, count, total, beta, sign, quota, target):
    """The soft threshold of the sample, as `solve_rows` finds that of a row.

    All in scalars: as rows of one entry Triton 3.6 widens them through 2048 stores, and takes 10 s for that.
    """
    lowest = tl.min(tl.where(live, u, INFINITY), 0).to(tl.float64)
    highest = tl.max(tl.where(live, u, -INFINITY), 0).to(tl.float64)
    # relative to the smallest entry the spread does not cancel
    span = tl.where(live, u - lowest.to(tl.float32), 0.0)
    mean = tl.sum(span, 0).to(tl.float64) / count
    away = tl.where(live, span - mean.to(tl.float32), 0.0)
    variance = tl.sum(away * away, 0).to(tl.float64) / count
    low, high = lowest - sign * target / beta, highest - sign * target / beta
    t = first_threshold(lowest + mean, variance, beta, sign, target, low, high)
    residual = total * 0.0 + INFINITY
    best, best_miss = t, residual
    trial = 0
    pending = quota * beta > 0.0
    while (trial < MAX_TRIALS) & pending:
        centre, slope, shift = moment_logit(t, 0.0, beta, sign, lowest, highest)
        m0, m1, m2 = moments_of(u, a, live, centre, slope, shift)
        mass = tl.sum(m0, 0).to(tl.float64)
        miss = tl.abs(mass - quota)
        best = tl.where(miss < best_miss, t, best)
        best_miss = tl.minimum(miss, best_miss)
        slope_of_mass, third = tl.sum(m1, 0).to(tl.float64), tl.sum(m2, 0).to(tl.float64)
        t, low, high, residual, stuck = halley_step(
            t, low, high, residual, mass, slope_of_mass, slope_of_mass - 2 * third, beta, sign, quota, total, target
        )
        pending = (miss > quota * TOLERANCE) & (stuck == 0)
        trial += 1
    return best


@triton.jit
def _expected_hard(state_ptr):
    hard = tl.load(state_ptr + 2)
    return tl.where(tl.load(state_ptr + 4) >= 2, 2 * hard - tl.load(state_ptr + 3), hard)


@triton.jit(do_not_specialize=SIZES)
def _start_kernel(
    table_ptr, budget_ptr, beta_ptr, state_ptr, solve_ptr, select_ptr, partial_ptr, sample_ptr,
    n_tensors, length, n_programs,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr,
    HAS_STATE: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """The problem's constants; t and the range of keys from the last two solves, or from a sample.

    SHARE > 0: over ranks, of which each has sent its `_facts_kernel` and as many entries; these are the programs.
    """
    beta = load_beta(beta_ptr)
    total = beta * 0.0 + length
    scale = beta * 0.0 + 1.0
    if HAS_COSTS or SHARE > 0:
        at = tl.arange(0, BLOCK)
        own = partial_ptr + at * (FACTS + SHARE if SHARE > 0 else 1)
        total = tl.sum(tl.load(own, at < n_programs, other=0.0), 0)
    if HAS_COSTS:
        exponent = (total.to(tl.int64, bitcast=True) >> 52) - 1023
        scale = ((60 - exponent + 1023) << 52).to(tl.float64, bitcast=True)
    asked = tl.load(budget_ptr).to(tl.float64)
    budget, poison = clamped_budget(asked, total), overdrawn(asked, total)
    sign, quota, target = smaller_side(budget, total)
    share = budget / total

    t = beta * 0.0
    bottom = tl.program_id(0).to(tl.int64)  # 0
    top = bottom + 0xFFFFFFFF
    warm = False
    if HAS_STATE:
        warm = tl.load(state_ptr + 4) >= 1
    if warm:
        soft = tl.load(state_ptr)
        t = tl.where(tl.load(state_ptr + 4) >= 2, 2 * soft - tl.load(state_ptr + 1), soft)
        hard, width = _expected_hard(state_ptr), tl.load(state_ptr + 5)
        bottom = ordered_key((hard - width).to(tl.float32)).to(tl.int64)
        top = ordered_key((hard + width).to(tl.float32)).to(tl.int64)
    else:
        if SHARE > 0:
            u, a, live, ranked = sampled_by_ranks(partial_ptr, sample_ptr, n_programs, SHARE, SAMPLE)
        else:
            u, a, live = sampled(table_ptr, n_tensors, length, DTYPE, HAS_COSTS, ABSOLUTE, SAMPLE)
        count = tl.maximum(tl.sum(live.to(tl.int32), 0).to(tl.float64), 1.0)
        cost = tl.maximum(tl.sum(tl.where(live, a, 0.0), 0).to(tl.float64), 1e-300)
        if SOFT:
            t = _sample_threshold(u, a, live, count, cost, beta, sign, quota * (cost / total), target)
        if HARD:
            if SHARE > 0:
                count = ranked
            bottom, top = _sample_range(u, a, live, share, count, cost)
    t = tl.where((t == t) & (tl.abs(t) < INFINITY), t, 0.0)
    shift = bottom * 0
    while (BINS << shift) < top - bottom + 1:
        shift += 1

    tl.store(solve_ptr + T, t)
    tl.store(solve_ptr + LOW, -INFINITY)
    tl.store(solve_ptr + HIGH, INFINITY)
    tl.store(solve_ptr + RESIDUAL, INFINITY)
    tl.store(solve_ptr + SIGN, sign)
    tl.store(solve_ptr + QUOTA, quota)
    tl.store(solve_ptr + TARGET, target)
    tl.store(solve_ptr + TOTAL, total)
    done = quota * beta <= 0.0
    if not ABSOLUTE:
        done = budget <= 0.0  # else a survey finds what is masked: the height of a flat mask follows from the others
    tl.store(solve_ptr + SOFT_DONE, (done | (poison != poison)).to(tl.float64))
    tl.store(solve_ptr + BETA, beta)
    tl.store(solve_ptr + POISON, poison)
    tl.store(solve_ptr + SCALE, scale)
    tl.store(solve_ptr + REWRITE, 0.0)
    tl.store(solve_ptr + LOWEST, -FARTHEST)
    tl.store(solve_ptr + HIGHEST, FARTHEST)
    tl.store(solve_ptr + READS, 0.0)
    tl.store(solve_ptr + REST, 0.0)
    tl.store(solve_ptr + LIVE, 0.0)
    tl.store(solve_ptr + BEST_T, t)
    tl.store(solve_ptr + BEST_REST, 0.0)
    tl.store(solve_ptr + BEST_MISS, INFINITY)
    tl.store(solve_ptr + FINE, 0.0)
    tl.store(select_ptr + LO, bottom)
    tl.store(select_ptr + LAST, top)
    tl.store(select_ptr + SHIFT, shift)
    tl.store(select_ptr + HARD_DONE, (budget >= total).to(tl.int64))
    tl.store(select_ptr + EVERYTHING, (budget >= total).to(tl.int64))
    tl.store(select_ptr + BUDGET, tl.floor(budget * scale).to(tl.int64))
    tl.store(select_ptr + ROOM, 0)
    tl.store(select_ptr + COLLECTED, 0)
    tl.store(select_ptr + BASE, 0)


@triton.jit
def within_live(sign, quota, total, live):
    """Sign, quota, target and NaN for too large a budget, where the cost of what is not masked is the total."""
    budget = tl.where(sign > 0, quota, total - quota)
    poison = overdrawn(budget, live * (1 + LIVE_ROUNDING))
    sign, quota, target = smaller_side(tl.where(budget >= live * (1 - LIVE_ROUNDING), live, budget), live)
    return sign, quota, target, poison


@triton.jit
def moments_found(partial_ptr, n_programs, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """What all programs of a survey found, or all ranks: three sums, the bounds, and the cost of what is not masked."""
    at = tl.arange(0, BLOCK)
    own, mask = partial_ptr + at.to(tl.int64) * STRIDE, at < n_programs
    mass = tl.sum(tl.load(own, mask, other=0.0), 0)
    slope = tl.sum(tl.load(own + 1, mask, other=0.0), 0)
    curvature = tl.sum(tl.load(own + 2, mask, other=0.0), 0)
    lowest = tl.min(tl.load(own + 3, mask, other=INFINITY), 0)
    highest = tl.max(tl.load(own + 4, mask, other=-INFINITY), 0)
    return mass, slope, curvature, lowest, highest, tl.sum(tl.load(own + 5, mask, other=0.0), 0)


@triton.jit
def _soft_advance(
    solve_ptr, partial_ptr, n_programs, CHECKED: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One Halley step from the moments of a survey. All is loaded before anything is stored: one thread stores.

    CHECKED: no step ends the search before a survey has met the budget at it. Else the last one is checked when the
    masks are written, and `_finish_kernel` is there for what then misses.
    """
    mass, slope, curvature, lowest, highest, live = moments_found(partial_ptr, n_programs, STRIDE, BLOCK)
    live = tl.maximum(live, 1e-300)
    poisoned = (mass != mass) | (lowest == -INFINITY) | (highest == INFINITY)
    beta, sign, quota = tl.load(solve_ptr + BETA), tl.load(solve_ptr + SIGN), tl.load(solve_ptr + QUOTA)
    total, target = tl.load(solve_ptr + TOTAL), tl.load(solve_ptr + TARGET)
    again = (live < total * (1 - LIVE_ROUNDING)) & (tl.load(solve_ptr + LIVE) == 0.0)
    t, rest, reads = tl.load(solve_ptr + T), tl.load(solve_ptr + REST), tl.load(solve_ptr + READS)
    fine = CHECKED and tl.load(solve_ptr + FINE) != 0.0
    origin, tried = tl.where(fine, t, 0.0), tl.where(fine, rest, t)
    edge = sign * target / beta
    low = tl.maximum(tl.load(solve_ptr + LOW), lowest - origin - edge)
    high = tl.minimum(tl.load(solve_ptr + HIGH), highest - origin - edge)
    ahead, low, high, residual, stuck = halley_step(
        tried, low, high, tl.load(solve_ptr + RESIDUAL), mass, slope, curvature, beta, sign, quota, total, target
    )
    miss = tl.abs(mass - quota)
    met = miss <= quota * (TOLERANCE if CHECKED else TOLERANCE / 4)
    if CHECKED:
        best, best_rest, best_miss = tl.load(solve_ptr + BEST_T), tl.load(solve_ptr + BEST_REST), INFINITY
        nearer = again | (miss < tl.load(solve_ptr + BEST_MISS))
        best, best_rest = tl.where(nearer, t, best), tl.where(nearer, rest, best_rest)
        best_miss = tl.where(again, INFINITY, tl.minimum(miss, tl.load(solve_ptr + BEST_MISS)))
        more, finer = search_ends(met == 0, stuck, tried, low, high, beta, fine)
        done = more == 0
        centre, from_low, from_high = finer_bracket(low, high, lowest, highest, -edge, beta)
        low, high = tl.where(finer, from_low, low), tl.where(finer, from_high, high)
        rest = tl.where(finer, low + (high - low) / 2, tl.where(fine, ahead, 0.0))
        ahead = tl.where(finer, centre.to(tl.float64), tl.where(fine, t, ahead))
        residual = tl.where(finer, INFINITY, residual)
        fine = fine | finer
    else:
        # a step from where the sum is met still sharpens t, and is checked when written
        ahead = tl.where(met & (residual == INFINITY), t, ahead)
        done = met | stuck | (residual < LAST_STEP)
    done = done | poisoned | (quota * beta <= 0.0)
    # What is masked costs nothing: the others' costs are the total, and the search begins once more from t.
    new_sign, new_quota, new_target, poison = within_live(sign, quota, total, live)
    poisoned = poisoned | (again & (poison != poison))
    done = tl.where(again, poisoned | (new_quota * beta <= 0.0), done)
    t = tl.where(again, t, ahead)
    low, high = tl.where(again, -INFINITY, low), tl.where(again, INFINITY, high)
    tl.debug_barrier()
    if again:
        tl.store(solve_ptr + SIGN, new_sign)
        tl.store(solve_ptr + QUOTA, new_quota)
        tl.store(solve_ptr + TARGET, new_target)
        tl.store(solve_ptr + TOTAL, live)
        tl.store(solve_ptr + LIVE, live)
    if CHECKED:
        tl.store(solve_ptr + BEST_T, best)
        tl.store(solve_ptr + BEST_REST, best_rest)
        tl.store(solve_ptr + BEST_MISS, best_miss)
        tl.store(solve_ptr + REST, tl.where(again, 0.0, rest))
        tl.store(solve_ptr + FINE, (fine & (again == 0)).to(tl.float64))
    tl.store(solve_ptr + T, tl.where(poisoned, 0.0, t))
    tl.store(solve_ptr + LOW, low)
    tl.store(solve_ptr + HIGH, high)
    tl.store(solve_ptr + RESIDUAL, tl.where(again, INFINITY, residual))
    tl.store(solve_ptr + SOFT_DONE, done.to(tl.float64))
    tl.store(solve_ptr + POISON, tl.where(poisoned, float("nan"), 0.0))
    tl.store(solve_ptr + LOWEST, tl.maximum(lowest, -LARGEST))
    tl.store(solve_ptr + HIGHEST, tl.minimum(highest, LARGEST))
    tl.store(solve_ptr + READS, reads + 1)


@triton.jit
def _costs_found(select_ptr, tally_ptr, n_programs, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Cost in each bin of the range and above it, and the most candidates that a program found."""
    at = tl.arange(0, BLOCK)
    most = tl.max(tl.load(tally_ptr + at, at < n_programs, other=0), 0)
    return tl.load(select_ptr + HISTOGRAM + tl.arange(0, BINS)), tl.load(select_ptr + ABOVE), most


@triton.jit
def _costs_of_ranks(messages_ptr, ranks, BINS: tl.constexpr, STRIDE: tl.constexpr):
    """The same of all ranks, from what `_message_kernel` sent on each."""
    bins = tl.arange(0, BINS)
    cost, above, most = tl.zeros((BINS,), tl.int64), tl.load(messages_ptr) * 0, tl.load(messages_ptr) * 0
    for _ in range(ranks):
        above += tl.load(messages_ptr + MOMENTS)
        most = tl.maximum(most, tl.load(messages_ptr + MOMENTS + 1))
        cost += tl.load(messages_ptr + MESSAGE + bins)
        messages_ptr += STRIDE
    return cost, above, most


@triton.jit
def _hard_advance(select_ptr, cost, above, most, capacity, BINS: tl.constexpr):
    """The bin in which the budget runs out becomes the range; a range that misses it gives way to all keys."""
    bins = tl.arange(0, BINS)
    lo, shift = tl.load(select_ptr + LO), tl.load(select_ptr + SHIFT)
    budget, above = tl.load(select_ptr + BUDGET), tl.load(select_ptr + BASE) + above
    from_here = above + tl.sum(cost, 0) - tl.cumsum(cost, 0) + cost
    over = tl.sum((from_here > budget).to(tl.int32), 0)
    chosen = bins == over - 1
    spent = tl.sum(tl.where(chosen, from_here - cost, 0), 0)
    full = (lo == 0) & (shift == FULL_SHIFT)
    missed = (over == 0) | (above > budget)
    finished = (missed == 0) & (shift == 0)
    everything = full & (over == 0)
    next_lo = tl.where(missed, 0, lo + ((over - 1).to(tl.int64) << shift))
    next_last = tl.where(missed, 0xFFFFFFFF, lo + (over.to(tl.int64) << shift) - 1)
    next_shift = tl.where(missed, FULL_SHIFT, tl.maximum(shift - 11, 0))
    # what lies above the next range, whose own entries alone may be counted from now on
    next_above = tl.where(missed, 0, spent)
    collected = (missed == 0) & (most <= capacity)
    tl.debug_barrier()
    tl.store(select_ptr + HISTOGRAM + bins, tl.zeros((BINS,), tl.int64))
    tl.store(select_ptr + ABOVE, 0)
    tl.store(select_ptr + BASE, tl.where(collected, next_above, 0))
    tl.store(select_ptr + LO, next_lo)
    tl.store(select_ptr + LAST, next_last)
    tl.store(select_ptr + SHIFT, next_shift)
    tl.store(select_ptr + ROOM, tl.where(finished, budget - spent, 0))
    tl.store(select_ptr + COLLECTED, collected.to(tl.int64))
    tl.store(select_ptr + EVERYTHING, everything.to(tl.int64))
    tl.store(select_ptr + HARD_DONE, (finished | everything).to(tl.int64))


@triton.jit
def _restart_at_cut(solve_ptr, select_ptr):
    """A search for the soft threshold that is still far off goes on from the hard one, once that is found.

    Where 1 / beta is small beside the entries' spread, the sum has plateaus, and a step there only halves the bracket.
    """
    cut = value_of_key(tl.load(select_ptr + LO).to(tl.uint32)).to(tl.float64)
    low, high = tl.load(solve_ptr + LOW), tl.load(solve_ptr + HIGH)
    far = (tl.load(solve_ptr + SOFT_DONE) == 0.0) & (tl.load(solve_ptr + RESIDUAL) > 0.5)
    found = (tl.load(select_ptr + HARD_DONE) != 0) & (tl.load(select_ptr + EVERYTHING) == 0)
    if far & found & (cut > low) & (cut < high):
        tl.store(solve_ptr + T, cut)
        tl.store(solve_ptr + RESIDUAL, INFINITY)


@triton.jit(noinline=True)
def advance(
    solve_ptr, select_ptr, partial_ptr, tally_ptr, n_programs, capacity,
    SOFT: tl.constexpr, HARD: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    OVER_RANKS: tl.constexpr,
):  # fmt: skip
    """After a survey; one program. OVER_RANKS: what all ranks have sent takes the place of what programs found.

    A function that is called: inlined, its numbers take registers from the survey before it.
    """
    soft_open = SOFT and tl.load(solve_ptr + SOFT_DONE) == 0.0
    hard_open = HARD and tl.load(select_ptr + HARD_DONE) == 0
    if soft_open:
        _soft_advance(solve_ptr, partial_ptr, n_programs, OVER_RANKS, STRIDE, BLOCK)
    elif hard_open:
        if tl.load(select_ptr + COLLECTED) == 0:
            reads = tl.load(solve_ptr + READS)
            tl.debug_barrier()
            tl.store(solve_ptr + READS, reads + 1)
    tl.debug_barrier()
    if hard_open:
        if OVER_RANKS:
            cost, above, most = _costs_of_ranks(tally_ptr, n_programs, BINS, STRIDE)
        else:
            cost, above, most = _costs_found(select_ptr, tally_ptr, n_programs, BINS, BLOCK)
        _hard_advance(select_ptr, cost, above, most, capacity, BINS)
        if OVER_RANKS and SOFT:
            tl.debug_barrier()
            _restart_at_cut(solve_ptr, select_ptr)


@triton.jit
def _trial_chunk(
    values_ptr, costs_ptr, many, number, origin, length, chunk, centre, slope, shift,
    HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, CHUNK: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    start, live = chunk_at(origin, length, chunk, CHUNK, WHOLE)
    u, a, live = load_ratio(values_ptr, costs_ptr, many, number, start, live, HAS_COSTS, ABSOLUTE, CHUNK, WHOLE)
    return chunk_moments(u, a, live, centre, slope, shift, LANES, VECTOR)


@triton.jit(noinline=True)
def finish(
    table_ptr, solve_ptr, partial_ptr, n_chunks, n_programs,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last resort where the masks as written miss the budget: one program alone, as many trials as it takes.

    In float32 the sum is a staircase that can step over the quota: then the nearest trial is the answer.
    """
    at = tl.arange(0, BLOCK)
    written = tl.sum(tl.load(partial_ptr + at * MOMENTS, at < n_programs, other=0.0), 0)
    beta, sign, quota = tl.load(solve_ptr + BETA), tl.load(solve_ptr + SIGN), tl.load(solve_ptr + QUOTA)
    total, target = tl.load(solve_ptr + TOTAL), tl.load(solve_ptr + TARGET)
    lowest, highest = tl.load(solve_ptr + LOWEST), tl.load(solve_ptr + HIGHEST)
    t, low, high = tl.load(solve_ptr + T), tl.load(solve_ptr + LOW), tl.load(solve_ptr + HIGH)
    reads, poison = tl.load(solve_ptr + READS), tl.load(solve_ptr + POISON)
    missed = tl.abs(written - quota) > quota * TOLERANCE
    pending = missed & (quota * beta > 0.0) & (poison == 0.0)
    tl.debug_barrier()
    tl.store(solve_ptr + REWRITE, pending.to(tl.float64))
    residual = quota * 0.0 + INFINITY
    best_miss = residual
    best_centre, best_shift = logit_at(t, beta, lowest, highest)
    anchor = best_centre
    fine, finer = pending != pending, pending != pending
    trial = 0
    while (trial < MAX_TRIALS) & pending:
        if finer:
            anchor, low, high = finer_bracket(low, high, lowest, highest, -sign * target / beta, beta)
            t = low + (high - low) / 2
            residual = quota * 0.0 + INFINITY
            fine = fine | finer
        centre, shift = fine_logit(t, anchor, fine, beta, lowest, highest)
        logit_slope = (-sign * beta * LOG2_E).to(tl.float32)
        offset = (-sign * shift * LOG2_E).to(tl.float32)
        mass = tl.zeros((LANES,), tl.float64)
        slope, third = mass, mass
        row = tl.program_id(0).to(tl.int64) * 0
        begin, end = n_chunks * 0, n_chunks
        while begin < end:
            row_ptr, begin, stop, whole, length, origin = chunks_of(table_ptr, row, begin, end, CHUNK)
            values_ptr = pointer_at(row_ptr + VALUES, DTYPE, ALIGNED)
            costs_ptr, many, number = costs_at(row_ptr, DTYPE, HAS_COSTS, ALIGNED)
            for chunk in range(begin, whole):
                m0, m1, m2 = _trial_chunk(
                    values_ptr, costs_ptr, many, number, origin, length, chunk, centre, logit_slope, offset,
                    HAS_COSTS, ABSOLUTE, CHUNK, LANES, VECTOR, True,
                )  # fmt: skip
                mass += m0
                slope += m1
                third += m2
            if whole < stop:
                m0, m1, m2 = _trial_chunk(
                    values_ptr, costs_ptr, many, number, origin, length, whole, centre, logit_slope, offset,
                    HAS_COSTS, ABSOLUTE, CHUNK, LANES, VECTOR, False,
                )  # fmt: skip
                mass += m0
                slope += m1
                third += m2
            begin = stop
            row += 1
        sum_mass = tl.sum(mass, 0)
        miss = tl.abs(sum_mass - quota)
        nearer = miss < best_miss
        best_centre, best_shift = tl.where(nearer, centre, best_centre), tl.where(nearer, shift, best_shift)
        best_miss = tl.minimum(miss, best_miss)
        tried = t
        t, low, high, residual, stuck = halley_step(
            t, low, high, residual, sum_mass, tl.sum(slope, 0), tl.sum(slope - 2 * third, 0), beta, sign, quota, total,
            target,
        )  # fmt: skip
        pending, finer = search_ends(miss > quota * (TOLERANCE / 4), stuck, tried, low, high, beta, fine)
        trial += 1
    if trial > 0:
        tl.store(solve_ptr + T, best_centre.to(tl.float64))
        tl.store(solve_ptr + REST, -best_shift / beta)
        tl.store(solve_ptr + READS, reads + 1 + trial)
        tl.store(solve_ptr + REWRITE, quota * 0.0 + trial)


@triton.jit(noinline=True)
def remember(state_ptr, threshold_ptr, solve_ptr, select_ptr, HAS_STATE: tl.constexpr):
    """The solution (c, d) and the state for the next solve; one program."""
    t, beta, quota = tl.load(solve_ptr + T), tl.load(solve_ptr + BETA), tl.load(solve_ptr + QUOTA)
    constant = quota * beta <= 0.0
    if HAS_STATE:
        solves, hard, width = tl.load(state_ptr + 4), tl.load(state_ptr + 2), tl.load(state_ptr + 5)
        expected = _expected_hard(state_ptr)
        cut = value_of_key(tl.load(select_ptr + LO).to(tl.uint32)).to(tl.float64)
        known = (tl.load(select_ptr + EVERYTHING) == 0) & (tl.abs(cut) < INFINITY)
        found = tl.where(known, cut, hard)
        soft = tl.load(state_ptr)
        # as wide as the last surprise asks for, narrowing slowly when there is none
        wanted = tl.where(solves >= 1, tl.maximum(4 * tl.abs(found - expected), 0.7 * width), 0.01 * tl.abs(found))
        tl.debug_barrier()
        tl.store(state_ptr, tl.where(constant, found, t + tl.load(solve_ptr + REST)))
        tl.store(state_ptr + 1, soft)
        tl.store(state_ptr + 2, found)
        tl.store(state_ptr + 3, hard)
        tl.store(state_ptr + 4, solves + 1)
        tl.store(state_ptr + 5, tl.maximum(wanted, 1e-5 * tl.abs(found)))
    centre, shift = logit_at(t, beta, tl.load(solve_ptr + LOWEST), tl.load(solve_ptr + HIGHEST))
    shift -= beta * tl.load(solve_ptr + REST)
    tl.store(threshold_ptr, tl.where(constant, 0.0, centre.to(tl.float64)))
    shift = tl.where(constant, tl.load(solve_ptr + SIGN) * tl.load(solve_ptr + TARGET), shift)
    tl.store(threshold_ptr + 1, shift + tl.load(solve_ptr + POISON))
