// Many tensors walked by one grid: a table on the device, chunks that do not depend on the grid, sums in a fixed order.
#pragma once

#include "../host_device.h"
#include "common.cuh"

namespace spartan::cuda {

constexpr int kPerThread = 16;  // entries that a thread adds in float32, before it does in float64
constexpr int64_t kPiece = 2 * kThreads * kPerThread;  // the smallest chunk
constexpr int64_t kMaxChunks = 1 << 14;                // and one more for each tensor
constexpr int kMaxGrid = 2048;
constexpr int kPartials = 8;  // numbers that a thread block may hand over

struct Part {
  TableRow row;
  int64_t first_index, first_chunk;
  int64_t aligned;  // every array of it can be moved in words of 16 bytes
};

inline bool aligned(const TableRow& row) {
  auto bits = reinterpret_cast<uintptr_t>(row.values);
  if (row.cost_step != 0) bits |= reinterpret_cast<uintptr_t>(row.costs);
  for (void* array : row.extra) bits |= reinterpret_cast<uintptr_t>(array);
  return bits % 16 == 0;
}

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
  Part* to;
  uint4* cleared;  // what shall be 0 before anything is counted there, by the first of the launches
  int count, clear;

  // By a whole thread block, whose threads then all see it.
  __device__ void arrive() const {
    constexpr int kWords = sizeof(Part) / sizeof(uint64_t);
    const uint64_t* from = reinterpret_cast<const uint64_t*>(parts);
    for (int i = threadIdx.x; i < count * kWords; i += kThreads) reinterpret_cast<uint64_t*>(to)[i] = from[i];
    for (int i = threadIdx.x; i < clear; i += kThreads) cleared[i] = uint4{0u, 0u, 0u, 0u};
    __syncthreads();
  }
};

static __global__ void __launch_bounds__(kThreads) send_kernel(Sent sent) { sent.arrive(); }

// Cuts a table into what one launch takes; an empty table into one such part.
class Delivery {
 public:
  Delivery(const Table& table, const Plan& plan, void* cleared, int64_t bytes)
      : table_(table), plan_(plan), cleared_(static_cast<uint4*>(cleared)), clear_(static_cast<int>(bytes / 16)) {
    static_assert(sizeof(Sent) <= 3400 && sizeof(uint4) == 16);  // 4096 bytes with what else a kernel is given
  }
  int64_t left() const { return table_.count - begin_; }
  Sent next() {
    Sent sent{};
    sent.to = plan_.parts + begin_;
    sent.count = static_cast<int>(std::min<int64_t>(kSent, left()));
    sent.cleared = cleared_;
    sent.clear = begin_ == 0 ? clear_ : 0;
    for (int i = 0; i < sent.count; ++i) {
      const TableRow& row = table_.rows[begin_ + i];
      sent.parts[i] = {row, index_, chunk_, aligned(row)};
      index_ += row.length;
      chunk_ += (row.length + plan_.chunk_length - 1) / plan_.chunk_length;
    }
    begin_ += sent.count;
    return sent;
  }

 private:
  const Table& table_;
  const Plan& plan_;
  uint4* cleared_;
  int clear_;
  int64_t begin_ = 0, index_ = 0, chunk_ = 0;
};

// The tensor that holds a chunk or an entry: the last whose first is not after it. Empty tensors share their successor's.
__device__ inline const Part* part_at(const Plan& plan, int64_t Part::*first, int64_t wanted) {
  int64_t low = 0, high = plan.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (plan.parts[middle].*first <= wanted) low = middle;
    else high = middle;
  }
  return plan.parts + low;
}

// Neighbouring entries of one tensor in one thread: u = v / a or |v| / a, and a, which is 0 where there is no entry.
template <class T>
struct Lanes {
  static constexpr int kCount = 16 / sizeof(T);
  int64_t first;
  int live;
  bool whole;  // all of them are there, and can be moved in one word
  float u[kCount], a[kCount];
};

// One tensor as the kernels see it.
template <class T>
struct Entries {
  static constexpr int kLanes = Lanes<T>::kCount;
  const T* values;
  const T* costs;
  int64_t cost_step, first_index;
  bool absolute, aligned;
  void* const* extra;

  __device__ Entries(const Plan& plan, const Part& part)
      : values(static_cast<const T*>(part.row.values)),
        costs(static_cast<const T*>(part.row.costs)),
        cost_step(part.row.cost_step),
        first_index(part.first_index),
        absolute(plan.absolute),
        aligned(part.aligned),
        extra(part.row.extra) {}

  __device__ float cost(int64_t i) const { return costs == nullptr ? 1.0f : to_float(costs[i * cost_step]); }
  __device__ float ratio(float v, float a) const {
    const float magnitude = absolute ? fabsf(v) : v;
    return costs == nullptr ? magnitude : magnitude / a;
  }
  __device__ float ratio_at(int64_t i, float a) const { return ratio(to_float(values[i]), a); }

  template <class U>
  __device__ Pack<U, kLanes> load(const U* from, int64_t i, int live) const {
    if (aligned && live == kLanes) return load_streamed<kLanes>(from + i);
    Pack<U, kLanes> pack;
#pragma unroll
    for (int j = 0; j < kLanes; ++j) pack.lane[j] = j < live ? from[i + j] : from_float<U>(0.0f);
    return pack;
  }
  template <class U>
  __device__ Pack<U, kLanes> load(const U* from, const Lanes<T>& lanes) const {
    if (lanes.whole) return load_streamed<kLanes>(from + lanes.first);
    return load(from, lanes.first, lanes.live);
  }
  template <class U>
  __device__ void store(U* to, const Lanes<T>& lanes, const Pack<U, kLanes>& pack) const {
    if (lanes.whole) return store_streamed<kLanes>(to + lanes.first, pack);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      if (j < lanes.live) to[lanes.first + j] = pack.lane[j];
    }
  }

  __device__ Lanes<T> lanes(const Pack<T, kLanes>& v, int64_t i, int live) const {
    Lanes<T> out;
    out.first = i;
    out.live = live;
    out.whole = aligned && live == kLanes;
    const float one = cost_step == 0 ? cost(0) : 1.0f;
    Pack<T, kLanes> a;
    if (cost_step != 0) a = load(costs, i, live);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const float each = cost_step != 0 && j < live ? to_float(a.lane[j]) : one;
      out.u[j] = ratio(to_float(v.lane[j]), each);
      out.a[j] = j < live ? each : 0.0f;
    }
    return out;
  }
  // The same where all of them are there, and nothing has a cost.
  __device__ Lanes<T> plain_lanes(const Pack<T, kLanes>& v, int64_t i) const {
    Lanes<T> out;
    out.first = i;
    out.live = kLanes;
    out.whole = true;
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const float x = to_float(v.lane[j]);
      out.u[j] = absolute ? fabsf(x) : x;
      out.a[j] = 1.0f;
    }
    return out;
  }
};

// Calls f(entries, lanes) for the entries from `begin` to `end` that fall to this thread, flush() after every kPerThread of
// them. kPlain: a whole number of words, without costs.
template <bool kPlain, class T, class F, class Flush>
__device__ inline void walk_span(const Entries<T>& entries, int64_t begin, int64_t end, F f, Flush flush) {
  constexpr int kLanes = Lanes<T>::kCount, kLoads = kPerThread / kLanes;
  constexpr int64_t kStep = kThreads * kLanes;
  const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kLanes;
  const auto live = [&](int64_t i) { return static_cast<int>(end - i < kLanes ? (end > i ? end - i : 0) : kLanes); };
  const auto load = [&](int64_t i) {
    if constexpr (!kPlain) return entries.load(entries.values, i, live(i));
    return i < end ? load_streamed<kLanes>(entries.values + i) : Pack<T, kLanes>{};
  };
  // two loads are under way while an older one is worked on
  Pack<T, kLanes> next = load(first);
  Pack<T, kLanes> later = load(first + kStep);
  int since = 0;
#pragma unroll 1
  for (int64_t i = first; i < end; i += kStep) {
    const Pack<T, kLanes> here = next;
    next = later;
    later = load(i + 2 * kStep);
    if constexpr (kPlain) f(entries, entries.plain_lanes(here, i));
    else f(entries, entries.lanes(here, i, live(i)));
    if (++since < kLoads) continue;
    flush();
    since = 0;
  }
  flush();
}

// The same for a chunk.
template <class T, class F, class Flush>
__device__ inline void walk_chunk(const Plan& plan, int64_t chunk, F f, Flush flush) {
  const Part* part = part_at(plan, &Part::first_chunk, chunk);
  const Entries<T> entries(plan, *part);
  const int64_t begin = (chunk - part->first_chunk) * plan.chunk_length, length = part->row.length;
  const int64_t end = begin + plan.chunk_length < length ? begin + plan.chunk_length : length;
  const bool plain = entries.aligned && entries.costs == nullptr && (end - begin) % Lanes<T>::kCount == 0;
  if (plain) walk_span<true, T>(entries, begin, end, f, flush);
  else walk_span<false, T>(entries, begin, end, f, flush);
}

// Every second pass walks backwards: it meets what the one before left in the cache.
template <class T, class F, class Flush>
__device__ inline void walk(const Plan& plan, int pass, F f, Flush flush) {
  for (int64_t chunk = blockIdx.x; chunk < plan.chunks; chunk += gridDim.x)
    walk_chunk<T>(plan, pass % 2 == 0 ? chunk : plan.chunks - 1 - chunk, f, flush);
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
    __threadfence();  // by the thread that took the ticket: the barrier then passes on to all what the others wrote
  }
  __syncthreads();
  if (!last) return false;
  for (int n = 0; n < N; ++n) x[n] = op.identity(n);
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    for (int n = 0; n < N; ++n) x[n] = op(x[n], __ldcg(partials + b * kPartials + n), n);
  }
  group_reduce<kThreads>(x, op);
  if (threadIdx.x == 0) *ticket = 0;
  return true;
}

// Few enough entries for one thread block.
SPARTAN_HD inline bool alone(const Plan& plan) { return plan.length <= 8 * kPiece; }

// Thread blocks of a walk over T that a multiprocessor holds: more loads under way against registers for wider lanes.
template <class T>
constexpr int kResident = sizeof(T) == 4 ? 3 : 2;

inline unsigned grid_of(const Plan& plan, int resident, Stream stream) {
  if (alone(plan)) return 1;
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, stream.device));
  return blocks_for(plan.chunks, 1, std::min(processors * resident, kMaxGrid));
}

}  // namespace spartan::cuda
