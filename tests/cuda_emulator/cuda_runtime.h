// A stand-in for the CUDA runtime that runs the kernels of csrc/cuda on the CPU, for tests on machines without a GPU.
//
// Modelled:
// - Threads of a block are fibers, which change at barriers, in an order drawn anew between any two of them. Blocks run one
//   after another in an order drawn for each launch; blocks of a cooperative launch, two of them, take turns. The orders
//   follow from SPARTAN_EMULATOR_SEED (1 if it is not set).
// - Every access of shared and global memory is held against those of the other threads (races.h): a launch fails where two
//   that may happen at once touch the same bytes and one of them writes, or where shared memory is read that was not written.
//   ldmatrix reads for the lane that gives the address.
//   __syncthreads, __syncwarp, a grid's sync and fences with atomics order accesses; shuffles, votes, ldmatrix and mma wait
//   for the warp but order nothing, as CUDA has it.
// - A launch fails where threads wait for a barrier that others never reach. Dynamic shared memory begins as NaN.
// - 2^x and 1 / x to the errors that PTX allows their approximations.
// - Shuffles, votes, ldmatrix, mma of 16-bit numbers and of TF32 (mma_emulated.h). What cp.async copies arrives when its thread
//   waits for its group, not sooner; until then its place holds NaN, and touching it is a race.
//
// Not modelled: the weak order of memory beyond such races (values are always those of the last write), caches, volatile,
// spinning on memory (a thread runs to its next barrier), divergence in a warp beyond masks, bank conflicts, mma's own order of
// summation, several streams, and time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // blocks that take turns have a thread of the system each
#define __launch_bounds__(...)
#define __noinline__
#define SPARTAN_INLINE [[gnu::always_inline]] inline  // so that a race is reported at the line of the kernel

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
// Constant for the fiber that reads them; the emulator gives each its own.
extern const uint3 threadIdx __asm__("emulator_thread_index"), blockIdx __asm__("emulator_block_index");
extern const dim3 blockDim __asm__("emulator_block_dim"), gridDim __asm__("emulator_grid_dim");

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulator {

// Runs a grid; cudaErrorLaunchFailure where the launch is at fault.
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);
const char* last_failure();

float* dynamic_shared();
uint64_t block_number();                                          // that no two blocks share
void wait_for_block();
void wait_for_warp(unsigned mask);                                // orders nothing
void synchronise_warp(unsigned mask);                             // and this orders memory
void wait_for_grid();
uint64_t exchange(unsigned mask, uint64_t value, unsigned lane);  // what that lane passes
void fence();

// Accesses that this code makes are not the kernel's.
void unwatch();
void watch();
struct Unwatched {
  Unwatched() { unwatch(); }
  ~Unwatched() { watch(); }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};
// These are.
void note_read(const void* from, size_t bytes);
void note_atomic(void* to, size_t bytes);
void note_copy(void* to, size_t bytes);     // one that is under way from now on ...
void note_arrival(void* to, size_t bytes);  // ... until now

void count_bytes(size_t read, size_t written);

// The approximate instructions, off by what PTX allows them, in a direction that follows from the bits; no result is denormal.
inline float off_by(double exact, double relative) {
  uint64_t bits;
  std::memcpy(&bits, &exact, sizeof bits);
  const double direction = static_cast<double>(bits * 0x9e3779b97f4a7c15u >> 40) / 0x1p23 - 1.0;
  const float y = static_cast<float>(exact * (1.0 + relative * direction));
  return std::fabs(y) < 0x1p-126f ? y * 0.0f : y;
}
inline float rounded_exp2(float x) { return off_by(std::exp2(static_cast<double>(x)), 0x1p-22); }
inline float rounded_reciprocal(float x) { return off_by(1.0 / static_cast<double>(x), 0x1p-23); }

}  // namespace emulator

inline const char* cudaGetErrorString(cudaError_t) { return emulator::last_failure(); }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
constexpr int kEmulatedSharedBytes = 64 << 10;
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = which == cudaDevAttrMultiProcessorCount ? 2 : kEmulatedSharedBytes, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  return emulator::run(*config, reinterpret_cast<const void*>(kernel), [=] { kernel(arguments...); });
}

inline float* dynamic_shared() { return emulator::dynamic_shared(); }
inline void __syncthreads() { emulator::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::synchronise_warp(mask); }
inline void __threadfence() { emulator::fence(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulator::exchange(mask, bits, threadIdx.x % 32 ^ static_cast<unsigned>(other));
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  unsigned found = static_cast<unsigned>(value) << (threadIdx.x % 32);
  for (int other = 1; other < 32; other *= 2) found |= __shfl_xor_sync(mask, found, other);
  return found;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <class T, class V>
SPARTAN_INLINE T atomicAdd(T* to, V value) {
  emulator::note_atomic(to, sizeof(T));
  const emulator::Unwatched unwatched;
  const T old = *to;
  *to = static_cast<T>(old + static_cast<T>(value));
  return old;
}

// What moves past L1 in words of several entries is counted, for the tests of how much memory a kernel moves.
template <class T>
SPARTAN_INLINE T __ldcg(const T* from) {
  if constexpr (std::is_class_v<T>) emulator::count_bytes(sizeof(T), 0);
  return *from;
}
template <class T>
SPARTAN_INLINE void __stcg(T* to, T value) {
  emulator::count_bytes(0, sizeof(T));
  *to = value;
}
