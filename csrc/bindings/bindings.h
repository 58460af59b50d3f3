// What the bindings share: addresses and sizes in, exceptions out. Nothing but the files here knows Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "../ops.h"

namespace spartan::bindings {

namespace py = pybind11;
using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Kernels run without Python's lock.
using Unlocked = py::call_guard<py::gil_scoped_release>;

#ifdef SPARTAN_WITH_CUDA
inline cuda::Stream stream_of(Address handle, int device) { return {at(handle), device}; }
#endif

// By subject: each adds its functions to `_native.cpu` and, where there is one, `_native.cuda`; what both take to `_native`.
void bind_topk(py::module_& both, py::module_& cpu, py::module_* cuda);
void bind_masked_weight(py::module_& both, py::module_& cpu, py::module_* cuda);
void bind_masked_matmul(py::module_& cpu, py::module_* cuda);

}  // namespace spartan::bindings
