#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>

namespace spartan::cpu {
namespace {

// The entry point that GCC's and LLVM's OpenMP runtimes share: run body(data) on a team of `threads`.
using RunTeam = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

RunTeam find_run_team() {
  // PyTorch loads its OpenMP runtime into the global scope before anything of ours runs.
  return reinterpret_cast<RunTeam>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

RunTeam run_team() {
  static const RunTeam found = find_run_team();
  return found;
}

struct Loop {
  std::atomic<int64_t> next{0};
  int64_t items;
  ParallelBody body;
  void* context;

  void run() {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, item);
  }
};

}  // namespace

bool parallel_available() { return run_team() != nullptr; }

void parallel_items(int threads, int64_t items, ParallelBody body, void* context) {
  Loop loop{{0}, items, body, context};
  const int64_t team = std::min<int64_t>(threads, items);
  if (team <= 1 || run_team() == nullptr) {
    loop.run();
    return;
  }
  run_team()([](void* data) { static_cast<Loop*>(data)->run(); }, &loop, static_cast<unsigned>(team), 0);
}

}  // namespace spartan::cpu
