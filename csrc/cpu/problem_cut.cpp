#include <cstring>

#include "problem.h"

namespace spartan::cpu {
namespace {

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

// Bins of a window, of 2^shift keys each.
template <class T>
struct Bins {
  using Bits = typename Key<T>::Bits;
  Bits first, last;
  int shift = 0;

  explicit Bins(const Window<T>& window) : first(key_of(window.low)), last(key_of(window.high)) {
    while (((last - first) >> shift) >= kRadixBins) ++shift;
  }
  int bin(T ratio) const { return static_cast<int>((key_of(ratio) - first) >> shift); }
  Window<T> window(int bin) const {
    const Bits low = first + (static_cast<Bits>(bin) << shift), rest = last - low, size = (Bits(1) << shift) - 1;
    return {value_of<T>(low), value_of<T>(rest < size ? last : low + size)};
  }
};

// Adds up the costs of what the threads' sinks flush, by bin. They only say where to look: their order is free.
template <class T>
struct Binner {
  Bins<T> bins;
  double unit;  // 0: costs differ
  double* histogram;

  static void flush(Sink<T>* sink) {
    auto* self = static_cast<Binner*>(sink->context);
    for (int64_t i = 0; i < sink->count; ++i) {
      const double cost = self->unit > 0 ? self->unit : static_cast<double>(sink->cost[i]);
      std::atomic_ref<double>(self->histogram[self->bins.bin(sink->ratio[i])]).fetch_add(cost, std::memory_order_relaxed);
    }
    sink->count = 0;
  }
};

struct Found {
  Moments moments;
  double overflows = 0;  // ranks whose candidates did not fit

  Found& operator+=(const Found& o) {
    moments += o.moments, overflows += o.overflows;
    return *this;
  }
};

}  // namespace

template <class T>
template <class Gatherer>
Moments Problem<T>::survey_into(Gatherer* gatherer, const Logit<T>* logit, const Window<T>& window) {
  return reduce_own<Moments>([&](const Part&, int64_t, const Span<T>& span) {
    Sink<T> sink;
    sink.flush = Gatherer::flush;
    sink.context = gatherer;
    const Moments found =
        logit != nullptr ? passes_.survey(span, *logit, window, &sink) : passes_.count(span, window, &sink);
    if (sink.count > 0) Gatherer::flush(&sink);
    return found;
  });
}

template <class T>
bool Problem<T>::survey(const Logit<T>* logit, const Window<T>& window, Moments* moments) {
  if (candidates_ == nullptr) candidates_ = arena_.take<char>(kCandidateBytes);
  Collector<T> collector{candidates_, !one_cost_, candidate_capacity()};
  Found own;
  own.moments = survey_into(&collector, logit, window);
  candidate_count_ = collector.count.load();
  own.overflows = candidate_count_ > candidate_capacity();
  const Found found = across(own);
  *moments = found.moments;
  if (std::isnan(moments->poison)) refuse_values();
  return found.overflows == 0;
}

template <class T>
bool Problem<T>::narrow(const Logit<T>* logit, double budget, Window<T>* window, Moments* moments) {
  const double unit = one_cost_ && n_parts_ > 0 ? static_cast<double>(parts_[0].unit) : 0.0;
  Binner<T> binner{Bins<T>(*window), unit, histograms_};
  std::memset(histograms_, 0, kRadixBins * sizeof(double));
  *moments = across(survey_into(&binner, logit, *window));
  if (std::isnan(moments->poison)) refuse_values();
  merge_histogram(histograms_);
  double spent = moments->above;
  for (int bin = kRadixBins - 1; bin >= 0 && spent <= budget; --bin) {
    spent += histograms_[bin];
    if (spent <= budget) continue;
    *window = binner.bins.window(bin);
    return true;
  }
  return false;
}

template <class T>
bool Problem<T>::cut_within(Window<T> window, double budget, Cut<T>* cut) {
  Moments m;
  while (!survey(nullptr, window, &m)) {
    if (m.above > budget) return false;
    if (window.low == window.high) {
      *cut = tie_cut(window.low, budget - m.above);
      return true;
    }
    if (!narrow(nullptr, budget, &window, &m)) return false;
  }
  return cut_from_candidates(window, m.above, budget, cut);
}

template <class T>
bool Problem<T>::cut_from_candidates(const Window<T>& window, double above, double budget, Cut<T>* cut) {
  if (above > budget) return false;
  const RadixDescent<T> radix = descend_candidates(budget - above);
  if (radix.everything) {
    // the budget outlasts the window: that decides only when nothing lies below it
    if (window.low != -std::numeric_limits<T>::infinity()) return false;
    *cut = Cut<T>::everything();
    return true;
  }
  const double remaining = budget - above - radix.spent;
  // When not even one of the entries at the threshold fits, which one comes first does not matter.
  *cut = one_cost_ && remaining < static_cast<double>(parts_[0].unit) ? Cut<T>{radix.ratio(), -1}
                                                                            : tie_cut(radix.ratio(), remaining);
  return true;
}

template <class T>
RadixDescent<T> Problem<T>::descend_candidates(double budget) {
  const auto merge = [this](double* histogram) { merge_histogram(histogram); };
  if (one_cost_) {
    const T* ratios = static_cast<const T*>(candidates_);
    const double unit = static_cast<double>(parts_[0].unit);
    return descend<T>(
        candidate_count_, budget, histogram(), [&](int64_t i) { return ratios[i]; }, [&](int64_t) { return unit; }, merge);
  }
  // Threads append in no fixed order, and a sum of unequal costs must not depend on it.
  auto* priced = static_cast<Priced<T>*>(candidates_);
  std::sort(priced, priced + candidate_count_, [](const Priced<T>& x, const Priced<T>& y) {
    return x.cost != y.cost ? x.cost < y.cost : x.ratio < y.ratio;
  });
  return descend<T>(
      candidate_count_, budget, histogram(), [&](int64_t i) { return priced[i].ratio; },
      [&](int64_t i) { return priced[i].cost; }, merge);
}

template <class T>
Cut<T> Problem<T>::cut_from_sample(const Sample<T>& sample, double budget) {
  if (budget >= total_cost_) return Cut<T>::everything();  // which a sum in another order may exceed
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

// Adds the other ranks' histograms.
template <class T>
void Problem<T>::merge_histogram(double* histogram) const {
  if (!grouped()) return;
  const auto* all = static_cast<const double*>(group_.gather(group_.context, histogram, kRadixBins * sizeof(double)));
  for (int b = 0; b < kRadixBins; ++b) {
    histogram[b] = 0;
    for (int rank = 0; rank < group_.size; ++rank) histogram[b] += all[rank * kRadixBins + b];
  }
}

template <class T>
Cut<T> Problem<T>::cut_by_radix(double budget) {
  RadixDescent<T> radix(budget);
  while (!radix.finished()) {
    std::memset(histograms_, 0, kHistogramWorkers * kRadixBins * sizeof(double));
    parallel_for(threads_, kHistogramWorkers, [&](int64_t worker) {
      double* bins = histograms_ + worker * kRadixBins;
      const int64_t begin = own_length_ * worker / kHistogramWorkers, end = own_length_ * (worker + 1) / kHistogramWorkers;
      for (int64_t p = 0; p < n_parts_; ++p) {
        const Part& part = parts_[p];
        const int64_t first = part.first_index - parts_[0].first_index;
        const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, part.row->length);
        each_entry(part, from, to, [&](int64_t, T ratio, T cost) {
          const auto key = key_of(ratio);
          if (radix.matches(key)) bins[radix.bin(key)] += static_cast<double>(cost);
          return true;
        });
      }
    });
    for (int64_t worker = 1; worker < kHistogramWorkers; ++worker)
      for (int b = 0; b < kRadixBins; ++b) histograms_[b] += histograms_[worker * kRadixBins + b];
    merge_histogram(histograms_);
    radix.narrow(histograms_);
  }
  if (radix.everything) return Cut<T>::everything();
  return tie_cut(radix.ratio(), budget - radix.spent);
}

// How far the remaining budget reaches among the entries that equal the threshold, in the order of their index: through
// the ranks, the chunks and the entries.
template <class T>
Cut<T> Problem<T>::tie_cut(T ratio, double remaining) {
  double* sums = static_cast<double*>(partials_);
  for_chunks([&](int64_t chunk, const Part& part, int64_t offset, int64_t length) {
    double sum = 0;
    for_runs(part, offset, length, length, [&](int64_t, const Span<T>& span) { sum += passes_.tied(span, ratio); });
    sums[chunk] = sum;
  });
  const Cut<T> all{ratio, std::numeric_limits<int64_t>::max()}, none{ratio, -1};
  if (grouped()) {
    double own = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) own += sums[chunk];
    const auto* tied = static_cast<const double*>(group_.gather(group_.context, &own, sizeof own));
    for (int rank = 0; rank < group_.rank; ++rank) {
      if (tied[rank] > remaining) return none;
      remaining -= tied[rank];
    }
    if (own <= remaining) return all;
  }
  int64_t last = 0;
  while (last < chunks_ && sums[last] <= remaining) remaining -= sums[last++];
  if (last == chunks_) return all;
  const Part* part = parts_ + n_parts_ - 1;
  while (part->first_chunk > last || part->row->length == 0) --part;
  const int64_t offset = (last - part->first_chunk) * chunk_length_;
  Cut<T> cut{ratio, part->first_index + offset - 1};
  each_entry(*part, offset, std::min(offset + chunk_length_, part->row->length), [&](int64_t at, T u, T cost) {
    if (u == ratio) remaining -= static_cast<double>(cost);
    if (remaining < 0) return false;
    cut.index = part->first_index + at;
    return true;
  });
  return cut;
}

template class Problem<float>;
template class Problem<double>;

}  // namespace spartan::cpu
