// Choosing the element type and the instruction set.
#pragma once

#include "../ops.h"

// Runs `call` with T naming the element type of `dtype`.
#define SPARTAN_DISPATCH(call)   \
  if (dtype == Dtype::float64) { \
    using T = double;            \
    call;                        \
  } else {                       \
    using T = float;             \
    call;                        \
  }

namespace spartan::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best this machine has and this build holds, or the lower one that SPARTAN_ISA names. Read once.
Isa isa();

}  // namespace spartan::cpu
