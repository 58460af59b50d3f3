// Small kernels with one fault each, and the same kernels without it: what the emulator is to find, and what not.
#include <cooperative_groups.h>

#include <string>

#include "../../csrc/cuda/mma.cuh"

namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 4;

// ---- In a block.

template <bool kFault>
__global__ void exchange_through_shared(int* out) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!kFault) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

template <bool kFault>
__global__ void read_before_the_barrier(int* out) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 7;
  const int early = kFault && threadIdx.x != 0 ? sum : 0;
  __syncthreads();
  out[threadIdx.x] = sum + early;
}

template <bool kFault>
__global__ void overwrite_before_all_have_read(int* out) {
  __shared__ int value;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) value = round;
    __syncthreads();
    out[threadIdx.x] = value;
    if (!kFault) __syncthreads();
  }
}

template <bool kFault>
__global__ void read_what_was_never_written(int* out) {
  __shared__ int shared[kThreads];
  if (!kFault || threadIdx.x != 5) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

template <bool kFault>
__global__ void count_in_shared(int* out) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (kFault) count += 1;
  else atomicAdd(&count, 1);
  __syncthreads();
  out[threadIdx.x] = count;
}

template <bool kFault>
__global__ void read_among_atomics(int* out) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  if (!kFault) __syncthreads();
  out[threadIdx.x] = count;
}

template <bool kFault>
__global__ void a_shuffle_orders_no_memory(int* out) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kFault) __shfl_xor_sync(0xffffffffu, 1, 1);
  else __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

template <bool kFault>
__global__ void neighbouring_bytes(uint8_t* out) {
  const unsigned i = kFault ? threadIdx.x / 2 : threadIdx.x;
  out[i] = static_cast<uint8_t>(threadIdx.x);
}

template <bool kFault>
__global__ void a_barrier_that_some_never_reach(int* out) {
  if (kFault && threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

// ---- Copies that run ahead.

template <bool kFault>
__global__ void read_a_copy_on_its_way(const int* in, int* out) {
  __shared__ uint4 shared[kThreads];
  spartan::cuda::copy16_async(shared + threadIdx.x, in + 4 * threadIdx.x, 16);
  spartan::cuda::close_copies();
  if (!kFault) spartan::cuda::wait_for_copies<0>();
  __syncthreads();
  out[threadIdx.x] = static_cast<int>(shared[threadIdx.x].x);
}

template <bool kFault>
__global__ void read_a_copy_of_another_thread(const int* in, int* out) {
  __shared__ uint4 shared[kThreads];
  spartan::cuda::copy16_async(shared + threadIdx.x, in + 4 * threadIdx.x, 16);
  spartan::cuda::close_copies();
  spartan::cuda::wait_for_copies<0>();
  if (!kFault) __syncthreads();
  out[threadIdx.x] = static_cast<int>(shared[(threadIdx.x + 1) % kThreads].x);
}

template <bool kFault>
__global__ void copy_over_what_is_still_read(const int* in, int* out) {
  __shared__ uint4 shared[kThreads];
  for (int round = 0; round < 2; ++round) {
    spartan::cuda::copy16_async(shared + threadIdx.x, in + 4 * threadIdx.x, 16);
    spartan::cuda::close_copies();
    spartan::cuda::wait_for_copies<0>();
    __syncthreads();
    out[threadIdx.x] = static_cast<int>(shared[(threadIdx.x + 1) % kThreads].x);
    if (!kFault) __syncthreads();
  }
}

// ---- Between blocks.

template <bool kFault>
__global__ void blocks_write_one_word(int* out) {
  if (threadIdx.x == 0) out[kFault ? 0 : blockIdx.x] = 1;
}

template <bool kFault>
__global__ void blocks_count(int* out) {
  if (threadIdx.x != 0) return;
  if (kFault) *out += 1;
  else atomicAdd(out, 1);
}

enum class Fence { both, no_release, no_acquire };

// The last block to arrive adds up what the others left: out = {sum, ticket, parts}.
template <Fence kFences>
__device__ void last_block_adds(int* out) {
  __shared__ bool last;
  out[2 + blockIdx.x * kThreads + threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kFences != Fence::no_release) __threadfence();
    last = atomicAdd(out + 1, 1) == static_cast<int>(gridDim.x) - 1;
    if (kFences != Fence::no_acquire) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x != 1) return;
  for (int i = 0; i < kThreads * kBlocks; ++i) *out += out[2 + i];
  out[1] = 0;
}
template <bool kFault>
__global__ void release_without_a_fence(int* out) {
  last_block_adds<kFault ? Fence::no_release : Fence::both>(out);
}
template <bool kFault>
__global__ void acquire_without_a_fence(int* out) {
  last_block_adds<kFault ? Fence::no_acquire : Fence::both>(out);
}

// The fence does not hold for what is written after it.
template <bool kFault>
__global__ void write_after_the_fence(int* out) {
  if (threadIdx.x != 0) return;
  if (!kFault) out[1 + blockIdx.x] = 1;
  __threadfence();
  if (kFault) out[1 + blockIdx.x] = 1;
  if (atomicAdd(out, 1) != kBlocks - 1) return;
  __threadfence();
  for (int i = 0; i < kBlocks; ++i) out[1 + kBlocks] += out[1 + i];
}

template <bool kFault>
__global__ void blocks_read_each_other(int* out) {
  out[blockIdx.x * kThreads + threadIdx.x] = 1;
  if (!kFault) cooperative_groups::this_grid().sync();
  const int other = out[(blockIdx.x + 1) % gridDim.x * kThreads + threadIdx.x];
  if (!kFault) cooperative_groups::this_grid().sync();
  out[blockIdx.x * kThreads + threadIdx.x] += other;
}

template <bool kFault>
__global__ void a_grid_barrier_that_some_never_reach(int* out) {
  if (kFault && blockIdx.x == 1) return;
  cooperative_groups::this_grid().sync();
  out[blockIdx.x * kThreads + threadIdx.x] = 1;
}

// Blocks and threads of the second block, in the order in which they come.
__global__ void order(int* out) {
  if (threadIdx.x == 0) out[1 + atomicAdd(out, 1)] = static_cast<int>(blockIdx.x);
  if (blockIdx.x == 1) out[32 + atomicAdd(out + 31, 1)] = static_cast<int>(threadIdx.x);
}

int memory[2048];
alignas(16) int input[4 * kThreads];

template <class... Parameters, class... Arguments>
bool failed(unsigned blocks, bool together, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attribute{cudaLaunchAttributeCooperative, {1}};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.attrs = &attribute;
  config.numAttrs = together ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (status != cudaSuccess) std::printf("%s\n", cudaGetErrorString(status));
  return status != cudaSuccess;
}

template <bool kFault>
int launch(const std::string& name) {
#define SPARTAN_PLANTED(kernel, blocks, together) \
  if (name == #kernel) return failed(blocks, together, &kernel<kFault>, memory)
  SPARTAN_PLANTED(exchange_through_shared, 1, false);
  SPARTAN_PLANTED(read_before_the_barrier, 1, false);
  SPARTAN_PLANTED(overwrite_before_all_have_read, 1, false);
  SPARTAN_PLANTED(read_what_was_never_written, 1, false);
  SPARTAN_PLANTED(count_in_shared, 1, false);
  SPARTAN_PLANTED(read_among_atomics, 1, false);
  SPARTAN_PLANTED(a_shuffle_orders_no_memory, 1, false);
  SPARTAN_PLANTED(a_barrier_that_some_never_reach, 1, false);
  SPARTAN_PLANTED(blocks_write_one_word, kBlocks, false);
  SPARTAN_PLANTED(blocks_count, kBlocks, false);
  SPARTAN_PLANTED(release_without_a_fence, kBlocks, false);
  SPARTAN_PLANTED(acquire_without_a_fence, kBlocks, false);
  SPARTAN_PLANTED(write_after_the_fence, kBlocks, false);
  SPARTAN_PLANTED(blocks_read_each_other, kBlocks, true);
  SPARTAN_PLANTED(a_grid_barrier_that_some_never_reach, kBlocks, true);
#undef SPARTAN_PLANTED
#define SPARTAN_PLANTED(kernel) \
  if (name == #kernel) return failed(1, false, &kernel<kFault>, input, memory)
  SPARTAN_PLANTED(read_a_copy_on_its_way);
  SPARTAN_PLANTED(read_a_copy_of_another_thread);
  SPARTAN_PLANTED(copy_over_what_is_still_read);
#undef SPARTAN_PLANTED
  if (name == "neighbouring_bytes") return failed(1, false, &neighbouring_bytes<kFault>, reinterpret_cast<uint8_t*>(memory));
  if (name == "order") {
    failed(8, false, &order, memory);
    for (int i = 0; i < 8; ++i) std::printf("%d ", memory[1 + i]);
    for (int i = 0; i < kThreads; ++i) std::printf("%d ", memory[32 + i]);
    return 0;
  }
  std::printf("no kernel of the name %s\n", name.c_str());
  return 2;
}

}  // namespace

// NAME fault|clean: 1 and the reason where the launch fails.
int main(int count, char** words) {
  return count == 3 && std::string(words[2]) == "fault" ? launch<true>(words[1]) : launch<false>(words[count > 1 ? 1 : 0]);
}
