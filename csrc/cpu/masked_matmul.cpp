#include <cmath>

#include "arena.h"
#include "block_lines.h"
#include "narrow_product.h"
#include "row_writer.h"

namespace spartan::cpu {
namespace {

constexpr int64_t kChunkFloats = 40 << 10;     // of tokens that stay in a core's second-level cache
constexpr int64_t kGroupOutputs = 256;         // of y that are summed beside them, then written in long pieces
constexpr int64_t kFewTokens = 8;              // for which weights are used where they lie
constexpr int64_t kItemsPerThread = 4;

// Tokens are packed in tiles, of the columns alone that active blocks read: windows of a convolution have many that none
// does. Weights are packed in panels; a tile's sums with a panel stay in registers. Sums of a group of lines are
// gathered in the cache, so that y is written in rows, each once.
class Product {
 public:
  Product(Dtype dtype, const Lines& lines, Tokens x, const void* bias, const RowWriter& writer, Workspace workspace, int threads)
      : passes_(matmul_passes()), dtype_(dtype), lines_(lines), x_(x), writer_(writer), threads_(threads),
        plan_(lines, x.count, threads) {
    Arena arena(workspace);
    panels_ = arena.take<float>(plan_.panel_floats);
    bias_ = arena.take<float>(lines.count * plan_.padded);
    tokens_ = arena.take<float>(plan_.copies * plan_.chunk_floats);
    sums_ = arena.take<float>(threads * plan_.chunk * plan_.group);
    places_ = arena.take<int32_t>(plan_.across);
    place_columns(arena.take<int32_t>(lines.blocks()));
    spread_bias(bias);
  }

  static int64_t workspace_bytes(const Lines& lines, int64_t tokens, int threads) {
    const Plan plan(lines, tokens, threads);
    const int64_t floats = plan.panel_floats + lines.count * plan.padded + plan.copies * plan.chunk_floats +
                           threads * plan.chunk * plan.group;
    return floats * static_cast<int64_t>(sizeof(float)) + (plan.across + lines.blocks()) * static_cast<int64_t>(sizeof(int32_t)) +
           6 * 64;
  }

  void run() {
    writer_.prepare(x_.count);
    if (plan_.shared()) {
      for_items(threads_, plan_.chunks, [&](int64_t, int64_t chunk) { pack_chunk(chunk, chunk); });
    }
    for (int64_t begin = 0; begin < lines_.count;) {
      const int64_t end = packed_end(lines_, plan_.padded * lines_.other_span, begin);
      pack_lines(begin, end);
      multiply_lines(begin, end);
      begin = end;
    }
  }

 private:
  // Sizes of a product. Chunks of tokens are the items of work; where they are few, so are parts of the lines, and all parts
  // share the packed tokens of a chunk.
  struct Plan {
    int tile;
    int64_t padded, across, extent, chunk, chunks, chunk_floats, parts, copies, group, panel_floats;

    Plan(const Lines& lines, int64_t tokens, int threads) {
      const MatmulPasses& passes = matmul_passes();
      tile = passes.tile_tokens(passes.panel_width(lines.span));
      padded = lines.padded(passes);
      across = ceil_div(lines.other_extent, lines.other_span);
      extent = std::min(lines.other_extent, lines.blocks() * lines.other_span);  // at most; blocks may share columns
      const int64_t tiles = std::clamp<int64_t>(kChunkFloats / std::max<int64_t>(extent, 1) / tile, 2, 16);
      tokens = std::max<int64_t>(tokens, 1);
      chunk = std::min(tiles, ceil_div(tokens, tile)) * tile;
      chunks = ceil_div(tokens, chunk);
      parts = std::clamp<int64_t>(ceil_div(threads * kItemsPerThread, chunks), 1, std::max<int64_t>(lines.count, 1));
      chunk_floats = chunk * extent + passes.lanes;
      copies = shared() ? chunks : threads;
      group = std::min(std::max(kGroupOutputs, lines.span), lines.extent) + passes.lanes * 4;
      panel_floats = packed_floats(lines, padded * lines.other_span);
    }

    bool shared() const { return parts > 1; }
  };

  // Numbers the columns of blocks that are read, in their order: where each is packed, -1 for the others. Where all are
  // read, which the first lines mostly show, blocks are found by the index as it is, and `packed` stays unused.
  void place_columns(int32_t* packed) {
    std::fill_n(places_, plan_.across, -1);
    int64_t read = 0;
    for (int64_t e = 0; e < lines_.blocks() && read < plan_.across; ++e) {
      int32_t& place = places_[lines_.indices[e]];
      read += place < 0;
      place = 0;
    }
    indices_ = lines_.indices;
    extent_ = lines_.other_extent;
    if (read == plan_.across) return;
    int32_t used = 0;
    for (int64_t j = 0; j < plan_.across; ++j)
      if (places_[j] == 0) places_[j] = used++;
    for (int64_t e = 0; e < lines_.blocks(); ++e) packed[e] = places_[lines_.indices[e]];
    indices_ = packed;
    extent_ = used * lines_.other_span;
    if (plan_.across > 0 && places_[plan_.across - 1] >= 0) extent_ -= plan_.across * lines_.other_span - lines_.other_extent;
  }

  void spread_bias(const void* bias) {
    if (bias == nullptr) {
      bias_ = nullptr;
      return;
    }
    std::fill_n(bias_, lines_.count * plan_.padded, 0);
    for (int64_t line = 0; line < lines_.count; ++line)
      passes_.widen(dtype_, offset_by(bias, line * lines_.span, dtype_), bias_ + line * plan_.padded, lines_.outputs(line));
  }

  float* panel_of(int64_t line, int64_t first_line) const {
    return panels_ + (lines_.offsets[line] - lines_.offsets[first_line]) * plan_.padded * lines_.other_span;
  }

  // Calls f(first output, width, outputs, panel) for the panels of a line.
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

  float* packed_chunk(int64_t copy) const { return tokens_ + copy * plan_.chunk_floats; }
  int64_t tokens_of(int64_t chunk) const { return std::min(plan_.chunk, x_.count - chunk * plan_.chunk); }

  void pack_chunk(int64_t chunk, int64_t copy) {
    const int64_t first = chunk * plan_.chunk, tokens = tokens_of(chunk);
    if (extent_ == lines_.other_extent) {
      const void* x = offset_by(x_.data, first * x_.stride, dtype_);
      return passes_.pack_tokens(dtype_, x, x_.stride, tokens, extent_, plan_.tile, packed_chunk(copy));
    }
    for (int64_t t = 0; t < tokens; t += plan_.tile) {
      float* tile = packed_chunk(copy) + t * extent_;
      for (int64_t j = 0; j < plan_.across; ++j) {
        if (places_[j] < 0) continue;
        const int64_t begin = j * lines_.other_span;
        while (j + 1 < plan_.across && places_[j + 1] >= 0) ++j;
        const int64_t end = std::min((j + 1) * lines_.other_span, lines_.other_extent);
        // vectors may reach into what lies behind, which is packed after
        passes_.pack_tokens(dtype_, offset_by(x_.data, (first + t) * x_.stride + begin, dtype_), x_.stride,
                            std::min<int64_t>(plan_.tile, tokens - t), end - begin, plan_.tile,
                            tile + places_[begin / lines_.other_span] * lines_.other_span * plan_.tile);
      }
    }
  }

  void multiply_lines(int64_t begin, int64_t end) {
    const int64_t parts = std::min(plan_.parts, end - begin);
    for_items(threads_, plan_.chunks * parts, [&](int64_t worker, int64_t item) {
      const int64_t chunk = item / parts, part = item % parts, copy = plan_.shared() ? chunk : worker;
      if (!plan_.shared()) pack_chunk(chunk, copy);
      float* sums = sums_ + worker * plan_.chunk * plan_.group;
      const int64_t to = split_lines(lines_, begin, end, part + 1, parts);
      for (int64_t line = split_lines(lines_, begin, end, part, parts); line < to;) {
        const int64_t first = line;
        int64_t held = 0;
        do {
          multiply_line(line, begin, chunk, packed_chunk(copy), sums + held);
          held += lines_.outputs(line++);
        } while (line < to && held + lines_.span <= kGroupOutputs);
        writer_.write(sums, plan_.group, tokens_of(chunk), held, chunk * plan_.chunk * lines_.extent + first * lines_.span);
      }
      writer_.settle();
    });
  }

  // The sums of a line, `plan_.group` apart; whole vectors are stored, so that lines go in order.
  void multiply_line(int64_t line, int64_t first_line, int64_t chunk, const float* tokens, float* sums) {
    const int64_t entry = lines_.offsets[line];
    const ActiveBlocks active{indices_ + entry, lines_.offsets[line + 1] - entry, lines_.other_span, extent_};
    for_panels(line, first_line, [&](int64_t at, int width, int64_t, const float* panel) {
      const float* bias = bias_ == nullptr ? nullptr : bias_ + line * plan_.padded + at;
      passes_.product({tokens, plan_.tile * extent_, plan_.tile, panel, bias, sums + at, plan_.group, width}, active,
                      tokens_of(chunk));
    });
  }

  const MatmulPasses& passes_;
  Dtype dtype_;
  const Lines& lines_;
  Tokens x_;
  const RowWriter& writer_;
  int threads_;
  Plan plan_;
  float *panels_, *bias_, *tokens_, *sums_;
  int32_t* places_;         // of columns of blocks in what is packed, unless all are
  const int32_t* indices_;  // of the active blocks there
  int64_t extent_ = 0;          // columns that are packed
};

bool few(const Lines& lines, int64_t tokens) { return tokens <= kFewTokens && lines.other_span >= matmul_passes().lanes; }

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
  threads = worthwhile(threads, product_work(lines, tokens));  // what the product will take
  if (NarrowProduct::serves(lines)) return NarrowProduct::workspace_bytes(lines, tokens, threads);
  if (!input_gradient && few(lines, tokens)) return few_workspace_bytes(lines, tokens);
  return Product::workspace_bytes(lines, tokens, threads);
}

void masked_matmul(Dtype dtype, const BlockMatrix& w, Tokens x, const void* bias, Activation activation, void* y, void* saved,
                   Workspace workspace, int threads) {
  const Lines lines(w, true);
  if (x.count == 0 || w.out == 0) return;
  threads = worthwhile(threads, product_work(lines, x.count));
  const RowWriter writer(dtype, lines.extent, x.count, activation, y, saved);
  if (NarrowProduct::serves(lines)) return NarrowProduct(dtype, lines, x, bias, writer, workspace, threads).run();
  if (few(lines, x.count)) return multiply_few(dtype, lines, x, bias, activation, y, saved, workspace, threads);
  Product(dtype, lines, x, bias, writer, workspace, threads).run();
}

void masked_matmul_input_gradient(Dtype dtype, const BlockMatrix& w, Tokens dz, void* dx, Workspace workspace, int threads) {
  const Lines lines(w, false);
  if (dz.count == 0 || w.in == 0) return;
  threads = worthwhile(threads, product_work(lines, dz.count));
  const RowWriter writer(dtype, lines.extent, dz.count, Activation::none, dx, nullptr);
  if (NarrowProduct::serves(lines)) return NarrowProduct(dtype, lines, dz, nullptr, writer, workspace, threads).run();
  Product(dtype, lines, dz, nullptr, writer, workspace, threads).run();
}

int64_t multiply_adds(int64_t rounds, float* sinks, int threads) {
  const MatmulPasses& passes = matmul_passes();
  int64_t operations = 0;
  parallel_for(threads, threads, [&](int64_t item) {
    const int64_t done = passes.multiply_adds(rounds, sinks + item);
    if (item == 0) operations = done * threads;
  });
  return operations;
}

}  // namespace spartan::cpu
