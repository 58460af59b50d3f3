// The root search over entries that one group of threads holds.
#pragma once

#include "sigmoid.cuh"

namespace spartan::cuda {

// Sums of a, u, u^2 and the poison, then -lowest and highest u.
template <int kGroup, class R>
__device__ inline void extent_of(const R& row, double (&sums)[6]) {
  ExtentSums seen;
  row.walk([&](int64_t i, float u) { seen.add(u, row.cost(i)); }, [&] { seen.flush(); });
  const auto& found = seen.total;
  const double all[6] = {found[0], found[1], found[2], found[3], -static_cast<double>(seen.low), seen.high};
  for (int n = 0; n < 6; ++n) sums[n] = all[n];
  group_reduce<kGroup>(sums, SumsThenMaxima<4>{});
}

// Moves `search` to the root over `length` entries of this extent; `enough` as in Trials.
template <int kGroup, class R>
__device__ inline void search_row(const R& row, int64_t length, const double (&sums)[6], double enough,
                                  ThresholdSearch* search) {
  start_from(static_cast<double>(length), sums[1], sums[2], -sums[4], sums[5], search);
  Trials trials;
  for (bool over = false; !over;) {
    const Logit<float> p = search->logit<float>();
    MomentSums moments;
    row.walk([&](int64_t i, float u) { moments.add(p, u, row.cost(i)); }, [&] { moments.flush(); });
    group_sums<kGroup>(moments.total);
    over = trials.take(moments.moments(), enough, search);  // the same bits in every thread of the group, so the same branch
  }
}

}  // namespace spartan::cuda
