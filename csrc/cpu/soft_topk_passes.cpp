#include "soft_topk_passes.h"

#include "simd.h"

namespace spartan::cpu::SPARTAN_ISA {
namespace {

enum class CostKind { unit, scalar, array };

// float sums run over at most this many entries before they are added to a double
constexpr int64_t kBlock = 2048;

template <class T>
struct Lane {
  Vec<T> u, a;
};

template <class T, CostKind C, bool Absolute>
inline Lane<T> entry(const Span<T>& span, Vec<T> v, Vec<T> costs) {
  if (Absolute) v = absolute(v);
  if (C == CostKind::unit) return {v, splat(T(1))};
  if (C == CostKind::scalar) return {v / span.cost, splat(span.cost)};
  return {v / costs, costs};
}

// Calls full(i, lane) for whole vectors and tail(i, count, lane) for the rest; `block` after every kBlock entries.
template <class T, CostKind C, bool Absolute, class Full, class Tail, class Block>
inline void walk(const Span<T>& span, Full full, Tail tail, Block block) {
  constexpr int W = Simd<T>::width;
  for (int64_t begin = 0; begin < span.length; begin += kBlock) {
    const int64_t end = begin + kBlock < span.length ? begin + kBlock : span.length;
    int64_t i = begin;
    for (; i + W <= end; i += W) {
      const Vec<T> costs = C == CostKind::array ? load(span.costs + i) : Vec<T>{};
      full(i, entry<T, C, Absolute>(span, load(span.values + i), costs));
    }
    if (i < end) {
      const int count = static_cast<int>(end - i);
      const Vec<T> costs = C == CostKind::array ? load_partial(span.costs + i, count, T(1)) : Vec<T>{};
      tail(i, count, entry<T, C, Absolute>(span, load_partial(span.values + i, count, T(0)), costs));
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

template <class T>
struct Sigmoid {
  Vec<T> m, complement, s;  // sigmoid(x), sigmoid(-x), their product
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
  Sigmoid<T> operator()(Vec<T> u) const {
    const Vec<T> e = exp2_clamped(slope * (u - centre) + shift);
    const Vec<T> m = T(1) / (T(1) + e);
    const Vec<T> complement = e * m;
    return {m, complement, complement * m};
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
inline void collect(Vec<T> u, Vec<T> a, uint32_t set, Sink<T>* sink) {
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
    const auto body = [&](const Lane<T>& lane, Vec<T> live, uint32_t lanes) {
      const Vec<T> weight = C == CostKind::array ? lane.a * live : live;
      poison += lane.u * T(0);
      if (WithMoments) {
        const Sigmoid<T> g = logistic(lane.u);
        const Vec<T> s = weight * g.s;
        WithWindow ? mass.add_roughly(weight * g.m) : mass.add(weight * g.m);
        slope += s;
        curvature += s * (g.complement - g.m);
      }
      if (WithWindow) {
        const Mask<T> over = lane.u > high;
        above += over ? weight : Vec<T>{};
        const uint32_t inside = bits((lane.u >= low) & ~over) & lanes;
        if (__builtin_expect(inside != 0, 0)) collect<T>(lane.u, lane.a, inside, sink);
      }
    };
    walk<T, C, Absolute>(
        span, [&](int64_t, const Lane<T>& lane) { body(lane, splat(T(1)), ~0u); },
        [&](int64_t, int count, const Lane<T>& lane) { body(lane, live_lanes<T>(count), (1u << count) - 1); },
        [&] {
          const double unit = C == CostKind::scalar ? static_cast<double>(span.cost) : 1.0;
          total.mass += unit * mass.take();
          total.slope += unit * sum<T>(slope);
          total.curvature += unit * sum<T>(curvature);
          total.above += unit * sum<T>(above);
          total.poison += sum<T>(poison);
          slope = curvature = above = poison = Vec<T>{};
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
    const auto body = [&](const Lane<T>& lane, Vec<T> live) { cost += lane.u == ratio ? lane.a * live : Vec<T>{}; };
    walk<T, C, Absolute>(
        span, [&](int64_t, const Lane<T>& lane) { body(lane, splat(T(1))); },
        [&](int64_t, int count, const Lane<T>& lane) { body(lane, live_lanes<T>(count)); },
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
        span, [&](int64_t, const Lane<T>& lane) { body(lane.u, lane.a, splat(T(1)), Mask<T>{}); },
        [&](int64_t, int count, const Lane<T>& lane) {
          const Vec<T> live = live_lanes<T>(count);
          body(lane.u, lane.a, live, live == T(0));
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

template <class T, bool Soft, bool Hard, bool Stream>
double write_masks(const Span<T>& span, const Logit<T>& p, T hard_from, T* soft, uint8_t* hard) {
  const Logistic<T> logistic(p);
  const bool kept_side = p.sign > T(0);
  return specialised(span, [&]<CostKind C, bool Absolute>() {
    constexpr int W = Simd<T>::width;
    double total = 0;
    ExactSum<T> mass;
    const auto compute = [&](const Lane<T>& lane, Vec<T> live) {
      const Sigmoid<T> g = logistic(lane.u);
      mass.add((C == CostKind::array ? lane.a * live : live) * g.m);
      return kept_side ? g.m : g.complement;
    };
    walk<T, C, Absolute>(
        span,
        [&](int64_t i, const Lane<T>& lane) {
          if (Soft) Stream ? stream(soft + i, compute(lane, splat(T(1)))) : store(soft + i, compute(lane, splat(T(1))));
          if (Hard) store_hard_full<T>(hard + i, lane.u >= hard_from);
        },
        [&](int64_t i, int count, const Lane<T>& lane) {
          if (Soft) store_partial<T>(soft + i, compute(lane, live_lanes<T>(count)), count);
          if (Hard) store_hard(hard + i, bits(lane.u >= hard_from), count < W ? count : W);
        },
        [&] {
          total += (C == CostKind::scalar ? static_cast<double>(span.cost) : 1.0) * mass.take();
        });
    return total;
  });
}

template <class T>
double write(const Span<T>& span, const Logit<T>& p, T hard_from, T* soft, uint8_t* hard, bool past_cache) {
  if (p.beta == T(0)) {  // one number for all, exactly 0 or 1 for a budget of nothing or everything
    const T m = T(1) / (T(1) + std::exp(-p.shift));
    for (int64_t i = 0; i < span.length; ++i) soft[i] = m;
    if (hard != nullptr) write_masks<T, false, true, false>(span, p, hard_from, nullptr, hard);
    return 0;
  }
  const bool around = past_cache && can_stream(soft);
  double mass;
  if (hard != nullptr) {
    mass = around ? write_masks<T, true, true, true>(span, p, hard_from, soft, hard)
                  : write_masks<T, true, true, false>(span, p, hard_from, soft, hard);
  } else {
    mass = around ? write_masks<T, true, false, true>(span, p, hard_from, soft, hard)
                  : write_masks<T, true, false, false>(span, p, hard_from, soft, hard);
  }
  if (around) stream_end();
  return mass;
}

template <class T>
void write_hard(const Span<T>& span, T hard_from, uint8_t* hard) {
  write_masks<T, false, true, false>(span, {}, hard_from, nullptr, hard);
}

template <class T>
void ratio(const Span<T>& span, T* out) {
  specialised(span, [&]<CostKind C, bool Absolute>() {
    walk<T, C, Absolute>(
        span, [&](int64_t i, const Lane<T>& lane) { store(out + i, lane.u); },
        [&](int64_t i, int count, const Lane<T>& lane) { store_partial<T>(out + i, lane.u, count); }, [] {});
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
    const auto body = [&](const Lane<T>& lane, Vec<T> g, Vec<T> live) {
      const Vec<T> s = logistic(lane.u).s * live;
      const Vec<T> g_s = g * s, a_s = lane.a * s;
      gs += g_s;
      as += a_s;
      const Vec<T> u = lane.u - origin;
      gsu += g_s * u;
      asu += a_s * u;
    };
    walk<T, C, Absolute>(
        span, [&](int64_t i, const Lane<T>& lane) { body(lane, load(grad + i), splat(T(1))); },
        [&](int64_t i, int count, const Lane<T>& lane) {
          body(lane, load_partial(grad + i, count, T(0)), live_lanes<T>(count));
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
    const auto body = [&](const Lane<T>& lane, Vec<T> g, Vec<T>* grad_cost) {
      const Sigmoid<T> sig = logistic(lane.u);
      const Vec<T> out = p.beta * sig.s * ((C == CostKind::unit ? g : g / lane.a) - r);
      if (grad_costs != nullptr) *grad_cost = -out * lane.u - r * sig.m;
      return out;
    };
    walk<T, C, Absolute>(
        span,
        [&](int64_t i, const Lane<T>& lane) {
          Vec<T> grad_cost{};
          const Vec<T> out = body(lane, load(grad + i), &grad_cost);
          Stream ? stream(grad_values + i, out) : store(grad_values + i, out);
          if (grad_costs != nullptr) store(grad_costs + i, grad_cost);
        },
        [&](int64_t i, int count, const Lane<T>& lane) {
          Vec<T> grad_cost{};
          store_partial<T>(grad_values + i, body(lane, load_partial(grad + i, count, T(0)), &grad_cost), count);
          if (grad_costs != nullptr) store_partial<T>(grad_costs + i, grad_cost, count);
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
