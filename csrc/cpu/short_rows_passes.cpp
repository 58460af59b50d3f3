#include "lanes.h"

namespace spartan::cpu::SPARTAN_ISA {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kTolerance = 5e-7f;  // on the sum of a mask, relative to its budget: as cache_solve.h
constexpr double kEverything = 1 - 1e-12;  // a budget of this part of the costs is all of them, summed in another order
constexpr int kMaxTrials = 40;
constexpr float kSmallestBeta = 1e-20f, kLargestBeta = 1e20f;
// Masks sharper than this many units of logit per standard deviation start from the hard threshold, found to kNear of them.
constexpr float kSharp = 6.0f, kNear = 3.0f;
constexpr int kMaxCounts = 32;

inline V choose(I condition, V yes, V no) { return condition ? yes : no; }
inline V smaller(V a, V b) { return a < b ? a : b; }
inline V larger(V a, V b) { return a > b ? a : b; }
inline uint32_t first_lanes(int count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// log(ratio) with relative accuracy also near 1, where ratio - 1 is given: 2 atanh((m - 1) / (m + 1)) for the mantissa m in
// [1/sqrt 2, sqrt 2], whose series ends below float rounding.
inline V log_of(V ratio, V less_one) {
  const I raw = (I)ratio;
  const I exponent = (raw - 0x3f3504f3) >> 23;  // of ratio * sqrt 2
  const V m = (V)(raw - (exponent << 23));
  const V w = choose(exponent == 0, less_one, m - 1.0f) / (m + 1.0f), square = w * w;
  const V series = w * (2.0f + square * (2.0f / 3 + square * (2.0f / 5 + square * (2.0f / 7))));
  return __builtin_convertvector(exponent, V) * kLn2 + series;
}

// m = sigmoid(sign (beta (u - centre) + shift)) of lanes that each have their own threshold.
struct LaneLogistic {
  V slope, centre, shift;

  LaneLogistic(float beta, V sign, V c, V d) : slope(-kLog2E * beta * sign), centre(c), shift(-kLog2E * sign * d) {}

  V exponential(V u) const { return exp2_clamped(slope * (u - centre) + shift); }
};

struct Spread {
  V low, high, mean, deviation;
  I finite;
};

inline Spread spread_of(const LaneProblem& p, int n) {
  Spread s{p.u[0], p.u[0], V{}, V{}, I{}};
  V first{}, second{}, poison{};
  for (int j = 0; j < n; ++j) {
    const V u = p.u[j], d = u - p.u[0];
    poison += u * 0.0f;
    s.low = smaller(u, s.low);
    s.high = larger(u, s.high);
    first += d;
    second += d * d;
  }
  const float share = 1.0f / static_cast<float>(n);
  const V mean = first * share, variance = larger(second * share - mean * mean, V{});
  s.mean = p.u[0] + mean;
  s.deviation = square_root(variance);
  s.finite = poison == 0.0f;
  return s;
}

// What ThresholdSearch is to one problem, for one in each lane, in float. N is the rows' length where the loops over so few
// entries are unrolled, or 0.
template <int N>
class LaneSearch {
 public:
  LaneSearch(const LaneProblem& problem, const LaneMap& map, int n, RowBudgets budgets, double unit, float beta)
      : p_(problem), n_(N > 0 ? N : n), beta_(beta) {
    const Spread spread = spread_of(problem, length());
    live_ = problem.fine & spread.finite;
    float sign[kLanes], quota[kLanes], other[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const double k = budgets.first[map.row(l) * budgets.stride] / unit, total = problem.total[l];
      const bool above_half = k > total * 0.5;
      const double least = above_half ? total - k : k;
      sign[l] = above_half ? -1.0f : 1.0f;
      other[l] = static_cast<float>(total - least);
      // the negation catches NaN; nothing and everything are no search
      quota[l] = !(k > 0 && k < total * kEverything) ? -1.0f : static_cast<float>(least);
    }
    sign_ = load(sign);
    quota_ = load(quota);
    other_ = load(other);
    total_ = quota_ + other_;
    live_ &= quota_ > 0.0f;
    target_ = log_of(quota_ / other_, quota_ / other_ - 1.0f);
    centre_low_ = spread.low;
    centre_high_ = spread.high;
    const V reach = sign_ * target_ * (1.0f / beta);
    low_ = spread.low - reach;
    high_ = spread.high - reach;
    start(spread);
  }

  // Each trial writes its masks, the last one's stand. Returns the lanes that met their budgets, as bits.
  uint32_t run(V* masks) {
    I ready = ~live_;
    for (int trial = 0; trial < kMaxTrials && bits(~ready) != 0; ++trial) step(masks, &ready);
    return bits(live_ & ready);
  }

  V centre() const { return centre_; }
  V shift() const { return shift_; }

 private:
  int length() const { return N > 0 ? N : n_; }

  // As if the entries were logistic, or, where the mask is sharper than that can serve, by counting.
  void start(const Spread& spread) {
    constexpr float kOverLogistic = 0.303963551f;  // 3 / pi^2
    const V wide = spread.deviation * spread.deviation * kOverLogistic + 1.0f / (beta_ * beta_);
    V t = spread.mean - sign_ * target_ * square_root(wide);
    t = choose((t > low_) & (t < high_), t, 0.5f * (low_ + high_));
    const I sharp = live_ & (spread.deviation * beta_ > kSharp);
    if (bits(sharp) != 0) t = choose(sharp, hard_threshold(spread, sharp), t);
    centre_ = larger(smaller(t, spread.high), spread.low);
    shift_ = beta_ * (centre_ - t);
  }

  // Bisects on the cost above a trial; between two entries that meet the budget exactly, their middle.
  V hard_threshold(const Spread& spread, I open) {
    V low = spread.low, high = spread.high, t = 0.5f * low + 0.5f * high;
    const V kept = choose(sign_ > 0.0f, quota_, other_);
    const float near = kNear / beta_;
    I exact{};
    for (int i = 0; i < kMaxCounts && bits(open) != 0; ++i) {
      V above{};
      for (int j = 0; j < length(); ++j) above += choose(p_.u[j] > t, p_.priced ? p_.a[j] : splat(1.0f), V{});
      exact |= open & (above == kept);
      open &= ~exact;
      low = choose(open & (above > kept), t, low);
      high = choose(open & (above < kept), t, high);
      open &= high - low > near;
      t = choose(exact, t, 0.5f * low + 0.5f * high);
    }
    if (bits(exact) == 0) return t;
    V below = spread.low, over = spread.high;
    for (int j = 0; j < length(); ++j) {
      const V u = p_.u[j];
      const I up = u > t;
      over = choose(up, smaller(u, over), over);
      below = choose(up, below, larger(u, below));
    }
    return choose(exact, 0.5f * below + 0.5f * over, t);
  }

  void step(V* masks, I* ready) {
    const LaneLogistic logistic(beta_, sign_, centre_, shift_);
    const I kept_side = sign_ > 0.0f;
    LaneSum mass;
    V slope{}, curvature{};
    for (int j = 0; j < length(); ++j) {
      const V e = logistic.exponential(p_.u[j]), m = 1.0f / (1.0f + e), complement = e * m;
      const V weighted = p_.priced ? p_.a[j] * m : m, s = weighted * complement;
      mass.add(weighted);
      slope += s;
      curvature += s * (complement - m);
      masks[j] = choose(kept_side, m, complement);
    }
    advance(mass, slope, curvature, ready);
  }

  void advance(const LaneSum& sum, V slope, V curvature, I* ready) {
    const V mass = sum.value + sum.dropped, miss = (sum.value - quota_) + sum.dropped;
    const V rest = larger(total_ - mass, splat(1e-30f));
    const V f = log_of(mass / quota_ * (other_ / rest), total_ * miss / (rest * quota_));
    const V residual = absolute(f), t = centre_ - shift_ / beta_;
    const I done = absolute(miss) <= kTolerance * quota_;
    low_ = choose(sign_ * f > 0.0f, larger(low_, t), low_);
    high_ = choose(sign_ * f < 0.0f, smaller(high_, t), high_);
    // Halley's step, in units of logit
    const V weight = total_ / (mass * rest), first = slope * weight;
    const V second = curvature * weight - first * first * (rest - mass) / total_;
    const V step = 2.0f * f * sign_ * first / (2.0f * first * first - f * second);
    const V move = (step - shift_) / beta_, next = centre_ + move;
    const I accepted = (next >= low_) & (next <= high_) & (residual <= 0.5f * previous_);
    const V middle = low_ + (high_ - low_) * 0.5f;
    const I stuck = ~accepted & ~done & ((middle == low_) | (middle == high_));
    moved(choose(accepted, move, middle - centre_), ~*ready & ~done & ~stuck);
    previous_ = choose(accepted, residual, splat(static_cast<float>(INFINITY)));
    live_ &= *ready | ~stuck;
    *ready |= done | stuck;
  }

  // t = centre + move in lanes `where`, as a centre inside the data and the shift that carries the rest.
  void moved(V move, I where) {
    const V next = larger(smaller(centre_ + move, centre_high_), centre_low_);
    const V gone = next - centre_, lost = (centre_ - (next - gone)) + (move - gone);
    centre_ = choose(where, next, centre_);
    shift_ = choose(where, -beta_ * lost, shift_);
  }

  const LaneProblem& p_;
  int n_;
  float beta_;
  I live_;
  V sign_, quota_, other_, total_, target_;
  V low_, high_, centre_low_, centre_high_;
  V centre_{}, shift_{}, previous_ = splat(static_cast<float>(INFINITY));
};

template <class S>
uint32_t soft(const RowBlock<S>& block, RowBudgets budgets, double beta, S* mask, double* threshold) {
  const uint32_t all = first_lanes(block.count);
  if (!(beta > kSmallestBeta && beta < kLargestBeta)) return all;
  const int n = static_cast<int>(block.length);
  const LaneMap map(block);
  LaneProblem problem(block, map);
  V masks[kLongestLane];
  const auto solve = [&]<int N>() {
    LaneSearch<N> search(problem, map, n, budgets, problem.unit, static_cast<float>(beta));
    const uint32_t solved = search.run(masks);
    float centres[kLanes], shifts[kLanes];
    store(centres, search.centre());
    store(shifts, search.shift());
    for (int l = 0; l < kLanes; ++l) {
      threshold[2 * map.row(l)] = static_cast<double>(centres[l]);
      threshold[2 * map.row(l) + 1] = static_cast<double>(shifts[l]);
    }
    return solved;
  };
  const uint32_t solved = map.rows(n == 4 ? solve.template operator()<4>() : solve.template operator()<0>());
  map.scatter_to(masks, mask);
  return all & ~solved;
}

template <class S>
void soft_backward(const RowBlock<S>& block, const S* grad, double beta, const RowGradient& out, S* grad_values,
                   S* grad_costs) {
  const int n = static_cast<int>(block.length);
  const LaneMap map(block);
  LaneProblem problem(block, map);
  V g[kLongestLane];
  map.gather(grad, block.length, block.length * block.count, g);
  V centre, shift;
  for (int l = 0; l < kLanes; ++l) {
    centre[l] = static_cast<float>(out.threshold[2 * map.row(l)]);
    shift[l] = static_cast<float>(out.threshold[2 * map.row(l) + 1]);
  }
  const float b = static_cast<float>(beta);
  const LaneLogistic logistic(b, splat(1.0f), centre, shift);
  const float unit = static_cast<float>(problem.unit);
  const auto cost = [&](int j) { return problem.priced ? problem.a[j] : splat(unit); };
  V gs{}, as{};
  for (int j = 0; j < n; ++j) {
    const V e = logistic.exponential(problem.u[j]), m = 1.0f / (1.0f + e), s = e * m * m;
    gs += g[j] * s;
    as += cost(j) * s;
  }
  // a budget of nothing or everything has no finite threshold, and no gradient
  const V r = choose((as > 0.0f) & (shift * 0.0f == 0.0f), gs / as, V{});
  // sum (g - a r) s is zero: taken about the centre, sum (g - a r) s u loses nothing to cancellation
  V of_beta{};
  for (int j = 0; j < n; ++j) {
    const V u = problem.u[j], e = logistic.exponential(u), m = 1.0f / (1.0f + e), s = e * m * m;
    const V gradient = s * (g[j] / cost(j) - r);
    of_beta += cost(j) * gradient * (u - centre);
    problem.u[j] = -b * gradient * u - r * m;
    g[j] = b * gradient;
  }
  map.scatter_to(g, grad_values);
  if (grad_costs != nullptr) map.scatter_to(problem.u, grad_costs);
  for (int l = 0; l < kLanes; ++l) {
    out.budget[map.row(l)] = static_cast<double>(r[l]);
    out.beta[map.row(l)] = static_cast<double>(of_beta[l]);
  }
}

// The threshold of a hard top-k in each lane: entries above it are kept, and `ties` of those equal to it.
struct LaneCut {
  V above;
  V ties;
};

// Keys in the order of the numbers, and back.
inline I key_of(V u) {
  const I raw = (I)(u + 0.0f);
  return raw ^ ((raw >> 31) & 0x7fffffff);
}
inline V value_of(I key) { return (V)(key ^ ((key >> 31) & 0x7fffffff)); }

LaneCut cut(const V* u, int n, V keep) {
  V low = u[0], high = u[0];
  for (int j = 1; j < n; ++j) {
    low = smaller(u[j], low);
    high = larger(u[j], high);
  }
  // More than `keep` entries lie above `below`, at most `keep` above `top`.
  I below = key_of(low) - 1, top = key_of(high);
  V count{}, t = high;
  I open = keep < static_cast<float>(n);
  t = choose(open, t, splat(-static_cast<float>(INFINITY)));  // everything
  count = choose(open, count, splat(static_cast<float>(n)));
  for (int i = 0;; ++i) {
    I middle = (below & top) + ((below ^ top) >> 1);
    open &= (middle != below) & (count < keep);
    if (bits(open) == 0) break;
    if (i % 4 != 3) {  // the middle of the numbers closes in sooner than that of the keys, which always does
      const I key = key_of(0.5f * value_of(below) + 0.5f * value_of(top));
      middle = (key > below) & (key < top) ? key : middle;
    }
    const V trial = value_of(middle);
    V found{};
    for (int j = 0; j < n; ++j) found += choose(u[j] > trial, splat(1.0f), V{});
    const I enough = found <= keep;
    t = choose(open & enough, trial, t);
    count = choose(open & enough, found, count);
    top = open & enough ? middle : top;
    below = open & ~enough ? middle : below;
  }
  return {t, keep - count};
}

// How many entries of this cost the budget buys; negative where it is out of range.
float affordable(double budget, double cost, int n) {
  if (!(budget >= 0 && budget <= cost * n)) return -1.0f;
  if (budget >= cost * n * kEverything) return static_cast<float>(n);
  int count = static_cast<int>(budget / cost);  // products of a float and a count are exact, the quotient is not
  if (count * cost > budget) --count;
  if ((count + 1) * cost <= budget) ++count;
  return static_cast<float>(count);
}

// Each entry's place in the order is counted at once: for few of them.
template <int N>
void keep_by_rank(V* u, V keep) {
  V ahead[N] = {};
  for (int i = 0; i < N; ++i) {
    for (int j = i + 1; j < N; ++j) {
      const I later_first = u[j] > u[i];
      ahead[i] += choose(later_first, splat(1.0f), V{});
      ahead[j] += choose(later_first, V{}, splat(1.0f));
    }
  }
  for (int i = 0; i < N; ++i) u[i] = choose(ahead[i] < keep, splat(1.0f), V{});
}

void keep_by_counting(V* u, int n, V keep) {
  const LaneCut found = cut(u, n, keep);
  V left = found.ties;
  for (int j = 0; j < n; ++j) {
    const I tied = (u[j] == found.above) & (left > 0.0f);
    left = choose(tied, left - 1.0f, left);
    u[j] = choose((u[j] > found.above) | tied, splat(1.0f), V{});
  }
}

// 1 in place of what is kept, 0 of the rest.
void keep_best(V* u, int n, V keep) {
  switch (n) {
    case 2:
      return keep_by_rank<2>(u, keep);
    case 4:
      return keep_by_rank<4>(u, keep);
    case 8:
      return keep_by_rank<8>(u, keep);
    default:
      return keep_by_counting(u, n, keep);
  }
}

template <class S>
uint32_t hard(const RowBlock<S>& block, RowBudgets budgets, uint8_t* mask) {
  const int n = static_cast<int>(block.length);
  const LaneMap map(block);
  LaneProblem problem(block, map);
  V poison{}, keep;
  for (int j = 0; j < n; ++j) poison += problem.u[j] * 0.0f;
  I fine = problem.fine & (poison == 0.0f);
  const double cost = static_cast<double>(static_cast<float>(block.cost));
  if (budgets.stride == 0) {
    keep = splat(affordable(budgets.first[0], cost, n));
  } else {
    for (int l = 0; l < kLanes; ++l) keep[l] = affordable(budgets.first[map.row(l) * budgets.stride], cost, n);
  }
  fine &= keep >= 0.0f;
  for (int j = 0; j < n; ++j) problem.u[j] = choose(fine, problem.u[j], V{});
  keep_best(problem.u, n, larger(keep, V{}));
  map.scatter(
      problem.u, [&](int64_t at, V v) { store_truth(mask + at, v > 0.0f); },
      [&](int64_t at, V v, int count) {
        const uint32_t set = bits(v > 0.0f);
        for (int l = 0; l < count; ++l) mask[at + l] = set >> l & 1;
      });
  return first_lanes(block.count) & ~map.rows(bits(fine));
}

template <class S>
void widen(const S* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_partial<float>(to + i, load_partial(from + i, static_cast<int>(count - i), 0.0f), count - i);
}

template <class S>
void narrow(const float* from, int64_t count, S* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_partial<S>(to + i, load_partial(from + i, static_cast<int>(count - i), 0.0f), count - i);
}

template <class S>
constexpr ShortRows<S> kShortRows{kLanes, soft<S>, soft_backward<S>, hard<S>, widen<S>, narrow<S>};

}  // namespace

const ShortRows<float>& short_rows_float() { return kShortRows<float>; }
const ShortRows<bfloat16>& short_rows_bfloat16() { return kShortRows<bfloat16>; }
const ShortRows<float16>& short_rows_float16() { return kShortRows<float16>; }

}  // namespace spartan::cpu::SPARTAN_ISA
