// Compiled once per instruction set; see simd.h for what may not be used here.
#include "masked_matmul_passes.h"

#include "narrow_tiles.h"

namespace spartan::cpu::SPARTAN_ISA {
namespace {

// ------------------------------------------------------------------------------------------------------- packing

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
          unrolled<4>([&](auto u) SPARTAN_INLINE { tile.add(left + u * Stride, panel + u * L * N); });
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
    for (; t + 4 <= end; t += 4, a += 4 * p.a_stride, b += 4 * p.b_stride)
      unrolled<4>([&](auto u) SPARTAN_INLINE { tile.add(a + u * p.a_stride, b + u * p.b_stride); });
    for (; t < end; ++t, a += p.a_stride, b += p.b_stride) tile.add(a, b);
    if (p.tokens > kStretch) tile.hold(held, first);
  }
  if (p.tokens > kStretch) tile.release(held);
  p.add ? tile.template put<true>(p.out, p.out_stride, p.columns) : tile.template put<false>(p.out, p.out_stride, p.columns);
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

// The sum of each of `kLanes` vectors.
inline Vec<float> totals(Vec<float>* sums) {
  transpose_square<kLanes>(sums);
  Vec<float> all = sums[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes; ++i) all += sums[i];
  return all;
}

// Block by block, as they lie in memory. A block is in the first-level cache for all tokens but the first.
template <class S>
void dot_as(const DotProduct& p, const ActiveBlocks& active) {
  const S* weights = static_cast<const S*>(p.weights);
  constexpr int64_t kLine = 64 / sizeof(S);
  const bool apart = p.stride != active.span;  // rows of a block, which then no prefetcher finds
  for (int64_t e = 0; e < active.count; ++e) {
    const int64_t from = active.indices[e] * active.span;
    const int64_t depth = active.limit - from < active.span ? active.limit - from : active.span;
    const float gate = p.gates != nullptr ? p.gates[e] : 1.0f;
    const S *block = weights + p.offsets[e], *next = apart && e + 1 < active.count ? weights + p.offsets[e + 1] : nullptr;
    for (int64_t row = 0; row < p.rows; row += kLanes) {
      const int rows = static_cast<int>(p.rows - row < kLanes ? p.rows - row : kLanes);
      for (int r = 0; next != nullptr && r < rows; ++r)
        for (int64_t k = 0; k < depth; k += kLine) __builtin_prefetch(next + (row + r) * p.stride + k);
      const S* w = block + row * p.stride;
      for (int64_t t = 0; t < p.tokens; ++t) {
        const float* x = p.x + t * p.x_stride + from;
        Vec<float> sums[kLanes] = {};
        const auto add = [&](int64_t k, int64_t count, int there) SPARTAN_INLINE {
          const Vec<float> right = load_some(x + k, count);
#pragma GCC unroll 16
          for (int r = 0; r < kLanes; ++r)
            if (r < there) sums[r] += load_some(w + r * p.stride + k, count) * right;
        };
        int64_t k = 0;
        if (rows == kLanes)
          for (; k + kLanes <= depth; k += kLanes) add(k, kLanes, kLanes);
        for (; k < depth; k += kLanes) add(k, depth - k, rows);
        float* y = p.y + t * p.y_stride + row;
        const Vec<float> result = gate * totals(sums);
        rows == kLanes ? store(y, load(y) + result) : store_partial(y, load_partial(y, rows, 0.0f) + result, rows);
      }
    }
  }
}

void dot(Dtype dtype, const DotProduct& p, const ActiveBlocks& active) {
  stored(dtype, [&](const auto* type) {
    using S = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    dot_as<S>(p, active);
  });
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

int64_t multiply_adds(int64_t rounds, float* sink) {
  const Vec<float> half = Vec<float>{} + 0.5f;
  Vec<float> sums[kRegisters];
#pragma GCC unroll 32
  for (int i = 0; i < kRegisters; ++i) sums[i] = Vec<float>{};
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < kRegisters; ++i) {
      sums[i] = sums[i] * half + half;
      keep_in_register(sums[i]);
    }
  }
#pragma GCC unroll 32
  for (int i = 1; i < kRegisters; ++i) sums[0] += sums[i];
  *sink = total(sums[0]);
  return rounds * kRegisters * kLanes * 2;
}

constexpr MatmulPasses kPasses{within,      panel_width, tile_tokens, kLanes,   pack_transposed, pack,
                               pack_tokens,  product,     outer_sum,   dot,
                               narrow_pack, narrow_sum,  narrow_dots, turn_back, activate,       widen, narrow,  settle,    finish,
                               multiply_adds};

}  // namespace

const MatmulPasses& matmul() { return kPasses; }

}  // namespace spartan::cpu::SPARTAN_ISA
