#include "problem.h"

#include <cstring>

#include "dispatch.h"
#include "huge_pages.h"

namespace spartan::cpu {
namespace {

int64_t chunk_length_for(int64_t length) {
  const int64_t even = (length + kMaxChunks - 1) / kMaxChunks;
  return std::max(kMinChunk, (even + 63) & ~int64_t(63));
}

// Scrambles a counter (splitmix64), so that the sample cannot fall in step with a period in the data.
uint64_t scramble(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

constexpr int64_t kLeastStreamed = 4096;  // entries: waiting for stores around the cache costs more than it saves below

// What the ranks tell each other first.
struct Share {
  int64_t length = 0, instruction_set = 0;
  double cost = 0, lowest_cost = INFINITY, poison = 0, unit = 1;
  int64_t one_cost = 1;
};

}  // namespace

int64_t workspace_bytes(int64_t parts, int64_t length, int element_size, bool grouped) {
  const int64_t chunks = length / chunk_length_for(length) + parts;
  const int64_t whole = grouped ? INT64_MAX : length * element_size;
  const int64_t sample = (grouped ? 5 : 3) * std::min(whole, kSampleBytes);
  int64_t bytes = parts * 64 + chunks * kPartialBytes;
  bytes += kHistogramWorkers * kRadixBins * static_cast<int64_t>(sizeof(double));
  return bytes + std::max(sample, whole > kSampleBytes ? kCandidateBytes : 0) + 1024;
}

double clamp_budget(double budget, double total) {
  constexpr double kSlack = 1e-6;  // the rounding of a float32 sum of costs
  if (!(budget >= 0 && budget <= total * (1 + kSlack))) {
    throw std::invalid_argument("budget must be in [0, " + std::to_string(total) +
                                "], the sum of the costs of entries that are not -inf; got " + std::to_string(budget));
  }
  constexpr double kRounding = 1e-12;  // of a float64 sum in another order
  return budget >= total * (1 - kRounding) ? total : budget;
}

template <class T>
Problem<T>::Problem(Dtype dtype, const Table& table, bool absolute, bool checked, int threads, const Group& group,
                    Arena& arena)
    : passes_(soft_topk_passes<T>()), storage_(dtype), group_(group), arena_(arena), absolute_(absolute),
      parts_(arena.take<Part>(table.count)), n_parts_(table.count), threads_(threads) {
  static_assert(sizeof(Part) <= 64);
  for (int64_t p = 0; p < n_parts_; ++p) own_length_ += table.rows[p].length;
  chunk_length_ = chunk_length_for(own_length_);
  for (int64_t p = 0; p < n_parts_; ++p) {
    const TableRow& row = table.rows[p];
    parts_[p] = {&row, static_cast<T>(row.cost), length_, chunks_};
    length_ += row.length;
    chunks_ += (row.length + chunk_length_ - 1) / chunk_length_;
  }
  partials_ = arena.take<char>(chunks_ * kPartialBytes);
  histograms_ = arena.take<double>(kHistogramWorkers * kRadixBins);
  if (!checked) check_costs();
}

// The sums over all ranks of what is fixed from the start.
template <class T>
void Problem<T>::check_costs() {
  Share own;
  own.length = own_length_;
  own.instruction_set = static_cast<int64_t>(isa());
  if (n_parts_ > 0) own.unit = static_cast<double>(parts_[0].unit);
  bool arrays = false;
  for (const Part* part = parts_; part < parts_ + n_parts_; ++part) {
    const double unit = static_cast<double>(part->unit);
    arrays |= part->row->costs != nullptr;
    own.one_cost &= part->row->costs == nullptr && unit == own.unit;
    own.lowest_cost = std::min(own.lowest_cost, unit);
    own.cost += unit * static_cast<double>(part->row->length);
  }
  if (arrays) {
    const Extent all = reduce_own<Extent>([&](const Part&, int64_t, const Span<T>& span) { return passes_.extent(span); });
    own.cost = all.cost, own.lowest_cost = all.lowest_cost, own.poison = all.poison;
  }
  const Share* shares = &own;
  if (grouped()) shares = static_cast<const Share*>(group_.gather(group_.context, &own, sizeof own));
  double lowest = INFINITY, poison = 0;
  int64_t before = 0;
  length_ = 0;
  for (int rank = 0; rank < group_.size; ++rank) {
    const Share& share = shares[rank];
    if (rank == group_.rank) before = length_;
    length_ += share.length;
    total_cost_ += share.cost;
    lowest = std::min(lowest, share.lowest_cost);
    poison += share.poison;
    one_cost_ &= share.one_cost != 0 && share.unit == shares[0].unit;
    if (share.instruction_set != shares[0].instruction_set)
      throw std::runtime_error("the ranks of group must run on one instruction set; set SPARTAN_ISA to the lowest");
  }
  for (int64_t p = 0; p < n_parts_; ++p) parts_[p].first_index += before;
  if (!(lowest > 0 && total_cost_ < INFINITY))
    throw std::invalid_argument("costs must be finite and positive; the smallest is " + std::to_string(lowest));
  if (std::isnan(poison)) refuse_values();
}

template <class T>
void Problem<T>::require_agreement(const Agreed& own) const {
  const Agreed* all = &own;
  if (grouped()) all = static_cast<const Agreed*>(group_.gather(group_.context, &own, sizeof own));
  for (int rank = 0; rank < group_.size; ++rank)
    if (!(all[rank].beta >= 0 && all[rank].beta < INFINITY))
      throw std::invalid_argument("beta must be finite and at least 0; got " + std::to_string(all[rank].beta));
  const auto same = [&](const char* what, double Agreed::* member) {
    for (int rank = 1; rank < group_.size; ++rank)
      if (all[rank].*member != all[0].*member)
        throw std::invalid_argument(std::string(what) + " must be the same on every rank of group; got " +
                                    std::to_string(all[0].*member) + " on rank 0, " + std::to_string(all[rank].*member) +
                                    " on rank " + std::to_string(rank));
  };
  same("budget", &Agreed::budget);
  same("beta", &Agreed::beta);
  same("state", &Agreed::solves);
  same("state", &Agreed::soft);
}

template <class T>
double Problem<T>::clamped_budget(double budget) const {
  return clamp_budget(budget, total_cost_);
}

template <class T>
Extent Problem<T>::extent() {
  return reduce<Extent>([&](const Part&, int64_t, const Span<T>& span) { return passes_.extent(span); });
}

template <class T>
Moments Problem<T>::moments(const Logit<T>& logit) {
  return reduce<Moments>([&](const Part&, int64_t, const Span<T>& span) { return passes_.moments(span, logit); });
}

template <class T>
GradientSums Problem<T>::gradient_sums(const Logit<T>& logit) {
  return reduce<GradientSums>([&](const Part& part, int64_t at, const Span<T>& span) {
    T buffer[kBuffer];
    return passes_.gradient_sums(span, storage_.read(part.row->extra[0], at, span.length, buffer), logit);
  });
}

// Copies `limit` entries of this rank, all or runs spread evenly, with their costs where wanted; returns how many.
template <class T>
int64_t Problem<T>::own_sample(int64_t limit, T* values, T* costs) const {
  int64_t count = 0;
  const auto add = [&](const Part& part, int64_t offset, int64_t length) {
    for_runs(part, offset, length, length, [&](int64_t, const Span<T>& span) {
      passes_.ratio({span.values, nullptr, T(1), span.length, absolute_}, values + count);
      if (costs != nullptr)
        for (int64_t i = 0; i < span.length; ++i) costs[count + i] = span.costs != nullptr ? span.costs[i] : span.cost;
      count += span.length;
    });
  };
  if (limit == own_length_) {
    for (int64_t p = 0; p < n_parts_; ++p) add(parts_[p], 0, parts_[p].row->length);
    return count;
  }
  const int64_t runs = limit / kRun;
  const double stride = static_cast<double>(own_length_) / static_cast<double>(runs);
  const Part* part = parts_;
  for (int64_t run = 0; run < runs; ++run) {
    const double slack = static_cast<double>(scramble(static_cast<uint64_t>(run)) >> 11) * 0x1p-53;
    const int64_t index =
        parts_[0].first_index + std::min(static_cast<int64_t>((static_cast<double>(run) + slack) * stride), own_length_ - 1);
    while (index >= part->first_index + part->row->length) ++part;
    const int64_t offset = index - part->first_index;
    add(*part, offset, std::min(kRun, part->row->length - offset));
  }
  return count;
}

// The samples of all ranks, each in proportion to its length, one after the other.
template <class T>
int64_t Problem<T>::gather_sample(int64_t limit, T* values, T* costs) {
  const double part = static_cast<double>(own_length_) / static_cast<double>(length_);
  const int64_t share =
      limit == length_ ? own_length_ : static_cast<int64_t>(part * static_cast<double>(limit)) / kRun * kRun;
  T* own[2] = {arena_.take<T>(limit), costs != nullptr ? arena_.take<T>(limit) : nullptr};
  const int64_t own_count = own_sample(share, own[0], own[1]);
  const auto* gathered = static_cast<const int64_t*>(group_.gather(group_.context, &own_count, sizeof own_count));
  int64_t longest = 0, total = 0;
  int64_t* counts = reinterpret_cast<int64_t*>(histograms_);  // not in use yet
  for (int rank = 0; rank < group_.size; ++rank) {
    counts[rank] = gathered[rank];
    longest = std::max(longest, counts[rank]);
    total += counts[rank];
  }
  for (int column = 0; column < (costs != nullptr ? 2 : 1); ++column) {
    std::fill(own[column] + own_count, own[column] + longest, T(0));
    const auto* all =
        static_cast<const T*>(group_.gather(group_.context, own[column], longest * static_cast<int64_t>(sizeof(T))));
    T* out = column == 0 ? values : costs;
    for (int rank = 0; rank < group_.size; out += counts[rank++]) std::copy_n(all + rank * longest, counts[rank], out);
  }
  return total;
}

template <class T>
Sample<T> Problem<T>::sample() {
  if (candidates_ != nullptr) arena_.release(static_cast<char*>(candidates_));  // they share one place
  candidates_ = nullptr;
  char* mark = arena_.mark();
  const int64_t limit = std::min<int64_t>(length_, kSampleBytes / sizeof(T));
  T* values = arena_.take<T>(limit);
  T* costs = one_cost_ ? nullptr : arena_.take<T>(limit);
  const int64_t count = grouped() ? gather_sample(limit, values, costs) : own_sample(limit, values, costs);
  const T unit = one_cost_ && n_parts_ > 0 ? parts_[0].unit : T(1);
  Sample<T> out{{values, costs, unit, count, false}, values, {}, limit == length_, mark};
  if (costs != nullptr || unit != T(1)) {
    out.ratio = arena_.take<T>(limit);
    passes_.ratio(out.span, out.ratio);
  }
  out.extent = passes_.extent(out.span);
  if (std::isnan(out.extent.poison)) refuse_values();
  return out;
}

// Calls f(offset, length, hard_from) on the stretches of a run before and after the cut's index: u >= hard_from is kept.
template <class T>
template <class F>
void Problem<T>::split_at(const Cut<T>& cut, int64_t first_index, int64_t length, F&& f) {
  const int64_t inclusive = cut.index < first_index ? 0 : std::min(length - 1, cut.index - first_index) + 1;
  if (inclusive > 0) f(0, inclusive, cut.ratio);
  if (inclusive < length)
    f(inclusive, length - inclusive, std::nextafter(cut.ratio, std::numeric_limits<T>::infinity()));
}

struct Total {
  double value = 0;
  Total& operator+=(const Total& o) {
    value += o.value;
    return *this;
  }
};

template <class T>
double Problem<T>::write(const Logit<T>& logit, const Cut<T>* cut) {
  const bool past_cache = own_length_ * storage_.bytes() > kCacheBytes;
  const bool around = past_cache && storage_.direct();
  if (cut == nullptr) advise_fresh(0, storage_.bytes());  // masks of a training step are the caller's own
  return reduce<Total>([&](const Part& part, int64_t at, const Span<T>& span) {
           T buffer[kBuffer];
           T* soft = storage_.target(part.row->extra[0], at, buffer);  // null: it is only summed
           Total sum;
           if (cut == nullptr) {
             sum.value = passes_.write(span, logit, T(0), soft, nullptr, around);
           } else {
             uint8_t* hard = static_cast<uint8_t*>(part.row->extra[1]) + at;
             split_at(*cut, part.first_index + at, span.length, [&](int64_t offset, int64_t length, T hard_from) {
               sum.value +=
                   passes_.write(piece(span, offset, length), logit, hard_from, soft == nullptr ? nullptr : soft + offset,
                                 hard + offset, around && length >= kLeastStreamed);
             });
           }
           storage_.put(soft, span.length, part.row->extra[0], at, past_cache);
           return sum;
         })
      .value;
}

// Outputs that nobody has touched yet.
template <class T>
void Problem<T>::advise_fresh(int output, int64_t bytes) const {
  for (const Part* part = parts_; part < parts_ + n_parts_; ++part)
    advise_huge_pages(part->row->extra[output], part->row->length * bytes);
}

template <class T>
void Problem<T>::write_hard(const Cut<T>& cut) {
  advise_fresh(0, 1);
  for_chunks([&](int64_t, const Part& part, int64_t offset, int64_t length) {
    for_runs(part, offset, length, length, [&](int64_t at, const Span<T>& span) {
      uint8_t* hard = static_cast<uint8_t*>(part.row->extra[0]) + at;
      split_at(cut, part.first_index + at, span.length, [&](int64_t from, int64_t count, T hard_from) {
        passes_.write_hard(piece(span, from, count), hard_from, hard + from);
      });
    });
  });
}

template <class T>
void Problem<T>::write_gradient(const Logit<T>& logit, T r) {
  const bool past_cache = own_length_ * storage_.bytes() > kCacheBytes;
  advise_fresh(1, storage_.bytes());
  for_chunks([&](int64_t, const Part& part, int64_t offset, int64_t length) {
    for_runs(part, offset, length, length, [&](int64_t at, const Span<T>& span) {
      T buffers[3][kBuffer];
      void* const* extra = part.row->extra;
      T* grad_values = storage_.target(extra[1], at, buffers[1]);
      T* grad_costs = storage_.target(extra[2], at, buffers[2]);
      passes_.gradient(span, storage_.read(extra[0], at, span.length, buffers[0]), logit, r, grad_values, grad_costs,
                       past_cache && storage_.direct());
      storage_.put(grad_values, span.length, extra[1], at, past_cache);
      storage_.put(grad_costs, span.length, extra[2], at, past_cache);
    });
  });
}

template class Problem<float>;
template class Problem<double>;

}  // namespace spartan::cpu
