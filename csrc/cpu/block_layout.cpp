#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <utility>

#include "../ops.h"
#include "parallel.h"

namespace spartan::cpu {
namespace {

constexpr int64_t kLeast = 1 << 16;  // entries that are worth a thread
constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f, kOnes = 0x0101010101010101;

// 1 in each byte that is not zero.
uint64_t bytes_set(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return ((((word & kLow) + kLow) | word) & ~kLow) >> 7;
}

// A row's gates and mask.
template <class U>
struct Row {
  const U* gate;
  U magnitude;
  const uint8_t* mask;
  int64_t columns;

  // Whole words of bytes can be looked at together.
  static constexpr bool kWords = sizeof(U) == 1 && std::endian::native == std::endian::little;

  bool active(int64_t j) const { return (gate[j] & magnitude) != 0 && (mask == nullptr || mask[j] != 0); }
  uint64_t word(int64_t j) const { return mask == nullptr ? bytes_set(gate + j) : bytes_set(gate + j) & bytes_set(mask + j); }

  int32_t count() const {
    int32_t count = 0;
    int64_t j = 0;
    if constexpr (kWords) {
      for (; j + 8 <= columns; j += 8) count += static_cast<int32_t>((word(j) * kOnes) >> 56);
    }
    for (; j < columns; ++j) count += active(j);
    return count;
  }

  // Calls f(j) for each active one, of 64 at a time: whether there are more is guessed wrongly about once a time.
  template <class F>
  void each(F&& f) const {
    int64_t j = 0;
    if constexpr (kWords) {
      for (; j + 64 <= columns; j += 64) {
        uint64_t bits = 0;
        for (int64_t k = 0; k < 8; ++k) bits |= ((word(j + 8 * k) * 0x0102040810204080) >> 56) << (8 * k);
        for (; bits != 0; bits &= bits - 1) f(j + std::countr_zero(bits));
      }
    }
    for (; j < columns; ++j)
      if (active(j)) f(j);
  }
};

// Lines from the one with most blocks, of `length` at most, to that with fewest, equal ones as they come.
void longest_first(const int32_t* offsets, int64_t lines, int64_t length, int32_t* counts, int32_t* order) {
  const auto count = [&](int64_t i) -> int32_t& { return counts[length - (offsets[i + 1] - offsets[i])]; };
  std::fill_n(counts, length + 1, 0);
  for (int64_t i = 0; i < lines; ++i) ++count(i);
  std::exclusive_scan(counts, counts + length + 1, counts, 0);
  for (int64_t i = 0; i < lines; ++i) order[count(i)++] = static_cast<int32_t>(i);
}

// The rows in shares, one for each worker: f(worker, begin, end).
template <class F>
void for_rows(int64_t grid_rows, int workers, F&& f) {
  parallel_for(workers, workers, [&](int64_t worker) {
    f(worker, grid_rows * worker / workers, grid_rows * (worker + 1) / workers);
  });
}

int workers_of(int64_t grid_rows, int64_t grid_columns, int threads) {
  const int64_t most = std::max<int64_t>(std::min<int64_t>(threads, grid_rows), 1);
  return static_cast<int>(std::clamp<int64_t>(grid_rows * grid_columns / kLeast, 1, most));
}

// Calls f(gate, magnitude), the gates as numbers of their size, of which every bit counts but the sign.
template <class F>
void with_gates(const ActiveGates& active, F&& f) {
  if (active.gate_bytes == 8) f(static_cast<const uint64_t*>(active.gate), ~uint64_t(0) >> 1);
  else if (active.gate_bytes == 4) f(static_cast<const uint32_t*>(active.gate), ~uint32_t(0) >> 1);
  else if (active.gate_bytes == 2) f(static_cast<const uint16_t*>(active.gate), uint16_t(0x7fff));
  else f(static_cast<const uint8_t*>(active.gate), uint8_t(0xff));
}

template <class U>
Row<U> row_of(const ActiveGates& active, const U* gate, U magnitude, int64_t i) {
  const int64_t begin = i * active.grid_columns;
  return {gate + begin, magnitude, active.mask == nullptr ? nullptr : active.mask + begin, active.grid_columns};
}

// Each worker has counts of the columns of its own: the entries of a column lie in the order of its rows.
void index_columns(const ActiveGates& active, const LayoutIndex& index, int workers, int32_t* counts) {
  const int64_t columns = active.grid_columns;
  for_rows(active.grid_rows, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    int32_t* count = counts + worker * columns;
    std::fill_n(count, columns, 0);
    for (int32_t e = index.row_offsets[begin]; e < index.row_offsets[end]; ++e) ++count[index.column_indices[e]];
  });
  int32_t place = 0;
  for (int64_t j = 0; j < columns; ++j) {
    index.column_offsets[j] = place;
    for (int worker = 0; worker < workers; ++worker) {
      const int32_t count = std::exchange(counts[worker * columns + j], place);
      place += count;
    }
  }
  index.column_offsets[columns] = place;
  for_rows(active.grid_rows, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    int32_t* next = counts + worker * columns;
    for (int64_t i = begin; i < end; ++i)
      for (int32_t e = index.row_offsets[i]; e < index.row_offsets[i + 1]; ++e)
        index.row_indices[next[index.column_indices[e]]++] = static_cast<int32_t>(i);
  });
}

}  // namespace

int64_t block_layout_rows(const ActiveGates& active, int32_t* row_offsets, int threads) {
  const int64_t rows = active.grid_rows;
  row_offsets[0] = 0;
  with_gates(active, [&](const auto* gate, auto magnitude) {
    for_rows(rows, workers_of(rows, active.grid_columns, threads), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) row_offsets[i + 1] = row_of(active, gate, magnitude, i).count();
    });
  });
  std::inclusive_scan(row_offsets, row_offsets + rows + 1, row_offsets);
  return row_offsets[rows];
}

int64_t block_layout_scratch(int64_t grid_rows, int64_t grid_columns, int threads) {
  return std::max(grid_rows + grid_columns + 2, workers_of(grid_rows, grid_columns, threads) * grid_columns);
}

void block_layout(const ActiveGates& active, const LayoutIndex& index, int64_t capacity, int32_t* scratch, int threads) {
  const int64_t rows = active.grid_rows, columns = active.grid_columns, count = index.row_offsets[rows];
  const int workers = workers_of(rows, columns, threads);
  with_gates(active, [&](const auto* gate, auto magnitude) {
    for_rows(rows, workers, [&](int64_t, int64_t begin, int64_t end) {
      int32_t* next = index.column_indices + index.row_offsets[begin];
      for (int64_t i = begin; i < end; ++i)
        row_of(active, gate, magnitude, i).each([&](int64_t j) { *next++ = static_cast<int32_t>(j); });
    });
  });
  std::fill(index.column_indices + count, index.column_indices + capacity, 0);
  if (index.column_offsets == nullptr) return;
  index_columns(active, index, workers, scratch);
  std::fill(index.row_indices + count, index.row_indices + capacity, 0);
  if (index.order == nullptr) return;
  longest_first(index.row_offsets, rows, columns, scratch, index.order);
  longest_first(index.column_offsets, columns, rows, scratch, index.order + rows);
}

}  // namespace spartan::cpu
