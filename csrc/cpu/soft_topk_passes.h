// The loops over memory of soft and hard top-k, one table of them per instruction set and element type.
#pragma once

#include <cmath>
#include <cstdint>

#include "../host_device.h"

namespace spartan::cpu {

// A run of entries: v, and their costs as an array or one number. The selection is by u = |v| / a or v / a.
template <class T>
struct Span {
  const T* values;
  const T* costs;  // null: every entry costs `cost`
  T cost;
  int64_t length;
  bool absolute;
};

// x = sign * (beta * (u - centre) + shift); m = sigmoid(x). sign = -1 sums the dropped side, for budgets above half.
template <class T>
struct Logit {
  T beta, centre, shift, sign;

  // Where to measure u from in a sum that the choice leaves alone: from the threshold nothing is lost to cancellation,
  // unless the mask is so flat that the threshold lies further from the entries than they from zero.
  SPARTAN_HD T origin() const {
    const T x = beta * centre;
    return x > T(20) || x < T(-20) ? centre : T(0);
  }
};

// Where the hard threshold is expected: entries above `high` are counted, those within [low, high] collected.
template <class T>
struct Window {
  T low, high;
};

// Where one call of a pass puts the entries it finds in its window; when full, `flush` moves them on and resets `count`.
template <class T>
struct Sink {
  static constexpr int64_t kCapacity = 256;
  T ratio[kCapacity], cost[kCapacity];
  int64_t count = 0;
  void (*flush)(Sink<T>*);
  void* context;
};

struct Moments {
  double mass = 0;       // sum a m
  double slope = 0;      // sum a m (1 - m)
  double curvature = 0;  // sum a m (1 - m)(1 - 2 m)
  double above = 0;      // sum a over u > window.high
  double poison = 0;     // 0 if every value was finite, else NaN

  Moments& operator+=(const Moments& o) {
    mass += o.mass, slope += o.slope, curvature += o.curvature, above += o.above, poison += o.poison;
    return *this;
  }
};

struct Extent {
  double low = INFINITY, high = -INFINITY;    // of u
  double cost = 0, ratio = 0, square = 0;     // sums of a, u, u^2
  double lowest_cost = INFINITY, poison = 0;  // poison: 0 if everything was finite, else NaN

  Extent& operator+=(const Extent& o) {
    if (o.low < low) low = o.low;
    if (o.high > high) high = o.high;
    if (o.lowest_cost < lowest_cost) lowest_cost = o.lowest_cost;
    cost += o.cost, ratio += o.ratio, square += o.square, poison += o.poison;
    return *this;
  }
};

struct GradientSums {
  double gs = 0, as = 0, gsu = 0, asu = 0;  // sums of g s, a s, and both times u - Logit::origin()

  GradientSums& operator+=(const GradientSums& o) {
    gs += o.gs, as += o.as, gsu += o.gsu, asu += o.asu;
    return *this;
  }
};

template <class T>
struct SoftTopkPasses {
  Moments (*moments)(const Span<T>&, const Logit<T>&);
  Moments (*survey)(const Span<T>&, const Logit<T>&, const Window<T>&, Sink<T>*);  // moments, above and the window
  Moments (*count)(const Span<T>&, const Window<T>&, Sink<T>*);                    // above and the window
  double (*tied)(const Span<T>&, T ratio);                                         // sum a over u == ratio
  Extent (*extent)(const Span<T>&);
  // Masks where not null, one of them at least; hard is u >= hard_from. Returns the sum of a sigmoid(x).
  // `past_cache` says that the output is larger than the caches.
  double (*write)(const Span<T>&, const Logit<T>&, T hard_from, T* soft, uint8_t* hard, bool past_cache);
  void (*write_hard)(const Span<T>&, T hard_from, uint8_t* hard);
  void (*ratio)(const Span<T>&, T* ratio);
  GradientSums (*gradient_sums)(const Span<T>&, const T* grad, const Logit<T>&);
  // grad_values = beta s (g / a - r); grad_costs, where not null, = -(g - a r) s beta u / a - r m
  void (*gradient)(const Span<T>&, const T* grad, const Logit<T>&, T r, T* grad_values, T* grad_costs, bool past_cache);
};

// The table for the best instruction set of this machine.
template <class T>
const SoftTopkPasses<T>& soft_topk_passes();

}  // namespace spartan::cpu
