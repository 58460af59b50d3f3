// Products with the active blocks of a matrix: y = act(x w^T + b) by rows of blocks, dx = dz w by columns of blocks.
//
// A thread block has kTokens tokens and up to kWidth outputs of one line (a row or column of blocks); the longest lines come
// first, and all of them with a group of tokens that the L2 cache holds before the next group. The active blocks of the line
// lie side by side as the depth of the sum, whatever their size. Steps of it are copied to shared memory ahead of the
// arithmetic; the indices that say from where are copied a full round of stages before that.
#include "masked_matmul_tile.cuh"

namespace spartan::cuda {
namespace {

constexpr int kTokens = 128;
constexpr int kStages = 3;
constexpr int kFewTiles = 256;  // under which the depth is split between thread blocks
constexpr int kMostParts = 16;
constexpr int64_t kGroupBytes = 16 << 20;  // of x that stay in the L2 cache, beside weights and outputs
constexpr int64_t kMostGrouped = 16;

template <class T>
struct Product {
  const T *x, *w, *bias;
  const float* gate;
  T *y, *saved;
  float* parts;  // sums of each part of the depth, or null
  const int32_t *order, *offsets, *indices, *positions;  // positions: of packed blocks, null where they lie in the line's order
  int64_t tokens, stride_x, gate_line, gate_other;
  int64_t stride_w, line_step, block_step;  // in w: between rows, lines, and blocks across (of packed blocks: in their order)
  int lines, span, extent, other, other_extent;  // `other`: across the line, where the sum runs
  int group;                                     // tiles of tokens that all lines are multiplied with before the next
  Activation activation;
  bool packed, packs;  // packs: outputs may be written four at a time
};

__device__ inline float activated(Activation activation, float z) {
  switch (activation) {
    case Activation::relu: return z < 0.0f ? 0.0f : z;  // NaN stays
    case Activation::gelu: return 0.5f * z * (1.0f + erff(z * 0.70710678f));
    case Activation::gelu_tanh: return 0.5f * z * (1.0f + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
    case Activation::silu: return z / (1.0f + expf(-z));
    default: return z;
  }
}

// From the sums of V neighbouring outputs of one token, the first of them `output`, to what is kept at `at`.
template <int V, class T>
__device__ inline void finish(const Product<T>& p, const Pack<float, V>& sums, int output, int64_t at) {
  Pack<T, V> z, y;
#pragma unroll
  for (int l = 0; l < V; ++l) {
    const float sum = sums.lane[l] + (p.bias == nullptr ? 0.0f : to_float(p.bias[output + l]));
    z.lane[l] = from_float<T>(sum);
    y.lane[l] = from_float<T>(activated(p.activation, sum));
  }
  if (p.saved != nullptr) store_pack<V>(p.saved + at, z);
  store_pack<V>(p.y + at, y);
}

// One thread block's part of a product: which tokens, outputs and steps of the depth.
struct Place {
  int line, within, outputs;  // the first output in its block, and how many there are from it on
  int64_t token;
  int first, chunks, begin, end;  // entries of the line start at `first`; `chunks` of depth in all; steps

  template <class T>
  __device__ Place(const Product<T>& p, int width) {
    const int pieces = (p.span + width - 1) / width;
    const int64_t whole = static_cast<int64_t>(p.group) * p.lines * pieces, group = blockIdx.x / whole;
    const int64_t first_tile = group * p.group, tile = blockIdx.x % whole;
    const int64_t tiles = min((p.tokens + kTokens - 1) / kTokens - first_tile, static_cast<int64_t>(p.group));
    token = (first_tile + tile % tiles) * kTokens;
    within = static_cast<int>(tile / tiles % pieces) * width;
    line = p.order[tile / tiles / pieces];
    outputs = min(p.span, p.extent - line * p.span) - within;
    first = p.offsets[line];
    const int depth = (p.offsets[line + 1] - first) * p.other;
    const int steps = (depth + kStep<T> - 1) / kStep<T>, each = (steps + gridDim.y - 1) / gridDim.y;
    chunks = depth / kChunk<T>;
    begin = min(static_cast<int>(blockIdx.y) * each, steps);
    end = min(begin + each, steps);
  }

  // Where the weight of output n of this tile and depth k of a block lies.
  template <bool kByColumn, class T>
  __device__ int64_t weight(const Product<T>& p, int block, int n, int k) const {
    const int64_t start = line * p.line_step + block * p.block_step;
    return kByColumn ? start + k * p.stride_w + within + n : start + (within + n) * p.stride_w + k;
  }
};

// What is known of the chunks of depth of the steps under way. The index of a step is copied kStages before its numbers.
struct Steps {
  int index[kStages + 1][kStepChunks], position[kStages + 1][kStepChunks];
  float gate[kStages][kStepChunks];
};

// Copies where blocks and rows are aligned to 16 bytes.
template <class T, int kWidth, bool kByColumn>
class Copies {
 public:
  __device__ Copies(const Product<T>& p, const Place& place, uint4* tiles, Steps& steps)
      : p_(p), place_(place), tiles_(tiles), steps_(steps), thread_(static_cast<int>(threadIdx.x)),
        block_chunks_(p.other / kChunk<T>) {}

  __device__ uint4* left(int step) const { return tiles_ + step % kStages * kStageChunks; }
  __device__ uint4* right(int step) const { return left(step) + kTokens * kStepChunks; }

  // Indices of the first kStages steps and gates of the first.
  __device__ void prepare() const {
    if (thread_ < kStages * kStepChunks) index(place_.begin + thread_ / kStepChunks);
    close_copies();
    wait_for_copies<0>();
    __syncthreads();
    gates(place_.begin);
    close_copies();
    wait_for_copies<0>();
    __syncthreads();
  }

  // Starts one group: the numbers of a step, the gates of the next and indices of the one kStages later.
  __device__ void start(int step) const {
    if (step < place_.end) {
      tokens(step);
      weights(step);
    }
    gates(step + 1);
    if (thread_ < kStepChunks) index(step + kStages);
    close_copies();
  }

  // This thread's weights, which have arrived, times their gate.
  __device__ void scale(int step) const {
    if (p_.gate == nullptr) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = thread_ + i * kThreads;
      const float gate = steps_.gate[step % kStages][kByColumn ? at / kRowChunks / kChunk<T> : at % kStepChunks];
      if (gate != 1.0f) scale_chunk<T>(right(step) + (kByColumn ? swizzled<T, kRowChunks>(at / kRowChunks, at % kRowChunks)
                                                                : swizzled<T, kStepChunks>(at / kStepChunks, at % kStepChunks)),
                                       gate);
    }
  }

  static constexpr int kStageChunks = (kTokens + kWidth) * kStepChunks;

 private:
  static constexpr int kRowChunks = kWidth / kChunk<T>;                  // of weights that lie across
  static constexpr int kEach = kWidth * kStepChunks / kThreads;          // chunks of weights of a thread
  static_assert(kEach >= 1 && kTokens * kStepChunks % kThreads == 0);

  __device__ int entry(int chunk) const { return chunk / block_chunks_; }

  __device__ void index(int step) const {
    const int kc = thread_ % kStepChunks, chunk = step * kStepChunks + kc, bytes = chunk < place_.chunks ? 4 : 0;
    const int at = bytes == 0 ? 0 : place_.first + entry(chunk);
    copy4_async(&steps_.index[step % (kStages + 1)][kc], p_.indices + at, bytes);
    if (p_.positions != nullptr) copy4_async(&steps_.position[step % (kStages + 1)][kc], p_.positions + at, bytes);
  }

  __device__ void gates(int step) const {
    if (p_.gate == nullptr || thread_ >= kStepChunks) return;
    const int chunk = step * kStepChunks + thread_, index = steps_.index[step % (kStages + 1)][thread_];
    copy4_async(&steps_.gate[step % kStages][thread_], p_.gate + place_.line * p_.gate_line + index * p_.gate_other,
                chunk < place_.chunks ? 4 : 0);
  }

  __device__ void tokens(int step) const {
    constexpr int kRowsApart = kThreads / kStepChunks;
    const int kc = thread_ % kStepChunks, row = thread_ / kStepChunks, chunk = step * kStepChunks + kc;
    const int at = steps_.index[step % (kStages + 1)][kc] * p_.other + chunk % block_chunks_ * kChunk<T>;
    const int numbers = chunk < place_.chunks ? max(min(kChunk<T>, p_.other_extent - at), 0) : 0;
    const int64_t rows = p_.tokens - place_.token - row;
    const T* from = p_.x + (place_.token + row) * p_.stride_x + at;  // not read where the copy is of 0 bytes
    uint4* to = left(step) + swizzled<T, kStepChunks>(row, kc);
#pragma unroll
    for (int i = 0; i < kTokens / kRowsApart; ++i) {
      copy16_async(to + i * kRowsApart * kStepChunks, from, rows > i * kRowsApart ? numbers * static_cast<int>(sizeof(T)) : 0);
      from += kRowsApart * p_.stride_x;
    }
  }

  __device__ void weights(int step) const {
    const int outputs = place_.outputs;  // four chunks, unrolled, take more registers than there are beside the sums
    uint4* to = right(step);
#pragma unroll kEach == 4 ? 1 : kEach
    for (int i = 0; i < kEach; ++i) {
      const int at = thread_ + i * kThreads;
      const int row = kByColumn ? at / kRowChunks : at / kStepChunks, across = kByColumn ? at % kRowChunks : at % kStepChunks;
      const int kc = kByColumn ? row / kChunk<T> : across, chunk = step * kStepChunks + kc;
      const int n = kByColumn ? across * kChunk<T> : row;                                   // output in this tile
      const int k = chunk % block_chunks_ * kChunk<T> + (kByColumn ? row % kChunk<T> : 0);  // depth in its block
      const int index = steps_.index[step % (kStages + 1)][kc], other = index * p_.other + k;
      const int rest = kByColumn ? outputs - n : p_.other_extent - other;
      const bool inside = chunk < place_.chunks && n < outputs && other < p_.other_extent;
      const int block = !p_.packed ? index
                        : p_.positions != nullptr ? steps_.position[step % (kStages + 1)][kc]
                                                  : place_.first + entry(chunk);
      copy16_async(to + (kByColumn ? swizzled<T, kRowChunks>(row, across) : swizzled<T, kStepChunks>(row, across)),
                   p_.w + place_.template weight<kByColumn>(p_, block, n, k),
                   inside ? min(rest, kChunk<T>) * static_cast<int>(sizeof(T)) : 0);
    }
  }

  const Product<T>& p_;
  const Place& place_;
  uint4* tiles_;
  Steps& steps_;
  int thread_, block_chunks_;
};

// The same where nothing is aligned: number by number, when its turn has come.
template <class T, int kWidth, bool kByColumn>
__device__ inline void gather(const Product<T>& p, const Place& place, int step, uint4* left, uint4* right) {
  constexpr int V = kChunk<T>;
  const int depth = (p.offsets[place.line + 1] - place.first) * p.other;
  for (int q = static_cast<int>(threadIdx.x); q < kTokens * kStepChunks; q += kThreads) {
    const int row = q / kStepChunks, kc = q % kStepChunks;
    const int64_t token = place.token + row;
    Pack<T, V> chunk;
#pragma unroll 1
    for (int l = 0; l < V; ++l) {
      const int k = step * kStep<T> + kc * V + l;
      T value = from_float<T>(0.0f);
      if (k < depth && token < p.tokens) {
        const int other = p.indices[place.first + k / p.other] * p.other + k % p.other;
        if (other < p.other_extent) value = p.x[token * p.stride_x + other];
      }
      reinterpret_cast<T*>(left + swizzled<T, kStepChunks>(row, kc))[l] = value;
    }
  }
  constexpr int kRowChunks = kByColumn ? kWidth / V : kStepChunks;
  for (int q = static_cast<int>(threadIdx.x); q < kWidth * kStepChunks; q += kThreads) {
    const int row = q / kRowChunks, across = q % kRowChunks;
#pragma unroll 1
    for (int l = 0; l < V; ++l) {
      const int k = step * kStep<T> + (kByColumn ? row : across * V + l), n = kByColumn ? across * V + l : row;
      T value = from_float<T>(0.0f);
      if (k < depth && n < place.outputs) {
        const int entry = place.first + k / p.other, index = p.indices[entry], within = k % p.other;
        if (index * p.other + within < p.other_extent) {
          const int block = !p.packed ? index : p.positions != nullptr ? p.positions[entry] : entry;
          value = p.w[place.template weight<kByColumn>(p, block, n, within)];
          if (p.gate != nullptr)
            value = from_float<T>(to_float(value) * p.gate[place.line * p.gate_line + index * p.gate_other]);
        }
      }
      reinterpret_cast<T*>(right + swizzled<T, kRowChunks>(row, across))[l] = value;
    }
  }
}

template <class T, int kWidth, bool kByColumn>
struct TileOf {
  using type = TensorCoreTile<T, kTokens, kWidth, 4, 2, false, kByColumn>;
};
template <int kWidth, bool kByColumn>
struct TileOf<float, kWidth, kByColumn> {
  using type = FmaTile<kTokens, kWidth, kThreads, false, kByColumn>;
};

template <class T, int kWidth>
constexpr int shared_bytes() {
  const size_t stages = kStages * Copies<T, kWidth, false>::kStageChunks * sizeof(uint4) + sizeof(Steps);
  return static_cast<int>(std::max(stages, kTokens * (kWidth + kStagePadding) * sizeof(float)));
}

// Thread blocks that are to fit on a processor. Of the widest only an H100 has the shared memory for two, and then each has
// 128 registers a thread.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kWidestTogether = 2;
#else
constexpr int kWidestTogether = 1;
#endif
template <class T, int kWidth, bool kByColumn>
constexpr int kTogether = kWidth == 128 ? kWidestTogether : 2;
template <>
constexpr int kTogether<Tf32, 128, true> = 1;  // loads by columns take more registers

template <class T, int kWidth, bool kByColumn, bool kAligned>
__global__ void __launch_bounds__(kThreads, kTogether<T, kWidth, kByColumn>) product_kernel(Product<T> p) {
  using Tile = typename TileOf<T, kWidth, kByColumn>::type;
  static_assert(Tile::kThreads == kThreads);
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared());
  const Place place(p, kWidth);
  Tile tile;
  if constexpr (kAligned) {
    Steps& steps = *reinterpret_cast<Steps*>(shared + kStages * Copies<T, kWidth, kByColumn>::kStageChunks);
    const Copies<T, kWidth, kByColumn> copies(p, place, shared, steps);
    if (place.begin < place.end) {
      copies.prepare();
      for (int step = place.begin; step < place.begin + kStages - 1; ++step) {
        copies.start(step);
        __syncthreads();  // indices that were read are overwritten by the next start
      }
    }
    for (int step = place.begin; step < place.end; ++step) {
      wait_for_copies<kStages - 2>();
      copies.scale(step);
      __syncthreads();  // the step is here, and nobody reads the one before, whose place the next copies take
      copies.start(step + kStages - 1);
      tile.add(copies.left(step), copies.right(step));
    }
    wait_for_copies<0>();
  } else {
    for (int step = place.begin; step < place.end; ++step) {
      __syncthreads();
      gather<T, kWidth, kByColumn>(p, place, step, shared, shared + kTokens * kStepChunks);
      __syncthreads();
      tile.add(shared, shared + kTokens * kStepChunks);
    }
  }
  __syncthreads();
  float* stage = reinterpret_cast<float*>(shared);
  tile.store(stage);
  __syncthreads();

  const int output = place.line * p.span + place.within;
  const int columns = min(place.outputs, kWidth);
  for (int q = static_cast<int>(threadIdx.x); q < kTokens * (kWidth / 4); q += kThreads) {
    const int row = q / (kWidth / 4), column = q % (kWidth / 4) * 4;
    const int64_t token = place.token + row, at = token * p.extent + output + column;
    if (token >= p.tokens || column >= columns) continue;
    const Pack<float, 4> sums = load_pack<4>(stage + row * (kWidth + kStagePadding) + column);
    if (p.parts != nullptr) {
      float* to = p.parts + static_cast<int64_t>(blockIdx.y) * p.tokens * p.extent + at;
      for (int l = 0; l < 4 && column + l < columns; ++l) to[l] = sums.lane[l];
    } else if (p.packs && column + 4 <= columns) {
      finish<4>(p, sums, output + column, at);
    } else {
#pragma unroll 1
      for (int l = 0; l < 4 && column + l < columns; ++l)
        finish<1>(p, Pack<float, 1>{{stage[row * (kWidth + kStagePadding) + column + l]}}, output + column + l, at + l);
    }
  }
}

// The parts of a split depth, added in their order.
template <class T>
__global__ void __launch_bounds__(kThreads) join_kernel(Product<T> p, int parts) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, total = p.tokens * p.extent;
  if (at >= total) return;
  float sum = 0.0f;
  for (int part = 0; part < parts; ++part) sum += p.parts[part * total + at];
  finish<1>(p, Pack<float, 1>{{sum}}, static_cast<int>(at % p.extent), at);
}

template <class Pointer>
bool aligned(Pointer pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a product is cut into thread blocks.
struct Plan {
  int width, group;
  int64_t tiles, parts;

  Plan(Dtype dtype, int64_t tokens, int64_t lines, int64_t span, int64_t other_extent) {
    const bool wide = dtype == Dtype::float32 || dtype == Dtype::tf32;
    const int64_t widest = dtype == Dtype::float32 ? 64 : 128, step = wide ? 32 : 64;
    const int64_t tile_bytes = kTokens * std::max<int64_t>(other_extent, 1) * (kStepChunks * 16 / step);
    group = static_cast<int>(std::clamp<int64_t>(kGroupBytes / tile_bytes, 1, kMostGrouped));
    width = static_cast<int>(span <= 32 ? 32 : std::min<int64_t>(span <= 64 ? 64 : 128, widest));
    tiles = ceil_div(tokens, kTokens) * lines * ceil_div(span, width);
    parts = tiles >= kFewTiles || tiles == 0
                ? 1
                : std::clamp<int64_t>(std::min(ceil_div(kFewTiles, tiles), other_extent / (2 * step)), 1, kMostParts);
  }
};

template <class T, int kWidth, bool kByColumn, bool kAligned>
void start_product(const Product<T>& p, const Plan& plan, Stream stream) {
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.parts));
  launch(stream, &product_kernel<T, kWidth, kByColumn, kAligned>, grid, Block(kThreads, shared_bytes<T, kWidth>()), p);
  if (plan.parts > 1)
    launch(stream, &join_kernel<T>, blocks_for(p.tokens * p.extent, kThreads), kThreads, p, static_cast<int>(plan.parts));
}

template <class T, bool kByColumn>
void run_product(const Product<T>& p, const Plan& plan, bool aligned, Stream stream) {
  if (!aligned) {
    Plan narrow = plan;
    narrow.tiles = plan.tiles / ceil_div(p.span, plan.width) * ceil_div(p.span, 32);
    narrow.width = 32;
    return start_product<T, 32, kByColumn, false>(p, narrow, stream);
  }
  if (plan.width == 32) return start_product<T, 32, kByColumn, true>(p, plan, stream);
  if (plan.width == 64) return start_product<T, 64, kByColumn, true>(p, plan, stream);
  if constexpr (!std::is_same_v<T, float>) start_product<T, 128, kByColumn, true>(p, plan, stream);
}

Plan plan_of(Dtype dtype, const BlockMatrix& w, int64_t tokens, bool by_column) {
  if (by_column) return Plan(dtype, tokens, ceil_div(w.in, w.columns), w.columns, w.out);
  return Plan(dtype, tokens, ceil_div(w.out, w.rows), w.rows, w.in);
}

template <class T>
void product(Dtype dtype, const BlockMatrix& w, Tokens x, const void* bias, Activation activation, void* y, void* saved,
             bool by_column, void* workspace, Stream stream) {
  constexpr int V = kChunk<T>;
  const int64_t grid_columns = ceil_div(w.in, w.columns), most = int64_t(1) << 31;
  if (w.out >= most - w.rows || w.in >= most - w.columns)
    throw std::invalid_argument("a matrix must have fewer than 2^31 rows and columns");
  const Plan plan = plan_of(dtype, w, x.count, by_column);
  if (plan.tiles >= most / 4) throw std::invalid_argument("too many tokens and outputs for one launch");
  const int64_t extent = by_column ? w.in : w.out, span = by_column ? w.columns : w.rows;
  const int64_t other = by_column ? w.rows : w.columns;
  Product<T> p{};
  p.x = static_cast<const T*>(x.data);
  p.w = static_cast<const T*>(w.data);
  p.bias = static_cast<const T*>(bias);
  p.gate = w.gate;
  p.y = static_cast<T*>(y);
  p.saved = static_cast<T*>(saved);
  p.parts = plan.parts > 1 ? static_cast<float*>(workspace) : nullptr;
  p.order = w.layout.order + (by_column ? ceil_div(w.out, w.rows) : 0);
  p.offsets = by_column ? w.layout.column_offsets : w.layout.row_offsets;
  p.indices = by_column ? w.layout.row_indices : w.layout.column_indices;
  p.packed = w.positions != nullptr;
  p.positions = by_column ? w.positions : nullptr;
  p.tokens = x.count;
  p.stride_x = x.count == 1 ? 0 : x.stride;  // a copy of 0 bytes, of a token past the last, must be aligned too
  p.stride_w = p.packed ? w.columns : w.stride;
  p.line_step = p.packed ? 0 : by_column ? span : span * w.stride;
  p.block_step = p.packed ? w.rows * w.columns : by_column ? other * w.stride : other;
  p.gate_line = by_column ? 1 : grid_columns;
  p.gate_other = by_column ? grid_columns : 1;
  p.lines = static_cast<int>(ceil_div(extent, span));
  p.span = static_cast<int>(span);
  p.extent = static_cast<int>(extent);
  p.group = plan.group;
  p.other = static_cast<int>(other);
  p.other_extent = static_cast<int>(by_column ? w.out : w.in);
  p.activation = activation;
  p.packs = extent % 4 == 0 && span % 4 == 0 && aligned(y, 4 * sizeof(T)) && aligned(saved, 4 * sizeof(T));
  const bool rows_aligned = p.packed ? w.columns % V == 0 : w.stride % V == 0;
  const bool copies = aligned(x.data, 16) && (x.stride % V == 0 || x.count == 1) && aligned(w.data, 16) && rows_aligned &&
                      other % V == 0 && (!by_column || span % V == 0);
  by_column ? run_product<T, true>(p, plan, copies, stream) : run_product<T, false>(p, plan, copies, stream);
}

}  // namespace

int64_t masked_matmul_workspace_bytes(Dtype dtype, const BlockMatrix& w, int64_t tokens) {
  int64_t bytes = 0;
  for (const bool by_column : {false, true}) {
    const int64_t parts = plan_of(dtype, w, tokens, by_column).parts;
    if (parts > 1) bytes = std::max<int64_t>(bytes, parts * tokens * (by_column ? w.in : w.out) * 4);
  }
  return bytes;
}

void masked_matmul(Dtype dtype, const BlockMatrix& w, Tokens x, const void* bias, Activation activation, void* y, void* saved,
                   void* workspace, Stream stream) {
  if (x.count == 0 || w.out == 0) return;
  SPARTAN_CUDA_DISPATCH_PRODUCT(product<T>(dtype, w, x, bias, activation, y, saved, false, workspace, stream))
}

void masked_matmul_input_gradient(Dtype dtype, const BlockMatrix& w, Tokens dz, void* dx, void* workspace, Stream stream) {
  if (dz.count == 0 || w.in == 0) return;
  SPARTAN_CUDA_DISPATCH_PRODUCT(product<T>(dtype, w, dz, nullptr, Activation::none, dx, nullptr, true, workspace, stream))
}

}  // namespace spartan::cuda
