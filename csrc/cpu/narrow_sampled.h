// The weight gradient of blocks too narrow for a vector of outputs: tokens lie side by side in the lanes.
#pragma once

#include "arena.h"
#include "narrow_product.h"

namespace spartan::cpu {

// Each number of the result is a dot product of two rows of transposed tokens, a tile of which stays in the cache.
class NarrowSampled {
 public:
  static bool serves(const BlockMatrix& w) {
    return w.layout.row_offsets != nullptr && 2 * w.rows <= matmul_passes().panel_width(1);
  }

  static int64_t workspace_bytes(const BlockMatrix& w, int64_t tokens) {
    return tile_tokens(w, tokens) * (w.in + w.out) * static_cast<int64_t>(sizeof(float)) + 2 * 64;
  }

  // Calls `last(line)` when the sums of a line are whole.
  template <class F>
  static void run(Dtype dtype, const BlockMatrix& w, Tokens dz, Tokens x, float* raw, Workspace workspace, int threads, F&& last) {
    const MatmulPasses& passes = matmul_passes();
    const Lines lines(w, true);
    const int64_t tile = tile_tokens(w, dz.count);
    Arena arena(workspace);
    float *left = arena.take<float>(tile * w.out), *right = arena.take<float>(tile * w.in);
    const bool packed = w.positions != nullptr;
    for (int64_t token = 0; token < dz.count; token += tile) {
      const int64_t tokens = std::min(tile, dz.count - token), own = ceil_div(w.out, kTurned), all = own + ceil_div(w.in, kTurned);
      for_items(threads, all, [&](int64_t, int64_t item) {
        const Tokens& source = item < own ? dz : x;
        const int64_t first = (item < own ? item : item - own) * kTurned;
        const int64_t features = std::min(kTurned, (item < own ? w.out : w.in) - first);
        passes.pack_transposed(dtype, offset_by(source.data, token * source.stride + first, dtype), source.stride, tokens,
                               features, 1.0f, static_cast<int>(tile), (item < own ? left : right) + first * tile);
      });
      const int64_t parts = std::min<int64_t>(lines.count, threads * kNarrowItems);
      for_items(threads, parts, [&](int64_t, int64_t part) {
        const int64_t to = split_lines(lines, 0, lines.count, part + 1, parts);
        for (int64_t line = split_lines(lines, 0, lines.count, part, parts); line < to; ++line) {
          const int64_t area = w.rows * w.columns, height = lines.outputs(line);
          float* out = raw + (packed ? lines.offsets[line] * area : line * w.rows * w.in);
          passes.narrow_dots({left + line * w.rows * tile, right, tile, static_cast<int>(height), out, packed ? w.columns : w.in,
                              packed ? area : 0, token != 0},
                             lines.active(line));
          if (token + tokens == dz.count) last(line);
        }
      });
    }
  }

 private:
  static constexpr int64_t kTurned = 64;  // features that one item transposes
  static int64_t tile_tokens(const BlockMatrix& w, int64_t tokens) {
    int64_t tile = matmul_passes().lanes;
    while (tile < tokens && tile < 2 * kGroup && 2 * tile * w.in <= kTileFloats) tile *= 2;
    return tile;
  }
};

}  // namespace spartan::cpu
