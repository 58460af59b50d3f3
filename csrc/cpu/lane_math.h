// What the searches for the soft thresholds of lanes share. For the *_rows passes only, as simd.h.
#pragma once

#include "lanes.h"

namespace spartan::cpu::SPARTAN_ISA {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kTolerance = 5e-7f;  // on the sum of a mask, relative to its budget: as cache_solve.h
constexpr double kEverything = 1 - 1e-12;  // a budget of this part of the costs is all of them, summed in another order

inline V choose(I condition, V yes, V no) { return condition ? yes : no; }

// log(ratio) with relative accuracy also near 1, where ratio - 1 is given: 2 atanh((m - 1) / (m + 1)) for the mantissa m in
// [1/sqrt 2, sqrt 2], whose series ends below float rounding.
inline V log_of(V ratio, V less_one) {
  typedef uint32_t U __attribute__((vector_size(SPARTAN_VECTOR_BYTES)));  // lanes of bad rows may wrap
  const U raw = (U)ratio;
  const I exponent = (I)(raw - 0x3f3504f3u) >> 23;  // of ratio * sqrt 2
  const V m = (V)(raw - ((U)exponent << 23));
  const V w = choose(exponent == 0, less_one, m - 1.0f) / (m + 1.0f), square = w * w;
  const V series = w * (2.0f + square * (2.0f / 3 + square * (2.0f / 5 + square * (2.0f / 7))));
  return __builtin_convertvector(exponent, V) * kLn2 + series;
}

struct Spread {
  V low, high, mean, deviation;
  I finite;
};

inline Spread spread_of(const LaneProblem& p, int n) {
  Spread s{p.u[0], p.u[0], V{}, V{}, I{}};
  V first{}, second{}, poison{};
  for (int j = 0; j < n; ++j) {
    const V u = p.u[j], d = u - p.u[0];
    poison += u * 0.0f;
    s.low = smaller(u, s.low);
    s.high = larger(u, s.high);
    first += d;
    second += d * d;
  }
  const float share = 1.0f / static_cast<float>(n);
  const V mean = first * share, variance = larger(second * share - mean * mean, V{});
  s.mean = p.u[0] + mean;
  s.deviation = square_root(variance);
  s.finite = poison == 0.0f;
  return s;
}

// The smaller side of each lane's budget, in units of the one cost where there is one.
struct LaneBudget {
  V sign, quota, other, total;  // sign: -1 where what is dropped is the smaller side; quota: its cost; negative: no search
  V target;                     // the logit of quota / total

  LaneBudget(const LaneProblem& problem, const LaneMap& map, RowBudgets budgets) {
    if (budgets.stride == 0 && !problem.priced) {
      const Side one = side(budgets.first[0] / problem.unit, problem.total[0]);
      sign = splat(one.sign);
      quota = splat(one.quota);
      other = splat(one.other);
    } else {
      for (int l = 0; l < kLanes; ++l) {
        const Side own = side(budgets.first[map.row(l) * budgets.stride] / problem.unit, problem.total[l]);
        sign[l] = own.sign;
        quota[l] = own.quota;
        other[l] = own.other;
      }
    }
    total = quota + other;
    target = log_of(quota / other, quota / other - 1.0f);
  }

  // Where the threshold is if the entries are logistic.
  V logistic_start(const Spread& spread, float beta) const {
    constexpr float kOverLogistic = 0.303963551f;  // 3 / pi^2
    const V wide = spread.deviation * spread.deviation * kOverLogistic + 1.0f / (beta * beta);
    return spread.mean - sign * target * square_root(wide);
  }

 private:
  struct Side {
    float sign, quota, other;
  };
  static Side side(double k, double total) {
    const bool above_half = k > total * 0.5;
    const double least = above_half ? total - k : k;
    // the negation catches NaN; nothing and everything are no search
    const bool searched = k > 0 && k < total * kEverything;
    return {above_half ? -1.0f : 1.0f, searched ? static_cast<float>(least) : -1.0f, static_cast<float>(total - least)};
  }
};

}  // namespace spartan::cpu::SPARTAN_ISA
