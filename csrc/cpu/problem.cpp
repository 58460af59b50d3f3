#include "problem.h"

#include <cstring>

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

// Gathers what the threads' sinks flush. Past the capacity only the count goes on: the window was too wide.
template <class T>
struct Collector {
  void* out;
  bool priced;
  int64_t capacity;
  std::atomic<int64_t> count{0};

  static void flush(Sink<T>* sink) {
    auto* self = static_cast<Collector*>(sink->context);
    const int64_t at = self->count.fetch_add(sink->count, std::memory_order_relaxed);
    const int64_t room = std::clamp<int64_t>(self->capacity - at, 0, sink->count);
    for (int64_t i = 0; i < room; ++i) {
      if (self->priced)
        static_cast<Priced<T>*>(self->out)[at + i] = {sink->ratio[i], sink->cost[i]};
      else
        static_cast<T*>(self->out)[at + i] = sink->ratio[i];
    }
    sink->count = 0;
  }
};

}  // namespace

int64_t workspace_bytes(int64_t parts, int64_t length, int element_size) {
  const int64_t chunks = length / chunk_length_for(length) + parts;
  const int64_t whole = length * element_size;
  int64_t bytes = parts * 128 + chunks * kPartialBytes + 3 * std::min(whole, kSampleBytes);
  bytes += kHistogramWorkers * kRadixBins * static_cast<int64_t>(sizeof(double));
  if (whole > kSampleBytes) bytes += kCandidateBytes;
  return bytes + 1024;
}

double clamp_budget(double budget, double total) {
  constexpr double kSlack = 1e-6;  // the rounding of a float32 sum of costs
  if (!(budget >= 0 && budget <= total * (1 + kSlack))) {
    throw std::invalid_argument("budget must be in [0, " + std::to_string(total) + "], the sum of the costs; got " +
                                std::to_string(budget));
  }
  constexpr double kRounding = 1e-12;  // of a float64 sum in another order
  return budget >= total * (1 - kRounding) ? total : budget;
}

template <class T>
Problem<T>::Problem(const Table& table, bool absolute, int threads, Arena& arena)
    : passes_(soft_topk_passes<T>()), arena_(arena), n_parts_(table.count), threads_(threads) {
  static_assert(sizeof(Part) <= 128);
  parts_ = arena.take<Part>(n_parts_);
  for (int64_t p = 0; p < n_parts_; ++p) length_ += table.rows[p].length;
  chunk_length_ = chunk_length_for(length_);
  int64_t first_index = 0;
  for (int64_t p = 0; p < n_parts_; ++p) {
    const TableRow& row = table.rows[p];
    parts_[p] = {{static_cast<const T*>(row.values), static_cast<const T*>(row.costs), static_cast<T>(row.cost),
                  row.length, absolute},
                 &row, first_index, chunks_};
    first_index += row.length;
    chunks_ += (row.length + chunk_length_ - 1) / chunk_length_;
    array_costs_ |= row.costs != nullptr;
    one_cost_ &= row.costs == nullptr && row.cost == table.rows[0].cost;
    if (row.costs == nullptr) {
      if (!(row.cost > 0 && row.cost < INFINITY))
        throw std::invalid_argument("costs must be finite and positive; got " + std::to_string(row.cost));
      total_cost_ += static_cast<double>(static_cast<T>(row.cost)) * static_cast<double>(row.length);
    }
  }
  partials_ = arena.take<char>(chunks_ * kPartialBytes);
  if (!array_costs_) return;
  const Extent all = extent();
  if (!(all.lowest_cost > 0 && all.cost < INFINITY) || std::isnan(all.cost))
    throw std::invalid_argument("costs must be finite and positive; the smallest is " + std::to_string(all.lowest_cost));
  if (std::isnan(all.poison)) refuse_values();
  total_cost_ = all.cost;
}

template <class T>
double Problem<T>::clamped_budget(double budget) const {
  return clamp_budget(budget, total_cost_);
}

template <class T>
template <class F>
void Problem<T>::for_chunks(F&& f) {
  parallel_for(threads_, chunks_, [&](int64_t chunk) {
    const Part* part = std::upper_bound(parts_, parts_ + n_parts_, chunk,
                                        [](int64_t c, const Part& p) { return c < p.first_chunk; }) - 1;
    // empty parts share their successor's first chunk; upper_bound lands on the last of them, which is not empty
    const int64_t offset = (chunk - part->first_chunk) * chunk_length_;
    f(chunk, *part, offset, std::min(chunk_length_, part->span.length - offset));
  });
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
template <class R, class F>
R Problem<T>::reduce(F&& f) {
  static_assert(sizeof(R) <= kPartialBytes);
  R* partials = static_cast<R*>(partials_);
  for_chunks([&](int64_t chunk, const Part& part, int64_t offset, int64_t length) {
    new (partials + chunk) R(f(part, offset, piece(part.span, offset, length)));
  });
  R total{};
  for (int64_t chunk = 0; chunk < chunks_; ++chunk) total += partials[chunk];
  return total;
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
  return reduce<GradientSums>([&](const Part& part, int64_t offset, const Span<T>& span) {
    return passes_.gradient_sums(span, static_cast<const T*>(part.row->extra[0]) + offset, logit);
  });
}

template <class T>
Sample<T> Problem<T>::sample() {
  const int64_t limit = std::min<int64_t>(length_, kSampleBytes / sizeof(T));
  T* values = arena_.take<T>(limit);
  T* costs = one_cost_ ? nullptr : arena_.take<T>(limit);
  int64_t count = 0;
  const auto add = [&](const Part& part, int64_t offset, int64_t length) {
    const Span<T> raw{part.span.values + offset, nullptr, T(1), length, part.span.absolute};
    passes_.ratio(raw, values + count);
    if (costs != nullptr)
      for (int64_t i = 0; i < length; ++i) costs[count + i] = cost_at(part, offset + i);
    count += length;
  };
  if (limit == length_) {
    for (int64_t p = 0; p < n_parts_; ++p) add(parts_[p], 0, parts_[p].span.length);
  } else {
    const int64_t runs = limit / kRun;
    const double stride = static_cast<double>(length_) / static_cast<double>(runs);
    const Part* part = parts_;
    for (int64_t run = 0; run < runs; ++run) {
      const double slack = static_cast<double>(scramble(static_cast<uint64_t>(run)) >> 11) * 0x1p-53;
      const int64_t index = std::min(static_cast<int64_t>((static_cast<double>(run) + slack) * stride), length_ - 1);
      while (index >= part->first_index + part->span.length) ++part;
      const int64_t offset = index - part->first_index;
      add(*part, offset, std::min(kRun, part->span.length - offset));
    }
  }
  const T unit = one_cost_ && n_parts_ > 0 ? parts_[0].span.cost : T(1);
  Sample<T> out{{values, costs, unit, count, false}, values, {}, limit == length_};
  if (costs != nullptr || unit != T(1)) {
    out.ratio = arena_.take<T>(limit);
    passes_.ratio(out.span, out.ratio);
  }
  out.extent = passes_.extent(out.span);
  if (std::isnan(out.extent.poison)) refuse_values();
  return out;
}

template <class T>
bool Problem<T>::survey(const Logit<T>* logit, const Window<T>& window, Moments* moments) {
  if (candidates_ == nullptr) {
    candidates_ = arena_.take<char>(kCandidateBytes);
    candidate_capacity_ = kCandidateBytes / static_cast<int64_t>(one_cost_ ? sizeof(T) : sizeof(Priced<T>));
  }
  Collector<T> collector{candidates_, !one_cost_, candidate_capacity_};
  *moments = reduce<Moments>([&](const Part&, int64_t, const Span<T>& span) {
    Sink<T> sink;
    sink.flush = Collector<T>::flush;
    sink.context = &collector;
    const Moments found =
        logit != nullptr ? passes_.survey(span, *logit, window, &sink) : passes_.count(span, window, &sink);
    Collector<T>::flush(&sink);
    return found;
  });
  if (std::isnan(moments->poison)) refuse_values();
  candidate_count_ = collector.count.load();
  return candidate_count_ <= candidate_capacity_;
}

template <class T>
bool Problem<T>::cut_from_candidates(const Window<T>& window, double above, double budget, Cut<T>* cut) {
  if (candidate_count_ > candidate_capacity_ || above > budget) return false;
  const RadixDescent<T> radix = descend_candidates(budget - above);
  if (radix.everything) {
    // the budget outlasts the window: that decides only when nothing lies below it
    if (window.low != -std::numeric_limits<T>::infinity()) return false;
    *cut = Cut<T>::everything();
    return true;
  }
  const double remaining = budget - above - radix.spent;
  // When not even one of the entries at the threshold fits, which one comes first does not matter.
  *cut = one_cost_ && remaining < static_cast<double>(parts_[0].span.cost) ? Cut<T>{radix.ratio(), -1}
                                                                            : tie_cut(radix.ratio(), remaining);
  return true;
}

template <class T>
RadixDescent<T> Problem<T>::descend_candidates(double budget) {
  if (one_cost_) {
    const T* ratios = static_cast<const T*>(candidates_);
    const double unit = static_cast<double>(parts_[0].span.cost);
    return descend<T>(
        candidate_count_, budget, histogram(), [&](int64_t i) { return ratios[i]; }, [&](int64_t) { return unit; });
  }
  // Threads append in no fixed order, and a sum of unequal costs must not depend on it.
  auto* priced = static_cast<Priced<T>*>(candidates_);
  std::sort(priced, priced + candidate_count_, [](const Priced<T>& x, const Priced<T>& y) {
    return x.cost != y.cost ? x.cost < y.cost : x.ratio < y.ratio;
  });
  return descend<T>(
      candidate_count_, budget, histogram(), [&](int64_t i) { return priced[i].ratio; },
      [&](int64_t i) { return priced[i].cost; });
}

template <class T>
Cut<T> Problem<T>::cut_from_sample(const Sample<T>& sample, double budget) {
  const RadixDescent<T> radix = sample.descend(budget, histogram());
  if (radix.everything) return Cut<T>::everything();
  Cut<T> cut{radix.ratio(), -1};
  double remaining = budget - radix.spent;
  for (int64_t i = 0; i < sample.span.length; ++i) {
    if (sample.ratio[i] != cut.ratio) continue;
    remaining -= sample.span.costs != nullptr ? static_cast<double>(sample.span.costs[i]) : sample.unit();
    if (remaining < 0) break;
    cut.index = i;
  }
  return cut;
}

template <class T>
Cut<T> Problem<T>::cut_by_radix(double budget) {
  double* histograms = histogram();
  RadixDescent<T> radix(budget);
  while (!radix.finished()) {
    std::memset(histograms, 0, kHistogramWorkers * kRadixBins * sizeof(double));
    parallel_for(threads_, kHistogramWorkers, [&](int64_t worker) {
      double* bins = histograms + worker * kRadixBins;
      const int64_t begin = length_ * worker / kHistogramWorkers, end = length_ * (worker + 1) / kHistogramWorkers;
      for (int64_t p = 0; p < n_parts_; ++p) {
        const Part& part = parts_[p];
        const int64_t from = std::max(begin - part.first_index, int64_t(0));
        each_ratio(part, from, std::min(end - part.first_index, part.span.length), [&](int64_t offset, T ratio) {
          const auto key = key_of(ratio);
          if (radix.matches(key)) bins[radix.bin(key)] += static_cast<double>(cost_at(part, offset));
          return true;
        });
      }
    });
    for (int64_t worker = 1; worker < kHistogramWorkers; ++worker)
      for (int b = 0; b < kRadixBins; ++b) histograms[b] += histograms[worker * kRadixBins + b];
    radix.narrow(histograms);
  }
  if (radix.everything) return Cut<T>::everything();
  return tie_cut(radix.ratio(), budget - radix.spent);
}

// Calls f(offset, u) for the entries [from, to) of a part until it returns false.
template <class T>
template <class F>
void Problem<T>::each_ratio(const Part& part, int64_t from, int64_t to, F&& f) {
  constexpr int64_t kBuffer = 512;
  T ratio[kBuffer];
  for (int64_t i = from; i < to; i += kBuffer) {
    const int64_t count = std::min(kBuffer, to - i);
    passes_.ratio(piece(part.span, i, count), ratio);
    for (int64_t j = 0; j < count; ++j)
      if (!f(i + j, ratio[j])) return;
  }
}

// How far the remaining budget reaches among the entries that equal the threshold, in the order of their index.
template <class T>
Cut<T> Problem<T>::tie_cut(T ratio, double remaining) {
  double* sums = static_cast<double*>(partials_);
  for_chunks([&](int64_t chunk, const Part& part, int64_t offset, int64_t length) {
    sums[chunk] = passes_.tied(piece(part.span, offset, length), ratio);
  });
  int64_t last = 0;
  while (last < chunks_ && sums[last] <= remaining) remaining -= sums[last++];
  if (last == chunks_) return {ratio, std::numeric_limits<int64_t>::max()};
  const Part* part = parts_ + n_parts_ - 1;
  while (part->first_chunk > last || part->span.length == 0) --part;
  const int64_t offset = (last - part->first_chunk) * chunk_length_;
  Cut<T> cut{ratio, part->first_index + offset - 1};
  each_ratio(*part, offset, std::min(offset + chunk_length_, part->span.length), [&](int64_t at, T u) {
    if (u == ratio) remaining -= static_cast<double>(cost_at(*part, at));
    if (remaining < 0) return false;
    cut.index = part->first_index + at;
    return true;
  });
  return cut;
}

// Calls f(offset, length, hard_from) on the stretches of a chunk before and after the cut's index: u >= hard_from is kept.
template <class T>
template <class F>
void Problem<T>::split_at(const Cut<T>& cut, const Part& part, int64_t offset, int64_t length, F&& f) {
  const int64_t first = part.first_index + offset;
  const int64_t inclusive = cut.index < first ? 0 : std::min(length - 1, cut.index - first) + 1;
  if (inclusive > 0) f(offset, inclusive, cut.ratio);
  if (inclusive < length)
    f(offset + inclusive, length - inclusive, std::nextafter(cut.ratio, std::numeric_limits<T>::infinity()));
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
  const bool past_cache = length_ * static_cast<int64_t>(sizeof(T)) > kCacheBytes;
  return reduce<Total>([&](const Part& part, int64_t offset, const Span<T>& span) {
           T* soft = static_cast<T*>(part.row->extra[0]);
           if (cut == nullptr) return Total{passes_.write(span, logit, T(0), soft + offset, nullptr, past_cache)};
           Total sum;
           uint8_t* hard = static_cast<uint8_t*>(part.row->extra[1]);
           split_at(*cut, part, offset, span.length, [&](int64_t at, int64_t length, T hard_from) {
             sum.value += passes_.write(piece(part.span, at, length), logit, hard_from, soft + at, hard + at, past_cache);
           });
           return sum;
         })
      .value;
}

template <class T>
void Problem<T>::write_hard(const Cut<T>& cut) {
  for_chunks([&](int64_t, const Part& part, int64_t offset, int64_t length) {
    uint8_t* hard = static_cast<uint8_t*>(part.row->extra[0]);
    split_at(cut, part, offset, length, [&](int64_t at, int64_t count, T hard_from) {
      passes_.write_hard(piece(part.span, at, count), hard_from, hard + at);
    });
  });
}

template <class T>
void Problem<T>::write_gradient(const Logit<T>& logit, T r) {
  for_chunks([&](int64_t, const Part& part, int64_t offset, int64_t length) {
    T* grad_costs = static_cast<T*>(part.row->extra[2]);
    passes_.gradient(piece(part.span, offset, length), static_cast<const T*>(part.row->extra[0]) + offset, logit, r,
                     static_cast<T*>(part.row->extra[1]) + offset, grad_costs != nullptr ? grad_costs + offset : nullptr);
  });
}

template class Problem<float>;
template class Problem<double>;

}  // namespace spartan::cpu
