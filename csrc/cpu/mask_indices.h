// Indices of what a mask keeps.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "storage.h"

namespace spartan::cpu {

inline bool is_masked(bfloat16 x) { return x.bits == 0xff80; }
inline bool is_masked(float16 x) { return x.bits == 0xfc00; }
template <class T>
bool is_masked(T x) {
  return x == -std::numeric_limits<T>::infinity();
}

// Indices of the bytes that are 1, ascending, until there are k. Returns how many.
inline int64_t set_indices(const uint8_t* mask, int64_t length, int64_t k, int64_t* out) {
  int64_t count = 0, i = 0;
  while (i < length && count < k) {
    uint64_t word = 1;
    const bool whole = i + 8 <= length;
    if (whole) std::memcpy(&word, mask + i, sizeof word);
    if (word == 0) {
      i += 8;
    } else if (whole && count + 8 <= k) {  // no branch on a byte: which are 1 is not to be foreseen
      for (int j = 0; j < 8; ++j, ++i) {
        out[count] = i;
        count += mask[i];
      }
    } else {
      if (mask[i] != 0) out[count++] = i;
      ++i;
    }
  }
  return count;
}

// k indices of a row, ascending: those of its mask and, where they are fewer, the first masked entries too.
template <class S>
void row_indices(const S* values, const uint8_t* mask, int64_t length, int64_t k, int64_t* out) {
  const int64_t kept = set_indices(mask, length, k, out);
  if (kept == k) return;
  int64_t missing = k - kept, count = 0;
  for (int64_t i = 0; i < length; ++i) {
    const bool fills = missing > 0 && is_masked(values[i]);
    if (mask[i] == 0 && !fills) continue;
    missing -= fills;
    out[count++] = i;
  }
}

}  // namespace spartan::cpu
