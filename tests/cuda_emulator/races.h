// Accesses that may happen at once: what each thread of a launch touches, held against what the others touched before.
//
// The compiler's instrumentation (-fsanitize=thread, without its library) calls races.cpp for every access that is not plainly
// local. Time is one counter that grows whenever something is ordered: a barrier, a fence, the start of a block. An access is
// noted by block, thread and time with the bytes it touches; for each few bytes the last two writes and reads of different
// threads are kept. Of two accesses the first is ordered before the second if
// - the same thread makes both;
// - __syncthreads of their block, the grid's sync, or the start of the launch lies between them;
// - __syncwarp of both threads lies between them;
// - the first is followed by a fence and then an atomic of its thread (or is ordered before that fence), and the second's
//   thread has fenced after an atomic on the same address that came later (or is ordered after that fence).
// Otherwise, where one writes and not both are atomic, they race. In shared memory, what is read must have been written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator::races {

struct Stack {
  uintptr_t begin, bytes;
};

// A launch, its blocks, and whose turn it is. `slot` numbers the blocks that exist at a time, `block` those of the grid.
void start_launch(const void* kernel);
void start_block(unsigned slot, unsigned block, unsigned threads, Stack stacks, const void* in_shared_memory);
void resume(unsigned slot, unsigned thread);
void suspend();

// What orders accesses, by the thread whose turn it is.
void block_barrier(unsigned slot);
void grid_barrier();
void warp_barrier(unsigned mask);
void fence();

// The first race since start_launch, in words; empty if there was none.
std::string found(unsigned seed, unsigned grid_width);

}  // namespace emulator::races
