// Choosing the element type and the instruction set.
#pragma once

#include "../ops.h"
#include "storage.h"

// Runs `call` with T naming the element type of `dtype`.
#define SPARTAN_DISPATCH(call)   \
  if (dtype == Dtype::float64) { \
    using T = double;            \
    call;                        \
  } else {                       \
    using T = float;             \
    call;                        \
  }

// The same for rows, with S naming what is stored.
#define SPARTAN_DISPATCH_STORAGE(...)     \
  if (dtype == Dtype::float64) {          \
    using S = double;                     \
    __VA_ARGS__;                          \
  } else if (dtype == Dtype::bfloat16) {  \
    using S = bfloat16;                   \
    __VA_ARGS__;                          \
  } else if (dtype == Dtype::float16) {   \
    using S = float16;                    \
    __VA_ARGS__;                          \
  } else {                                \
    using S = float;                      \
    __VA_ARGS__;                          \
  }

namespace spartan::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best this machine has and this build holds, or the lower one that SPARTAN_ISA names. Read once.
Isa isa();

}  // namespace spartan::cpu
