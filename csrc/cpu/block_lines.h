// A block-sparse matrix as products read it: lines of active blocks.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>

#include "masked_matmul_passes.h"
#include "parallel.h"

namespace spartan::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }
inline const char* offset_by(const void* base, int64_t elements, Dtype dtype) {
  return static_cast<const char*>(base) + elements * element_bytes(dtype);
}
inline char* offset_by(void* base, int64_t elements, Dtype dtype) {
  return static_cast<char*>(base) + elements * element_bytes(dtype);
}

// A block matrix as a product reads it: lines of blocks, each with its active blocks across the other dimension. For
// y = x w^T a line is a row of blocks; for dx = dz w it is a column.
struct Lines {
  const BlockMatrix& w;
  bool by_row;
  const int32_t *offsets, *indices;
  int64_t count, span, extent;             // lines, outputs of a line, all outputs
  int64_t other_span, other_extent;        // of one block across, of all

  Lines(const BlockMatrix& matrix, bool rows)
      : w(matrix), by_row(rows), offsets(rows ? w.layout.row_offsets : w.layout.column_offsets),
        indices(rows ? w.layout.column_indices : w.layout.row_indices), span(rows ? w.rows : w.columns),
        extent(rows ? w.out : w.in), other_span(rows ? w.columns : w.rows), other_extent(rows ? w.in : w.out) {
    count = ceil_div(extent, span);
  }

  int64_t outputs(int64_t line) const { return std::min(span, extent - line * span); }
  ActiveBlocks active(int64_t line) const {
    return {indices + offsets[line], offsets[line + 1] - offsets[line], other_span, other_extent};
  }
  // Where the block of entry e begins in the data, in elements, and its gate.
  int64_t begin(int64_t line, int64_t e) const {
    const int64_t i = by_row ? line : indices[e], j = by_row ? indices[e] : line;
    if (w.positions == nullptr) return i * w.rows * w.stride + j * w.columns;
    return (by_row ? e : w.positions[e]) * w.rows * w.columns;
  }
  float gate(int64_t line, int64_t e) const {
    if (w.gate == nullptr) return 1.0f;
    const int64_t i = by_row ? line : indices[e], j = by_row ? indices[e] : line;
    return w.gate[i * ceil_div(w.in, w.columns) + j];
  }
  int64_t stride() const { return w.positions == nullptr ? w.stride : w.columns; }
  // Floats of the panels of a line's outputs, for each column across.
  int64_t padded(const MatmulPasses& passes) const {
    int64_t width = 0;
    for (int64_t done = 0; done < span;) {
      const int panel = passes.panel_width(span - done);
      width += panel;
      done += panel;
    }
    return width;
  }
  int64_t blocks() const { return offsets[count]; }
};

constexpr int64_t kPackedFloats = 2 << 20;  // of weights packed at a time

// Floats for the packed blocks of as many lines as are packed at a time, of `block_floats` each.
inline int64_t packed_floats(const Lines& lines, int64_t block_floats) {
  int64_t fullest = 0;
  for (int64_t line = 0; line < lines.count; ++line)
    fullest = std::max<int64_t>(fullest, lines.offsets[line + 1] - lines.offsets[line]);
  return std::min(lines.blocks() * block_floats, std::max(kPackedFloats, fullest * block_floats));
}

// The end of the lines from `begin` on that fit into packed_floats().
inline int64_t packed_end(const Lines& lines, int64_t block_floats, int64_t begin) {
  const int64_t room = std::max(kPackedFloats / block_floats, int64_t(1));
  int64_t end = begin + 1;
  while (end < lines.count && lines.offsets[end + 1] - lines.offsets[begin] <= room) ++end;
  return end;
}

// What a product takes, in multiply-adds: of the active weights, of reading them, of the tokens' values going in and out.
inline int64_t product_work(int64_t active, int64_t out, int64_t in, int64_t tokens) {
  constexpr int64_t kReadCost = 10;
  return active * (tokens + kReadCost) + tokens * (out + in);
}
inline int64_t product_work(const Lines& lines, int64_t tokens) {
  return product_work(lines.blocks() * lines.span * lines.other_span, lines.extent, lines.other_extent, tokens);
}

// The first line from which the lines up to `end` weigh at most the share `part` of `parts`; a line weighs its blocks and one
// more for its outputs.
inline int64_t split_lines(const Lines& lines, int64_t begin, int64_t end, int64_t part, int64_t parts) {
  const auto weight = [&](int64_t line) { return static_cast<int64_t>(lines.offsets[line]) + line; };
  const int64_t target = weight(begin) + (weight(end) - weight(begin)) * part / parts;
  int64_t low = begin, high = end;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    weight(middle) < target ? low = middle + 1 : high = middle;
  }
  return low;
}

// Each worker takes items from one counter and has scratch of its own.
template <class F>
void for_items(int threads, int64_t items, F&& f) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::clamp<int64_t>(items, 1, threads);
  parallel_for(static_cast<int>(workers), workers, [&](int64_t worker) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) f(worker, item);
  });
}

[[noreturn]] inline void refuse_index() {
  throw std::invalid_argument("layout must be the index of the weight's blocks; it was changed since it was made");
}

// Throws unless the index lies within the matrix: one that was written over would have the product read anything.
inline void require_fit(const Lines& lines) {
  const BlockMatrix& w = lines.w;
  const int64_t across = ceil_div(lines.other_extent, lines.other_span), all = lines.count * across;
  const int64_t stored = w.positions == nullptr ? all : std::min(w.stored, all);
  bool fits = lines.offsets[0] == 0;
  for (int64_t i = 0; i < lines.count; ++i) fits &= lines.offsets[i] <= lines.offsets[i + 1];
  const int64_t active = lines.offsets[lines.count];
  fits = fits && active <= stored;
  if (!fits) refuse_index();
  const MatmulPasses& passes = matmul_passes();
  fits = passes.within(lines.indices, active, across) &&
         (lines.by_row || w.positions == nullptr || passes.within(w.positions, active, stored));
  if (!fits) refuse_index();
}

}  // namespace spartan::cpu
