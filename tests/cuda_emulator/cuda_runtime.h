// A stand-in for the CUDA runtime that runs the kernels of csrc/cuda on the CPU, for tests on machines without a GPU.
// Each thread of a block is a fiber; blocks run one after another. It finds wrong results and threads that miss
// a barrier; it cannot find races.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __noinline__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
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
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
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
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}

namespace emulator {

constexpr size_t kStack = 128 << 10;
constexpr size_t kSharedMemory = 99 << 10;  // what a thread block may have on the smallest device

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool begun = false, done = false;
};

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<char> stacks;
inline unsigned current, progress;
inline std::function<void()> body;
inline Barrier block_barrier, warp_barriers[32][32];
inline uint64_t exchange[32][32];
alignas(128) inline float shared_memory[kSharedMemory / sizeof(float)];
inline uint64_t blocks_run;

inline void enter() {
  body();
  fibers[current].done = true;
  ++progress;
  _longjmp(scheduler, 1);
}

inline void yield() {
  if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
  threadIdx = {current, 0, 0};
}

inline void wait(Barrier* barrier, unsigned count) {
  const unsigned generation = barrier->generation;
  if (++barrier->arrived == count) {
    barrier->arrived = 0;
    ++barrier->generation;
    ++progress;
    return;
  }
  while (barrier->generation == generation) yield();
}

inline void resume(unsigned thread) {
  current = thread;
  threadIdx = {thread, 0, 0};
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

inline void run_block() {
  const unsigned n = blockDim.x;
  fibers.assign(n, Fiber{});
  stacks.resize(n * kStack);
  block_barrier = {};
  ++blocks_run;
  std::memset(shared_memory, 0xff, sizeof shared_memory);  // NaN
  for (auto& warp : warp_barriers)
    for (Barrier& barrier : warp) barrier = {};
  for (unsigned i = 0; i < n; ++i) {
    getcontext(&fibers[i].start);
    fibers[i].start.uc_stack.ss_sp = stacks.data() + i * kStack;
    fibers[i].start.uc_stack.ss_size = kStack;
    makecontext(&fibers[i].start, enter, 0);
  }
  for (unsigned left = n; left > 0;) {
    const unsigned before = progress;
    left = 0;
    for (unsigned i = 0; i < n; ++i) {
      if (!fibers[i].done) resume(i);
      left += !fibers[i].done;
    }
    if (progress == before) {
      std::fprintf(stderr, "CUDA emulator: %u of %u threads wait for a barrier that the others never reach\n", left, n);
      std::abort();
    }
  }
}

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  if (config->dynamicSmemBytes > emulator::kSharedMemory) {
    std::fprintf(stderr, "CUDA emulator: %zu bytes of shared memory\n", config->dynamicSmemBytes);
    std::abort();
  }
  gridDim = config->numAttrs > 0 ? dim3(1) : config->gridDim;  // blocks that wait for each other: one, as they run in turn
  blockDim = config->blockDim;
  emulator::body = [=] { kernel(arguments...); };
  for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = {x, y, 0};
      emulator::run_block();
    }
  return cudaSuccess;
}

inline float* dynamic_shared() { return emulator::shared_memory; }
inline void __syncthreads() { emulator::wait(&emulator::block_barrier, blockDim.x); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  static_assert(sizeof(T) <= 8);
  const unsigned thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const unsigned threads = static_cast<unsigned>(__builtin_popcount(mask));
  emulator::Barrier* barrier = &emulator::warp_barriers[warp][__builtin_ctz(mask)];
  std::memcpy(&emulator::exchange[warp][lane], &value, sizeof value);
  emulator::wait(barrier, threads);
  T result;
  std::memcpy(&result, &emulator::exchange[warp][lane ^ static_cast<unsigned>(other)], sizeof result);
  emulator::wait(barrier, threads);
  return result;
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  unsigned found = static_cast<unsigned>(value) << (threadIdx.x % 32);
  for (int other = 1; other < 32; other *= 2) found |= __shfl_xor_sync(mask, found, other);
  return found;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <class T, class V>
T atomicAdd(T* to, V value) {
  const T old = *to;
  *to = static_cast<T>(old + static_cast<T>(value));
  return old;
}
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

// What moves past L1 in words of several entries is counted, for the tests of how much memory a kernel moves.
extern "C" {
[[gnu::visibility("default"), gnu::used]] inline uint64_t emulator_bytes_read = 0, emulator_bytes_written = 0;
}
template <class T>
T __ldcg(const T* from) {
  if constexpr (std::is_class_v<T>) emulator_bytes_read += sizeof(T);
  return *from;
}
template <class T>
void __stcg(T* to, T value) {
  emulator_bytes_written += sizeof(T);
  *to = value;
}
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
