// Soft and hard top-k of a list of tensors under one budget, in a fixed number of launches that the host never waits for:
//
//   extent   total cost, range and spread of u = v / a
//   search   moments at a trial threshold and one digit of the hard threshold, three times
//   ties     how far the budget reaches among the entries that equal the hard threshold
//   settle   trials while the soft threshold has not converged
//   write    both masks
#include <cooperative_groups.h>

#include "../cpu/selection.h"
#include "sigmoid.cuh"
#include "table.cuh"

namespace spartan::cuda {
namespace {

using cpu::key_of;
using cpu::value_of;

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kDigits = 3;
constexpr int kFixedPointBits = 61;  // of the sum of all costs
constexpr int kStateSoft = 0, kStateHard = 2, kStateSolves = 4;

// The hard threshold as far as it is known: the leading bits of its key, counted from the lowest key there is, and the cost
// above those. Costs are integers, in units of the one cost or in fixed point, so that sums do not depend on their order.
struct Selection {
  double unit;
  unsigned long long budget, spent;
  uint32_t lowest, prefix;
  int bits;             // of the key that are not yet known
  bool counted;         // all costs are equal
  bool everything, nothing, ties_fit;
  int64_t last_kept;    // of the ties, by index in the list

  __device__ bool open() const { return bits > 0 && !everything && !nothing; }
  __device__ unsigned long long cost(float a) const {
    return counted ? 1ull : static_cast<unsigned long long>(static_cast<double>(a) / unit + 0.5);
  }
  __device__ uint32_t key(float u) const { return key_of(u) - lowest; }
  __device__ bool keeps(float u, int64_t index) const {
    const uint32_t k = key(u);
    return everything || (!nothing && (k > prefix || (k == prefix && index <= last_kept)));
  }
};

// What one solve keeps on the device between its launches.
struct Solve {
  ThresholdSearch search;
  Trials trials;
  Selection cut;
  bool searching;
  double threshold[2];
  double lowest_cost;
  unsigned ticket;
};

struct Workspace {
  Solve* solve;
  unsigned long long* histograms;  // kDigits of them
  double* partials;
  double* tied;  // cost of the ties in each chunk
  Part* parts;

  Workspace(void* memory, const Plan& plan) {
    char* next = static_cast<char*>(memory);
    const auto take = [&next](int64_t bytes) {
      char* at = next;
      next += (bytes + 255) / 256 * 256;
      return at;
    };
    solve = reinterpret_cast<Solve*>(take(sizeof(Solve)));
    histograms = reinterpret_cast<unsigned long long*>(take(kDigits * kBins * 8));
    cleared = next - static_cast<char*>(memory);
    partials = reinterpret_cast<double*>(take(int64_t(kMaxGrid) * kPartials * 8));
    tied = reinterpret_cast<double*>(take(plan.chunks * 8));
    parts = reinterpret_cast<Part*>(take(plan.count * static_cast<int64_t>(sizeof(Part))));
    bytes = next - static_cast<char*>(memory);
  }
  int64_t cleared, bytes;
};

// What the caller asked for.
struct Request {
  const double* budget;
  const double* beta;
  double* state;
  double* threshold;
  bool soft, hard;
};

// ---- Extent.

__device__ Selection first_selection(double budget, double total, double low, double high, double cheapest, double dearest) {
  Selection cut{};
  cut.counted = cheapest == dearest;
  // a power of two, so that costs lose nothing as long as the largest sum leaves them their bits
  int exponent = 0;
  frexp(total, &exponent);
  cut.unit = cut.counted ? cheapest : ldexp(1.0, exponent - kFixedPointBits);
  cut.everything = budget >= total;
  cut.nothing = !(budget > 0.0);
  cut.ties_fit = false;
  cut.last_kept = -1;
  cut.lowest = key_of(static_cast<float>(low));
  const uint32_t range = key_of(static_cast<float>(high)) - cut.lowest;
  cut.bits = range == 0 ? 0 : 32 - __clz(static_cast<int>(range));
  if (cut.everything || cut.nothing) return cut;
  double units = floor(budget / cut.unit);
  if ((units + 1.0) * cut.unit <= budget) units += 1.0;
  if (units * cut.unit > budget) units -= 1.0;
  cut.budget = static_cast<unsigned long long>(units);
  return cut;
}

// What the budget leaves for the ties, once every digit is known, and whether a single one of them may fit.
__device__ void close(Solve* solve) {
  Selection& cut = solve->cut;
  const double left = static_cast<double>(cut.budget - cut.spent) * cut.unit;
  cut.ties_fit = !cut.everything && !cut.nothing && left >= solve->lowest_cost;
}

__device__ void begin(const Request& request, const Plan& plan, const double (&sums)[8], Solve* solve) {
  const double budget = usable_budget(*request.budget, sums[0], *request.beta, sums[3]);
  solve->search = ThresholdSearch(budget, sums[0], *request.beta);
  solve->trials = Trials{};
  solve->lowest_cost = -sums[6];
  solve->cut = first_selection(budget, sums[0], -sums[4], sums[5], -sums[6], sums[7]);
  close(solve);
  solve->searching = request.soft && !solve->search.constant();
  if (!solve->searching) return;
  start_from(static_cast<double>(plan.length), sums[1], sums[2], -sums[4], sums[5], &solve->search);
  if (request.state == nullptr || !(request.state[kStateSolves] >= 1.0)) return;
  const double* soft = request.state + kStateSoft;
  const double warm = request.state[kStateSolves] >= 2.0 ? 2.0 * soft[0] - soft[1] : soft[0];
  if (warm > solve->search.low && warm < solve->search.high) solve->search.t = warm;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) extent_kernel(Plan plan, Request request, Workspace w) {
  ExtentSums seen;
  float cheapest = INFINITY, dearest = -INFINITY;
  walk<T>(
      plan,
      [&](const Entries<T>&, int64_t, float u, float a) {
        seen.add(u, a);
        cheapest = a < cheapest ? a : cheapest;
        dearest = a > dearest ? a : dearest;
      },
      [&] { seen.flush(); });
  const auto& t = seen.total;
  double sums[8] = {t[0], t[1], t[2], t[3], -static_cast<double>(seen.low), seen.high, -static_cast<double>(cheapest), dearest};
  if (!grid_reduce(sums, SumsThenMaxima<4>{}, w.partials, &w.solve->ticket)) return;
  if (threadIdx.x == 0) begin(request, plan, sums, w.solve);
}

// ---- Search.

// Narrows the hard threshold by the digit that `histogram` counts: the bin, from above, in which the budget runs out.
__device__ void narrow(const unsigned long long* histogram, Selection* cut) {
  constexpr int kEach = kBins / kThreads;
  __shared__ unsigned long long above[kThreads];
  const int width = cut->bits < kDigitBits ? cut->bits : kDigitBits;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;  // this thread's bins, falling
  unsigned long long bins[kEach], own = 0;
  for (int j = 0; j < kEach; ++j) own += bins[j] = __ldcg(histogram + top - j);
  above[threadIdx.x] = own;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const unsigned long long more = threadIdx.x >= static_cast<unsigned>(step) ? above[threadIdx.x - step] : 0;
    __syncthreads();
    above[threadIdx.x] += more;
    __syncthreads();
  }
  const unsigned long long left = cut->budget - cut->spent;
  unsigned long long before = above[threadIdx.x] - own;
  const bool here = before <= left && before + own > left;  // in exactly one thread
  const bool missing = above[kThreads - 1] <= left;         // fixed point rounds: the budget outlasts the digit
  __syncthreads();                                          // all have read the cut that one of them now changes
  if (here) {
    int j = 0;
    while (before + bins[j] <= left) before += bins[j++];
    cut->spent += before;
    cut->prefix = cut->prefix << width | static_cast<uint32_t>(top - j);
    cut->bits -= width;
  }
  if (missing && threadIdx.x == 0) cut->everything = true;
  __syncthreads();
}

struct Histogram {
  bool wanted, counted;
  int shift, width;
  union Bins {
    unsigned counts[kBins];
    unsigned long long costs[kBins];
  };

  __device__ explicit Histogram(const Selection& cut) : wanted(cut.open()), counted(cut.counted) {
    width = cut.bits < kDigitBits ? cut.bits : kDigitBits;
    shift = cut.bits - width;
  }
  __device__ void clear(Bins* bins) const {
    if (!wanted) return;
    for (int b = threadIdx.x; b < kBins; b += kThreads) counted ? bins->counts[b] = 0u : bins->costs[b] = 0ull;
    __syncthreads();
  }
  __device__ void add(Bins* bins, const Selection& cut, float u, float a) const {
    const uint32_t key = cut.key(u);
    // shifted in 64 bits: the first digit of a full key leaves nothing of it
    if (static_cast<uint32_t>(static_cast<uint64_t>(key) >> cut.bits) != cut.prefix) return;
    const uint32_t bin = key >> shift & ((1u << width) - 1);
    if (counted)
      atomicAdd(&bins->counts[bin], 1u);
    else
      atomicAdd(&bins->costs[bin], cut.cost(a));
  }
  __device__ void hand_over(Bins* bins, unsigned long long* histogram) const {
    if (!wanted) return;
    __syncthreads();
    for (int b = threadIdx.x; b < kBins; b += kThreads) {
      const unsigned long long found = counted ? bins->counts[b] : bins->costs[b];
      if (found != 0) atomicAdd(histogram + b, found);
    }
  }
};

// One trial at the soft threshold, where it is searched for, and one digit of the hard one, where `digit` is not negative.
// False in all but the last thread block to finish.
template <class T>
__device__ bool one_pass(const Plan& plan, const Workspace& w, int digit, Histogram::Bins* bins) {
  Solve* solve = w.solve;
  const bool searching = solve->searching;
  const Selection cut = solve->cut;
  const Histogram histogram(digit >= 0 ? cut : Selection{});
  if (!searching && !histogram.wanted) return false;
  const Logit<float> p = solve->search.logit<float>();
  MomentSums moments;
  histogram.clear(bins);
  walk<T>(
      plan,
      [&](const Entries<T>&, int64_t, float u, float a) {
        if (searching) moments.add(p, u, a);
        if (histogram.wanted) histogram.add(bins, cut, u, a);
      },
      [&] { moments.flush(); });
  histogram.hand_over(bins, w.histograms + digit * kBins);
  if (!grid_reduce(moments.total, SumsThenMaxima<3>{}, w.partials, &solve->ticket)) return false;
  if (histogram.wanted) narrow(w.histograms + digit * kBins, &solve->cut);
  if (threadIdx.x == 0) {
    if (histogram.wanted) close(solve);
    if (searching) solve->searching = !solve->trials.take(moments.moments(), alone(plan), &solve->search);
  }
  return true;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) search_kernel(Plan plan, Workspace w, int digit) {
  __shared__ Histogram::Bins bins;
  one_pass<T>(plan, w, digit, &bins);
}

// Trials until the search is over: mostly none or one. The thread blocks wait for each other after each.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) settle_kernel(Plan plan, Workspace w) {
  __shared__ Histogram::Bins bins;
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  while (*static_cast<volatile bool*>(&w.solve->searching)) {
    grid.sync();  // all have seen that it goes on before the last of them changes that
    one_pass<T>(plan, w, -1, &bins);
    grid.sync();
  }
}

// ---- Ties.

// How many of the ties fit, by index: the chunk in which the rest of the budget ends, then the place in it.
template <class T>
__device__ void resolve_ties(const Plan& plan, const Workspace& w) {
  __shared__ double sums[kThreads];
  __shared__ int64_t chunk;
  Selection* cut = &w.solve->cut;
  double left = static_cast<double>(cut->budget - cut->spent) * cut->unit;
  __shared__ double left_there;
  const int64_t each = (plan.chunks + kThreads - 1) / kThreads;
  const int64_t from = threadIdx.x * each, to = from + each < plan.chunks ? from + each : plan.chunks;
  double own = 0.0;
  for (int64_t c = from; c < to; ++c) own += __ldcg(w.tied + c);
  sums[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t c = 0;
    for (int t = 0; t < kThreads && c + each <= plan.chunks && sums[t] <= left; ++t, c += each) left -= sums[t];
    while (c < plan.chunks && __ldcg(w.tied + c) <= left) left -= __ldcg(w.tied + c++);
    chunk = c;
    left_there = left;
    if (c == plan.chunks) cut->last_kept = plan.length;  // all of them
  }
  __syncthreads();
  if (chunk == plan.chunks) return;

  const Part* part = part_of(plan, chunk);
  const Entries<T> entries(plan, *part);
  const int64_t begin = (chunk - part->first_chunk) * plan.chunk_length;
  const int64_t end = begin + plan.chunk_length < part->row.length ? begin + plan.chunk_length : part->row.length;
  const int64_t run = plan.chunk_length / kThreads, first = begin + threadIdx.x * run;
  const auto tied_cost = [&](int64_t i) {
    const float a = entries.cost(i);
    return cut->key(entries.ratio(i, a)) == cut->prefix ? static_cast<double>(a) : 0.0;
  };
  own = 0.0;
  for (int64_t i = first; i < end && i < first + run; ++i) own += tied_cost(i);
  sums[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  left = left_there;
  int thread = 0;
  while (thread < kThreads && sums[thread] <= left) left -= sums[thread++];
  int64_t i = begin + thread * run < end ? begin + thread * run : end;
  for (; i < end; ++i) {
    left -= tied_cost(i);
    if (left < 0.0) break;
  }
  cut->last_kept = part->first_index + i - 1;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) ties_kernel(Plan plan, Workspace w) {
  const Selection cut = w.solve->cut;
  if (!cut.ties_fit) return;
  for (int64_t chunk = blockIdx.x; chunk < plan.chunks; chunk += gridDim.x) {
    double sum[1] = {0.0};
    walk_chunk<T>(
        plan, chunk,
        [&](const Entries<T>&, int64_t, float u, float a) {
          if (cut.key(u) == cut.prefix) sum[0] += static_cast<double>(a);
        },
        [] {});
    group_sums<kThreads>(sum);
    if (threadIdx.x == 0) w.tied[chunk] = sum[0];
  }
  double none[1] = {0.0};  // only to know that every chunk has its sum
  if (grid_reduce(none, SumsThenMaxima<1>{}, w.partials, &w.solve->ticket)) resolve_ties<T>(plan, w);
}

// ---- Write.

__device__ void remember(const Request& request, const Solve& solve) {
  if (request.threshold != nullptr) save_threshold(solve.search, request.threshold);
  if (request.state == nullptr) return;
  double* soft = request.state + kStateSoft;
  double* hard = request.state + kStateHard;
  soft[1] = soft[0];
  hard[1] = hard[0];
  const bool found = !solve.cut.everything && !solve.cut.nothing;
  if (found) hard[0] = static_cast<double>(value_of<float>(solve.cut.prefix + solve.cut.lowest));
  soft[0] = solve.search.constant() ? hard[0] : solve.search.t;
  request.state[kStateSolves] += 1.0;
}

// extra = {soft mask, hard mask}. The sum of the soft mask is the one of the search: both evaluate it alike.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) write_kernel(Plan plan, Request request, Workspace w) {
  const Selection cut = w.solve->cut;
  const Logit<float> p = w.solve->search.logit<float>();
  walk<T>(
      plan,
      [&](const Entries<T>& entries, int64_t i, float u, float) {
        if (request.soft) static_cast<T*>(entries.extra[0])[i] = from_float<T>(Sigmoid(logit_at(p, u)).m);
        if (request.hard) static_cast<uint8_t*>(entries.extra[1])[i] = cut.keeps(u, entries.first_index + i);
      },
      [] {});
  if (blockIdx.x == 0 && threadIdx.x == 0) remember(request, *w.solve);
}

template <class T>
void solve(const Plan& plan, const Request& request, const Workspace& w, Stream stream) {
  const unsigned grid = grid_of(plan, stream);
  launch(stream, &extent_kernel<T>, grid, kThreads, plan, request, w);
  for (int digit = 0; request.hard && digit < kDigits; ++digit)
    launch(stream, &search_kernel<T>, grid, kThreads, plan, w, digit);
  if (request.hard) launch(stream, &ties_kernel<T>, grid, kThreads, plan, w);
  if (request.soft) launch_together(stream, &settle_kernel<T>, grid, kThreads, plan, w);
  launch(stream, &write_kernel<T>, grid, kThreads, plan, request, w);
}

// ---- Gradient.

struct Saved {
  const double* threshold;
  const double* beta;
  double* scalars;  // of the budget and of beta

  __device__ Logit<float> logit() const {
    return {static_cast<float>(*beta), static_cast<float>(threshold[0]), static_cast<float>(threshold[1]), 1.0f};
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) gradient_sums_kernel(Plan plan, Saved saved, Workspace w) {
  const Logit<float> p = saved.logit();
  GradientSums sums;
  walk<T>(
      plan,
      [&](const Entries<T>& entries, int64_t i, float u, float a) {
        sums.add(p, u, a, to_float(static_cast<const T*>(entries.extra[0])[i]));
      },
      [&] { sums.flush(); });
  if (!grid_reduce(sums.total, SumsThenMaxima<4>{}, w.partials, &w.solve->ticket) || threadIdx.x != 0) return;
  saved.scalars[0] = sums.ratio();
  saved.scalars[1] = sums.of_beta();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) gradient_kernel(Plan plan, Saved saved) {
  const Logit<float> p = saved.logit();
  const float r = static_cast<float>(saved.scalars[0]);
  walk<T>(
      plan,
      [&](const Entries<T>& entries, int64_t i, float u, float a) {
        const Sigmoid sig(logit_at(p, u));
        const float g = to_float(static_cast<const T*>(entries.extra[0])[i]);
        const float out = p.beta * sig.slope() * (g / a - r);
        static_cast<T*>(entries.extra[1])[i] = from_float<T>(out);
        if (entries.extra[2] != nullptr) static_cast<T*>(entries.extra[2])[i] = from_float<T>(-out * u - r * sig.m);
      },
      [] {});
}

template <class T>
void gradient(const Plan& plan, const Saved& saved, const Workspace& w, Stream stream) {
  const unsigned grid = grid_of(plan, stream);
  launch(stream, &gradient_sums_kernel<T>, grid, kThreads, plan, saved, w);
  launch(stream, &gradient_kernel<T>, grid, kThreads, plan, saved);
}

Plan prepare(const Table& table, Plan plan, const Workspace& w, Stream stream) {
  plan.parts = w.parts;
  check(cudaSetDevice(stream.device));
  check(cudaMemsetAsync(w.solve, 0, static_cast<size_t>(w.cleared), static_cast<cudaStream_t>(stream.handle)));
  send_table(table, plan, stream);
  return plan;
}

}  // namespace

int64_t global_workspace_bytes(Table table) { return Workspace(nullptr, Plan(table)).bytes; }

void topk_global(Dtype dtype, Table table, const double* budget, const double* beta, bool absolute, double* state,
                 double* threshold, void* workspace, Stream stream) {
  const Plan sizes(table, absolute);
  const Workspace w(workspace, sizes);
  const Plan plan = prepare(table, sizes, w, stream);
  Request request{budget, beta, state, threshold, false, false};
  for (int64_t p = 0; p < table.count; ++p) {  // an empty tensor has no address
    request.soft |= table.rows[p].extra[0] != nullptr;
    request.hard |= table.rows[p].extra[1] != nullptr;
  }
  SPARTAN_CUDA_DISPATCH(solve<T>(plan, request, w, stream))
}

void soft_topk_global_backward(Dtype dtype, Table table, const double* threshold, const double* beta, double* scalars,
                               void* workspace, Stream stream) {
  const Plan sizes(table);
  const Workspace w(workspace, sizes);
  const Plan plan = prepare(table, sizes, w, stream);
  SPARTAN_CUDA_DISPATCH(gradient<T>(plan, {threshold, beta, scalars}, w, stream))
}

}  // namespace spartan::cuda
