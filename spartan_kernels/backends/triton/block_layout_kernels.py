"""Kernels that find the active blocks of a gate, by rows and by columns of blocks: a count, then the indices.

The sizes of grids make no load wider and are not specialised: they are no reason to compile a kernel again.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _line_of(line, grid_rows, grid_columns):
    """(first, step, length) of a row of the grid, or past the rows, of a column."""
    by_row = line < grid_rows
    first = tl.where(by_row, line.to(tl.int64) * grid_columns, (line - grid_rows).to(tl.int64))
    return first, tl.where(by_row, 1, grid_columns), tl.where(by_row, grid_columns, grid_rows)


@triton.jit
def _active_at(gate_ptr, mask_ptr, first, step, at, inside, HAS_MASK: tl.constexpr):
    place = first + at.to(tl.int64) * step
    active = tl.load(gate_ptr + place, inside, other=0.0) != 0  # true for NaN
    if HAS_MASK:
        active = active & (tl.load(mask_ptr + place, inside, other=0) != 0)
    return (active & inside).to(tl.int32)


@triton.jit(do_not_specialize=["grid_rows", "grid_columns"])
def _layout_count_kernel(
    gate_ptr, mask_ptr, counts_ptr, grid_rows, grid_columns, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Active blocks of each row of blocks, then of each column."""
    line = tl.program_id(0)
    first, step, length = _line_of(line, grid_rows, grid_columns)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += _active_at(gate_ptr, mask_ptr, first, step, at, at < length, HAS_MASK)
    tl.store(counts_ptr + line, tl.sum(total))


@triton.jit(do_not_specialize=["grid_rows", "grid_columns"])
def _layout_fill_kernel(
    gate_ptr, mask_ptr, counts_ptr, row_offsets_ptr, column_indices_ptr, column_offsets_ptr, row_indices_ptr, order_ptr,
    grid_rows, grid_columns, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every line sums the counts before it and writes its indices there; and its place, longest first."""
    line = tl.program_id(0)
    by_row = line < grid_rows
    begin = tl.where(by_row, 0, grid_rows)
    index = line - begin
    lines = tl.where(by_row, grid_rows, grid_columns)
    count = tl.load(counts_ptr + line)
    before, longer = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, begin + lines, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + at, at < begin + lines, other=-1)
        before += tl.where(at < line, counts, 0)
        longer += ((counts > count) | ((counts == count) & (at < line))).to(tl.int32)
    offset = tl.sum(before)
    tl.store(order_ptr + begin + tl.sum(longer), index)
    last = index == lines - 1
    if by_row:
        tl.store(row_offsets_ptr + index, offset)
        tl.store(row_offsets_ptr + lines, offset + count, mask=last)
    else:
        tl.store(column_offsets_ptr + index, offset)
        tl.store(column_offsets_ptr + lines, offset + count, mask=last)
    first, step, length = _line_of(line, grid_rows, grid_columns)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        active = _active_at(gate_ptr, mask_ptr, first, step, at, at < length, HAS_MASK)
        place = offset + tl.cumsum(active, 0) - active
        if by_row:
            tl.store(column_indices_ptr + place, at, active != 0)
        else:
            tl.store(row_indices_ptr + place, at, active != 0)
        offset += tl.sum(active)
