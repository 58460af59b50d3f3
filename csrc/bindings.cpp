// The only file that knows Python: addresses and sizes in, exceptions out.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "ops.h"

namespace py = pybind11;
using namespace spartan;
using spartan::cpu::Blocks;

namespace {

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_matmul(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<cpu::BlockMatrix>(m, "BlockMatrix")
      .def(py::init([](Address data, int64_t out, int64_t in, int64_t rows, int64_t columns, int64_t stride, Address gate,
                       Address row_offsets, Address column_indices, Address column_offsets, Address row_indices,
                       Address order, Address positions, int64_t stored) {
        return cpu::BlockMatrix{at(data), out, in, rows, columns, stride, at<const float>(gate),
                                {at<const int32_t>(row_offsets), at<const int32_t>(column_indices),
                                 at<const int32_t>(column_offsets), at<const int32_t>(row_indices), at<const int32_t>(order)},
                                at<const int32_t>(positions), stored};
      }));
  m.def(
      "block_layout",
      [](Address gate, int gate_bytes, Address mask, int64_t grid_rows, int64_t grid_columns, Address counts,
         Address row_offsets, Address column_indices, Address column_offsets, Address row_indices, Address order) {
        cpu::block_layout(at(gate), gate_bytes, at<const uint8_t>(mask), grid_rows, grid_columns, at<int32_t>(counts),
                          at<int32_t>(row_offsets), at<int32_t>(column_indices), at<int32_t>(column_offsets),
                          at<int32_t>(row_indices), at<int32_t>(order));
      },
      unlocked);
  m.def("masked_matmul_workspace_bytes", &cpu::masked_matmul_workspace_bytes);
  m.def(
      "masked_matmul",
      [](int dtype, const cpu::BlockMatrix& w, Address x, int64_t tokens, int64_t stride, Address bias, int activation,
         Address y, Address saved, Address workspace, int64_t bytes, int threads) {
        cpu::masked_matmul(static_cast<Dtype>(dtype), w, {at(x), tokens, stride}, at(bias),
                           static_cast<cpu::Activation>(activation), at(y), at(saved), {at(workspace), bytes}, threads);
      },
      unlocked);
  m.def(
      "masked_matmul_input_gradient",
      [](int dtype, const cpu::BlockMatrix& w, Address dz, int64_t tokens, int64_t stride, Address dx, Address workspace,
         int64_t bytes, int threads) {
        cpu::masked_matmul_input_gradient(static_cast<Dtype>(dtype), w, {at(dz), tokens, stride}, at(dx),
                                          {at(workspace), bytes}, threads);
      },
      unlocked);
  m.def("sampled_matmul_workspace_bytes", &cpu::sampled_matmul_workspace_bytes);
  m.def(
      "sampled_matmul",
      [](int dtype, const cpu::BlockMatrix& w, Address dz, int64_t dz_stride, Address x, int64_t x_stride, int64_t tokens,
         Address raw, Address grad_gate, Address workspace, int64_t bytes, int threads) {
        cpu::sampled_matmul(static_cast<Dtype>(dtype), w, {at(dz), tokens, dz_stride}, {at(x), tokens, x_stride},
                            at<float>(raw), at<float>(grad_gate), {at(workspace), bytes}, threads);
      },
      unlocked);
}
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

Dtype dtype_of(int element_size) { return element_size == 8 ? Dtype::float64 : Dtype::float32; }

}  // namespace

#ifdef SPARTAN_WITH_CUDA
namespace {

cuda::Stream stream_of(Address handle, int device) { return {at(handle), device}; }

void bind_cuda_matmul(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def(
      "block_layout",
      [](Address gate, int gate_bytes, Address mask, int64_t grid_rows, int64_t grid_columns, Address counts,
         Address row_offsets, Address column_indices, Address column_offsets, Address row_indices, Address order, Address stream,
         int device) {
        cuda::block_layout(at(gate), gate_bytes, at<const uint8_t>(mask), grid_rows, grid_columns, at<int32_t>(counts),
                           at<int32_t>(row_offsets), at<int32_t>(column_indices), at<int32_t>(column_offsets),
                           at<int32_t>(row_indices), at<int32_t>(order), stream_of(stream, device));
      },
      unlocked);
  m.def("masked_matmul_workspace_bytes", [](int dtype, const cpu::BlockMatrix& w, int64_t tokens) {
    return cuda::masked_matmul_workspace_bytes(static_cast<Dtype>(dtype), w, tokens);
  });
  m.def(
      "masked_matmul",
      [](int dtype, const cpu::BlockMatrix& w, Address x, int64_t tokens, int64_t stride, Address bias, int activation,
         Address y, Address saved, Address workspace, Address stream, int device) {
        cuda::masked_matmul(static_cast<Dtype>(dtype), w, {at(x), tokens, stride}, at(bias),
                            static_cast<cpu::Activation>(activation), at(y), at(saved), at(workspace),
                            stream_of(stream, device));
      },
      unlocked);
  m.def(
      "masked_matmul_input_gradient",
      [](int dtype, const cpu::BlockMatrix& w, Address dz, int64_t tokens, int64_t stride, Address dx, Address workspace,
         Address stream, int device) {
        cuda::masked_matmul_input_gradient(static_cast<Dtype>(dtype), w, {at(dz), tokens, stride}, at(dx), at(workspace),
                                           stream_of(stream, device));
      },
      unlocked);
  m.def(
      "sampled_matmul",
      [](int dtype, const cpu::BlockMatrix& w, Address dz, int64_t dz_stride, Address x, int64_t x_stride, int64_t tokens,
         Address result, Address grad_gate, Address stream, int device) {
        cuda::sampled_matmul(static_cast<Dtype>(dtype), w, {at(dz), tokens, dz_stride}, {at(x), tokens, x_stride},
                             at(result), at<float>(grad_gate), stream_of(stream, device));
      },
      unlocked);
  m.def(
      "gate_gradient",
      [](int dtype, const cpu::BlockMatrix& w, Address raw, Address grad_gate, Address stream, int device) {
        cuda::gate_gradient(static_cast<Dtype>(dtype), w, at(raw), at<float>(grad_gate), stream_of(stream, device));
      },
      unlocked);
}

void bind_cuda(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.attr("coupling_workspace") = cuda::kCouplingPartials;
  m.def("problem", &cuda::problem);
  m.def(
      "masked_weight",
      [](int dtype, Blocks blocks, Address weight, Address soft, Address hard, Address result, Address stream, int device) {
        cuda::masked_weight(static_cast<Dtype>(dtype), blocks, at(weight), {at(soft), at<const uint8_t>(hard)}, at(result),
                            stream_of(stream, device));
      },
      unlocked);
  m.def(
      "masked_weight_backward",
      [](int dtype, Blocks blocks, Address grad, Address weight, Address soft, Address hard, Address beta, Address costs,
         Address cost, bool straight_through, Address result, Address stream, int device) {
        cuda::masked_weight_backward(static_cast<Dtype>(dtype), blocks, at(grad), at(weight),
                                     {at(soft), at<const uint8_t>(hard)}, at<const double>(beta),
                                     {at(costs), at<const double>(cost)}, straight_through, at(result),
                                     stream_of(stream, device));
      },
      unlocked);
  m.def(
      "masked_weight_coupling",
      [](int dtype, Blocks blocks, Address grad, Address weight, Address soft, Address beta, Address costs, Address cost,
         Address sums, Address workspace, Address stream, int device) {
        cuda::masked_weight_coupling(static_cast<Dtype>(dtype), blocks, at(grad), at(weight), at(soft), at<const double>(beta),
                                     {at(costs), at<const double>(cost)}, at<double>(sums), at<double>(workspace),
                                     stream_of(stream, device));
      },
      unlocked);
  m.def(
      "masked_weight_correct",
      [](int dtype, Blocks blocks, Address grad, Address weight, Address soft, Address scale, Address stream, int device) {
        cuda::masked_weight_correct(static_cast<Dtype>(dtype), blocks, at(grad), at(weight), at(soft),
                                    at<const double>(scale), stream_of(stream, device));
      },
      unlocked);
  m.def(
      "block_scores",
      [](int dtype, Blocks blocks, Address weight, Address scores, Address stream, int device) {
        cuda::block_scores(static_cast<Dtype>(dtype), blocks, at(weight), at(scores), stream_of(stream, device));
      },
      unlocked);

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
      unlocked);
  m.def(
      "soft_topk_rows_backward",
      [](int dtype, cuda::Rows rows, Address grad, Address threshold, Address beta, Address grad_values, Address grad_costs,
         Address grad_budget, Address grad_beta, Address stream, int device) {
        cuda::soft_topk_rows_backward(static_cast<Dtype>(dtype), rows, at(grad), at<const double>(threshold),
                                      at<const double>(beta), at(grad_values), at(grad_costs), at<double>(grad_budget),
                                      at<double>(grad_beta), stream_of(stream, device));
      },
      unlocked);
  m.def(
      "hard_topk_rows",
      [](int dtype, cuda::Rows rows, Address budget, Address mask, Address stream, int device) {
        cuda::hard_topk_rows(static_cast<Dtype>(dtype), rows, at<const double>(budget), at<uint8_t>(mask),
                             stream_of(stream, device));
      },
      unlocked);

  static_assert(sizeof(cuda::TableRow) == 7 * 8, "native_cuda.py fills rows of seven 64-bit words");
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
      unlocked);
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
      unlocked);
}

}  // namespace
#endif

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels over raw pointers. Call them through spartan_kernels.ops.";
  m.attr("compiler") = SPARTAN_COMPILER;
#ifdef SPARTAN_WITH_CUDA
  m.attr("cuda_version") = SPARTAN_CUDA_VERSION;
  m.attr("cuda_archs") = SPARTAN_CUDA_ARCHS;
  m.attr("cuda_reason") = py::none();
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_archs") = py::none();
  m.attr("cuda_reason") = SPARTAN_CUDA_REASON;
#endif

  static_assert(sizeof(TableRow) == 7 * 8, "native.py fills rows of seven 64-bit words");

  py::module_ cpu_module = m.def_submodule("cpu");
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  cpu_module.def("instruction_set", &cpu::instruction_set);
  cpu_module.def("parallel_available", &cpu::parallel_available);
  cpu_module.def("workspace_bytes", &cpu::workspace_bytes, py::arg("parts"), py::arg("length"), py::arg("element_size"),
                 py::arg("grouped") = false);
  py::class_<Ranks>(m, "Ranks").def(py::init<int, int, py::function>());
  cpu_module.def("rows_workspace_bytes", &cpu::rows_workspace_bytes);

  cpu_module.def(
      "soft_topk_global",
      [](int dtype, Address rows, int64_t count, double budget, double beta, bool absolute, Address state,
         Address threshold, Address workspace, int64_t bytes, int threads, const Ranks* ranks) {
        cpu::soft_topk_global(static_cast<Dtype>(dtype), {at<const TableRow>(rows), count}, budget, beta, absolute,
                              at<double>(state), at<double>(threshold), {at(workspace), bytes}, threads, group_of(ranks));
      },
      unlocked);
  cpu_module.def(
      "soft_topk_global_backward",
      [](int dtype, Address rows, int64_t count, Address threshold, double beta, Address scalars, Address workspace,
         int64_t bytes, int threads, const Ranks* ranks) {
        cpu::soft_topk_global_backward(static_cast<Dtype>(dtype), {at<const TableRow>(rows), count},
                                       at<const double>(threshold), beta, at<double>(scalars), {at(workspace), bytes},
                                       threads, group_of(ranks));
      },
      unlocked);
  cpu_module.def(
      "hard_topk_global",
      [](int dtype, Address rows, int64_t count, double budget, bool absolute, Address workspace, int64_t bytes,
         int threads, const Ranks* ranks) {
        cpu::hard_topk_global(static_cast<Dtype>(dtype), {at<const TableRow>(rows), count}, budget, absolute,
                              {at(workspace), bytes}, threads, group_of(ranks));
      },
      unlocked);
  py::class_<cpu::Rows>(cpu_module, "Rows")
      .def(py::init([](Address values, Address costs, double cost, int64_t rows, int64_t length, int64_t stride,
                       int64_t cost_stride) {
        return cpu::Rows{at(values), at(costs), cost, rows, length, stride, cost_stride};
      }));
  cpu_module.def(
      "soft_topk_rows",
      [](int dtype, cpu::Rows rows, Address budget, int64_t budget_stride, double beta, Address mask, Address threshold,
         Address workspace, int64_t bytes, int threads) {
        cpu::soft_topk_rows(static_cast<Dtype>(dtype), rows, {at<const double>(budget), budget_stride}, beta, at(mask),
                            at<double>(threshold), {at(workspace), bytes}, threads);
      },
      unlocked);
  cpu_module.def(
      "soft_topk_rows_backward",
      [](int dtype, cpu::Rows rows, Address grad, Address threshold, double beta, Address grad_values, Address grad_costs,
         Address grad_budget, Address grad_beta, Address workspace, int64_t bytes, int threads) {
        cpu::soft_topk_rows_backward(static_cast<Dtype>(dtype), rows, at(grad), beta,
                                     {at<const double>(threshold), at<double>(grad_budget), at<double>(grad_beta)},
                                     at(grad_values), at(grad_costs), {at(workspace), bytes}, threads);
      },
      unlocked);
  cpu_module.def(
      "hard_topk_rows",
      [](int dtype, cpu::Rows rows, Address budget, int64_t budget_stride, Address mask, Address workspace, int64_t bytes,
         int threads) {
        cpu::hard_topk_rows(static_cast<Dtype>(dtype), rows, {at<const double>(budget), budget_stride}, at<uint8_t>(mask),
                            {at(workspace), bytes}, threads);
      },
      unlocked);

  py::class_<Blocks>(m, "Blocks")
      .def(py::init([](int64_t out, int64_t in, int64_t kernel, int64_t rows, int64_t columns) {
        return Blocks{out, in, kernel, rows, columns};
      }));
  cpu_module.def("blocks_workspace_bytes", &cpu::blocks_workspace_bytes);
  cpu_module.def(
      "masked_weight",
      [](int element, Blocks blocks, Address weight, Address soft, Address hard, Address result, int threads) {
        cpu::masked_weight(dtype_of(element), blocks, at(weight), {at(soft), at<const uint8_t>(hard)}, at(result), threads);
      },
      unlocked);
  cpu_module.def(
      "masked_weight_backward",
      [](int element, Blocks blocks, Address grad, Address weight, Address soft, Address hard, double beta, Address costs,
         double cost, bool straight_through, Address result, Address workspace, int64_t bytes, int threads) {
        cpu::masked_weight_backward(dtype_of(element), blocks, at(grad), at(weight), {at(soft), at<const uint8_t>(hard)},
                                    beta, {at(costs), cost}, straight_through, at(result), {at(workspace), bytes}, threads);
      },
      unlocked);
  cpu_module.def(
      "masked_weight_coupling",
      [](int element, Blocks blocks, Address grad, Address weight, Address soft, double beta, Address costs, double cost,
         Address sums, Address workspace, int64_t bytes, int threads) {
        cpu::masked_weight_coupling(dtype_of(element), blocks, at(grad), at(weight), at(soft), beta, {at(costs), cost},
                                    at<double>(sums), {at(workspace), bytes}, threads);
      },
      unlocked);
  cpu_module.def(
      "masked_weight_correct",
      [](int element, Blocks blocks, Address grad, Address weight, Address soft, double scale, int threads) {
        cpu::masked_weight_correct(dtype_of(element), blocks, at(grad), at(weight), at(soft), scale, threads);
      },
      unlocked);
  cpu_module.def(
      "add_block_signs",
      [](int element, Blocks blocks, Address grad, Address weight, Address pull, int threads) {
        cpu::add_block_signs(dtype_of(element), blocks, at(grad), at(weight), at(pull), threads);
      },
      unlocked);
  cpu_module.def(
      "block_scores",
      [](int element, Blocks blocks, Address weight, Address scores, int threads) {
        cpu::block_scores(dtype_of(element), blocks, at(weight), at(scores), threads);
      },
      unlocked);
  bind_matmul(cpu_module);
#ifdef SPARTAN_WITH_CUDA
  py::module_ cuda_module = m.def_submodule("cuda");
  bind_cuda(cuda_module);
  bind_cuda_matmul(cuda_module);
#endif
}
