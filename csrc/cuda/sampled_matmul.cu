// Blocks of dz^T x, the gradient of a weight where it is active, and of its gates from the same sums.
#include "masked_matmul_tile.cuh"

namespace spartan::cuda {
namespace {

constexpr int kStages = 3;

template <class T>
struct Sampled {
  const T *dz, *x, *theta;
  const float* gate;
  T* result;
  float* grad_gate;
  const int32_t *row_offsets, *column_indices;
  int64_t tokens, stride_dz, stride_x, stride_theta, stride_result;
  int out, in, rows, columns, grid_columns;
  bool packed;
};

// Sums over tokens of a tile of one block: kRows of its rows and kColumns of its columns.
template <class T, int kRows, int kColumns, class Tile, bool kAligned>
class Operands {
 public:
  // dz and x begin at the first row and column of the tile, of which `rows` and `columns` are inside.
  __device__ Operands(const Sampled<T>& p, const T* dz, const T* x, int rows, int columns, uint4* memory)
      : p_(p), dz_(dz), x_(x), rows_(rows), columns_(columns), memory_(memory) {}

  __device__ void add_to(Tile& tile) const {
    const int64_t steps = (p_.tokens + kStep<T> - 1) / kStep<T>;
    if constexpr (kAligned) {
      for (int step = 0; step < kStages - 1; ++step) start(step, step < steps);
      for (int64_t step = 0; step < steps; ++step) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the step is here, and nobody reads the one before, whose place the next copies take
        start(step + kStages - 1, step + kStages - 1 < steps);
        const uint4* left = memory_ + step % kStages * ((kRows + kColumns) * kStepChunks);
        tile.add(left, left + kRows * kStepChunks);
      }
      wait_for_copies<0>();
    } else {
      for (int64_t step = 0; step < steps; ++step) {
        __syncthreads();
        gather<kRows>(dz_, p_.stride_dz, rows_, step, memory_);
        gather<kColumns>(x_, p_.stride_x, columns_, step, memory_ + kRows * kStepChunks);
        __syncthreads();
        tile.add(memory_, memory_ + kRows * kStepChunks);
      }
    }
    __syncthreads();
  }

 private:
  __device__ void start(int64_t step, bool any) const {
    if (any) {
      uint4* left = memory_ + step % kStages * ((kRows + kColumns) * kStepChunks);
      copy<kRows>(dz_, p_.stride_dz, rows_, step, left);
      copy<kColumns>(x_, p_.stride_x, columns_, step, left + kRows * kStepChunks);
    }
    close_copies();
  }

  template <int kWidth>
  __device__ void copy(const T* from, int64_t stride, int width, int64_t step, uint4* to) const {
    constexpr int kRowChunks = kWidth / kChunk<T>, kAll = kWidth * kStepChunks;
    static_assert(kAll % Tile::kThreads == 0);
#pragma unroll
    for (int i = 0; i < kAll / Tile::kThreads; ++i) {
      const int q = static_cast<int>(threadIdx.x) + i * Tile::kThreads, row = q / kRowChunks, chunk = q % kRowChunks;
      const int64_t token = step * kStep<T> + row;
      const int numbers = token < p_.tokens ? max(min(kChunk<T>, width - chunk * kChunk<T>), 0) : 0;
      copy16_async(to + swizzled<T, kRowChunks>(row, chunk), numbers > 0 ? from + token * stride + chunk * kChunk<T> : p_.x,
                   numbers * static_cast<int>(sizeof(T)));
    }
  }

  template <int kWidth>
  __device__ void gather(const T* from, int64_t stride, int width, int64_t step, uint4* to) const {
    for (int q = static_cast<int>(threadIdx.x); q < kStep<T> * kWidth; q += Tile::kThreads) {
      const int row = q / kWidth, column = q % kWidth;
      const int64_t token = step * kStep<T> + row;
      T* chunk = reinterpret_cast<T*>(to + swizzled<T, kWidth / kChunk<T>>(row, column / kChunk<T>));
      chunk[column % kChunk<T>] =
          token < p_.tokens && column < width ? from[token * stride + column] : from_float<T>(0.0f);
    }
  }

  const Sampled<T>& p_;
  const T *dz_, *x_;
  int rows_, columns_;
  uint4* memory_;
};

template <class T, int kSide>
struct TileOf {
  using type = TensorCoreTile<T, kSide, kSide, kSide == 128 ? 4 : 2, 2, true, true>;
};
template <int kSide>
struct TileOf<float, kSide> {
  using type = FmaTile<kSide, kSide, kSide == 64 ? 256 : 64, true, true>;
};

template <class T, int kSide>
constexpr int shared_bytes() {
  return static_cast<int>(
      std::max(kStages * 2 * kSide * kStepChunks * sizeof(uint4), kSide * (kSide + kStagePadding) * sizeof(float)));
}

// Thread blocks that are to fit on a processor: registers of 512 threads, of fewer for the widest tiles.
template <class T, int kSide>
constexpr int kTogether = kSide == 128 ? 1 : 512 / TileOf<T, kSide>::type::kThreads;
template <>
constexpr int kTogether<Tf32, 64> = 3;

template <class T, int kSide, bool kAligned>
__global__ void __launch_bounds__(TileOf<T, kSide>::type::kThreads, kTogether<T, kSide>) sampled_kernel(Sampled<T> p) {
  using Tile = typename TileOf<T, kSide>::type;
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared());
  const int i = static_cast<int>(blockIdx.x / p.grid_columns), slot = static_cast<int>(blockIdx.x % p.grid_columns);
  const int first = p.row_offsets[i];
  if (slot >= p.row_offsets[i + 1] - first) return;
  const int j = p.column_indices[first + slot], b = i * p.grid_columns + j;
  const int height = min(p.rows, p.out - i * p.rows), width = min(p.columns, p.in - j * p.columns);
  const int64_t row0 = static_cast<int64_t>(i) * p.rows, column0 = static_cast<int64_t>(j) * p.columns;
  const float gate = p.gate == nullptr ? 1.0f : p.gate[b];
  const float* stage = reinterpret_cast<const float*>(shared);
  // packed blocks are written whole, with zeros past the edges
  const int rows_written = p.packed ? p.rows : height, columns_written = p.packed ? p.columns : width;
  T* result = p.result + (p.packed ? static_cast<int64_t>(first + slot) * p.rows * p.columns : row0 * p.stride_result + column0);
  const int64_t stride = p.packed ? p.columns : p.stride_result;

  double total[1] = {0.0};
  for (int r0 = 0; r0 < rows_written; r0 += kSide) {
    for (int c0 = 0; c0 < columns_written; c0 += kSide) {
      Tile tile;
      Operands<T, kSide, kSide, Tile, kAligned>(p, p.dz + row0 + r0, p.x + column0 + c0, height - r0, width - c0, shared)
          .add_to(tile);
      tile.store(reinterpret_cast<float*>(shared));
      __syncthreads();
      for (int q = static_cast<int>(threadIdx.x); q < kSide * kSide; q += Tile::kThreads) {
        const int r = q / kSide, c = q % kSide, row = r0 + r, column = c0 + c;
        if (row >= rows_written || column >= columns_written) continue;
        const float sum = stage[r * (kSide + kStagePadding) + c];
        if (p.grad_gate != nullptr && row < height && column < width)
          total[0] += sum * to_float(p.theta[(row0 + row) * p.stride_theta + column0 + column]);
        result[row * stride + column] = from_float<T>(sum * gate);
      }
      __syncthreads();  // before the memory is filled again
    }
  }
  if (p.grad_gate == nullptr) return;
  group_sums<Tile::kThreads>(total);
  if (threadIdx.x == 0) p.grad_gate[b] = static_cast<float>(total[0]);
}

// Blocks of a dense raw gradient: a warp each.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) gate_gradient_kernel(Sampled<T> p, int64_t blocks) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (b >= blocks) return;
  const int64_t i = b / p.grid_columns, j = b % p.grid_columns;
  const int64_t row0 = i * p.rows, column0 = j * p.columns;
  const int height = static_cast<int>(min(static_cast<int64_t>(p.rows), p.out - row0));
  const int packs = static_cast<int>(min(static_cast<int64_t>(p.columns), p.in - column0)) / V;
  const float gate = p.gate == nullptr ? 1.0f : p.gate[b];
  double total[1] = {0.0};
  for (int q = static_cast<int>(threadIdx.x % kWarp); q < height * packs; q += kWarp) {
    const int64_t row = row0 + q / packs, column = column0 + q % packs * V;
    T* raw = p.result + row * p.stride_result + column;
    Pack<T, V> grad = load_pack<V>(raw);
    const Pack<T, V> theta = load_pack<V>(p.theta + row * p.stride_theta + column);
    float sum = 0.0f;
#pragma unroll
    for (int l = 0; l < V; ++l) {
      sum += to_float(grad.lane[l]) * to_float(theta.lane[l]);
      grad.lane[l] = from_float<T>(to_float(grad.lane[l]) * gate);
    }
    total[0] += sum;
    store_pack<V>(raw, grad);
  }
  group_sums<kWarp>(total);
  if (threadIdx.x % kWarp == 0) p.grad_gate[b] = static_cast<float>(total[0]);
}

template <class T>
Sampled<T> arguments(const BlockMatrix& w, void* result, float* grad_gate) {
  constexpr int64_t kMost = int64_t(1) << 31;
  const int64_t grid_columns = (w.in + w.columns - 1) / w.columns, grid_rows = (w.out + w.rows - 1) / w.rows;
  if (w.out >= kMost - w.rows || w.in >= kMost - w.columns || grid_rows * grid_columns >= kMost)
    throw std::invalid_argument("a matrix must have fewer than 2^31 rows, columns and blocks");
  Sampled<T> p{};
  p.theta = static_cast<const T*>(w.data);
  p.gate = w.gate;
  p.result = static_cast<T*>(result);
  p.grad_gate = grad_gate;
  p.row_offsets = w.layout.row_offsets;
  p.column_indices = w.layout.column_indices;
  p.stride_theta = w.stride;
  p.stride_result = w.in;
  p.out = static_cast<int>(w.out);
  p.in = static_cast<int>(w.in);
  p.rows = static_cast<int>(w.rows);
  p.columns = static_cast<int>(w.columns);
  p.grid_columns = static_cast<int>(grid_columns);
  p.packed = w.positions != nullptr;
  return p;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T, int kSide, bool kAligned>
void start_sampled(const Sampled<T>& p, unsigned blocks, Stream stream) {
  launch(stream, &sampled_kernel<T, kSide, kAligned>, blocks, Block(TileOf<T, kSide>::type::kThreads, shared_bytes<T, kSide>()),
         p);
}

template <class T>
void sampled(const BlockMatrix& w, Tokens dz, Tokens x, void* result, float* grad_gate, Stream stream) {
  constexpr int V = kChunk<T>;
  Sampled<T> p = arguments<T>(w, result, grad_gate);
  p.dz = static_cast<const T*>(dz.data);
  p.x = static_cast<const T*>(x.data);
  p.tokens = dz.count;
  p.stride_dz = dz.stride;
  p.stride_x = x.stride;
  const unsigned blocks = static_cast<unsigned>((w.out + w.rows - 1) / w.rows * p.grid_columns);
  const auto rows_aligned = [&](Tokens t, int64_t span) { return aligned(t.data) && t.stride % V == 0 && span % V == 0; };
  if (!rows_aligned(dz, w.rows) || !rows_aligned(x, w.columns)) return start_sampled<T, 32, false>(p, blocks, stream);
  const int64_t side = std::max(w.rows, w.columns);
  if (side <= 32) return start_sampled<T, 32, true>(p, blocks, stream);
  if constexpr (!std::is_same_v<T, float>)
    if (side > 64) return start_sampled<T, 128, true>(p, blocks, stream);
  start_sampled<T, 64, true>(p, blocks, stream);
}

template <class T>
void gate_gradient(const BlockMatrix& w, void* raw, float* grad_gate, Stream stream) {
  constexpr int V = kChunk<T>;
  const Sampled<T> p = arguments<T>(w, raw, grad_gate);
  const int64_t blocks = (w.out + w.rows - 1) / w.rows * p.grid_columns;
  const unsigned grid = blocks_for(blocks, kThreads / kWarp);
  const bool packs = aligned(raw) && aligned(w.data) && w.in % V == 0 && w.stride % V == 0 && w.columns % V == 0;
  launch(stream, packs ? &gate_gradient_kernel<T, V> : &gate_gradient_kernel<T, 1>, grid, kThreads, p, blocks);
}

}  // namespace

void sampled_matmul(Dtype dtype, const BlockMatrix& w, Tokens dz, Tokens x, void* result, float* grad_gate, Stream stream) {
  if (w.out == 0 || w.in == 0) return;
  SPARTAN_CUDA_DISPATCH_PRODUCT(sampled<T>(w, dz, x, result, grad_gate, stream))
}

void gate_gradient(Dtype dtype, const BlockMatrix& w, void* raw, float* grad_gate, Stream stream) {
  if (w.out == 0 || w.in == 0) return;
  SPARTAN_CUDA_DISPATCH(gate_gradient<T>(w, raw, grad_gate, stream))
}

}  // namespace spartan::cuda
