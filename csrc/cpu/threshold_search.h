// Root finding for the soft threshold: Halley's method on a logit, kept inside a bracket.
#pragma once

#include <cmath>
#include <limits>

#include "../host_device.h"
#include "soft_topk_passes.h"

namespace spartan::cpu {

// Finds t with sum_i a_i sigmoid(beta (u_i - t)) = k, from the moments at one trial t after another.
//
// It works on the smaller side of the budget, M = sum a sigmoid(sign (...)) with M = q = min(k, total - k), and on
// f(t) = logit(M / total) - logit(q / total), which is nearly linear in t whatever beta is.
struct ThresholdSearch {
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static constexpr double kSmallestBeta = 1e-290;  // below it 1 / beta overflows, and the mask is that of beta = 0

  double beta, sign, quota, total, target;
  double low = -kInfinity, high = kInfinity;
  double centre_low = -1e37, centre_high = 1e37;  // the data's range once it is known
  double t = 0;
  double residual = kInfinity;  // |f| at the last trial
  // In the values' precision the mass is a staircase whose steps can pass over the quota: the nearest trial is the answer.
  double best_t = 0, best_miss = kInfinity;

  SPARTAN_HD ThresholdSearch(double budget, double total_cost, double sharpness)
      : beta(sharpness),
        sign(budget > total_cost / 2 ? -1.0 : 1.0),
        quota(sign > 0 ? budget : total_cost - budget),
        total(total_cost),
        target(std::log(quota / (total_cost - quota))) {}

  // Every entry is kept or dropped alike: beta = 0, or a budget of nothing or everything.
  SPARTAN_HD bool constant() const { return beta < kSmallestBeta || !(quota > 0); }
  SPARTAN_HD double constant_shift() const { return sign * target; }

  // At these thresholds all logits lie on one side of the target's.
  SPARTAN_HD void bracket(double lowest_ratio, double highest_ratio) {
    low = lowest_ratio - sign * target / beta;
    high = highest_ratio - sign * target / beta;
    centre_from(lowest_ratio, highest_ratio);
    if (!(t > low && t < high)) t = low + (high - low) / 2;
  }
  // Centres outside of the data would cost u - centre its last bits, all alike where the entries are.
  SPARTAN_HD void centre_from(double lowest_ratio, double highest_ratio) {
    centre_low = lowest_ratio;
    centre_high = highest_ratio;
  }
  SPARTAN_HD bool bracketed() const { return low > -kInfinity && high < kInfinity; }

  template <class T>
  SPARTAN_HD Logit<T> logit() const {
    if (constant()) return {T(0), T(0), static_cast<T>(constant_shift()), static_cast<T>(sign)};
    const T centre = static_cast<T>(std::fmin(std::fmax(t, centre_low), centre_high));
    const double shift = beta * (static_cast<double>(centre) - t);
    return {static_cast<T>(beta), centre, static_cast<T>(shift), static_cast<T>(sign)};
  }

  enum class Step { done, moved, needs_bracket };

  // Takes the moments at t. `tolerance` is on |M - q| / q.
  SPARTAN_HD Step advance(const Moments& m, double tolerance) {
    const double f = std::log(m.mass / (total - m.mass)) - target;
    const double previous = residual;
    residual = std::fabs(f);
    const double miss = std::fabs(m.mass - quota);
    if (miss < best_miss) {
      best_miss = miss;
      best_t = t;
    }
    if (miss <= tolerance * quota) return Step::done;
    if (sign * f > 0) low = std::fmax(low, t);
    if (sign * f < 0) high = std::fmin(high, t);
    const double next = t + halley(m, f);
    // residual <= previous / 2 is false for NaN too; the first trial has nothing to halve
    if (next > low && next < high && (previous == kInfinity || residual <= previous / 2)) {
      t = next;
      return Step::moved;
    }
    if (!bracketed()) return Step::needs_bracket;
    return bisect();
  }

  // What rough moments said about the trials so far may be wrong by more than the budget may be: only t is kept.
  SPARTAN_HD void forget() {
    low = -kInfinity;
    high = residual = best_miss = kInfinity;
  }

  // The best trial so far, when no further one is made.
  SPARTAN_HD void settle() {
    if (best_miss < kInfinity) t = best_t;
  }

  SPARTAN_HD Step bisect() {
    const double middle = low + (high - low) / 2;
    if (middle == low || middle == high) {
      settle();
      return Step::done;
    }
    t = middle;
    residual = kInfinity;
    return Step::moved;
  }

 private:
  SPARTAN_HD double halley(const Moments& m, double f) const {
    const double rest = total - m.mass;
    const double first = -sign * beta * m.slope;
    const double second = beta * beta * m.curvature;
    const double weight = total / (m.mass * rest);
    const double derivative = first * weight;
    const double curvature = second * weight - first * first * weight * weight * (rest - m.mass) / total;
    return -2 * f * derivative / (2 * derivative * derivative - f * curvature);
  }
};

}  // namespace spartan::cpu
