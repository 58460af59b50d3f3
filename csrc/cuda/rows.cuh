// Rows in registers: how many threads share a row of which length, and how they walk over it.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace spartan::cuda {

// One row. Its ratios u = v / a stay in kItems registers of each of kGroup threads; with kItems = 0 the row is too long for
// that and is read again (from a cache, as a rule) by every walk.
template <class T, int kGroup, int kItems>
class Row {
 public:
  __device__ Row(const Rows& rows, int64_t row)
      : values_(static_cast<const T*>(rows.values) + row * rows.length),
        costs_(rows.costs == nullptr ? nullptr : static_cast<const T*>(rows.costs) + row * rows.cost_stride),
        cost_step_(rows.cost_step),
        length_(rows.length),
        lane_(threadIdx.x % kGroup) {
    if constexpr (kItems > 0) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) u_[j] = at(j) < length_ ? ratio(at(j)) : 0.0f;
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
      for (int64_t begin = lane_; begin < length_; begin += kRun * kGroup) {
#pragma unroll 4
        for (int j = 0; j < kRun; ++j) {
          const int64_t i = begin + j * kGroup;
          if (i < length_) f(i, ratio(i));
        }
        flush();
      }
    }
  }
  template <class F>
  __device__ void walk(F f) const {
    walk(f, [] {});
  }

 private:
  __device__ int64_t at(int j) const { return lane_ + static_cast<int64_t>(j) * kGroup; }
  __device__ float ratio(int64_t i) const {
    const float v = to_float(values_[i]);
    return costs_ == nullptr ? v : v / cost(i);
  }

  const T* values_;
  const T* costs_;
  int64_t cost_step_, length_;
  int lane_;
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

// Calls f(integral constants of group and items) for rows of this length.
template <class F>
void for_length(int64_t length, F f) {
  using std::integral_constant;
  if (length <= 8) return f(integral_constant<int, 4>{}, integral_constant<int, 2>{});
  if (length <= 256) return f(integral_constant<int, 32>{}, integral_constant<int, 8>{});
  if (length <= 4096) return f(integral_constant<int, 256>{}, integral_constant<int, 16>{});
  return f(integral_constant<int, 512>{}, integral_constant<int, 0>{});
}

inline unsigned grid_for(const Rows& rows, int group) { return blocks_for(rows.rows, block_threads(group) / group); }

}  // namespace spartan::cuda
