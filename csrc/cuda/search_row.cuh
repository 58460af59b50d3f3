// The root search over entries that one group of threads holds.
#pragma once

#include "sigmoid.cuh"

namespace spartan::cuda {

// Of the entries that are not masked: sums of a, u, u^2 and the poison, and their number, then -lowest and highest u.
using ExtentOfRow = double[7];

template <int kGroup, class R>
__device__ inline void extent_of(const R& row, ExtentOfRow& sums) {
  ExtentSums seen;
  row.walk_unmasked([&](int64_t i, float u) { seen.add(u, row.cost(i)); }, [&] { seen.flush(); });
  for (int n = 0; n < 5; ++n) sums[n] = seen.total[n];
  sums[5] = -static_cast<double>(seen.low), sums[6] = seen.high;
  group_reduce<kGroup>(sums, SumsThenMaxima<5>{});
}

// Moves `search` to the root over entries of this extent; `enough` as in Trials.
template <int kGroup, class R>
__device__ inline void search_row(const R& row, const ExtentOfRow& sums, double enough, ThresholdSearch* search) {
  start_from(sums[4], sums[1], sums[2], -sums[5], sums[6], search);
  Trials trials;
  for (bool over = false; !over;) {
    const Logit<float> p = search->logit<float>();
    const Exponent x(p, p.sign);
    MomentSums moments;
    row.walk_unmasked([&](int64_t i, float u) { moments.add(x, u, row.cost(i)); }, [&] { moments.flush(); });
    group_sums<kGroup>(moments.total);
    over = trials.take(moments.moments(), enough, search);  // the same bits in every thread of the group, so the same branch
  }
}

}  // namespace spartan::cuda
