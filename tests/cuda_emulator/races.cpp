// See races.h.
#include "races.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"

namespace emulator::races {
namespace {

using Time = uint32_t;
constexpr Time kLatest = 1u << 31;  // past it, time begins anew
constexpr unsigned kWarp = 32;

enum Kind : uint8_t { kPlain, kAtomic, kUnderWay };

struct Access {
  Time time;
  uint32_t block;
  int32_t at;  // where in the code, from this library's beginning
  uint16_t thread;
  Kind kind;
  bool is_by(const Access& other) const { return block == other.block && thread == other.thread; }
};

// Some bytes, all of which were accessed alike.
struct Cell {
  Access writes[2], reads[2];
};

constexpr unsigned kPageBits = 12;
struct Page {
  unsigned unit_bits = 2;  // of a cell's bytes; smaller ones come with the first access that asks for them
  std::vector<Cell> cells = std::vector<Cell>(size_t(1) << (kPageBits - 2));

  void split(unsigned bits) {
    std::vector<Cell> finer(size_t(1) << (kPageBits - bits));
    for (size_t i = 0; i < finer.size(); ++i) finer[i] = cells[i >> (unit_bits - bits)];
    cells.swap(finer);
    unit_bits = bits;
  }
};

using Name = std::pair<uint32_t, uint16_t>;  // block and thread

// What is ordered before something: all that a block, or a thread, did before a time; and atomics by which they said so.
struct Past {
  std::map<uint32_t, Time> blocks;
  std::map<Name, Time> threads;
  std::map<std::tuple<uintptr_t, uint32_t, uint16_t>, Time> atomics;

  bool empty() const { return blocks.empty() && threads.empty() && atomics.empty(); }
  void join(const Past& other) {
    for (const auto& [key, time] : other.blocks) blocks[key] = std::max(blocks[key], time);
    for (const auto& [key, time] : other.threads) threads[key] = std::max(threads[key], time);
    for (const auto& [key, time] : other.atomics) atomics[key] = std::max(atomics[key], time);
  }
  bool holds(uintptr_t address, const Access& access) const {
    const auto block = blocks.find(access.block);
    if (block != blocks.end() && access.time < block->second) return true;
    const auto thread = threads.find({access.block, access.thread});
    if (thread != threads.end() && access.time < thread->second) return true;
    const auto atomic = atomics.find({address, access.block, access.thread});
    return access.kind == kAtomic && atomic != atomics.end() && access.time <= atomic->second;
  }
};

// What a thread knows beyond its block's barriers.
struct Knowledge {
  Time warp[kWarp] = {};         // all that the others of the warp did before these times is ordered
  Past known, fenced, to_learn;  // fenced: at its last fence; to_learn: from atomics, at its next
};

struct Thread {
  Time time = 0;
  unsigned unwatched = 0;
  std::unique_ptr<Knowledge> own = nullptr;  // few have any

  Knowledge& knowledge() {
    if (own == nullptr) own = std::make_unique<Knowledge>();
    return *own;
  }
};

struct Block {
  uint32_t number = 0;
  Time synchronised = 0;
  Stack stacks{}, shared{};
  bool learnt = false;  // a thread knows more than its block
  Past known;
  std::vector<Thread> threads;
};

struct Race {
  Access first, second;
  bool first_writes, second_writes, shared;
  uintptr_t address;
  const char* what;
};

bool watching;
Access me;
uintptr_t touched;  // where the access begins
Time now, launched;
const void* kernel_at;
Block* block;  // whose turn it is, with its thread
Thread* thread;
std::vector<std::unique_ptr<Block>> blocks;
std::unordered_map<uintptr_t, Page> pages;
std::unordered_map<uintptr_t, Past> told;  // by atomics after a fence, by address
std::unique_ptr<Race> race;

struct Recent {
  uintptr_t number = 0;
  Page* page = nullptr;
};
constexpr size_t kRecent = 256, kMostPages = 4096;
Recent recent[kRecent];

Page& page_of(uintptr_t address) {
  const uintptr_t number = address >> kPageBits;
  Recent& slot = recent[number % kRecent];
  if (slot.number != number) slot = {number, &pages[number]};
  return *slot.page;
}

void forget_everything() {
  pages.clear();
  for (Recent& slot : recent) slot = {};
}

const char* library() {
  static Dl_info here{};
  if (here.dli_fbase == nullptr) dladdr(reinterpret_cast<const void*>(&forget_everything), &here);
  return static_cast<const char*>(here.dli_fbase);
}

// The thread-local memory of this library that holds `inside`, on this thread of the system.
Stack shared_memory(const void* inside) {
  struct Search {
    uintptr_t inside;
    Stack found;
  } search{reinterpret_cast<uintptr_t>(inside), {0, 0}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto* wanted = static_cast<Search*>(data);
        const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
        for (int i = 0; begin != 0 && i < info->dlpi_phnum; ++i) {
          const auto& part = info->dlpi_phdr[i];
          if (part.p_type == PT_TLS && wanted->inside - begin < part.p_memsz) wanted->found = {begin, part.p_memsz};
        }
        return 0;
      },
      &search);
  if (search.found.bytes == 0) std::fprintf(stderr, "CUDA emulator: shared memory is not to be found\n"), std::abort();
  return search.found;
}

bool concurrent(const Access& access) {
  if (access.time < launched) return false;
  if (access.block == me.block) {
    if (access.kind == kUnderWay) return true;
    if (access.time < block->synchronised || access.thread == me.thread) return false;
    if (thread->own != nullptr && access.thread / kWarp == me.thread / kWarp &&
        access.time < thread->own->warp[access.thread % kWarp])
      return false;
  } else if (touched - block->shared.begin < block->shared.bytes) {
    return false;  // of an earlier block in the same place
  }
  return !(thread->own != nullptr && thread->own->known.holds(touched, access)) && !block->known.holds(touched, access);
}

void report(uintptr_t address, const Access& first, bool first_writes, bool second_writes, const char* what) {
  const bool shared = address - block->shared.begin < block->shared.bytes;
  race = std::make_unique<Race>(Race{first, me, first_writes, second_writes, shared, address, what});
  watching = false;
}

void check(uintptr_t address, const Access (&others)[2], bool they_write, bool writes) {
  for (const Access& other : others) {
    if (!concurrent(other)) continue;
    if (other.kind == kAtomic && me.kind == kAtomic) continue;
    report(address, other, they_write, writes, other.kind == kUnderWay ? "a copy that was not waited for" : "a race");
    return;
  }
}

// Keeps the latest accesses of two threads, of two blocks where there are so many.
void keep(Access (&kept)[2]) {
  for (Access& other : kept) {
    if (other.is_by(me) || !concurrent(other)) {
      other = me;
      return;
    }
  }
  if (kept[0].block != me.block && kept[1].block != me.block) kept[1] = me;
}

bool written_here(const Cell& cell) {
  for (const Access& write : cell.writes)
    if (write.time >= launched && write.block == me.block) return true;
  return false;
}

void touch(uintptr_t address, Cell& cell, bool writes, bool shared) {
  check(address, cell.writes, true, writes);
  if (watching && writes) check(address, cell.reads, false, true);
  if (watching && !writes && shared && !written_here(cell))
    report(address, me, false, false, "a read of what was not written before");
  if (watching) keep(writes ? cell.writes : cell.reads);
}

void access(const void* pointer, size_t bytes, bool writes, Kind kind, const void* from) {
  if (!watching || bytes == 0) return;
  uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - block->stacks.begin < block->stacks.bytes) return;
  const bool shared = address - block->shared.begin < block->shared.bytes;
  me.at = static_cast<int32_t>(static_cast<const char*>(from) - library());
  me.kind = kind;
  touched = address;
  const uintptr_t end = address + bytes;
  while (address < end && watching) {
    Page& page = page_of(address);
    const uintptr_t page_end = ((address >> kPageBits) + 1) << kPageBits, until = end < page_end ? end : page_end;
    const unsigned fits = static_cast<unsigned>(__builtin_ctzll(address | until | (1u << page.unit_bits)));
    if (fits < page.unit_bits) page.split(fits);
    const uintptr_t unit = uintptr_t(1) << page.unit_bits, mask = (uintptr_t(1) << kPageBits) - 1;
    for (; address < until && watching; address += unit)
      touch(address, page.cells[(address & mask) >> page.unit_bits], writes, shared);
  }
}

// The function and line of the kernel's source at an address, without what this folder's headers add.
std::string line_of(intptr_t at, bool whole_function) {
  Dl_info here{};
  dladdr(reinterpret_cast<const void*>(&forget_everything), &here);
  char command[1024];
  // of an executable that is not relocated, addresses are as they are
  const auto* header = static_cast<const ElfW(Ehdr)*>(here.dli_fbase);
  const intptr_t base = header->e_type == ET_EXEC ? reinterpret_cast<intptr_t>(here.dli_fbase) : 0;
  std::snprintf(command, sizeof command, "addr2line -f -i -C -e '%s' 0x%lx 2>/dev/null", here.dli_fname,
                static_cast<unsigned long>(base + at));
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "?";
  std::string name, place, found = "?";
  for (char line[4096]; std::fgets(line, sizeof line, pipe) != nullptr;) {
    line[std::strcspn(line, "\n")] = 0;
    if (name.empty()) {
      name = line;
      continue;
    }
    place = line;
    place.resize(std::min(place.size(), place.find(" (discriminator")));
    const size_t slash = place.rfind('/');
    if (found == "?" && place.find("tests/cuda_emulator/cuda_runtime.h") == std::string::npos &&
        place.find("mma_emulated.h") == std::string::npos)
      found = whole_function ? name : place.substr(slash == std::string::npos ? 0 : slash + 1);
    name.clear();
  }
  pclose(pipe);
  return found;
}

std::string place_of(const Access& access, unsigned grid_width) {
  return "thread " + std::to_string(access.thread) + " of block (" + std::to_string(access.block % grid_width) + ", " +
         std::to_string(access.block / grid_width) + ") at " + line_of(access.at - 1, false);
}

}  // namespace

void start_launch(const void* kernel) {
  kernel_at = kernel;
  if (now >= kLatest || pages.size() > kMostPages) {
    forget_everything();
    now = 0;
  }
  launched = ++now;
  told.clear();
  race.reset();
  library();
}

void start_block(unsigned slot, unsigned number, unsigned threads, Stack stacks, const void* in_shared_memory) {
  while (blocks.size() <= slot) blocks.push_back(std::make_unique<Block>());
  Block& started = *blocks[slot];
  started.number = number;
  started.synchronised = ++now;
  started.stacks = stacks;
  started.shared = shared_memory(in_shared_memory);
  started.known = {};
  started.learnt = false;
  started.threads.clear();
  started.threads.resize(threads);
}

void resume(unsigned slot, unsigned index) {
  block = blocks[slot].get();
  thread = &block->threads[index];
  me = {std::max(thread->time, block->synchronised), block->number, 0, static_cast<uint16_t>(index), kPlain};
  watching = thread->unwatched == 0 && race == nullptr;
}

void suspend() { watching = false; }

void block_barrier(unsigned slot) {
  Block& here = *blocks[slot];
  if (here.learnt) {
    for (Thread& each : here.threads) {
      if (each.own == nullptr) continue;
      here.known.join(each.own->known);
      each.own->known = {};
    }
    here.learnt = false;
  }
  here.synchronised = ++now;
  if (block == &here) me.time = now;
}

void grid_barrier() {
  launched = ++now;
  for (auto& each : blocks) {
    each->synchronised = now;
    each->known = {};
    each->learnt = false;
    for (Thread& member : each->threads) member.own = nullptr;
  }
  told.clear();
  me.time = now;
}

void warp_barrier(unsigned mask) {
  const unsigned first = me.thread / kWarp * kWarp;
  Knowledge all;
  ++now;
  const auto each = [&](auto f) {
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1u) f(block->threads[first + lane], lane);
  };
  each([&](Thread& member, unsigned) {
    all.known.join(member.knowledge().known);
    for (unsigned other = 0; other < kWarp; ++other) all.warp[other] = std::max(all.warp[other], member.own->warp[other]);
  });
  each([&](Thread& member, unsigned lane) { all.warp[lane] = member.time = now; });
  each([&](Thread& member, unsigned) {
    std::memcpy(member.own->warp, all.warp, sizeof all.warp);
    member.own->known = all.known;
  });
  me.time = now;
}

void fence() {
  if (race != nullptr) return;
  Knowledge& own = thread->knowledge();
  Past& fenced = own.fenced;
  fenced.join(block->known);
  fenced.join(own.known);
  fenced.blocks[me.block] = block->synchronised;
  thread->time = me.time = ++now;
  fenced.threads[{me.block, me.thread}] = now;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (own.warp[lane] == 0) continue;
    Time& before = fenced.threads[{me.block, static_cast<uint16_t>(me.thread / kWarp * kWarp + lane)}];
    before = std::max(before, own.warp[lane]);
  }
  if (own.to_learn.empty()) return;
  own.known.join(own.to_learn);
  own.to_learn = {};
  block->learnt = true;
}

std::string found(unsigned seed, unsigned grid_width) {
  if (race == nullptr) return {};
  const auto verb = [](bool writes, Kind kind) {
    return kind == kAtomic ? "changes it atomically" : kind == kUnderWay ? "copies to it" : writes ? "writes" : "reads";
  };
  char where[64];
  std::snprintf(where, sizeof where, " memory at %#lx", static_cast<unsigned long>(race->address));
  std::string text = std::string("CUDA emulator (SPARTAN_EMULATOR_SEED=") + std::to_string(seed) + "): " + race->what +
                     " in " + line_of(static_cast<const char*>(kernel_at) - library(), true) + ", " +
                     (race->shared ? "shared" : "global") + where + ": " + place_of(race->second, grid_width) + " " +
                     verb(race->second_writes, race->second.kind);
  if (!race->first.is_by(race->second) || race->first.kind != race->second.kind || race->first.at != race->second.at)
    text += "; before, not ordered with it, " + place_of(race->first, grid_width) + " " +
            verb(race->first_writes, race->first.kind);
  return text;
}

}  // namespace emulator::races

namespace emulator {

using namespace races;

void unwatch() {
  if (thread == nullptr) return;
  ++thread->unwatched;
  watching = false;
}
void watch() {
  if (thread == nullptr) return;
  watching = --thread->unwatched == 0 && race == nullptr;
}
void fence() { races::fence(); }
void note_read(const void* from, size_t bytes) { access(from, bytes, false, kPlain, __builtin_return_address(0)); }

void note_atomic(void* to, size_t bytes) {
  access(to, bytes, true, kAtomic, __builtin_return_address(0));
  if (!watching) return;
  const auto address = reinterpret_cast<uintptr_t>(to);
  const auto here = told.find(address);
  if (here != told.end()) thread->knowledge().to_learn.join(here->second);
  if (thread->own == nullptr || thread->own->fenced.empty()) return;
  Past& past = told[address];
  past.join(thread->own->fenced);
  past.atomics[{address, me.block, me.thread}] = me.time;
}

void note_copy(void* to, size_t bytes) { access(to, bytes, true, kUnderWay, __builtin_return_address(0)); }

void note_arrival(void* to, size_t bytes) {
  if (!watching) return;
  const auto begin = reinterpret_cast<uintptr_t>(to);
  for (uintptr_t address = begin; address < begin + bytes;) {
    Page& page = page_of(address);
    Cell& cell = page.cells[(address & ((1u << kPageBits) - 1)) >> page.unit_bits];
    for (Access& write : cell.writes)
      if (write.kind == kUnderWay && write.is_by(me)) write.kind = kPlain;
    address += uintptr_t(1) << page.unit_bits;
  }
  access(to, bytes, true, kPlain, __builtin_return_address(0));
}

}  // namespace emulator

#define SPARTAN_EXPORT extern "C" [[gnu::used]]
#define SPARTAN_ACCESS(bytes)                                                                                        \
  SPARTAN_EXPORT void __tsan_read##bytes(void* p) { access(p, bytes, false, kPlain, __builtin_return_address(0)); }           \
  SPARTAN_EXPORT void __tsan_write##bytes(void* p) { access(p, bytes, true, kPlain, __builtin_return_address(0)); }           \
  SPARTAN_EXPORT void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, false, kPlain, __builtin_return_address(0)); } \
  SPARTAN_EXPORT void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true, kPlain, __builtin_return_address(0)); } \
  SPARTAN_EXPORT void __tsan_volatile_read##bytes(void* p) { access(p, bytes, false, kPlain, __builtin_return_address(0)); }  \
  SPARTAN_EXPORT void __tsan_volatile_write##bytes(void* p) { access(p, bytes, true, kPlain, __builtin_return_address(0)); }

// What the instrumentation calls.
using emulator::races::access;
using emulator::races::kPlain;
SPARTAN_ACCESS(1)
SPARTAN_ACCESS(2)
SPARTAN_ACCESS(4)
SPARTAN_ACCESS(8)
SPARTAN_ACCESS(16)
SPARTAN_EXPORT void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, false, kPlain, __builtin_return_address(0)); }
SPARTAN_EXPORT void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, true, kPlain, __builtin_return_address(0)); }
SPARTAN_EXPORT void __tsan_vptr_update(void**, void*) {}
SPARTAN_EXPORT void __tsan_vptr_read(void**) {}
SPARTAN_EXPORT void __tsan_func_entry(void*) {}
SPARTAN_EXPORT void __tsan_func_exit() {}
SPARTAN_EXPORT void __tsan_init() {}
