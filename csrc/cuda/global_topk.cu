// Soft and hard top-k of a list of tensors under one budget, in a fixed number of launches that the host never waits for:
//
//   send     the table of the tensors, 40 of them in a launch; the last go along with the start where nothing has a cost
//   costs    where there are any: their sum and range
//   start    a trial threshold and a range of keys for the hard one, from the last solves or from a sample
//   search   one read: moments at the trial, and where in the range the budget runs out; the same again while either is
//            still open, and who is kept of too many ties
//   write    one read: both masks, and the sum of the soft one; the last few entries at the hard threshold are sorted
//   again    the soft mask once more, only if that sum missed the budget
//
// What follows from the sums of a pass is done by the last thread block that arrives with its own.
//
// A captured graph may be replayed with other values, budgets and sharpness, which are read on the device. It holds the
// addresses of the tensors: these must stay.
#include <cooperative_groups.h>

#include "global_start.cuh"

namespace spartan::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 1) costs_kernel(Plan plan, Workspace w) {
  double sum = 0.0;
  float cheapest = INFINITY, dearest = -INFINITY, poison = 0.0f;
  const auto add = [&](float a, double times) {
    sum += static_cast<double>(a) * times;
    poison += a > 0.0f ? a * 0.0f : NAN;
    cheapest = a < cheapest ? a : cheapest;
    dearest = a > dearest ? a : dearest;
  };
  for (int64_t chunk = blockIdx.x; chunk < plan.chunks; chunk += gridDim.x) {
    const Part* part = part_at(plan, &Part::first_chunk, chunk);
    const Entries<T> entries(plan, *part);
    const int64_t begin = (chunk - part->first_chunk) * plan.chunk_length, left = part->row.length - begin;
    const int length = static_cast<int>(left < plan.chunk_length ? left : plan.chunk_length);
    if (entries.cost_step == 0) {
      if (threadIdx.x == 0) add(entries.cost(0), static_cast<double>(length));
      continue;
    }
    constexpr int kLanes = Entries<T>::kLanes;
    for (int i = threadIdx.x * kLanes; i < length; i += kThreads * kLanes) {
      const int live = length - i < kLanes ? length - i : kLanes;
      const Pack<T, kLanes> a = entries.load(entries.costs, begin + i, live);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        if (j < live) add(to_float(a.lane[j]), 1.0);
      }
    }
  }
  double sums[4] = {sum, static_cast<double>(poison), -static_cast<double>(cheapest), static_cast<double>(dearest)};
  if (!grid_reduce(sums, SumsThenMaxima<2>{}, w.partials, &w.solve->ticket) || threadIdx.x != 0) return;
  w.solve->total = sums[0];
  w.solve->poison = sums[1];
  w.solve->cheapest = -sums[2];
  w.solve->dearest = sums[3];
}

// ---- Survey.

// After a pass, by one thread: the data's range is known, the search moves, and what is not finite ends it all.
// Entries that turn out to be masked leave the others' costs as the total: the search begins once more.
__device__ __noinline__ void learn(const double (&sums)[6], const Moments& moments, double enough, Solve* solve,
                                  Counts* counts) {
  ThresholdSearch& search = solve->search;
  const double lowest = -sums[4], highest = sums[5];
  counts->passes += 1;
  counts->trials += solve->again;
  if (sums[0] != sums[0]) {
    search = ThresholdSearch(NAN, search.total, search.beta);
    solve->cut.nothing = true;
    solve->cut.everything = false;
    solve->cut.stage = Stage::closed;
    solve->searching = false;
  } else if (solve->masked == 0.0 && sums[3] > 0.0) {
    solve->masked = sums[3];
    const double total = fmax(search.total - sums[3], 0.0);
    const double budget = search.sign > 0.0 ? search.quota : search.total - search.quota;
    ThresholdSearch unmasked(usable_budget(budget, total, search.beta, 0.0), total, search.beta);
    unmasked.t = search.t;
    if (lowest <= highest) unmasked.centre_from(lowest, highest);
    search = unmasked;
    solve->searching = solve->soft && !search.constant();
  } else if (solve->searching) {
    search.tighten(lowest, highest);
    solve->searching = !solve->trials.take(moments, enough, &search);
  }
  solve->pending = solve->searching || solve->cut.stage == Stage::range;
}

template <class T>
__device__ void one_pass(const Plan& plan, const Workspace& w, double enough, Bins* bins) {
  Solve* solve = w.solve;
  const bool searching = solve->searching;
  const Selection cut = solve->cut;
  const Logit<float> p = solve->search.logit<float>();
  const Exponent exponent(p, p.sign);
  Histogram histogram(cut);
  MomentSums moments;
  float low = INFINITY, high = -INFINITY;
  double cost_of_masked = 0.0;
  histogram.clear(bins);
  walk<T>(
      plan, w.counts->passes,
      [&](const Entries<T>&, const Lanes<T>& x) {
#pragma unroll
        for (int j = 0; j < Lanes<T>::kCount; ++j) {
          if (j >= x.live) continue;
          if (masked(x.u[j])) {
            cost_of_masked += static_cast<double>(x.a[j]);
            continue;
          }
          low = x.u[j] < low ? x.u[j] : low;
          high = x.u[j] > high ? x.u[j] : high;
          moments.mass += x.u[j] * 0.0f;  // NaN for what is not finite
          if (searching) moments.add(exponent, x.u[j], x.a[j]);
          if (histogram.wanted) histogram.add(bins, cut, x.u[j], x.a[j]);
        }
      },
      [&] { moments.flush(); });
  Units* counts = w.histogram();
  histogram.hand_over(bins, counts);
  const auto& m = moments.total;
  double sums[6] = {m[0], m[1], m[2], cost_of_masked, -static_cast<double>(low), static_cast<double>(high)};
  if (!grid_reduce(sums, SumsThenMaxima<4>{}, w.partials, &solve->ticket)) return;
  if (histogram.wanted) narrow(counts, &solve->cut);
  if (threadIdx.x != 0) return;
  solve->rounds += histogram.wanted;
  for (int n = 0; n < 3; ++n) moments.total[n] = sums[n];
  learn(sums, moments.moments(), alone(plan) || solve->again ? 0.0 : enough, solve, w.counts);
}

constexpr int kSearchesResident = 2;  // three a processor would spill on sm_100

__device__ inline bool now(const bool* flag) { return *static_cast<const volatile bool*>(flag); }

// Passes while there is something left to find, or one at least. The thread blocks wait for each other after each.
template <class T>
__device__ void settle(const Plan& plan, const Workspace& w, Bins* bins, const cooperative_groups::grid_group& grid, bool one) {
  for (bool go_on = one || now(&w.solve->pending); go_on; go_on = now(&w.solve->pending)) {
    if (!one) grid.sync();  // all have seen that it goes on before the last of them changes that
    one_pass<T>(plan, w, kLastStep, bins);
    grid.sync();
    one = false;
  }
}

// ---- Ties.

// How many of the ties fit, by index: the chunk in which the rest of the budget ends, then the place in it.
template <class T>
__device__ __noinline__ void resolve_ties(const Plan& plan, const Workspace& w) {
  __shared__ Units sums[kThreads];
  __shared__ Units left_there;
  __shared__ int64_t chunk;
  Selection* cut = &w.solve->cut;
  const Units room = cut->room();
  const uint32_t key = cut->last;
  const int64_t each = (plan.chunks + kThreads - 1) / kThreads;
  const int64_t from = threadIdx.x * each, to = from + each < plan.chunks ? from + each : plan.chunks;
  Units own = 0;
  for (int64_t c = from; c < to; ++c) own += __ldcg(w.tied + c);
  if (threadIdx.x == 0) chunk = plan.chunks;
  Units before = running_sum(own, sums) - own;
  if (before <= room && before + own > room) {  // in at most one thread
    int64_t c = from;
    for (; before + __ldcg(w.tied + c) <= room; ++c) before += __ldcg(w.tied + c);
    chunk = c;
    left_there = room - before;
  }
  __syncthreads();
  if (chunk == plan.chunks) {
    if (threadIdx.x == 0) cut->last_kept = plan.length;  // all of them
    return;
  }

  const Part* part = part_at(plan, &Part::first_chunk, chunk);
  const Entries<T> entries(plan, *part);
  const int64_t begin = (chunk - part->first_chunk) * plan.chunk_length;
  const int64_t end = begin + plan.chunk_length < part->row.length ? begin + plan.chunk_length : part->row.length;
  const int64_t run = plan.chunk_length / kThreads, first = begin + threadIdx.x * run;
  const int64_t after = first + run < end ? first + run : end;
  const Selection& kept = *cut;
  const auto tied_cost = [&](int64_t i) {
    const float a = entries.cost(i);
    return key_of(entries.ratio_at(i, a)) == key ? kept.cost(a) : 0ull;
  };
  own = 0;
  for (int64_t i = first; i < after; ++i) own += tied_cost(i);
  before = running_sum(own, sums) - own;
  if (before > left_there || before + own <= left_there) return;
  int64_t i = first;
  for (; before + tied_cost(i) <= left_there; ++i) before += tied_cost(i);
  cut->last_kept = part->first_index + i - 1;
}

template <class T>
__device__ void count_ties(const Plan& plan, const Workspace& w) {
  __shared__ Units sum;
  const Selection cut = w.solve->cut;
  for (int64_t chunk = blockIdx.x; chunk < plan.chunks; chunk += gridDim.x) {
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    Units own = 0;
    walk_chunk<T>(
        plan, chunk,
        [&](const Entries<T>&, const Lanes<T>& x) {
#pragma unroll
          for (int j = 0; j < Lanes<T>::kCount; ++j) {
            if (j < x.live && key_of(x.u[j]) == cut.last) own += cut.cost(x.a[j]);
          }
        },
        [] {});
    if (own != 0) atomicAdd(&sum, own);
    __syncthreads();
    if (threadIdx.x == 0) w.tied[chunk] = sum;
    __syncthreads();
  }
  double none[1] = {0.0};  // only to know that every chunk has its sum
  if (grid_reduce(none, SumsThenMaxima<1>{}, w.partials, &w.solve->ticket)) resolve_ties<T>(plan, w);
}

// One pass at least, which finds what is masked or not finite.
template <class T>
__global__ void __launch_bounds__(kThreads, kSearchesResident) search_kernel(Plan plan, Workspace w) {
  __shared__ Bins bins;
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  settle<T>(plan, w, &bins, grid, true);
  if (w.solve->cut.stage == Stage::ties) count_ties<T>(plan, w);
}

// ---- Write.

__device__ __noinline__ void remember(const Request& request, const Solve& solve) {
  if (request.threshold != nullptr) save_threshold(solve.search, request.threshold);
  if (request.state == nullptr) return;
  double* state = request.state;
  double* soft = state + kStateSoft;
  double* hard = state + kStateHard;
  const double solves = state[kStateSolves], guess = expected(hard, solves);
  const double cut = static_cast<double>(value_of<float>(solve.cut.last));
  const bool found = !solve.cut.everything && !solve.cut.nothing && fabs(cut) < INFINITY;
  soft[1] = soft[0];
  hard[1] = hard[0];
  if (found) hard[0] = cut;
  soft[0] = solve.search.constant() ? hard[0] : solve.search.t.at;
  // as wide as the last surprise asks for, narrowing slowly when there is none
  const double size = fabs(hard[0]), first = solve.window < INFINITY ? solve.window : 0.01 * size;
  const double width = solves >= 1.0 ? fmax(4.0 * fabs(hard[0] - guess), 0.7 * state[kStateWidth]) : first;
  state[kStateWidth] = fmax(width, 1e-5 * size);
  state[kStateSolves] = solves + 1.0;
}

// By the last thread block: the entries at the hard threshold, and whether the soft mask met the budget.
__device__ __noinline__ void finish(const Plan& plan, const Request& request, const Workspace& w, double mass, Candidate* entries) {
  Solve* solve = w.solve;
  if (solve->cut.stage == Stage::candidates) {
    const unsigned found = __ldcg(&solve->candidates);
    const int count = static_cast<int>(found < kCandidates ? found : kCandidates);
    const int kept = resolve_candidates(w.candidates, count, entries, &solve->cut);
    for (int n = threadIdx.x; n < kept; n += kThreads) {
      const int64_t index = entries[n].index();
      const Part* part = part_at(plan, &Part::first_index, index);
      static_cast<uint8_t*>(part->row.extra[1])[index - part->first_index] = 1;
    }
  }
  if (threadIdx.x != 0) return;
  const ThresholdSearch& search = solve->search;
  solve->again = request.soft && !search.constant() && fabs(mass - search.quota) > kWritten * search.quota;
  if (!solve->again) return remember(request, *solve);
  w.counts->rewrites = 1;
  solve->search.residual = solve->search.best_miss = INFINITY;
  solve->trials = Trials{};
  solve->searching = solve->pending = true;
}

// extra = {soft mask, hard mask}.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>) write_kernel(Plan plan, Request request, Workspace w) {
  __shared__ Candidate entries[kCandidates];
  Solve* solve = w.solve;
  const Selection cut = solve->cut;
  const Logit<float> p = solve->search.logit<float>();
  const Exponent exponent(p);
  const float of_masked = mask_of_masked(solve->search);
  const bool smaller = p.sign > 0.0f, collecting = cut.stage == Stage::candidates;
  float some = 0.0f;
  double mass[1] = {0.0};
  walk<T>(
      plan, w.counts->passes,
      [&](const Entries<T>& list, const Lanes<T>& x) {
        constexpr int kCount = Lanes<T>::kCount;
        if (request.soft) {
          Pack<T, kCount> soft;
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            const Sigmoid side(exponent.at(x.u[j]));
            soft.lane[j] = from_float<T>(masked(x.u[j]) ? of_masked : side.m);
            some += masked(x.u[j]) ? 0.0f : x.a[j] * (smaller ? side.m : side.complement);
          }
          list.store(static_cast<T*>(list.extra[0]), x, soft);
        }
        if (request.hard) {
          Pack<uint8_t, kCount> hard;
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            const uint32_t key = key_of(x.u[j]);
            const int64_t index = list.first_index + x.first + j;
            hard.lane[j] = !masked(x.u[j]) && cut.keeps(key, index);
            if (!collecting || j >= x.live || masked(x.u[j]) || !cut.within(key)) continue;
            const unsigned place = atomicAdd(&solve->candidates, 1u);
            if (place < kCandidates) w.candidates[place] = {Candidate::rank_of(cut, key, index), cut.cost(x.a[j])};
          }
          list.store(static_cast<uint8_t*>(list.extra[1]), x, hard);
        }
      },
      [&] { mass[0] += static_cast<double>(some), some = 0.0f; });
  if (grid_reduce(mass, SumsThenMaxima<1>{}, w.partials, &solve->ticket)) finish(plan, request, w, mass[0], entries);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) again_kernel(Plan plan, Request request, Workspace w) {
  __shared__ Bins bins;
  if (!now(&w.solve->again)) return;
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  settle<T>(plan, w, &bins, grid, false);
  const Exponent exponent(w.solve->search.logit<float>());
  const float of_masked = mask_of_masked(w.solve->search);
  walk<T>(
      plan, w.counts->passes,
      [&](const Entries<T>& list, const Lanes<T>& x) {
        Pack<T, Lanes<T>::kCount> soft;
#pragma unroll
        for (int j = 0; j < Lanes<T>::kCount; ++j)
          soft.lane[j] = from_float<T>(masked(x.u[j]) ? of_masked : Sigmoid(exponent.at(x.u[j])).m);
        list.store(static_cast<T*>(list.extra[0]), x, soft);
      },
      [] {});
  if (blockIdx.x == 0 && threadIdx.x == 0) remember(request, *w.solve);
}

template <class T>
void solve(const Table& table, const Plan& plan, const Request& request, bool cost_arrays, const Workspace& w, Launches run) {
  const int value = sizeof(T), cost = cost_arrays ? value : 0, written = (request.soft ? value : 0) + (request.hard ? 1 : 0);
  const Delivery delivery(table, plan, w.counts, w.cleared);
  Sent last{};
  if (request.priced) {
    send_all(delivery, run);
    run({"costs", cost, 0, 1, 1}, &costs_kernel<T>, plan, w);  // not with the start, which needs twice the registers
  } else {
    last = send_but_last(delivery, run);
  }
  run.alone({"start", 0, 0, 1, 1}, &start_kernel<T>, plan, request, w, last);
  run.with(kSearchesResident).together({"search", value + cost, 0, request.soft ? 2 : 1, 1}, &search_kernel<T>, plan, w);
  run({"write", value + cost, written, 1, 1}, &write_kernel<T>, plan, request, w);
  if (request.soft) run.together({"again", value + cost, value, 0, 0}, &again_kernel<T>, plan, request, w);
}

}  // namespace

int64_t global_workspace_bytes(Table table) { return Workspace(nullptr, Plan(table)).bytes; }

void topk_global(Dtype dtype, Table table, const double* budget, const double* beta, bool absolute, double* state,
                 double* threshold, void* workspace, Stream stream) {
  const Plan sizes(table, absolute);
  const Workspace w(workspace, sizes);
  const Plan plan = placed(sizes, w);
  Request request{budget, beta, state, threshold, false, false, false};
  bool cost_arrays = false;
  for (int64_t p = 0; p < table.count; ++p) {  // an empty tensor has no address
    request.soft |= table.rows[p].extra[0] != nullptr;
    request.hard |= table.rows[p].extra[1] != nullptr;
    request.priced |= table.rows[p].costs != nullptr;
    cost_arrays |= table.rows[p].cost_step != 0;
  }
  SPARTAN_CUDA_DISPATCH(solve<T>(table, plan, request, cost_arrays, w, Launches(plan, kResident<T>, stream)))
}

std::vector<LaunchNote> topk_global_launches(Dtype dtype, bool soft, bool hard, bool cost_arrays) {
  std::vector<LaunchNote> notes;
  const Table table{nullptr, 0};
  const Plan plan(table);
  const Workspace w(nullptr, plan);
  const Request request{nullptr, nullptr, nullptr, nullptr, soft, hard, cost_arrays};
  SPARTAN_CUDA_DISPATCH(solve<T>(table, plan, request, cost_arrays, w, Launches(&notes)))
  return notes;
}

}  // namespace spartan::cuda
