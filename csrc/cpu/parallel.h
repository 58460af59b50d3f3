// Parallel loops on the OpenMP pool that the process already has (PyTorch's), without linking an OpenMP runtime of our own.
#pragma once

#include <cstdint>

namespace spartan::cpu {

using ParallelBody = void (*)(void* context, int64_t item);

// Calls body(context, item) for item in [0, items) on up to `threads` threads, each item once, in no particular order.
// Runs in the calling thread when one is asked for or no OpenMP runtime is loaded. The body must not throw.
void parallel_items(int threads, int64_t items, ParallelBody body, void* context);

// How many of `threads` a call is worth that takes so many multiply-adds: one where waking the others takes longer than they
// would save, or milliseconds, as on a machine whose cores other processes keep busy.
inline int worthwhile(int threads, int64_t multiply_adds) {
  constexpr int64_t kAlone = int64_t(1) << 19;  // about 20 microseconds of one core
  return multiply_adds < kAlone ? 1 : threads;
}

// Whether an OpenMP runtime was found in the process.
bool parallel_available();

template <class F>
void parallel_for(int threads, int64_t items, F&& f) {
  parallel_items(threads, items, [](void* context, int64_t item) { (*static_cast<F*>(context))(item); }, &f);
}

}  // namespace spartan::cpu
