// The soft threshold of entries that stay in cache: as many passes over them as it takes.
#pragma once

#include <cmath>
#include <stdexcept>

#include "soft_topk_passes.h"
#include "threshold_search.h"

namespace spartan::cpu {

// |sum a m - k| / min(k, total - k) that a written mask may have, and the residual after which one more Halley step,
// whose error is the residual cubed, is exact to rounding.
template <class T>
constexpr double kTolerance = sizeof(T) == 4 ? 5e-7 : 1e-13;
template <class T>
constexpr double kLastStep = sizeof(T) == 4 ? 4e-3 : 1e-5;
constexpr int kMaxTrials = 1000;  // entries of many magnitudes take hundreds

// A mask that keeps something else than the budget is refused: no search can end it where float64 ends.
inline void require_met(double mass, double quota) {
  if (!(std::fabs(mass - quota) <= 1e-4 * quota))
    throw std::invalid_argument("values must not span so many magnitudes: the budget cannot be met at this beta");
}

template <class T>
Logit<T> saved_logit(const double* threshold, double beta) {
  return {static_cast<T>(beta), static_cast<T>(threshold[0]), static_cast<T>(threshold[1]), T(1)};
}

template <class T>
void save(const ThresholdSearch& search, double* threshold) {
  const Logit<T> p = search.logit<T>();
  threshold[0] = static_cast<double>(p.centre);
  threshold[1] = search.shift_from(threshold[0]);
}

// A start for entries of this mean and spread, as if they were logistic; the bracket corrects what is not.
inline void start_from(const Extent& extent, int64_t count, ThresholdSearch* search) {
  const double mean = extent.ratio / static_cast<double>(count);
  const double variance = std::fmax(extent.square / static_cast<double>(count) - mean * mean, 0.0);
  constexpr double kLogisticVariance = 3.289868133696453;  // pi^2 / 3
  const double beta = search->beta;
  const double scale = std::sqrt(variance / kLogisticVariance + 1 / (beta * beta));
  search->t = mean - search->sign * search->target * scale;
  search->bracket(extent.low, extent.high);
}

// Solves on entries that stay in cache: as many passes as it takes.
template <class T>
void solve_in_cache(const Span<T>& span, const Extent& extent, ThresholdSearch* search) {
  const SoftTopkPasses<T>& passes = soft_topk_passes<T>();
  start_from(extent, span.length, search);
  for (int trial = 0; trial < kMaxTrials; ++trial) {
    const Moments m = passes.moments(span, search->logit<T>());
    if (search->advance(m, kTolerance<T> / 4) == ThresholdSearch::Step::done) return;
    if (search->residual < kLastStep<T> / 4) return;
  }
}

}  // namespace spartan::cpu
