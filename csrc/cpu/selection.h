// Weighted selection by radix: where a budget runs out, in descending order, without sorting.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../host_device.h"

namespace spartan::cpu {

template <class T>
struct Key;
template <>
struct Key<float> {
  using Bits = uint32_t;
};
template <>
struct Key<double> {
  using Bits = uint64_t;
};

// Unsigned keys in the order of the numbers; -0 and 0 are one key.
template <class T>
SPARTAN_HD inline typename Key<T>::Bits key_of(T x) {
  using Bits = typename Key<T>::Bits;
  x += T(0);
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  constexpr Bits top = Bits(1) << (8 * sizeof(Bits) - 1);
  return bits & top ? ~bits : bits | top;
}

template <class T>
SPARTAN_HD inline T value_of(typename Key<T>::Bits key) {
  using Bits = typename Key<T>::Bits;
  constexpr Bits top = Bits(1) << (8 * sizeof(Bits) - 1);
  const Bits bits = key & top ? key & ~top : ~key;
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Keep u > ratio, and of u == ratio those whose index is at most `index`.
template <class T>
struct Cut {
  T ratio;
  int64_t index;

  static Cut nothing() { return {std::numeric_limits<T>::infinity(), -1}; }
  static Cut everything() { return {-std::numeric_limits<T>::infinity(), std::numeric_limits<int64_t>::max()}; }
};

constexpr int kRadixBits = 11;
constexpr int kRadixBins = 1 << kRadixBits;

// One descent through the digits of the key: `level` after `level` narrows the prefix under which the budget runs out.
template <class T>
struct RadixDescent {
  using Bits = typename Key<T>::Bits;
  static constexpr int kKeyBits = 8 * sizeof(Bits);

  double budget;
  double spent = 0;  // cost of everything above the prefix
  Bits prefix = 0;
  int shift = kKeyBits, width = 0;
  bool everything = false;

  explicit RadixDescent(double k) : budget(k) { next_digit(); }

  bool finished() const { return width == 0 || everything; }
  bool matches(Bits key) const { return shift + width == kKeyBits || (key >> (shift + width)) == prefix; }
  int bin(Bits key) const { return static_cast<int>((key >> shift) & ((Bits(1) << width) - 1)); }

  // `histogram[b]` is the cost of the entries that match and fall into bin b.
  void narrow(const double* histogram) {
    int chosen = -1, lowest = -1;
    for (int b = (1 << width) - 1; b >= 0; --b) {
      if (histogram[b] == 0) continue;
      if (spent + histogram[b] > budget) {
        chosen = b;
        break;
      }
      spent += histogram[b];
      lowest = b;
    }
    const bool first = shift + width == kKeyBits;
    if (chosen < 0 && first) {
      everything = true;
      return;
    }
    if (chosen < 0) {  // the digit's sum and its parts round differently: the budget runs out in the last one
      chosen = lowest;
      spent -= histogram[lowest];
    }
    prefix = (first ? Bits(0) : prefix << width) | static_cast<Bits>(chosen);
    next_digit();
  }

  T ratio() const { return value_of<T>(prefix); }

 private:
  void next_digit() {
    width = shift < kRadixBits ? shift : kRadixBits;
    shift -= width;
  }
};

// Descent over n entries: ratio_at(i) and cost_at(i) give them. The histogram has kRadixBins entries; `merge` adds to it
// what others count.
template <class T, class RatioAt, class CostAt, class Merge>
RadixDescent<T> descend(int64_t n, double budget, double* histogram, RatioAt ratio_at, CostAt cost_at, Merge merge) {
  RadixDescent<T> radix(budget);
  while (!radix.finished()) {
    std::memset(histogram, 0, kRadixBins * sizeof(double));
    for (int64_t i = 0; i < n; ++i) {
      const auto key = key_of(static_cast<T>(ratio_at(i)));
      if (radix.matches(key)) histogram[radix.bin(key)] += static_cast<double>(cost_at(i));
    }
    merge(histogram);
    radix.narrow(histogram);
  }
  return radix;
}

template <class T, class RatioAt, class CostAt>
RadixDescent<T> descend(int64_t n, double budget, double* histogram, RatioAt ratio_at, CostAt cost_at) {
  return descend<T>(n, budget, histogram, ratio_at, cost_at, [](double*) {});
}

}  // namespace spartan::cpu
