"""The soft threshold of rows in registers, in float32 and without an exponential in the trials.

With e = exp(-sign beta (u - c)), formed once about a centre c near the threshold, m = 1 / (1 + w e) on the smaller side
of the budget, and one number w is left to find for each row. It carries its digits whatever its size, where a shift of
the logit would lose those below its own last place. A trial takes seven instructions for an entry: the sums of m, m^2
and m^3 give Halley's step. What a first round of trials leaves goes through more of them about better centres, and what
those leave is for the search in float64.

Thresholds here are those of the row times the sign: the sum falls as they rise, whichever side is the smaller one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.primitives import (
    BUDGET_ROUNDING,
    BUDGET_SLACK,
    INFINITY,
    LN_2,
    LOG2_E,
    reciprocal,
)

# |M - q| / q that ends a search, about the rounding of a logit near 10, and of a sum over a row.
TOLERANCE = tl.constexpr(4e-7)
TRIALS = tl.constexpr(3)  # about one centre
MAX_ROUNDS = tl.constexpr(6)
FRAME = tl.constexpr(16777216.0)  # the largest w and 1 / w: beyond, 16.6 logits from c, e has lost digits
_OVER_LOGISTIC = tl.constexpr(0.30396355092701331)  # 3 / pi^2: one over the variance of the logistic distribution


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_range(u):
    """Smallest and largest of the live entries of each row; 0 and -inf where none is. A largest of NaN shows a NaN."""
    lowest = tl.min(tl.where(u == -INFINITY, INFINITY, u), 1)
    return tl.where(lowest == INFINITY, 0.0, lowest), tl.reduce(u, 1, _larger)


@triton.jit
def sides_of(budget, total):
    """Sign, quota and rest in float32, the smaller and the larger of kept and dropped cost, and the budget's poison.

    That is NaN where the budget is, or is more than there is. A rounding short of everything is everything.
    """
    dropped, kept, all_of_it = (total - budget).to(tl.float32), budget.to(tl.float32), total.to(tl.float32)
    poison = tl.where(dropped < all_of_it * -BUDGET_SLACK, float("nan"), kept * 0.0)
    keep = kept <= dropped
    quota = tl.where(keep, tl.maximum(kept, 0.0), tl.where(dropped > all_of_it * BUDGET_ROUNDING, dropped, 0.0))
    return tl.where(keep, 1.0, -1.0), quota, tl.where(keep, dropped, kept), poison


@triton.jit
def _rough_log(x, y):
    """log(x / y) of positive numbers to 0.06, from their exponents and as if mantissas were logarithms."""
    return (x.to(tl.int32, bitcast=True) - y.to(tl.int32, bitcast=True)).to(tl.float32) * (LN_2 / (1 << 23))


@triton.jit
def _extremes(lowest, highest, sign):
    """Of the values times the sign."""
    return tl.where(sign > 0, lowest, -highest), tl.where(sign > 0, highest, -lowest)


@triton.jit
def moment_start(u, lowest, highest, sign, quota, rest, per_beta):
    """Where the threshold is if the entries are logistic with this mean and spread."""
    away = u - highest[:, None]
    live = away != -INFINITY
    per_count = reciprocal(tl.maximum(tl.sum(live.to(tl.float32), 1), 1.0))
    away = tl.where(live, away, 0.0)
    mean = tl.sum(away, 1) * per_count
    variance = tl.maximum(tl.sum(away * away, 1) * per_count - mean * mean, 0.0) * _OVER_LOGISTIC + per_beta * per_beta
    logit = _rough_log(quota, rest)
    t = sign * (highest + mean) - logit * (variance * tl.rsqrt(variance))
    smallest, largest = _extremes(lowest, highest, sign)
    return tl.minimum(tl.maximum(t, smallest - logit * per_beta), largest - logit * per_beta)


@triton.jit
def order_start(u, lowest, sign, quota, per_beta):
    """Of rows of 4 without costs: between the last entry taken and the next, or about the one that is taken in part.

    The smaller side takes no more than two.
    """
    v = sign[:, None] * u
    even, odd = tl.split(tl.reshape(v, [v.shape[0], 2, 2]))
    high_0, high_1 = tl.split(tl.maximum(even, odd))
    low_0, low_1 = tl.split(tl.minimum(even, odd))
    first, other = tl.maximum(high_0, high_1), tl.minimum(high_0, high_1)
    inner = tl.maximum(low_0, low_1)
    second, third = tl.maximum(other, inner), tl.minimum(other, inner)
    whole = tl.floor(quota)
    part = quota - whole
    before = tl.where(whole == 0.0, INFINITY, tl.where(whole == 1.0, first, second))
    at = tl.where(whole == 0.0, first, tl.where(whole == 1.0, second, third))
    after = tl.where(whole == 0.0, second, third)
    about = at - _rough_log(part, 1.0 - part) * per_beta
    t = tl.where(part > 0.0, tl.maximum(tl.minimum(about, before), after), 0.5 * (before + at))
    return tl.where(tl.abs(t) < INFINITY, t, sign * lowest)


@triton.jit
def _odds_about(u, centre, slope):
    """e of each entry; what is masked is on neither side."""
    away = u - centre[:, None]
    return tl.where(away == -INFINITY, INFINITY, tl.exp2(slope[:, None] * away))


@triton.jit
def _halley(e, a, w, quota, rest):
    """What the sum exceeds the quota by, and Halley's next w, on the difference of the logits of the two.

    That difference is taken as 2 (r - 1) / (r + 1) for log r: alike to third order, as the step itself.
    """
    m = reciprocal(1.0 + e * w[:, None])
    square = m * m
    mass, second, third = tl.sum(a * m, 1), tl.sum(a * square, 1), tl.sum(a * (square * m), 1)
    miss = mass - quota
    left = rest - miss  # of the total
    slope, bend = mass - second, mass - 3.0 * second + 2.0 * third
    spread, steep = mass * left, slope * slope
    scaled = steep * (mass * rest + quota * left)
    below = scaled - miss * (bend * spread - steep * (left - mass))
    step = (2.0 * LOG2_E) * miss * (slope * spread) * reciprocal(tl.maximum(below, 0.3 * scaled))
    return miss, step


@triton.jit
def first_round(u, a, t, lowest, highest, left, beta, sign, quota, rest):
    """Two steps from a start t, each taken as it comes, and a look at the sum: the centre, w, and the rows left."""
    centre = tl.minimum(tl.maximum(sign * t, lowest), highest)
    to_power = beta * LOG2_E
    w = tl.exp2((t - sign * centre) * to_power)
    e = _odds_about(u, centre, -sign * to_power)
    for _ in tl.static_range(TRIALS - 1):
        miss, step = _halley(e, a, w, quota, rest)
        left = left & (tl.abs(miss) > quota * TOLERANCE)
        # of NaN, too, comes a number
        w = tl.where(left, tl.maximum(tl.minimum(w * tl.exp2(step), FRAME), 1.0 / FRAME), w)
    mass = tl.sum(a * reciprocal(1.0 + e * w[:, None]), 1)
    return centre, w, left & (tl.abs(mass - quota) > quota * TOLERANCE)


@triton.jit
def more_rounds(u, a, centre, w, lowest, highest, left, beta, sign, quota, rest, per_beta):
    """Rounds about where the one before ended, in the bracket that the trials have found: (centre, w, rows left)."""
    to_power, to_ratio = beta * LOG2_E, LN_2 * per_beta
    edge = tl.log2(quota / rest) * to_ratio
    smallest, largest = _extremes(lowest, highest, sign)
    low, high = smallest - edge, largest - edge
    t = tl.minimum(tl.maximum(sign * centre + tl.log2(w) * to_ratio, low), high)
    rounds = 1
    pending = 1
    while (rounds < MAX_ROUNDS) & (pending > 0):
        t = tl.where((t >= low) & (t <= high), t, low + (high - low) * 0.5)
        moved = tl.minimum(tl.maximum(sign * t, lowest), highest)
        centre = tl.where(left, moved, centre)
        near = sign * moved
        w = tl.where(left, tl.exp2((t - near) * to_power), w)
        e = _odds_about(u, centre, -sign * to_power)
        above, below = tl.full(w.shape, 1.0 / FRAME, tl.float32), tl.full(w.shape, FRAME, tl.float32)
        carry = tl.zeros_like(w)
        for _ in range(TRIALS):  # not unrolled: few rows come here, and registers are short
            miss, step = _halley(e, a, w, quota, rest)
            left = left & (tl.abs(miss) > quota * TOLERANCE)
            above, below = tl.where(miss > 0.0, w, above), tl.where(miss > 0.0, below, w)
            ahead, between = w * tl.exp2(step), above * below
            # a step beyond the frame waits for the next centre; comparisons with NaN are false
            leaves = ((ahead >= below) & (below >= FRAME)) | ((ahead <= above) & (above <= 1.0 / FRAME))
            carry = tl.where(leaves, step, 0.0)
            middle = tl.where(leaves, w, between * tl.rsqrt(between))
            w = tl.where(left, tl.where((ahead > above) & (ahead < below), ahead, middle), w)
        low = tl.where(above > 1.0 / FRAME, tl.maximum(low, near + tl.log2(above) * to_ratio), low)
        high = tl.where(below < FRAME, tl.minimum(high, near + tl.log2(below) * to_ratio), high)
        t = near + (tl.log2(w) + carry) * to_ratio
        rounds += 1
        pending = tl.max(left.to(tl.int32), 0)
    return centre, w, left
