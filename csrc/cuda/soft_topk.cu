// Soft top-k by rows: each row is read once, solved where it lies, and written once.
#include "row_odds.cuh"
#include "search_row.cuh"

namespace spartan::cuda {
namespace {

// The root in float64, for rows that stay in memory and for what float32 has no digits left for.
template <int kGroup, class R>
__device__ ThresholdSearch search_wide(const R& row, double budget, double beta) {
  ExtentOfRow sums;
  extent_of<kGroup>(row, sums);
  ThresholdSearch search(usable_budget(budget, sums[0], beta, sums[3]), sums[0], beta);
  if (!search.constant()) search_row<kGroup>(row, sums, 0.0, &search);  // constant also where the budget is NaN
  return search;
}

// A solved row: the mask is made of its odds times w. (centre, shift) is kept for the backward pass.
struct Solved {
  Odds odds;
  float w, of_masked;
  bool keeps;
  double centre, shift;
};

// Rare: its registers are not those of its callers.
struct Wide {
  double shift;
  float centre, sign;
};
template <class T, int kGroup>
__device__ __noinline__ Wide solve_wide(Rows rows, int64_t r, double budget, double beta) {
  const ThresholdSearch search = search_wide<kGroup>(Row<T, kGroup, kInMemory>(rows, r), budget, beta);
  const Logit<float> p = search.logit<float>();
  return {search.shift_from(static_cast<double>(p.centre)), p.centre, p.sign};
}

// What a row's search starts from. Poison is NaN where an entry is NaN or infinite.
struct Extent {
  float low, high, count, sum, squares;  // of ratios that are not masked, the sums measured from the largest

  template <int kGroup, class R>
  __device__ static Extent of(R& row) {
    float ends[2] = {-INFINITY, -INFINITY};
    row.each(
        [&](int64_t, int, float u) {
          ends[0] = fmaxf(ends[0], masked(u) ? -INFINITY : -u), ends[1] = fmaxf(ends[1], u);
        },
        [] {});
    group_reduce<kGroup>(ends, SumsThenMaxima<0>{});
    const float highest = ends[1];
    float sums[3] = {0.0f, 0.0f, 0.0f}, some[3] = {0.0f, 0.0f, 0.0f};
    row.each(
        [&](int64_t, int, float u) {
          const float away = masked(u) ? 0.0f : u - highest;
          some[0] += masked(u) ? 0.0f : 1.0f, some[1] += away, some[2] = fmaf(away, away, some[2]);
        },
        [&] {
          for (int n = 0; n < 3; ++n) sums[n] += some[n], some[n] = 0.0f;
        });
    group_sums<kGroup>(sums);
    const bool none = sums[0] == 0.0f;
    return {none ? 0.0f : -ends[0], none ? 0.0f : highest, sums[0], sums[1], sums[2]};
  }
  __device__ bool poisoned() const { return sum != sum; }
};

// The sum of the costs of entries that are not masked; NaN where one is not positive and finite.
template <int kGroup, class R>
__device__ double sum_of_costs(R& row) {
  double sum[1] = {0.0};
  row.each(
      [&](int64_t i, int, float u) {
        const float a = row.cost(i);
        sum[0] += masked(u) ? 0.0 : a > 0.0f && a < INFINITY ? static_cast<double>(a) : NAN;
      },
      [] {});
  group_sums<kGroup>(sum);
  return sum[0];
}

// Solves a row that is kept, and leaves its odds there.
template <class T, int kGroup, int kItems>
__device__ Solved solve(Row<T, kGroup, kItems>& row, const Rows& rows, int64_t r, double asked, double beta) {
  const Extent extent = Extent::of<kGroup>(row);
  const bool priced = !row.one_cost();
  // in units of the one cost, or in parts of all costs, whose products do not overflow
  double unit = row.unit(), total = extent.count;
  if (priced) {
    unit = sum_of_costs<kGroup>(row);
    unit = unit < 1e-300 ? 1e-300 : unit;
    total = 1.0;
  }
  Side side(unit == 1.0 ? asked : asked / unit, total, beta);
  side.low = extent.low, side.high = extent.high;
  if (extent.poisoned() || !(unit > 0.0 && unit < INFINITY)) side.quota = NAN;

  Solved out{{0.0f, 0.0f, 0.0f}, side.rest / side.quota, side.usable() ? 0.0f : NAN, side.sign > 0.0f, 0.0, 0.0};
  if (side.quota == 0.0f) out.w = INFINITY;
  if (!side.searched()) {
    row.each([&](int64_t, int, float& x) { x = out.odds.of(x); }, [] {});
    out.shift = -side.sign * logf(out.w);
    return out;
  }
  const auto search = [&](auto cost, float start) {
    OddsSearch<kGroup, Row<T, kGroup, kItems>, decltype(cost)> search(row, side, cost);
    search.first_round(start);
    if (search.left) search.more_rounds();
    out.w = search.w;
    out.centre = search.centre;
    return search.left;
  };
  const float spread_out = moment_start(side, extent.count, extent.sum, extent.squares);
  const auto one = [](int64_t) { return 1.0f; };
  bool left;
  if (priced) {
    const float share = static_cast<float>(1.0 / unit);
    left = search([&](int64_t i) { return row.cost(i) * share; }, spread_out);
  } else if constexpr (kGroup == 1) {
    left = search(one, order_start(side, row.all()));
  } else {
    left = search(one, spread_out);
  }
  out.shift = -side.sign * log2f(out.w) * kLn2;
  if (left) {
    const Wide wide = solve_wide<T, kGroup>(rows, r, asked, beta);
    out.odds = {-wide.sign * side.beta * kLog2E, wide.centre, -wide.sign * static_cast<float>(wide.shift) * kLog2E};
    out.w = 1.0f;
    out.keeps = wide.sign > 0.0f;
    out.centre = static_cast<double>(wide.centre);
    out.shift = wide.shift;
    row.each([&](int64_t i, int, float& x) { x = out.odds.of(row.ratio(i)); }, [] {});
  }
  return out;
}

template <class T, int kGroup, int kItems>
__global__ void __launch_bounds__(block_threads(kGroup), resident(kGroup, kItems))
    soft_topk_forward_kernel(Rows rows, const double* budget, const double* beta, T* mask, double* threshold) {
  for (int64_t r = first_row<kGroup>(); r < rows.rows; r += row_stride<kGroup>()) {
    Row<T, kGroup, kItems> row(rows, r);
    auto out = row.written(mask + r * rows.length);
    double* saved = threshold + 2 * r;
    if constexpr (kItems == kInMemory) {
      const ThresholdSearch search = search_wide<kGroup>(row, budget[r], *beta);
      const Exponent x(search.logit<float>());
      const float of_masked = mask_of_masked(search);
      row.walk([&](int64_t i, int j, float u) { out.put(i, j, from_float<T>(masked(u) ? of_masked : Sigmoid(x.at(u)).m)); });
      if (row.leader()) save_threshold(search, saved);
    } else {
      const Solved found = solve(row, rows, r, budget[r], *beta);
      row.walk([&](int64_t i, int j, float e) {
        out.put(i, j, from_float<T>(e == INFINITY ? found.of_masked : mask_of_odds(e, found.w, found.keeps)));
      });
      if (row.leader()) saved[0] = found.centre, saved[1] = found.shift;
    }
    out.close();
  }
}

struct Gradients {
  const double* threshold;
  const double* beta;
  double* of_budget;
  double* of_beta;
};

template <class T, int kGroup, int kItems>
__global__ void __launch_bounds__(block_threads(kGroup), resident(kGroup, kItems))
    soft_topk_backward_kernel(Rows rows, const T* grad, Gradients scalars, T* grad_values, T* grad_costs) {
  const float beta = static_cast<float>(*scalars.beta);
  for (int64_t r = first_row<kGroup>(); r < rows.rows; r += row_stride<kGroup>()) {
    const Row<T, kGroup, kItems> row(rows, r);
    const double* saved = scalars.threshold + 2 * r;
    const Logit<float> p{beta, static_cast<float>(saved[0]), static_cast<float>(saved[1]), 1.0f};
    const Exponent x(p);
    const auto g = row.beside(grad + r * rows.length);
    auto of_values = row.written(grad_values + r * rows.length);
    auto of_costs = row.written(grad_costs + r * rows.length);
    GradientSums sums;
    row.walk([&](int64_t i, int j, float u) { if (!masked(u)) sums.add(x, p.origin(), u, row.cost(i), g(i, j)); },
             [&] { sums.flush(); });
    group_sums<kGroup>(sums.total);
    const float ratio = static_cast<float>(sums.ratio());
    row.walk([&](int64_t i, int j, float u) {
      const Sigmoid sig(x.at(u));
      const float gain = row.one_cost() && row.unit() == 1.0f ? g(i, j) : g(i, j) / row.cost(i);
      const float pull = beta * sig.slope() * (gain - ratio), out = masked(u) ? 0.0f : pull;
      of_values.put(i, j, from_float<T>(out));
      if (grad_costs != nullptr) of_costs.put(i, j, from_float<T>(masked(u) ? 0.0f : -out * u - ratio * sig.m));
    });
    of_values.close();
    if (grad_costs != nullptr) of_costs.close();
    if (row.leader()) {
      scalars.of_budget[r] = sums.ratio();
      scalars.of_beta[r] = sums.of_beta();
    }
  }
}

template <class T>
void forward(const Rows& rows, const double* budget, const double* beta, T* mask, double* threshold, Stream stream) {
  for_length(rows, stream, [&](auto group, auto items, int shared) {
    launch(stream, &soft_topk_forward_kernel<T, group(), items()>, grid_for(rows, group),
           Block(block_threads(group), shared), rows, budget, beta, mask, threshold);
  });
}

template <class T>
void backward(const Rows& rows, const T* grad, Gradients scalars, T* grad_values, T* grad_costs, Stream stream) {
  for_length(rows, stream, [&](auto group, auto items, int shared) {
    launch(stream, &soft_topk_backward_kernel<T, group(), items()>, grid_for(rows, group),
           Block(block_threads(group), shared), rows, grad, scalars, grad_values, grad_costs);
  });
}

}  // namespace

void soft_topk_rows(Dtype dtype, Rows rows, const double* budget, const double* beta, void* mask, double* threshold,
                    Stream stream) {
  if (rows.rows == 0) return;
  SPARTAN_CUDA_DISPATCH(forward<T>(rows, budget, beta, static_cast<T*>(mask), threshold, stream))
}

void soft_topk_rows_backward(Dtype dtype, Rows rows, const void* grad, const double* threshold, const double* beta,
                             void* grad_values, void* grad_costs, double* grad_budget, double* grad_beta, Stream stream) {
  if (rows.rows == 0) return;
  const Gradients scalars{threshold, beta, grad_budget, grad_beta};
  SPARTAN_CUDA_DISPATCH(backward<T>(rows, static_cast<const T*>(grad), scalars, static_cast<T*>(grad_values),
                                    static_cast<T*>(grad_costs), stream))
}

}  // namespace spartan::cuda
