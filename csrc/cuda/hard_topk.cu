// Hard top-k by rows: the place in the order of the entries at which the budget runs out, bit by bit.
#include <bit>

#include "../cpu/selection.h"
#include "rows.cuh"

namespace spartan::cuda {
namespace {

using cpu::key_of;

// The order in which entries are taken, as numbers that fall: by ratio, then by index.
struct Order {
  int index_bits;
  int64_t last;

  explicit Order(int64_t length) : index_bits(std::bit_width(static_cast<uint64_t>(length - 1))), last(length - 1) {}
  __device__ uint64_t rank(int64_t i, float u) const {
    return static_cast<uint64_t>(key_of(u)) << index_bits | static_cast<uint64_t>(last - i);
  }
};

// Entries of at least this rank are kept: the smallest rank from which on the costs fit into the budget.
template <int kGroup, class R>
__device__ uint64_t lowest_kept(const R& row, const Order& order, double budget) {
  const int bits = 32 + order.index_bits;
  const bool counted = row.one_cost();
  const double unit = counted ? static_cast<double>(row.unit()) : 1.0;
  uint64_t over = 0, fits = uint64_t(1) << bits;  // from `over` on it is too much, from `fits` on it is not
  double spent_over = INFINITY, spent_fits = 0.0;
  float poison = 0.0f;
  // The first trial is everything; then one bit after another, until a single entry is left between the two.
  for (int bit = bits; bit >= 0 && !(counted && spent_over - spent_fits <= 1.0); --bit) {
    const uint64_t trial = bit == bits ? 0 : over | uint64_t(1) << bit;
    double spent[2] = {0.0, 0.0};
    row.walk_unmasked(
        [&](int64_t i, float u) {
          const float a = row.cost(i);
          spent[0] += order.rank(i, u) >= trial ? (counted ? 1.0 : static_cast<double>(a)) : 0.0;
          poison += u * 0.0f + (a > 0.0f ? a * 0.0f : NAN);
        },
        [] {});
    spent[1] = poison;
    group_sums<kGroup>(spent);
    if (!(budget >= 0.0) || spent[1] != spent[1]) return ~uint64_t(0);  // nothing is kept
    if (spent[0] * unit > budget) {
      over = trial, spent_over = spent[0];
    } else {
      fits = trial, spent_fits = spent[0];
      if (trial == 0) break;
    }
  }
  return fits;
}

template <class T, int kGroup, int kItems>
__global__ void __launch_bounds__(block_threads(kGroup), resident(kGroup, kItems))
    hard_topk_forward_kernel(Rows rows, Order order, const double* budget, uint8_t* mask) {
  for (int64_t r = first_row<kGroup>(); r < rows.rows; r += row_stride<kGroup>()) {
    const Row<T, kGroup, kItems> row(rows, r);
    const uint64_t kept = lowest_kept<kGroup>(row, order, budget[r]);
    auto out = row.written(mask + r * rows.length);
    row.walk([&](int64_t i, int j, float u) { out.put(i, j, !masked(u) && order.rank(i, u) >= kept); });
    out.close();
  }
}

template <class T>
void forward(const Rows& rows, const double* budget, uint8_t* mask, Stream stream) {
  for_length(rows, stream, [&](auto group, auto items, int shared) {
    launch(stream, &hard_topk_forward_kernel<T, group(), items()>, grid_for(rows, group),
           Block(block_threads(group), shared), rows, Order(rows.length), budget, mask);
  });
}

}  // namespace

void hard_topk_rows(Dtype dtype, Rows rows, const double* budget, uint8_t* mask, Stream stream) {
  if (rows.rows == 0 || rows.length == 0) return;
  if (rows.length > int64_t(1) << 31) throw std::invalid_argument("rows must have at most 2^31 entries");
  SPARTAN_CUDA_DISPATCH(forward<T>(rows, budget, mask, stream))
}

}  // namespace spartan::cuda
