// Whether this library's CUDA runtime can work with the driver that is here.
#include "common.cuh"

namespace spartan::cuda {

const char* problem() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return count > 0 ? nullptr : "no CUDA device";
}

}  // namespace spartan::cuda
