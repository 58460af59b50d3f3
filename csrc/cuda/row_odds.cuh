// The soft threshold of rows in float32, without an exponential in the trials.
//
// With e = exp(-sign beta (u - c)), formed once about a centre c near the threshold, m = 1 / (1 + w e) on the smaller side of
// the budget, and one number w is left to find for each row. It carries its digits whatever its size, where a shift of the
// logit would lose those below its own last place. The sums of m, m^2 and m^3 give Halley's step. What a first round of
// trials leaves goes through more of them about better centres; what those leave is for the search in float64.
//
// Thresholds here are those of the row times the sign: the sum falls as they rise, whichever side is the smaller one.
#pragma once

#include "rows.cuh"
#include "sigmoid.cuh"

namespace spartan::cuda {

constexpr float kOddsTolerance = 4e-7f;  // on |M - q| / q: the rounding of a logit near 10, and of a sum over a row
constexpr int kOddsTrials = 3;           // about one centre
constexpr int kOddsRounds = 6;
constexpr float kFrame = 16777216.0f;    // the largest w and 1 / w: beyond, 16.6 logits from c, e has lost digits
constexpr float kMostOdds = 1e37f;       // of an entry that is there: one that is not has infinite odds

// A row's budget: sign, quota and rest, the smaller and the larger of kept and dropped cost. NaN is no budget.
struct Side {
  float sign, quota, rest, beta, per_beta, low, high;  // low and high: of the ratios that are not masked

  __device__ Side(double budget, double total, double sharpness) : low(0.0f), high(0.0f) {
    const float dropped = static_cast<float>(total - budget), kept = static_cast<float>(budget);
    const float all = static_cast<float>(total);
    const bool keep = kept <= dropped;
    sign = keep ? 1.0f : -1.0f;
    quota = keep ? (kept > 0.0f ? kept : 0.0f) : dropped > all * kRounding ? dropped : 0.0f;
    rest = keep ? dropped : kept;
    if (!(kept == kept) || dropped < all * -kSlack) quota = NAN;
    if (!(sharpness >= 0.0 && sharpness < INFINITY)) quota = NAN;
    beta = static_cast<float>(sharpness);
    per_beta = fast_reciprocal(beta);
  }
  __device__ bool usable() const { return quota == quota; }
  __device__ bool searched() const { return quota > 0.0f && beta >= kSmallestBeta; }
  __device__ float smallest() const { return sign > 0.0f ? low : -high; }
  __device__ float largest() const { return sign > 0.0f ? high : -low; }

 private:
  static constexpr float kSlack = 1e-6f, kRounding = 1e-12f;  // as in usable_budget
  static constexpr float kSmallestBeta = 1.2e-38f;            // that float32 holds in full
};

// log2 e = slope (u - centre) + offset
struct Odds {
  float slope, centre, offset;

  __device__ float of(float u) const {
    const float e = fast_exp2(fmaf(slope, u - centre, offset));
    return masked(u) ? INFINITY : e > kMostOdds ? kMostOdds : e;
  }
};

// Sums of a m, a m^2 and a m^3 of each row, in float32 in two steps.
template <int kGroup, class R, class Cost>
__device__ inline void odds_moments(R& row, float w, Cost cost, float (&sums)[3]) {
  float mass = 0.0f, second = 0.0f, third = 0.0f;
  sums[0] = sums[1] = sums[2] = 0.0f;
  row.each(
      [&](int64_t i, int, float e) {
        const float m = fast_reciprocal(fmaf(e, w, 1.0f)), am = cost(i) * m, square = am * m;
        mass += am, second += square, third = fmaf(square, m, third);
      },
      [&] {
        sums[0] += mass, sums[1] += second, sums[2] += third;
        mass = second = third = 0.0f;
      });
  group_sums<kGroup>(sums);
}

// What the sum exceeds the quota by, and by how much Halley's next w is larger, as a power of two.
//
// The step is on the difference of the logits of sum and quota, taken as 2 (r - 1) / (r + 1) for log r: alike to third
// order, as the step itself.
__device__ inline float halley(const float (&sums)[3], const Side& side, float* miss) {
  const float mass = sums[0], second = sums[1], third = sums[2];
  *miss = mass - side.quota;
  const float left = side.rest - *miss;  // of the total
  const float slope = mass - second, bend = mass - 3.0f * second + 2.0f * third;
  const float spread = mass * left, steep = slope * slope;
  const float scaled = steep * (mass * side.rest + side.quota * left);
  const float below = scaled - *miss * (bend * spread - steep * (left - mass));
  return 2.0f * kLog2E * *miss * (slope * spread) * fast_reciprocal(fmaxf(below, 0.3f * scaled));
}

__device__ inline float within(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

// Where the threshold is if the entries are logistic with this mean and spread, both measured from the largest ratio.
__device__ inline float moment_start(const Side& side, float count, float sum, float squares) {
  constexpr float kOverLogistic = 0.30396355092701331f;  // 3 / pi^2: one over the variance of the logistic distribution
  const float per_count = fast_reciprocal(fmaxf(count, 1.0f)), mean = sum * per_count;
  const float spread = fmaxf(squares * per_count - mean * mean, 0.0f) * kOverLogistic + side.per_beta * side.per_beta;
  const float logit = rough_log(side.quota, side.rest), edge = logit * side.per_beta;
  return within(side.sign * (side.high + mean) - logit * sqrtf(spread), side.smallest() - edge, side.largest() - edge);
}

// Of four ratios that cost the same: between the last entry taken and the next, or about the one that is taken in part.
// The smaller side takes no more than two.
__device__ inline float order_start(const Side& side, const float (&u)[4]) {
  const auto signed_ratio = [&](float x) { return masked(x) ? -INFINITY : side.sign * x; };  // masked ones come last
  const float v0 = signed_ratio(u[0]), v1 = signed_ratio(u[1]), v2 = signed_ratio(u[2]), v3 = signed_ratio(u[3]);
  const float high0 = fmaxf(v0, v1), high1 = fmaxf(v2, v3), low0 = fminf(v0, v1), low1 = fminf(v2, v3);
  const float first = fmaxf(high0, high1), other = fminf(high0, high1), inner = fmaxf(low0, low1);
  const float second = fmaxf(other, inner), third = fminf(other, inner);
  const float whole = floorf(side.quota), part = side.quota - whole;
  const float before = whole == 0.0f ? INFINITY : whole == 1.0f ? first : second;
  const float at = whole == 0.0f ? first : whole == 1.0f ? second : third, after = whole == 0.0f ? second : third;
  const float about = at - rough_log(part, 1.0f - part) * side.per_beta;
  const float t = part > 0.0f ? fmaxf(fminf(about, before), after) : 0.5f * (before + at);
  return fabsf(t) < INFINITY ? t : side.sign * side.low;
}

// A search for w: the centre in the data that is nearest to a threshold t, and what each round of trials leaves of it.
template <int kGroup, class R, class Cost>
struct OddsSearch {
  R& row;
  const Side& side;
  Cost cost;
  float centre, w;
  bool left;  // not solved

  __device__ OddsSearch(R& row_, const Side& side_, Cost cost_)
      : row(row_), side(side_), cost(cost_), centre(0.0f), w(1.0f), left(true) {}

  __device__ Odds about(float t) {
    centre = within(side.sign * t, side.low, side.high);
    w = fast_exp2((t - side.sign * centre) * (side.beta * kLog2E));
    return {-side.sign * side.beta * kLog2E, centre, 0.0f};
  }

  // Two steps from a start t, each taken as it comes, and a look at the sum.
  __device__ void first_round(float t) {
    const Odds odds = about(t);
    row.each([&](int64_t, int, float& x) { x = odds.of(x); }, [] {});
    float sums[3], miss;
#pragma unroll 1
    for (int trial = 1; trial < kOddsTrials && left; ++trial) {
      odds_moments<kGroup>(row, w, cost, sums);
      const float step = halley(sums, side, &miss);
      left = !(fabsf(miss) <= side.quota * kOddsTolerance);
      if (left) w = within(w * fast_exp2(step), 1.0f / kFrame, kFrame);  // of NaN, too, comes a number
    }
    if (!left) return;
    float mass[1] = {0.0f}, some = 0.0f;
    row.each([&](int64_t i, int, float e) { some += cost(i) * fast_reciprocal(fmaf(e, w, 1.0f)); },
             [&] { mass[0] += some, some = 0.0f; });
    group_sums<kGroup>(mass);
    left = !(fabsf(mass[0] - side.quota) <= side.quota * kOddsTolerance);
  }

  // Rounds about where the one before ended, in the bracket that the trials have found.
  __device__ void more_rounds() {
    const float to_ratio = kLn2 * side.per_beta, edge = log2f(side.quota / side.rest) * to_ratio;
    float low = side.smallest() - edge, high = side.largest() - edge;
    float t = within(side.sign * centre + log2f(w) * to_ratio, low, high);
    for (int round = 1; round < kOddsRounds && left; ++round) {
      if (!(t >= low && t <= high)) t = low + (high - low) * 0.5f;
      const Odds odds = about(t);
      const float near = side.sign * centre;
      row.each([&](int64_t i, int, float& x) { x = odds.of(row.ratio(i)); }, [] {});
      float above = 1.0f / kFrame, below = kFrame, carry = 0.0f;
#pragma unroll 1
      for (int trial = 0; trial < kOddsTrials && left; ++trial) {
        float sums[3], miss;
        odds_moments<kGroup>(row, w, cost, sums);
        const float step = halley(sums, side, &miss);
        left = !(fabsf(miss) <= side.quota * kOddsTolerance);
        if (!left) return;
        (miss > 0.0f ? above : below) = w;
        const float ahead = w * fast_exp2(step);
        // a step beyond the frame waits for the next centre; comparisons with NaN are false
        const bool leaves = (ahead >= below && below >= kFrame) || (ahead <= above && above <= 1.0f / kFrame);
        carry = leaves ? step : 0.0f;
        if (ahead > above && ahead < below) w = ahead;
        else if (!leaves) w = sqrtf(above * below);
      }
      if (above > 1.0f / kFrame) low = fmaxf(low, near + log2f(above) * to_ratio);
      if (below < kFrame) high = fminf(high, near + log2f(below) * to_ratio);
      t = near + (log2f(w) + carry) * to_ratio;
    }
  }
};

// The mask of an entry, from its odds times w on the smaller side.
__device__ inline float mask_of_odds(float e, float w, bool keeps) {
  const float odds = e * w, most = odds >= kMostOdds ? kMostOdds : odds, m = reciprocal(1.0f + most);
  const float kept = odds == INFINITY ? 0.0f : m, dropped = most * m;
  return keeps ? kept : odds >= kMostOdds || dropped > 1.0f ? 1.0f : dropped;
}

}  // namespace spartan::cuda
