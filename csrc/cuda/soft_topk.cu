// Soft top-k by rows: each row is read once, solved where it lies, and written once.
#include "rows.cuh"
#include "search_row.cuh"

namespace spartan::cuda {
namespace {

template <int kGroup, class R>
__device__ ThresholdSearch solve(const R& row, double budget, double beta) {
  ExtentOfRow sums;
  extent_of<kGroup>(row, sums);
  ThresholdSearch search(usable_budget(budget, sums[0], beta, sums[3]), sums[0], beta);
  if (!search.constant()) search_row<kGroup>(row, sums, 0.0, &search);  // constant also where the budget is NaN
  return search;
}

template <class T, int kGroup, int kItems>
__global__ void __launch_bounds__(block_threads(kGroup), 512 / block_threads(kGroup))
    soft_topk_forward_kernel(Rows rows, const double* budget, const double* beta, T* mask, double* threshold) {
  for (int64_t r = first_row<kGroup>(); r < rows.rows; r += row_stride<kGroup>()) {
    const Row<T, kGroup, kItems> row(rows, r);
    const ThresholdSearch search = solve<kGroup>(row, budget[r], *beta);
    const Logit<float> p = search.logit<float>();
    const float of_masked = mask_of_masked(search);
    row.walk([&](int64_t i, float u) {
      mask[r * rows.length + i] = from_float<T>(masked(u) ? of_masked : Sigmoid(logit_at(p, u)).m);
    });
    if (row.leader()) save_threshold(search, threshold + 2 * r);
  }
}

struct Gradients {
  const double* threshold;
  const double* beta;
  double* of_budget;
  double* of_beta;
};

template <class T, int kGroup, int kItems>
__global__ void __launch_bounds__(block_threads(kGroup), 512 / block_threads(kGroup))
    soft_topk_backward_kernel(Rows rows, const T* grad, Gradients scalars, T* grad_values, T* grad_costs) {
  const float beta = static_cast<float>(*scalars.beta);
  for (int64_t r = first_row<kGroup>(); r < rows.rows; r += row_stride<kGroup>()) {
    const Row<T, kGroup, kItems> row(rows, r);
    const double* saved = scalars.threshold + 2 * r;
    const Logit<float> p{beta, static_cast<float>(saved[0]), static_cast<float>(saved[1]), 1.0f};
    const T* g = grad + r * rows.length;
    GradientSums sums;
    row.walk_unmasked([&](int64_t i, float u) { sums.add(p, u, row.cost(i), to_float(g[i])); }, [&] { sums.flush(); });
    group_sums<kGroup>(sums.total);
    const float ratio = static_cast<float>(sums.ratio());
    row.walk([&](int64_t i, float u) {
      const Sigmoid sig(logit_at(p, u));
      const float pull = beta * sig.slope() * (to_float(g[i]) / row.cost(i) - ratio), out = masked(u) ? 0.0f : pull;
      grad_values[r * rows.length + i] = from_float<T>(out);
      if (grad_costs == nullptr) return;
      grad_costs[r * rows.length + i] = from_float<T>(masked(u) ? 0.0f : -out * u - ratio * sig.m);
    });
    if (row.leader()) {
      scalars.of_budget[r] = sums.ratio();
      scalars.of_beta[r] = sums.of_beta();
    }
  }
}

template <class T>
void forward(const Rows& rows, const double* budget, const double* beta, T* mask, double* threshold, Stream stream) {
  for_length(rows.length, stream, [&](auto group, auto items, int shared) {
    launch(stream, &soft_topk_forward_kernel<T, group(), items()>, grid_for(rows, group),
           Block(block_threads(group), shared), rows, budget, beta, mask, threshold);
  });
}

template <class T>
void backward(const Rows& rows, const T* grad, Gradients scalars, T* grad_values, T* grad_costs, Stream stream) {
  for_length(rows.length, stream, [&](auto group, auto items, int shared) {
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
