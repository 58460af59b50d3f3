// A tile of left x right summed by one thread block, from shared memory: on the tensor cores for 16-bit numbers and TF32, by
// FMA for float32.
//
// Operands lie in shared memory as rows of 16-byte chunks. One is either "by depth", [rows or columns of the tile][depth],
// or "across", [depth][rows or columns]. A step of the sum is 128 bytes deep.
#pragma once

#include <type_traits>

#include "mma.cuh"

namespace spartan::cuda {

// Runs `call` with T being the type that products of the dtype are taken of.
#define SPARTAN_CUDA_DISPATCH_PRODUCT(call) \
  if (dtype == Dtype::tf32) {               \
    using T = Tf32;                         \
    call;                                   \
  } else {                                  \
    SPARTAN_CUDA_DISPATCH(call)             \
  }

constexpr int kStepChunks = 8;
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // numbers in a chunk
template <class T>
constexpr int kStep = kStepChunks * kChunk<T>;

// Where a chunk of a row lies. The same chunk of eight consecutive rows falls into eight different groups of banks; of
// TF32, whose threads read by columns, two neighbouring chunks of four rows do so too.
template <class T, int kRowChunks>
__device__ inline int swizzled(int row, int chunk) {
  if constexpr (std::is_same_v<T, Tf32>) return row * kRowChunks + (chunk ^ ((row << 1 & 6) | (row >> 2 & 1)));
  else if constexpr (kRowChunks >= 8) return row * kRowChunks + (chunk ^ (row & 7));
  else return row * kRowChunks + (chunk ^ ((row >> 1) & (kRowChunks - 1)));
}

// Sums of a tile go through shared memory, so that each thread can finish neighbours of one row.
constexpr int kStagePadding = 8;  // rows of pairs of floats fall into different banks

template <class T, int kRows, int kColumns, int kWarpRows, int kWarpColumns, bool kLeftAcross, bool kRightAcross>
class TensorCoreTile {
 public:
  static constexpr int kThreads = kWarp * kWarpRows * kWarpColumns;

  __device__ void add(const uint4* left, const uint4* right) {
#pragma unroll
    for (int chunk = 0; chunk < kStepChunks; chunk += 2) {
      unsigned a[kDown][4], b[kOver / 2][4];  // of b: both halves of the depth of 8 columns, then of the next 8
#pragma unroll
      for (int i = 0; i < kDown; ++i) load<kRows, kLeftAcross, true>(a[i], left, chunk, first_row() + 16 * i);
#pragma unroll
      for (int j = 0; j < kOver / 2; ++j) load<kColumns, kRightAcross, false>(b[j], right, chunk, first_column() + 16 * j);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int j = 0; j < kOver; ++j) {
          if constexpr (kWide) multiply_16x8x8(sums_[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
          else multiply_16x8x16<T>(sums_[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  __device__ void store(float* stage) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kOver; ++j) {
        float* to = stage + (first_row() + 16 * i + lane / 4) * (kColumns + kStagePadding) + first_column() + 8 * j + lane % 4 * 2;
        store_pack<2>(to, Pack<float, 2>{{sums_[i][j][0], sums_[i][j][1]}});
        store_pack<2>(to + 8 * (kColumns + kStagePadding), Pack<float, 2>{{sums_[i][j][2], sums_[i][j][3]}});
      }
    }
  }

 private:
  static constexpr int kDown = kRows / kWarpRows / 16, kOver = kColumns / kWarpColumns / 8;
  static constexpr bool kWide = sizeof(T) == 4;
  static_assert(kDown >= 1 && kOver >= 2 && kOver % 2 == 0);

  // Two chunks of depth of 16 rows (columns, of the right operand) as a thread multiplies them. The second of its four
  // registers is 8 rows further (kRowsFirst), or the second half of the depth.
  template <int kWidth, bool kAcross, bool kRowsFirst>
  __device__ static void load(unsigned (&to)[4], const uint4* operand, int chunk, int row) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if constexpr (kAcross && kWide) {  // no instruction transposes numbers of 32 bits
      const auto* words = reinterpret_cast<const unsigned*>(operand);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int depth = 4 * (chunk + (kRowsFirst ? i / 2 : i % 2)) + lane % 4;
        const int across = row + 8 * (kRowsFirst ? i % 2 : i / 2) + lane / 4;
        to[i] = words[4 * swizzled<T, kWidth / 4>(depth, across / 4) + across % 4];
      }
    } else {
      const int low = lane % 8, second = lane / 8 % 2, third = lane / 16;  // which row of which of the four registers
      const int down = kRowsFirst ? second : third, deep = kRowsFirst ? third : second;
      const int at = kAcross ? swizzled<T, kWidth / 8>(8 * (chunk + deep) + low, row / 8 + down)
                             : swizzled<T, kStepChunks>(row + low + 8 * down, chunk + deep);
      load_matrices<kAcross>(to, operand + at);
    }
    if constexpr (kWide) {
#pragma unroll
      for (unsigned& bits : to) bits = rounded_to_tf32(bits);
    }
  }

  __device__ int first_row() const { return static_cast<int>(threadIdx.x) / kWarp / kWarpColumns * (kRows / kWarpRows); }
  __device__ int first_column() const {
    return static_cast<int>(threadIdx.x) / kWarp % kWarpColumns * (kColumns / kWarpColumns);
  }

  float sums_[kDown][kOver][4] = {};
};

// The same in float32 throughout. Of an operand that lies across, a thread takes groups of four neighbours; of one by depth,
// rows that lie a stride apart, so that the threads of a warp read neighbouring ones.
template <int kRows, int kColumns, int kThreadCount, bool kLeftAcross, bool kRightAcross>
class FmaTile {
 public:
  static constexpr int kThreads = kThreadCount;

  __device__ void add(const uint4* left, const uint4* right) {
    const int down = static_cast<int>(threadIdx.x) / kOver, over = static_cast<int>(threadIdx.x) % kOver;
#pragma unroll 2
    for (int chunk = 0; chunk < kStepChunks; ++chunk) {
      Pack<float, 4> a[kEach], b[4];  // [row][depth] by depth, [depth][row] across
      if constexpr (kLeftAcross) {
#pragma unroll
        for (int n = 0; n < kEach; ++n)
          a[n] = chunk_of(left, swizzled<float, kRows / 4>(4 * chunk + n % 4, down + n / 4 * kDown));
      } else {
#pragma unroll
        for (int n = 0; n < kEach; ++n) a[n] = chunk_of(left, swizzled<float, kStepChunks>(down + n * kDown, chunk));
      }
#pragma unroll
      for (int n = 0; n < 4; ++n)
        b[n] = chunk_of(right, kRightAcross ? swizzled<float, kColumns / 4>(4 * chunk + n, over)
                                            : swizzled<float, kStepChunks>(over + n * kOver, chunk));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const float x = kLeftAcross ? a[i / 4 * 4 + k].lane[i % 4] : a[i].lane[k];
#pragma unroll
          for (int j = 0; j < 4; ++j) sums_[i][j] = fmaf(x, kRightAcross ? b[k].lane[j] : b[j].lane[k], sums_[i][j]);
        }
      }
    }
  }

  __device__ void store(float* stage) const {
    const int down = static_cast<int>(threadIdx.x) / kOver, over = static_cast<int>(threadIdx.x) % kOver;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = kLeftAcross ? 4 * (down + i / 4 * kDown) + i % 4 : down + i * kDown;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        stage[row * (kColumns + kStagePadding) + (kRightAcross ? 4 * over + j : over + j * kOver)] = sums_[i][j];
    }
  }

 private:
  static constexpr int kOver = kColumns / 4, kDown = kThreads / kOver, kEach = kRows / kDown;
  static_assert(kEach % 4 == 0);

  __device__ static Pack<float, 4> chunk_of(const uint4* operand, int at) {
    return load_pack<4>(reinterpret_cast<const float*>(operand + at));
  }

  float sums_[kEach][4] = {};
};

// A thread multiplies the chunk of weights that it copied by their gate.
template <class T>
__device__ inline void scale_chunk(uint4* at, float gate) {
  Pack<T, kChunk<T>> chunk = load_pack<kChunk<T>>(reinterpret_cast<const T*>(at));
#pragma unroll
  for (int l = 0; l < kChunk<T>; ++l) chunk.lane[l] = from_float<T>(to_float(chunk.lane[l]) * gate);
  store_pack<kChunk<T>>(reinterpret_cast<T*>(at), chunk);
}

}  // namespace spartan::cuda
