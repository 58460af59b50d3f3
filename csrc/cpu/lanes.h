// Rows of a matrix as lanes of vectors: entry j of every row of a block in one vector. For the *_rows passes only, as simd.h.
#pragma once

#include "short_rows.h"
#include "simd.h"

namespace spartan::cpu::SPARTAN_ISA {

using V = Vec<float>;
using I = Mask<float>;
constexpr int kLanes = Simd<float>::width;
static_assert(kLongestLane % kLanes == 0);

// Two vectors' lanes picked by index: the second's come after the first's.
static inline V pick(V a, V b, I index) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(a, b, index);
#else
  V out;
  for (int l = 0; l < kLanes; ++l) out[l] = index[l] < kLanes ? a[index[l]] : b[index[l] - kLanes];
  return out;
#endif
}

template <int Bit>
struct Exchange {
  static I first() {
    I out;
    for (int l = 0; l < kLanes; ++l) out[l] = l & Bit ? kLanes + (l ^ Bit) : l;
    return out;
  }
  static I second() {
    I out;
    for (int l = 0; l < kLanes; ++l) out[l] = l & Bit ? kLanes + l : l ^ Bit;
    return out;
  }
};

// Exchanges the lowest bits of the vector's number with those of the lane, for N vectors: for N = kLanes their
// transposition. Done twice it is undone.
template <int N>
static inline void exchange(V* x) {
  constexpr int half = N / 2;
  if constexpr (half > 0) {
    const I first = Exchange<half>::first(), second = Exchange<half>::second();
    for (int i = 0; i < half; ++i) {
      const V a = x[i], b = x[i + half];
      x[i] = pick(a, b, first);
      x[i + half] = pick(a, b, second);
    }
    exchange<half>(x);
    exchange<half>(x + half);
  }
}

// Which row of the block each lane holds, and how the block gets into lanes and back.
class LaneMap {
 public:
  template <class S>
  explicit LaneMap(const RowBlock<S>& block) : length_(static_cast<int>(block.length)), count_(block.count) {
    const bool dense = block.stride == block.length && block.count == kLanes;
    packed_ = dense && (length_ & (length_ - 1)) == 0 && length_ < kLanes;
    const int bits = packed_ ? __builtin_ctz(length_) : 0, groups = packed_ ? kLanes >> bits : 0;
    for (int l = 0; l < kLanes; ++l) {
      const int spread = (l & (length_ - 1)) * groups + (l >> bits), repeated = l < count_ ? l : count_ - 1;
      row_[l] = packed_ ? spread : repeated;
    }
  }

  // Lanes past the last row repeat it.
  int row(int lane) const { return row_[lane]; }

  // `out` has room for whole multiples of kLanes.
  template <class S>
  void gather(const S* data, int64_t stride, int64_t readable, V* out) const {
    if (packed_ && stride == length_) {
      for (int j = 0; j < length_; ++j) out[j] = load(data + j * kLanes);
      exchange_packed(out);
      return;
    }
    if (packed_) {
      for (int j = 0; j < length_; ++j)
        for (int l = 0; l < kLanes; ++l) out[j][l] = value(data, row(l) * stride + j);
      return;
    }
    for (int j = 0; j < length_; j += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const int64_t at = row(l) * stride + j;
        out[j + l] = at + kLanes <= readable ? load(data + at) : load_partial(data + at, tail(j), 0.0f);
      }
      exchange<kLanes>(out + j);
    }
  }

  // Brings lanes back to rows and stores them: full(offset, vector), partial(offset, vector, count). Overwrites x.
  template <class Store, class StorePartial>
  void scatter(V* x, Store full, StorePartial partial) const {
    if (packed_) {
      exchange_packed(x);
      for (int j = 0; j < length_; ++j) full(static_cast<int64_t>(j) * kLanes, x[j]);
      return;
    }
    for (int j = 0; j < length_; j += kLanes) exchange<kLanes>(x + j);
    // In the order of the rows: what a full vector writes past its row's end, the next rows overwrite.
    for (int r = 0; r < count_; ++r) {
      for (int j = 0; j < length_; j += kLanes) {
        const int64_t at = static_cast<int64_t>(r) * length_ + j;
        if (at + kLanes <= static_cast<int64_t>(count_) * length_)
          full(at, x[j + r]);
        else
          partial(at, x[j + r], tail(j));
      }
    }
  }

  template <class S>
  void scatter_to(V* x, S* out) const {
    scatter(
        x, [&](int64_t at, V v) { store(out + at, v); },
        [&](int64_t at, V v, int count) { store_partial<S>(out + at, v, count); });
  }

  // (first, second) of each row, one row after another.
  void scatter_pairs(V first, V second, double* out) const {
    if (count_ < kLanes) {
      for (int l = 0; l < count_; ++l) {
        out[2 * l] = static_cast<double>(first[l]);
        out[2 * l + 1] = static_cast<double>(second[l]);
      }
      return;
    }
    I low, high;
    for (int l = 0; l < kLanes; ++l) {
      low[l] = lane(l / 2) + (l % 2) * kLanes;
      high[l] = lane(l / 2 + kLanes / 2) + (l % 2) * kLanes;
    }
    float pairs[2 * kLanes];
    store(pairs, pick(first, second, low));
    store(pairs + kLanes, pick(first, second, high));
    for (int i = 0; i < 2 * kLanes; ++i) out[i] = static_cast<double>(pairs[i]);
  }

  // Bits of rows from bits of lanes.
  uint32_t rows(uint32_t lanes) const {
    if (lanes == (1u << kLanes) - 1) return lanes;
    uint32_t out = 0;
    for (; lanes != 0; lanes &= lanes - 1) out |= 1u << row(__builtin_ctz(lanes));
    return out;
  }

 private:
  // The inverse of row(), for full blocks.
  int lane(int row) const {
    const int groups = kLanes / length_;
    return packed_ ? (row % groups) * length_ + row / groups : row;
  }

  int tail(int j) const { return length_ - j < kLanes ? length_ - j : kLanes; }

  template <class S>
  static float value(const S* data, int64_t at) {
    return load_partial(data + at, 1, 0.0f)[0];
  }

  void exchange_packed(V* x) const {
    if (length_ == 2) exchange<2>(x);
    if (length_ == 4) exchange<4>(x);
    if (length_ == 8) exchange<8>(x);
  }

  int length_, count_;
  bool packed_;
  int row_[kLanes];
};

// One byte for each lane, 1 where the lane is true.
static inline void store_truth(uint8_t* out, I truth) {
  const uint32_t set = bits(truth);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_maskz_set1_epi8(static_cast<__mmask16>(set), 1));
#else
  // copy the bits to every byte, keep bit k in byte k, and bring it down to bit 0
  constexpr uint64_t ones = 0x0101010101010101ull;
  const uint64_t own = (set * ones) & 0x8040201008040201ull;
  const uint64_t bytes = ((own + 0x7f * ones) >> 7) & ones;
  std::memcpy(out, &bytes, kLanes < 8 ? kLanes : 8);
#endif
}

static inline V square_root(V v) {
#if defined(__AVX512F__)
  return (V)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (V)_mm256_sqrt_ps((__m256)v);
#else
  V out;
  for (int l = 0; l < kLanes; ++l) out[l] = __builtin_sqrtf(v[l]);
  return out;
#endif
}

// A sum that keeps what rounding drops: equal entries all round the same way.
struct LaneSum {
  V value{}, dropped{};

  void add(V x) {
    const V next = value + x;
    dropped += x - (next - value);
    value = next;
  }
};

// The ratios u = v / a of a block of rows in lanes, and their costs where they are an array.
struct LaneProblem {
  V u[kLongestLane];
  V a[kLongestLane];
  double total[kLanes];  // of the costs, 1 each where they are a number
  I fine;  // lanes whose entries are finite and whose costs are positive
  double unit = 1;  // the one cost, where they are not an array
  bool priced;  // costs are an array

  template <class S>
  LaneProblem(const RowBlock<S>& block, const LaneMap& map) : priced(block.costs != nullptr) {
    const int n = static_cast<int>(block.length);
    map.gather(block.values, block.stride, block.readable, u);
    fine = ~I{};
    if (!priced) {
      for (int l = 0; l < kLanes; ++l) total[l] = n;
      const float cost = static_cast<float>(block.cost);
      unit = static_cast<double>(cost);
      if (cost != 1.0f)
        for (int j = 0; j < n; ++j) u[j] = u[j] / cost;
      if (!(cost > 0 && cost < INFINITY)) fine = I{};
      return;
    }
    if (block.cost_stride != 0) {
      map.gather(block.costs, block.cost_stride, block.cost_readable, a);
    } else {
      for (int j = 0; j < n; ++j) a[j] = splat(load_partial(block.costs + j, 1, 0.0f)[0]);
    }
    LaneSum sum;
    for (int j = 0; j < n; ++j) {
      u[j] = u[j] / a[j];
      sum.add(a[j]);
      fine &= (a[j] > 0.0f) & (a[j] < static_cast<float>(INFINITY));
    }
    set_total(sum);
  }

  // Gives entries of -inf no cost (the others' one cost is 1, in `unit`s), and a finite value: the least of their row, or 0.
  // False where there are none.
  bool leave_out_masked(int n) {
    const V infinity = splat(static_cast<float>(INFINITY));
    I any{};
    V least = infinity;
    for (int j = 0; j < n; ++j) {
      const I masked = u[j] == -infinity;
      any |= masked;
      least = (u[j] < least) & ~masked ? u[j] : least;
    }
    if (bits(any) == 0) return false;
    least = least < infinity ? least : V{};
    LaneSum sum;
    for (int j = 0; j < n; ++j) {
      const I masked = u[j] == -infinity;
      a[j] = masked ? V{} : priced ? a[j] : splat(1.0f);
      u[j] = masked ? least : u[j];
      sum.add(a[j]);
    }
    priced = true;
    set_total(sum);
    return true;
  }

 private:
  void set_total(const LaneSum& sum) {
    for (int l = 0; l < kLanes; ++l) total[l] = static_cast<double>(sum.value[l]) + static_cast<double>(sum.dropped[l]);
  }
};

}  // namespace spartan::cpu::SPARTAN_ISA
