// What one solve over a list keeps on the device between its launches, and the launches themselves.
#pragma once

#include <vector>

#include "search_row.cuh"
#include "selection.cuh"

namespace spartan::cuda {

// How much a solve had to do, as spartan_kernels/counts.py has it; read by the host after it, where it wants to know.
struct Counts {
  int passes, rewrites, trials;  // passes: over the entries, all of them
};

struct Solve {
  ThresholdSearch search;
  Trials trials;
  Selection cut;
  double total, cheapest, dearest, poison;  // of the costs
  double window;                            // half the width of the range looked at first
  double masked;                            // cost of the entries of -inf, which the first pass finds
  bool soft, searching, pending, again;
  int rounds;                               // of counting
  unsigned candidates;
  unsigned ticket;
};

// What the caller asked for.
struct Request {
  const double* budget;
  const double* beta;
  double* state;  // new_solver_state()
  double* threshold;
  bool soft, hard, priced;
};

struct Workspace {
  Counts* counts;  // first of all: the host looks there
  Solve* solve;
  Units* histograms;  // kRounds of them
  double* partials;
  Units* tied;  // cost of the ties in each chunk
  Candidate* candidates;
  Part* parts;
  int64_t cleared, bytes;

  Workspace(void* memory, const Plan& plan) {
    char* next = static_cast<char*>(memory);
    const auto take = [&next](int64_t bytes) {
      char* at = next;
      next += (bytes + 255) / 256 * 256;
      return at;
    };
    counts = reinterpret_cast<Counts*>(take(sizeof(Counts)));
    solve = reinterpret_cast<Solve*>(take(sizeof(Solve)));
    histograms = reinterpret_cast<Units*>(take(int64_t(kRounds) * (kBins + 1) * 8));
    cleared = next - static_cast<char*>(memory);
    partials = reinterpret_cast<double*>(take(int64_t(kMaxGrid) * kPartials * 8));
    tied = reinterpret_cast<Units*>(take(plan.chunks * 8));
    candidates = reinterpret_cast<Candidate*>(take(int64_t(kCandidates) * static_cast<int64_t>(sizeof(Candidate))));
    parts = reinterpret_cast<Part*>(take(plan.count * static_cast<int64_t>(sizeof(Part))));
    bytes = next - static_cast<char*>(memory);
  }
  __device__ Units* histogram() const { return histograms + solve->rounds * (kBins + 1); }
};

// Launches kernels over one list, or only notes what they would move.
class Launches {
 public:
  Launches(const Plan& plan, int resident, Stream stream)
      : stream_(stream), plan_(&plan), grid_(grid_of(plan, resident, stream)), notes_(nullptr) {}
  explicit Launches(std::vector<LaunchNote>* notes) : stream_{nullptr, 0}, plan_(nullptr), grid_(1), notes_(notes) {}

  // The same for a kernel of which a multiprocessor holds another number of thread blocks: all of them run at a time.
  Launches with(int resident) const { return notes_ != nullptr ? *this : Launches(*plan_, resident, stream_); }

  template <class... Parameters, class... Arguments>
  void operator()(const LaunchNote& note, void (*kernel)(Parameters...), Arguments... arguments) {
    if (notes_ != nullptr) notes_->push_back(note);
    else launch(stream_, kernel, grid_, kThreads, arguments...);
  }
  template <class... Parameters, class... Arguments>
  void alone(const LaunchNote& note, void (*kernel)(Parameters...), Arguments... arguments) {
    if (notes_ != nullptr) notes_->push_back(note);
    else launch(stream_, kernel, 1, kThreads, arguments...);
  }
  template <class... Parameters, class... Arguments>
  void together(const LaunchNote& note, void (*kernel)(Parameters...), Arguments... arguments) {
    if (notes_ != nullptr) notes_->push_back(note);
    else launch_together(stream_, kernel, grid_, kThreads, arguments...);
  }

 private:
  Stream stream_;
  const Plan* plan_;
  unsigned grid_;
  std::vector<LaunchNote>* notes_;
};

inline Plan placed(Plan plan, const Workspace& w) {
  plan.parts = w.parts;
  return plan;
}

// Sends the whole table, or all but the end of it, which the next launch takes along.
inline void send_all(Delivery delivery, Launches& run) {
  do {
    run.alone({"send", 0, 0, 1, 1}, &send_kernel, delivery.next());
  } while (delivery.left() > 0);
}
inline Sent send_but_last(Delivery delivery, Launches& run) {
  while (delivery.left() > kSent) run.alone({"send", 0, 0, 1, 1}, &send_kernel, delivery.next());
  return delivery.next();
}

}  // namespace spartan::cuda
