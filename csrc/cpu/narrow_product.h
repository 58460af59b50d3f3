// Products with blocks too narrow for a vector of outputs, single weights above all: tokens lie side by side in the lanes.
#pragma once

#include "arena.h"
#include "block_lines.h"
#include "row_writer.h"

namespace spartan::cpu {

constexpr int64_t kTileFloats = 64 << 10;     // of transposed tokens, which stay in a core's second-level cache
constexpr int64_t kGroup = 64;                // outputs that are turned back to rows of y at a time
constexpr int64_t kRows = kGroup + 16;         // room for the last of them, in whole vectors
constexpr int64_t kNarrowItems = 4;           // for each thread

// A tile of tokens is transposed once; each weight is then one number times a vector of tokens. Weights are put in the order of
// the lines before, times their gates, unless they lie so already.
class NarrowProduct {
 public:
  static bool serves(const Lines& lines) { return 2 * lines.span <= matmul_passes().panel_width(1); }

  static int64_t workspace_bytes(const Lines& lines, int64_t tokens, int threads) {
    const int64_t tile = tile_tokens(lines, tokens);
    const int64_t own = tile * lines.other_extent + 2 * kRows * tile + 48;
    const int64_t height = height_of(lines), packed = packed_floats(lines, height * lines.other_span);
    return (packed + lines.count * height + threads * own) * static_cast<int64_t>(sizeof(float)) + 4 * 64;
  }

  NarrowProduct(Dtype dtype, const Lines& lines, Tokens x, const void* bias, const RowWriter& writer, Workspace workspace,
                int threads)
      : passes_(matmul_passes()), dtype_(dtype), lines_(lines), x_(x), writer_(writer), threads_(threads),
        height_(height_of(lines)), tile_(tile_tokens(lines, x.count)), block_floats_(height_ * lines.other_span) {
    Arena arena(workspace);
    packed_ = in_order(dtype, lines) ? nullptr : arena.take<float>(packed_floats(lines, block_floats_));
    bias_ = bias == nullptr ? nullptr : arena.take<float>(lines.count * height_);
    scratch_floats_ = tile_ * lines.other_extent + 2 * kRows * tile_ + 48;
    scratch_ = arena.take<float>(threads * scratch_floats_);
    if (bias == nullptr) return;
    std::fill_n(bias_, lines.count * height_, 0.0f);
    for (int64_t line = 0; line < lines.count; ++line)
      passes_.widen(dtype, offset_by(bias, line * lines.span, dtype), bias_ + line * height_, lines.outputs(line));
  }

  void run() {
    writer_.prepare(x_.count);
    for (int64_t begin = 0; begin < lines_.count;) {
      const int64_t end = packed_ == nullptr ? lines_.count : packed_end(lines_, block_floats_, begin);
      if (packed_ != nullptr) put_in_order(begin, end);
      multiply(begin, end);
      begin = end;
    }
  }

 private:
  static int height_of(const Lines& lines) { return lines.span <= 1 ? 1 : lines.span <= 2 ? 2 : 4; }

  // As many vectors of tokens as the cache holds and there are; one on its own is not put beside zeros.
  static int64_t tile_tokens(const Lines& lines, int64_t tokens) {
    if (tokens == 1) return 1;
    int64_t tile = matmul_passes().lanes;
    while (tile < tokens && tile < kGroup && 2 * tile * lines.other_extent <= kTileFloats) tile *= 2;
    return tile;
  }

  // Packed float32 blocks of one row or one column of full height are stored as they are multiplied.
  static bool in_order(Dtype dtype, const Lines& lines) {
    const bool flat = lines.span == 1 || (lines.other_span == 1 && lines.span == height_of(lines));
    return dtype == Dtype::float32 && lines.by_row && lines.w.positions != nullptr && lines.w.gate == nullptr && flat;
  }

  const float* values_of(int64_t line, int64_t first_line) const {
    if (packed_ == nullptr) return static_cast<const float*>(lines_.w.data) + lines_.offsets[line] * block_floats_;
    return packed_ + (lines_.offsets[line] - lines_.offsets[first_line]) * block_floats_;
  }

  void put_in_order(int64_t begin, int64_t end) {
    const int64_t parts = std::min<int64_t>(end - begin, threads_ * kNarrowItems);
    for_items(threads_, parts, [&](int64_t, int64_t part) {
      const int64_t to = split_lines(lines_, begin, end, part + 1, parts);
      for (int64_t line = split_lines(lines_, begin, end, part, parts); line < to; ++line) {
        passes_.narrow_pack(dtype_, blocks_of(line, packed_ + (lines_.offsets[line] - lines_.offsets[begin]) * block_floats_),
                            lines_.active(line));
      }
    });
  }

  // Where the blocks of a line lie, and where they go.
  NarrowBlocks blocks_of(int64_t line, float* out) const {
    const BlockMatrix& w = lines_.w;
    const bool by_row = lines_.by_row, packed = w.positions != nullptr;
    const int64_t first = lines_.offsets[line], area = w.rows * w.columns, along = by_row ? w.rows * w.stride : w.columns;
    NarrowBlocks blocks{w.data, line * along, by_row ? w.columns : w.rows * w.stride, lines_.indices + first};
    if (packed) {
      blocks.step = area;
      blocks.base = by_row ? first * area : 0;
      blocks.places = by_row ? nullptr : w.positions + first;
    }
    blocks.height_stride = by_row ? lines_.stride() : 1;
    blocks.depth_stride = by_row ? 1 : lines_.stride();
    blocks.outputs = lines_.outputs(line);
    blocks.height = height_;
    const int64_t grid_columns = ceil_div(w.in, w.columns);
    blocks.gates = w.gate == nullptr ? nullptr : w.gate + (by_row ? line * grid_columns : line);
    blocks.gate_step = by_row ? 1 : grid_columns;
    blocks.out = out;
    return blocks;
  }

  void multiply(int64_t begin, int64_t end) {
    const int64_t tiles = ceil_div(x_.count, tile_), wanted = threads_ * kNarrowItems;
    const int64_t parts = std::clamp<int64_t>(ceil_div(wanted, tiles), 1, end - begin);
    for_items(threads_, tiles * parts, [&](int64_t worker, int64_t item) {
      const int64_t token = item / parts * tile_, part = item % parts, tokens = std::min(tile_, x_.count - token);
      float* turned = scratch_ + worker * scratch_floats_;
      float* sums = turned + tile_ * lines_.other_extent;
      float* rows = sums + kRows * tile_;
      const void* x = offset_by(x_.data, token * x_.stride, dtype_);
      if (tile_ == 1)
        passes_.widen(dtype_, x, turned, lines_.other_extent);
      else
        passes_.pack_transposed(dtype_, x, x_.stride, tokens, lines_.other_extent, 1.0f, static_cast<int>(tile_), turned);
      const int64_t to = split_lines(lines_, begin, end, part + 1, parts);
      for (int64_t line = split_lines(lines_, begin, end, part, parts); line < to;) {
        const int64_t first = line;
        int64_t held = 0;
        for (; line < to && held < kGroup; held += lines_.outputs(line), ++line) {
          passes_.narrow_sum({turned, tile_, values_of(line, begin), bias_ == nullptr ? nullptr : bias_ + line * height_,
                              height_, sums + held * tile_},
                             lines_.active(line));
        }
        const int64_t at = token * lines_.extent + first * lines_.span;
        if (tile_ == 1) {
          writer_.write(sums, held, 1, held, at);
          continue;
        }
        if (float* y = writer_.direct(at); y != nullptr) {
          passes_.turn_back(sums, tile_, held, tokens, y, lines_.extent);
          continue;
        }
        passes_.turn_back(sums, tile_, held, tokens, rows, held);
        writer_.write(rows, held, tokens, held, at);
      }
      writer_.settle();
    });
  }

  const MatmulPasses& passes_;
  Dtype dtype_;
  const Lines& lines_;
  Tokens x_;
  const RowWriter& writer_;
  int threads_, height_;
  int64_t tile_, block_floats_, scratch_floats_;
  float *packed_, *bias_, *scratch_;
};

}  // namespace spartan::cpu
