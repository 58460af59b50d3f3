#include "masked_weight_passes.h"

#include <algorithm>

#include "../ops.h"
#include "dispatch.h"
#include "parallel.h"
#include "soft_topk_passes.h"

namespace spartan::cpu {
namespace {

constexpr int64_t kMinItem = 16384;  // weights that one call of a pass should have at least
constexpr int64_t kSolved = 4096;    // weights whose soft mask is made at a time, of its solution: it stays in the first cache

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

  // Calls f(item, row, offset of its first weight, offset of its first block), for an item once or more.
  template <class F>
  void run(const T* weights, const SoftMask& soft, const uint8_t* hard, F&& f) const {
    parallel_for(threads_, items_, [&](int64_t item) {
      const int64_t length = b_.in * b_.kernel;
      int64_t weight = item * b_.rows * length, block = item * per_row_;
      BlockRow<T> row{std::min(b_.rows, b_.out - item * b_.rows), b_.in, b_.kernel, b_.columns, nullptr, nullptr, nullptr,
                      static_cast<T>(soft.costs.cost), static_cast<T>(soft.beta)};
      if (flat_) {
        weight = block = item * kMinItem;
        row.rows = row.kernel = 1;
        row.in = std::min(kMinItem, b_.out * length - weight);
      }
      if (soft.solution == nullptr) {
        aim(&row, soft, hard, block);
        f(item, row, weight, block);
      } else {
        run_solved(item, row, weights, soft, hard, weight, f);
      }
    });
  }

 private:
  static void aim(BlockRow<T>* row, const SoftMask& soft, const uint8_t* hard, int64_t block) {
    row->soft = soft.values != nullptr ? static_cast<const T*>(soft.values) + block : nullptr;
    row->hard = hard != nullptr ? hard + block : nullptr;
    row->costs = soft.costs.array != nullptr ? static_cast<const T*>(soft.costs.array) + block : nullptr;
  }

  template <class F>
  static void run_solved(int64_t item, const BlockRow<T>& whole, const T* weights, const SoftMask& soft,
                         const uint8_t* hard, int64_t first, F&& f) {
    const auto narrowed = [](double x) { return static_cast<T>(x); };
    const Logit<T> logit{narrowed(soft.beta), narrowed(soft.solution[0]), narrowed(soft.solution[1]), T(1)};
    T mask[kSolved];
    for (int64_t begin = 0; begin < whole.in; begin += kSolved) {
      BlockRow<T> row = whole;
      row.in = std::min(kSolved, whole.in - begin);
      aim(&row, soft, hard, first + begin);
      row.soft = mask;
      soft_topk_passes<T>().write({weights + first + begin, row.costs, row.cost, row.in, true}, logit, T(0), mask, nullptr,
                                  false);
      f(item, row, first + begin, first + begin);
    }
  }

  Blocks b_;
  int threads_;
  int64_t block_rows_, per_row_, items_;
  bool flat_;
};

constexpr SoftMask kNoMask{nullptr, nullptr, 0, {nullptr, 1}};

template <class T>
void forward(Blocks blocks, const void* weight, SoftMask soft, const uint8_t* hard, void* result, int threads) {
  const T* w = static_cast<const T*>(weight);
  T* out = static_cast<T*>(result);
  BlockLoop<T>(blocks, threads).run(w, soft, hard, [&](int64_t, const BlockRow<T>& row, int64_t at, int64_t) {
    masked_weight_passes<T>().forward(row, w + at, out + at);
  });
}

template <class T>
void backward(Blocks blocks, const void* grad, const void* weight, SoftMask soft, const uint8_t* hard,
              bool straight_through, void* result, Workspace workspace, int threads) {
  const BlockLoop<T> loop(blocks, threads);
  const T* w = static_cast<const T*>(weight);
  T* scratch = static_cast<T*>(workspace.data);
  loop.run(w, soft, hard, [&](int64_t item, const BlockRow<T>& row, int64_t at, int64_t) {
    masked_weight_passes<T>().backward(row, static_cast<const T*>(grad) + at, w + at, straight_through,
                                       static_cast<T*>(result) + at, scratch + item * loop.scratch());
  });
}

// The sum over all items of what f(item, row, offset of its first weight) returns.
template <class T, class F>
void sum_over(const BlockLoop<T>& loop, const T* weight, SoftMask soft, const uint8_t* hard, double* sums,
              TwoSums* partials, F&& f) {
  std::fill_n(partials, loop.items(), TwoSums{});
  loop.run(weight, soft, hard,
           [&](int64_t item, const BlockRow<T>& row, int64_t at, int64_t) { partials[item] += f(item, row, at); });
  TwoSums total;
  for (int64_t item = 0; item < loop.items(); ++item) total += partials[item];
  sums[0] = total.first;
  sums[1] = total.second;
}

template <class T>
void coupling(Blocks blocks, const void* grad, const void* weight, SoftMask soft, double* sums, Workspace workspace,
              int threads) {
  const BlockLoop<T> loop(blocks, threads);
  const T* w = static_cast<const T*>(weight);
  auto* partials = static_cast<TwoSums*>(workspace.data);
  T* scratch = reinterpret_cast<T*>(partials + loop.items());
  sum_over<T>(loop, w, soft, nullptr, sums, partials, [&](int64_t item, const BlockRow<T>& row, int64_t at) {
    return masked_weight_passes<T>().coupling(row, static_cast<const T*>(grad) + at, w + at,
                                              scratch + item * loop.scratch());
  });
}

template <class T>
void kept(Blocks blocks, const void* weight, SoftMask soft, const uint8_t* hard, double* sums, Workspace workspace,
          int threads) {
  const BlockLoop<T> loop(blocks, threads);
  sum_over<T>(loop, static_cast<const T*>(weight), soft, hard, sums, static_cast<TwoSums*>(workspace.data),
              [](int64_t, const BlockRow<T>& row, int64_t) { return masked_weight_passes<T>().kept(row); });
}

template <class T>
void correct(Blocks blocks, void* grad, const void* weight, SoftMask soft, double scale, int threads) {
  const T* w = static_cast<const T*>(weight);
  BlockLoop<T>(blocks, threads).run(w, soft, nullptr, [&](int64_t, const BlockRow<T>& row, int64_t at, int64_t) {
    masked_weight_passes<T>().correct(row, static_cast<T*>(grad) + at, w + at, static_cast<T>(scale));
  });
}

template <class T>
void gate(Blocks blocks, void* grad, const void* weight, const void* values, const void* slope, void* sums,
          Workspace workspace, int threads) {
  const BlockLoop<T> loop(blocks, threads);
  const T* w = static_cast<const T*>(weight);
  const T* slopes = static_cast<const T*>(slope);
  SoftMask soft = kNoMask;
  soft.values = values;
  loop.run(w, soft, nullptr, [&](int64_t item, const BlockRow<T>& row, int64_t at, int64_t block) {
    masked_weight_passes<T>().gate(row, w + at, slopes != nullptr ? slopes + block : nullptr, static_cast<T*>(grad) + at,
                                   static_cast<T*>(sums) + block, static_cast<T*>(workspace.data) + item * loop.scratch());
  });
}

template <class T>
void add_signs(Blocks blocks, void* grad, const void* weight, const void* pull, int threads) {
  const T* w = static_cast<const T*>(weight);
  SoftMask values = kNoMask;
  values.values = pull;
  BlockLoop<T>(blocks, threads).run(w, values, nullptr, [&](int64_t, const BlockRow<T>& row, int64_t at, int64_t) {
    masked_weight_passes<T>().add_signs(row, static_cast<T*>(grad) + at, w + at);
  });
}

template <class T>
void scores(Blocks blocks, const void* weight, void* out, int threads) {
  const T* w = static_cast<const T*>(weight);
  BlockLoop<T>(blocks, threads).run(w, kNoMask, nullptr, [&](int64_t, const BlockRow<T>& row, int64_t at, int64_t block) {
    masked_weight_passes<T>().scores(row, w + at, static_cast<T*>(out) + block);
  });
}

}  // namespace

int64_t blocks_workspace_bytes(Blocks blocks) {
  const BlockLoop<double> loop(blocks, 1);
  return loop.items() * static_cast<int64_t>(sizeof(TwoSums) + static_cast<size_t>(loop.scratch()) * sizeof(double));
}

void masked_weight(Dtype dtype, Blocks blocks, const void* weight, SoftMask soft, const uint8_t* hard, void* result,
                   int threads) {
  SPARTAN_DISPATCH(forward<T>(blocks, weight, soft, hard, result, threads))
}

void masked_weight_backward(Dtype dtype, Blocks blocks, const void* grad, const void* weight, SoftMask soft,
                            const uint8_t* hard, bool straight_through, void* result, Workspace workspace, int threads) {
  SPARTAN_DISPATCH(backward<T>(blocks, grad, weight, soft, hard, straight_through, result, workspace, threads))
}

void masked_weight_coupling(Dtype dtype, Blocks blocks, const void* grad, const void* weight, SoftMask soft, double* sums,
                            Workspace workspace, int threads) {
  SPARTAN_DISPATCH(coupling<T>(blocks, grad, weight, soft, sums, workspace, threads))
}

void masked_weight_kept(Dtype dtype, Blocks blocks, const void* weight, SoftMask soft, const uint8_t* hard, double* sums,
                        Workspace workspace, int threads) {
  SPARTAN_DISPATCH(kept<T>(blocks, weight, soft, hard, sums, workspace, threads))
}

void masked_weight_correct(Dtype dtype, Blocks blocks, void* grad, const void* weight, SoftMask soft, double scale,
                           int threads) {
  SPARTAN_DISPATCH(correct<T>(blocks, grad, weight, soft, scale, threads))
}

void gate_gradient(Dtype dtype, Blocks blocks, void* grad, const void* weight, const void* values, const void* slope,
                   void* sums, Workspace workspace, int threads) {
  SPARTAN_DISPATCH(gate<T>(blocks, grad, weight, values, slope, sums, workspace, threads))
}

void add_block_signs(Dtype dtype, Blocks blocks, void* grad, const void* weight, const void* pull, int threads) {
  SPARTAN_DISPATCH(add_signs<T>(blocks, grad, weight, pull, threads))
}

void block_scores(Dtype dtype, Blocks blocks, const void* weight, void* out, int threads) {
  SPARTAN_DISPATCH(scores<T>(blocks, weight, out, threads))
}

}  // namespace spartan::cpu
