// The logistic function and the sums that the root search asks for, by entry.
#pragma once

#include "../cpu/threshold_search.h"
#include "common.cuh"

namespace spartan::cuda {

using cpu::Logit;
using cpu::Moments;
using cpu::ThresholdSearch;

// |sum a m - k| / min(k, total - k) at which a solve ends. From the second residual on another Halley step, whose error is
// the residual cubed, is exact to rounding, and rounding may keep a solve from the first: only a few more trials are made.
constexpr double kTolerance = 1e-8;
constexpr double kNearlyDone = 1e-5;
constexpr int kLastTrials = 2;
constexpr int kMaxTrials = 1000;  // entries of many magnitudes take hundreds
// A residual from which Halley's next step, whose error is the residual cubed, is below what a float32 sum can tell. The
// mask's own sum is held against kWritten, and where it misses the search goes on.
constexpr double kLastStep = 4e-3;
constexpr double kWritten = 5e-7;

// m = sigmoid(x) and 1 - m, each with full relative precision.
struct Sigmoid {
  float m, complement;

  __device__ explicit Sigmoid(float x) {
    const float e = expf(-fabsf(x)), big = 1.0f / (1.0f + e), small = e * big;
    m = x < 0.0f ? small : big;
    complement = x < 0.0f ? big : small;
    if (x != x) m = complement = x;
  }
  __device__ float slope() const { return m * complement; }
};

__device__ inline float logit_at(const Logit<float>& p, float u) { return fmaf(p.beta, u - p.centre, p.shift); }

// Sums over a few entries in float32, moved to float64 by flush().
struct MomentSums {
  float mass = 0.0f, slope = 0.0f, curvature = 0.0f;
  double total[3] = {0.0, 0.0, 0.0};

  __device__ void add(const Logit<float>& p, float u, float a) {
    const Sigmoid side(p.sign * logit_at(p, u));
    const float s = a * side.slope();
    mass += a * side.m;
    slope += s;
    curvature += s * (side.complement - side.m);
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

  __device__ void add(const Logit<float>& p, float u, float a, float g) {
    const float s = Sigmoid(logit_at(p, u)).slope(), g_s = g * s, a_s = a * s;
    const float from_origin = u - p.origin();
    gs += g_s, as += a_s, gsu += g_s * from_origin, asu += a_s * from_origin;
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
  float low = INFINITY, high = -INFINITY, cost = 0.0f, ratio = 0.0f, square = 0.0f, poison = 0.0f, count = 0.0f;
  double total[5] = {0.0, 0.0, 0.0, 0.0, 0.0};

  __device__ void add(float u, float a) {
    low = u < low ? u : low;
    high = u > high ? u : high;
    poison += u * 0.0f + (a > 0.0f ? a * 0.0f : NAN);
    cost += a, ratio += u, square += u * u, count += 1.0f;
  }
  __device__ void flush() {
    total[0] += cost, total[1] += ratio, total[2] += square, total[3] += poison, total[4] += count;
    cost = ratio = square = poison = count = 0.0f;
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
