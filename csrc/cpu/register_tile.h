// Sums held in registers, for the passes of products only, as simd.h.
#pragma once

#include <type_traits>
#include <utility>

#include "masked_matmul_passes.h"
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

constexpr int64_t kStretch = 128;  // terms of a sum in one chain of additions: its rounding errors grow with its length

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

inline float total(Vec<float> v) {
  Mask<float> lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  for (int half = kLanes / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lanes ^ half);
  return v[0];
}

// With sanitizers, loops stay loops: unrolled, their checks take the compiler tens of minutes.
#if defined(SPARTAN_SANITIZED)
#define SPARTAN_INLINE
#else
#define SPARTAN_INLINE __attribute__((always_inline))
#endif

template <int I>
struct Constant {
  SPARTAN_INLINE constexpr operator int() const { return I; }
};

// Calls f(I) for I < Count. Indices are constants from the start, which is what keeps arrays in registers.
template <int Count, class F>
SPARTAN_INLINE inline void unrolled(F&& f) {
#if defined(SPARTAN_SANITIZED)
  for (int i = 0; i < Count; ++i) f(i);
#else
  [&]<int... I>(std::integer_sequence<int, I...>) SPARTAN_INLINE { (f(Constant<I>{}), ...); }
  (std::make_integer_sequence<int, Count>{});
#endif
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
    unrolled<T>([&](auto t) SPARTAN_INLINE { unrolled<N>([&](auto n) SPARTAN_INLINE { f(t, n); }); });
  }

  SPARTAN_INLINE void start(const float* bias) {
    unrolled<N>([&](auto n) SPARTAN_INLINE {
      const V first = bias != nullptr ? load_lanes<L>(bias + n * L) : V{};
      unrolled<T>([&](auto t) SPARTAN_INLINE { sums[t][n] = first; });
    });
  }

  // sums += left (T numbers) times one row of the panel
  SPARTAN_INLINE void add(const float* left, const float* panel) {
    V right[N];
    unrolled<N>([&](auto n) SPARTAN_INLINE { right[n] = load_lanes<L>(panel + n * L); });
    unrolled<T>([&](auto t) SPARTAN_INLINE {
      const V one = left[t] - V{};  // a broadcast: 0 + x would be an addition
      unrolled<N>([&](auto n) SPARTAN_INLINE {
        sums[t][n] += one * right[n];
        keep_in_register(sums[t][n]);
      });
    });
  }

  // A long sum in float32 goes in stretches: each adds its rounding to the few that are held, not to every term after it.
  SPARTAN_INLINE void hold(V (*held)[N], bool first) {
    each([&](auto t, auto n) SPARTAN_INLINE {
      held[t][n] = first ? sums[t][n] : held[t][n] + sums[t][n];
      sums[t][n] = V{};
    });
  }
  SPARTAN_INLINE void release(const V (*held)[N]) {
    each([&](auto t, auto n) SPARTAN_INLINE { sums[t][n] += held[t][n]; });
  }

  SPARTAN_INLINE void store(float* out, int64_t stride) const {
    each([&](auto t, auto n) SPARTAN_INLINE { std::memcpy(out + t * stride + n * L, &sums[t][n], sizeof(V)); });
  }
  // Stores, or adds to what is there, the first `columns`.
  template <bool Add>
  SPARTAN_INLINE void put(float* out, int64_t stride, int64_t columns) const {
    each([&](auto t, auto n) SPARTAN_INLINE {
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

}  // namespace
}  // namespace spartan::cpu::SPARTAN_ISA
