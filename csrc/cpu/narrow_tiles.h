// The inner loops of products with blocks too narrow for a vector of outputs, for masked_matmul_passes.cpp only.
#pragma once

#include "register_tile.h"

namespace spartan::cpu::SPARTAN_ISA {
namespace {

template <class S>
void narrow_pack_as(const NarrowBlocks& b, const S* data, const ActiveBlocks& active) {
  float* out = b.out;
  for (int64_t e = 0; e < active.count; ++e) {
    const int64_t index = active.indices[e], left = active.limit - index * active.span;
    const int64_t depth = left < active.span ? left : active.span;
    const S* from = data + b.base + b.step * (b.places != nullptr ? b.places[e] : e);
    const float gate = b.gates != nullptr ? b.gates[b.gate_step * index] : 1.0f;
    for (int64_t d = 0; d < active.span; ++d, out += b.height) {
      for (int h = 0; h < b.height; ++h)
        out[h] = d < depth && h < b.outputs ? gate * wide(from[d * b.depth_stride + h * b.height_stride]) : 0.0f;
    }
  }
}

// Single weights: nothing but the numbers themselves.
template <class S>
void narrow_pack_single(const NarrowBlocks& b, const S* data, const ActiveBlocks& active) {
  const S* from = data + b.base;
  if (b.places != nullptr) {
    for (int64_t e = 0; e < active.count; ++e) b.out[e] = wide(from[b.step * b.places[e]]);
  } else {
    for (int64_t e = 0; e < active.count; ++e) b.out[e] = wide(from[b.step * e]);
  }
  if (b.gates == nullptr) return;
  for (int64_t e = 0; e < active.count; ++e) b.out[e] *= b.gates[b.gate_step * active.indices[e]];
}

void narrow_pack(Dtype dtype, const NarrowBlocks& blocks, const ActiveBlocks& active) {
  stored(dtype, [&](const auto* type) {
    using S = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const S* data = static_cast<const S*>(blocks.data);
    const bool single = blocks.height == 1 && active.span == 1;
    single ? narrow_pack_single<S>(blocks, data, active) : narrow_pack_as<S>(blocks, data, active);
  });
}

// Sums of H outputs and N vectors of tokens, U of each so that no addition waits for the one before.
template <int H, int N, int U>
struct NarrowTile {
  Vec<float> sums[U][H][N];

  inline void add(int u, const float* x, const float* values) {
    Vec<float> right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = load(x + n * kLanes);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const Vec<float> one = values[h] - Vec<float>{};  // a broadcast
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[u][h][n] += one * right[n];
    }
  }
};

// Adds what the blocks [begin, end) of a line give.
template <int H, int N>
void narrow_run(const NarrowSum& p, const ActiveBlocks& active, int64_t begin, int64_t end, int64_t at, Vec<float> (&totals)[H][N]) {
  constexpr int U = H * N >= 8 ? 1 : 8 / (H * N);
  NarrowTile<H, N, U> tile{};
  const float *x = p.x + at, *values = p.values + begin * active.span * H;
  if (active.span == 1) {
    int64_t e = begin;
    for (; e + U <= end; e += U, values += U * H) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) tile.add(u, x + active.indices[e + u] * p.tile, values + u * H);
    }
    for (; e < end; ++e, values += H) tile.add(0, x + active.indices[e] * p.tile, values);
  } else {
    for (int64_t e = begin; e < end; ++e, values += active.span * H) {
      const int64_t from = active.indices[e] * active.span, left = active.limit - from;
      const int64_t depth = left < active.span ? left : active.span;
      const float* column = x + from * p.tile;
      int64_t d = 0;
      for (; d + U <= depth; d += U) {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) tile.add(u, column + (d + u) * p.tile, values + (d + u) * H);
      }
      for (; d < depth; ++d) tile.add(0, column + d * p.tile, values + d * H);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) tile.sums[0][h][n] += tile.sums[u][h][n];
      totals[h][n] += tile.sums[0][h][n];
    }
  }
}

template <int H, int N>
void narrow_tile(const NarrowSum& p, const ActiveBlocks& active, int64_t at) {
  Vec<float> totals[H][N] = {};
  const int64_t step = active.span < kStretch ? kStretch / active.span : 1;
  for (int64_t e = 0; e < active.count; e += step)
    narrow_run<H, N>(p, active, e, e + step < active.count ? e + step : active.count, at, totals);
  for (int h = 0; h < H; ++h) {
    const float bias = p.bias != nullptr ? p.bias[h] : 0.0f;
    for (int n = 0; n < N; ++n) store(p.y + h * p.tile + at + n * kLanes, totals[h][n] + bias);
  }
}

template <int H>
void narrow_tiles(const NarrowSum& p, const ActiveBlocks& active) {
  constexpr int most = 8 / H;
  int64_t at = 0;
  in_tiles<most>(p.tile / kLanes, [&]<int N>() {
    narrow_tile<H, N>(p, active, at);
    at += N * kLanes;
  });
}

// The dot of a block's row with the tokens it meets, which lie side by side.
inline float dot_of(const float* values, const float* x, int64_t count) {
  Vec<float> sums{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums += load(values + i) * load(x + i);
  float sum = i > 0 ? total(sums) : 0.0f;
  for (; i < count; ++i) sum += values[i] * x[i];
  return sum;
}

// One token: bound by reading weights, so nothing is transposed and each x is gathered. Eight sums, so that no addition waits.
inline float narrow_single_weights(const NarrowSum& p, const ActiveBlocks& active) {
  const int32_t* at = active.indices;
  const float *x = p.x, *values = p.values;
  float sums[8];
#pragma GCC unroll 8
  for (int u = 0; u < 8; ++u) sums[u] = 0.0f;
  int64_t e = 0;
  for (; e + 8 <= active.count; e += 8) {
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) {
      sums[u] += values[e + u] * x[at[e + u]];
      keep_in_register(sums[u]);  // put together to a vector, they would take more instructions than they save
    }
  }
  for (; e < active.count; ++e) sums[0] += values[e] * x[at[e]];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

inline float narrow_single_rows(const NarrowSum& p, const ActiveBlocks& active) {
  float sum = 0.0f;
  for (int64_t e = 0; e < active.count; ++e) {
    const int64_t from = active.indices[e] * active.span, left = active.limit - from;
    sum += dot_of(p.values + e * active.span, p.x + from, left < active.span ? left : active.span);
  }
  return sum;
}

__attribute__((noinline)) void narrow_single(const NarrowSum& p, const ActiveBlocks& active) {
  const float sum = active.span == 1 ? narrow_single_weights(p, active) : narrow_single_rows(p, active);
  *p.y = sum + (p.bias != nullptr ? *p.bias : 0.0f);
}

// The same of H outputs side by side.
template <int H>
void narrow_single_of(const NarrowSum& p, const ActiveBlocks& active) {
  typedef typename Floats<H>::V V;
  constexpr int U = 4;
  V sums[U] = {};
  const float* values = p.values;
  int64_t e = 0;
  if (active.span == 1) {
    for (; e + U <= active.count; e += U, values += U * H) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) sums[u] += p.x[active.indices[e + u]] * load_lanes<H>(values + u * H);
    }
  }
  for (; e < active.count; ++e, values += active.span * H) {
    const int64_t from = active.indices[e] * active.span, left = active.limit - from;
    const int64_t depth = left < active.span ? left : active.span;
    for (int64_t d = 0; d < depth; ++d) sums[d & (U - 1)] += p.x[from + d] * load_lanes<H>(values + d * H);
  }
  const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int h = 0; h < H; ++h) p.y[h] = sum[h] + (p.bias != nullptr ? p.bias[h] : 0.0f);
}

void narrow_sum(const NarrowSum& p, const ActiveBlocks& active) {
  if (p.tile == 1) {
    if (p.height == 1) return narrow_single(p, active);
    return p.height == 2 ? narrow_single_of<2>(p, active) : narrow_single_of<4>(p, active);
  }
  if (p.height == 1) return narrow_tiles<1>(p, active);
  p.height == 2 ? narrow_tiles<2>(p, active) : narrow_tiles<4>(p, active);
}

template <int H>
void narrow_dots_of(const NarrowDots& p, const ActiveBlocks& active) {
  for (int64_t e = 0; e < active.count; ++e) {
    const int64_t from = active.indices[e] * active.span, left = active.limit - from;
    const int64_t depth = left < active.span ? left : active.span;
    float* out = p.out + (p.block_step != 0 ? e * p.block_step : from);
    const float* x = p.x + from * p.tile;
    for (int64_t c = 0; c < depth; ++c, x += p.tile) {
      Vec<float> sums[H][2] = {};
      int64_t t = 0;
      for (; t + 2 * kLanes <= p.tile; t += 2 * kLanes) {
        const Vec<float> first = load(x + t), second = load(x + t + kLanes);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
          sums[h][0] += first * load(p.rows + h * p.tile + t);
          sums[h][1] += second * load(p.rows + h * p.tile + t + kLanes);
        }
      }
      for (; t < p.tile; t += kLanes) {
        const Vec<float> first = load(x + t);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) sums[h][0] += first * load(p.rows + h * p.tile + t);
      }
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        float* to = out + h * p.stride + c;
        const float sum = total(sums[h][0] + sums[h][1]);
        *to = p.add ? *to + sum : sum;
      }
    }
  }
}

void narrow_dots(const NarrowDots& p, const ActiveBlocks& active) {
  if (p.height == 1) return narrow_dots_of<1>(p, active);
  if (p.height == 2) return narrow_dots_of<2>(p, active);
  p.height == 3 ? narrow_dots_of<3>(p, active) : narrow_dots_of<4>(p, active);
}

void turn_back(const float* sums, int64_t tile, int64_t rows, int64_t tokens, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int columns = static_cast<int>(rows - r < kLanes ? rows - r : kLanes);
    for (int64_t t = 0; t < tokens; t += kLanes) {
      Vec<float> square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(sums + (r + i) * tile + t);
      transpose_square<kLanes>(square);
      const int64_t count = tokens - t < kLanes ? tokens - t : kLanes;
      for (int64_t i = 0; i < count; ++i) {
        float* to = out + (t + i) * stride + r;
        columns == kLanes ? store(to, square[i]) : store_partial(to, square[i], columns);
      }
    }
  }
}

}  // namespace
}  // namespace spartan::cpu::SPARTAN_ISA
