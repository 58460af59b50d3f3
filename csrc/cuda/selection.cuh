// The hard cut of a list: a range of keys in which the budget runs out, narrowed by counting; then the few entries in it,
// sorted. Costs are integers, in units of the one cost or in fixed point, so that no sum depends on its order.
#pragma once

#include "../cpu/selection.h"
#include "table.cuh"

namespace spartan::cuda {

using cpu::key_of;
using cpu::value_of;
using Units = unsigned long long;

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kAllKeysShift = 32 - kDigitBits;
constexpr int kRounds = 4;            // of counting: a range that misses, and the digits of a full key
constexpr int kCandidates = 1 << 11;  // entries that are sorted where the masks are written
constexpr int kIndexBits = 64 - kAllKeysShift;
constexpr int kFixedPointBits = 61;   // of the sum of all costs

// What is still to find: the range of keys, the order of the few entries in it, the last of the ties to keep, or nothing.
enum class Stage : int { range, candidates, ties, closed };

struct Selection {
  double unit, scale;     // of a cost, and its inverse
  double cheapest;
  Units budget, spent;    // spent: by all above the range
  uint32_t first, last;   // the range
  int shift;              // of 2^shift keys to a bin
  Stage stage;
  bool counted;           // all costs are equal
  bool everything, nothing;
  int64_t last_kept;      // of the ties, by index in the list

  Selection() = default;
  __device__ Selection(double budget_, double total, double cheapest_, double dearest)
      : cheapest(cheapest_), budget(0), spent(0), first(0), last(~0u), shift(kAllKeysShift), stage(Stage::closed),
        counted(cheapest_ == dearest), everything(budget_ >= total), nothing(!(budget_ > 0.0)), last_kept(-1) {
    // a power of two, so that costs lose nothing as long as the largest sum leaves them their bits
    int exponent = 0;
    frexp(total, &exponent);
    unit = counted ? cheapest : ldexp(1.0, exponent - kFixedPointBits);
    scale = 1.0 / unit;
    if (everything || nothing) return;
    double units = floor(budget_ / unit);
    if ((units + 1.0) * unit <= budget_) units += 1.0;
    if (units * unit > budget_) units -= 1.0;
    budget = static_cast<Units>(units);
    stage = Stage::range;
  }

  __device__ void look_within(uint32_t low, uint32_t high) {
    first = low <= high ? low : 0;
    last = low <= high ? high : ~0u;
    shift = 0;
    while ((last - first) >> shift >= kBins) ++shift;
  }
  __device__ Units cost(float a) const {
    return counted ? 1ull : static_cast<Units>(static_cast<double>(a) * scale + 0.5);
  }
  __device__ Units room() const { return budget - spent; }
  __device__ bool within(uint32_t key) const { return key >= first && key <= last; }
  __device__ bool keeps(uint32_t key, int64_t index) const {
    return everything || (!nothing && (key > last || (stage == Stage::ties && key == last && index <= last_kept)));
  }

  // The budget does not run out within the range: it does among all keys, or the rounding of fixed point hides that it does.
  __device__ void widen() {
    everything = first == 0 && last == ~0u;
    if (everything) stage = Stage::closed;
    look_within(0, ~0u);
  }
  // It runs out in this bin, whose entries cost `inside`, after `above` for all that come before them.
  __device__ void choose(int bin, Units above, Units inside) {
    const uint64_t from = first + (static_cast<uint64_t>(bin) << shift), to = from + (uint64_t(1) << shift) - 1;
    first = static_cast<uint32_t>(from);
    last = to < last ? static_cast<uint32_t>(to) : last;
    spent = above;
    const double most = counted ? static_cast<double>(inside) : static_cast<double>(inside) * unit / cheapest + 1.0;
    if (static_cast<double>(room()) * unit < cheapest) stage = Stage::closed;  // not one of them fits
    else if (most <= kCandidates && shift <= kAllKeysShift) stage = Stage::candidates;
    else if (first == last) stage = Stage::ties;
    else shift = shift > kDigitBits ? shift - kDigitBits : 0;
  }
};

// An entry of the range: the smaller its rank, the earlier it is taken.
struct Candidate {
  uint64_t rank;
  Units cost;

  __device__ static uint64_t rank_of(const Selection& cut, uint32_t key, int64_t index) {
    return static_cast<uint64_t>(cut.last - key) << kIndexBits | static_cast<uint64_t>(index);
  }
  __device__ int64_t index() const { return static_cast<int64_t>(rank & ((uint64_t(1) << kIndexBits) - 1)); }
};

// Sums of x up to and with each thread, in all threads of the block.
__device__ inline Units running_sum(Units x, Units (&sums)[kThreads]) {
  sums[threadIdx.x] = x;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const Units more = threadIdx.x >= static_cast<unsigned>(step) ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += more;
    __syncthreads();
  }
  return sums[threadIdx.x];
}

// Counts by bin of the range, in a thread block and then in the grid; one more place for all above it.
struct Bins {
  union {
    unsigned counts[kBins];
    Units costs[kBins];
  };
  Units above;
};

struct Histogram {
  bool wanted, counted;
  Units above = 0;

  __device__ explicit Histogram(const Selection& cut) : wanted(cut.stage == Stage::range), counted(cut.counted) {}
  __device__ void clear(Bins* bins) const {
    if (!wanted) return;
    for (int b = threadIdx.x; b < kBins; b += kThreads) {
      if (counted) bins->counts[b] = 0u;
      else bins->costs[b] = 0ull;
    }
    if (threadIdx.x == 0) bins->above = 0;
    __syncthreads();
  }
  __device__ void add(Bins* bins, const Selection& cut, float u, float a) {
    const uint32_t key = key_of(u);
    if (key < cut.first) return;
    if (key > cut.last) {
      above += cut.cost(a);
      return;
    }
    const uint32_t bin = (key - cut.first) >> cut.shift;
    if (counted) atomicAdd(&bins->counts[bin], 1u);
    else atomicAdd(&bins->costs[bin], cut.cost(a));
  }
  __device__ void hand_over(Bins* bins, Units* histogram) const {
    if (!wanted) return;
    if (above != 0) atomicAdd(&bins->above, above);
    __syncthreads();
    for (int b = threadIdx.x; b < kBins; b += kThreads) {
      const Units found = counted ? bins->counts[b] : bins->costs[b];
      if (found != 0) atomicAdd(histogram + b, found);
    }
    if (threadIdx.x == 0 && bins->above != 0) atomicAdd(histogram + kBins, bins->above);
  }
};

// Narrows the range to the bin, from above, in which the budget runs out. By a whole thread block.
__device__ __noinline__ inline void narrow(const Units* histogram, Selection* cut) {
  constexpr int kEach = kBins / kThreads;
  __shared__ Units sums[kThreads];
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;  // this thread's bins, falling
  const Units above = __ldcg(histogram + kBins), budget = cut->budget;
  Units bins[kEach], own = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) own += bins[j] = __ldcg(histogram + top - j);
  Units before = above + running_sum(own, sums) - own;
  const bool here = before <= budget && before + own > budget;  // in at most one thread
  const bool missed = above > budget || above + sums[kThreads - 1] <= budget;
  __syncthreads();  // all have read the cut that one of them now changes
  if (here) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (before <= budget && before + bins[j] > budget) cut->choose(top - j, before, bins[j]);
      before += bins[j];
    }
  }
  if (missed && threadIdx.x == 0) cut->widen();
  __syncthreads();
}

// Sorts by rank in shared memory; `size` is a power of two.
__device__ inline void sort(Candidate* entries, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const int other = i ^ step;
        const bool rising = (i & run) == 0;
        if (other > i && (entries[i].rank > entries[other].rank) == rising) {
          const Candidate kept = entries[i];
          entries[i] = entries[other];
          entries[other] = kept;
        }
      }
      __syncthreads();
    }
  }
}

// Puts the candidates in order and leaves the ranks' key at which the budget runs out as the cut. Returns how many of them
// are kept: those in front. By a whole thread block; `entries` is in shared memory.
__device__ __noinline__ inline int resolve_candidates(const Candidate* found, int count, Candidate* entries, Selection* cut) {
  constexpr int kEach = kCandidates / kThreads;
  __shared__ Units sums[kThreads];
  __shared__ int kept;
  int size = 2;
  while (size < count) size *= 2;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    entries[i].rank = i < count ? __ldcg(&found[i].rank) : ~uint64_t(0);
    entries[i].cost = i < count ? __ldcg(&found[i].cost) : 0;
  }
  if (threadIdx.x == 0) kept = count;
  const Units room = cut->room();
  const uint32_t top = cut->last;
  __syncthreads();
  sort(entries, size);
  const int from = static_cast<int>(threadIdx.x) * kEach;
  Units own = 0;
  for (int i = from; i < from + kEach && i < count; ++i) own += entries[i].cost;
  Units before = running_sum(own, sums) - own;
  if (before <= room && before + own > room) {  // in at most one thread
    int i = from;
    while (before + entries[i].cost <= room) before += entries[i++].cost;
    kept = i;
    cut->first = cut->last = top - static_cast<uint32_t>(entries[i].rank >> kIndexBits);
  }
  __syncthreads();
  return kept;
}

}  // namespace spartan::cuda
