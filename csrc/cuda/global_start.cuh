// Where a solve over a list begins: after the last two solves where there were any, else after a sample of the entries.
#pragma once

#include "global_solve.cuh"

namespace spartan::cuda {

constexpr int kSampleThreads = kThreads;
constexpr int kSampleEach = 16;
constexpr int kSample = kSampleThreads * kSampleEach;
constexpr double kSampleMargin = 5.0;   // standard deviations of a rank in the sample, each side of the range
constexpr double kSampleStep = 1e-2;    // the sample's own error is larger
constexpr int kSampleKeyBits = 22;      // to which the ends of the range are found
constexpr int kStateSoft = 0, kStateHard = 2, kStateSolves = 4, kStateWidth = 5;

__device__ inline double expected(const double* pair, double solves) {
  return solves >= 2.0 ? 2.0 * pair[0] - pair[1] : pair[0];
}

// Entries spread over the list, one drawn from each of kSample equal stretches; all of a short list. In registers.
template <class T>
class Sample {
 public:
  __device__ explicit Sample(const Plan& plan) : live_(0) {
#pragma unroll
    for (int j = 0; j < kSampleEach; ++j) {
      const int64_t k = threadIdx.x + j * kSampleThreads, stretch = plan.length / kSample;
      // a fixed step could follow the rows of a matrix
      const uint64_t draw = (static_cast<uint32_t>(k) * 2654435761u) >> 4;
      const int64_t at = stretch == 0 ? k : k * stretch + static_cast<int64_t>(draw * static_cast<uint64_t>(stretch) >> 28);
      u_[j] = a_[j] = 0.0f;
      if (at >= plan.length) continue;
      const Part* part = part_at(plan, &Part::first_index, at);
      const Entries<T> entries(plan, *part);
      a_[j] = entries.cost(at - part->first_index);
      u_[j] = entries.ratio_at(at - part->first_index, a_[j]);
      live_ |= masked(u_[j]) ? 0u : 1u << j;
    }
  }
  __device__ float cost(int64_t j) const { return a_[j]; }
  template <class F, class Flush>
  __device__ void walk_unmasked(F f, Flush flush) const {
#pragma unroll
    for (int j = 0; j < kSampleEach; ++j) {
      if (live_ >> j & 1u) f(j, u_[j]);
    }
    flush();
  }

  // The keys that lie kSampleMargin standard deviations of a rank above and below the one at which the budget runs out.
  __device__ void range(double share, double count, double cost, uint32_t* low, uint32_t* high) const {
    const double margin = cost / count * (kSampleMargin * sqrt(count * share * (1.0 - share)) + 16.0);
    uint32_t above = 0, below = 0;  // the least keys from which on at most so much is spent
    for (int bit = 31; bit >= 32 - kSampleKeyBits; --bit) {
      const uint32_t one = 1u << bit;
      double spent[2] = {0.0, 0.0};
      walk_unmasked(
          [&](int64_t j, float u) {
            const uint32_t key = key_of(u);
            spent[0] += key >= (above | one) ? static_cast<double>(cost_of(j)) : 0.0;
            spent[1] += key >= (below | one) ? static_cast<double>(cost_of(j)) : 0.0;
          },
          [] {});
      group_sums<kSampleThreads>(spent);
      if (spent[0] > share * cost - margin) above |= one;
      if (spent[1] > share * cost + margin) below |= one;
    }
    // with less than the margin to spend, nothing is known about the top
    *high = share * cost > margin ? above | ((1u << (32 - kSampleKeyBits)) - 1) : ~0u;
    *low = below;
  }

 private:
  __device__ float cost_of(int64_t j) const { return a_[j]; }
  float u_[kSampleEach], a_[kSampleEach];
  unsigned live_;
};

// A first trial and a range of keys.
struct Start {
  double t = 0.0, low = -1e37, high = 1e37, window = NAN;
  uint32_t first = 0, last = ~0u;
};

template <class T>
__device__ inline Start start_cold(const Plan& plan, bool soft, double beta, double budget, double total, bool hard) {
  const Sample<T> sample(plan);
  ExtentOfRow sums;
  extent_of<kSampleThreads>(sample, sums);
  const double share = budget / total, count = sums[4];
  Start start;
  if (count == 0.0) return start;
  if (soft) {
    ThresholdSearch estimate(share * sums[0], sums[0], beta);
    search_row<kSampleThreads>(sample, sums, kSampleStep, &estimate);
    start.t = estimate.t.at;
    start.low = -sums[5], start.high = sums[6];
  }
  if (!hard) return start;
  sample.range(share, count, sums[0], &start.first, &start.last);
  start.window = (static_cast<double>(value_of<float>(start.last)) - static_cast<double>(value_of<float>(start.first))) / 2;
  return start;
}

__device__ inline Start start_warm(const double* state) {
  const double solves = state[kStateSolves], hard = expected(state + kStateHard, solves), width = state[kStateWidth];
  Start start;
  start.t = expected(state + kStateSoft, solves);
  start.first = key_of(static_cast<float>(hard - width));
  start.last = key_of(static_cast<float>(hard + width));
  start.window = width;
  return start;
}

// One thread block.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) start_kernel(Plan plan, Request request, Workspace w, Sent sent) {
  sent.arrive();
  Solve* solve = w.solve;
  const double total = request.priced ? solve->total : static_cast<double>(plan.length);
  const double cheapest = request.priced ? solve->cheapest : 1.0, dearest = request.priced ? solve->dearest : 1.0;
  const double beta = *request.beta, asked = *request.budget;
  const double budget = usable_budget(asked, total, beta, solve->poison);
  bool searching, counting;
  {  // written now, moved later: the sample's search needs the registers
    const ThresholdSearch search(budget, total, beta);
    Selection cut(usable_budget(asked > total ? total : asked, total, beta, solve->poison), total, cheapest, dearest);
    if (!request.hard) cut.stage = Stage::closed;
    searching = request.soft && !search.constant(), counting = cut.stage == Stage::range;
    if (threadIdx.x == 0) solve->search = search, solve->cut = cut;
  }
  Start from;
  if (request.state != nullptr && request.state[kStateSolves] >= 1.0) from = start_warm(request.state);
  else if (searching || counting) from = start_cold<T>(plan, searching, beta, budget, total, counting);
  if (threadIdx.x != 0) return;
  solve->search.t = fabs(from.t) < INFINITY ? from.t : 0.0;
  solve->search.centre_from(from.low, from.high);
  solve->cut.look_within(from.first, from.last);
  solve->trials = Trials{};
  solve->window = from.window;
  solve->soft = request.soft;
  solve->searching = searching;
  solve->pending = searching || counting;
}

}  // namespace spartan::cuda
