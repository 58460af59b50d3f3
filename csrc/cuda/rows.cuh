// Rows in registers: how many threads share a row of which length, and how they walk over it.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace spartan::cuda {

// Where a row's ratios u = v / a stay while it is solved: in so many registers of each thread, or ...
constexpr int kInShared = -1;  // ... in shared memory, each thread's own
constexpr int kInMemory = 0;   // ... nowhere: the row is read again, from a cache as a rule, by every walk
constexpr int kMostPriced = 4;  // registers beside which there is room for the addresses of costs

// What lies beside the entries of a row, in registers where they are.
template <class U, int kItems>
struct Beside {
  const U* from;
  float kept[kItems > 0 ? kItems : 1];

  __device__ float operator()(int64_t i, int j) const {
    if constexpr (kItems > 0) return kept[j];
    return to_float(from[i]);
  }
};

// Where a row is written to; one that a single thread holds is written at once, by close().
template <class U, int kGroup, int kItems>
struct Written {
  static constexpr bool kAtOnce = kGroup == 1 && kItems > 0;
  U* to;
  int length;
  Pack<U, kAtOnce ? kItems : 1> kept;

  __device__ void put(int64_t i, int j, U x) {
    if constexpr (kAtOnce) kept.lane[j] = x;
    else to[i] = x;
  }
  __device__ void close() {
    if constexpr (kAtOnce) {
      if (length == kItems && aligned_to<kItems>(to)) return store_pack(to, kept);
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (j < length) to[j] = kept.lane[j];
      }
    }
  }
};

// One row, shared by kGroup threads, which keep its ratios u = v / a, and then their odds.
template <class T, int kGroup, int kItems>
class Row {
 public:
  __device__ Row(const Rows& rows, int64_t row)
      : values_(static_cast<const T*>(rows.values) + row * rows.stride),
        costs_(rows.costs == nullptr ? nullptr : static_cast<const T*>(rows.costs) + row * rows.cost_stride),
        cost_step_(rows.cost_step),
        length_(static_cast<Index>(rows.length)),
        lane_(threadIdx.x % kGroup),
        shared_(kItems == kInShared ? dynamic_shared() + threadIdx.x / kGroup * length_ : nullptr) {
    if constexpr (kItems > 0) {
      read(values_, -INFINITY, kept_);
      if (costs_ != nullptr) {
#pragma unroll
        for (int j = 0; j < kItems; ++j) kept_[j] /= cost(at(j));  // past the end -inf stays, by any cost
      }
    }
    if constexpr (kItems == kInShared) {
#pragma unroll 8
      for (Index i = lane_; i < length_; i += kGroup) shared_[i] = ratio(i);
    }
  }

  __device__ bool one_cost() const { return kItems > kMostPriced || costs_ == nullptr || cost_step_ == 0; }
  __device__ float unit() const { return costs_ == nullptr ? 1.0f : to_float(costs_[0]); }
  __device__ float cost(int64_t i) const {
    if constexpr (kItems > kMostPriced) return unit();
    return costs_ == nullptr || i >= length_ ? 1.0f : to_float(costs_[i * cost_step_]);
  }
  __device__ bool leader() const { return lane_ == 0; }

  // Calls f(i, j, x) on what is kept of this thread's entries, which f may change, and flush() after every few of them.
  // In registers the j-th; those past the row's end, too, which are kept as -inf.
  template <class F, class Flush>
  __device__ void each(F f, Flush flush) {
    if constexpr (kItems > 0) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (j > 0 && j % kSkipped == 0 && j * kGroup >= length_) break;
        f(at(j), j, kept_[j]);
      }
      flush();
    } else {
      walk_on([&](Index i) { f(i, 0, shared_[i]); }, flush);
    }
  }

  // Calls f(i, j, u) on this thread's entries, and flush() after every few of them.
  template <class F, class Flush>
  __device__ void walk(F f, Flush flush) const {
    if constexpr (kItems > 0) {
#pragma unroll
      for (int j = 0; j < kItems; ++j) {
        if (at(j) < length_) f(at(j), j, kept_[j]);
      }
      flush();
    } else {
      walk_on([&](Index i) { f(i, 0, kItems == kInShared ? shared_[i] : ratio(i)); }, flush);
    }
  }
  template <class F>
  __device__ void walk(F f) const {
    walk(f, [] {});
  }
  // The same on the entries that are not masked, by f(i, u).
  template <class F, class Flush>
  __device__ void walk_unmasked(F f, Flush flush) const {
    walk(
        [&](int64_t i, int, float u) {
          if (!masked(u)) f(i, u);
        },
        flush);
  }

  // v / a from memory, which stays while what is kept is changed; -inf past the end.
  __device__ float ratio(int64_t i) const {
    if (i >= length_) return -INFINITY;
    const float v = to_float(values_[i]);
    return costs_ == nullptr ? v : v / cost(i);
  }

  __device__ const float (&all() const)[kItems > 0 ? kItems : 1] { return kept_; }

  // The same entries of other arrays of the row's length.
  template <class U>
  __device__ Beside<U, kItems> beside(const U* from) const {
    Beside<U, kItems> out;
    out.from = from;
    if constexpr (kItems > 0) read(from, 0.0f, out.kept);
    return out;
  }
  template <class U>
  __device__ Written<U, kGroup, kItems> written(U* to) const {
    Written<U, kGroup, kItems> out;
    out.to = to;
    out.length = static_cast<int>(length_);
    return out;
  }

 private:
  using Index = std::conditional_t<kItems == kInMemory, int64_t, int>;
  static constexpr int kSkipped = 4;  // entries that a thread goes by at once where a row is shorter

  __device__ Index at(int j) const { return lane_ + static_cast<Index>(j) * kGroup; }
  template <class U, int N>
  __device__ void read(const U* from, float outside, float (&to)[N]) const {
    if (kGroup == 1 && length_ == N && aligned_to<N>(from)) {
      const Pack<U, N> all = load_pack<N>(from);
#pragma unroll
      for (int j = 0; j < N; ++j) to[j] = to_float(all.lane[j]);
      return;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = at(j) < length_ ? to_float(from[at(j)]) : outside;
  }
  template <class F, class Flush>
  __device__ void walk_on(F f, Flush flush) const {
    constexpr int kRun = 16;
    for (Index begin = lane_; begin < length_; begin += kRun * kGroup) {
#pragma unroll 4
      for (int j = 0; j < kRun; ++j) {
        const Index i = begin + j * kGroup;
        if (i < length_) f(i);
      }
      flush();
    }
  }

  const T* values_;
  const T* costs_;
  int64_t cost_step_;
  Index length_;
  int lane_;
  float* shared_;
  float kept_[kItems > 0 ? kItems : 1];
};

// Threads of a thread block whose rows are shared by kGroup threads.
constexpr int block_threads(int group) { return group < kThreads ? kThreads : group; }
// Thread blocks that a multiprocessor shall hold, which limits their registers.
constexpr int resident(int group, int items) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr int kFew = 16;  // with more than one they would spill there
#else
  constexpr int kFew = 32;
#endif
  return items >= kFew ? 1 : 512 / block_threads(group);
}

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
void for_length(const Rows& rows, Stream stream, F f) {
  using std::integral_constant;
  using Shared = integral_constant<int, kInShared>;
  const int64_t length = rows.length, bytes = length * static_cast<int64_t>(sizeof(float));
  const bool priced = rows.costs != nullptr && rows.cost_step != 0;
  if (length <= 4) return f(integral_constant<int, 1>{}, integral_constant<int, 4>{}, 0);
  if (length <= 16) return f(integral_constant<int, 4>{}, integral_constant<int, 4>{}, 0);
  if (length <= 64 && !priced) return f(integral_constant<int, 8>{}, integral_constant<int, 8>{}, 0);
  if (length <= 256 && !priced) return f(integral_constant<int, 32>{}, integral_constant<int, 8>{}, 0);
  if (length <= 256) return f(integral_constant<int, 32>{}, Shared{}, static_cast<int>(bytes * (kThreads / 32)));
  if (length <= 1024 && !priced) return f(integral_constant<int, 32>{}, integral_constant<int, 32>{}, 0);
  if (length <= 4096 && !priced) return f(integral_constant<int, 256>{}, integral_constant<int, 16>{}, 0);
  if (length <= 8192) return f(integral_constant<int, 256>{}, Shared{}, static_cast<int>(bytes));
  if (bytes <= shared_limit(stream)) return f(integral_constant<int, 512>{}, Shared{}, static_cast<int>(bytes));
  return f(integral_constant<int, 512>{}, integral_constant<int, kInMemory>{}, 0);
}

inline unsigned grid_for(const Rows& rows, int group) { return blocks_for(rows.rows, block_threads(group) / group); }

}  // namespace spartan::cuda
