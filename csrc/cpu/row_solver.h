// Soft and hard top-k by rows. Each thread takes whole rows: short ones many at once, in the lanes of a vector; others one by
// one, read from memory once and solved in cache. Rows beyond that go through the passes over a list of one tensor.
#pragma once

#include <atomic>
#include <exception>
#include <type_traits>

#include "cache_solve.h"
#include "dispatch.h"
#include "huge_pages.h"
#include "problem.h"
#include "short_rows.h"
#include "unmasked.h"

namespace spartan::cpu {

template <class S>
constexpr bool kNarrow = sizeof(S) == 2;
// Rows whose entries are computed in float can be solved in lanes.
template <class S>
constexpr bool kHasLanes = !std::is_same_v<S, double>;

template <class S>
constexpr Dtype kDtype = std::is_same_v<S, double>     ? Dtype::float64
                         : std::is_same_v<S, bfloat16> ? Dtype::bfloat16
                         : std::is_same_v<S, float16>  ? Dtype::float16
                                                       : Dtype::float32;

template <class T>
bool fits_cache(int64_t length) {
  return length * static_cast<int64_t>(sizeof(T)) <= kSampleBytes;
}

// The rows as seen by one thread, with memory of its own.
template <class S>
class RowSolver {
 public:
  using T = Compute<S>;

  RowSolver(const Rows& rows, Workspace workspace, int team)
      : rows_(rows), passes_(soft_topk_passes<T>()), workspace_(workspace), team_(team) {}

  // Writes the masks of rows [first, last).
  void soft(int64_t first, int64_t last, RowBudgets budget, double beta, S* mask, double* threshold) const {
    blocks(first, last, &ShortRows<S>::together, [&](int64_t row, int64_t count) {
      if constexpr (kHasLanes<S>) {
        if (in_lanes()) {
          const RowBudgets own{budget.first + row * budget.stride, budget.stride};
          uint32_t left = short_rows<S>().soft(block(row, count), own, beta, mask + row * rows_.length, threshold + 2 * row);
          for (; left != 0; left &= left - 1) {
            const int64_t one = row + __builtin_ctz(left);
            soft_row(one, budget.first[one * budget.stride], beta, mask + one * rows_.length, threshold + 2 * one);
          }
          return;
        }
      }
      soft_row(row, budget.first[row * budget.stride], beta, mask + row * rows_.length, threshold + 2 * row);
    });
  }

  void soft_backward(int64_t first, int64_t last, const S* grad, double beta, const RowGradient& out, S* grad_values,
                     S* grad_costs) const {
    blocks(first, last, &ShortRows<S>::lanes, [&](int64_t row, int64_t count) {
      const int64_t at = row * rows_.length;
      const RowGradient own{out.threshold + 2 * row, out.budget + row, out.beta + row};
      S* costs = grad_costs != nullptr ? grad_costs + at : nullptr;
      if constexpr (kHasLanes<S>) {
        if (in_lanes()) {
          short_rows<S>().soft_backward(block(row, count), grad + at, beta, own, grad_values + at, costs);
          return;
        }
      }
      soft_backward_row(row, grad + at, beta, own, grad_values + at, costs);
    });
  }

  void hard(int64_t first, int64_t last, RowBudgets budget, uint8_t* mask) const {
    blocks(first, last, &ShortRows<S>::lanes, [&](int64_t row, int64_t count) {
      if constexpr (kHasLanes<S>) {
        if (in_lanes() && rows_.costs == nullptr) {
          const RowBudgets own{budget.first + row * budget.stride, budget.stride};
          uint32_t left = short_rows<S>().hard(block(row, count), own, mask + row * rows_.length);
          for (; left != 0; left &= left - 1) {
            const int64_t one = row + __builtin_ctz(left);
            hard_row(one, budget, mask + one * rows_.length);
          }
          return;
        }
      }
      for (int64_t one = row; one < row + count; ++one) hard_row(one, budget, mask + one * rows_.length);
    });
  }

 private:
  bool in_lanes() const { return kHasLanes<S> && rows_.length > 0 && rows_.length <= kLongestLane; }

  // Calls f(row, count) on blocks of rows: as many as there are lanes, or single ones.
  template <class F>
  void blocks(int64_t first, int64_t last, int ShortRows<S>::* rows, F&& f) const {
    int64_t step = 1;
    if constexpr (kHasLanes<S>) step = in_lanes() ? short_rows<S>().*rows : 1;
    for (int64_t row = first; row < last; row += step) f(row, std::min(step, last - row));
  }

  const S* values(int64_t row) const { return static_cast<const S*>(rows_.values) + row * rows_.stride; }
  const S* costs(int64_t row) const {
    return rows_.costs != nullptr ? static_cast<const S*>(rows_.costs) + row * rows_.cost_stride : nullptr;
  }

  RowBlock<S> block(int64_t row, int64_t count) const {
    const int64_t after = rows_.rows - 1 - row;
    return {values(row),       rows_.stride, after * rows_.stride + rows_.length, costs(row), rows_.cost_stride,
            after * rows_.cost_stride + rows_.length, rows_.cost, rows_.length, static_cast<int>(count)};
  }

  // n numbers in the type that is computed in: where they lie, or widened to scratch memory.
  const T* widened(const S* data, Arena* arena) const {
    if constexpr (kNarrow<S>) {
      T* out = arena->template take<T>(rows_.length);
      short_rows<S>().widen(data, rows_.length, out);
      return out;
    } else {
      return data;
    }
  }

  // Where results are computed that narrowed() then brings to `out`.
  T* staging(S* out, Arena* arena) const {
    if constexpr (kNarrow<S>) return arena->template take<T>(rows_.length);
    else return out;
  }
  void narrowed(const T* from, S* out) const {
    if constexpr (kNarrow<S>) short_rows<S>().narrow(from, rows_.length, out);
  }

  Span<T> span(int64_t row, Arena* arena) const {
    const S* own = costs(row);
    return {widened(values(row), arena), own != nullptr ? widened(own, arena) : nullptr, static_cast<T>(rows_.cost),
            rows_.length, false};
  }

  // A row as a list of one tensor, read and written as it is stored: nothing of its length is kept beside it.
  bool solved_as_list() const { return !fits_cache<T>(rows_.length); }
  TableRow as_list(int64_t row, const void* first, const void* second = nullptr, const void* third = nullptr) const {
    return {values(row), costs(row), rows_.cost, rows_.length,
            {const_cast<void*>(first), const_cast<void*>(second), const_cast<void*>(third)}};
  }

  // The budget within the sum of the costs; throws where values, costs or budget are out of range.
  double checked(const Span<T>& span, Extent* extent, double budget) const {
    const bool priced = span.costs != nullptr;
    if (!priced) extent->cost = static_cast<double>(span.cost) * static_cast<double>(span.length);
    if (!(extent->lowest_cost > 0 && extent->cost < INFINITY) && span.length > 0)
      throw std::invalid_argument("costs must be finite and positive; the smallest is " +
                                  std::to_string(extent->lowest_cost));
    if (std::isnan(extent->poison)) refuse_values();
    return clamp_budget(budget, extent->cost);
  }
  // The same for the entries that are not masked; the costs of the others are checked too.
  double checked_unmasked(const Span<T>& all, Extent of_all, const Span<T>& unmasked, Extent* extent, double budget) const {
    of_all.poison = 0;
    checked(all, &of_all, 0);
    return checked(unmasked, extent, budget);
  }

  void soft_row(int64_t row, double budget, double beta, S* mask, double* threshold) const {
    if (solved_as_list()) {
      const TableRow list = as_list(row, mask);
      soft_topk_global(kDtype<S>, {&list, 1}, budget, beta, false, nullptr, threshold, workspace_, team_);
      return;
    }
    Arena arena(workspace_);
    const Span<T> entries = span(row, &arena);
    T* out = staging(mask, &arena);
    Extent extent = passes_.extent(entries);
    if (std::isnan(extent.poison)) {
      soft_masked_row(entries, extent, budget, beta, out, threshold, &arena);
    } else {
      const double limit = checked(entries, &extent, budget);
      solve(entries, extent, limit, beta, out, threshold);
    }
    narrowed(out, mask);
  }

  void soft_masked_row(const Span<T>& all, const Extent& of_all, double budget, double beta, T* out, double* threshold,
                       Arena* arena) const {
    const Unmasked<T> unmasked(all, arena);
    T* mask = unmasked.template room<T>();
    Extent extent = passes_.extent(unmasked.span());
    const double limit = checked_unmasked(all, of_all, unmasked.span(), &extent, budget);
    solve(unmasked.span(), extent, limit, beta, mask, threshold);
    unmasked.scatter(mask, out);
  }

  void solve(const Span<T>& entries, const Extent& extent, double budget, double beta, T* out, double* threshold) const {
    ThresholdSearch search(budget, extent.cost, beta);
    if (!search.constant()) solve_in_cache(entries, extent, &search);
    write(entries, &search, out);
    save<T>(search, threshold);
    if (extent.cost == 0) threshold[1] = -INFINITY;  // nothing is there to be kept
  }

  // Where the sum of the mask misses the budget, a staircase on which one Halley step is not the last, the search goes on to
  // the end and the mask is written once more.
  void write(const Span<T>& entries, ThresholdSearch* search, T* out) const {
    const bool past_cache = rows_.rows * rows_.length * static_cast<int64_t>(sizeof(T)) > kCacheBytes && !kNarrow<S>;
    const double mass = passes_.write(entries, search->logit<T>(), T(0), out, nullptr, past_cache);
    if (search->constant() || std::fabs(mass - search->quota) <= kTolerance<T> * search->quota) return;
    int trial = 0;
    const auto more = [&] {
      const Moments m = passes_.moments(entries, search->logit<T>());
      return search->advance(m, kTolerance<T> / 4) != ThresholdSearch::Step::done;
    };
    while (trial < kMaxTrials && more()) ++trial;
    if (trial == kMaxTrials) search->settle();
    require_met(passes_.write(entries, search->logit<T>(), T(0), out, nullptr, past_cache), search->quota);
  }

  void soft_backward_row(int64_t row, const S* grad, double beta, const RowGradient& out, S* grad_values,
                         S* grad_costs) const {
    if (solved_as_list()) {
      const TableRow list = as_list(row, grad, grad_values, grad_costs);
      double scalars[2];
      soft_topk_global_backward(kDtype<S>, {&list, 1}, out.threshold, beta, scalars, workspace_, team_);
      *out.budget = scalars[0], *out.beta = scalars[1];
      return;
    }
    Arena arena(workspace_);
    const Span<T> entries = span(row, &arena);
    const T* g = widened(grad, &arena);
    T* of_values = staging(grad_values, &arena);
    T* of_costs = grad_costs != nullptr ? staging(grad_costs, &arena) : nullptr;
    gradient(entries, g, beta, out, of_values, of_costs);
    if (!std::isfinite(*out.beta)) gradient_of_unmasked(entries, g, beta, out, of_values, of_costs, &arena);
    narrowed(of_values, grad_values);
    if (grad_costs != nullptr) narrowed(of_costs, grad_costs);
  }

  // A masked entry, whose u is -inf, makes the gradient of beta infinite or NaN.
  void gradient(const Span<T>& entries, const T* g, double beta, const RowGradient& out, T* of_values, T* of_costs) const {
    const Logit<T> logit = saved_logit<T>(out.threshold, beta);
    const GradientSums sums = passes_.gradient_sums(entries, g, logit);
    // a budget of nothing or everything saturates every entry; their logistic is cut off a little above zero
    *out.budget = sums.as > 0 && std::isfinite(out.threshold[1]) ? sums.gs / sums.as : 0.0;
    *out.beta = sums.gsu - *out.budget * sums.asu;
    passes_.gradient(entries, g, logit, static_cast<T>(*out.budget), of_values, of_costs, false);
  }

  void gradient_of_unmasked(const Span<T>& all, const T* g, double beta, const RowGradient& out, T* of_values, T* of_costs,
                            Arena* arena) const {
    const Unmasked<T> unmasked(all, arena);
    if (!unmasked.any()) return;
    T* values = unmasked.template room<T>();
    T* costs = of_costs != nullptr ? unmasked.template room<T>() : nullptr;
    gradient(unmasked.span(), unmasked.gather(g), beta, out, values, costs);
    unmasked.scatter(values, of_values);
    if (of_costs != nullptr) unmasked.scatter(costs, of_costs);
  }

  void hard_row(int64_t row, RowBudgets budgets, uint8_t* mask) const {
    const double budget = budgets.first[row * budgets.stride];
    if (rows_.costs != nullptr || solved_as_list()) {
      const TableRow list = as_list(row, mask);
      try {
        return hard_topk_global(kDtype<S>, {&list, 1}, budget, false, workspace_, team_);
      } catch (const NotFinite&) {
        if (solved_as_list()) throw;
      }
    }
    Arena arena(workspace_);
    const Span<T> entries = span(row, &arena);
    Extent extent = passes_.extent(entries);
    if (std::isnan(extent.poison)) return hard_masked_row(entries, extent, budget, budgets.capped, mask, &arena);
    const double limit = checked(entries, &extent, budget);
    write_hard(entries, cut_by_counting(entries, extent, limit), mask);
  }

  void hard_masked_row(const Span<T>& all, const Extent& of_all, double budget, bool capped, uint8_t* mask,
                       Arena* arena) const {
    const Unmasked<T> unmasked(all, arena);
    const Span<T> entries = unmasked.span();
    if (capped) budget = std::fmin(budget, static_cast<double>(entries.cost) * static_cast<double>(entries.length));
    uint8_t* kept = unmasked.template room<uint8_t>();
    Extent extent = passes_.extent(entries);
    const double limit = checked_unmasked(all, of_all, entries, &extent, budget);
    if (entries.costs == nullptr) {
      write_hard(entries, cut_by_counting(entries, extent, limit), kept);
    } else {
      const TableRow list{entries.values, entries.costs, rows_.cost, entries.length, {kept, nullptr, nullptr}};
      hard_topk_global(kDtype<T>, {&list, 1}, limit, false, arena->rest(), team_);
    }
    unmasked.scatter(kept, mask);
  }

  // Equal costs: the entries above a trial threshold are counted until it parts them exactly or only ties are left to part.
  // Trials are where a logistic distribution with the counts so far would have the threshold, and the bracket's middle, in turn.
  Cut<T> cut_by_counting(const Span<T>& entries, const Extent& extent, double budget) const {
    const double n = static_cast<double>(entries.length), unit = static_cast<double>(entries.cost);
    if (budget >= extent.cost || entries.length == 0) return Cut<T>::everything();
    if (budget < unit) return Cut<T>::nothing();
    const double target = logit(std::floor(budget / unit) / n);
    const double mean = extent.ratio / n, variance = std::fmax(extent.square / n - mean * mean, 0.0);
    const double scale = std::sqrt(variance) * 0.5513288954217921;  // sqrt(3) / pi
    using Bits = typename Key<T>::Bits;
    // the cost above `below` exceeds the budget, that above `top` does not
    Bits below = key_of(static_cast<T>(extent.low)) - 1, top = key_of(static_cast<T>(extent.high));
    double spent = 0, guess = mean - target * scale;
    for (int trial = 0; top - below > 1; ++trial) {
      const Bits middle = below + (top - below) / 2, near = key_of(static_cast<T>(guess));
      const Bits key = trial % 3 != 2 && near > below && near < top ? near : middle;
      const T at = value_of<T>(key);
      const double above = cost_above(entries, at);
      if (above > budget) {
        below = key;
      } else {
        top = key;
        spent = above;
        if (above + unit > budget) return {std::nextafter(at, std::numeric_limits<T>::infinity()), kNoTies};
      }
      guess = static_cast<double>(at) + scale * (logit(above / unit / n) - target);
    }
    return tied_cut(entries, value_of<T>(top), budget - spent);
  }

  static constexpr int64_t kNoTies = std::numeric_limits<int64_t>::max();

  static double logit(double share) {
    const double inside = std::fmin(std::fmax(share, 1e-6), 1 - 1e-6);
    return std::log(inside / (1 - inside));
  }

  double cost_above(const Span<T>& entries, T ratio) const {
    Sink<T> unused;
    return passes_.count(entries, {std::numeric_limits<T>::infinity(), ratio}, &unused).above;
  }

  // How far the budget reaches among the entries equal to the threshold, in the order of their index.
  Cut<T> tied_cut(const Span<T>& entries, T ratio, double remaining) const {
    Cut<T> cut{ratio, -1};
    for (int64_t i = 0; i < entries.length; ++i) {
      if (entries.values[i] / entries.cost != ratio) continue;
      remaining -= static_cast<double>(entries.cost);
      if (remaining < 0) break;
      cut.index = i;
    }
    return cut;
  }

  void write_hard(const Span<T>& entries, const Cut<T>& cut, uint8_t* mask) const {
    const int64_t inclusive = std::min(cut.index, entries.length - 1) + 1;
    passes_.write_hard({entries.values, nullptr, entries.cost, inclusive, false}, cut.ratio, mask);
    passes_.write_hard({entries.values + inclusive, nullptr, entries.cost, entries.length - inclusive, false},
                       std::nextafter(cut.ratio, std::numeric_limits<T>::infinity()), mask + inclusive);
  }

  const Rows& rows_;
  const SoftTopkPasses<T>& passes_;
  Workspace workspace_;
  int team_;
};

inline constexpr int64_t kMostStaged = 5;  // values, costs and gradients of a row: widened, and without masked entries

inline int64_t piece_bytes(int64_t length, int element_size) {
  const int element = std::max(element_size, 4);
  const int64_t staged = kMostStaged * (length * element + 64);
  return workspace_bytes(1, length, element) + staged * (element_size == 2 ? 2 : 1);
}

inline bool piece_fits_cache(int64_t length, int element_size) {
  return element_size == 8 ? fits_cache<double>(length) : fits_cache<float>(length);
}

// Calls f(solver, first, last) on ranges of rows; the first error of any range is thrown after the loop. Rows that do not
// fit into cache go one after another, with all threads on each.
template <class S, class F>
void for_rows(const Rows& rows, Workspace workspace, int threads, F&& f) {
  if (!fits_cache<Compute<S>>(rows.length)) {
    const RowSolver<S> solver(rows, workspace, threads);
    f(solver, 0, rows.rows);
    return;
  }
  constexpr int64_t kStep = 64;  // a multiple of the lanes of every instruction set
  const int64_t ranges_of = kStep * (kMinChunk / (kStep * std::max<int64_t>(rows.length, 1)) + 1);
  const int64_t step = rows.length <= kLongestLane ? ranges_of : std::max<int64_t>(kMinChunk / rows.length, 1);
  const int64_t ranges = (rows.rows + step - 1) / step, piece = piece_bytes(rows.length, sizeof(S));
  threads = static_cast<int>(std::min<int64_t>(threads, ranges));
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  std::atomic<int64_t> next{0};
  parallel_for(threads, threads, [&](int64_t worker) {
    const RowSolver<S> solver(rows, {static_cast<char*>(workspace.data) + worker * piece, piece}, 1);
    try {
      for (int64_t range; (range = next.fetch_add(1, std::memory_order_relaxed)) < ranges && !failed.load();)
        f(solver, range * step, std::min((range + 1) * step, rows.rows));
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

inline void advise_fresh(Dtype dtype, const Rows& rows, void* output) {
  const int64_t bytes = dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
  advise_huge_pages(output, rows.rows * rows.length * bytes);
}

}  // namespace spartan::cpu
