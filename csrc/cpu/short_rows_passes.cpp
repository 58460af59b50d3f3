#include "lane_odds.h"

namespace spartan::cpu::SPARTAN_ISA {
namespace {

constexpr int kMaxTrials = 40;
constexpr float kSmallestBeta = 1e-20f, kLargestBeta = 1e20f;
// Masks sharper than this many units of logit per standard deviation start from the hard threshold, found to kNear of them.
constexpr float kSharp = 6.0f, kNear = 3.0f;
constexpr int kMaxCounts = 32;

inline uint32_t first_lanes(int count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// m = sigmoid(sign (beta (u - centre) + shift)) of lanes that each have their own threshold.
struct LaneLogistic {
  V slope, centre, shift;

  LaneLogistic(float beta, V sign, V c, V d) : slope(-kLog2E * beta * sign), centre(c), shift(-kLog2E * sign * d) {}

  V exponential(V u) const { return exp2_clamped(slope * (u - centre) + shift); }
};

// What ThresholdSearch is to one problem, for one in each lane, in float. N is the rows' length where the loops over so few
// entries are unrolled, or 0.
template <int N>
class LaneSearch {
 public:
  LaneSearch(const LaneProblem& problem, const LaneBudget& budget, int n, float beta)
      : p_(problem), n_(N > 0 ? N : n), beta_(beta), sign_(budget.sign), quota_(budget.quota), other_(budget.other),
        total_(budget.total) {
    const Spread spread = spread_of(problem, length());
    live_ = problem.fine & spread.finite & (quota_ > 0.0f);
    centre_low_ = spread.low;
    centre_high_ = spread.high;
    const V reach = sign_ * budget.target * (1.0f / beta);
    low_ = spread.low - reach;
    high_ = spread.high - reach;
    start(spread, budget.logistic_start(spread, beta));
  }

  // Each trial writes its masks, the last one's stand. Returns the lanes that met their budgets; `solved` ones need not.
  I run(V* masks, I solved) {
    live_ &= ~solved;
    I ready = ~live_;
    for (int trial = 0; trial < kMaxTrials && bits(~ready) != 0; ++trial) step(masks, &ready);
    return live_ & ready;
  }

  V centre() const { return centre_; }
  V shift() const { return shift_; }

 private:
  int length() const { return N > 0 ? N : n_; }

  // As if the entries were logistic, or, where the mask is sharper than that can serve, by counting.
  void start(const Spread& spread, V t) {
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
  V sign_, quota_, other_, total_;
  V low_, high_, centre_low_, centre_high_;
  V centre_{}, shift_{}, previous_ = splat(static_cast<float>(INFINITY));
};

constexpr int kTogether = 2;  // blocks of lanes, whose trials wait on themselves and not on each other

struct SoftBlock {
  LaneMap map;
  LaneProblem problem;
  LaneBudget budget;
  V masks[kLongestLane];
  V centre{}, shift{};
  I solved{};

  template <class S>
  SoftBlock(const RowBlock<S>& block, RowBudgets budgets) : map(block), problem(block, map), budget(problem, map, budgets) {}

  template <int N>
  void take(const LaneOdds<N>& odds) {
    solved = odds.finish(masks);
    centre = odds.centre();
    shift = odds.shift();
  }

  // Lanes not solved yet.
  template <int N>
  void search(int n, float beta) {
    if (bits(~solved) == 0) return;
    V searched[kLongestLane];
    LaneSearch<N> search(problem, budget, n, beta);
    const I found = search.run(searched, solved);
    for (int j = 0; j < n; ++j) masks[j] = choose(solved, masks[j], searched[j]);
    centre = choose(solved, centre, search.centre());
    shift = choose(solved, shift, search.shift());
    solved |= found;
  }

  // Lanes that were not solved because entries are masked.
  template <int N>
  void search_unmasked(RowBudgets budgets, int n, float beta) {
    if (!problem.leave_out_masked(n)) return;
    budget = LaneBudget(problem, map, budgets);
    search<N>(n, beta);
    for (int j = 0; j < n; ++j) masks[j] = choose(problem.a[j] > 0.0f, masks[j], V{});
  }
};

// Equal costs first go without exponentials; the lanes that this leaves are searched for.
template <int N>
void solve(SoftBlock* one, SoftBlock* other, int n, float beta) {
  if (!one->problem.priced) {
    LaneOdds<N> a(one->problem, one->budget, n, beta), b(other->problem, other->budget, n, beta);
    a.prepare(one->masks);
    b.prepare(other->masks);
    for (int i = 0; i < kMostEvaluations && (a.searching() || b.searching()); ++i) {
      a.trial(one->masks);
      b.trial(other->masks);
    }
    one->take(a);
    other->take(b);
  }
  one->search<N>(n, beta);
  other->search<N>(n, beta);
}

template <class S>
uint32_t soft(const RowBlock<S>& block, RowBudgets budgets, double beta, S* mask, double* threshold) {
  const uint32_t all = first_lanes(block.count);
  if (!(beta > kSmallestBeta && beta < kLargestBeta)) return all;
  const int n = static_cast<int>(block.length), first_count = block.count < kLanes ? block.count : kLanes;
  RowBlock<S> first = block, second = block;
  first.count = first_count;
  const bool both = block.count > kLanes;
  if (both) second = block.from(kLanes);
  // one block alone is solved twice: it ends a tensor
  const RowBudgets later{budgets.first + kLanes * budgets.stride, budgets.stride};
  SoftBlock one(first, budgets), other(second, both ? later : budgets);
  const auto solved = [&]<int N>() {
    solve<N>(&one, &other, n, static_cast<float>(beta));
    if (bits(~(one.solved & other.solved)) == 0) return;
    one.search_unmasked<N>(budgets, n, static_cast<float>(beta));
    if (both) other.search_unmasked<N>(later, n, static_cast<float>(beta));
  };
  if (n == 2) solved.template operator()<2>();
  else if (n == 4) solved.template operator()<4>();
  else if (n == 8) solved.template operator()<8>();
  else solved.template operator()<0>();
  const auto put = [&](SoftBlock& from, int64_t row) {
    from.map.scatter_pairs(from.centre, from.shift, threshold + 2 * row);
    from.map.scatter_to(from.masks, mask + row * n);
    return from.map.rows(bits(from.solved)) << row;
  };
  uint32_t found = put(one, 0);
  if (both) found |= put(other, kLanes);
  return all & ~found;
}

// Gradients of the values in place of g, of the costs in place of u; returns those of budget and beta. Masked: entries
// without cost have none.
struct LaneScalars {
  V of_budget, of_beta;
};
template <bool Masked>
LaneScalars gradients(LaneProblem* problem, V* g, int n, float beta, V centre, V shift) {
  const LaneLogistic logistic(beta, splat(1.0f), centre, shift);
  const float unit = static_cast<float>(problem->unit);
  const auto only_kept = [&](int j, V x) { return Masked ? choose(problem->a[j] > 0.0f, x, V{}) : x; };
  const auto cost = [&](int j) {
    if (Masked) return choose(problem->a[j] > 0.0f, problem->a[j] * unit, splat(1.0f));
    return problem->priced ? problem->a[j] : splat(unit);
  };
  V gs{}, as{};
  for (int j = 0; j < n; ++j) {
    const V e = logistic.exponential(problem->u[j]), m = 1.0f / (1.0f + e), s = only_kept(j, e * m * m);
    gs += g[j] * s;
    as += cost(j) * s;
  }
  // a budget of nothing or everything has no finite threshold, and no gradient
  const V r = choose((as > 0.0f) & (shift * 0.0f == 0.0f), gs / as, V{});
  // sum (g - a r) s is zero: taken about the centre, sum (g - a r) s u loses nothing to cancellation
  V of_beta{};
  for (int j = 0; j < n; ++j) {
    const V u = problem->u[j], e = logistic.exponential(u), m = 1.0f / (1.0f + e), s = only_kept(j, e * m * m);
    const V gradient = s * (g[j] / cost(j) - r);
    of_beta += cost(j) * gradient * (u - centre);
    problem->u[j] = -beta * gradient * u - r * only_kept(j, m);
    g[j] = beta * gradient;
  }
  return {r, of_beta};
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
  LaneScalars found = gradients<false>(&problem, g, n, static_cast<float>(beta), centre, shift);
  if (bits(found.of_beta * 0.0f == 0.0f) != first_lanes(kLanes)) {  // as an entry of -inf makes it
    problem = LaneProblem(block, map);
    if (problem.leave_out_masked(n)) {
      map.gather(grad, block.length, block.length * block.count, g);
      found = gradients<true>(&problem, g, n, static_cast<float>(beta), centre, shift);
    }
  }
  map.scatter_to(g, grad_values);
  if (grad_costs != nullptr) map.scatter_to(problem.u, grad_costs);
  for (int l = 0; l < kLanes; ++l) {
    out.budget[map.row(l)] = static_cast<double>(found.of_budget[l]);
    out.beta[map.row(l)] = static_cast<double>(found.of_beta[l]);
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

// Of `live` entries of each lane, those that are not -inf.
LaneCut cut(const V* u, int n, V keep, V live) {
  const V infinity = splat(static_cast<float>(INFINITY));
  V low = u[0], high = u[0];
  for (int j = 1; j < n; ++j) {
    low = smaller(u[j], low);
    high = larger(u[j], high);
  }
  if (bits(low == -infinity) != 0) {
    low = infinity;
    for (int j = 0; j < n; ++j) low = choose(u[j] > -infinity, smaller(u[j], low), low);
  }
  // More than `keep` entries lie above `below`, at most `keep` above `top`.
  I below = key_of(low) - 1, top = key_of(high);
  V count{}, t = high;
  I open = keep < live;
  t = choose(open, t, -infinity);  // everything
  count = choose(open, count, live);
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

void keep_by_counting(V* u, int n, V keep, V live) {
  const LaneCut found = cut(u, n, keep, live);
  V left = found.ties;
  for (int j = 0; j < n; ++j) {
    const I tied = (u[j] == found.above) & (left > 0.0f);
    left = choose(tied, left - 1.0f, left);
    u[j] = choose((u[j] > found.above) | tied, splat(1.0f), V{});
  }
}

// 1 in place of what is kept, 0 of the rest; at most `live` of them, which are not -inf.
void keep_best(V* u, int n, V keep, V live) {
  switch (n) {
    case 2:
      return keep_by_rank<2>(u, keep);
    case 4:
      return keep_by_rank<4>(u, keep);
    case 8:
      return keep_by_rank<8>(u, keep);
    default:
      return keep_by_counting(u, n, keep, live);
  }
}

template <class S>
uint32_t hard(const RowBlock<S>& block, RowBudgets budgets, uint8_t* mask) {
  const int n = static_cast<int>(block.length);
  const LaneMap map(block);
  LaneProblem problem(block, map);
  V poison{}, keep;
  for (int j = 0; j < n; ++j) poison += problem.u[j] * 0.0f;
  const double cost = static_cast<double>(static_cast<float>(block.cost));
  if (budgets.stride == 0) {
    keep = splat(affordable(budgets.first[0], cost, n));
  } else {
    for (int l = 0; l < kLanes; ++l) keep[l] = affordable(budgets.first[map.row(l) * budgets.stride], cost, n);
  }
  V live = splat(static_cast<float>(n));
  I fine = poison == 0.0f;
  if (bits(fine) != first_lanes(kLanes)) {
    const V infinity = splat(static_cast<float>(INFINITY));
    fine = ~I{};
    live = V{};
    for (int j = 0; j < n; ++j) {
      fine &= problem.u[j] < infinity;  // false for NaN
      live += choose(problem.u[j] > -infinity, splat(1.0f), V{});
    }
    fine &= (keep < live) | (live == static_cast<float>(n));  // the budget may exceed what `live` cost by a part of one
  }
  fine &= problem.fine & (keep >= 0.0f);
  for (int j = 0; j < n; ++j) problem.u[j] = choose(fine, problem.u[j], V{});
  keep_best(problem.u, n, larger(keep, V{}), live);
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
constexpr ShortRows<S> kShortRows{kLanes, kLanes * kTogether, soft<S>, soft_backward<S>, hard<S>, widen<S>, narrow<S>};

}  // namespace

const ShortRows<float>& short_rows_float() { return kShortRows<float>; }
const ShortRows<bfloat16>& short_rows_bfloat16() { return kShortRows<bfloat16>; }
const ShortRows<float16>& short_rows_float16() { return kShortRows<float16>; }

}  // namespace spartan::cpu::SPARTAN_ISA
