// Rows in registers: how many threads share a row of which length, and how they walk over it.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace spartan::cuda {

// Where a row's ratios u = v / a stay while it is solved: in so many registers of each thread, or ...
constexpr int kInShared = -1;  // ... in shared memory, each thread's own
constexpr int kInMemory = 0;   // ... nowhere: the row is read again, from a cache as a rule, by every walk

// One row, shared by kGroup threads.
template <class T, int kGroup, int kItems>
class Row {
 public:
  __device__ Row(const Rows& rows, int64_t row)
      : values_(static_cast<const T*>(rows.values) + row * rows.stride),
        costs_(rows.costs == nullptr ? nullptr : static_cast<const T*>(rows.costs) + row * rows.cost_stride),
        cost_step_(rows.cost_step),
        length_(static_cast<Index>(rows.length)),
        lane_(threadIdx.x % kGroup),
        kept_(kItems == kInShared ? dynamic_shared() + threadIdx.x / kGroup * length_ : nullptr) {
    if constexpr (kItems > 0) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) u_[j] = at(j) < length_ ? ratio(at(j)) : 0.0f;
    }
    if constexpr (kItems == kInShared) {
#pragma unroll 8
      for (Index i = lane_; i < length_; i += kGroup) kept_[i] = ratio(i);
    }
  }

  __device__ bool one_cost() const { return costs_ == nullptr || cost_step_ == 0; }
  __device__ float unit() const { return costs_ == nullptr ? 1.0f : to_float(costs_[0]); }
  __device__ float cost(int64_t i) const { return costs_ == nullptr ? 1.0f : to_float(costs_[i * cost_step_]); }
  __device__ bool leader() const { return lane_ == 0; }

  // Calls f(i, u) on this thread's entries, and flush() after every few of them.
  template <class F, class Flush>
  __device__ void walk(F f, Flush flush) const {
    if constexpr (kItems > 0) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (at(j) < length_) f(at(j), u_[j]);
      }
      flush();
    } else {
      constexpr int kRun = 16;
      for (Index begin = lane_; begin < length_; begin += kRun * kGroup) {
#pragma unroll 4
        for (int j = 0; j < kRun; ++j) {
          const Index i = begin + j * kGroup;
          if (i < length_) f(i, kItems == kInShared ? kept_[i] : ratio(i));
        }
        flush();
      }
    }
  }
  template <class F>
  __device__ void walk(F f) const {
    walk(f, [] {});
  }
  // The same on the entries that are not masked.
  template <class F, class Flush>
  __device__ void walk_unmasked(F f, Flush flush) const {
    walk(
        [&](int64_t i, float u) {
          if (!masked(u)) f(i, u);
        },
        flush);
  }

 private:
  using Index = std::conditional_t<kItems == kInMemory, int64_t, int>;

  __device__ Index at(int j) const { return lane_ + static_cast<Index>(j) * kGroup; }
  __device__ float ratio(int64_t i) const {
    const float v = to_float(values_[i]);
    return costs_ == nullptr ? v : v / cost(i);
  }

  const T* values_;
  const T* costs_;
  int64_t cost_step_;
  Index length_;
  int lane_;
  float* kept_;
  float u_[kItems > 0 ? kItems : 1];
};

// Threads of a thread block whose rows are shared by kGroup threads.
constexpr int block_threads(int group) { return group < kThreads ? kThreads : group; }

template <int kGroup>
__device__ inline int64_t first_row() {
  constexpr int kRowsHere = block_threads(kGroup) / kGroup;
  return static_cast<int64_t>(blockIdx.x) * kRowsHere + threadIdx.x / kGroup;
}
template <int kGroup>
__device__ inline int64_t row_stride() {
  return static_cast<int64_t>(gridDim.x) * (block_threads(kGroup) / kGroup);
}

// Calls f(integral constants of group and items, bytes of shared memory) for rows of this length.
template <class F>
void for_length(int64_t length, Stream stream, F f) {
  using std::integral_constant;
  if (length <= 4) return f(integral_constant<int, 4>{}, integral_constant<int, 1>{}, 0);
  if (length <= 16) return f(integral_constant<int, 8>{}, integral_constant<int, 2>{}, 0);
  if (length <= 64) return f(integral_constant<int, 32>{}, integral_constant<int, 2>{}, 0);
  const int64_t bytes = length * static_cast<int64_t>(sizeof(float));
  using Shared = integral_constant<int, kInShared>;
  if (length <= 256) return f(integral_constant<int, 32>{}, Shared{}, static_cast<int>(bytes * (kThreads / 32)));
  if (length <= 8192) return f(integral_constant<int, 256>{}, Shared{}, static_cast<int>(bytes));
  if (bytes <= shared_limit(stream)) return f(integral_constant<int, 512>{}, Shared{}, static_cast<int>(bytes));
  return f(integral_constant<int, 512>{}, integral_constant<int, kInMemory>{}, 0);
}

inline unsigned grid_for(const Rows& rows, int group) { return blocks_for(rows.rows, block_threads(group) / group); }

}  // namespace spartan::cuda
