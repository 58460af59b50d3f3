// Threads, blocks and barriers of the emulator, each in an order that the seed decides.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <mutex>
#include <semaphore>
#include <string>
#include <thread>

#include "cuda_runtime.h"
#include "races.h"

// What the kernels see as constants.
uint3 thread_index __asm__("emulator_thread_index");
uint3 block_index __asm__("emulator_block_index");
dim3 block_dim __asm__("emulator_block_dim");
dim3 grid_dim __asm__("emulator_grid_dim");

// For the tests of how much memory a kernel moves, and of how many are launched.
extern "C" {
[[gnu::visibility("default"), gnu::used]] uint64_t emulator_bytes_read = 0, emulator_bytes_written = 0;
[[gnu::visibility("default"), gnu::used]] uint64_t emulator_launches = 0;
}

namespace emulator {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr size_t kSharedMemory = 99 << 10;  // what a thread block may have on the smallest device
constexpr unsigned kWarp = 32;

alignas(128) thread_local float shared_memory[kSharedMemory / sizeof(float)];

class Random {
 public:
  void seed(uint64_t x) { state_ = x * 0x9e3779b97f4a7c15u + 1; }
  unsigned below(unsigned n) {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return static_cast<unsigned>((state_ >> 32) * n >> 32);
  }
  void shuffle(std::vector<unsigned>& x) {
    for (unsigned i = static_cast<unsigned>(x.size()); i > 1; --i) std::swap(x[i - 1], x[below(i)]);
  }

 private:
  uint64_t state_ = 1;
};

unsigned seed() {
  const char* given = std::getenv("SPARTAN_EMULATOR_SEED");
  return given == nullptr ? 1 : static_cast<unsigned>(std::strtoul(given, nullptr, 10));
}

std::vector<unsigned> numbers(unsigned n) {
  std::vector<unsigned> all(n);
  for (unsigned i = 0; i < n; ++i) all[i] = i;
  return all;
}

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool begun = false, done = false;
  const Barrier* waits_for = nullptr;
  unsigned generation = 0;

  bool ready() const { return !done && (waits_for == nullptr || waits_for->generation != generation); }
};

Random random_order;
const std::function<void()>* body;
Barrier grid_barrier;
uint64_t blocks_run;
std::string failure;
void enter();

// One thread block. Its fibers live on stacks of its own.
class Block {
 public:
  Barrier barrier, warps[kWarp][kWarp];
  uint64_t exchanged[kWarp][kWarp];
  uint64_t number = 0;
  unsigned slot = 0, current = 0;
  bool progress = false;

  void start(unsigned where, dim3 size, unsigned x, unsigned y) {
    slot = where;
    number = ++blocks_run;
    index_ = {x, y, 0};
    fibers_.assign(size.x, Fiber{});
    order_ = numbers(size.x);
    stacks_.resize(size.x * kStack);
    barrier = {};
    for (auto& warp : warps)
      for (Barrier& each : warp) each = {};
    std::memset(shared_memory, 0xff, sizeof shared_memory);  // NaN
    for (unsigned i = 0; i < size.x; ++i) {
      getcontext(&fibers_[i].start);
      fibers_[i].start.uc_stack.ss_sp = stacks_.data() + i * kStack;
      fibers_[i].start.uc_stack.ss_size = kStack;
      makecontext(&fibers_[i].start, enter, 0);
    }
    const races::Stack stacks{reinterpret_cast<uintptr_t>(stacks_.data()), stacks_.size()};
    races::start_block(slot, y * grid_dim.x + x, size.x, stacks, shared_memory);
  }

  // Every thread that can, to its next barrier. False when none could.
  bool advance();
  unsigned left() const {
    unsigned n = 0;
    for (const Fiber& fiber : fibers_) n += !fiber.done;
    return n;
  }
  void wait(Barrier* at, unsigned count, const std::function<void()>& all_are_here) {
    if (++at->arrived == count) {
      at->arrived = 0;
      ++at->generation;
      return all_are_here();
    }
    Fiber& fiber = fibers_[current];
    fiber.waits_for = at;
    fiber.generation = at->generation;
    if (_setjmp(fiber.at) == 0) _longjmp(scheduler_, 1);
    fiber.waits_for = nullptr;
  }
  void end_thread() {
    fibers_[current].done = true;
    _longjmp(scheduler_, 1);
  }

 private:
  void resume(unsigned i) {
    current = i;
    thread_index = {i, 0, 0};
    block_index = index_;
    Fiber& fiber = fibers_[i];
    races::resume(slot, i);
    if (_setjmp(scheduler_) == 0) {
      if (fiber.begun) _longjmp(fiber.at, 1);
      fiber.begun = true;
      setcontext(&fiber.start);
    }
    races::suspend();
  }

  uint3 index_{};
  jmp_buf scheduler_;
  std::vector<Fiber> fibers_;
  std::vector<unsigned> order_;
  std::vector<char> stacks_;
};

Block* running;

bool Block::advance() {
  bool any = false;
  running = this;
  random_order.shuffle(order_);
  for (const unsigned i : order_) {
    if (!fibers_[i].ready()) continue;
    any = true;
    resume(i);
  }
  return any;
}

void enter() {
  (*body)();
  running->end_thread();
}

void stuck(unsigned left) {
  failure = "CUDA emulator (SPARTAN_EMULATOR_SEED=" + std::to_string(seed()) + "): " + std::to_string(left) + " of " +
            std::to_string(block_dim.x) + " threads of a block wait for a barrier that the others never reach";
}

void run_in_turn() {
  static Block block;
  std::vector<unsigned> order = numbers(grid_dim.x * grid_dim.y);
  random_order.shuffle(order);
  for (const unsigned i : order) {
    block.start(0, block_dim, i % grid_dim.x, i / grid_dim.x);
    while (block.advance()) {
    }
    if (block.left() > 0) return stuck(block.left());
  }
}

// Blocks that wait for each other: a thread of the system for each, which has its shared memory; only one of them runs.
void run_together() {
  struct Member {
    Block block;
    std::binary_semaphore go{0}, gone{0};
    bool any = false, over = false;
    std::thread thread;
  };
  std::vector<std::unique_ptr<Member>> members;
  for (unsigned i = 0; i < grid_dim.x; ++i) {
    members.push_back(std::make_unique<Member>());
    Member& member = *members.back();
    member.thread = std::thread([i, &member] {
      member.go.acquire();
      member.block.start(i, block_dim, i, 0);
      for (member.gone.release(); member.go.acquire(), !member.over; member.gone.release()) {
        member.any = false;
        while (member.block.advance()) member.any = true;
      }
    });
    member.go.release();
    member.gone.acquire();
  }
  std::vector<unsigned> order = numbers(grid_dim.x);
  for (bool any = true; any;) {
    any = false;
    random_order.shuffle(order);
    for (const unsigned i : order) {
      members[i]->go.release();
      members[i]->gone.acquire();
      any |= members[i]->any;
    }
  }
  for (auto& member : members) {
    if (failure.empty() && member->block.left() > 0) stuck(member->block.left());
    member->over = true;
    member->go.release();
    member->thread.join();
  }
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& kernel_body) {
  static std::mutex one_launch;
  static uint64_t launches = 0;
  const std::lock_guard<std::mutex> lock(one_launch);
  ++emulator_launches;
  failure.clear();
  if (config.dynamicSmemBytes > kSharedMemory) {
    failure = "CUDA emulator: " + std::to_string(config.dynamicSmemBytes) + " bytes of shared memory";
    return cudaErrorLaunchFailure;
  }
  random_order.seed((uint64_t(seed()) << 32) + ++launches);
  grid_dim = config.gridDim;
  block_dim = config.blockDim;
  body = &kernel_body;
  grid_barrier = {};
  races::start_launch(kernel);
  config.numAttrs > 0 ? run_together() : run_in_turn();
  const std::string race = races::found(seed(), grid_dim.x);
  if (!race.empty()) failure = race;
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

const char* last_failure() { return failure.c_str(); }
float* dynamic_shared() { return shared_memory; }
uint64_t block_number() { return running->number; }

void wait_for_block() {
  running->wait(&running->barrier, block_dim.x, [] { races::block_barrier(running->slot); });
}
void wait_for_grid() {
  running->wait(&grid_barrier, block_dim.x * grid_dim.x, [] { races::grid_barrier(); });
}

namespace {
Barrier* warp_barrier(unsigned mask) { return &running->warps[thread_index.x / kWarp][__builtin_ctz(mask)]; }
unsigned size(unsigned mask) { return static_cast<unsigned>(__builtin_popcount(mask)); }
}  // namespace

void wait_for_warp(unsigned mask) { running->wait(warp_barrier(mask), size(mask), [] {}); }
void synchronise_warp(unsigned mask) {
  running->wait(warp_barrier(mask), size(mask), [mask] { races::warp_barrier(mask); });
}
uint64_t exchange(unsigned mask, uint64_t value, unsigned lane) {
  auto& mailbox = running->exchanged[thread_index.x / kWarp];
  mailbox[thread_index.x % kWarp] = value;
  wait_for_warp(mask);
  const uint64_t found = mailbox[lane];
  wait_for_warp(mask);
  return found;
}

void count_bytes(size_t read, size_t written) {
  emulator_bytes_read += read;
  emulator_bytes_written += written;
}

}  // namespace emulator
