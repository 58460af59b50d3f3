// Entries as they lie in memory: in the type that is computed in, or in 16 bits, read and written through a buffer that
// stays in the first cache. So every loop is compiled for float and double alone, and no tensor is copied.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../ops.h"

namespace spartan::cpu {

struct StoragePasses {
  void (*widen)(const void* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, void* to, bool past_cache);
};

// For bfloat16 or float16, on the best instruction set of this machine.
const StoragePasses& storage_passes(Dtype);

constexpr int64_t kBuffer = 2048;  // entries

template <class T>
class Storage {
 public:
  explicit Storage(Dtype dtype)
      : narrow_(dtype == Dtype::bfloat16 || dtype == Dtype::float16 ? &storage_passes(dtype) : nullptr) {}

  // Whether entries are stored in T: then no buffer is used, and runs may be of any length.
  bool direct() const { return narrow_ == nullptr; }
  int64_t bytes() const { return direct() ? static_cast<int64_t>(sizeof(T)) : 2; }

  // The `count` entries from `at` on; null where there is no array.
  const T* read(const void* array, int64_t at, int64_t count, T* buffer) const {
    if (array == nullptr || direct()) return array == nullptr ? nullptr : static_cast<const T*>(array) + at;
    if constexpr (std::is_same_v<T, float>) narrow_->widen(static_cast<const uint16_t*>(array) + at, count, buffer);
    return buffer;
  }

  // Where to write entries from `at` on, and after that: bring them from there to the array.
  T* target(void* array, int64_t at, T* buffer) const {
    return array == nullptr || !direct() ? (array == nullptr ? nullptr : buffer) : static_cast<T*>(array) + at;
  }
  void put(const T* entries, int64_t count, void* array, int64_t at, bool past_cache) const {
    if (array == nullptr || direct()) return;
    if constexpr (std::is_same_v<T, float>) narrow_->narrow(entries, count, static_cast<uint16_t*>(array) + at, past_cache);
  }

 private:
  const StoragePasses* narrow_;
};

}  // namespace spartan::cpu
