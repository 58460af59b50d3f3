#include "storage_passes.h"

#include "simd.h"

namespace spartan::cpu::SPARTAN_ISA {
namespace {

template <class S>
void widen(const void* from, int64_t count, float* to) {
  constexpr int W = Simd<S>::width;
  const S* entries = static_cast<const S*>(from);
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(entries + i));
  if (i < count) store_partial<float>(to + i, load_partial(entries + i, static_cast<int>(count - i), 0.0f), count - i);
}

template <class S>
void narrow(const float* from, int64_t count, void* to, bool past_cache) {
  constexpr int W = Simd<S>::width;
  S* entries = static_cast<S*>(to);
  int64_t i = 0;
  if (past_cache && can_stream(to)) {
    for (; i + W <= count; i += W) stream(entries + i, load(from + i));
    stream_end();
  } else {
    for (; i + W <= count; i += W) store(entries + i, load(from + i));
  }
  if (i < count) store_partial<S>(entries + i, load_partial(from + i, static_cast<int>(count - i), 0.0f), count - i);
}

template <class S>
constexpr StoragePasses kPasses{widen<S>, narrow<S>};

}  // namespace

const StoragePasses& storage_bfloat16() { return kPasses<bfloat16>; }
const StoragePasses& storage_float16() { return kPasses<float16>; }

}  // namespace spartan::cpu::SPARTAN_ISA
