#include "masked_weight_passes.h"

#include <algorithm>

#include "../ops.h"
#include "dispatch.h"
#include "parallel.h"

namespace spartan::cpu {
namespace {

constexpr int64_t kMinItem = 16384;  // weights that one call of a pass should have at least

template <class T>
class BlockLoop {
 public:
  BlockLoop(const Blocks& blocks, int threads) : b_(blocks), threads_(threads) {
    block_rows_ = (b_.out + b_.rows - 1) / b_.rows;
    per_row_ = (b_.in + b_.columns - 1) / b_.columns * b_.kernel;
    // Unstructured weights are one long row, cut where it suits; blocks are walked by rows of blocks.
    flat_ = b_.rows == 1 && b_.columns == 1;
    const int64_t worth = std::max<int64_t>((b_.out * b_.in * b_.kernel + kMinItem - 1) / kMinItem, 1);
    items_ = flat_ ? worth : block_rows_;
    threads_ = static_cast<int>(std::min<int64_t>(threads, worth));
  }

  int64_t items() const { return items_; }
  int64_t scratch() const { return flat_ ? 0 : 2 * per_row_; }

  // Calls f(item, row, offset of its first weight, offset of its first block).
  template <class F>
  void run(const T* soft, const uint8_t* hard, const T* costs, double cost, double beta, F&& f) const {
    parallel_for(threads_, items_, [&](int64_t item) {
      const int64_t length = b_.in * b_.kernel;
      int64_t weight = item * b_.rows * length, block = item * per_row_;
      BlockRow<T> row{std::min(b_.rows, b_.out - item * b_.rows), b_.in, b_.kernel, b_.columns, nullptr, nullptr, nullptr,
                      static_cast<T>(cost), static_cast<T>(beta)};
      if (flat_) {
        const int64_t total = b_.out * length;
        weight = block = item * kMinItem;
        row.rows = row.kernel = 1;
        row.in = std::min(kMinItem, total - weight);
      }
      row.soft = soft != nullptr ? soft + block : nullptr;
      row.hard = hard != nullptr ? hard + block : nullptr;
      row.costs = costs != nullptr ? costs + block : nullptr;
      f(item, row, weight, block);
    });
  }

 private:
  Blocks b_;
  int threads_;
  int64_t block_rows_, per_row_, items_;
  bool flat_;
};

template <class T>
void forward(Blocks blocks, const void* weight, Masks masks, void* result, int threads) {
  const T* w = static_cast<const T*>(weight);
  T* out = static_cast<T*>(result);
  BlockLoop<T>(blocks, threads)
      .run(static_cast<const T*>(masks.soft), masks.hard, nullptr, 1, 0,
           [&](int64_t, const BlockRow<T>& row, int64_t at, int64_t) {
             masked_weight_passes<T>().forward(row, w + at, out + at);
           });
}

template <class T>
void backward(Blocks blocks, const void* grad, const void* weight, Masks masks, double beta, BlockCosts costs,
              bool straight_through, void* result, Workspace workspace, int threads) {
  const BlockLoop<T> loop(blocks, threads);
  T* scratch = static_cast<T*>(workspace.data);
  loop.run(static_cast<const T*>(masks.soft), masks.hard, static_cast<const T*>(costs.array), costs.cost, beta,
           [&](int64_t item, const BlockRow<T>& row, int64_t at, int64_t) {
             masked_weight_passes<T>().backward(row, static_cast<const T*>(grad) + at, static_cast<const T*>(weight) + at,
                                                straight_through, static_cast<T*>(result) + at,
                                                scratch + item * loop.scratch());
           });
}

template <class T>
void coupling(Blocks blocks, const void* grad, const void* weight, const void* soft, double beta, BlockCosts costs,
              double* sums, Workspace workspace, int threads) {
  const BlockLoop<T> loop(blocks, threads);
  auto* partials = static_cast<CouplingSums*>(workspace.data);
  T* scratch = reinterpret_cast<T*>(partials + loop.items());
  loop.run(static_cast<const T*>(soft), nullptr, static_cast<const T*>(costs.array), costs.cost, beta,
           [&](int64_t item, const BlockRow<T>& row, int64_t at, int64_t) {
             partials[item] =
                 masked_weight_passes<T>().coupling(row, static_cast<const T*>(grad) + at,
                                                    static_cast<const T*>(weight) + at, scratch + item * loop.scratch());
           });
  CouplingSums total;
  for (int64_t item = 0; item < loop.items(); ++item) total += partials[item];
  sums[0] = total.coupled;
  sums[1] = total.slope;
}

template <class T>
void correct(Blocks blocks, void* grad, const void* weight, const void* soft, double scale, int threads) {
  BlockLoop<T>(blocks, threads)
      .run(static_cast<const T*>(soft), nullptr, nullptr, 1, 0, [&](int64_t, const BlockRow<T>& row, int64_t at, int64_t) {
        masked_weight_passes<T>().correct(row, static_cast<T*>(grad) + at, static_cast<const T*>(weight) + at,
                                          static_cast<T>(scale));
      });
}

template <class T>
void add_signs(Blocks blocks, void* grad, const void* weight, const void* pull, int threads) {
  BlockLoop<T>(blocks, threads)
      .run(static_cast<const T*>(pull), nullptr, nullptr, 1, 0, [&](int64_t, const BlockRow<T>& row, int64_t at, int64_t) {
        masked_weight_passes<T>().add_signs(row, static_cast<T*>(grad) + at, static_cast<const T*>(weight) + at);
      });
}

template <class T>
void scores(Blocks blocks, const void* weight, void* out, int threads) {
  BlockLoop<T>(blocks, threads)
      .run(nullptr, nullptr, nullptr, 1, 0, [&](int64_t, const BlockRow<T>& row, int64_t at, int64_t block) {
        masked_weight_passes<T>().scores(row, static_cast<const T*>(weight) + at, static_cast<T*>(out) + block);
      });
}

}  // namespace

int64_t blocks_workspace_bytes(Blocks blocks) {
  const BlockLoop<double> loop(blocks, 1);
  return loop.items() * static_cast<int64_t>(sizeof(CouplingSums) + static_cast<size_t>(loop.scratch()) * sizeof(double));
}

void masked_weight(Dtype dtype, Blocks blocks, const void* weight, Masks masks, void* result, int threads) {
  SPARTAN_DISPATCH(forward<T>(blocks, weight, masks, result, threads))
}

void masked_weight_backward(Dtype dtype, Blocks blocks, const void* grad, const void* weight, Masks masks, double beta,
                            BlockCosts costs, bool straight_through, void* result, Workspace workspace, int threads) {
  SPARTAN_DISPATCH(backward<T>(blocks, grad, weight, masks, beta, costs, straight_through, result, workspace, threads))
}

void masked_weight_coupling(Dtype dtype, Blocks blocks, const void* grad, const void* weight, const void* soft, double beta,
                            BlockCosts costs, double* sums, Workspace workspace, int threads) {
  SPARTAN_DISPATCH(coupling<T>(blocks, grad, weight, soft, beta, costs, sums, workspace, threads))
}

void masked_weight_correct(Dtype dtype, Blocks blocks, void* grad, const void* weight, const void* soft, double scale,
                           int threads) {
  SPARTAN_DISPATCH(correct<T>(blocks, grad, weight, soft, scale, threads))
}

void add_block_signs(Dtype dtype, Blocks blocks, void* grad, const void* weight, const void* pull, int threads) {
  SPARTAN_DISPATCH(add_signs<T>(blocks, grad, weight, pull, threads))
}

void block_scores(Dtype dtype, Blocks blocks, const void* weight, void* out, int threads) {
  SPARTAN_DISPATCH(scores<T>(blocks, weight, out, threads))
}

}  // namespace spartan::cpu
