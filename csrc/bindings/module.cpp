// The extension module: how it was built, and the functions of each subject.
#include <cstdlib>

#include "bindings.h"

namespace py = pybind11;
using namespace spartan;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels over raw pointers. Call them through spartan_kernels.ops.";
  py::register_exception<NotFinite>(m, "NotFinite", PyExc_ValueError);
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

  // Python's own way costs as much as a small product where the variable is not set.
  m.def("environment", [](const char* name) { return std::getenv(name); });

  py::module_ cpu_module = m.def_submodule("cpu");
  cpu_module.def("instruction_set", &cpu::instruction_set);
  cpu_module.def("parallel_available", &cpu::parallel_available);
  py::module_* cuda_module = nullptr;
#ifdef SPARTAN_WITH_CUDA
  py::module_ with_cuda = m.def_submodule("cuda");
  with_cuda.def("problem", &cuda::problem);
  cuda_module = &with_cuda;
#endif
  bindings::bind_topk(m, cpu_module, cuda_module);
  bindings::bind_masked_weight(m, cpu_module, cuda_module);
  bindings::bind_masked_matmul(cpu_module, cuda_module);
}
