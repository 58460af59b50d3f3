// Compiled once per instruction set; see simd.h for what may not be used here.
#include "masked_matmul_passes.h"

#include <type_traits>
#include <utility>

#include "simd.h"

namespace spartan::cpu::SPARTAN_ISA {
namespace {

constexpr int kLanes = Simd<float>::width;
#if defined(__AVX512F__)
constexpr int kRegisters = 24;  // for sums, of 32
constexpr int kWidestPanel = 4 * kLanes;
#else
constexpr int kRegisters = 12;  // of 16
constexpr int kWidestPanel = 2 * kLanes;
#endif

template <int L>
struct Floats {
  typedef float V __attribute__((vector_size(L * 4)));
  typedef int32_t I __attribute__((vector_size(L * 4)));
};

template <int L>
inline typename Floats<L>::V load_lanes(const float* p) {
  typename Floats<L>::V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline float wide(float x) { return x; }
template <class S>
inline float wide(S x) {
  return load_partial(&x, 1, 0.0f)[0];
}

// Calls f with a null pointer to the type that `dtype` is stored in.
template <class F>
inline auto stored(Dtype dtype, F&& f) {
  if (dtype == Dtype::bfloat16) return f(static_cast<const bfloat16*>(nullptr));
  if (dtype == Dtype::float16) return f(static_cast<const float16*>(nullptr));
  return f(static_cast<const float*>(nullptr));
}

// ------------------------------------------------------------------------------------------------------- packing

template <int L>
inline void transpose_square(typename Floats<L>::V* rows) {
  typedef typename Floats<L>::V V;
  typename Floats<L>::I low{}, high{};
  for (int i = 0; i < L; ++i) low[i] = i / 2 + (i & 1) * L, high[i] = L / 2 + i / 2 + (i & 1) * L;
  // interleaving the first half of the rows with the second, log2(L) times, is the transpose
  for (int stage = 1; stage < L; stage *= 2) {
    V next[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

template <class S>
inline Vec<float> load_some(const S* p, int64_t count) {
  return count >= kLanes ? load(p) : load_partial(p, static_cast<int>(count), 0.0f);
}

template <class S>
void pack_transposed_as(const S* block, int64_t stride, int64_t rows, int64_t depth, float gate, int width, float* panel) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    const int64_t deep = depth - k < kLanes ? depth - k : kLanes;
    for (int r = 0; r < width; r += kLanes) {
      Vec<float> square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = r + i < rows ? load_some(block + (r + i) * stride + k, deep) * gate : Vec<float>{};
      transpose_square<kLanes>(square);
      const int count = width - r < kLanes ? width - r : kLanes;
      for (int64_t i = 0; i < deep; ++i) {
        if (count == kLanes)
          store(panel + (k + i) * width + r, square[i]);
        else
          store_partial(panel + (k + i) * width + r, square[i], count);
      }
    }
  }
}

void pack_transposed(Dtype dtype, const void* block, int64_t stride, int64_t rows, int64_t depth, float gate, int width,
                     float* panel) {
  stored(dtype, [&](auto* type) {
    pack_transposed_as(static_cast<decltype(type)>(block), stride, rows, depth, gate, width, panel);
  });
}

// Tiles of T tokens. A tile narrower than a vector is stored by whole vectors: the next column overwrites what is too much.
template <int T, class S>
void pack_tiles(const S* x, int64_t stride, int64_t tokens, int64_t depth, float* out) {
  for (int64_t t = 0; t < tokens; t += T, x += T * stride, out += T * depth) {
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int64_t deep = depth - k < kLanes ? depth - k : kLanes;
      const auto turn = [&]<int From>() {
        constexpr int count = T - From < kLanes ? T - From : kLanes;
        Vec<float> square[kLanes] = {};
        const int64_t there = tokens - t - From;
#pragma GCC unroll 16
        for (int i = 0; i < count; ++i)
          if (i < there) square[i] = load_some(x + (From + i) * stride + k, deep);
        transpose_square<kLanes>(square);
        constexpr int stored = From == 0 ? kLanes : count;
        for (int64_t i = 0; i < deep; ++i) std::memcpy(out + (k + i) * T + From, &square[i], stored * sizeof(float));
      };
      turn.template operator()<0>();
      if constexpr (T > kLanes) turn.template operator()<kLanes>();
      if constexpr (T > 2 * kLanes) turn.template operator()<2 * kLanes>();
    }
  }
}

void pack(Dtype dtype, const void* block, int64_t stride, int64_t depth, int64_t columns, float gate, int64_t width,
          float* panel) {
  stored(dtype, [&](auto* type) {
    const auto* source = static_cast<decltype(type)>(block);
    for (int64_t k = 0; k < depth; ++k, source += stride, panel += width) {
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) store(panel + c, load(source + c) * gate);
      if (c < width) {
        const int rest = static_cast<int>(columns - c), room = static_cast<int>(width - c < kLanes ? width - c : kLanes);
        store_partial(panel + c, rest > 0 ? load_partial(source + c, rest, 0.0f) * gate : Vec<float>{}, room);
      }
    }
  });
}

// -------------------------------------------------------------------------------------------------------- tiles

#define SPARTAN_INLINE __attribute__((always_inline))

// Calls f.operator()<I>() for I < Count. Indices are constants from the start, which is what keeps arrays in registers.
template <int Count, class F>
SPARTAN_INLINE inline void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) SPARTAN_INLINE { (f.template operator()<I>(), ...); }
  (std::make_integer_sequence<int, Count>{});
}

// Keeps v in a register here, and what is computed into it in the order of the source: left to itself, the compiler spreads
// an unrolled loop until its sums no longer fit the registers.
template <class V>
SPARTAN_INLINE inline void keep_in_register(V& v) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(v));
#else
  (void)v;
#endif
}

// Sums of T rows and N vectors of L lanes, in registers.
template <int L, int T, int N>
struct Tile {
  typedef typename Floats<L>::V V;
  V sums[T][N];

  template <class F>
  SPARTAN_INLINE static void each(F&& f) {
    unrolled<T>([&]<int t>() SPARTAN_INLINE { unrolled<N>([&]<int n>() SPARTAN_INLINE { f.template operator()<t, n>(); }); });
  }

  SPARTAN_INLINE void start(const float* bias) {
    unrolled<N>([&]<int n>() SPARTAN_INLINE {
      const V first = bias != nullptr ? load_lanes<L>(bias + n * L) : V{};
      unrolled<T>([&]<int t>() SPARTAN_INLINE { sums[t][n] = first; });
    });
  }

  // sums += left (T numbers) times one row of the panel
  SPARTAN_INLINE void add(const float* left, const float* panel) {
    V right[N];
    unrolled<N>([&]<int n>() SPARTAN_INLINE { right[n] = load_lanes<L>(panel + n * L); });
    unrolled<T>([&]<int t>() SPARTAN_INLINE {
      const V one = left[t] - V{};  // a broadcast: 0 + x would be an addition
      unrolled<N>([&]<int n>() SPARTAN_INLINE {
        sums[t][n] += one * right[n];
        keep_in_register(sums[t][n]);
      });
    });
  }

  // A long sum in float32 goes in stretches: each adds its rounding to the few that are held, not to every term after it.
  SPARTAN_INLINE void hold(V (*held)[N], bool first) {
    each([&]<int t, int n>() SPARTAN_INLINE {
      held[t][n] = first ? sums[t][n] : held[t][n] + sums[t][n];
      sums[t][n] = V{};
    });
  }
  SPARTAN_INLINE void release(const V (*held)[N]) {
    each([&]<int t, int n>() SPARTAN_INLINE { sums[t][n] += held[t][n]; });
  }

  SPARTAN_INLINE void store(float* out, int64_t stride) const {
    each([&]<int t, int n>() SPARTAN_INLINE { std::memcpy(out + t * stride + n * L, &sums[t][n], sizeof(V)); });
  }
  // Stores, or adds to what is there, the first `columns`.
  template <bool Add>
  SPARTAN_INLINE void put(float* out, int64_t stride, int64_t columns) const {
    each([&]<int t, int n>() SPARTAN_INLINE {
      float* to = out + t * stride + n * L;
      if ((n + 1) * L <= columns) {
        const V value = Add ? sums[t][n] + load_lanes<L>(to) : sums[t][n];
        std::memcpy(to, &value, sizeof value);
      } else {
        const V value = sums[t][n];
        for (int i = 0; n * L + i < columns; ++i) to[i] = Add ? to[i] + value[i] : value[i];
      }
    });
  }
};

constexpr int64_t kStretch = 256;  // terms of a sum before it is held

// T tokens of a tile of `Stride` against a panel.
template <int L, int T, int N, int Stride>
void product_tile(const PanelProduct& p, const ActiveBlocks& active) {
  Tile<L, T, N> tile;
  typename Floats<L>::V held[T][N];
  tile.start(p.bias);
  const float *x = p.x, *panel = p.panel;
  int64_t run = 0;
  bool any = false;
  const auto hold = [&](int64_t terms) SPARTAN_INLINE {
    if ((run += terms) < kStretch) return;
    tile.hold(held, !any);
    any = true;
    run = 0;
  };
  if (active.span == 1) {
    for (int64_t e = 0; e < active.count; ++e, panel += L * N) {
      tile.add(x + active.indices[e] * Stride, panel);
      hold(1);
    }
  } else {
    for (int64_t e = 0; e < active.count; ++e) {
      const int64_t from = active.indices[e] * active.span;
      const int64_t depth = active.limit - from < active.span ? active.limit - from : active.span;
      const float* left = x + from * Stride;
      for (int64_t k = 0; k < depth;) {
        const int64_t end = depth - k < kStretch ? depth : k + kStretch, terms = end - k;
        for (; k + 4 <= end; k += 4, left += 4 * Stride, panel += 4 * L * N) {
          unrolled<4>([&]<int u>() SPARTAN_INLINE { tile.add(left + u * Stride, panel + u * L * N); });
        }
        for (; k < end; ++k, left += Stride, panel += L * N) tile.add(left, panel);
        hold(terms);
      }
    }
  }
  if (any) tile.release(held);
  tile.store(p.y, p.y_stride);
}

template <int L, int T, int N>
void outer_tile(const OuterSum& p) {
  Tile<L, T, N> tile;
  typename Floats<L>::V held[T][N];
  tile.start(nullptr);
  const float *a = p.a, *b = p.b;
  for (int64_t t = 0; t < p.tokens;) {
    const bool first = t == 0;
    const int64_t end = p.tokens - t < kStretch ? p.tokens : t + kStretch;
    for (; t < end; ++t, a += p.a_stride, b += p.b_stride) tile.add(a, b);
    if (p.tokens > kStretch) tile.hold(held, first);
  }
  if (p.tokens > kStretch) tile.release(held);
  p.add ? tile.template put<true>(p.out, p.out_stride, p.columns) : tile.template put<false>(p.out, p.out_stride, p.columns);
}

constexpr int tallest(int vectors) { return kRegisters / vectors; }

// Calls f.operator()<T>() for tile heights T that add up to `rows`, the tallest first.
template <int Most, class F>
inline void in_tiles(int64_t rows, F&& f) {
  while (rows >= Most) rows -= Most, f.template operator()<Most>();
  if constexpr (Most > 1) {
    constexpr int next = Most > 12 ? 12 : Most > 8 ? 8 : Most > 6 ? 6 : Most > 4 ? 4 : Most / 2;
    if (rows > 0) in_tiles<next>(rows, static_cast<F&&>(f));
  }
}

// Calls f.operator()<L, N>() for a panel of `width`.
template <class F>
inline void for_width(int width, F&& f) {
#if defined(__AVX512F__)
  if (width == 64) return f.template operator()<16, 4>();
  if (width == 48) return f.template operator()<16, 3>();
  if (width == 32) return f.template operator()<16, 2>();
  if (width == 16) return f.template operator()<16, 1>();
  f.template operator()<8, 1>();
#elif defined(__AVX2__)
  width == 16 ? f.template operator()<8, 2>() : f.template operator()<8, 1>();
#else
  width == 8 ? f.template operator()<4, 2>() : f.template operator()<4, 1>();
#endif
}

bool within(const int32_t* entries, int64_t count, int64_t end) {
  uint32_t most = 0;  // negative numbers are large ones
  for (int64_t e = 0; e < count; ++e) {
    const uint32_t entry = static_cast<uint32_t>(entries[e]);
    most = entry > most ? entry : most;
  }
  return count == 0 || most < static_cast<uint64_t>(end);
}

int panel_width(int64_t outputs) {
  if (outputs >= kWidestPanel) return kWidestPanel;
#if defined(__AVX512F__)
  if (outputs <= 8) return 8;
#endif
  return static_cast<int>((outputs + kLanes - 1) / kLanes) * kLanes;
}

int tile_tokens(int width) { return width < kLanes ? kRegisters : tallest(width / kLanes); }

constexpr int kWidestVectors = kWidestPanel / kLanes;

// Calls f.operator()<Tile>() for a tile of tokens that goes with panels of N vectors.
template <int N, class F>
inline void for_tile(int tile, F&& f) {
  tile == tallest(N) ? f.template operator()<tallest(N)>() : f.template operator()<tallest(kWidestVectors)>();
}

void pack_tokens(Dtype dtype, const void* x, int64_t stride, int64_t tokens, int64_t depth, int tile, float* out) {
  stored(dtype, [&](auto* type) {
    const auto* source = static_cast<decltype(type)>(x);
    const auto with = [&]<int N>() {
      if (tile != tallest(N)) return false;
      pack_tiles<tallest(N)>(source, stride, tokens, depth, out);
      return true;
    };
#if defined(__AVX512F__)
    with.template operator()<4>() || with.template operator()<3>() || with.template operator()<2>() ||
        with.template operator()<1>();
#else
    with.template operator()<2>() || with.template operator()<1>();
#endif
  });
}

void product(const PanelProduct& problem, const ActiveBlocks& active, int64_t tokens) {
  for_width(problem.width, [&]<int L, int N>() {
    for_tile<N>(problem.tile, [&]<int Stride>() {
      PanelProduct p = problem;
      for (; tokens >= Stride; tokens -= Stride, p.x += p.tile_stride, p.y += Stride * p.y_stride)
        product_tile<L, Stride, N, Stride>(p, active);
      in_tiles<Stride>(tokens, [&]<int T>() {
        product_tile<L, T, N, Stride>(p, active);
        p.x += T;
        p.y += T * p.y_stride;
      });
    });
  });
}

void outer_sum(const OuterSum& problem) {
  for (int64_t c = 0; c < problem.columns;) {
    const int width = panel_width(problem.columns - c);
    OuterSum p = problem;
    p.b += c;
    p.out += c;
    p.columns = problem.columns - c < width ? problem.columns - c : width;
    for_width(width, [&]<int L, int N>() {
      in_tiles<tallest(N)>(problem.rows, [&]<int T>() {
        outer_tile<L, T, N>(p);
        p.a += T;
        p.out += T * p.out_stride;
      });
    });
    c += width;
  }
}

// ------------------------------------------------------------------------------------------------ a few tokens

inline float total(Vec<float> v) {
  Mask<float> lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  for (int half = kLanes / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lanes ^ half);
  return v[0];
}

template <class S, int R, int T>
void dot_tile(const DotProduct& p, const S* weights, const ActiveBlocks& active, int64_t row, int64_t token) {
  Vec<float> sums[R][T] = {};
  const float* x = p.x + token * p.x_stride;
  for (int64_t e = 0; e < active.count; ++e) {
    const int64_t from = active.indices[e] * active.span;
    const int64_t depth = active.limit - from < active.span ? active.limit - from : active.span;
    const S* w = weights + p.offsets[e] + row * p.stride;
    const float gate = p.gates != nullptr ? p.gates[e] : 1.0f;
    const auto add = [&](int64_t k, int64_t count) {
      Vec<float> right[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) right[t] = gate * load_some(x + t * p.x_stride + from + k, count);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<float> left = load_some(w + r * p.stride + k, count);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) sums[r][t] += left * right[t];
      }
    };
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) add(k, kLanes);
    if (k < depth) add(k, depth - k);
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) p.y[(token + t) * p.y_stride + row + r] += total(sums[r][t]);
}

template <class S>
void dot_as(const DotProduct& p, const ActiveBlocks& active) {
  const S* weights = static_cast<const S*>(p.weights);
  int64_t token = 0;
  in_tiles<2>(p.tokens, [&]<int T>() {
    int64_t row = 0;
    in_tiles<8 / T>(p.rows, [&]<int R>() {
      dot_tile<S, R, T>(p, weights, active, row, token);
      row += R;
    });
    token += T;
  });
}

void dot(Dtype dtype, const DotProduct& p, const ActiveBlocks& active) {
  stored(dtype, [&](const auto* type) {
    using S = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    dot_as<S>(p, active);
  });
}

// ------------------------------------------------------------------------------------------------ narrow blocks

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

template <int H, int N>
void narrow_tile(const NarrowSum& p, const ActiveBlocks& active, int64_t at) {
  constexpr int U = H * N >= 8 ? 1 : 8 / (H * N);
  NarrowTile<H, N, U> tile{};
  const float *x = p.x + at, *values = p.values;
  if (active.span == 1) {
    int64_t e = 0;
    for (; e + U <= active.count; e += U, values += U * H) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) tile.add(u, x + active.indices[e + u] * p.tile, values + u * H);
    }
    for (; e < active.count; ++e, values += H) tile.add(0, x + active.indices[e] * p.tile, values);
  } else {
    for (int64_t e = 0; e < active.count; ++e, values += active.span * H) {
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
    const Vec<float> bias = (p.bias != nullptr ? p.bias[h] : 0.0f) - Vec<float>{};
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      Vec<float> total = tile.sums[0][h][n];
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) total += tile.sums[u][h][n];
      store(p.y + h * p.tile + at + n * kLanes, total + bias);
    }
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

void narrow_sum(const NarrowSum& p, const ActiveBlocks& active) {
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

// -------------------------------------------------------------------------------------------------- elementwise

constexpr float kLog2e = 1.44269504f;

inline Vec<float> exponential(Vec<float> x) { return exp2_clamped(x * kLog2e); }

inline Vec<float> logistic(Vec<float> x) { return 1.0f / (1.0f + exponential(-x)); }

// The normal distribution function from erfc(y) = exp(-y^2) P(t), t = 1 / (1 + 0.45 y), for y >= 0; P fitted for the least
// absolute error (2e-9 before rounding).
inline Vec<float> normal_distribution(Vec<float> x) {
  const Vec<float> y = absolute(x) * 0.707106781f;
  const Vec<float> t = 1.0f / (1.0f + 0.45f * y);
  Vec<float> p = t * 0.09272394f - 0.49484322f;
  p = p * t + 0.8586328f;
  p = p * t - 0.37734196f;
  p = p * t + 0.46107405f;
  p = p * t + 0.20072855f;
  p = p * t + 0.25902581f;
  const Vec<float> tail = 0.5f * p * t * exponential(-y * y);
  return x > 0.0f ? 1.0f - tail : tail;
}

template <class F>
inline void each(float* z, int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(z + i, f(load(z + i)));
  if (i < count) store_partial(z + i, f(load_partial(z + i, static_cast<int>(count - i), 0.0f)), static_cast<int>(count - i));
}

void activate(Activation activation, float* z, int64_t count) {
  // a comparison with NaN is false: NaN has to come out of the second branch
  if (activation == Activation::relu) each(z, count, [](Vec<float> x) { return x < 0.0f ? Vec<float>{} : x; });
  if (activation == Activation::silu) each(z, count, [](Vec<float> x) { return x * logistic(x); });
  if (activation == Activation::gelu) each(z, count, [](Vec<float> x) { return x * normal_distribution(x); });
  if (activation == Activation::gelu_tanh)
    each(z, count, [](Vec<float> x) { return x * logistic(1.59576912f * (x + 0.044715f * x * x * x)); });
}

void widen(Dtype dtype, const void* from, float* to, int64_t count) { pack(dtype, from, 0, 1, count, 1.0f, count, to); }

void narrow(Dtype dtype, const float* from, void* to, int64_t count, bool around) {
  stored(dtype, [&](const auto* type) {
    using S = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    S* out = static_cast<S*>(to);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      if constexpr (std::is_same_v<S, float>)
        around && can_stream(out + i) ? stream<float>(out + i, load(from + i)) : store<float>(out + i, load(from + i));
      else
        store(out + i, load(from + i));
    }
    if (i < count) store_partial(out + i, load(from + i), static_cast<int>(count - i));
  });
}

void settle() { stream_end(); }

double finish(Dtype dtype, const void* values, float* raw, float gate, int64_t count) {
  return stored(dtype, [&](auto* type) {
    const auto* theta = static_cast<decltype(type)>(values);
    Vec<float> sums{};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Vec<float> g = load(raw + i);
      sums += g * load(theta + i);
      store(raw + i, g * gate);
    }
    double result = sum<float>(sums);
    for (; i < count; ++i) {
      result += static_cast<double>(raw[i] * wide(theta[i]));
      raw[i] *= gate;
    }
    return result;
  });
}

constexpr MatmulPasses kPasses{within,      panel_width, tile_tokens, kLanes,   pack_transposed, pack,
                               pack_tokens,  product,     outer_sum,   dot,
                               narrow_pack, narrow_sum,  narrow_dots, turn_back, activate,       widen, narrow,  settle,    finish};

}  // namespace

const MatmulPasses& matmul() { return kPasses; }

}  // namespace spartan::cpu::SPARTAN_ISA
