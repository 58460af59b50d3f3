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

// exp(y) for y <= 0, to about 1 ulp: 2^n times the series of exp on |r| <= ln(2)/2, the truncated term below 6e-9.
static inline Vec<float> exp_nonpositive(Vec<float> y) {
  using V = Vec<float>;
  using I = Mask<float>;
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  const V clamped = y < -87.0f ? splat(-87.0f) : y;
  const V shifted = clamped * 1.44269504f + magic;
  const V n = shifted - magic;
  V r = clamped - n * 0.693359375f;  // ln 2 split in two, the first part exact for every n
  r = r + n * 2.12194440e-4f;
  V p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const V scaled = (V)((I)p + ((I)shifted << 23));
  return y < -87.0f ? splat(0.0f) : scaled;
}

static inline Vec<double> exp_nonpositive(Vec<double> y) {
  Vec<double> out;
  for (int i = 0; i < Simd<double>::width; ++i) out[i] = std::exp(y[i]);
  return out;
}

}  // namespace spartan::cpu::SPARTAN_ISA
