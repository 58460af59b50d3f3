// Vectors of float or double, as wide as the instruction set this file is compiled for, through the compiler's vector types.
//
// Included only by the *_passes.cpp files, which are compiled once per instruction set with SPARTAN_ISA naming the
// namespace. Nothing here may have external linkage under a name shared between instruction sets: the linker would keep
// one copy and could hand AVX-512 code to a machine without it. Hence no standard-library templates in these files.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "storage.h"

#if defined(__AVX512F__)
#define SPARTAN_VECTOR_BYTES 64
#include <immintrin.h>
#elif defined(__AVX2__)
#define SPARTAN_VECTOR_BYTES 32
#include <immintrin.h>
#else
#define SPARTAN_VECTOR_BYTES 16
#endif

namespace spartan::cpu::SPARTAN_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(SPARTAN_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(SPARTAN_VECTOR_BYTES)));
  static constexpr int width = SPARTAN_VECTOR_BYTES / sizeof(float);
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(SPARTAN_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(SPARTAN_VECTOR_BYTES)));
  static constexpr int width = SPARTAN_VECTOR_BYTES / sizeof(double);
};

// Stored in 16 bits, computed in float: a vector of them is a vector of float, and takes half its bytes in memory.
template <>
struct Simd<bfloat16> : Simd<float> {};
template <>
struct Simd<float16> : Simd<float> {};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using Mask = typename Simd<T>::I;

template <class T>
static inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
static inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

typedef uint16_t Halves __attribute__((vector_size(SPARTAN_VECTOR_BYTES / 2)));

static inline Vec<float> widen(Halves h, bfloat16) {
  return (Vec<float>)(__builtin_convertvector(h, Mask<float>) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
static inline Halves narrow(Vec<float> v, bfloat16) {
  const Mask<float> raw = (Mask<float>)v;
  const Mask<float> rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : Mask<float>{} + 0x7fc0, Halves);
}

static inline Vec<float> widen(Halves h, float16) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  const Mask<float> raw = __builtin_convertvector(h, Mask<float>);
  const Mask<float> magnitude = (raw & 0x7fff) << 13;
  const Mask<float> scaled = (Mask<float>)((Vec<float>)magnitude * 0x1p112f);  // subnormal halves are normal floats
  const Mask<float> special = magnitude >= 0x0f800000 ? Mask<float>{} + 0x7f800000 : Mask<float>{};
  return (Vec<float>)(scaled | special | ((raw & 0x8000) << 16));
#endif
}

static inline Halves narrow(Vec<float> v, float16) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const Mask<float> sign = ((Mask<float>)v >> 16) & 0x8000, magnitude = (Mask<float>)v & 0x7fffffff;
  // 1/2 has the unit in the last place of subnormal halves: adding it rounds to one
  const Mask<float> subnormal = (Mask<float>)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
  const Mask<float> normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Mask<float> half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? Mask<float>{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? Mask<float>{} + 0x7e00 : half;
  return __builtin_convertvector(half | sign, Halves);
#endif
}

template <class S>
static inline Vec<S> load_narrow(const S* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, S{});
}
static inline Vec<float> load(const bfloat16* p) { return load_narrow(p); }
static inline Vec<float> load(const float16* p) { return load_narrow(p); }

template <class S>
static inline void store_narrow(S* p, Vec<S> v) {
  const Halves h = narrow(v, S{});
  std::memcpy(p, &h, sizeof h);
}
static inline void store(bfloat16* p, Vec<float> v) { store_narrow(p, v); }
static inline void store(float16* p, Vec<float> v) { store_narrow(p, v); }

// Stores around the cache, for output that would only push other data out of it: a plain store reads the line first. The
// address must be a multiple of the vector's size; stream_end() before another thread reads.
static inline bool can_stream(const void* p) {
#if defined(__AVX2__)
  return reinterpret_cast<uintptr_t>(p) % SPARTAN_VECTOR_BYTES == 0;
#else
  return p == nullptr;
#endif
}

template <class T>
static inline void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  store(p, v);
#endif
}

template <class S>
static inline void stream_narrow(S* p, Vec<S> v) {
  const Halves h = narrow(v, S{});
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)h);
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)h);
#else
  std::memcpy(p, &h, sizeof h);
#endif
}
static inline void stream(bfloat16* p, Vec<float> v) { stream_narrow(p, v); }
static inline void stream(float16* p, Vec<float> v) { stream_narrow(p, v); }

static inline void stream_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first `count` lanes from p, the others `fill`.
template <class T>
static inline Vec<T> load_partial(const T* p, int count, Compute<T> fill) {
  Vec<T> v;
  if constexpr (sizeof(T) == 2) {
    T all[Simd<T>::width] = {};
    std::memcpy(all, p, static_cast<size_t>(count) * sizeof(T));
    v = load(all);
    for (int i = count; i < Simd<T>::width; ++i) v[i] = fill;
  } else {
    for (int i = 0; i < Simd<T>::width; ++i) v[i] = i < count ? p[i] : fill;
  }
  return v;
}

template <class T>
static inline void store_partial(T* p, Vec<T> v, int count) {
  if constexpr (sizeof(T) == 2) {
    T all[Simd<T>::width];
    store(all, v);
    std::memcpy(p, all, static_cast<size_t>(count) * sizeof(T));
  } else {
    for (int i = 0; i < count; ++i) p[i] = v[i];
  }
}

template <class T>
static inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // a broadcast: 0 + x would be an addition
}

static inline Vec<float> absolute(Vec<float> v) {
  return (Vec<float>)((Mask<float>)v & 0x7fffffff);
}

static inline Vec<double> absolute(Vec<double> v) {
  return (Vec<double>)((Mask<double>)v & 0x7fffffffffffffffLL);
}

// The second of two numbers where either is NaN, as the instructions have it.
template <class V>
static inline V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
static inline V smaller(V a, V b) {
  return a < b ? a : b;
}
#if defined(__AVX512F__)
static inline Vec<float> larger(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b); }
static inline Vec<float> smaller(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
static inline Vec<float> larger(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
static inline Vec<float> smaller(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b); }
#endif

template <class T>
static inline double sum(Vec<T> v) {
  double total = 0;
  for (int i = 0; i < Simd<T>::width; ++i) total += static_cast<double>(v[i]);
  return total;
}

// One bit per lane, set where the lane of a comparison's result is true.
static inline uint32_t bits(Mask<float> m) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m, (__m512i)m);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)m));
#else
  uint32_t out = 0;
  for (int i = 0; i < Simd<float>::width; ++i) out |= static_cast<uint32_t>(m[i] & 1) << i;
  return out;
#endif
}

static inline uint32_t bits(Mask<double> m) {
  uint32_t out = 0;
  for (int i = 0; i < Simd<double>::width; ++i) out |= static_cast<uint32_t>(m[i] & 1) << i;
  return out;
}

constexpr float kExp2[7] = {1.0f,           6.93147203e-1f, 2.40226479e-1f, 5.55033244e-2f,
                            9.61843748e-3f, 1.33988873e-3f, 1.53533515e-4f};

// 2^z for z in [-126, 124], to about 1 ulp; beyond, the value at the end of that range. 2^n times a polynomial on |r| <= 1/2,
// fitted for the least relative error (2e-9) and evaluated by pairs. N vectors go through each operation side by side:
// loops around it wait on the length of its chain of operations, of which the processor's window holds one or two.
template <int N>
static inline void exp2_clamped(Vec<float> (&z)[N]) {
  using V = Vec<float>;
  V r[N], square[N], low[N], middle[N], high[N];
  for (int j = 0; j < N; ++j) z[j] = larger(z[j], splat(-126.0f));
  for (int j = 0; j < N; ++j) z[j] = smaller(z[j], splat(124.0f));
#if defined(__AVX512DQ__)
  for (int j = 0; j < N; ++j) r[j] = (V)_mm512_reduce_ps((__m512)z[j], _MM_FROUND_TO_NEAREST_INT);
#else
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  V shifted[N];
  for (int j = 0; j < N; ++j) shifted[j] = z[j] + magic;
  for (int j = 0; j < N; ++j) r[j] = shifted[j] - magic;
  for (int j = 0; j < N; ++j) r[j] = z[j] - r[j];
#endif
  for (int j = 0; j < N; ++j) square[j] = r[j] * r[j];
  for (int j = 0; j < N; ++j) high[j] = r[j] * kExp2[5] + kExp2[4];
  for (int j = 0; j < N; ++j) high[j] += square[j] * kExp2[6];
  for (int j = 0; j < N; ++j) middle[j] = r[j] * kExp2[3] + kExp2[2];
  for (int j = 0; j < N; ++j) middle[j] += square[j] * high[j];
  for (int j = 0; j < N; ++j) low[j] = r[j] * kExp2[1] + 1.0f;
  for (int j = 0; j < N; ++j) low[j] += square[j] * middle[j];
#if defined(__AVX512DQ__)
  for (int j = 0; j < N; ++j) z[j] = (V)_mm512_scalef_ps((__m512)low[j], (__m512)(z[j] - r[j]));
#else
  for (int j = 0; j < N; ++j) z[j] = (V)((Mask<float>)low[j] + ((Mask<float>)shifted[j] << 23));
#endif
}

template <int N>
static inline void exp2_clamped(Vec<double> (&z)[N]) {
  for (int j = 0; j < N; ++j)
    for (int i = 0; i < Simd<double>::width; ++i)
      z[j][i] = std::exp2(z[j][i] > -1020.0 ? (z[j][i] < 1020.0 ? z[j][i] : 1020.0) : -1020.0);
}

static inline Vec<float> exp2_clamped(Vec<float> z) {
  Vec<float> one[1] = {z};
  exp2_clamped(one);
  return one[0];
}

}  // namespace spartan::cpu::SPARTAN_ISA
