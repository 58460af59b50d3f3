// A list of tensors that share one budget, walked in chunks of fixed size so that results do not depend on the threads.
// Of a group, each rank holds its own list; whatever is decided is decided on sums over all ranks, the same on each.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#include "arena.h"
#include "parallel.h"
#include "selection.h"
#include "soft_topk_passes.h"
#include "storage_passes.h"
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

// Entries copied out of the problem: all of it when it is small, else a fixed sample. Over a group, of all ranks.
template <class T>
struct Sample {
  Span<T> span;    // values after the absolute value, with their costs
  T* ratio;        // u, in the same order
  Extent extent;
  bool complete;
  char* mark;      // of the arena, before it

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

// What every rank must have been given alike.
struct Agreed {
  double budget = 0, beta = 0, solves = 0, soft = 0;
};

template <class T>
class Problem {
 public:
  // `checked`: the costs are known to be good, and their sum is not needed.
  Problem(Dtype dtype, const Table& table, bool absolute, bool checked, int threads, const Group& group, Arena& arena);

  // Of all ranks.
  int64_t length() const { return length_; }
  double total_cost() const { return total_cost_; }
  double clamped_budget(double budget) const;
  // Throws, on every rank, where one has a bad beta or they were called differently.
  void require_agreement(const Agreed& own) const;

  // Entries copied to the workspace: everything up to kSampleBytes, runs spread over the problem beyond.
  Sample<T> sample();
  void forget(const Sample<T>& sample) { arena_.release(sample.mark); }
  Extent extent();
  Moments moments(const Logit<T>& logit);
  GradientSums gradient_sums(const Logit<T>& logit);

  // Counts above the window and collects within it, with the moments at `logit` in the same pass where it is given.
  // False when the candidates do not fit.
  bool survey(const Logit<T>* logit, const Window<T>& window, Moments* moments);
  // How many candidates fit.
  int64_t candidate_capacity() const { return kCandidateBytes / static_cast<int64_t>(one_cost_ ? sizeof(T) : sizeof(Priced<T>)); }
  // A survey that counts the window's entries by bins of it instead, and leaves the bin in which the budget runs out as the
  // window; false when that is in none.
  bool narrow(const Logit<T>* logit, double budget, Window<T>* window, Moments* moments);
  // The exact hard cut if it lies within the window: surveyed, and narrowed for as long as its candidates do not fit.
  bool cut_within(Window<T> window, double budget, Cut<T>* cut);
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

  double* histogram() { return histograms_; }

 private:
  struct Part {
    const TableRow* row;
    T unit;
    int64_t first_index, first_chunk;  // the index counts through all ranks
  };
  // Room for a run of entries that are stored in fewer bits.
  struct Buffers {
    T values[kBuffer], costs[kBuffer];
  };

  Span<T> span(const Part& part, int64_t at, int64_t count, Buffers* buffers) const;
  template <class F>
  void for_chunks(F&& f);
  template <class F>
  void for_runs(const Part& part, int64_t offset, int64_t length, int64_t longest, F&& f) const;
  template <class R, class F>
  R reduce_own(F&& f);
  template <class R, class F>
  R reduce(F&& f) {
    return across(reduce_own<R>(f));
  }
  template <class R>
  R across(const R& own) const;
  template <class F>
  void each_entry(const Part& part, int64_t from, int64_t to, F&& f) const;
  template <class F>
  void split_at(const Cut<T>& cut, int64_t first_index, int64_t length, F&& f);

  void advise_fresh(int output, int64_t bytes) const;
  void check_costs();
  int64_t own_sample(int64_t limit, T* values, T* costs) const;
  int64_t gather_sample(int64_t limit, T* values, T* costs);
  void merge_histogram(double* histogram) const;
  template <class Gatherer>
  Moments survey_into(Gatherer* gatherer, const Logit<T>* logit, const Window<T>& window);
  RadixDescent<T> descend_candidates(double budget);
  Cut<T> tie_cut(T ratio, double remaining);
  bool grouped() const { return group_.size > 1; }

  const SoftTopkPasses<T>& passes_;
  Storage<T> storage_;
  Group group_;
  Arena& arena_;
  bool absolute_;
  Part* parts_;
  int64_t n_parts_, length_ = 0, own_length_ = 0, chunk_length_, chunks_ = 0;
  int threads_;
  double total_cost_ = 0;
  bool one_cost_ = true;
  void* partials_;
  double* histograms_;
  void* candidates_ = nullptr;  // T, or Priced<T> where costs differ
  int64_t candidate_count_ = 0;
};

// `budget` within [0, total]; throws where it is outside by more than rounding.
double clamp_budget(double budget, double total);

[[noreturn]] inline void refuse_values() {
  throw NotFinite("values must be finite, or -inf to be masked; some entries are NaN or +inf");
}

template <class T>
Span<T> piece(const Span<T>& span, int64_t offset, int64_t length) {
  Span<T> sub = span;
  sub.values += offset;
  if (sub.costs != nullptr) sub.costs += offset;
  sub.length = length;
  return sub;
}

template <class T>
Span<T> Problem<T>::span(const Part& part, int64_t at, int64_t count, Buffers* buffers) const {
  return {storage_.read(part.row->values, at, count, buffers->values),
          storage_.read(part.row->costs, at, count, buffers->costs), part.unit, count, absolute_};
}

// Calls f(chunk, part, offset, length) for every chunk, in parallel.
template <class T>
template <class F>
void Problem<T>::for_chunks(F&& f) {
  parallel_for(threads_, chunks_, [&](int64_t chunk) {
    const Part* part = std::upper_bound(parts_, parts_ + n_parts_, chunk,
                                        [](int64_t c, const Part& p) { return c < p.first_chunk; }) - 1;
    // empty parts share their successor's first chunk; upper_bound lands on the last of them, which is not empty
    const int64_t offset = (chunk - part->first_chunk) * chunk_length_;
    f(chunk, *part, offset, std::min(chunk_length_, part->row->length - offset));
  });
}

// Calls f(at, span) for runs of at most `longest` entries that cover a stretch of a part, or of what the buffers hold.
template <class T>
template <class F>
void Problem<T>::for_runs(const Part& part, int64_t offset, int64_t length, int64_t longest, F&& f) const {
  if (!storage_.direct()) longest = std::min(longest, kBuffer);
  Buffers buffers;
  for (int64_t at = offset; at < offset + length; at += longest)
    f(at, span(part, at, std::min(longest, offset + length - at), &buffers));
}

// The sum of f(part, at, span) over all runs of this rank, in one order.
template <class T>
template <class R, class F>
R Problem<T>::reduce_own(F&& f) {
  static_assert(sizeof(R) <= kPartialBytes);
  R* partials = static_cast<R*>(partials_);
  for_chunks([&](int64_t chunk, const Part& part, int64_t offset, int64_t length) {
    R sum{};
    for_runs(part, offset, length, length, [&](int64_t at, const Span<T>& span) { sum += f(part, at, span); });
    new (partials + chunk) R(sum);
  });
  R total{};
  for (int64_t chunk = 0; chunk < chunks_; ++chunk) total += partials[chunk];
  return total;
}

// The sum over the ranks, in their order: the same bits on each.
template <class T>
template <class R>
R Problem<T>::across(const R& own) const {
  if (!grouped()) return own;
  const R* all = static_cast<const R*>(group_.gather(group_.context, &own, sizeof(R)));
  R total{};
  for (int rank = 0; rank < group_.size; ++rank) total += all[rank];
  return total;
}

// Calls f(offset, u, a) for the entries [from, to) of a part until it returns false.
template <class T>
template <class F>
void Problem<T>::each_entry(const Part& part, int64_t from, int64_t to, F&& f) const {
  T ratio[kBuffer];
  bool more = true;
  for_runs(part, from, to - from, kBuffer, [&](int64_t at, const Span<T>& span) {
    if (!more) return;
    passes_.ratio(span, ratio);
    for (int64_t j = 0; more && j < span.length; ++j)
      more = f(at + j, ratio[j], span.costs != nullptr ? span.costs[j] : span.cost);
  });
}

}  // namespace spartan::cpu
