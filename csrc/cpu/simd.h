// Vectors of float or double, as wide as the instruction set this file is compiled for, through the compiler's vector types.
//
// Included only by the *_passes.cpp files, which are compiled once per instruction set with SPARTAN_ISA naming the
// namespace. Nothing here may have external linkage under a name shared between instruction sets: the linker would keep
// one copy and could hand AVX-512 code to a machine without it. Hence no standard-library templates in these files.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

// The first `count` lanes from p, the others `fill`.
template <class T>
static inline Vec<T> load_partial(const T* p, int count, T fill) {
  Vec<T> v;
  for (int i = 0; i < Simd<T>::width; ++i) v[i] = i < count ? p[i] : fill;
  return v;
}

template <class T>
static inline void store_partial(T* p, Vec<T> v, int count) {
  for (int i = 0; i < count; ++i) p[i] = v[i];
}

template <class T>
static inline Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

static inline Vec<float> absolute(Vec<float> v) {
  return (Vec<float>)((Mask<float>)v & 0x7fffffff);
}

static inline Vec<double> absolute(Vec<double> v) {
  return (Vec<double>)((Mask<double>)v & 0x7fffffffffffffffLL);
}

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

// exp(y) for y in [-87, 86], to about 1 ulp; beyond, the value at the end of that range. 2^n times a polynomial on
// |r| <= ln(2) / 2, fitted for the least relative error: 2e-9.
static inline Vec<float> exp_clamped(Vec<float> y) {
  using V = Vec<float>;
  using I = Mask<float>;
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  V clamped = y > splat(-87.0f) ? y : splat(-87.0f);
  clamped = clamped < splat(86.0f) ? clamped : splat(86.0f);
  const V shifted = clamped * 1.44269504f + magic;
  const V n = shifted - magic;
  V r = clamped - n * 0.693359375f;  // ln 2 split in two, the first part exact for every n
  r = r + n * 2.12194440e-4f;
  V p = r * 1.38436441e-3f + 8.37416339e-3f;
  p = p * r + 4.16680026e-2f;
  p = p * r + 1.66664312e-1f;
  p = p * r + 4.99999942e-1f;
  p = p * r + 1.00000003f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return (V)((I)p + ((I)shifted << 23));
#endif
}

// 1 / x, to about 1 ulp.
static inline Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  // an estimate good to 2^-14 and one Newton step: a third of the time of the division
  const Vec<float> estimate = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return estimate + estimate * (1.0f - x * estimate);
#else
  return 1.0f / x;
#endif
}

static inline Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

static inline Vec<double> exp_clamped(Vec<double> y) {
  Vec<double> out;
  for (int i = 0; i < Simd<double>::width; ++i) out[i] = std::exp(y[i] > -700.0 ? (y[i] < 700.0 ? y[i] : 700.0) : -700.0);
  return out;
}

}  // namespace spartan::cpu::SPARTAN_ISA
