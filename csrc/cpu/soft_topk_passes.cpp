#include "soft_topk_passes.h"

#include "simd.h"

namespace spartan::cpu::SPARTAN_ISA {
namespace {

enum class CostKind { unit, scalar, array };

// float sums run over at most this many entries before they are added to a double
constexpr int64_t kBlock = 2048;

// vectors that go side by side through the long chain of operations of a sigmoid
constexpr int kAbreast = 4;

// Entries of N vectors.
template <class T, int N>
struct Lanes {
  Vec<T> u[N], a[N];
};

template <class T, CostKind C, bool Absolute, int N>
inline Lanes<T, N> entries(const Span<T>& span, Vec<T> (&v)[N], const Vec<T> (&costs)[N]) {
  Lanes<T, N> lanes;
  for (int j = 0; j < N; ++j) {
    if (Absolute) v[j] = absolute(v[j]);
    lanes.u[j] = C == CostKind::unit ? v[j] : C == CostKind::scalar ? v[j] / span.cost : v[j] / costs[j];
    lanes.a[j] = C == CostKind::unit ? splat(T(1)) : C == CostKind::scalar ? splat(span.cost) : costs[j];
  }
  return lanes;
}

template <class T, CostKind C, bool Absolute, int N>
inline Lanes<T, N> entries_at(const Span<T>& span, int64_t i) {
  Vec<T> v[N], costs[N];
  for (int j = 0; j < N; ++j) v[j] = load(span.values + i + j * Simd<T>::width);
  for (int j = 0; j < N; ++j) costs[j] = C == CostKind::array ? load(span.costs + i + j * Simd<T>::width) : Vec<T>{};
  return entries<T, C, Absolute, N>(span, v, costs);
}

// Calls full(i, lanes) for kAbreast whole vectors and for single ones, tail(i, count, lanes) for the rest; `block` after
// every kBlock entries.
template <class T, CostKind C, bool Absolute, class Full, class Tail, class Block>
inline void walk(const Span<T>& span, Full full, Tail tail, Block block) {
  constexpr int W = Simd<T>::width;
  for (int64_t begin = 0; begin < span.length; begin += kBlock) {
    const int64_t end = begin + kBlock < span.length ? begin + kBlock : span.length;
    int64_t i = begin;
    for (; i + kAbreast * W <= end; i += kAbreast * W) full(i, entries_at<T, C, Absolute, kAbreast>(span, i));
    for (; i + W <= end; i += W) full(i, entries_at<T, C, Absolute, 1>(span, i));
    if (i < end) {
      const int count = static_cast<int>(end - i);
      Vec<T> v[1] = {load_partial(span.values + i, count, T(0))};
      const Vec<T> costs[1] = {C == CostKind::array ? load_partial(span.costs + i, count, T(1)) : Vec<T>{}};
      tail(i, count, entries<T, C, Absolute, 1>(span, v, costs));
    }
    block();
  }
}

// Instantiates f<CostKind, Absolute> for the span at hand.
template <class T, class F>
inline auto specialised(const Span<T>& span, F f) {
#define SPARTAN_CASE(kind) \
  return span.absolute ? f.template operator()<kind, true>() : f.template operator()<kind, false>()
  if (span.costs != nullptr) SPARTAN_CASE(CostKind::array);
  if (span.cost != T(1)) SPARTAN_CASE(CostKind::scalar);
  SPARTAN_CASE(CostKind::unit);
#undef SPARTAN_CASE
}

template <class T>
inline Vec<T> live_lanes(int count) {
  Vec<T> live;
  for (int i = 0; i < Simd<T>::width; ++i) live[i] = i < count ? T(1) : T(0);
  return live;
}

template <class T, int N>
struct Sigmoid {
  Vec<T> m[N], complement[N], s[N];  // sigmoid(x), sigmoid(-x), their product
};

constexpr double kLog2E = 1.4426950408889634;

// The logit's parameters, held in registers.
template <class T>
struct Logistic {
  Vec<T> slope, centre, shift;

  // 2^(-x log2 e) = exp(-x)
  explicit Logistic(const Logit<T>& p)
      : slope(splat(static_cast<T>(-kLog2E * p.beta * p.sign))),
        centre(splat(p.centre)),
        shift(splat(static_cast<T>(-kLog2E * p.shift * p.sign))) {}

  // exp(-x) stays in range by its clamp, so both sides come without a branch and without cancellation.
  template <int N>
  Sigmoid<T, N> operator()(const Vec<T> (&u)[N]) const {
    Vec<T> e[N];
    Sigmoid<T, N> g;
    for (int j = 0; j < N; ++j) e[j] = slope * (u[j] - centre) + shift;
    exp2_clamped(e);
    for (int j = 0; j < N; ++j) g.m[j] = T(1) / (T(1) + e[j]);
    for (int j = 0; j < N; ++j) g.complement[j] = e[j] * g.m[j];
    for (int j = 0; j < N; ++j) g.s[j] = g.complement[j] * g.m[j];
    return g;
  }
};

// A sum that keeps what rounding drops: equal entries all round the same way, and a plain float sum of a block of them
// would be off by more than the budget may be.
template <class T>
struct ExactSum {
  Vec<T> value{}, dropped{};

  void add(Vec<T> x) {
    const Vec<T> next = value + x;
    dropped += x - (next - value);
    value = next;
  }
  void add_roughly(Vec<T> x) { value += x; }
  double take() {
    const double total = sum<T>(value) + sum<T>(dropped);
    value = dropped = Vec<T>{};
    return total;
  }
};

template <class T>
[[gnu::noinline, gnu::cold]] void collect(Vec<T> u, Vec<T> a, uint32_t set, Sink<T>* sink) {
  while (set != 0) {
    const int lane = __builtin_ctz(set);
    set &= set - 1;
    if (sink->count == Sink<T>::kCapacity) sink->flush(sink);
    sink->ratio[sink->count] = u[lane];
    sink->cost[sink->count++] = a[lane];
  }
}

// With the window, in the first pass, the mass is a plain sum: the masks' own exact sum then says whether that was enough.
template <class T, bool WithMoments, bool WithWindow>
Moments scan(const Span<T>& span, const Logit<T>& p, const Window<T>& window, Sink<T>* sink) {
  const Logistic<T> logistic(p);
  const Vec<T> low = splat(window.low), high = splat(window.high);
  return specialised(span, [&]<CostKind C, bool Absolute>() {
    Moments total;
    ExactSum<T> mass;
    Vec<T> slope{}, curvature{}, above{}, poison{};
    Mask<T> number{};  // of entries above the window, where all cost the same
    const auto body = [&]<int N>(const Lanes<T, N>& lanes, Vec<T> live, uint32_t lanes_in_use) {
      Vec<T> weight[N];
      for (int j = 0; j < N; ++j) weight[j] = C == CostKind::array ? lanes.a[j] * live : live;
      if (WithMoments) {
        const Sigmoid<T, N> g = logistic(lanes.u);
        for (int j = 0; j < N; ++j) {
          const Vec<T> s = weight[j] * g.s[j];
          WithWindow ? mass.add_roughly(weight[j] * g.m[j]) : mass.add(weight[j] * g.m[j]);
          slope += s;
          curvature += s * (g.complement[j] - g.m[j]);
        }
      }
      for (int j = 0; j < N; ++j) poison += lanes.u[j] * T(0);
      if (WithWindow) {
        uint32_t inside[N], any = 0;
        for (int j = 0; j < N; ++j) {
          const Mask<T> over = lanes.u[j] > high;
          if (C == CostKind::array) above += over ? weight[j] : Vec<T>{};
          else number -= over & (live != T(0));
          inside[j] = bits((lanes.u[j] >= low) & (lanes.u[j] <= high)) & lanes_in_use;
          any |= inside[j];
        }
        if (__builtin_expect(any != 0, 0))
          for (int j = 0; j < N; ++j)
            if (inside[j] != 0) collect<T>(lanes.u[j], lanes.a[j], inside[j], sink);
      }
    };
    walk<T, C, Absolute>(
        span, [&]<int N>(int64_t, const Lanes<T, N>& lanes) { body(lanes, splat(T(1)), ~0u); },
        [&](int64_t, int count, const Lanes<T, 1>& lanes) { body(lanes, live_lanes<T>(count), (1u << count) - 1); },
        [&] {
          const double unit = C == CostKind::scalar ? static_cast<double>(span.cost) : 1.0;
          total.mass += unit * mass.take();
          total.slope += unit * sum<T>(slope);
          total.curvature += unit * sum<T>(curvature);
          total.above += unit * sum<T>(above + __builtin_convertvector(number, Vec<T>));
          total.poison += sum<T>(poison);
          slope = curvature = above = poison = Vec<T>{};
          number = Mask<T>{};
        });
    return total;
  });
}

template <class T>
Moments moments(const Span<T>& span, const Logit<T>& p) {
  return scan<T, true, false>(span, p, {}, nullptr);
}

template <class T>
Moments survey(const Span<T>& span, const Logit<T>& p, const Window<T>& window, Sink<T>* sink) {
  return scan<T, true, true>(span, p, window, sink);
}

template <class T>
Moments count(const Span<T>& span, const Window<T>& window, Sink<T>* sink) {
  return scan<T, false, true>(span, {}, window, sink);
}

template <class T>
double tied(const Span<T>& span, T ratio) {
  return specialised(span, [&]<CostKind C, bool Absolute>() {
    double total = 0;
    Vec<T> cost{};
    const auto body = [&]<int N>(const Lanes<T, N>& lanes, Vec<T> live) {
      for (int j = 0; j < N; ++j) cost += lanes.u[j] == ratio ? lanes.a[j] * live : Vec<T>{};
    };
    walk<T, C, Absolute>(
        span, [&]<int N>(int64_t, const Lanes<T, N>& lanes) { body(lanes, splat(T(1))); },
        [&](int64_t, int count, const Lanes<T, 1>& lanes) { body(lanes, live_lanes<T>(count)); },
        [&] {
          total += sum<T>(cost);
          cost = Vec<T>{};
        });
    return total;
  });
}

template <class T>
Extent extent(const Span<T>& span) {
  return specialised(span, [&]<CostKind C, bool Absolute>() {
    const Vec<T> infinity = splat(static_cast<T>(INFINITY));
    Vec<T> low = infinity, high = -infinity, cheapest = infinity, cost{}, ratio{}, square{}, poison{};
    Extent out;
    const auto body = [&](Vec<T> u, Vec<T> a, Vec<T> live, Mask<T> dead) {
      poison += u * T(0);
      const Vec<T> up = dead ? infinity : u, down = dead ? -infinity : u, price = dead ? infinity : a;
      low = up < low ? up : low;
      high = down > high ? down : high;
      cheapest = price < cheapest ? price : cheapest;
      // a comparison with NaN is false: an unordered cost must not pass as cheap
      poison += a * T(0);
      cost += a * live;
      ratio += u * live;
      square += u * u * live;
    };
    walk<T, C, Absolute>(
        span,
        [&]<int N>(int64_t, const Lanes<T, N>& lanes) {
          for (int j = 0; j < N; ++j) body(lanes.u[j], lanes.a[j], splat(T(1)), Mask<T>{});
        },
        [&](int64_t, int count, const Lanes<T, 1>& lanes) {
          const Vec<T> live = live_lanes<T>(count);
          body(lanes.u[0], lanes.a[0], live, live == T(0));
        },
        [&] {
          out.cost += sum<T>(cost);
          out.ratio += sum<T>(ratio);
          out.square += sum<T>(square);
          out.poison += sum<T>(poison);
          cost = ratio = square = poison = Vec<T>{};
        });
    for (int i = 0; i < Simd<T>::width; ++i) {
      if (low[i] < out.low) out.low = low[i];
      if (high[i] > out.high) out.high = high[i];
      if (cheapest[i] < out.lowest_cost) out.lowest_cost = cheapest[i];
    }
    return out;
  });
}

inline void store_hard(uint8_t* hard, uint32_t set, int count) {
  for (int lane = 0; lane < count; ++lane) hard[lane] = (set >> lane) & 1;
}

// One byte, 0 or 1, for each lane.
template <class T>
inline void store_hard_full(uint8_t* hard, Mask<T> keep) {
  constexpr int W = Simd<T>::width;
  const uint32_t set = bits(keep);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if (W == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(hard), _mm_maskz_set1_epi8(static_cast<__mmask16>(set), 1));
    return;
  }
#endif
  // copy the bits to every byte, keep bit k in byte k, and bring it down to bit 0
  constexpr uint64_t ones = 0x0101010101010101ull;
  const uint64_t own = (set * ones) & 0x8040201008040201ull;
  const uint64_t bytes = ((own + 0x7f * ones) >> 7) & ones;
  std::memcpy(hard, &bytes, W < 8 ? W : 8);
}

// What becomes of the soft mask: it is not looked at, only summed, or written, past the caches or not.
enum class SoftOutput { none, summed, written, streamed };

template <class T, SoftOutput Soft, bool Hard>
double write_masks(const Span<T>& span, const Logit<T>& p, T hard_from, T* soft, uint8_t* hard) {
  const Logistic<T> logistic(p);
  const bool kept_side = p.sign > T(0);
  return specialised(span, [&]<CostKind C, bool Absolute>() {
    constexpr int W = Simd<T>::width;
    double total = 0;
    ExactSum<T> mass;
    const auto compute = [&mass, logistic]<int N>(const Lanes<T, N>& lanes, Vec<T> live) {
      Sigmoid<T, N> g = logistic(lanes.u);
      for (int j = 0; j < N; ++j) mass.add((C == CostKind::array ? lanes.a[j] * live : live) * g.m[j]);
      return g;
    };
    walk<T, C, Absolute>(
        span,
        [&, soft, hard, kept_side, hard_from]<int N>(int64_t i, const Lanes<T, N>& lanes) {
          if (Hard)
            for (int j = 0; j < N; ++j) store_hard_full<T>(hard + i + j * W, lanes.u[j] >= hard_from);
          if (Soft != SoftOutput::none) {
            const Sigmoid<T, N> g = compute(lanes, splat(T(1)));
            for (int j = 0; j < N; ++j) {
              const Vec<T> mask = kept_side ? g.m[j] : g.complement[j];
              if (Soft == SoftOutput::streamed) stream(soft + i + j * W, mask);
              if (Soft == SoftOutput::written) store(soft + i + j * W, mask);
            }
          }
        },
        [&](int64_t i, int count, const Lanes<T, 1>& lanes) {
          if (Soft != SoftOutput::none) {
            const Sigmoid<T, 1> g = compute(lanes, live_lanes<T>(count));
            if (Soft != SoftOutput::summed) store_partial<T>(soft + i, kept_side ? g.m[0] : g.complement[0], count);
          }
          if (Hard) store_hard(hard + i, bits(lanes.u[0] >= hard_from), count < W ? count : W);
        },
        [&] {
          total += (C == CostKind::scalar ? static_cast<double>(span.cost) : 1.0) * mass.take();
        });
    return total;
  });
}

template <class T, bool Hard>
double write_as_wanted(const Span<T>& span, const Logit<T>& p, T hard_from, T* soft, uint8_t* hard, bool past_cache) {
  if (soft == nullptr) return write_masks<T, SoftOutput::summed, Hard>(span, p, hard_from, soft, hard);
  if (!past_cache || !can_stream(soft)) return write_masks<T, SoftOutput::written, Hard>(span, p, hard_from, soft, hard);
  const double mass = write_masks<T, SoftOutput::streamed, Hard>(span, p, hard_from, soft, hard);
  stream_end();
  return mass;
}

template <class T>
void write_hard(const Span<T>& span, T hard_from, uint8_t* hard) {
  write_masks<T, SoftOutput::none, true>(span, {}, hard_from, nullptr, hard);
}

template <class T>
double write(const Span<T>& span, const Logit<T>& p, T hard_from, T* soft, uint8_t* hard, bool past_cache) {
  if (p.beta == T(0)) {  // one number for all, exactly 0 or 1 for a budget of nothing or everything
    const T m = T(1) / (T(1) + std::exp(-p.shift));
    for (int64_t i = 0; soft != nullptr && i < span.length; ++i) soft[i] = m;
    if (hard != nullptr) write_hard(span, hard_from, hard);
    return 0;
  }
  return hard != nullptr ? write_as_wanted<T, true>(span, p, hard_from, soft, hard, past_cache)
                         : write_as_wanted<T, false>(span, p, hard_from, soft, hard, past_cache);
}

template <class T>
void ratio(const Span<T>& span, T* out) {
  specialised(span, [&]<CostKind C, bool Absolute>() {
    walk<T, C, Absolute>(
        span,
        [&]<int N>(int64_t i, const Lanes<T, N>& lanes) {
          for (int j = 0; j < N; ++j) store(out + i + j * Simd<T>::width, lanes.u[j]);
        },
        [&](int64_t i, int count, const Lanes<T, 1>& lanes) { store_partial<T>(out + i, lanes.u[0], count); }, [] {});
    return 0;
  });
}

template <class T>
GradientSums gradient_sums(const Span<T>& span, const T* grad, const Logit<T>& p) {
  const Logistic<T> logistic(p);
  return specialised(span, [&]<CostKind C, bool Absolute>() {
    GradientSums total;
    Vec<T> gs{}, as{}, gsu{}, asu{};
    const T origin = p.origin();
    const auto body = [&]<int N>(const Lanes<T, N>& lanes, const Vec<T> (&g)[N], Vec<T> live) {
      const Sigmoid<T, N> sigmoid = logistic(lanes.u);
      for (int j = 0; j < N; ++j) {
        const Vec<T> s = sigmoid.s[j] * live;
        const Vec<T> g_s = g[j] * s, a_s = lanes.a[j] * s;
        gs += g_s;
        as += a_s;
        const Vec<T> u = lanes.u[j] - origin;
        gsu += g_s * u;
        asu += a_s * u;
      }
    };
    walk<T, C, Absolute>(
        span,
        [&]<int N>(int64_t i, const Lanes<T, N>& lanes) {
          Vec<T> g[N];
          for (int j = 0; j < N; ++j) g[j] = load(grad + i + j * Simd<T>::width);
          body(lanes, g, splat(T(1)));
        },
        [&](int64_t i, int count, const Lanes<T, 1>& lanes) {
          const Vec<T> g[1] = {load_partial(grad + i, count, T(0))};
          body(lanes, g, live_lanes<T>(count));
        },
        [&] {
          total.gs += sum<T>(gs);
          total.as += sum<T>(as);
          total.gsu += sum<T>(gsu);
          total.asu += sum<T>(asu);
          gs = as = gsu = asu = Vec<T>{};
        });
    return total;
  });
}

template <class T, bool Stream>
void write_gradients(const Span<T>& span, const T* grad, const Logit<T>& p, T r, T* grad_values, T* grad_costs) {
  const Logistic<T> logistic(p);
  specialised(span, [&]<CostKind C, bool Absolute>() {
    constexpr int W = Simd<T>::width;
    const auto value_gradient = [&](Vec<T> s, Vec<T> a, Vec<T> g) {
      return p.beta * s * ((C == CostKind::unit ? g : g / a) - r);
    };
    const auto cost_gradient = [&](Vec<T> out, Vec<T> u, Vec<T> m) { return -out * u - r * m; };
    walk<T, C, Absolute>(
        span,
        [&]<int N>(int64_t i, const Lanes<T, N>& lanes) {
          const Sigmoid<T, N> sigmoid = logistic(lanes.u);
          for (int j = 0; j < N; ++j) {
            const int64_t at = i + j * W;
            const Vec<T> out = value_gradient(sigmoid.s[j], lanes.a[j], load(grad + at));
            Stream ? stream(grad_values + at, out) : store(grad_values + at, out);
            if (grad_costs != nullptr) store(grad_costs + at, cost_gradient(out, lanes.u[j], sigmoid.m[j]));
          }
        },
        [&](int64_t i, int count, const Lanes<T, 1>& lanes) {
          const Sigmoid<T, 1> sigmoid = logistic(lanes.u);
          const Vec<T> out = value_gradient(sigmoid.s[0], lanes.a[0], load_partial(grad + i, count, T(0)));
          store_partial<T>(grad_values + i, out, count);
          if (grad_costs != nullptr)
            store_partial<T>(grad_costs + i, cost_gradient(out, lanes.u[0], sigmoid.m[0]), count);
        },
        [] {});
    return 0;
  });
}

template <class T>
void gradient(const Span<T>& span, const T* grad, const Logit<T>& p, T r, T* grad_values, T* grad_costs, bool past_cache) {
  if (!past_cache || !can_stream(grad_values)) {
    write_gradients<T, false>(span, grad, p, r, grad_values, grad_costs);
    return;
  }
  write_gradients<T, true>(span, grad, p, r, grad_values, grad_costs);
  stream_end();
}

template <class T>
constexpr SoftTopkPasses<T> kPasses{moments<T>,    survey<T>, count<T>,         tied<T>,    extent<T>, write<T>,
                                    write_hard<T>, ratio<T>,  gradient_sums<T>, gradient<T>};

}  // namespace

const SoftTopkPasses<float>& soft_topk_float() { return kPasses<float>; }
const SoftTopkPasses<double>& soft_topk_double() { return kPasses<double>; }

}  // namespace spartan::cpu::SPARTAN_ISA
