// Soft and hard top-k of rows so short that many are solved at once, one in each lane of a vector.
#pragma once

#include <cstdint>

#include "../ops.h"
#include "storage.h"

namespace spartan::cpu {

// Rows up to this length are solved in lanes: two blocks of them fit into the first-level cache.
constexpr int kLongestLane = 256;

// Up to ShortRows::lanes rows, or ::together; the pointers are to the first of them.
template <class S>
struct RowBlock {
  const S* values;
  int64_t stride;        // from row to row
  int64_t readable;      // entries from `values` on that are memory of the tensor, in this block or past it
  const S* costs;        // null: every entry costs `cost`
  int64_t cost_stride;   // 0: the rows share their costs
  int64_t cost_readable;
  double cost;
  int64_t length;
  int count;

  // Without its first rows.
  RowBlock from(int row) const {
    RowBlock rest = *this;
    rest.values += row * stride;
    rest.readable -= row * stride;
    if (costs != nullptr) rest.costs += row * cost_stride;
    rest.cost_readable -= row * cost_stride;
    rest.count -= row;
    return rest;
  }
};

// Masks and gradients are written without gaps between the rows. A bit that is set in a result stands for a row that was left
// unsolved, because its values, costs or budget are out of range or its search did not end.
template <class S>
struct ShortRows {
  int lanes, together;  // rows of a block; of a block for `soft`
  uint32_t (*soft)(const RowBlock<S>&, RowBudgets, double beta, S* mask, double* threshold);
  void (*soft_backward)(const RowBlock<S>&, const S* grad, double beta, const RowGradient&, S* grad_values, S* grad_costs);
  // Equal costs only.
  uint32_t (*hard)(const RowBlock<S>&, RowBudgets, uint8_t* mask);
  void (*widen)(const S* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, S* to);
};

// The table for the best instruction set of this machine.
template <class S>
const ShortRows<S>& short_rows();

}  // namespace spartan::cpu
