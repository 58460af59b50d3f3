// How numbers are stored, where that is narrower than what they are computed in.
#pragma once

#include <cstdint>

namespace spartan::cpu {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type that entries stored as S are computed in.
template <class S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<bfloat16> {
  using type = float;
};
template <>
struct ComputeOf<float16> {
  using type = float;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

}  // namespace spartan::cpu
