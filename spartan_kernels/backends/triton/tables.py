"""Lists of tensors as a device table that a persistent grid walks in chunks: no concatenation, no copy.

Each program owns one run of neighbouring chunks. What it finds lies in the order of the entries, and a pass that walks
its runs backwards finds in the cache what the pass before it read last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.primitives import INFINITY

# Columns of the table, 64-bit words: pointers, number of entries, and where the tensor begins in chunks and in entries.
WIDTH = tl.constexpr(9)
VALUES = tl.constexpr(0)
COSTS = tl.constexpr(1)
COST_STRIDE = tl.constexpr(2)
FIRST_CHUNK = tl.constexpr(3)
LENGTH = tl.constexpr(4)
FIRST_ENTRY = tl.constexpr(5)
OUTPUT = tl.constexpr(6)


@triton.jit
def locate(table_ptr, n_tensors, wanted, COLUMN: tl.constexpr):
    """Row of the table that holds the chunk or entry `wanted` (a number or a tensor): the last that begins by then."""
    found = wanted * 0
    width = n_tensors
    while width > 1:
        half = width // 2
        begins = tl.load(table_ptr + (found + half) * WIDTH + COLUMN)
        found = tl.where(begins <= wanted, found + half, found)
        width = width - half
    return found


@triton.jit
def own_chunks(n_chunks):
    """First and past-the-end chunk of this program, in 32 bits: 2^31 chunks are more than any memory holds."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begin, end = program * n_chunks // programs, (program + 1) * n_chunks // programs
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def chunk_at(table_ptr, n_tensors, row, chunk, CHUNK: tl.constexpr):
    """Its row of the table (as a number and a pointer), first entry, which entries exist, and if all do.

    `row` is the row of a chunk close by: mostly the same one. Entries of a chunk are counted in 32 bits.
    """
    while tl.load(table_ptr + row * WIDTH + FIRST_CHUNK) > chunk:
        row -= 1
    while tl.load(table_ptr + (row + 1) * WIDTH + FIRST_CHUNK) <= chunk:  # the table's last row begins after all chunks
        row += 1
    row_ptr = table_ptr + row * WIDTH
    start = (chunk - tl.load(row_ptr + FIRST_CHUNK)) * CHUNK
    count = tl.minimum(tl.load(row_ptr + LENGTH) - start, CHUNK).to(tl.int32)
    return row, row_ptr, start, tl.arange(0, CHUNK) < count, count == CHUNK


@triton.jit
def pointer_at(word_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a word of the table; ALIGNED: to 16 bytes, which vector loads and stores need."""
    pointer = tl.load(word_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_chunk(pointer, start, live, whole, absent: tl.constexpr, CHUNK: tl.constexpr):
    """Entries of a chunk. A mask that ends anywhere forbids vector loads: only a tensor's last chunk has one."""
    at = pointer + start + tl.arange(0, CHUNK)
    if whole:
        found = tl.load(at)
    else:
        found = tl.load(at, live, other=absent)
    return found


@triton.jit
def store_chunk(pointer, start, live, whole, entries, CHUNK: tl.constexpr):
    """The counterpart of `load_chunk`."""
    at = pointer + start + tl.arange(0, CHUNK)
    if whole:
        tl.store(at, entries)
    else:
        tl.store(at, entries, live)


@triton.jit
def load_costs(
    row_ptr, start, live, whole, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """a in float32; a cost that is one number for the tensor is read as one number."""
    pointer = pointer_at(row_ptr + COSTS, DTYPE, ALIGNED)
    if tl.load(row_ptr + COST_STRIDE) == 0:
        a = tl.zeros((CHUNK,), tl.float32) + tl.load(pointer).to(tl.float32)
    else:
        a = load_chunk(pointer, start, live, whole, 1.0, CHUNK).to(tl.float32)
    return a


@triton.jit
def load_ratio(
    row_ptr, start, live, whole,
    DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """u = v / a and a of a chunk in float32, and which entries are live: none of -inf, which are masked.

    u is 0 where there is no entry.
    """
    u = load_chunk(pointer_at(row_ptr + VALUES, DTYPE, ALIGNED), start, live, whole, 0.0, CHUNK).to(tl.float32)
    if ABSOLUTE:
        u = tl.abs(u)
    if HAS_COSTS:
        a = load_costs(row_ptr, start, live, whole, DTYPE, ALIGNED, CHUNK)
        u = tl.div_rn(u, a)
    else:
        a = tl.full((CHUNK,), 1.0, tl.float32)
    if not ABSOLUTE:
        live = live & (u != -INFINITY)  # NaN is live: it must be seen
    return u, a, live


@triton.jit
def gather_ratio(
    table_ptr, n_tensors, entries, live, DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr
):  # fmt: skip
    """u = v / a and a in float32 of entries anywhere in the list, and which are live; 0 and 1 where there is none."""
    row_ptr = table_ptr + locate(table_ptr, n_tensors, entries, FIRST_ENTRY) * WIDTH
    offsets = entries - tl.load(row_ptr + FIRST_ENTRY)
    u = tl.load(tl.load(row_ptr + VALUES).to(tl.pointer_type(DTYPE)) + offsets, live, other=0.0).to(tl.float32)
    if ABSOLUTE:
        u = tl.abs(u)
    if HAS_COSTS:
        costs_ptr = tl.load(row_ptr + COSTS).to(tl.pointer_type(DTYPE))
        a = tl.load(costs_ptr + offsets * tl.load(row_ptr + COST_STRIDE), live, other=1.0).to(tl.float32)
        u = tl.div_rn(u, a)
    else:
        a = tl.where(live, 1.0, 1.0)
    live = live & (u != -INFINITY)
    return tl.where(live, u, 0.0), a, live
