"""Device functions that the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels import arguments

INFINITY = tl.constexpr(float("inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
BUDGET_ROUNDING = tl.constexpr(arguments.BUDGET_ROUNDING)
BUDGET_SLACK = tl.constexpr(arguments.BUDGET_SLACK)
# The first words of what a search in float64 keeps.
T = tl.constexpr(0)
LOW = tl.constexpr(1)
HIGH = tl.constexpr(2)
RESIDUAL = tl.constexpr(3)
SIGN = tl.constexpr(4)
QUOTA = tl.constexpr(5)
TARGET = tl.constexpr(6)
TOTAL = tl.constexpr(7)
_SMALLEST_BETA = tl.constexpr(1.2e-38)  # that float32 holds in full
_MOST_THREADS = tl.constexpr(512)  # eight warps, of 64 threads on AMD


@triton.jit
def all_loaded(ENTRIES: tl.constexpr):
    """What stands between the load and the store of a tile that is changed in place.

    A tile with fewer entries than the program has threads lies in several of its warps. All of them load it and one
    stores it: without a barrier a late warp would load what is changed already. In any other tile an entry has one
    thread, whose store waits for its own load.
    """
    if ENTRIES < _MOST_THREADS:
        tl.debug_barrier()


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a b, as the products multiply."""
    if PRECISION == "widened":  # the interpreter multiplies the bits of bfloat16 and float8, not their numbers
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    elif PRECISION == "promoted":  # 8 bits, which cores before Blackwell's add in fewer bits than float32
        sums += tl.dot(a, b, max_num_imprecise_acc=a.shape[1])
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def reciprocal(x):
    """1 / x of a positive number to some 3 units in the last place; a division also minds numbers near the largest."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def binary_logistic(x):
    """sigmoid(x ln 2) and sigmoid(-x ln 2): neither cancels, both are exact at infinity; 2^x is one instruction."""
    z = tl.exp2(-tl.abs(x))
    near_one = reciprocal(1.0 + z)
    near_one += near_one * (1.0 - near_one * (1.0 + z))
    near_zero = z * near_one
    return tl.where(x >= 0, near_one, near_zero), tl.where(x >= 0, near_zero, near_one)


@triton.jit
def moments_of(u, a, live, centre, slope, shift):
    """a m, a s and a s m of entries, m on the smaller side of the budget; 0 where there is none."""
    # below this limit z does not overflow, and what is left out of a sum is lost in its rounding
    z = tl.exp2(tl.minimum(slope * (u - centre) + shift, 122.0, propagate_nan=tl.PropagateNan.ALL))
    m = reciprocal(1.0 + z)
    mass = tl.where(live, a * m, 0.0)
    s = mass * (z * m)
    return mass, s, s * m


@triton.jit
def sign_of(x):
    """-1, 0 or 1."""
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def ordered_key(u):
    """uint32 keys in the order of the float32 numbers; -0 and 0 are one key."""
    bits = tl.where(u == 0.0, 0.0, u).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def value_of_key(key):
    """The float32 number of an `ordered_key`."""
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def limits_of_keys(first, last):
    """The float32 numbers of the first and the last key of a range, infinite where the keys are no numbers."""
    low = tl.where(first < 0x00800000, -INFINITY, value_of_key(first))
    high = tl.where(last > 0xFF7FFFFF, INFINITY, value_of_key(last))
    return low, high


@triton.jit
def load_beta(beta_ptr):
    """Sharpness in float64; 0 where it would be in float32."""
    beta = tl.load(beta_ptr).to(tl.float64)
    return tl.where(beta < _SMALLEST_BETA, 0.0, beta)


@triton.jit
def clamped_budget(budget, total):
    """The budget in [0, total]; a rounding short of everything is everything."""
    return tl.where(budget >= total * (1 - BUDGET_ROUNDING), total, tl.maximum(budget, 0.0))


@triton.jit
def overdrawn(budget, total):
    """NaN where the budget is above the cost of what is not masked by more than rounding, else 0."""
    return tl.where(budget > total * (1 + BUDGET_SLACK), float("nan"), budget * 0.0)


@triton.jit
def smaller_side(budget, total):
    """(sign, quota, target): the smaller of kept and dropped cost, whose sum is searched for, and its logit."""
    keep = budget <= total / 2
    quota = tl.where(keep, budget, total - budget)
    return tl.where(keep, 1.0, -1.0).to(tl.float64), quota, tl.log(quota / (total - quota))


@triton.jit
def first_threshold(mean, variance, beta, sign, target, low, high):
    """Start as if the entries were logistic with this mean and spread, inside the rigorous bracket [low, high]."""
    # pi^2 / 3 is the variance of the logistic distribution
    scale = tl.sqrt(tl.maximum(variance, 0.0) / 3.289868133696453 + 1.0 / (beta * beta))
    t = mean - sign * target * scale
    return tl.where((t > low) & (t < high), t, low + (high - low) / 2)


@triton.jit
def logit_at(t, beta, lowest, highest):
    """(centre, shift) with beta (u - centre) + shift = beta (u - t): float32 loses nothing near the threshold.

    Outside of the entries, lowest to highest, a centre would cost all the differences their last bits.
    """
    centre = tl.minimum(tl.maximum(t, lowest), highest).to(tl.float32)
    return centre, beta * (centre.to(tl.float64) - t)


@triton.jit
def halley_step(t, low, high, previous, mass, slope, curvature, beta, sign, quota, total, target):
    """One safeguarded Halley step on logit(mass / total) = target, from the moments of the smaller side at t.

    Returns the next t, the bracket, |f| here (infinite after a bisection) and whether the bracket is exhausted.
    """
    rest = tl.maximum(total - mass, 0.0)
    f = tl.log(mass / rest) - target
    residual = tl.abs(f)
    low = tl.where(sign * f > 0, tl.maximum(low, t), low)
    high = tl.where(sign * f < 0, tl.minimum(high, t), high)
    first = -sign * beta * slope
    weight = total / (mass * rest)
    derivative = first * weight
    bend = beta * beta * curvature * weight - first * first * weight * weight * (rest - mass) / total
    ahead = t - 2 * f * derivative / (2 * derivative * derivative - f * bend)
    middle = low + (high - low) / 2
    # the residual must halve or the bracket does; comparisons with NaN are false
    good = (ahead > low) & (ahead < high) & ((previous == INFINITY) | (residual <= previous / 2))
    # the first trial may have been outside of the bracket: its middle is tried in any case
    stuck = ((middle == low) | (middle == high)) & (t == middle)
    return tl.where(good, ahead, middle), low, high, tl.where(good, residual, INFINITY), (good == 0) & stuck


@triton.jit
def _of_threads(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.reshape(x, [x.shape[0] // (LANES * VECTOR), LANES, VECTOR])


@triton.jit
def lane_sum(x, LANES: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """Sums of x [n] by thread, [LANES] in the dtype WIDE: entries that one thread loads, so nothing crosses threads."""
    return tl.sum(tl.sum(_of_threads(x, LANES, VECTOR), 2), 0).to(WIDE)


@triton.jit
def lane_min(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Minima of x [n] by thread, [LANES]."""
    return tl.min(tl.min(_of_threads(x, LANES, VECTOR), 2), 0)


@triton.jit
def lane_max(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Maxima of x [n] by thread, [LANES]."""
    return tl.max(tl.max(_of_threads(x, LANES, VECTOR), 2), 0)
