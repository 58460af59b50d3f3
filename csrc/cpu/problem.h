// A list of tensors that share one budget, walked in chunks of fixed size so that results do not depend on the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "arena.h"
#include "parallel.h"
#include "selection.h"
#include "soft_topk_passes.h"
#include "threshold_search.h"

namespace spartan::cpu {

constexpr int64_t kSampleBytes = 1 << 19;  // of entries looked at to start cold; smaller problems are solved in cache
constexpr int64_t kRun = 16;               // the sample is made of runs of about a cache line
constexpr int64_t kCandidateBytes = 1 << 21;
constexpr int64_t kCacheBytes = 64 << 20;  // more than this does not stay in cache until it is read again
constexpr int64_t kMinChunk = 16384;
constexpr int64_t kMaxChunks = 2048;       // and one more for each tensor
constexpr int64_t kHistogramWorkers = 16;  // fixed, so that sums of costs are added in one order
constexpr int64_t kPartialBytes = 64;      // room for one chunk's sums

// Entries copied out of the problem: all of it when it is small, else a fixed sample.
template <class T>
struct Sample {
  Span<T> span;    // values after the absolute value, with their costs
  T* ratio;        // u, in the same order
  Extent extent;
  bool complete;

  double unit() const { return static_cast<double>(span.cost); }
  // Where the budget runs out.
  RadixDescent<T> descend(double budget, double* histogram) const {
    const auto at = [this](int64_t i) { return ratio[i]; };
    if (span.costs == nullptr)
      return cpu::descend<T>(span.length, budget, histogram, at, [this](int64_t) { return unit(); });
    return cpu::descend<T>(span.length, budget, histogram, at, [this](int64_t i) { return span.costs[i]; });
  }
};

// What a survey collects where costs differ; where they do not, the ratio alone.
template <class T>
struct Priced {
  T ratio, cost;
};

template <class T>
class Problem {
 public:
  Problem(const Table& table, bool absolute, int threads, Arena& arena);

  int64_t length() const { return length_; }
  double total_cost() const { return total_cost_; }
  double clamped_budget(double budget) const;

  // Entries copied to the workspace: everything up to kSampleBytes, runs spread over the problem beyond.
  Sample<T> sample();
  Extent extent();
  Moments moments(const Logit<T>& logit);
  GradientSums gradient_sums(const Logit<T>& logit);

  // Counts above the window and collects within it, with the moments at `logit` in the same pass where it is given.
  // False when the candidates do not fit.
  bool survey(const Logit<T>* logit, const Window<T>& window, Moments* moments);
  // The exact hard cut from the last survey; false when the window does not hold it.
  bool cut_from_candidates(const Window<T>& window, double above, double budget, Cut<T>* cut);
  // The exact hard cut of a sample that is complete.
  Cut<T> cut_from_sample(const Sample<T>& sample, double budget);
  // The exact hard cut by radix over all entries: slower, always right.
  Cut<T> cut_by_radix(double budget);

  // Soft masks to output 0 and, where `cut` is given, hard masks to output 1. Returns the sum of a sigmoid(x).
  double write(const Logit<T>& logit, const Cut<T>* cut);
  void write_hard(const Cut<T>& cut);
  void write_gradient(const Logit<T>& logit, T r);

 private:
  struct Part {
    Span<T> span;
    const TableRow* row;
    int64_t first_index, first_chunk;
  };

  template <class F>
  void for_chunks(F&& f);
  template <class R, class F>
  R reduce(F&& f);
  template <class F>
  void each_ratio(const Part& part, int64_t from, int64_t to, F&& f);
  template <class F>
  void split_at(const Cut<T>& cut, const Part& part, int64_t offset, int64_t length, F&& f);
  RadixDescent<T> descend_candidates(double budget);
  Cut<T> tie_cut(T ratio, double remaining);
  T cost_at(const Part& part, int64_t offset) const {
    return part.span.costs != nullptr ? part.span.costs[offset] : part.span.cost;
  }

 public:
  double* histogram() {
    if (histograms_ == nullptr) histograms_ = arena_.template take<double>(kHistogramWorkers * kRadixBins);
    return histograms_;
  }

 private:

  const SoftTopkPasses<T>& passes_;
  Arena& arena_;
  Part* parts_;
  int64_t n_parts_, length_ = 0, chunk_length_, chunks_ = 0;
  int threads_;
  double total_cost_ = 0;
  bool array_costs_ = false, one_cost_ = true;
  void* partials_;
  double* histograms_ = nullptr;
  void* candidates_ = nullptr;  // T, or Priced<T> where costs differ
  int64_t candidate_capacity_ = 0, candidate_count_ = 0;
};

int64_t workspace_bytes(int64_t parts, int64_t length, int element_size);

// `budget` within [0, total]; throws where it is outside by more than rounding.
double clamp_budget(double budget, double total);

[[noreturn]] inline void refuse_values() {
  throw std::invalid_argument("values must be finite; some entries are NaN or infinite");
}

}  // namespace spartan::cpu
