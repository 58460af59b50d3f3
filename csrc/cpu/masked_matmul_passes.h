// The inner loops of products with block-sparse matrices: float32 arithmetic on packed panels that stay in cache.
#pragma once

#include <cstdint>

#include "../ops.h"

namespace spartan::cpu {

// The active blocks of one row of blocks: block e covers the columns [indices[e] * span, ...) of the other matrix, `span` of
// them or as many as there are before `limit`.
struct ActiveBlocks {
  const int32_t* indices;
  int64_t count, span, limit;
};

// y[t, c] = bias[c] + sum over the active blocks' columns k of x[t, k] * panel[., c] for c < width. A panel holds the rows k of
// all active blocks one after another, `width` entries each. Tokens come in tiles as pack_tokens() makes them, one after another.
struct PanelProduct {
  const float* x;
  int64_t tile_stride;  // from one tile of tokens to the next
  int tile;             // tokens of a tile: tile_tokens() of this width, or of the widest panel
  const float* panel;
  const float* bias;  // null: zeros; `width` entries
  float* y;
  int64_t y_stride;
  int width;
};

// out[r, c] (+)= sum_t a[t, r] * b[t, c] for r < rows, c < columns; `width` is the stride of b, rounded up to whole vectors.
struct OuterSum {
  const float* a;
  int64_t a_stride, rows;
  const float* b;
  int64_t b_stride, columns, tokens;
  float* out;
  int64_t out_stride;
  bool add;
};

// Dot products of rows of weights with a few vectors x, without packing: y[t, r] = sum over active blocks of gate * W[r, .] x[t, .].
// Row r of the block of entry e starts at weights + offsets[e] + r * stride; gates null: ones.
struct DotProduct {
  const float* x;
  int64_t x_stride, tokens;
  const void* weights;
  const int64_t* offsets;
  int64_t stride, rows;
  const float* gates;
  float* y;
  int64_t y_stride;
};

// y[h, t] = bias[h] + sum over the active blocks' columns k of values[k, h] * x[k, t] for t < tile: tokens side by side, in
// whole vectors, or one.
struct NarrowSum {
  const float* x;
  int64_t tile;
  const float *values, *bias;  // `height` numbers for each column of the blocks, one block after another; null: zeros
  int height;                  // 1, 2 or 4
  float* y;
};

// The blocks of a line, to be written one after another as `out`[column, output], times their gates. The block of entry e begins
// `base + step * places[e]` into the data (null: e).
struct NarrowBlocks {
  const void* data;
  int64_t base, step;
  const int32_t* places;
  int64_t height_stride, depth_stride, outputs;
  int height;
  const float* gates;  // at gate_step * the entry's index; null: ones
  int64_t gate_step;
  float* out;
};

// The blocks of a line of dz^T x: out[r * stride + c] (+)= sum_t rows[r, t] * x[column c of the block, t], t < tile, one block
// `block_step` after another, or, where that is 0, each where its index says.
struct NarrowDots {
  const float *rows, *x;
  int64_t tile;
  int height;  // rows of the line: at most 4
  float* out;
  int64_t stride, block_step;
  bool add;
};

struct MatmulPasses {
  bool (*within)(const int32_t* entries, int64_t count, int64_t end);  // whether all are in [0, end)
  // The width of the panel to cut next from `outputs` that remain, and the tokens that a product takes best at that width.
  int (*panel_width)(int64_t outputs);
  int (*tile_tokens)(int width);
  int lanes;

  // panel[k, r] = gate * block[r, k] for r < rows and k < depth; zero for r in [rows, width).
  void (*pack_transposed)(Dtype, const void* block, int64_t stride, int64_t rows, int64_t depth, float gate, int width,
                          float* panel);
  // panel[k, c] = gate * block[k, c] for k < depth and c < columns; zero for c in [columns, width).
  void (*pack)(Dtype, const void* block, int64_t stride, int64_t depth, int64_t columns, float gate, int64_t width,
               float* panel);
  // out[g][k, i] = x[g * tile + i, k] for k < depth and the tiles g of `tokens`; zero past the last token. Up to `lanes` numbers
  // past the last tile are overwritten.
  void (*pack_tokens)(Dtype, const void* x, int64_t stride, int64_t tokens, int64_t depth, int tile, float* out);
  void (*product)(const PanelProduct&, const ActiveBlocks&, int64_t tokens);
  void (*outer_sum)(const OuterSum&);
  void (*dot)(Dtype, const DotProduct&, const ActiveBlocks&);
  void (*narrow_pack)(Dtype, const NarrowBlocks&, const ActiveBlocks&);
  void (*narrow_sum)(const NarrowSum&, const ActiveBlocks&);
  void (*narrow_dots)(const NarrowDots&, const ActiveBlocks&);
  // out[t, r] = sums[r, t] for r < rows and t < tokens; rows of `sums` are `tile` apart and exist in whole vectors.
  void (*turn_back)(const float* sums, int64_t tile, int64_t rows, int64_t tokens, float* out, int64_t stride);
  void (*activate)(Activation, float* z, int64_t count);
  // To or from float32.
  void (*widen)(Dtype, const void* from, float* to, int64_t count);
  void (*narrow)(Dtype, const float* from, void* to, int64_t count, bool stream);
  void (*settle)();
  // sum of values[i] * raw[i], and raw[i] *= gate.
  double (*finish)(Dtype, const void* values, float* raw, float gate, int64_t count);
  // Multiplies and adds registers alone, `rounds` times; returns the floating-point operations. The sums go to `sink`.
  int64_t (*multiply_adds)(int64_t rounds, float* sink);
};

const MatmulPasses& matmul_passes();

}  // namespace spartan::cpu
