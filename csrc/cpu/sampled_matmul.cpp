#include "arena.h"
#include "block_lines.h"
#include "huge_pages.h"
#include "narrow_sampled.h"

namespace spartan::cpu {
namespace {

constexpr int64_t kOuterFloats = 2 << 20;      // of tokens packed at a time for the weight gradient
constexpr int64_t kWindowFloats = 128 << 10;   // of them where windows overlap: in a core's cache
constexpr int64_t kBlocksPerItem = 8;

// The columns of x as panels hold them. Where rows of x overlap (windows of a convolution: each begins `stride` after the one
// before), a column of blocks is the column `j % across` of the row that begins j / across rows later: no panel holds the
// same number twice.
struct PanelColumns {
  int64_t across, reach;  // columns of blocks in a panel of tokens, and tokens that it has past a chunk

  PanelColumns(const BlockMatrix& w, int64_t stride) : across(ceil_div(w.in, w.columns)), reach(0) {
    if (stride <= 0 || stride >= w.in || stride % w.columns != 0 || w.in % stride != 0) return;
    reach = w.in / stride - 1;
    across = stride / w.columns;
  }
};

// Blocks of dz^T x, from panels of tokens: `chunk` tokens of every row and column of blocks at a time.
class Sampled {
 public:
  Sampled(Dtype dtype, const BlockMatrix& w, Tokens dz, Tokens x, float* raw, float* grad_gate, Workspace workspace,
          int threads)
      : passes_(matmul_passes()), dtype_(dtype), w_(w), dz_(dz), x_(x), raw_(raw), grad_gate_(grad_gate), threads_(threads),
        grid_rows_(ceil_div(w.out, w.rows)), grid_columns_(ceil_div(w.in, w.columns)), panel_(w, x.stride),
        column_stride_(column_stride(passes_, w)), chunk_(chunk_tokens(w, panel_, dz.count)) {
    if (NarrowSampled::serves(w)) {
      workspace_ = workspace;
      return;
    }
    Arena arena(workspace);
    left_ = arena.take<float>(chunk_ * grid_rows_ * w.rows);
    right_ = arena.take<float>(column_floats() * panel_.across);
  }

  static int64_t workspace_bytes(const BlockMatrix& w, int64_t tokens, int64_t x_stride) {
    if (NarrowSampled::serves(w)) return NarrowSampled::workspace_bytes(w, tokens);
    const PanelColumns panel(w, x_stride);
    const int64_t chunk = chunk_tokens(w, panel, tokens), stride = column_stride(matmul_passes(), w);
    const int64_t floats = chunk * ceil_div(w.out, w.rows) * w.rows + (chunk + panel.reach) * panel.across * stride;
    return floats * 4 + 2 * 64;
  }

  void run() {
    if (!packed()) advise_huge_pages(raw_, w_.out * w_.in * 4);
    if (dz_.count == 0) std::fill_n(raw_, packed() ? blocks() * w_.rows * w_.columns : w_.out * w_.in, 0);
    else if (!everything()) clear_rest();
    if (dz_.count != 0 && NarrowSampled::serves(w_)) return run_narrow();
    for (int64_t token = 0; token < dz_.count; token += chunk_) {
      const int64_t tokens = std::min(chunk_, dz_.count - token);
      pack_chunk(token, tokens);
      add_chunk(tokens, token == 0, token + tokens == dz_.count);
    }
    if (dz_.count == 0 && grad_gate_ != nullptr)
      std::fill_n(grad_gate_, grid_rows_ * grid_columns_, 0);
  }

 private:
  bool packed() const { return w_.positions != nullptr; }
  bool everything() const { return w_.layout.row_offsets == nullptr; }
  int64_t blocks() const { return everything() ? grid_rows_ * grid_columns_ : w_.layout.row_offsets[grid_rows_]; }
  static int64_t column_stride(const MatmulPasses& passes, const BlockMatrix& w) {
    return ceil_div(w.columns, passes.lanes) * passes.lanes;
  }
  static int64_t chunk_tokens(const BlockMatrix& w, const PanelColumns& panel, int64_t tokens) {
    const int64_t each = std::max<int64_t>(w.out + panel.across * w.columns, 1);
    const int64_t wanted = panel.reach == 0 ? kOuterFloats / each : std::max(kWindowFloats / each, 4 * panel.reach);
    return std::min(std::max<int64_t>(wanted, 64), std::max<int64_t>(tokens, 1));
  }
  int64_t column_floats() const { return (chunk_ + panel_.reach) * column_stride_; }

  // Zeros where nothing is active; the gate's gradient too.
  void clear_rest() {
    if (grad_gate_ != nullptr) std::fill_n(grad_gate_, grid_rows_ * grid_columns_, 0);
    if (packed()) return;
    for_items(threads_, grid_rows_, [&](int64_t, int64_t i) {
      const int64_t rows = std::min(w_.rows, w_.out - i * w_.rows);
      std::fill_n(raw_ + i * w_.rows * w_.in, rows * w_.in, 0);
    });
  }

  void run_narrow() {
    NarrowSampled::run(dtype_, w_, dz_, x_, raw_, workspace_, threads_, [&](int64_t i) {
      for (int64_t e = w_.layout.row_offsets[i]; e < w_.layout.row_offsets[i + 1]; ++e) {
        const int64_t j = w_.layout.column_indices[e];
        clear_edge(e, i, j);
        finish_block(e, i, j);
      }
    });
  }

  // left[i][t][r] and right[j][t][c].
  void pack_chunk(int64_t token, int64_t tokens) {
    for_items(threads_, grid_rows_ + panel_.across, [&](int64_t, int64_t item) {
      const bool rows = item < grid_rows_;
      const int64_t index = rows ? item : item - grid_rows_, span = rows ? w_.rows : w_.columns;
      const int64_t width = rows ? w_.rows : column_stride_, count = std::min(span, (rows ? w_.out : w_.in) - index * span);
      const Tokens& source = rows ? dz_ : x_;
      float* to = rows ? left_ + index * chunk_ * width : right_ + index * column_floats();
      passes_.pack(dtype_, offset_by(source.data, token * source.stride + index * span, dtype_), source.stride,
                   rows ? tokens : tokens + panel_.reach, count, 1.0f, width, to);
    });
  }

  void add_chunk(int64_t tokens, bool first, bool last) {
    const int64_t all = blocks();
    for_items(threads_, ceil_div(all, kBlocksPerItem), [&](int64_t, int64_t item) {
      int64_t e = item * kBlocksPerItem;
      const int64_t end = std::min(all, e + kBlocksPerItem);
      int64_t i = everything() ? e / grid_columns_
                               : std::upper_bound(w_.layout.row_offsets, w_.layout.row_offsets + grid_rows_ + 1, e) -
                                     w_.layout.row_offsets - 1;
      for (; e < end; ++e) {
        while (e >= (everything() ? (i + 1) * grid_columns_ : w_.layout.row_offsets[i + 1])) ++i;
        add_block(e, i, everything() ? e - i * grid_columns_ : w_.layout.column_indices[e], tokens, first, last);
      }
    });
  }

  int64_t rows_of(int64_t i) const { return std::min(w_.rows, w_.out - i * w_.rows); }
  int64_t columns_of(int64_t j) const { return std::min(w_.columns, w_.in - j * w_.columns); }
  float* block_of(int64_t e, int64_t i, int64_t j) const {
    return raw_ + (packed() ? e * w_.rows * w_.columns : i * w_.rows * w_.in + j * w_.columns);
  }
  int64_t stride() const { return packed() ? w_.columns : w_.in; }

  void add_block(int64_t e, int64_t i, int64_t j, int64_t tokens, bool first, bool last) {
    if (first) clear_edge(e, i, j);
    const float* right = right_ + j % panel_.across * column_floats() + j / panel_.across * column_stride_;
    passes_.outer_sum({left_ + i * chunk_ * w_.rows, w_.rows, rows_of(i), right, column_stride_, columns_of(j), tokens,
                       block_of(e, i, j), stride(), !first});
    if (last) finish_block(e, i, j);
  }

  // Zeros where a packed block lies past the matrix.
  void clear_edge(int64_t e, int64_t i, int64_t j) const {
    const int64_t rows = rows_of(i), columns = columns_of(j);
    if (!packed() || (rows == w_.rows && columns == w_.columns)) return;
    float* out = block_of(e, i, j);
    for (int64_t r = 0; r < w_.rows; ++r)
      for (int64_t c = r < rows ? columns : 0; c < w_.columns; ++c) out[r * w_.columns + c] = 0;
  }

  // The gate's gradient, and the gate's part in the weight's.
  void finish_block(int64_t e, int64_t i, int64_t j) const {
    if (grad_gate_ == nullptr && w_.gate == nullptr) return;
    const float gate = w_.gate == nullptr ? 1.0f : w_.gate[i * grid_columns_ + j];
    double product = 0;
    const int64_t from = packed() ? e * w_.rows * w_.columns : i * w_.rows * w_.stride + j * w_.columns;
    const int64_t data_stride = packed() ? w_.columns : w_.stride, rows = rows_of(i), columns = columns_of(j);
    float* out = block_of(e, i, j);
    for (int64_t r = 0; r < rows; ++r)
      product += passes_.finish(dtype_, offset_by(w_.data, from + r * data_stride, dtype_), out + r * stride(), gate, columns);
    if (grad_gate_ != nullptr) grad_gate_[i * grid_columns_ + j] = static_cast<float>(product);
  }

  const MatmulPasses& passes_;
  Dtype dtype_;
  const BlockMatrix& w_;
  Tokens dz_, x_;
  float *raw_, *grad_gate_;
  int threads_;
  int64_t grid_rows_, grid_columns_;
  PanelColumns panel_;
  int64_t column_stride_, chunk_;
  float *left_, *right_;
  Workspace workspace_{};
};

}  // namespace

int64_t sampled_matmul_workspace_bytes(const BlockMatrix& w, int64_t tokens, int64_t x_stride) {
  if (w.layout.row_offsets != nullptr && w.out != 0 && w.in != 0) require_fit(Lines(w, true));
  return Sampled::workspace_bytes(w, tokens, x_stride);
}

void sampled_matmul(Dtype dtype, const BlockMatrix& w, Tokens dz, Tokens x, float* raw, float* grad_gate, Workspace workspace,
                    int threads) {
  if (w.out == 0 || w.in == 0) return;
  const int64_t active = w.layout.row_offsets == nullptr ? w.out * w.in : Lines(w, true).blocks() * w.rows * w.columns;
  const int64_t cleared = w.out * w.in;
  threads = worthwhile(threads, product_work(active, w.out, w.in, dz.count) + cleared);
  Sampled(dtype, w, dz, x, raw, grad_gate, workspace, threads).run();
}

}  // namespace spartan::cpu
