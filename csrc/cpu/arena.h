// Memory that the caller gave, handed out in aligned pieces.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "../ops.h"

namespace spartan::cpu {

class Arena {
 public:
  explicit Arena(Workspace workspace)
      : next_(static_cast<char*>(workspace.data)), end_(next_ + workspace.bytes) {}

  template <class U>
  U* take(int64_t count) {
    char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(next_) + 63) & ~uintptr_t(63));
    next_ = aligned + count * static_cast<int64_t>(sizeof(U));
    if (next_ > end_) throw std::logic_error("workspace too small");
    return reinterpret_cast<U*>(aligned);
  }
  Workspace rest() const { return {next_, end_ - next_}; }

  // Everything taken since mark() may be taken again.
  char* mark() const { return next_; }
  void release(char* mark) { next_ = mark; }

 private:
  char* next_;
  char* end_;
};

}  // namespace spartan::cpu
