// theta * m * h, its gradient and the coupling of a budget. Unstructured weights are one long run of 16-byte packs; blocks
// are given to groups of threads that sum over them in a fixed order.
#include "common.cuh"

namespace spartan::cuda {
namespace {

constexpr int64_t kMaxPartials = kCouplingPartials / 2;
constexpr int64_t kBigBlock = 4096;  // weights from which a block is worth a whole thread block
constexpr int64_t kGridLimit = 1 << 16;

template <class T>
struct Costs {
  const T* array;
  const double* number;
  __device__ float at(int64_t block) const { return array != nullptr ? to_float(array[block]) : static_cast<float>(*number); }
};

__device__ inline float sign_of(float x) { return static_cast<float>((x > 0.0f) - (x < 0.0f)); }

// ---- Unstructured: f.run<V>(i) does V neighbouring weights.

template <int V, class F>
__global__ void __launch_bounds__(kThreads) elementwise_kernel(int64_t n, F f) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * V;
  for (int64_t i = thread * V; i + V <= n; i += stride) f.template run<V>(i);
  if (V > 1 && n / V * V + thread < n) f.template run<1>(n / V * V + thread);
}

template <class T>
struct Forward {
  const T* weight;
  const T* soft;
  const uint8_t* hard;
  T* result;

  template <int V>
  __device__ void run(int64_t i) const {
    Pack<T, V> out = load_pack<V>(weight + i);
    if (soft != nullptr) {
      const Pack<T, V> m = load_pack<V>(soft + i);
#pragma unroll
      for (int l = 0; l < V; ++l) out.lane[l] = from_float<T>(to_float(out.lane[l]) * to_float(m.lane[l]));
    }
    if (hard != nullptr) {
      const Pack<uint8_t, V> h = load_pack<V>(hard + i);
#pragma unroll
      for (int l = 0; l < V; ++l) out.lane[l] = h.lane[l] ? out.lane[l] : from_float<T>(0.0f);
    }
    store_pack<V>(result + i, out);
  }
};

template <class T>
struct Backward {
  const T* grad;
  const T* weight;
  const T* soft;
  const uint8_t* hard;  // null: straight through
  const double* beta;
  Costs<T> costs;
  T* result;

  template <int V>
  __device__ void run(int64_t i) const {
    Pack<T, V> out = load_pack<V>(grad + i);
    if (soft != nullptr) {
      const Pack<T, V> w = load_pack<V>(weight + i), m = load_pack<V>(soft + i);
      const float sharpness = static_cast<float>(*beta);
#pragma unroll
      for (int l = 0; l < V; ++l) {
        const float mask = to_float(m.lane[l]);
        const float pull = sharpness / costs.at(i + l) * (1.0f - mask) * fabsf(to_float(w.lane[l]));
        out.lane[l] = from_float<T>(to_float(out.lane[l]) * mask * (1.0f + pull));
      }
    }
    if (hard != nullptr) {
      const Pack<uint8_t, V> h = load_pack<V>(hard + i);
#pragma unroll
      for (int l = 0; l < V; ++l) out.lane[l] = h.lane[l] ? out.lane[l] : from_float<T>(0.0f);
    }
    store_pack<V>(result + i, out);
  }
};

template <class T>
struct Correct {
  T* grad;
  const T* weight;
  const T* soft;
  const double* scale;

  template <int V>
  __device__ void run(int64_t i) const {
    Pack<T, V> g = load_pack<V>(grad + i);
    const Pack<T, V> w = load_pack<V>(weight + i), m = load_pack<V>(soft + i);
    const float factor = static_cast<float>(*scale);
#pragma unroll
    for (int l = 0; l < V; ++l) {
      const float mask = to_float(m.lane[l]);
      g.lane[l] = from_float<T>(to_float(g.lane[l]) - sign_of(to_float(w.lane[l])) * (mask * (1.0f - mask) * factor));
    }
    store_pack<V>(grad + i, g);
  }
};

template <class T>
struct Magnitude {
  const T* weight;
  T* result;

  template <int V>
  __device__ void run(int64_t i) const {
    Pack<T, V> w = load_pack<V>(weight + i);
#pragma unroll
    for (int l = 0; l < V; ++l) w.lane[l] = from_float<T>(fabsf(to_float(w.lane[l])));
    store_pack<V>(result + i, w);
  }
};

template <class Pointer>
bool aligned(Pointer pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

template <class T, class F>
void elementwise(int64_t n, bool packs, F f, Stream stream) {
  constexpr int V = 16 / sizeof(T);
  if (packs)
    launch(stream, &elementwise_kernel<V, F>, blocks_for(n, kThreads * V, kGridLimit), kThreads, n, f);
  else
    launch(stream, &elementwise_kernel<1, F>, blocks_for(n, kThreads, kGridLimit), kThreads, n, f);
}

// ---- Blocks.

// What a kernel needs to know of the geometry. A row of the weight has fewer than 2^31 entries; their number is 64-bit.
struct Layout {
  int64_t out, row_blocks, per_row, blocks;
  uint32_t length, in, kernel, rows, columns;

  explicit Layout(const Blocks& b)
      : out(b.out),
        row_blocks((b.out + b.rows - 1) / b.rows),
        per_row((b.in + b.columns - 1) / b.columns * b.kernel),
        blocks(row_blocks * per_row),
        length(static_cast<uint32_t>(b.in * b.kernel)),
        in(static_cast<uint32_t>(b.in)),
        kernel(static_cast<uint32_t>(b.kernel)),
        rows(static_cast<uint32_t>(std::min(b.rows, b.out))),
        columns(static_cast<uint32_t>(std::min(b.columns, b.in))) {
    constexpr int64_t kLimit = int64_t(1) << 31;
    if (b.in * b.kernel >= kLimit || std::min(b.rows, b.out) * std::min(b.columns, b.in) >= kLimit)
      throw std::invalid_argument("rows of the weight and blocks must have fewer than 2^31 entries");
  }
};

// One block of weights: walk() calls f(index) for those of this thread.
struct Tile {
  int64_t first;
  uint32_t height, width, step, length;

  __device__ Tile(const Layout& l, int64_t block) {
    const int64_t row = block / l.per_row;
    const uint32_t in_row = static_cast<uint32_t>(block - row * l.per_row);
    const uint32_t column = in_row / l.kernel * l.columns, position = in_row % l.kernel;
    const int64_t left = l.out - row * l.rows;
    height = left < l.rows ? static_cast<uint32_t>(left) : l.rows;
    width = l.in - column < l.columns ? l.in - column : l.columns;
    step = l.kernel;
    length = l.length;
    first = row * l.rows * l.length + static_cast<int64_t>(column) * l.kernel + position;
  }

  template <int kGroup, class F>
  __device__ void walk(F f) const {
    const uint32_t lane = threadIdx.x % kGroup;
    uint32_t r = lane / width, c = lane % width;
    const uint32_t down = kGroup / width, across = kGroup % width;
    while (r < height) {
      f(first + static_cast<int64_t>(r) * length + static_cast<int64_t>(c) * step);
      r += down;
      c += across;
      if (c >= width) {
        c -= width;
        ++r;
      }
    }
  }
};

template <int kGroup>
__device__ inline int64_t first_group() {
  return static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
}
template <int kGroup>
__device__ inline int64_t group_count() {
  return static_cast<int64_t>(gridDim.x) * (kThreads / kGroup);
}

// f(weight's index, block's index) for every weight.
template <class F>
__global__ void __launch_bounds__(kThreads) expand_kernel(Layout l, F f) {
  for (int64_t o = blockIdx.y; o < l.out; o += gridDim.y) {
    const int64_t block_row = o / l.rows * l.per_row, weight_row = o * l.length;
    for (uint32_t j = blockIdx.x * kThreads + threadIdx.x; j < l.length; j += gridDim.x * kThreads) {
      const uint32_t i = l.kernel == 1 ? j : j / l.kernel;
      f(weight_row + j, block_row + static_cast<int64_t>(i / l.columns) * l.kernel + (j - i * l.kernel));
    }
  }
}

template <class T>
struct ForwardBlock {
  Forward<T> masks;
  __device__ void operator()(int64_t i, int64_t block) const {
    float w = to_float(masks.weight[i]);
    if (masks.soft != nullptr) w *= to_float(masks.soft[block]);
    if (masks.hard != nullptr && !masks.hard[block]) w = 0.0f;
    masks.result[i] = from_float<T>(w);
  }
};

template <class T>
struct CorrectBlock {
  Correct<T> c;
  __device__ void operator()(int64_t i, int64_t block) const {
    const float mask = to_float(c.soft[block]);
    const float pull = mask * (1.0f - mask) * static_cast<float>(*c.scale);
    c.grad[i] = from_float<T>(to_float(c.grad[i]) - sign_of(to_float(c.weight[i])) * pull);
  }
};

// The gradient without a soft mask, which needs no sums.
template <class T>
struct StraightBlock {
  const T* grad;
  const uint8_t* hard;
  T* result;
  __device__ void operator()(int64_t i, int64_t block) const {
    result[i] = hard == nullptr || hard[block] ? grad[i] : from_float<T>(0.0f);
  }
};

template <class F>
void expand(const Layout& layout, F f, Stream stream) {
  const dim3 grid(blocks_for(layout.length, kThreads, 1 << 12), blocks_for(layout.out, 1, 65535));
  launch(stream, &expand_kernel<F>, grid, kThreads, layout, f);
}

template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads) backward_blocks_kernel(Layout l, Backward<T> p) {
  const float beta = static_cast<float>(*p.beta);
  for (int64_t block = first_group<kGroup>(); block < l.blocks; block += group_count<kGroup>()) {
    const Tile tile(l, block);
    float sum = 0.0f;
    tile.walk<kGroup>([&](int64_t i) { sum += to_float(p.grad[i]) * to_float(p.weight[i]); });
    double g[1] = {sum};
    group_sums<kGroup>(g);
    const float m = to_float(p.soft[block]);
    const float pull = beta * m * (1.0f - m) * static_cast<float>(g[0]) / p.costs.at(block);
    const bool keep = p.hard == nullptr || p.hard[block];
    tile.walk<kGroup>([&](int64_t i) {
      const float value = to_float(p.grad[i]) * m + sign_of(to_float(p.weight[i])) * pull;
      p.result[i] = from_float<T>(keep ? value : 0.0f);
    });
  }
}

template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads) scores_kernel(Layout l, Magnitude<T> p) {
  for (int64_t block = first_group<kGroup>(); block < l.blocks; block += group_count<kGroup>()) {
    float sum = 0.0f;
    Tile(l, block).walk<kGroup>([&](int64_t i) { sum += fabsf(to_float(p.weight[i])); });
    double v[1] = {sum};
    group_sums<kGroup>(v);
    if (threadIdx.x % kGroup == 0) p.result[block] = from_float<T>(static_cast<float>(v[0]));
  }
}

// ---- Coupling: partial sums by thread block, then one thread block over those.

template <class T>
struct Coupling {
  const T* grad;
  const T* weight;
  const T* soft;
  const double* beta;
  Costs<T> costs;
  double* partials;

  __device__ void add(int64_t block, float q, float v, double (&sums)[2]) const {
    const float m = to_float(soft[block]), a = costs.at(block), rest = 1.0f - m;
    sums[0] += rest * (q / (1.0f + static_cast<float>(*beta) * rest * v / a));
    sums[1] += a * m * rest;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) coupling_kernel(int64_t n, Coupling<T> p) {
  double sums[2] = {0.0, 0.0};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    const float w = to_float(p.weight[i]);
    p.add(i, to_float(p.grad[i]) * w, fabsf(w), sums);
  }
  group_sums<kThreads>(sums);
  if (threadIdx.x == 0) p.partials[2 * blockIdx.x] = sums[0], p.partials[2 * blockIdx.x + 1] = sums[1];
}

template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads) coupling_blocks_kernel(Layout l, Coupling<T> p) {
  double sums[2] = {0.0, 0.0};
  for (int64_t block = first_group<kGroup>(); block < l.blocks; block += group_count<kGroup>()) {
    float q = 0.0f, v = 0.0f;
    Tile(l, block).walk<kGroup>([&](int64_t i) {
      const float w = to_float(p.weight[i]);
      q += to_float(p.grad[i]) * w;
      v += fabsf(w);
    });
    double both[2] = {q, v};
    group_sums<kGroup>(both);
    if (threadIdx.x % kGroup == 0) p.add(block, static_cast<float>(both[0]), static_cast<float>(both[1]), sums);
  }
  group_sums<kThreads>(sums);
  if (threadIdx.x == 0) p.partials[2 * blockIdx.x] = sums[0], p.partials[2 * blockIdx.x + 1] = sums[1];
}

__global__ void __launch_bounds__(kThreads) coupling_finish_kernel(int64_t count, const double* partials, double* result) {
  double sums[2] = {0.0, 0.0};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sums[0] += partials[2 * i];
    sums[1] += partials[2 * i + 1];
  }
  group_sums<kThreads>(sums);
  if (threadIdx.x == 0) result[0] = sums[0], result[1] = sums[1];
}

// ---- Host.

bool flat(const Blocks& b) { return b.rows == 1 && b.columns == 1; }
int64_t size_of(const Blocks& b) { return b.out * b.in * b.kernel; }
bool big(const Layout& l) { return static_cast<int64_t>(l.rows) * l.columns >= kBigBlock; }

template <class T>
void forward(const Blocks& blocks, Forward<T> f, Stream stream) {
  if (!flat(blocks)) return expand(Layout(blocks), ForwardBlock<T>{f}, stream);
  const bool packs = aligned(f.weight, 16) && aligned(f.soft, 16) && aligned(f.hard, 16 / sizeof(T)) && aligned(f.result, 16);
  elementwise<T>(size_of(blocks), packs, f, stream);
}

template <class T>
void backward(const Blocks& blocks, Backward<T> f, Stream stream) {
  if (flat(blocks)) {
    const bool packs = aligned(f.grad, 16) && aligned(f.weight, 16) && aligned(f.soft, 16) &&
                       aligned(f.hard, 16 / sizeof(T)) && aligned(f.result, 16);
    return elementwise<T>(size_of(blocks), packs, f, stream);
  }
  const Layout l(blocks);
  if (f.soft == nullptr) return expand(l, StraightBlock<T>{f.grad, f.hard, f.result}, stream);
  if (big(l))
    launch(stream, &backward_blocks_kernel<T, kThreads>, blocks_for(l.blocks, 1), kThreads, l, f);
  else
    launch(stream, &backward_blocks_kernel<T, kWarp>, blocks_for(l.blocks, kThreads / kWarp), kThreads, l, f);
}

template <class T>
void coupling(const Blocks& blocks, Coupling<T> f, double* sums, Stream stream) {
  int64_t partials;
  if (flat(blocks)) {
    partials = blocks_for(size_of(blocks), 4 * kThreads, kMaxPartials);
    launch(stream, &coupling_kernel<T>, static_cast<unsigned>(partials), kThreads, size_of(blocks), f);
  } else {
    const Layout l(blocks);
    partials = blocks_for(l.blocks, big(l) ? 1 : kThreads / kWarp, kMaxPartials);
    const auto kernel = big(l) ? &coupling_blocks_kernel<T, kThreads> : &coupling_blocks_kernel<T, kWarp>;
    launch(stream, kernel, static_cast<unsigned>(partials), kThreads, l, f);
  }
  launch(stream, &coupling_finish_kernel, 1, kThreads, partials, f.partials, sums);
}

template <class T>
void correct(const Blocks& blocks, Correct<T> f, Stream stream) {
  if (!flat(blocks)) return expand(Layout(blocks), CorrectBlock<T>{f}, stream);
  elementwise<T>(size_of(blocks), aligned(f.grad, 16) && aligned(f.weight, 16) && aligned(f.soft, 16), f, stream);
}

template <class T>
void scores(const Blocks& blocks, Magnitude<T> f, Stream stream) {
  if (flat(blocks)) return elementwise<T>(size_of(blocks), aligned(f.weight, 16) && aligned(f.result, 16), f, stream);
  const Layout l(blocks);
  if (big(l))
    launch(stream, &scores_kernel<T, kThreads>, blocks_for(l.blocks, 1), kThreads, l, f);
  else
    launch(stream, &scores_kernel<T, kWarp>, blocks_for(l.blocks, kThreads / kWarp), kThreads, l, f);
}

template <class T>
const T* typed(const void* pointer) {
  return static_cast<const T*>(pointer);
}
template <class T>
Costs<T> typed(const BlockCosts& costs) {
  return {typed<T>(costs.array), costs.number};
}

}  // namespace

void masked_weight(Dtype dtype, Blocks blocks, const void* weight, Masks masks, void* result, Stream stream) {
  if (size_of(blocks) == 0) return;
  SPARTAN_CUDA_DISPATCH(
      forward<T>(blocks, {typed<T>(weight), typed<T>(masks.soft), masks.hard, static_cast<T*>(result)}, stream))
}

void masked_weight_backward(Dtype dtype, Blocks blocks, const void* grad, const void* weight, Masks masks,
                            const double* beta, BlockCosts costs, bool straight_through, void* result, Stream stream) {
  if (size_of(blocks) == 0) return;
  const uint8_t* hard = straight_through ? nullptr : masks.hard;
  SPARTAN_CUDA_DISPATCH(backward<T>(blocks,
                                    {typed<T>(grad), typed<T>(weight), typed<T>(masks.soft), hard, beta, typed<T>(costs),
                                     static_cast<T*>(result)},
                                    stream))
}

void masked_weight_coupling(Dtype dtype, Blocks blocks, const void* grad, const void* weight, const void* soft,
                            const double* beta, BlockCosts costs, double* sums, double* workspace, Stream stream) {
  SPARTAN_CUDA_DISPATCH(coupling<T>(
      blocks, {typed<T>(grad), typed<T>(weight), typed<T>(soft), beta, typed<T>(costs), workspace}, sums, stream))
}

void masked_weight_correct(Dtype dtype, Blocks blocks, void* grad, const void* weight, const void* soft,
                           const double* scale, Stream stream) {
  if (size_of(blocks) == 0) return;
  SPARTAN_CUDA_DISPATCH(
      correct<T>(blocks, {static_cast<T*>(grad), typed<T>(weight), typed<T>(soft), scale}, stream))
}

void block_scores(Dtype dtype, Blocks blocks, const void* weight, void* result, Stream stream) {
  if (size_of(blocks) == 0) return;
  SPARTAN_CUDA_DISPATCH(scores<T>(blocks, {typed<T>(weight), static_cast<T*>(result)}, stream))
}

}  // namespace spartan::cuda
