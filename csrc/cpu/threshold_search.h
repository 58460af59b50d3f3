// Root finding for the soft threshold: Halley's method on a logit, kept inside a bracket.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../host_device.h"
#include "soft_topk_passes.h"

namespace spartan::cpu {

// A threshold in two parts, at + rest: next to entries of 1e13 one double has no digits left for the fraction of 1 / beta
// that decides how much of them is kept.
struct Threshold {
  double at = 0, rest = 0;

  SPARTAN_HD Threshold(double value = 0) : at(value) {}
  SPARTAN_HD Threshold(double whole, double part) : at(whole + part) {
    const double gone = at - whole;
    rest = (whole - (at - gone)) + (part - gone);
  }

  SPARTAN_HD Threshold plus(double step) const { return {at, rest + step}; }
  SPARTAN_HD double minus(const Threshold& o) const { return (at - o.at) + (rest - o.rest); }
  SPARTAN_HD bool finite() const { return std::fabs(at) <= std::numeric_limits<double>::max(); }
};

// Finds t with sum_i a_i sigmoid(beta (u_i - t)) = k, from the moments at one trial t after another.
//
// It works on the smaller side of the budget, M = sum a sigmoid(sign (...)) with M = q = min(k, total - k), and on
// f(t) = logit(M / total) - logit(q / total), which is nearly linear in t whatever beta is.
struct ThresholdSearch {
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static constexpr double kSmallestBeta = 1e-290;  // below it 1 / beta overflows, and the mask is that of beta = 0

  double beta, sign, quota, total, target;
  Threshold low = -kInfinity, high = kInfinity;
  double centre_low = -1e37, centre_high = 1e37;  // the data's range once it is known
  Threshold t;
  double residual = kInfinity;  // |f| at the last trial
  int halvings = 0;
  // In the values' precision the mass is a staircase whose steps can pass over the quota: the nearest trial is the answer.
  Threshold best_t;
  double best_miss = kInfinity;

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
    low = Threshold(lowest_ratio, -sign * target / beta);
    high = Threshold(highest_ratio, -sign * target / beta);
    centre_from(lowest_ratio, highest_ratio);
    if (!within(t)) t = middle();
  }
  // The same, where trials may have said more already.
  SPARTAN_HD void tighten(double lowest_ratio, double highest_ratio) {
    const Threshold first(lowest_ratio, -sign * target / beta), last(highest_ratio, -sign * target / beta);
    if (first.minus(low) > 0) low = first;
    if (high.minus(last) > 0) high = last;
    centre_from(lowest_ratio, highest_ratio);
  }
  // Centres outside of the data would cost u - centre its last bits, all alike where the entries are.
  SPARTAN_HD void centre_from(double lowest_ratio, double highest_ratio) {
    centre_low = lowest_ratio;
    centre_high = highest_ratio;
  }
  SPARTAN_HD bool bracketed() const { return low.finite() && high.finite(); }

  template <class T>
  SPARTAN_HD Logit<T> logit() const {
    if (constant()) return {T(0), T(0), static_cast<T>(constant_shift()), static_cast<T>(sign)};
    const T centre = static_cast<T>(std::fmin(std::fmax(t.at, centre_low), centre_high));
    return {static_cast<T>(beta), centre, static_cast<T>(shift_from(centre)), static_cast<T>(sign)};
  }
  // beta (centre - t)
  SPARTAN_HD double shift_from(double centre) const { return constant() ? constant_shift() : beta * ((centre - t.at) - t.rest); }

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
    if (sign * f > 0 && t.minus(low) > 0) low = t;
    if (sign * f < 0 && high.minus(t) > 0) high = t;
    const Threshold next = t.plus(halley(m, f));
    // residual <= previous / 2 is false for NaN too; the first trial has nothing to halve
    if (within(next) && (previous == kInfinity || residual <= previous / 2)) {
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
    const Threshold half = middle();
    const bool resolved = (half.at == low.at || half.at == high.at) && beta * high.minus(low) <= kFinestLogit;
    // the first trial may have been elsewhere, where the bracket was not known yet
    const bool tried = !resolved || beta * std::fabs(t.minus(half)) <= kFinestLogit;
    if (tried && (resolved || !within(half))) {
      settle();
      return Step::done;
    }
    t = half;
    ++halvings;
    residual = kInfinity;
    return Step::moved;
  }

 private:
  static constexpr double kFinestLogit = 1e-16;
  static constexpr double kWide = 0x1p30;
  static constexpr double kNear = 16;

  SPARTAN_HD bool within(const Threshold& place) const { return place.minus(low) > 0 && high.minus(place) > 0; }

  // Half way. Where the bracket spans many magnitudes (entries at -1e38 among others of 1), in turn: half way through the
  // doubles, and half way in the exponent of the distance to either end.
  SPARTAN_HD Threshold middle() const {
    const double width = high.minus(low);
    return width <= kWide / beta ? low.plus(width / 2) : wide_middle(low, high, width, beta, halvings % 3);
  }
  SPARTAN_HD_CALLED static Threshold wide_middle(Threshold low, Threshold high, double width, double beta, int turn) {
    if (turn != 0) {
      const double near = std::sqrt(width / 2) * std::sqrt(1 / beta);
      return turn == 1 ? low.plus(near) : high.plus(-near);
    }
    if (low.at * high.at > 0 && width <= kNear * std::fmin(std::fabs(low.at), std::fabs(high.at))) return low.plus(width / 2);
    const uint64_t first = order_of(low.at), last = order_of(high.at);
    return double_at(first + (last - first) / 2);
  }
  SPARTAN_HD static uint64_t order_of(double value) {
    const uint64_t bits = std::bit_cast<uint64_t>(value);
    return bits >> 63 != 0 ? ~bits : bits | uint64_t{1} << 63;
  }
  SPARTAN_HD static double double_at(uint64_t order) {
    return std::bit_cast<double>(order >> 63 != 0 ? order & ~(uint64_t{1} << 63) : ~order);
  }

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
