#include <algorithm>
#include <numeric>

#include "../ops.h"

namespace spartan::cpu {
namespace {

// Lines from the one with most blocks, of `length` at most, to that with fewest, equal ones as they come.
void longest_first(const int32_t* offsets, int64_t lines, int64_t length, int32_t* counts, int32_t* order) {
  const auto count = [&](int64_t i) -> int32_t& { return counts[length - (offsets[i + 1] - offsets[i])]; };
  std::fill_n(counts, length + 1, 0);
  for (int64_t i = 0; i < lines; ++i) ++count(i);
  std::exclusive_scan(counts, counts + length + 1, counts, 0);
  for (int64_t i = 0; i < lines; ++i) order[count(i)++] = static_cast<int32_t>(i);
}

template <class U>
void layout_of(const U* gate, U magnitude, const uint8_t* mask, int64_t grid_rows, int64_t grid_columns, int32_t* counts,
               int32_t* row_offsets, int32_t* column_indices, int32_t* column_offsets, int32_t* row_indices, int32_t* order) {
  const int64_t all = grid_rows * grid_columns;
  std::fill_n(column_offsets, grid_columns + 1, 0);
  int32_t count = 0;
  for (int64_t i = 0; i < grid_rows; ++i) {
    row_offsets[i] = count;
    for (int64_t j = 0; j < grid_columns; ++j) {
      const int64_t b = i * grid_columns + j;
      if ((gate[b] & magnitude) == 0 || (mask != nullptr && mask[b] == 0)) continue;
      column_indices[count++] = static_cast<int32_t>(j);
      ++column_offsets[j + 1];
    }
  }
  row_offsets[grid_rows] = count;
  for (int64_t j = 0; j < grid_columns; ++j) column_offsets[j + 1] += column_offsets[j];
  // each column's next free place is kept in its offset while it is filled, and moved back after
  for (int64_t i = 0; i < grid_rows; ++i)
    for (int32_t e = row_offsets[i]; e < row_offsets[i + 1]; ++e)
      row_indices[column_offsets[column_indices[e]]++] = static_cast<int32_t>(i);
  for (int64_t j = grid_columns; j > 0; --j) column_offsets[j] = column_offsets[j - 1];
  column_offsets[0] = 0;
  std::fill(column_indices + count, column_indices + all, 0);
  std::fill(row_indices + count, row_indices + all, 0);
  longest_first(row_offsets, grid_rows, grid_columns, counts, order);
  longest_first(column_offsets, grid_columns, grid_rows, counts, order + grid_rows);
}

}  // namespace

void block_layout(const void* gate, int gate_bytes, const uint8_t* mask, int64_t grid_rows, int64_t grid_columns,
                  int32_t* counts, int32_t* row_offsets, int32_t* column_indices, int32_t* column_offsets,
                  int32_t* row_indices, int32_t* order) {
  const auto as = [&](auto* bits, auto magnitude) {
    layout_of(bits, magnitude, mask, grid_rows, grid_columns, counts, row_offsets, column_indices, column_offsets, row_indices,
              order);
  };
  // every bit but the sign: what is not a zero is active, NaN too
  if (gate_bytes == 8) as(static_cast<const uint64_t*>(gate), ~uint64_t(0) >> 1);
  else if (gate_bytes == 4) as(static_cast<const uint32_t*>(gate), ~uint32_t(0) >> 1);
  else if (gate_bytes == 2) as(static_cast<const uint16_t*>(gate), uint16_t(0x7fff));
  else as(static_cast<const uint8_t*>(gate), uint8_t(0xff));
}

}  // namespace spartan::cpu
