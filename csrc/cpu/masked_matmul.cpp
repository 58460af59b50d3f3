#include <cmath>

#include "arena.h"
#include "block_lines.h"
#include "narrow_product.h"
#include "row_writer.h"

namespace spartan::cpu {
namespace {

constexpr int64_t kPanelFloats = 2 << 20;      // of weights packed at a time
constexpr int64_t kChunkFloats = 64 << 10;     // of tokens that stay in a core's cache
constexpr int64_t kCacheWays = 8, kPage = 4096;
constexpr int64_t kFewTokens = 4;              // for which weights are used where they lie
constexpr int64_t kItemsPerThread = 4;

class Product {
 public:
  Product(Dtype dtype, const Lines& lines, Tokens x, const void* bias, const RowWriter& writer, Workspace workspace, int threads)
      : passes_(matmul_passes()), dtype_(dtype), lines_(lines), x_(x), writer_(writer), threads_(threads) {
    Arena arena(workspace);
    padded_ = lines.padded(passes_);
    chunk_ = chunk_tokens(passes_, lines);
    line_bytes_ = line_stride(passes_, lines);
    panels_ = arena.take<float>(panel_floats(passes_, lines));
    bias_ = arena.take<float>(lines.count * padded_);
    chunks_ = arena.take<float>(threads * chunk_ * line_bytes_);
    tiles_ = arena.take<float>(threads * tile_floats(passes_, lines));
    spread_bias(bias);
  }

  static int64_t workspace_bytes(const Lines& lines, int threads) {
    const MatmulPasses& passes = matmul_passes();
    const int64_t floats = panel_floats(passes, lines) + lines.count * lines.padded(passes) +
                           threads * (chunk_tokens(passes, lines) * line_stride(passes, lines) + tile_floats(passes, lines));
    return floats * static_cast<int64_t>(sizeof(float)) + 4 * 64;
  }

  void run() {
    writer_.prepare(x_.count);
    const int64_t line_floats = padded_ * lines_.other_span;
    for (int64_t begin = 0; begin < lines_.count;) {
      int64_t end = begin + 1;
      const int64_t room = std::max(kPanelFloats / line_floats, int64_t(1));
      while (end < lines_.count && lines_.offsets[end + 1] - lines_.offsets[begin] <= room) ++end;
      pack_lines(begin, end);
      multiply_lines(begin, end);
      begin = end;
    }
  }

 private:
  static int64_t chunk_tokens(const MatmulPasses& passes, const Lines& lines) {
    const int64_t tile = passes.tile_tokens(passes.panel_width(lines.span));
    return std::clamp<int64_t>(kChunkFloats / std::max<int64_t>(lines.other_extent, 1) / tile, 2, 16) * tile;
  }
  // Tokens of a copied chunk lie a little more than a multiple of the page apart from one another.
  static int64_t line_stride(const MatmulPasses&, const Lines& lines) { return (lines.other_extent + 15) / 16 * 16 + 16; }
  static int64_t panel_floats(const MatmulPasses& passes, const Lines& lines) {
    const int64_t line_floats = lines.padded(passes) * lines.other_span;
    int64_t fullest = 0;
    for (int64_t line = 0; line < lines.count; ++line)
      fullest = std::max<int64_t>(fullest, lines.offsets[line + 1] - lines.offsets[line]);
    return std::min(lines.blocks() * line_floats, std::max(kPanelFloats, fullest * line_floats));
  }
  static int64_t tile_floats(const MatmulPasses& passes, const Lines& lines) {
    const int64_t width = passes.panel_width(lines.span);
    return chunk_tokens(passes, lines) * width;
  }

  void spread_bias(const void* bias) {
    if (bias == nullptr) {
      bias_ = nullptr;
      return;
    }
    std::fill_n(bias_, lines_.count * padded_, 0);
    for (int64_t line = 0; line < lines_.count; ++line)
      passes_.widen(dtype_, offset_by(bias, line * lines_.span, dtype_), bias_ + line * padded_, lines_.outputs(line));
  }

  float* panel_of(int64_t line, int64_t first_line) const {
    return panels_ + (lines_.offsets[line] - lines_.offsets[first_line]) * padded_ * lines_.other_span;
  }

  // Calls f(first output, width, columns, panel) for the panels of a line.
  template <class F>
  void for_panels(int64_t line, int64_t first_line, F&& f) const {
    const int64_t outputs = lines_.outputs(line), active = lines_.offsets[line + 1] - lines_.offsets[line];
    float* panel = panel_of(line, first_line);
    for (int64_t at = 0; at < outputs;) {
      const int width = passes_.panel_width(lines_.span - at);
      f(at, width, std::min<int64_t>(width, outputs - at), panel);
      panel += active * lines_.other_span * width;
      at += width;
    }
  }

  void pack_lines(int64_t begin, int64_t end) {
    const int64_t parts = std::min<int64_t>(end - begin, threads_ * kItemsPerThread);
    for_items(threads_, parts, [&](int64_t, int64_t part) {
      const int64_t to = split_lines(lines_, begin, end, part + 1, parts);
      for (int64_t line = split_lines(lines_, begin, end, part, parts); line < to; ++line) pack_line(line, begin);
    });
  }

  void pack_line(int64_t line, int64_t first_line) {
    for_panels(line, first_line, [&](int64_t at, int width, int64_t columns, float* panel) {
      for (int64_t e = lines_.offsets[line]; e < lines_.offsets[line + 1]; ++e) {
        const int64_t depth = std::min(lines_.other_span, lines_.other_extent - lines_.indices[e] * lines_.other_span);
        const int64_t from = lines_.begin(line, e), stride = lines_.stride();
        const float gate = lines_.gate(line, e);
        if (lines_.by_row) {
          const void* block = offset_by(lines_.w.data, from + at * stride, dtype_);
          passes_.pack_transposed(dtype_, block, stride, columns, depth, gate, width, panel);
        } else {
          passes_.pack(dtype_, offset_by(lines_.w.data, from + at, dtype_), stride, depth, columns, gate, width, panel);
        }
        panel += depth * width;
      }
    });
  }

  void multiply_lines(int64_t begin, int64_t end) {
    const int64_t chunks = ceil_div(x_.count, chunk_), wanted = threads_ * kItemsPerThread;
    const int64_t parts = std::clamp<int64_t>(ceil_div(wanted, chunks), 1, end - begin);
    for_items(threads_, chunks * parts, [&](int64_t worker, int64_t item) {
      const int64_t token = item / parts * chunk_, part = item % parts;
      const int64_t tokens = std::min(chunk_, x_.count - token);
      const Rows rows = rows_of(token, tokens, chunks_ + worker * chunk_ * line_bytes_);
      const int64_t to = split_lines(lines_, begin, end, part + 1, parts);
      for (int64_t line = split_lines(lines_, begin, end, part, parts); line < to; ++line)
        multiply_line(line, begin, rows, token, tokens, tiles_ + worker * tile_floats(passes_, lines_));
      writer_.settle();
    });
  }

  struct Rows {
    const float* data;
    int64_t stride;
  };

  // The tokens where they lie, or a copy: of narrower numbers, and of rows whose equal columns would fall into the same few
  // places of the cache.
  Rows rows_of(int64_t token, int64_t tokens, float* copy) const {
    const char* source = offset_by(x_.data, token * x_.stride, dtype_);
    if (dtype_ == Dtype::float32 && !collides()) return {reinterpret_cast<const float*>(source), x_.stride};
    for (int64_t t = 0; t < tokens; ++t)
      passes_.widen(dtype_, source + t * x_.stride * element_bytes(dtype_), copy + t * line_bytes_, lines_.other_extent);
    return {copy, line_bytes_};
  }
  bool collides() const {
    int64_t step = x_.stride * 4 % kPage, places = kPage;
    while (step != 0) {
      const int64_t rest = places % step;
      places = step;
      step = rest;
    }
    const int64_t sets = kPage / places;  // how many different places consecutive tokens reach
    return x_.count > 1 && passes_.tile_tokens(passes_.panel_width(lines_.span)) > kCacheWays * sets;
  }

  void multiply_line(int64_t line, int64_t first_line, Rows rows, int64_t token, int64_t tokens, float* tile) {
    const ActiveBlocks active = lines_.active(line);
    for_panels(line, first_line, [&](int64_t at, int width, int64_t columns, const float* panel) {
      const int64_t first = token * lines_.extent + line * lines_.span + at;
      float* own = writer_.direct(first);
      float* y = own != nullptr ? own : tile;
      const int64_t stride = own != nullptr ? lines_.extent : width;
      const float* bias = bias_ == nullptr ? nullptr : bias_ + line * padded_ + at;
      const int64_t step = passes_.tile_tokens(width);
      for (int64_t t = 0; t < tokens; t += step) {
        const int64_t count = std::min(step, tokens - t);
        passes_.product({rows.data + t * rows.stride, rows.stride, panel, bias, y + t * stride, stride, width,
                         static_cast<int>(columns), own != nullptr && writer_.streams()},
                        active, count);
        if (own == nullptr) writer_.write(y + t * stride, stride, count, columns, first + t * lines_.extent);
      }
    });
  }

  const MatmulPasses& passes_;
  Dtype dtype_;
  const Lines& lines_;
  Tokens x_;
  const RowWriter& writer_;
  int threads_;
  int64_t padded_, chunk_, line_bytes_;
  float *panels_, *bias_, *chunks_, *tiles_;
};

// y for a few tokens: rows of weights are read once, where they lie.
void multiply_few(Dtype dtype, const Lines& lines, Tokens x, const void* bias, Activation activation, void* y, void* saved,
                  Workspace workspace, int threads) {
  const MatmulPasses& passes = matmul_passes();
  Arena arena(workspace);
  float* wide = arena.take<float>(x.count * lines.other_extent);
  float* z = arena.take<float>(x.count * lines.extent);
  int64_t* offsets = arena.take<int64_t>(lines.blocks());
  float* gates = lines.w.gate == nullptr ? nullptr : arena.take<float>(lines.blocks());
  for (int64_t t = 0; t < x.count; ++t) {
    passes.widen(dtype, offset_by(x.data, t * x.stride, dtype), wide + t * lines.other_extent, lines.other_extent);
    if (bias != nullptr) passes.widen(dtype, bias, z + t * lines.extent, lines.extent);
  }
  if (bias == nullptr) std::fill_n(z, x.count * lines.extent, 0);
  const int64_t parts = std::min<int64_t>(lines.count, threads * kItemsPerThread);
  for_items(threads, parts, [&](int64_t, int64_t part) {
    const int64_t to = split_lines(lines, 0, lines.count, part + 1, parts);
    for (int64_t line = split_lines(lines, 0, lines.count, part, parts); line < to; ++line) {
      const int64_t first = lines.offsets[line], outputs = lines.outputs(line);
      for (int64_t e = first; e < lines.offsets[line + 1]; ++e) {
        offsets[e] = lines.begin(line, e);
        if (gates != nullptr) gates[e] = lines.gate(line, e);
      }
      passes.dot(dtype,
                 {wide, lines.other_extent, x.count, lines.w.data, offsets + first, lines.stride(), outputs,
                  gates == nullptr ? nullptr : gates + first, z + line * lines.span, lines.extent},
                 lines.active(line));
      for (int64_t t = 0; t < x.count; ++t) {
        const int64_t at = t * lines.extent + line * lines.span;
        if (saved != nullptr) passes.narrow(dtype, z + at, offset_by(saved, at, dtype), outputs, false);
        passes.activate(activation, z + at, outputs);
        passes.narrow(dtype, z + at, offset_by(y, at, dtype), outputs, false);
      }
    }
  });
}

int64_t few_workspace_bytes(const Lines& lines, int64_t tokens) {
  return tokens * (lines.other_extent + lines.extent) * 4 + lines.blocks() * 12 + 4 * 64;
}


}  // namespace

int64_t masked_matmul_workspace_bytes(const BlockMatrix& w, int64_t tokens, bool input_gradient, int threads) {
  const Lines lines(w, !input_gradient);
  require_fit(lines);
  if (NarrowProduct::serves(lines)) return NarrowProduct::workspace_bytes(lines, tokens, threads);
  const int64_t many = Product::workspace_bytes(lines, threads);
  return input_gradient ? many : std::max(many, few_workspace_bytes(lines, std::min(tokens, kFewTokens)));
}

void masked_matmul(Dtype dtype, const BlockMatrix& w, Tokens x, const void* bias, Activation activation, void* y, void* saved,
                   Workspace workspace, int threads) {
  const Lines lines(w, true);
  if (x.count == 0 || w.out == 0) return;
  const RowWriter writer(dtype, lines.extent, x.count, activation, y, saved);
  if (NarrowProduct::serves(lines)) return NarrowProduct(dtype, lines, x, bias, writer, workspace, threads).run();
  if (x.count <= kFewTokens) return multiply_few(dtype, lines, x, bias, activation, y, saved, workspace, threads);
  Product(dtype, lines, x, bias, writer, workspace, threads).run();
}

void masked_matmul_input_gradient(Dtype dtype, const BlockMatrix& w, Tokens dz, void* dx, Workspace workspace, int threads) {
  const Lines lines(w, false);
  if (dz.count == 0 || w.in == 0) return;
  const RowWriter writer(dtype, lines.extent, dz.count, Activation::none, dx, nullptr);
  if (NarrowProduct::serves(lines)) return NarrowProduct(dtype, lines, dz, nullptr, writer, workspace, threads).run();
  Product(dtype, lines, dz, nullptr, writer, workspace, threads).run();
}

}  // namespace spartan::cpu
