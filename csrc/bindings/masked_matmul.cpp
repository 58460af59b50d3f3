#include "bindings.h"

namespace spartan::bindings {
namespace {

void bind_cpu(py::module_& m) {
  py::class_<cpu::BlockMatrix>(m, "BlockMatrix")
      .def(py::init([](Address data, int64_t out, int64_t in, int64_t rows, int64_t columns, int64_t stride, Address gate,
                       Address row_offsets, Address column_indices, Address column_offsets, Address row_indices,
                       Address order, Address positions, int64_t stored) {
        return cpu::BlockMatrix{at(data), out, in, rows, columns, stride, at<const float>(gate),
                                {at<const int32_t>(row_offsets), at<const int32_t>(column_indices),
                                 at<const int32_t>(column_offsets), at<const int32_t>(row_indices), at<const int32_t>(order)},
                                at<const int32_t>(positions), stored};
      }));
  py::class_<cpu::ActiveGates>(m, "ActiveGates")
      .def(py::init([](Address gate, int gate_bytes, Address mask, int64_t grid_rows, int64_t grid_columns) {
        return cpu::ActiveGates{at(gate), gate_bytes, at<const uint8_t>(mask), grid_rows, grid_columns};
      }));
  m.def(
      "block_layout_rows",
      [](const cpu::ActiveGates& active, Address row_offsets, int threads) {
        return cpu::block_layout_rows(active, at<int32_t>(row_offsets), threads);
      },
      Unlocked());
  m.def("block_layout_scratch", &cpu::block_layout_scratch);
  m.def(
      "block_layout",
      [](const cpu::ActiveGates& active, Address row_offsets, Address column_indices, Address column_offsets, Address row_indices,
         Address order, int64_t capacity, Address scratch, int threads) {
        cpu::block_layout(active,
                          {at<int32_t>(row_offsets), at<int32_t>(column_indices), at<int32_t>(column_offsets),
                           at<int32_t>(row_indices), at<int32_t>(order)},
                          capacity, at<int32_t>(scratch), threads);
      },
      Unlocked());
  m.def(
      "multiply_adds",
      [](int64_t rounds, Address sinks, int threads) { return cpu::multiply_adds(rounds, at<float>(sinks), threads); },
      Unlocked());
  m.def("masked_matmul_workspace_bytes", &cpu::masked_matmul_workspace_bytes);
  m.def(
      "masked_matmul",
      [](int dtype, const cpu::BlockMatrix& w, Address x, int64_t tokens, int64_t stride, Address bias, int activation,
         Address y, Address saved, Address workspace, int64_t bytes, int threads) {
        cpu::masked_matmul(static_cast<Dtype>(dtype), w, {at(x), tokens, stride}, at(bias),
                           static_cast<cpu::Activation>(activation), at(y), at(saved), {at(workspace), bytes}, threads);
      },
      Unlocked());
  m.def(
      "masked_matmul_input_gradient",
      [](int dtype, const cpu::BlockMatrix& w, Address dz, int64_t tokens, int64_t stride, Address dx, Address workspace,
         int64_t bytes, int threads) {
        cpu::masked_matmul_input_gradient(static_cast<Dtype>(dtype), w, {at(dz), tokens, stride}, at(dx),
                                          {at(workspace), bytes}, threads);
      },
      Unlocked());
  m.def("sampled_matmul_workspace_bytes", &cpu::sampled_matmul_workspace_bytes);
  m.def(
      "sampled_matmul",
      [](int dtype, const cpu::BlockMatrix& w, Address dz, int64_t dz_stride, Address x, int64_t x_stride, int64_t tokens,
         Address raw, Address grad_gate, Address workspace, int64_t bytes, int threads) {
        cpu::sampled_matmul(static_cast<Dtype>(dtype), w, {at(dz), tokens, dz_stride}, {at(x), tokens, x_stride},
                            at<float>(raw), at<float>(grad_gate), {at(workspace), bytes}, threads);
      },
      Unlocked());
}

#ifdef SPARTAN_WITH_CUDA
void bind_cuda(py::module_& m) {
  m.def(
      "block_layout",
      [](Address gate, int gate_bytes, Address mask, int64_t grid_rows, int64_t grid_columns, Address counts,
         Address row_offsets, Address column_indices, Address column_offsets, Address row_indices, Address order, Address stream,
         int device) {
        cuda::block_layout(at(gate), gate_bytes, at<const uint8_t>(mask), grid_rows, grid_columns, at<int32_t>(counts),
                           at<int32_t>(row_offsets), at<int32_t>(column_indices), at<int32_t>(column_offsets),
                           at<int32_t>(row_indices), at<int32_t>(order), stream_of(stream, device));
      },
      Unlocked());
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
      Unlocked());
  m.def(
      "masked_matmul_input_gradient",
      [](int dtype, const cpu::BlockMatrix& w, Address dz, int64_t tokens, int64_t stride, Address dx, Address workspace,
         Address stream, int device) {
        cuda::masked_matmul_input_gradient(static_cast<Dtype>(dtype), w, {at(dz), tokens, stride}, at(dx), at(workspace),
                                           stream_of(stream, device));
      },
      Unlocked());
  m.def(
      "sampled_matmul",
      [](int dtype, const cpu::BlockMatrix& w, Address dz, int64_t dz_stride, Address x, int64_t x_stride, int64_t tokens,
         Address result, Address grad_gate, Address stream, int device) {
        cuda::sampled_matmul(static_cast<Dtype>(dtype), w, {at(dz), tokens, dz_stride}, {at(x), tokens, x_stride},
                             at(result), at<float>(grad_gate), stream_of(stream, device));
      },
      Unlocked());
  m.def(
      "gate_gradient",
      [](int dtype, const cpu::BlockMatrix& w, Address raw, Address grad_gate, Address stream, int device) {
        cuda::gate_gradient(static_cast<Dtype>(dtype), w, at(raw), at<float>(grad_gate), stream_of(stream, device));
      },
      Unlocked());
}
#endif

}  // namespace

void bind_masked_matmul(py::module_& cpu, [[maybe_unused]] py::module_* cuda) {
  bind_cpu(cpu);
#ifdef SPARTAN_WITH_CUDA
  bind_cuda(*cuda);
#endif
}

}  // namespace spartan::bindings
