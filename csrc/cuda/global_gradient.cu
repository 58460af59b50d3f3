// Gradient of the soft top-k of a list of tensors: two sums over all entries, then every entry by itself.
#include "global_solve.cuh"

namespace spartan::cuda {
namespace {

struct Saved {
  const double* threshold;
  const double* beta;
  double* scalars;  // of the budget and of beta

  __device__ Logit<float> logit() const {
    return {static_cast<float>(*beta), static_cast<float>(threshold[0]), static_cast<float>(threshold[1]), 1.0f};
  }
};

// extra = {gradient of the mask, gradient of values, gradient of costs or null}.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>) gradient_sums_kernel(Plan plan, Saved saved, Workspace w) {
  const Logit<float> p = saved.logit();
  const Exponent exponent(p);
  const float origin = p.origin();
  GradientSums sums;
  walk<T>(
      plan, 0,
      [&](const Entries<T>& list, const Lanes<T>& x) {
        const auto g = list.load(static_cast<const T*>(list.extra[0]), x);
#pragma unroll
        for (int j = 0; j < Lanes<T>::kCount; ++j) {
          if (j < x.live && !masked(x.u[j])) sums.add(exponent, origin, x.u[j], x.a[j], to_float(g.lane[j]));
        }
      },
      [&] { sums.flush(); });
  if (!grid_reduce(sums.total, SumsThenMaxima<4>{}, w.partials, &w.solve->ticket) || threadIdx.x != 0) return;
  saved.scalars[0] = sums.ratio();
  saved.scalars[1] = sums.of_beta();
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>) gradient_kernel(Plan plan, Saved saved) {
  const Logit<float> p = saved.logit();
  const Exponent exponent(p);
  const float r = static_cast<float>(saved.scalars[0]);
  walk<T>(
      plan, 1,
      [&](const Entries<T>& list, const Lanes<T>& x) {
        const auto g = list.load(static_cast<const T*>(list.extra[0]), x);
        Pack<T, Lanes<T>::kCount> of_values, of_costs;
#pragma unroll
        for (int j = 0; j < Lanes<T>::kCount; ++j) {
          const Sigmoid sig(exponent.at(x.u[j]));
          const float pull = p.beta * sig.slope() * (to_float(g.lane[j]) / x.a[j] - r), out = masked(x.u[j]) ? 0.0f : pull;
          of_values.lane[j] = from_float<T>(out);
          of_costs.lane[j] = from_float<T>(masked(x.u[j]) ? 0.0f : -out * x.u[j] - r * sig.m);
        }
        list.store(static_cast<T*>(list.extra[1]), x, of_values);
        if (list.extra[2] != nullptr) list.store(static_cast<T*>(list.extra[2]), x, of_costs);
      },
      [] {});
}

template <class T>
void gradient(const Table& table, const Plan& plan, const Saved& saved, bool cost_arrays, bool cost_grad, const Workspace& w,
              Launches run) {
  const int value = sizeof(T), read = 2 * value + (cost_arrays ? value : 0);
  send_all(Delivery(table, plan, w.counts, w.cleared), run);
  run({"gradient_sums", read, 0, 1, 1}, &gradient_sums_kernel<T>, plan, saved, w);
  run({"gradient", read, value + (cost_grad ? value : 0), 1, 1}, &gradient_kernel<T>, plan, saved);
}

}  // namespace

void soft_topk_global_backward(Dtype dtype, Table table, const double* threshold, const double* beta, double* scalars,
                               void* workspace, Stream stream) {
  const Plan sizes(table);
  const Workspace w(workspace, sizes);
  const Plan plan = placed(sizes, w);
  const Saved saved{threshold, beta, scalars};
  SPARTAN_CUDA_DISPATCH(gradient<T>(table, plan, saved, false, false, w, Launches(plan, kResident<T>, stream)))
}

std::vector<LaunchNote> soft_topk_global_backward_launches(Dtype dtype, bool cost_arrays, bool cost_grad) {
  std::vector<LaunchNote> notes;
  const Table table{nullptr, 0};
  const Plan plan(table);
  const Workspace w(nullptr, plan);
  SPARTAN_CUDA_DISPATCH(gradient<T>(table, plan, {}, cost_arrays, cost_grad, w, Launches(&notes)))
  return notes;
}

}  // namespace spartan::cuda
