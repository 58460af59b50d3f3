// Many tensors walked by one grid: a table on the device, chunks that do not depend on the grid, sums in a fixed order.
#pragma once

#include "../host_device.h"
#include "common.cuh"

namespace spartan::cuda {

constexpr int kPerThread = 16;
constexpr int64_t kPiece = kThreads * kPerThread;  // what a thread block reads between two additions in float64
constexpr int64_t kMaxChunks = 1 << 14;            // and one more for each tensor
constexpr int kMaxGrid = 2048;
constexpr int kPartials = 8;  // numbers that a thread block may hand over

struct Part {
  TableRow row;
  int64_t first_index, first_chunk;
};

struct Plan {
  Part* parts;
  int64_t count, length, chunks, chunk_length;
  bool absolute;

  explicit Plan(const Table& table, bool magnitudes = false)
      : parts(nullptr), count(table.count), length(0), chunks(0), absolute(magnitudes) {
    for (int64_t p = 0; p < count; ++p) length += table.rows[p].length;
    chunk_length = std::max<int64_t>((length + kMaxChunks * kPiece - 1) / (kMaxChunks * kPiece), 1) * kPiece;
    for (int64_t p = 0; p < count; ++p) chunks += (table.rows[p].length + chunk_length - 1) / chunk_length;
  }
};

// The table travels in the launches' arguments: no pinned memory to keep, and a captured graph holds its own copy.
constexpr int kSent = 40;
struct Sent {
  Part parts[kSent];
};

__global__ void __launch_bounds__(kThreads) send_table_kernel(Sent sent, int count, Part* to) {
  constexpr int kWords = sizeof(Part) / sizeof(uint64_t);
  const uint64_t* from = reinterpret_cast<const uint64_t*>(&sent);
  for (int i = threadIdx.x; i < count * kWords; i += kThreads) reinterpret_cast<uint64_t*>(to)[i] = from[i];
}

inline void send_table(const Table& table, const Plan& plan, Stream stream) {
  static_assert(sizeof(Sent) <= 4000);
  int64_t index = 0, chunk = 0;
  for (int64_t begin = 0; begin < table.count; begin += kSent) {
    Sent sent{};
    const int count = static_cast<int>(std::min<int64_t>(kSent, table.count - begin));
    for (int i = 0; i < count; ++i) {
      const TableRow& row = table.rows[begin + i];
      sent.parts[i] = {row, index, chunk};
      index += row.length;
      chunk += (row.length + plan.chunk_length - 1) / plan.chunk_length;
    }
    launch(stream, &send_table_kernel, 1, kThreads, sent, count, plan.parts + begin);
  }
}

// The tensor that holds a chunk: the last whose first chunk is not after it. Empty tensors share their successor's first.
__device__ inline const Part* part_of(const Plan& plan, int64_t chunk) {
  int64_t low = 0, high = plan.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (plan.parts[middle].first_chunk <= chunk) low = middle;
    else high = middle;
  }
  return plan.parts + low;
}

// Entries of one tensor as the kernels see them: u = v / a or |v| / a.
template <class T>
struct Entries {
  const T* values;
  const T* costs;
  int64_t cost_step, first_index;
  bool absolute;
  void* const* extra;

  __device__ Entries(const Plan& plan, const Part& part)
      : values(static_cast<const T*>(part.row.values)),
        costs(static_cast<const T*>(part.row.costs)),
        cost_step(part.row.cost_step),
        first_index(part.first_index),
        absolute(plan.absolute),
        extra(part.row.extra) {}
  __device__ float cost(int64_t i) const { return costs == nullptr ? 1.0f : to_float(costs[i * cost_step]); }
  __device__ float ratio(int64_t i, float a) const {
    const float v = to_float(values[i]), magnitude = absolute ? fabsf(v) : v;
    return costs == nullptr ? magnitude : magnitude / a;
  }
};

// Calls f(entries, i, u, a) for the entries of a chunk that fall to this thread, flush() after every kPerThread of them.
template <class T, class F, class Flush>
__device__ inline void walk_chunk(const Plan& plan, int64_t chunk, F f, Flush flush) {
  const Part* part = part_of(plan, chunk);
  const Entries<T> entries(plan, *part);
  const int64_t begin = (chunk - part->first_chunk) * plan.chunk_length, length = part->row.length;
  const int64_t end = begin + plan.chunk_length < length ? begin + plan.chunk_length : length;
  for (int64_t piece = begin; piece < end; piece += kPiece) {
#pragma unroll 4
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t i = piece + j * kThreads + threadIdx.x;
      if (i < end) {
        const float a = entries.cost(i);
        f(entries, i, entries.ratio(i, a), a);
      }
    }
    flush();
  }
}

template <class T, class F, class Flush>
__device__ inline void walk(const Plan& plan, F f, Flush flush) {
  for (int64_t chunk = blockIdx.x; chunk < plan.chunks; chunk += gridDim.x) walk_chunk<T>(plan, chunk, f, flush);
}

// Reduces x over the grid, in the order of its thread blocks. True in the last one to arrive, whose threads then all hold
// the result and see what the others wrote; `ticket` must be 0 and is again.
template <int N, class Op>
__device__ inline bool grid_reduce(double (&x)[N], Op op, double* partials, unsigned* ticket) {
  static_assert(N <= kPartials);
  __shared__ bool last;
  group_reduce<kThreads>(x, op);
  if (threadIdx.x == 0) {
    for (int n = 0; n < N; ++n) partials[blockIdx.x * kPartials + n] = x[n];
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
  for (int n = 0; n < N; ++n) x[n] = op.identity(n);
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    for (int n = 0; n < N; ++n) x[n] = op(x[n], __ldcg(partials + b * kPartials + n), n);
  }
  group_reduce<kThreads>(x, op);
  if (threadIdx.x == 0) *ticket = 0;
  return true;
}

// Few enough entries for one thread block.
SPARTAN_HD inline bool alone(const Plan& plan) { return plan.length <= 16 * kPiece; }

inline unsigned grid_of(const Plan& plan, Stream stream) {
  if (alone(plan)) return 1;
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, stream.device));
  constexpr int kBlocksEach = 6;
  return blocks_for(plan.chunks, 1, std::min(processors * kBlocksEach, kMaxGrid));
}

}  // namespace spartan::cuda
