#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "arena.h"
#include "huge_pages.h"
#include "masked_matmul_passes.h"
#include "parallel.h"

namespace spartan::cpu {
namespace {

constexpr int64_t kPanelFloats = 2 << 20;      // of weights packed at a time
constexpr int64_t kChunkFloats = 64 << 10;     // of tokens that stay in a core's cache
constexpr int64_t kCacheWays = 8, kPage = 4096;
constexpr int64_t kFewTokens = 4;              // for which weights are used where they lie
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kOuterFloats = 2 << 20;      // of tokens packed at a time for the weight gradient
constexpr int64_t kWindowFloats = 128 << 10;   // of them where windows overlap: in a core's cache
constexpr int64_t kBlocksPerItem = 8;
constexpr int64_t kStreamBytes = 4 << 20;      // results larger than this are written around the cache

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }
const char* offset_by(const void* base, int64_t elements, Dtype dtype) {
  return static_cast<const char*>(base) + elements * element_bytes(dtype);
}
char* offset_by(void* base, int64_t elements, Dtype dtype) {
  return static_cast<char*>(base) + elements * element_bytes(dtype);
}

// A block matrix as a product reads it: lines of blocks, each with its active blocks across the other dimension. For
// y = x w^T a line is a row of blocks; for dx = dz w it is a column.
struct Lines {
  const BlockMatrix& w;
  bool by_row;
  const int32_t *offsets, *indices;
  int64_t count, span, extent;             // lines, outputs of a line, all outputs
  int64_t other_span, other_extent;        // of one block across, of all

  Lines(const BlockMatrix& matrix, bool rows)
      : w(matrix), by_row(rows), offsets(rows ? w.layout.row_offsets : w.layout.column_offsets),
        indices(rows ? w.layout.column_indices : w.layout.row_indices), span(rows ? w.rows : w.columns),
        extent(rows ? w.out : w.in), other_span(rows ? w.columns : w.rows), other_extent(rows ? w.in : w.out) {
    count = ceil_div(extent, span);
  }

  int64_t outputs(int64_t line) const { return std::min(span, extent - line * span); }
  ActiveBlocks active(int64_t line) const {
    return {indices + offsets[line], offsets[line + 1] - offsets[line], other_span, other_extent};
  }
  // Where the block of entry e begins in the data, in elements, and its gate.
  int64_t begin(int64_t line, int64_t e) const {
    const int64_t i = by_row ? line : indices[e], j = by_row ? indices[e] : line;
    if (w.positions == nullptr) return i * w.rows * w.stride + j * w.columns;
    return (by_row ? e : w.positions[e]) * w.rows * w.columns;
  }
  float gate(int64_t line, int64_t e) const {
    if (w.gate == nullptr) return 1.0f;
    const int64_t i = by_row ? line : indices[e], j = by_row ? indices[e] : line;
    return w.gate[i * ceil_div(w.in, w.columns) + j];
  }
  int64_t stride() const { return w.positions == nullptr ? w.stride : w.columns; }
  // Floats of the panels of a line's outputs, for each column across.
  int64_t padded(const MatmulPasses& passes) const {
    int64_t width = 0;
    for (int64_t done = 0; done < span;) {
      const int panel = passes.panel_width(span - done);
      width += panel;
      done += panel;
    }
    return width;
  }
  int64_t blocks() const { return offsets[count]; }
};

// The first line from which the lines up to `end` weigh at most the share `part` of `parts`; a line weighs its blocks and one
// more for its outputs.
int64_t split_lines(const Lines& lines, int64_t begin, int64_t end, int64_t part, int64_t parts) {
  const auto weight = [&](int64_t line) { return static_cast<int64_t>(lines.offsets[line]) + line; };
  const int64_t target = weight(begin) + (weight(end) - weight(begin)) * part / parts;
  int64_t low = begin, high = end;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    weight(middle) < target ? low = middle + 1 : high = middle;
  }
  return low;
}

// Each worker takes items from one counter and has scratch of its own.
template <class F>
void for_items(int threads, int64_t items, F&& f) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::clamp<int64_t>(items, 1, threads);
  parallel_for(static_cast<int>(workers), workers, [&](int64_t worker) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) f(worker, item);
  });
}

class Product {
 public:
  Product(Dtype dtype, const Lines& lines, Tokens x, const void* bias, Activation activation, void* y, void* saved,
          Workspace workspace, int threads)
      : passes_(matmul_passes()), dtype_(dtype), lines_(lines), x_(x), activation_(activation), y_(y), saved_(saved),
        threads_(threads), stream_(x.count * lines.extent * element_bytes(dtype) > kStreamBytes),
        direct_(dtype == Dtype::float32 && activation == Activation::none) {
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
    if (stream_) advise_huge_pages(y_, x_.count * lines_.extent * element_bytes(dtype_));
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
      if (stream_) passes_.settle();
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
      float* y = direct_ ? static_cast<float*>(y_) + first : tile;
      const int64_t stride = direct_ ? lines_.extent : width;
      const float* bias = bias_ == nullptr ? nullptr : bias_ + line * padded_ + at;
      const int64_t step = passes_.tile_tokens(width);
      for (int64_t t = 0; t < tokens; t += step) {
        const int64_t count = std::min(step, tokens - t);
        passes_.product({rows.data + t * rows.stride, rows.stride, panel, bias, y + t * stride, stride, width,
                         static_cast<int>(columns), direct_ && stream_},
                        active, count);
        if (!direct_) write(y + t * stride, stride, count, columns, first + t * lines_.extent);
      }
    });
  }

  // From z in the cache: what the backward pass needs, the activation, the narrower numbers.
  void write(float* z, int64_t stride, int64_t tokens, int64_t columns, int64_t first) {
    for (int64_t t = 0; t < tokens; ++t, z += stride, first += lines_.extent) {
      if (saved_ != nullptr) passes_.narrow(dtype_, z, offset_by(saved_, first, dtype_), columns, stream_);
      passes_.activate(activation_, z, columns);
      passes_.narrow(dtype_, z, offset_by(y_, first, dtype_), columns, stream_);
    }
  }

  const MatmulPasses& passes_;
  Dtype dtype_;
  const Lines& lines_;
  Tokens x_;
  Activation activation_;
  void *y_, *saved_;
  int threads_;
  bool stream_, direct_;
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

// ---------------------------------------------------------------------------------------------- weight gradient

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
    Arena arena(workspace);
    left_ = arena.take<float>(chunk_ * grid_rows_ * w.rows);
    right_ = arena.take<float>(column_floats() * panel_.across);
  }

  static int64_t workspace_bytes(const BlockMatrix& w, int64_t tokens, int64_t x_stride) {
    const PanelColumns panel(w, x_stride);
    const int64_t chunk = chunk_tokens(w, panel, tokens), stride = column_stride(matmul_passes(), w);
    const int64_t floats = chunk * ceil_div(w.out, w.rows) * w.rows + (chunk + panel.reach) * panel.across * stride;
    return floats * 4 + 2 * 64;
  }

  void run() {
    if (!packed()) advise_huge_pages(raw_, w_.out * w_.in * 4);
    if (dz_.count == 0) std::fill_n(raw_, packed() ? blocks() * w_.rows * w_.columns : w_.out * w_.in, 0);
    else if (!everything()) clear_rest();
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

  void add_block(int64_t e, int64_t i, int64_t j, int64_t tokens, bool first, bool last) {
    const int64_t rows = std::min(w_.rows, w_.out - i * w_.rows), columns = std::min(w_.columns, w_.in - j * w_.columns);
    const int64_t stride = packed() ? w_.columns : w_.in;
    float* out = raw_ + (packed() ? e * w_.rows * w_.columns : i * w_.rows * w_.in + j * w_.columns);
    if (packed() && first && (rows < w_.rows || columns < w_.columns))  // what lies past the edge
      std::fill_n(out, w_.rows * w_.columns, 0);
    const float* right = right_ + j % panel_.across * column_floats() + j / panel_.across * column_stride_;
    passes_.outer_sum({left_ + i * chunk_ * w_.rows, w_.rows, rows, right, column_stride_, columns, tokens, out, stride, !first});
    if (!last || (grad_gate_ == nullptr && w_.gate == nullptr)) return;
    const float gate = w_.gate == nullptr ? 1.0f : w_.gate[i * grid_columns_ + j];
    double product = 0;
    const int64_t from = packed() ? e * w_.rows * w_.columns : i * w_.rows * w_.stride + j * w_.columns;
    const int64_t data_stride = packed() ? w_.columns : w_.stride;
    for (int64_t r = 0; r < rows; ++r)
      product += passes_.finish(dtype_, offset_by(w_.data, from + r * data_stride, dtype_), out + r * stride, gate, columns);
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
};

}  // namespace

namespace {

[[noreturn]] void refuse_index() {
  throw std::invalid_argument("layout must be the index of the weight's blocks; it was changed since it was made");
}

// Throws unless the index lies within the matrix: one that was written over would have the product read anything.
void require_fit(const Lines& lines) {
  const BlockMatrix& w = lines.w;
  const int64_t across = ceil_div(lines.other_extent, lines.other_span), all = lines.count * across;
  const int64_t stored = w.positions == nullptr ? all : std::min(w.stored, all);
  bool fits = lines.offsets[0] == 0;
  for (int64_t i = 0; i < lines.count; ++i) fits &= lines.offsets[i] <= lines.offsets[i + 1];
  const int64_t active = lines.offsets[lines.count];
  fits = fits && active <= stored;
  if (!fits) refuse_index();
  const auto within = [active](const int32_t* entries, int64_t end) {
    bool all = true;  // a plain loop over unsigned numbers, for the compiler's vectors
    const uint32_t limit = static_cast<uint32_t>(std::min<int64_t>(end, std::numeric_limits<int32_t>::max()));
    for (int64_t e = 0; e < active; ++e) all &= static_cast<uint32_t>(entries[e]) < limit;
    return all;
  };
  fits = within(lines.indices, across) && (lines.by_row || w.positions == nullptr || within(w.positions, stored));
  if (!fits) refuse_index();
}

}  // namespace

int64_t masked_matmul_workspace_bytes(const BlockMatrix& w, int64_t tokens, int threads) {
  const Lines rows(w, true), columns(w, false);
  require_fit(rows);
  require_fit(columns);
  const int64_t most = std::max(Product::workspace_bytes(rows, threads), Product::workspace_bytes(columns, threads));
  return std::max(most, few_workspace_bytes(rows, std::min(tokens, kFewTokens)));
}

void masked_matmul(Dtype dtype, const BlockMatrix& w, Tokens x, const void* bias, Activation activation, void* y, void* saved,
                   Workspace workspace, int threads) {
  const Lines lines(w, true);
  if (x.count == 0 || w.out == 0) return;
  if (x.count <= kFewTokens) return multiply_few(dtype, lines, x, bias, activation, y, saved, workspace, threads);
  Product(dtype, lines, x, bias, activation, y, saved, workspace, threads).run();
}

void masked_matmul_input_gradient(Dtype dtype, const BlockMatrix& w, Tokens dz, void* dx, Workspace workspace, int threads) {
  const Lines lines(w, false);
  if (dz.count == 0 || w.in == 0) return;
  Product(dtype, lines, dz, nullptr, Activation::none, dx, nullptr, workspace, threads).run();
}

int64_t sampled_matmul_workspace_bytes(const BlockMatrix& w, int64_t tokens, int64_t x_stride) {
  if (w.layout.row_offsets != nullptr && w.out != 0 && w.in != 0) require_fit(Lines(w, true));
  return Sampled::workspace_bytes(w, tokens, x_stride);
}

void sampled_matmul(Dtype dtype, const BlockMatrix& w, Tokens dz, Tokens x, float* raw, float* grad_gate, Workspace workspace,
                    int threads) {
  if (w.out == 0 || w.in == 0) return;
  Sampled(dtype, w, dz, x, raw, grad_gate, workspace, threads).run();
}

namespace {

// Lines from the one with most blocks, of `length` at most, to that with fewest, equal ones as they come.
void longest_first(const int32_t* offsets, int64_t lines, int64_t length, int32_t* counts, int32_t* order) {
  const auto count = [&](int64_t i) -> int32_t& { return counts[length - (offsets[i + 1] - offsets[i])]; };
  std::fill_n(counts, length + 1, 0);
  for (int64_t i = 0; i < lines; ++i) ++count(i);
  std::exclusive_scan(counts, counts + length + 1, counts, 0);
  for (int64_t i = 0; i < lines; ++i) order[count(i)++] = static_cast<int32_t>(i);
}

template <class U>
void layout_of(const U* gate, U magnitude, const uint8_t* mask, int64_t grid_rows, int64_t grid_columns, int32_t* counts,
               int32_t* row_offsets, int32_t* column_indices, int32_t* column_offsets, int32_t* row_indices, int32_t* order) {
  const int64_t all = grid_rows * grid_columns;
  std::fill_n(column_offsets, grid_columns + 1, 0);
  int32_t count = 0;
  for (int64_t i = 0; i < grid_rows; ++i) {
    row_offsets[i] = count;
    for (int64_t j = 0; j < grid_columns; ++j) {
      const int64_t b = i * grid_columns + j;
      if ((gate[b] & magnitude) == 0 || (mask != nullptr && mask[b] == 0)) continue;
      column_indices[count++] = static_cast<int32_t>(j);
      ++column_offsets[j + 1];
    }
  }
  row_offsets[grid_rows] = count;
  for (int64_t j = 0; j < grid_columns; ++j) column_offsets[j + 1] += column_offsets[j];
  // each column's next free place is kept in its offset while it is filled, and moved back after
  for (int64_t i = 0; i < grid_rows; ++i)
    for (int32_t e = row_offsets[i]; e < row_offsets[i + 1]; ++e)
      row_indices[column_offsets[column_indices[e]]++] = static_cast<int32_t>(i);
  for (int64_t j = grid_columns; j > 0; --j) column_offsets[j] = column_offsets[j - 1];
  column_offsets[0] = 0;
  std::fill(column_indices + count, column_indices + all, 0);
  std::fill(row_indices + count, row_indices + all, 0);
  longest_first(row_offsets, grid_rows, grid_columns, counts, order);
  longest_first(column_offsets, grid_columns, grid_rows, counts, order + grid_rows);
}

}  // namespace

void block_layout(const void* gate, int gate_bytes, const uint8_t* mask, int64_t grid_rows, int64_t grid_columns,
                  int32_t* counts, int32_t* row_offsets, int32_t* column_indices, int32_t* column_offsets,
                  int32_t* row_indices, int32_t* order) {
  const auto as = [&](auto* bits, auto magnitude) {
    layout_of(bits, magnitude, mask, grid_rows, grid_columns, counts, row_offsets, column_indices, column_offsets, row_indices,
              order);
  };
  // every bit but the sign: what is not a zero is active, NaN too
  if (gate_bytes == 8) as(static_cast<const uint64_t*>(gate), ~uint64_t(0) >> 1);
  else if (gate_bytes == 4) as(static_cast<const uint32_t*>(gate), ~uint32_t(0) >> 1);
  else if (gate_bytes == 2) as(static_cast<const uint16_t*>(gate), uint16_t(0x7fff));
  else as(static_cast<const uint8_t*>(gate), uint8_t(0xff));
}

}  // namespace spartan::cpu
