#include "masked_weight_passes.h"

#include "simd.h"

namespace spartan::cpu::SPARTAN_ISA {
namespace {

template <class T>
inline T sign_of(T x) {
  return static_cast<T>((x > T(0)) - (x < T(0)));
}

template <class T>
inline T magnitude(T x) {
  return x < T(0) ? -x : x;
}

// Calls f(i, b) for the weights i of one row and their blocks b. Unstructured rows and runs within a block are plain
// counted loops, which the compiler turns into vectors.
template <class T, class F>
inline void for_row(const BlockRow<T>& row, F f) {
  if (row.columns == 1) {
    for (int64_t i = 0, n = row.in * row.kernel; i < n; ++i) f(i, i);
    return;
  }
  if (row.kernel == 1) {
    for (int64_t begin = 0, b = 0; begin < row.in; begin += row.columns, ++b) {
      const int64_t end = begin + row.columns < row.in ? begin + row.columns : row.in;
      for (int64_t i = begin; i < end; ++i) f(i, b);
    }
    return;
  }
  for (int64_t column = 0; column < row.in; ++column) {
    const int64_t first = column / row.columns * row.kernel, at = column * row.kernel;
    for (int64_t k = 0; k < row.kernel; ++k) f(at + k, first + k);
  }
}

template <class T>
inline int64_t blocks_of(const BlockRow<T>& row) {
  return (row.in + row.columns - 1) / row.columns * row.kernel;
}

// Sums f(i) over each block into sums[b].
template <class T, class F>
inline void block_sums(const BlockRow<T>& row, T* sums, F f) {
  for (int64_t b = 0, n = blocks_of(row); b < n; ++b) sums[b] = T(0);
  const int64_t length = row.in * row.kernel;
  for (int64_t r = 0; r < row.rows; ++r) {
    if (row.kernel != 1 || row.columns == 1) {
      for_row(row, [&](int64_t i, int64_t b) { sums[b] += f(r * length + i); });
      continue;
    }
    for (int64_t begin = 0, b = 0; begin < row.in; begin += row.columns, ++b) {
      const int64_t end = begin + row.columns < row.in ? begin + row.columns : row.in;
      constexpr int W = Simd<T>::width;
      T lanes[W] = {};
      int64_t i = begin;
      for (; i + W <= end; i += W)
        for (int lane = 0; lane < W; ++lane) lanes[lane] += f(r * length + i + lane);
      T sum = T(0);
      for (; i < end; ++i) sum += f(r * length + i);
      for (int lane = 0; lane < W; ++lane) sum += lanes[lane];
      sums[b] += sum;
    }
  }
}

template <class T>
void forward(const BlockRow<T>& row, const T* weight, T* result) {
  const int64_t length = row.in * row.kernel;
  const T* soft = row.soft;
  const uint8_t* hard = row.hard;
  for (int64_t r = 0; r < row.rows; ++r, weight += length, result += length) {
    if (soft != nullptr && hard != nullptr)
      for_row(row, [&](int64_t i, int64_t b) { result[i] = hard[b] ? weight[i] * soft[b] : T(0); });
    else if (soft != nullptr)
      for_row(row, [&](int64_t i, int64_t b) { result[i] = weight[i] * soft[b]; });
    else if (hard != nullptr)
      for_row(row, [&](int64_t i, int64_t b) { result[i] = hard[b] ? weight[i] : T(0); });
    else
      for (int64_t i = 0; i < length; ++i) result[i] = weight[i];
  }
}

// Unstructured, the common case: one loop, nothing kept between weights. result may be grad itself.
template <class T>
void backward_single(const BlockRow<T>& row, const T* grad, const T* weight, bool through, T* result) {
  const int64_t n = row.in * row.kernel * row.rows;
  const T* soft = row.soft;
  const T* costs = row.costs;
  const T scale = row.beta / row.cost;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const T pull = (costs != nullptr ? row.beta / costs[i] : scale) * (T(1) - soft[i]) * magnitude(weight[i]);
    result[i] = grad[i] * soft[i] * (T(1) + pull);
  }
  if (through || row.hard == nullptr) return;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) result[i] = row.hard[i] ? result[i] : T(0);
}

template <class T>
void backward(const BlockRow<T>& row, const T* grad, const T* weight, bool straight_through, T* result, T* scratch) {
  const int64_t length = row.in * row.kernel, blocks = blocks_of(row);
  if (row.soft != nullptr && row.columns == 1 && row.rows == 1)
    return backward_single(row, grad, weight, straight_through, result);
  T* pull = scratch;
  if (row.soft != nullptr) {
    block_sums(row, pull, [&](int64_t i) { return grad[i] * weight[i]; });
    for (int64_t b = 0; b < blocks; ++b) {
      const T a = row.costs != nullptr ? row.costs[b] : row.cost;
      pull[b] *= row.beta * row.soft[b] * (T(1) - row.soft[b]) / a;
    }
  }
  const uint8_t* hard = straight_through ? nullptr : row.hard;
  for (int64_t r = 0; r < row.rows; ++r, grad += length, weight += length, result += length) {
    if (row.soft != nullptr)
      for_row(row, [&](int64_t i, int64_t b) { result[i] = grad[i] * row.soft[b] + sign_of(weight[i]) * pull[b]; });
    else
      for (int64_t i = 0; i < length; ++i) result[i] = grad[i];
    if (hard != nullptr) for_row(row, [&](int64_t i, int64_t b) { result[i] = hard[b] ? result[i] : T(0); });
  }
}

template <class T>
TwoSums coupling(const BlockRow<T>& row, const T* grad, const T* weight, T* scratch) {
  const int64_t blocks = blocks_of(row);
  const bool single = row.columns == 1 && row.rows == 1;
  T* q = scratch;
  T* v = scratch + blocks;
  if (!single) {
    block_sums(row, q, [&](int64_t i) { return grad[i] * weight[i]; });
    block_sums(row, v, [&](int64_t i) { return magnitude(weight[i]); });
  }
  TwoSums total;
  constexpr int64_t kBlock = 1024;
  constexpr int W = 16;
  for (int64_t begin = 0; begin < blocks; begin += kBlock) {
    const int64_t end = begin + kBlock < blocks ? begin + kBlock : blocks;
    T coupled[W] = {}, slope[W] = {};
    const auto add = [&](int64_t b, int lane) {
      const T a = row.costs != nullptr ? row.costs[b] : row.cost;
      const T m = row.soft[b], rest = T(1) - m;
      const T sum = single ? grad[b] * weight[b] : q[b];
      const T score = single ? magnitude(weight[b]) : v[b];
      coupled[lane] += rest * sum / (T(1) + row.beta * rest * score / a);
      slope[lane] += a * m * rest;
    };
    int64_t b = begin;
    for (; b + W <= end; b += W)
      for (int lane = 0; lane < W; ++lane) add(b + lane, lane);
    for (; b < end; ++b) add(b, 0);
    for (int lane = 0; lane < W; ++lane) {
      total.first += static_cast<double>(coupled[lane]);
      total.second += static_cast<double>(slope[lane]);
    }
  }
  return total;
}

template <class T>
TwoSums kept(const BlockRow<T>& row) {
  TwoSums total;
  constexpr int64_t kBlock = 1024;
  constexpr int W = 16;
  const T* soft = row.soft;
  const uint8_t* hard = row.hard;
  for (int64_t begin = 0; begin < row.in; begin += kBlock) {
    const int64_t end = begin + kBlock < row.in ? begin + kBlock : row.in;
    T mass[W] = {};
    int32_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += hard[i];
    int64_t i = begin;
    for (; i + W <= end; i += W)
      for (int lane = 0; lane < W; ++lane) mass[lane] += soft[i + lane] * static_cast<T>(hard[i + lane]);
    for (; i < end; ++i) mass[0] += soft[i] * static_cast<T>(hard[i]);
    for (int lane = 0; lane < W; ++lane) total.first += static_cast<double>(mass[lane]);
    total.second += count;
  }
  return total;
}

template <class T>
void correct(const BlockRow<T>& row, T* grad, const T* weight, T scale) {
  const int64_t length = row.in * row.kernel;
  for (int64_t r = 0; r < row.rows; ++r, grad += length, weight += length)
    for_row(row, [&](int64_t i, int64_t b) {
      const T m = row.soft[b];
      grad[i] -= sign_of(weight[i]) * (m * (T(1) - m) * scale);
    });
}

template <class T>
void gate(const BlockRow<T>& row, const T* weight, const T* slope, T* grad, T* sums, T* scratch) {
  const int64_t length = row.in * row.kernel;
  block_sums(row, sums, [&](int64_t i) { return grad[i] * weight[i]; });
  if (slope != nullptr)
    for (int64_t b = 0, n = blocks_of(row); b < n; ++b) scratch[b] = slope[b] * sums[b];
  for (int64_t r = 0; r < row.rows; ++r, grad += length, weight += length) {
    if (slope != nullptr)
      for_row(row, [&](int64_t i, int64_t b) { grad[i] = grad[i] * row.soft[b] + sign_of(weight[i]) * scratch[b]; });
    else
      for_row(row, [&](int64_t i, int64_t b) { grad[i] *= row.soft[b]; });
  }
}

template <class T>
void add_signs(const BlockRow<T>& row, T* grad, const T* weight) {
  const int64_t length = row.in * row.kernel;
  for (int64_t r = 0; r < row.rows; ++r, grad += length, weight += length)
    for_row(row, [&](int64_t i, int64_t b) { grad[i] += sign_of(weight[i]) * row.soft[b]; });
}

template <class T>
void scores(const BlockRow<T>& row, const T* weight, T* out) {
  block_sums(row, out, [&](int64_t i) { return magnitude(weight[i]); });
}

template <class T>
constexpr MaskedWeightPasses<T> kPasses{forward<T>, backward<T>, coupling<T>, kept<T>,
                                        correct<T>, gate<T>, add_signs<T>, scores<T>};

}  // namespace

const MaskedWeightPasses<float>& masked_weight_float() { return kPasses<float>; }
const MaskedWeightPasses<double>& masked_weight_double() { return kPasses<double>; }

}  // namespace spartan::cpu::SPARTAN_ISA
