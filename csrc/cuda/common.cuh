// Element types, reductions in a fixed order, and launches: what every CUDA kernel here shares.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../ops.h"

// Runs `call` with T naming the element type of `dtype`.
#define SPARTAN_CUDA_DISPATCH(call)    \
  switch (dtype) {                     \
    case Dtype::float32: {             \
      using T = float;                 \
      call;                            \
      break;                           \
    }                                  \
    case Dtype::bfloat16: {            \
      using T = __nv_bfloat16;         \
      call;                            \
      break;                           \
    }                                  \
    case Dtype::float16: {             \
      using T = __half;                \
      call;                            \
      break;                           \
    }                                  \
    default:                           \
      throw std::invalid_argument("the CUDA kernels serve float32, bfloat16 and float16"); \
  }

namespace spartan::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

#ifdef __CUDACC__
// The thread block's memory whose size the launch gives.
__device__ inline float* dynamic_shared() {
  extern __shared__ __align__(16) float memory[];
  return memory;
}
#endif

// What a thread block may ask for of it, beside what its kernel declares.
inline int shared_limit(const Stream& stream) {
  constexpr int kDeclared = 4 << 10;
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device));
  return bytes - kDeclared;
}

struct Block {
  int threads, shared_bytes = 0;
  Block(int threads_, int shared_bytes_ = 0) : threads(threads_), shared_bytes(shared_bytes_) {}
};

template <class... Parameters, class... Arguments>
void launch(const Stream& stream, void (*kernel)(Parameters...), dim3 grid, Block block, Arguments... arguments) {
  check(cudaSetDevice(stream.device));  // this library's runtime is its own; the caller's current device is not known to it
  constexpr int kWithoutAsking = 44 << 10;
  if (block.shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, block.shared_bytes));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(block.threads));
  config.dynamicSmemBytes = static_cast<size_t>(block.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// All thread blocks at once on the device, so that they can wait for each other; fewer than asked for if it has no room.
template <class... Parameters, class... Arguments>
void launch_together(const Stream& stream, void (*kernel)(Parameters...), unsigned grid, int threads, Arguments... arguments) {
  check(cudaSetDevice(stream.device));
  int processors = 0, blocks = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, stream.device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(grid, static_cast<unsigned>(std::max(processors * blocks, 1))));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &together;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

inline unsigned blocks_for(int64_t items, int64_t per_block, int64_t limit = 0x7fffffff) {
  return static_cast<unsigned>(std::clamp<int64_t>((items + per_block - 1) / per_block, 1, limit));
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ inline int bits_of(float x) { return std::bit_cast<int>(x); }

// An entry of -inf is as if it were not there: its mask is 0, and it costs nothing of the budget.
__device__ inline bool masked(float u) { return u == -INFINITY; }

// 2^x and 1 / x by one instruction each, to about a unit in the last place.
__device__ inline float fast_exp2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulator::rounded_exp2(x);
#endif
}
__device__ inline float fast_reciprocal(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulator::rounded_reciprocal(x);
#endif
}
// 1 / x to rounding, for x of which 1 / x is a normal number.
__device__ inline float reciprocal(float x) {
  const float y = fast_reciprocal(x);
  return fmaf(y, fmaf(-x, y, 1.0f), y);
}
// log(x / y) of positive numbers to 0.06, from their exponents and as if mantissas were logarithms.
__device__ inline float rough_log(float x, float y) {
  constexpr float kToLog = 0.6931471805599453f / (1 << 23);
  return static_cast<float>(bits_of(x) - bits_of(y)) * kToLog;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half(x);
}

// V neighbours, moved by one instruction where they fill 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T lane[V];
};

template <int V, class T>
__device__ inline bool aligned_to(const T* at) {
  return reinterpret_cast<uintptr_t>(at) % sizeof(Pack<T, V>) == 0;
}

template <int V, class T>
__device__ inline Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <int V, class T>
__device__ inline void store_pack(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

template <int kBytes>
struct Word;
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// The same past L1, for what is read or written once in a pass.
template <int V, class T>
__device__ inline Pack<T, V> load_streamed(const T* from) {
  using W = typename Word<sizeof(T) * V>::type;
  const W word = __ldcg(reinterpret_cast<const W*>(from));
  Pack<T, V> pack;
  memcpy(&pack, &word, sizeof word);
  return pack;
}

template <int V, class T>
__device__ inline void store_streamed(T* to, const Pack<T, V>& pack) {
  using W = typename Word<sizeof(T) * V>::type;
  W word;
  memcpy(&word, &pack, sizeof word);
  __stcg(reinterpret_cast<W*>(to), word);
}

// What to do with the numbers that are reduced together: the first `sums` are added, of the rest the largest is kept.
template <int sums>
struct SumsThenMaxima {
  template <class Number>
  __device__ Number operator()(Number x, Number y, int n) const {
    return n < sums ? x + y : (x > y ? x : y);
  }
  __device__ double identity(int n) const { return n < sums ? 0.0 : -INFINITY; }
};

// Reduces x over the kGroup neighbouring threads that work together, in an order that never changes; all of them get the
// same bits. A group wider than a warp is the whole thread block, all of whose threads must call this.
template <int kGroup, class Number, int N, class Op>
__device__ inline void group_reduce(Number (&x)[N], Op op) {
  if constexpr (kGroup == 1) return;
  constexpr int kLanes = kGroup < kWarp ? kGroup : kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned group = kLanes == kWarp ? 0xffffffffu : ((1u << (kLanes % kWarp)) - 1) << (lane / kLanes * kLanes);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = op(x[n], __shfl_xor_sync(group, x[n], offset), n);
  }
  if constexpr (kGroup > kWarp) {
    __shared__ Number parts[N][kGroup / kWarp];
    if (lane == 0) {
      for (int n = 0; n < N; ++n) parts[n][threadIdx.x / kWarp] = x[n];
    }
    __syncthreads();
    for (int n = 0; n < N; ++n) {
      x[n] = parts[n][0];
      for (int warp = 1; warp < kGroup / kWarp; ++warp) x[n] = op(x[n], parts[n][warp], n);
    }
    __syncthreads();  // before `parts` is written again
  }
}

template <int kGroup, class Number, int N>
__device__ inline void group_sums(Number (&x)[N]) {
  group_reduce<kGroup>(x, SumsThenMaxima<N>{});
}

}  // namespace spartan::cuda
