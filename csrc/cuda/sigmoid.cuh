// The logistic function and the sums that the root search asks for, by entry.
#pragma once

#include "../cpu/threshold_search.h"
#include "common.cuh"

namespace spartan::cuda {

using cpu::Logit;
using cpu::Moments;
using cpu::ThresholdSearch;

// |sum a m - k| / min(k, total - k) at which a solve ends. Rounding may keep a solve from the first: from the second on, which
// is good enough, only a few more trials are made.
constexpr double kTolerance = 1e-8;
constexpr double kNearlyDone = 5e-7;
constexpr int kLastTrials = 2;
constexpr int kMaxTrials = 1000;  // entries of many magnitudes take hundreds
// A residual from which Halley's next step, whose error is the residual cubed, is below what a float32 sum can tell. The
// mask's own sum is held against kWritten, and where it misses the search goes on.
constexpr double kLastStep = 4e-3;
constexpr double kWritten = 5e-7;

// m = sigmoid(x ln 2) and 1 - m, each with full relative precision.
struct Sigmoid {
  float m, complement;

  __device__ explicit Sigmoid(float x) {
    const float e = fast_exp2(-fabsf(x)), big = reciprocal(1.0f + e), small = e * big;
    m = x < 0.0f ? small : big;
    complement = x < 0.0f ? big : small;
  }
  __device__ float slope() const { return m * complement; }
};

// sign (beta (u - centre) + shift) / ln 2
struct Exponent {
  float slope, centre, shift;

  __device__ explicit Exponent(const Logit<float>& p, float sign = 1.0f)
      : slope(sign * p.beta * kLog2E), centre(p.centre), shift(sign * p.shift * kLog2E) {}
  __device__ float at(float u) const { return fmaf(slope, u - centre, shift); }
};

// Sums over a few entries in float32, moved to float64 by flush().
struct MomentSums {
  float mass = 0.0f, slope = 0.0f, curvature = 0.0f;
  double total[3] = {0.0, 0.0, 0.0};

  // x: of the smaller side
  __device__ void add(const Exponent& x, float u, float a) {
    const Sigmoid side(x.at(u));
    const float am = a * side.m, s = am * side.complement;
    mass += am;
    slope += s;
    curvature = fmaf(s, side.complement - side.m, curvature);
  }
  __device__ void flush() {
    total[0] += mass, total[1] += slope, total[2] += curvature;
    mass = slope = curvature = 0.0f;
  }
  __device__ Moments moments() const {
    Moments m;
    m.mass = total[0], m.slope = total[1], m.curvature = total[2];
    return m;
  }
};

// Whether another trial is worth it: near the root rounding can send a search astray, and the best so far is the answer.
struct Trials {
  int count = 0, last = 0;

  // Takes the moments at search->t and moves it. True when the search is over: at the first residual below `enough`, or,
  // where that is 0, at the best of the last trials.
  __device__ bool take(const Moments& moments, double enough, ThresholdSearch* search) {
    const bool done = search->advance(moments, kTolerance) != ThresholdSearch::Step::moved;
    last += search->residual < kNearlyDone;
    if (enough > 0.0 && (done || search->residual < enough)) return true;
    if (!done && ++count < kMaxTrials && last <= kLastTrials) return false;
    search->settle();
    return true;
  }
};

struct GradientSums {
  float gs = 0.0f, as = 0.0f, gsu = 0.0f, asu = 0.0f;
  double total[4] = {0.0, 0.0, 0.0, 0.0};

  // origin: where u is measured from in a sum that the choice leaves alone
  __device__ void add(const Exponent& x, float origin, float u, float a, float g) {
    const float s = Sigmoid(x.at(u)).slope(), g_s = g * s, a_s = a * s, away = u - origin;
    gs += g_s, as += a_s, gsu = fmaf(g_s, away, gsu), asu = fmaf(a_s, away, asu);
  }
  __device__ void flush() {
    total[0] += gs, total[1] += as, total[2] += gsu, total[3] += asu;
    gs = as = gsu = asu = 0.0f;
  }
  // sum g s / sum a s; where every mask is saturated nothing moves. NaN stays NaN.
  __device__ double ratio() const { return total[1] == 0.0 ? 0.0 : total[0] / total[1]; }
  __device__ double of_beta() const { return total[2] - ratio() * total[3]; }
};

// What the root search must know before it starts. Entries that are not finite, or costs that are not positive, make
// `poison` NaN.
struct ExtentSums {
  float low = INFINITY, high = -INFINITY, ratio = 0.0f, square = 0.0f, poison = 0.0f, count = 0.0f;
  double total[5] = {0.0, 0.0, 0.0, 0.0, 0.0};

  __device__ void add(float u, float a) {
    low = u < low ? u : low;
    high = u > high ? u : high;
    poison += u * 0.0f + (a > 0.0f ? a * 0.0f : NAN);
    total[0] += static_cast<double>(a);  // of a budget near all costs it leaves little
    ratio += u, square += u * u, count += 1.0f;
  }
  __device__ void flush() {
    total[1] += ratio, total[2] += square, total[3] += poison, total[4] += count;
    ratio = square = poison = count = 0.0f;
  }
};

// The budget within [0, total]; arguments that no solve can use come out as NaN, as a budget above what is not masked does.
__device__ inline double usable_budget(double budget, double total, double beta, double poison) {
  if (!(beta >= 0.0 && beta < INFINITY) || poison != poison) return NAN;
  constexpr double kSlack = 1e-6;      // the rounding of a float32 sum of costs
  constexpr double kRounding = 1e-12;  // of a float64 sum in another order
  if (budget > total * (1.0 + kSlack)) return NAN;
  return budget < 0.0 ? 0.0 : budget >= total * (1.0 - kRounding) ? total : budget;
}

// A start for n entries of this mean and spread, as if they were logistic; the bracket corrects what is not.
__device__ inline void start_from(double n, double ratio, double square, double low, double high, ThresholdSearch* search) {
  constexpr double kLogisticVariance = 3.289868133696453;  // pi^2 / 3
  const double mean = ratio / n, variance = fmin(fmax(square / n - mean * mean, 0.0), 1e60);  // squares overflow
  const double scale = sqrt(variance / kLogisticVariance + 1.0 / (search->beta * search->beta));
  search->t = mean - search->sign * search->target * scale;
  search->bracket(low, high);
}

// 0; NaN where there is no solution: of a row all of which is masked nothing else tells.
__device__ inline float mask_of_masked(const ThresholdSearch& search) { return search.quota == search.quota ? 0.0f : NAN; }

// (centre, shift) of the solution, as kept for the backward pass.
__device__ inline void save_threshold(const ThresholdSearch& search, double* threshold) {
  const Logit<float> p = search.logit<float>();
  threshold[0] = static_cast<double>(p.centre);
  threshold[1] = search.shift_from(threshold[0]);
}

}  // namespace spartan::cuda
