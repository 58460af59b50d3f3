// The loops over memory of the masked weight: each works on one row of weights, or the rows of one row of blocks.
#pragma once

#include <cstdint>

namespace spartan::cpu {

// Rows of weights that share a row of blocks: `rows` x (in * kernel), with masks of ceil(in / columns) x kernel.
template <class T>
struct BlockRow {
  int64_t rows, in, kernel, columns;
  const T* soft;        // null: ones
  const uint8_t* hard;  // null: ones
  const T* costs;       // null: `cost` each
  T cost, beta;
};

struct TwoSums {
  double first = 0, second = 0;

  TwoSums& operator+=(const TwoSums& o) {
    first += o.first, second += o.second;
    return *this;
  }
};

// `scratch` holds 2 * ceil(in / columns) * kernel entries.
template <class T>
struct MaskedWeightPasses {
  void (*forward)(const BlockRow<T>&, const T* weight, T* result);
  void (*backward)(const BlockRow<T>&, const T* grad, const T* weight, bool straight_through, T* result, T* scratch);
  TwoSums (*coupling)(const BlockRow<T>&, const T* grad, const T* weight, T* scratch);  // (1 - m) g m, a m (1 - m)
  TwoSums (*kept)(const BlockRow<T>&);                                                  // h m, h: one long row
  void (*correct)(const BlockRow<T>&, T* grad, const T* weight, T scale);
  // sums_b = grad weight, grad = grad * soft_b + sign(weight) * slope_b sums_b; `scratch` holds an entry for each block
  void (*gate)(const BlockRow<T>&, const T* weight, const T* slope, T* grad, T* sums, T* scratch);
  void (*add_signs)(const BlockRow<T>&, T* grad, const T* weight);  // grad += sign(weight) * soft
  void (*scores)(const BlockRow<T>&, const T* weight, T* scores);
};

template <class T>
const MaskedWeightPasses<T>& masked_weight_passes();

}  // namespace spartan::cpu
