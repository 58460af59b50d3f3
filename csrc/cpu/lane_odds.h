// The soft threshold of short rows of equal costs, without an exponential in the trials. For the *_rows passes only.
//
// With e_i = exp(-beta (u_i - c)), formed once about a centre c near the solution, m_i = 1 / (1 + w e_i), and one number w
// a row is left to find: a trial is a product and a reciprocal for each entry. Where w leaves the range that keeps w e_i
// finite, or a few trials are not enough, the row is left to the search that moves its centre.
#pragma once

#include "lane_math.h"

namespace spartan::cpu::SPARTAN_ISA {

constexpr float kMostShift = 16.0f;         // of |log w|
constexpr float kLargestPower = 0x1p100f;   // of e_i: times w it stays finite
constexpr float kLongestStep = 6.0f;        // of log w in one trial
constexpr float kOrderly = 2.0f;            // few entries sharper than this, in logits per deviation, start from their order
constexpr float kSharpest = 0.75f;          // logits per deviation and entry beyond which the moments are no start
constexpr int kLongestPlainSum = 8;         // entries, whose sum in float is right to the tolerance
constexpr int kMostEvaluations = 6;

inline V reciprocal(V v) {
#if defined(__AVX512F__)
  const V r = (V)_mm512_rcp14_ps((__m512)v);
  return r + r * (1.0f - v * r);
#else
  return 1.0f / v;
#endif
}

template <int N>
class LaneOdds {
 public:
  LaneOdds(const LaneProblem& problem, const LaneBudget& budget, int n, float beta)
      : u_(problem.u), n_(N > 0 ? N : n), budget_(budget), beta_(beta) {
    const Spread spread = spread_of(problem, length());
    open_ = problem.fine & spread.finite & (budget.quota > 0.0f);
    if (N == 0) open_ &= spread.deviation * beta < kSharpest * static_cast<float>(n);
    start(spread);
  }

  // Forms e_i where the masks will be.
  void prepare(V* e) const {
    const V slope = (-kLog2E * beta_) * budget_.sign;
    for (int j = 0; j < length(); ++j) e[j] = smaller(exp2_clamped(slope * (u_[j] - centre_)), splat(kLargestPower));
  }

  bool searching() const { return bits(open_ & ~done_) != 0; }

  // The sums at w, and one step of Halley's method in log w, on the difference of the logits of mass and quota. That
  // difference is taken as 2 (r - 1) / (r + 1) for log r: alike to third order, as the step itself.
  void trial(const V* e) {
    LaneSum mass;
    V slope{}, curvature{};
    for (int j = 0; j < length(); ++j) {
      const V odds = e[j] * w_, m = reciprocal(1.0f + odds), complement = odds * m, s = m * complement;
      if (N > 0 && N <= kLongestPlainSum) mass.value += m;
      else mass.add(m);
      slope += s;
      curvature += s * (complement - m);
    }
    const V total = budget_.total, quota = budget_.quota;
    const V miss = (mass.value - quota) + mass.dropped, sum = mass.value + mass.dropped, rest = total - sum;
    done_ |= absolute(miss) <= kTolerance * quota;
    const V f = 2.0f * total * miss / (sum * budget_.other + quota * rest);
    const V weight = total / (sum * rest), first = slope * weight, square = first * first;
    const V second = curvature * weight - square * (rest - sum) / total;
    const V step = 2.0f * f * first / larger(2.0f * square - f * second, 0.6f * square);
    const V bounded = larger(smaller(step, splat(kLongestStep)), splat(-kLongestStep));
    const V next = w_ * exp2_clamped(kLog2E * bounded);
    w_ = choose(done_, w_, larger(smaller(next, splat(kLargestFactor)), splat(1.0f / kLargestFactor)));
  }

  // Turns e_i into the masks of the lanes that it returns; those of others are undefined.
  I finish(V* e) const {
    const I kept_side = budget_.sign > 0.0f;
    for (int j = 0; j < length(); ++j) {
      const V odds = e[j] * w_, m = reciprocal(1.0f + odds);
      e[j] = smaller(choose(kept_side, m, odds * m), splat(1.0f));  // the reciprocal may end an ulp above 1
    }
    return done_ & open_;
  }

  V centre() const { return centre_; }
  V shift() const { return -budget_.sign * log_of(w_, w_ - 1.0f); }

 private:
  int length() const { return N > 0 ? N : n_; }

  void start(const Spread& spread) {
    V t = budget_.logistic_start(spread, beta_);
    if constexpr (N > 0) {
      const I orderly = spread.deviation * beta_ > kOrderly;
      if (bits(orderly) != 0) t = choose(orderly, order_start(), t);
    }
    centre_ = larger(smaller(t, spread.high), spread.low);
    const V shift = budget_.sign * beta_ * (t - centre_);
    w_ = exp2_clamped(kLog2E * larger(smaller(shift, splat(kMostShift)), splat(-kMostShift)));
  }

  // Between the last entry that the budget pays and the next, or about the entry that it pays in part.
  V order_start() const {
    V s[N > 0 ? N : 1];
    for (int j = 0; j < N; ++j) s[j] = u_[j];
    for (int round = 0; round < N; ++round)  // odd-even transposition, downwards
      for (int j = round % 2; j + 1 < N; j += 2) {
        const V a = s[j], b = s[j + 1];
        s[j] = larger(a, b);
        s[j + 1] = smaller(a, b);
      }
    const V kept = choose(budget_.sign > 0.0f, budget_.quota, budget_.other);
    const I whole = __builtin_convertvector(kept, I);
    const V part = kept - __builtin_convertvector(whole, V), odds = part / (1.0f - part);
    V before = s[0], at = s[N - 1], after = s[N - 1];
    for (int j = 0; j < N; ++j) {
      before = choose(whole == j + 1, s[j], before);
      at = choose(whole == j, s[j], at);
      after = choose(whole == j - 1, s[j], after);
    }
    const V about = at - log_of(odds, odds - 1.0f) * (1.0f / beta_);
    return choose(part > 0.0f, larger(smaller(about, before), after), 0.5f * (before + at));
  }

  static constexpr float kLargestFactor = 0x1p24f;

  const V* u_;
  int n_;
  const LaneBudget& budget_;
  float beta_;
  I open_, done_{};
  V centre_, w_;
};

}  // namespace spartan::cpu::SPARTAN_ISA
