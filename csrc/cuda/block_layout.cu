// The active blocks of a gate by rows and by columns of blocks: count, then fill. One warp has one line of the gate.
#include "common.cuh"

namespace spartan::cuda {
namespace {

constexpr int kLines = kThreads / kWarp;

// A row of the grid, or past the rows, a column.
struct Line {
  int64_t first, step, length;

  __device__ Line(int64_t line, int64_t grid_rows, int64_t grid_columns)
      : first(line < grid_rows ? line * grid_columns : line - grid_rows), step(line < grid_rows ? 1 : grid_columns),
        length(line < grid_rows ? grid_columns : grid_rows) {}
};

// What is not a zero in every bit but the sign is active, NaN too.
template <class U>
__device__ inline bool active_at(const U* gate, const uint8_t* mask, U magnitude, int64_t at) {
  return (gate[at] & magnitude) != 0 && (mask == nullptr || mask[at] != 0);
}

__device__ inline int warp_sum(int x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <class U>
__global__ void __launch_bounds__(kThreads) layout_count_kernel(const U* gate, const uint8_t* mask, U magnitude,
                                                                int64_t grid_rows, int64_t grid_columns, int32_t* counts) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kLines + threadIdx.x / kWarp;
  if (index >= grid_rows + grid_columns) return;
  const Line line(index, grid_rows, grid_columns);
  int count = 0;
  for (int64_t i = threadIdx.x % kWarp; i < line.length; i += kWarp)
    count += active_at(gate, mask, magnitude, line.first + i * line.step);
  count = warp_sum(count);
  if (threadIdx.x % kWarp == 0) counts[index] = count;
}

// Each line adds up the counts before it, writes its indices there, and zeros in its share of what no line fills. Its place in
// the order is the number of lines that are longer, or as long and before it.
template <class U>
__global__ void __launch_bounds__(kThreads)
    layout_fill_kernel(const U* gate, const uint8_t* mask, U magnitude, int64_t grid_rows, int64_t grid_columns,
                       const int32_t* counts, int32_t* row_offsets, int32_t* column_indices, int32_t* column_offsets,
                       int32_t* row_indices, int32_t* order) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kLines + threadIdx.x / kWarp;
  if (index >= grid_rows + grid_columns) return;
  const Line line(index, grid_rows, grid_columns);
  const bool by_row = index < grid_rows;
  const int64_t begin = by_row ? 0 : grid_rows, lines = by_row ? grid_rows : grid_columns, number = index - begin;
  int32_t* offsets = by_row ? row_offsets : column_offsets;
  int32_t* indices = by_row ? column_indices : row_indices;
  const int lane = static_cast<int>(threadIdx.x % kWarp);

  int before = 0, all = 0, longer = 0;
  const int own = counts[index];
  for (int64_t i = lane; i < lines; i += kWarp) {
    const int count = counts[begin + i];
    all += count;
    if (i < number) before += count;
    longer += count > own || (count == own && i < number);
  }
  before = warp_sum(before);
  all = warp_sum(all);
  longer = warp_sum(longer);
  if (lane == 0) {
    order[begin + longer] = static_cast<int32_t>(number);
    offsets[number] = before;
    if (number == lines - 1) offsets[lines] = all;
  }
  int place = before;
  for (int64_t start = 0; start < line.length; start += kWarp) {
    const int64_t i = start + lane;
    const bool active = i < line.length && active_at(gate, mask, magnitude, line.first + i * line.step);
    const unsigned found = __ballot_sync(0xffffffffu, active);
    if (active) indices[place + __popc(found & ((1u << lane) - 1))] = static_cast<int32_t>(i);
    place += __popc(found);
  }
  const int64_t share = number * line.length;
  for (int64_t i = lane; i < line.length; i += kWarp)
    if (share + i >= all) indices[share + i] = 0;
}

template <class U>
void layout_of(const void* gate, U magnitude, const uint8_t* mask, int64_t grid_rows, int64_t grid_columns, int32_t* counts,
               int32_t* row_offsets, int32_t* column_indices, int32_t* column_offsets, int32_t* row_indices, int32_t* order,
               Stream stream) {
  const unsigned grid = blocks_for(grid_rows + grid_columns, kLines);
  const U* bits = static_cast<const U*>(gate);
  launch(stream, &layout_count_kernel<U>, grid, kThreads, bits, mask, magnitude, grid_rows, grid_columns, counts);
  launch(stream, &layout_fill_kernel<U>, grid, kThreads, bits, mask, magnitude, grid_rows, grid_columns, counts, row_offsets,
         column_indices, column_offsets, row_indices, order);
}

}  // namespace

void block_layout(const void* gate, int gate_bytes, const uint8_t* mask, int64_t grid_rows, int64_t grid_columns,
                  int32_t* counts, int32_t* row_offsets, int32_t* column_indices, int32_t* column_offsets,
                  int32_t* row_indices, int32_t* order, Stream stream) {
  if (grid_rows * grid_columns >= int64_t(1) << 31) throw std::invalid_argument("a gate must have fewer than 2^31 entries");
  const auto as = [&](auto magnitude) {
    layout_of(gate, magnitude, mask, grid_rows, grid_columns, counts, row_offsets, column_indices, column_offsets, row_indices,
              order, stream);
  };
  if (gate_bytes == 8) as(~uint64_t(0) >> 1);
  else if (gate_bytes == 4) as(~uint32_t(0) >> 1);
  else if (gate_bytes == 2) as(uint16_t(0x7fff));
  else as(uint8_t(0xff));
}

}  // namespace spartan::cuda
