// The entries of a row that are not masked by -inf, side by side: a masked entry is as if it were not there.
#pragma once

#include <limits>

#include "arena.h"
#include "soft_topk_passes.h"

namespace spartan::cpu {

template <class T>
class Unmasked {
 public:
  // NaN stays, to be refused.
  Unmasked(const Span<T>& all, Arena* arena) : all_(all), arena_(arena), values_(arena->take<T>(all.length)) {
    if (all.costs != nullptr) costs_ = arena->take<T>(all.length);
    for (int64_t i = 0; i < all.length; ++i) {
      values_[count_] = all.values[i];
      if (costs_ != nullptr) costs_[count_] = all.costs[i];
      count_ += kept(i);
    }
  }

  int64_t count() const { return count_; }
  bool any() const { return count_ < all_.length; }
  Span<T> span() const { return {values_, costs_, all_.cost, count_, all_.absolute}; }

  // What belongs to the entries of `span`, of all entries in turn; and back, 0 for those that are left out.
  T* gather(const T* from) const {
    T* to = arena_->take<T>(all_.length);
    int64_t count = 0;
    for (int64_t i = 0; i < all_.length; ++i) {
      to[count] = from[i];
      count += kept(i);
    }
    return to;
  }
  template <class U>
  U* room() const {
    return arena_->take<U>(all_.length);
  }
  template <class U>
  void scatter(const U* from, U* to) const {
    for (int64_t i = 0; i < all_.length; ++i) {
      to[i] = kept(i) ? *from : U(0);
      from += kept(i);
    }
  }

 private:
  bool kept(int64_t i) const { return all_.values[i] != -std::numeric_limits<T>::infinity(); }

  Span<T> all_;
  Arena* arena_;
  T* values_;
  T* costs_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace spartan::cpu
