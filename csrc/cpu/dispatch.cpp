#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "masked_matmul_passes.h"
#include "masked_weight_passes.h"
#include "short_rows.h"
#include "soft_topk_passes.h"
#include "storage_passes.h"

namespace spartan::cpu {

#define SPARTAN_DECLARE(isa)                               \
  namespace isa {                                          \
  const MatmulPasses& matmul();                            \
  const SoftTopkPasses<float>& soft_topk_float();          \
  const SoftTopkPasses<double>& soft_topk_double();        \
  const MaskedWeightPasses<float>& masked_weight_float();  \
  const MaskedWeightPasses<double>& masked_weight_double(); \
  const ShortRows<float>& short_rows_float();              \
  const ShortRows<bfloat16>& short_rows_bfloat16();        \
  const ShortRows<float16>& short_rows_float16();          \
  const StoragePasses& storage_bfloat16();                 \
  const StoragePasses& storage_float16();                  \
  }
SPARTAN_DECLARE(baseline)
#ifdef SPARTAN_X86
SPARTAN_DECLARE(avx2)
SPARTAN_DECLARE(avx512)
#endif
#undef SPARTAN_DECLARE

namespace {

Isa detect() {
  const char* asked = std::getenv("SPARTAN_ISA");
  const auto named = [&](const char* name) { return asked != nullptr && std::strcmp(asked, name) == 0; };
#ifdef SPARTAN_X86
  if (named("baseline")) return Isa::baseline;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && !named("avx2")) return Isa::avx512;
  if (avx2) return Isa::avx2;
#else
  (void)named;
#endif
  return Isa::baseline;
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* instruction_set() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

#ifdef SPARTAN_X86
#define SPARTAN_SELECT(function)                                                                    \
  return isa() == Isa::avx512 ? avx512::function() : isa() == Isa::avx2 ? avx2::function() : baseline::function()
#else
#define SPARTAN_SELECT(function) return baseline::function()
#endif

template <>
const SoftTopkPasses<float>& soft_topk_passes<float>() {
  SPARTAN_SELECT(soft_topk_float);
}
template <>
const SoftTopkPasses<double>& soft_topk_passes<double>() {
  SPARTAN_SELECT(soft_topk_double);
}
const StoragePasses& storage_passes(Dtype dtype) {
  if (dtype == Dtype::bfloat16) SPARTAN_SELECT(storage_bfloat16);
  SPARTAN_SELECT(storage_float16);
}
template <>
const MaskedWeightPasses<float>& masked_weight_passes<float>() {
  SPARTAN_SELECT(masked_weight_float);
}
template <>
const MaskedWeightPasses<double>& masked_weight_passes<double>() {
  SPARTAN_SELECT(masked_weight_double);
}
template <>
const ShortRows<float>& short_rows<float>() {
  SPARTAN_SELECT(short_rows_float);
}
template <>
const ShortRows<bfloat16>& short_rows<bfloat16>() {
  SPARTAN_SELECT(short_rows_bfloat16);
}
template <>
const ShortRows<float16>& short_rows<float16>() {
  SPARTAN_SELECT(short_rows_float16);
}

const MatmulPasses& matmul_passes() { SPARTAN_SELECT(matmul); }

}  // namespace spartan::cpu
