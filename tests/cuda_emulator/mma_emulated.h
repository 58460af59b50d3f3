// Tensor cores and asynchronous copies for the emulator. A copy takes place as late as it may: when its thread waits for it.
// Until then its place holds NaN, so that what reads too early, or is overwritten too early, is seen in the result.
#pragma once

#include <deque>

namespace spartan::cuda {

namespace emulated {

struct Copy {
  char* to;
  const char* from;
  int bytes, size;
};
struct Copies {
  uint64_t block = 0;  // the thread block they belong to
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};
inline std::vector<Copies> copies(1024);

inline Copies& mine() {
  Copies& own = copies[threadIdx.x];
  if (own.block != emulator::block_number()) own = {emulator::block_number(), {}, {}};
  return own;
}

SPARTAN_INLINE void start(void* to, const void* from, int bytes, int size) {
  const auto misaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(size) != 0; };
  if (misaligned(to) || misaligned(from) || bytes < 0 || bytes > size) {
    std::fprintf(stderr, "CUDA emulator: a copy of %d of %d bytes from %p to %p\n", bytes, size, from, to);
    std::abort();
  }
  emulator::note_read(from, static_cast<size_t>(bytes));
  emulator::note_copy(to, static_cast<size_t>(size));
  const emulator::Unwatched unwatched;
  std::memset(to, 0xff, static_cast<size_t>(size));
  mine().open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, size});
}

inline void wait_for_warp() { emulator::wait_for_warp(0xffffffffu); }

// Registers or addresses of the threads of each warp while it exchanges them.
struct Lane {
  unsigned words[8];
  const uint16_t* row;
};
inline Lane lanes[32][32];

template <class T>
float number(const Lane& lane, int word, int half) {
  const uint16_t bits = static_cast<uint16_t>(lane.words[word] >> (16 * half));
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return to_float(value);
}

}  // namespace emulated

SPARTAN_INLINE void copy16_async(void* to, const void* from, int bytes) { emulated::start(to, from, bytes, 16); }
SPARTAN_INLINE void copy4_async(void* to, const void* from, int bytes) { emulated::start(to, from, bytes, 4); }

inline void close_copies() {
  const emulator::Unwatched unwatched;
  emulated::Copies& own = emulated::mine();
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

template <int pending>
SPARTAN_INLINE void wait_for_copies() {
  emulator::unwatch();
  emulated::Copies& own = emulated::mine();
  while (own.groups.size() > pending) {
    for (const emulated::Copy& copy : own.groups.front()) {
      std::memset(copy.to, 0, static_cast<size_t>(copy.size));
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
      emulator::watch();
      emulator::note_read(copy.from, static_cast<size_t>(copy.bytes));
      emulator::note_arrival(copy.to, static_cast<size_t>(copy.size));
      emulator::unwatch();
    }
    own.groups.pop_front();
  }
  emulator::watch();
}

template <bool kTransposed>
SPARTAN_INLINE void load_matrices(unsigned (&to)[4], const void* row) {
  emulator::note_read(row, 16);
  const emulator::Unwatched unwatched;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  emulated::lanes[warp][lane].row = static_cast<const uint16_t*>(row);
  emulated::wait_for_warp();
  for (unsigned i = 0; i < 4; ++i) {
    unsigned pair[2];
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned along = 2 * (lane % 4) + half, across = lane / 4;
      pair[half] = kTransposed ? emulated::lanes[warp][8 * i + along].row[across]
                               : emulated::lanes[warp][8 * i + across].row[along];
    }
    to[i] = pair[0] | pair[1] << 16;
  }
  emulated::wait_for_warp();
}

template <class T>
void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const emulator::Unwatched unwatched;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  emulated::lanes[warp][lane] = {{a[0], a[1], a[2], a[3], b0, b1}, nullptr};
  emulated::wait_for_warp();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned upper = i / 2, column = 2 * (lane % 4) + i % 2;  // rows lane / 4 and 8 below it
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned half = k % 2, pair = k % 8 / 2, late = k / 8;
      const float left = emulated::number<T>(emulated::lanes[warp][lane / 4 * 4 + pair], static_cast<int>(2 * late + upper),
                                             static_cast<int>(half));
      const float right = emulated::number<T>(emulated::lanes[warp][column * 4 + pair], static_cast<int>(4 + late),
                                              static_cast<int>(half));
      c[i] += left * right;
    }
  }
  emulated::wait_for_warp();
}

inline unsigned rounded_to_tf32(unsigned bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}

inline void multiply_16x8x8(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const emulator::Unwatched unwatched;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  emulated::lanes[warp][lane] = {{a[0], a[1], a[2], a[3], b0, b1}, nullptr};
  emulated::wait_for_warp();
  const auto number = [&](unsigned of, unsigned word) {
    const unsigned bits = emulated::lanes[warp][of].words[word] & 0xffffe000u;  // what follows is not read
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned lower = i / 2, column = 2 * (lane % 4) + i % 2;  // rows lane / 4 and 8 below it
    for (unsigned k = 0; k < 8; ++k)
      c[i] += number(lane / 4 * 4 + k % 4, k / 4 * 2 + lower) * number(column * 4 + k % 4, 4 + k / 4);
  }
  emulated::wait_for_warp();
}

}  // namespace spartan::cuda
