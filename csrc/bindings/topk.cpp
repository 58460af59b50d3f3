#include <utility>
#include <vector>

#include "bindings.h"

namespace spartan::bindings {
namespace {

// A group whose exchange is a Python function: (address, bytes) to the address of what all ranks passed.
class Ranks {
 public:
  Ranks(int rank, int size, py::function gather) : rank_(rank), size_(size), gather_(std::move(gather)) {}

  Group group() const {
    return {rank_, size_,
            [](void* context, const void* mine, int64_t bytes) -> const void* {
              py::gil_scoped_acquire locked;
              const py::function& gather = static_cast<const Ranks*>(context)->gather_;
              return at(gather(reinterpret_cast<Address>(mine), bytes).cast<Address>());
            },
            const_cast<Ranks*>(this)};
  }

 private:
  int rank_, size_;
  py::function gather_;
};

// The group given, or this process alone.
Group group_of(const Ranks* ranks) { return ranks == nullptr ? Group{} : ranks->group(); }

void bind_cpu(py::module_& m) {
  static_assert(sizeof(TableRow) == 7 * 8, "backends/native/lists.py fills rows of seven 64-bit words");
  m.def("workspace_bytes", &cpu::workspace_bytes, py::arg("parts"), py::arg("length"), py::arg("element_size"),
                 py::arg("grouped") = false);
  m.def("rows_workspace_bytes", &cpu::rows_workspace_bytes);

  m.def(
      "soft_topk_global",
      [](int dtype, Address rows, int64_t count, double budget, double beta, bool absolute, Address state,
         Address threshold, Address workspace, int64_t bytes, int threads, const Ranks* ranks) {
        cpu::soft_topk_global(static_cast<Dtype>(dtype), {at<const TableRow>(rows), count}, budget, beta, absolute,
                              at<double>(state), at<double>(threshold), {at(workspace), bytes}, threads, group_of(ranks));
      },
      Unlocked());
  m.def(
      "soft_topk_global_backward",
      [](int dtype, Address rows, int64_t count, Address threshold, double beta, Address scalars, Address workspace,
         int64_t bytes, int threads, const Ranks* ranks) {
        cpu::soft_topk_global_backward(static_cast<Dtype>(dtype), {at<const TableRow>(rows), count},
                                       at<const double>(threshold), beta, at<double>(scalars), {at(workspace), bytes},
                                       threads, group_of(ranks));
      },
      Unlocked());
  m.def(
      "hard_topk_global",
      [](int dtype, Address rows, int64_t count, double budget, bool absolute, Address workspace, int64_t bytes,
         int threads, const Ranks* ranks) {
        cpu::hard_topk_global(static_cast<Dtype>(dtype), {at<const TableRow>(rows), count}, budget, absolute,
                              {at(workspace), bytes}, threads, group_of(ranks));
      },
      Unlocked());
  py::class_<cpu::Rows>(m, "Rows")
      .def(py::init([](Address values, Address costs, double cost, int64_t rows, int64_t length, int64_t stride,
                       int64_t cost_stride) {
        return cpu::Rows{at(values), at(costs), cost, rows, length, stride, cost_stride};
      }));
  m.def(
      "soft_topk_rows",
      [](int dtype, cpu::Rows rows, Address budget, int64_t budget_stride, double beta, Address mask, Address threshold,
         Address workspace, int64_t bytes, int threads) {
        cpu::soft_topk_rows(static_cast<Dtype>(dtype), rows, {at<const double>(budget), budget_stride}, beta, at(mask),
                            at<double>(threshold), {at(workspace), bytes}, threads);
      },
      Unlocked());
  m.def(
      "soft_topk_rows_backward",
      [](int dtype, cpu::Rows rows, Address grad, Address threshold, double beta, Address grad_values, Address grad_costs,
         Address grad_budget, Address grad_beta, Address workspace, int64_t bytes, int threads) {
        cpu::soft_topk_rows_backward(static_cast<Dtype>(dtype), rows, at(grad), beta,
                                     {at<const double>(threshold), at<double>(grad_budget), at<double>(grad_beta)},
                                     at(grad_values), at(grad_costs), {at(workspace), bytes}, threads);
      },
      Unlocked());
  m.def(
      "hard_topk_rows",
      [](int dtype, cpu::Rows rows, Address budget, int64_t budget_stride, Address mask, Address workspace, int64_t bytes,
         int threads) {
        cpu::hard_topk_rows(static_cast<Dtype>(dtype), rows, {at<const double>(budget), budget_stride}, at<uint8_t>(mask),
                            {at(workspace), bytes}, threads);
      },
      Unlocked());
  m.def(
      "hard_topk_indices_rows",
      [](int dtype, cpu::Rows rows, int64_t k, Address mask, Address indices, Address workspace, int64_t bytes,
         int threads) {
        cpu::hard_topk_indices_rows(static_cast<Dtype>(dtype), rows, k, at<uint8_t>(mask), at<int64_t>(indices),
                                    {at(workspace), bytes}, threads);
      },
      Unlocked());
}

#ifdef SPARTAN_WITH_CUDA
void bind_cuda(py::module_& m) {
  py::class_<cuda::Rows>(m, "Rows")
      .def(py::init([](Address values, Address costs, int64_t rows, int64_t length, int64_t stride, int64_t cost_stride,
                       int64_t cost_step) {
        return cuda::Rows{at(values), at(costs), rows, length, stride, cost_stride, cost_step};
      }));
  m.def(
      "soft_topk_rows",
      [](int dtype, cuda::Rows rows, Address budget, Address beta, Address mask, Address threshold, Address stream,
         int device) {
        cuda::soft_topk_rows(static_cast<Dtype>(dtype), rows, at<const double>(budget), at<const double>(beta), at(mask),
                             at<double>(threshold), stream_of(stream, device));
      },
      Unlocked());
  m.def(
      "soft_topk_rows_backward",
      [](int dtype, cuda::Rows rows, Address grad, Address threshold, Address beta, Address grad_values, Address grad_costs,
         Address grad_budget, Address grad_beta, Address stream, int device) {
        cuda::soft_topk_rows_backward(static_cast<Dtype>(dtype), rows, at(grad), at<const double>(threshold),
                                      at<const double>(beta), at(grad_values), at(grad_costs), at<double>(grad_budget),
                                      at<double>(grad_beta), stream_of(stream, device));
      },
      Unlocked());
  m.def(
      "hard_topk_rows",
      [](int dtype, cuda::Rows rows, Address budget, Address mask, Address stream, int device) {
        cuda::hard_topk_rows(static_cast<Dtype>(dtype), rows, at<const double>(budget), at<uint8_t>(mask),
                             stream_of(stream, device));
      },
      Unlocked());

  static_assert(sizeof(cuda::TableRow) == 7 * 8, "backends/cuda/lists.py fills rows of seven 64-bit words");
  m.def("global_workspace_bytes", [](Address rows, int64_t count) {
    return cuda::global_workspace_bytes({at<const cuda::TableRow>(rows), count});
  });
  m.def(
      "topk_global",
      [](int dtype, Address rows, int64_t count, Address budget, Address beta, bool absolute, Address state,
         Address threshold, Address workspace, Address stream, int device) {
        cuda::topk_global(static_cast<Dtype>(dtype), {at<const cuda::TableRow>(rows), count}, at<const double>(budget),
                          at<const double>(beta), absolute, at<double>(state), at<double>(threshold), at(workspace),
                          stream_of(stream, device));
      },
      Unlocked());
  const auto listed = [](const std::vector<cuda::LaunchNote>& notes) {
    py::list launches;
    for (const auto& n : notes) launches.append(py::make_tuple(n.kernel, n.read, n.written, n.cold, n.warm));
    return launches;
  };
  m.def("topk_global_launches", [listed](int dtype, bool soft, bool hard, bool cost_arrays) {
    return listed(cuda::topk_global_launches(static_cast<Dtype>(dtype), soft, hard, cost_arrays));
  });
  m.def("soft_topk_global_backward_launches", [listed](int dtype, bool cost_arrays, bool cost_grad) {
    return listed(cuda::soft_topk_global_backward_launches(static_cast<Dtype>(dtype), cost_arrays, cost_grad));
  });
  m.def(
      "soft_topk_global_backward",
      [](int dtype, Address rows, int64_t count, Address threshold, Address beta, Address scalars, Address workspace,
         Address stream, int device) {
        cuda::soft_topk_global_backward(static_cast<Dtype>(dtype), {at<const cuda::TableRow>(rows), count},
                                        at<const double>(threshold), at<const double>(beta), at<double>(scalars),
                                        at(workspace), stream_of(stream, device));
      },
      Unlocked());
}
#endif

}  // namespace

void bind_topk(py::module_& both, py::module_& cpu, [[maybe_unused]] py::module_* cuda) {
  py::class_<Ranks>(both, "Ranks").def(py::init<int, int, py::function>());
  bind_cpu(cpu);
#ifdef SPARTAN_WITH_CUDA
  bind_cuda(*cuda);
#endif
}

}  // namespace spartan::bindings
