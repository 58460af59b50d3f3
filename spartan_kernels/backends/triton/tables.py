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
def chunks_of(table_ptr, row, begin, end, CHUNK: tl.constexpr):
    """The row of a tensor, and which of the chunks in [begin, end) it has.

    A run is walked tensor by tensor: within one, no chunk needs the table. Only its last chunk may not be whole.

    Returns:
        The row as a pointer, the first chunk, past the last, past the last whole one, the tensor length, and the chunk
        with which it begins.
    """
    row_ptr = table_ptr + row * WIDTH
    origin, length = tl.load(row_ptr + FIRST_CHUNK).to(tl.int32), tl.load(row_ptr + LENGTH)
    # the table's last row begins after all chunks
    stop = tl.minimum(end, tl.load(row_ptr + WIDTH + FIRST_CHUNK).to(tl.int32))
    first = tl.maximum(begin, origin)
    return row_ptr, first, stop, tl.minimum(stop, origin + (length // CHUNK).to(tl.int32)), length, origin


@triton.jit
def chunk_at(origin, length, chunk, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """The first entry of a chunk of a tensor that begins at chunk `origin`, which of it exist; all where WHOLE."""
    start = (chunk - origin).to(tl.int64) * CHUNK
    if WHOLE:
        live = tl.full((CHUNK,), 1, tl.int1)
    else:
        live = tl.arange(0, CHUNK) < (length - start).to(tl.int32)
    return start, live


@triton.jit
def pointer_at(word_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BYTES: tl.constexpr = 16):
    """The pointer in a word of the table; ALIGNED: to BYTES, which vector loads and stores need.

    A vector of a thread is no longer than that. Bytes beside values of 4 bytes come in vectors of 4 as those do: with
    longer ones, the values of a chunk would change threads.
    """
    pointer = tl.load(word_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, BYTES)
    return pointer


@triton.jit
def load_chunk(pointer, start, live, absent: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """Entries of a chunk. A mask that ends anywhere forbids vector loads."""
    at = pointer + start + tl.arange(0, CHUNK)
    if WHOLE:
        found = tl.load(at)
    else:
        found = tl.load(at, live, other=absent)
    return found


@triton.jit
def store_chunk(pointer, start, live, entries, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """The counterpart of `load_chunk`."""
    at = pointer + start + tl.arange(0, CHUNK)
    if WHOLE:
        tl.store(at, entries)
    else:
        tl.store(at, entries, live)


@triton.jit
def costs_at(row_ptr, DTYPE: tl.constexpr, HAS_COSTS: tl.constexpr, ALIGNED: tl.constexpr):
    """(pointer to the costs of a tensor, whether they are an array, the number that they are else)."""
    if HAS_COSTS:
        pointer = pointer_at(row_ptr + COSTS, DTYPE, ALIGNED)
        many, number = tl.load(row_ptr + COST_STRIDE) != 0, tl.load(pointer).to(tl.float32)
    else:
        pointer, many, number = row_ptr, False, 1.0
    return pointer, many, number


@triton.jit
def load_costs(pointer, many, number, start, live, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """a in float32; a cost that is one number for the tensor is not read again."""
    if many:
        a = load_chunk(pointer, start, live, 1.0, CHUNK, WHOLE).to(tl.float32)
    else:
        a = tl.zeros((CHUNK,), tl.float32) + number
    return a


@triton.jit
def load_ratio(
    values_ptr, costs_ptr, many, number, start, live,
    HAS_COSTS: tl.constexpr, ABSOLUTE: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """u = v / a and a of a chunk in float32, and which entries are live: none of -inf, which are masked.

    u is 0 where there is no entry.
    """
    u = load_chunk(values_ptr, start, live, 0.0, CHUNK, WHOLE).to(tl.float32)
    if ABSOLUTE:
        u = tl.abs(u)
    if HAS_COSTS:
        a = load_costs(costs_ptr, many, number, start, live, CHUNK, WHOLE)
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
