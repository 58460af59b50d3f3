// Soft and hard masks of a list of tensors under one budget, in a few passes over it.
#pragma once

#include <cmath>

#include "cache_solve.h"
#include "dispatch.h"
#include "problem.h"

namespace spartan::cpu {

constexpr double kSampleMargin = 5.0;  // standard deviations of a rank in the sample, each side of the window

// The members of new_solver_state().
struct SolverState {
  double soft, previous_soft, hard, previous_hard, solves, half_width;
};

template <class T>
class GlobalSolve {
 public:
  GlobalSolve(Problem<T>* problem, double budget, double beta, SolverState* state)
      : problem_(*problem), budget_(problem->clamped_budget(budget)), search_(budget_, problem->total_cost(), beta),
        state_(state), want_cut_(state != nullptr) {
    problem->require_agreement({budget, beta, state != nullptr ? state->solves : 0, state != nullptr ? state->soft : 0});
  }

  const ThresholdSearch& search() const { return search_; }

  // Soft masks, and hard ones when there is a state.
  void run() {
    const bool warm = state_ != nullptr && state_->solves >= 1 && problem_.length() > kMinimumWarm;
    warm ? start_warm() : start_cold();
    if (!solved_) pass_over_all();
    write();
    if (state_ != nullptr) remember();
  }

  // Hard masks alone.
  void run_hard() {
    want_cut_ = true;
    search_.quota = 0;  // nothing to search for
    start_cold();
    if (!have_cut_) find_cut();
    problem_.write_hard(cut_);
  }

 private:
  static constexpr int64_t kMinimumWarm = kSampleBytes / sizeof(T);
  using Step = ThresholdSearch::Step;

  void start_cold() {
    const Sample<T> sample = problem_.sample();
    if (sample.complete) {
      if (!search_.constant()) solve_in_cache(sample.span, sample.extent, &search_);
      if (want_cut_) cut_ = problem_.cut_from_sample(sample, budget_);
      have_cut_ = solved_ = true;
      return;
    }
    const double share = sample.extent.cost / problem_.total_cost();
    if (!search_.constant()) {
      ThresholdSearch estimate(budget_ * share, sample.extent.cost, search_.beta);
      solve_in_cache(sample.span, sample.extent, &estimate);
      search_.t = estimate.t;
      search_.centre_from(sample.extent.low, sample.extent.high);
    }
    if (want_cut_) window_ = window_from(sample, budget_ * share);
    problem_.forget(sample);
  }

  // The hard threshold's place in the sample, kSampleMargin standard deviations of its rank either way.
  Window<T> window_from(const Sample<T>& sample, double budget) {
    const double count = static_cast<double>(sample.span.length), mean = sample.extent.cost / count;
    const double p = budget / sample.extent.cost;
    const double margin = mean * (kSampleMargin * std::sqrt(count * p * (1 - p)) + kRun);
    Window<T> window{-std::numeric_limits<T>::infinity(), std::numeric_limits<T>::infinity()};
    if (budget > margin) window.high = sample.descend(budget - margin, problem_.histogram()).ratio();
    const RadixDescent<T> below = sample.descend(budget + margin, problem_.histogram());
    if (!below.everything) window.low = below.ratio();
    const double inside = 2 * margin / sample.extent.cost * static_cast<double>(problem_.length());
    wide_ = inside > static_cast<double>(problem_.candidate_capacity());
    return window;
  }

  void start_warm() {
    const bool twice = state_->solves >= 2;
    search_.t = twice ? 2 * state_->soft - state_->previous_soft : state_->soft;
    const double hard = expected_hard(), width = state_->half_width;
    window_ = {static_cast<T>(hard - width), static_cast<T>(hard + width)};
  }

  double expected_hard() const {
    return state_->solves >= 2 ? 2 * state_->hard - state_->previous_hard : state_->hard;
  }

  // P1: the moments at the start and the window in one pass, then as many passes as a poor start needs.
  void pass_over_all() {
    if (search_.constant()) {
      if (std::isnan(problem_.extent().poison)) refuse_values();
      if (want_cut_) find_cut();
      return;
    }
    if (!search_.t.finite()) search_.t = 0;
    for (int trial = 0; trial < kMaxTrials; ++trial) {
      const Logit<T> logit = search_.logit<T>();
      Moments m;
      if (trial == 0 && want_cut_ && wide_) {
        problem_.narrow(&logit, budget_, &window_, &m);
      } else if (want_cut_ && !have_cut_ && trial <= (wide_ ? 1 : 0)) {
        const bool fits = problem_.survey(&logit, window_, &m);
        have_cut_ = fits && problem_.cut_from_candidates(window_, m.above, budget_, &cut_);
      } else {
        m = problem_.moments(logit);
      }
      if (std::isnan(m.poison)) refuse_values();
      const Step step = advance(m, kTolerance<T> / 4);
      if (step == Step::done || search_.residual < kLastStep<T>) break;
    }
    if (want_cut_ && !have_cut_) find_cut();
  }

  Step advance(const Moments& m, double tolerance) {
    const Step step = search_.advance(m, tolerance);
    if (step != Step::needs_bracket) return step;
    const Extent all = problem_.extent();
    search_.tighten(all.low, all.high);
    return search_.bisect();
  }

  // The window missed or there was no pass for it: look around, then where a sample says, then at everything.
  void find_cut() {
    if (have_cut_) return;
    have_cut_ = true;
    if (budget_ >= problem_.total_cost()) {
      cut_ = Cut<T>::everything();
    } else if (!problem_.cut_within(window_, budget_, &cut_)) {
      const Sample<T> sample = problem_.sample();
      window_ = window_from(sample, budget_ * (sample.extent.cost / problem_.total_cost()));
      problem_.forget(sample);
      if (!problem_.cut_within(window_, budget_, &cut_)) cut_ = problem_.cut_by_radix(budget_);
    }
  }

  // P2: the masks. Where their sum misses the budget (few entries near a steep threshold: a staircase, on which one
  // Halley step is not the last), the search goes on to the end and they are written once more.
  void write() {
    const Cut<T>* cut = want_cut_ ? &cut_ : nullptr;
    const double mass = problem_.write(search_.logit<T>(), cut);
    if (search_.constant() || std::fabs(mass - search_.quota) <= kTolerance<T> * search_.quota) return;
    search_.forget();
    int trial = 0;
    while (trial < kMaxTrials && advance(problem_.moments(search_.logit<T>()), kTolerance<T> / 4) != Step::done) ++trial;
    if (trial == kMaxTrials) search_.settle();
    require_met(problem_.write(search_.logit<T>(), cut), search_.quota);
  }

  void remember() {
    const double expected = expected_hard();
    const double hard = std::isfinite(static_cast<double>(cut_.ratio)) ? static_cast<double>(cut_.ratio) : state_->hard;
    const double soft = search_.constant() ? hard : search_.t.at;
    const double first_width = (static_cast<double>(window_.high) - static_cast<double>(window_.low)) / 2;
    const double floor = std::fabs(hard) * 1e-5;
    // as wide as the last surprise asks for, narrowing slowly when there is none
    const double width = state_->solves >= 1
                             ? std::fmax(4 * std::fabs(hard - expected), state_->half_width * 0.7)
                             : (std::isfinite(first_width) ? first_width : std::fabs(hard) * 0.01);
    *state_ = {soft, state_->soft, hard, state_->hard, state_->solves + 1, std::fmax(width, floor)};
  }

  Problem<T>& problem_;
  double budget_;
  ThresholdSearch search_;
  SolverState* state_;
  bool want_cut_, have_cut_ = false, solved_ = false;
  bool wide_ = false;  // the window holds more than the candidates that fit
  Window<T> window_{T(0), T(0)};
  Cut<T> cut_ = Cut<T>::nothing();
};

}  // namespace spartan::cpu
