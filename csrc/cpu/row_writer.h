// What a product does with its sums while they are in the cache.
#pragma once

#include "block_lines.h"
#include "huge_pages.h"

namespace spartan::cpu {

constexpr int64_t kStreamBytes = 4 << 20;  // results larger than this are written around the cache

// Rows of z to y = act(z), and to `saved` where the backward pass needs them, in the type of y.
class RowWriter {
 public:
  RowWriter(Dtype dtype, int64_t extent, int64_t tokens, Activation activation, void* y, void* saved)
      : passes_(matmul_passes()), dtype_(dtype), extent_(extent), activation_(activation), y_(y), saved_(saved),
        stream_(tokens * extent * element_bytes(dtype) > kStreamBytes) {}

  // Where z itself may be written, entry `first` on, if y is nothing else; null: call write().
  float* direct(int64_t first) const {
    return dtype_ == Dtype::float32 && activation_ == Activation::none ? static_cast<float*>(y_) + first : nullptr;
  }
  void prepare(int64_t tokens) const {
    if (stream_) advise_huge_pages(y_, tokens * extent_ * element_bytes(dtype_));
  }
  // `columns` entries of each row from `first` on; z is lost.
  void write(float* z, int64_t stride, int64_t tokens, int64_t columns, int64_t first) const {
    for (int64_t t = 0; t < tokens; ++t, z += stride, first += extent_) {
      if (saved_ != nullptr) passes_.narrow(dtype_, z, offset_by(saved_, first, dtype_), columns, stream_);
      passes_.activate(activation_, z, columns);
      passes_.narrow(dtype_, z, offset_by(y_, first, dtype_), columns, stream_);
    }
  }
  // Before another thread reads what was written around the cache.
  void settle() const {
    if (stream_) passes_.settle();
  }

 private:
  const MatmulPasses& passes_;
  Dtype dtype_;
  int64_t extent_;
  Activation activation_;
  void *y_, *saved_;
  bool stream_;
};

}  // namespace spartan::cpu
