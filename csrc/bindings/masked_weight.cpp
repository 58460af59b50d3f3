#include "bindings.h"

namespace spartan::bindings {
namespace {

using cpu::Blocks;
using cpu::SoftMask;

Dtype dtype_of(int element_size) { return element_size == 8 ? Dtype::float64 : Dtype::float32; }

void bind_cpu(py::module_& m) {
  m.def("blocks_workspace_bytes", &cpu::blocks_workspace_bytes);
  py::class_<SoftMask>(m, "SoftMask").def(py::init([](Address values, Address solution, double beta, Address costs, double cost) {
    return SoftMask{at(values), at<const double>(solution), beta, {at(costs), cost}};
  }));
  m.def(
      "masked_weight",
      [](int element, Blocks blocks, Address weight, SoftMask soft, Address hard, Address result, int threads) {
        cpu::masked_weight(dtype_of(element), blocks, at(weight), soft, at<const uint8_t>(hard), at(result), threads);
      },
      Unlocked());
  m.def(
      "masked_weight_backward",
      [](int element, Blocks blocks, Address grad, Address weight, SoftMask soft, Address hard, bool straight_through,
         Address result, Address workspace, int64_t bytes, int threads) {
        cpu::masked_weight_backward(dtype_of(element), blocks, at(grad), at(weight), soft, at<const uint8_t>(hard),
                                    straight_through, at(result), {at(workspace), bytes}, threads);
      },
      Unlocked());
  m.def(
      "masked_weight_coupling",
      [](int element, Blocks blocks, Address grad, Address weight, SoftMask soft, Address sums, Address workspace,
         int64_t bytes, int threads) {
        cpu::masked_weight_coupling(dtype_of(element), blocks, at(grad), at(weight), soft, at<double>(sums),
                                    {at(workspace), bytes}, threads);
      },
      Unlocked());
  m.def(
      "masked_weight_kept",
      [](int element, Blocks blocks, Address weight, SoftMask soft, Address hard, Address sums, Address workspace,
         int64_t bytes, int threads) {
        cpu::masked_weight_kept(dtype_of(element), blocks, at(weight), soft, at<const uint8_t>(hard), at<double>(sums),
                                {at(workspace), bytes}, threads);
      },
      Unlocked());
  m.def(
      "masked_weight_correct",
      [](int element, Blocks blocks, Address grad, Address weight, SoftMask soft, double scale, int threads) {
        cpu::masked_weight_correct(dtype_of(element), blocks, at(grad), at(weight), soft, scale, threads);
      },
      Unlocked());
  m.def(
      "gate_gradient",
      [](int element, Blocks blocks, Address grad, Address weight, Address gate, Address slope, Address sums,
         Address workspace, int64_t bytes, int threads) {
        cpu::gate_gradient(dtype_of(element), blocks, at(grad), at(weight), at(gate), at(slope), at(sums),
                           {at(workspace), bytes}, threads);
      },
      Unlocked());
  m.def(
      "add_block_signs",
      [](int element, Blocks blocks, Address grad, Address weight, Address pull, int threads) {
        cpu::add_block_signs(dtype_of(element), blocks, at(grad), at(weight), at(pull), threads);
      },
      Unlocked());
  m.def(
      "block_scores",
      [](int element, Blocks blocks, Address weight, Address scores, int threads) {
        cpu::block_scores(dtype_of(element), blocks, at(weight), at(scores), threads);
      },
      Unlocked());
}

#ifdef SPARTAN_WITH_CUDA
void bind_cuda(py::module_& m) {
  m.attr("coupling_workspace") = cuda::kCouplingPartials;
  m.def(
      "masked_weight",
      [](int dtype, Blocks blocks, Address weight, Address soft, Address hard, Address result, Address stream, int device) {
        cuda::masked_weight(static_cast<Dtype>(dtype), blocks, at(weight), {at(soft), at<const uint8_t>(hard)}, at(result),
                            stream_of(stream, device));
      },
      Unlocked());
  m.def(
      "masked_weight_backward",
      [](int dtype, Blocks blocks, Address grad, Address weight, Address soft, Address hard, Address beta, Address costs,
         Address cost, bool straight_through, Address result, Address stream, int device) {
        cuda::masked_weight_backward(static_cast<Dtype>(dtype), blocks, at(grad), at(weight),
                                     {at(soft), at<const uint8_t>(hard)}, at<const double>(beta),
                                     {at(costs), at<const double>(cost)}, straight_through, at(result),
                                     stream_of(stream, device));
      },
      Unlocked());
  m.def(
      "masked_weight_coupling",
      [](int dtype, Blocks blocks, Address grad, Address weight, Address soft, Address beta, Address costs, Address cost,
         Address sums, Address workspace, Address stream, int device) {
        cuda::masked_weight_coupling(static_cast<Dtype>(dtype), blocks, at(grad), at(weight), at(soft), at<const double>(beta),
                                     {at(costs), at<const double>(cost)}, at<double>(sums), at<double>(workspace),
                                     stream_of(stream, device));
      },
      Unlocked());
  m.def(
      "masked_weight_correct",
      [](int dtype, Blocks blocks, Address grad, Address weight, Address soft, Address scale, Address stream, int device) {
        cuda::masked_weight_correct(static_cast<Dtype>(dtype), blocks, at(grad), at(weight), at(soft),
                                    at<const double>(scale), stream_of(stream, device));
      },
      Unlocked());
  m.def(
      "block_scores",
      [](int dtype, Blocks blocks, Address weight, Address scores, Address stream, int device) {
        cuda::block_scores(static_cast<Dtype>(dtype), blocks, at(weight), at(scores), stream_of(stream, device));
      },
      Unlocked());
}
#endif

}  // namespace

void bind_masked_weight(py::module_& both, py::module_& cpu, [[maybe_unused]] py::module_* cuda) {
  py::class_<Blocks>(both, "Blocks")
      .def(py::init([](int64_t out, int64_t in, int64_t kernel, int64_t rows, int64_t columns) {
        return Blocks{out, in, kernel, rows, columns};
      }));
  bind_cpu(cpu);
#ifdef SPARTAN_WITH_CUDA
  bind_cuda(*cuda);
#endif
}

}  // namespace spartan::bindings
