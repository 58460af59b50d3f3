"""Kernels of the block-sparse products: layout, product with active blocks, sampled product.

A product walks "lines" of blocks: rows of blocks for y = x w^T, columns of blocks for dx = dz w. The active blocks of
a line are gathered side by side into tiles of BLOCK_K columns, whatever the size of a block; tokens are the rows of a
tile.

Integers that make no load wider (sizes of grids, numbers of tokens) are not specialised: they are no reason to compile
a kernel again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.primitives import all_loaded


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


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)  # NaN stays
    if ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    if PRECISION == "widened":  # the interpreter multiplies the bits of bfloat16, not its numbers
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _blocks_of_step(
    indices_ptr, gate_ptr, positions_ptr, entry, end, stride_gate,
    HAS_GATE: tl.constexpr, HAS_POSITIONS: tl.constexpr, OTHER: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Index, gate and position of the block of each column of a step that holds whole blocks.

    Each is loaded once for a block: given a column each, compilers before 3.9 load them once for a column.
    """
    block = tl.arange(0, BLOCK_K) // OTHER
    index, position = tl.zeros((BLOCK_K,), tl.int32), tl.zeros((BLOCK_K,), tl.int32)
    gate = tl.zeros((BLOCK_K,), tl.float32)
    for j in tl.static_range(BLOCK_K // OTHER):
        inside = entry + j < end
        at = tl.load(indices_ptr + entry + j, inside, other=0)
        index = tl.where(block == j, at, index)
        if HAS_GATE:
            gate = tl.where(block == j, tl.load(gate_ptr + at.to(tl.int64) * stride_gate, inside, other=0.0), gate)
        if HAS_POSITIONS:
            position = tl.where(block == j, tl.load(positions_ptr + entry + j, inside, other=0), position)
    return index.to(tl.int64), gate, position.to(tl.int64)


@triton.jit(do_not_specialize=["tokens", "lines", "group", "stride_gate_line", "stride_gate_other"])
def _product_kernel(
    x_ptr, w_ptr, gate_ptr, bias_ptr, y_ptr, saved_ptr, order_ptr, offsets_ptr, indices_ptr, positions_ptr,
    tokens, lines, group, extent, other_extent, stride_x, stride_wn, stride_wk, stride_gate_line, stride_gate_other,
    SPAN: tl.constexpr, OTHER: tl.constexpr, PACKED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """act(x w^T + b) for BLOCK_M tokens and up to BLOCK_N outputs of one line; with SPLIT > 1, one part of its sum.

    All lines, the longest first, are multiplied with a group of tiles of tokens, which the L2 cache holds, before the
    next group.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    pieces: tl.constexpr = (SPAN + BLOCK_N - 1) // BLOCK_N
    WHOLE: tl.constexpr = OTHER >= 8 and BLOCK_K % OTHER == 0  # a step holds whole blocks, and not too many
    first_tile = tile // (group * lines * pieces) * group
    tile = tile % (group * lines * pieces)
    tiles = tl.minimum(tl.cdiv(tokens, BLOCK_M) - first_tile, group)
    first_token = (first_tile + tile % tiles) * BLOCK_M
    token = first_token.to(tl.int64) + tl.arange(0, BLOCK_M)
    line = tl.load(order_ptr + tile // tiles // pieces)
    n = (tile // tiles) % pieces * BLOCK_N + tl.arange(0, BLOCK_N)
    output = line.to(tl.int64) * SPAN + n
    inside_m, inside_n = token < tokens, (n < SPAN) & (output < extent)

    first = tl.load(offsets_ptr + line)
    depth = (tl.load(offsets_ptr + line + 1) - first) * OTHER
    steps = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLIT)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(depth, BLOCK_K))):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        if OTHER % BLOCK_K == 0:  # the tile lies in one block
            entry = first + (step * BLOCK_K) // OTHER
            # compilers before 3.9 lose the multiple in the remainder, and then make no copies ahead of the arithmetic
            start = tl.multiple_of((step * BLOCK_K) % OTHER, BLOCK_K)
            within = start + tl.arange(0, BLOCK_K)
            index = tl.load(indices_ptr + entry).to(tl.int64)
            other = index * OTHER + within
            inside_k = other < other_extent
        else:
            entry = first + k // OTHER
            within = k % OTHER
            if WHOLE:
                index, gate, position = _blocks_of_step(
                    indices_ptr, gate_ptr + line.to(tl.int64) * stride_gate_line, positions_ptr,
                    first + step * (BLOCK_K // OTHER), first + depth // OTHER, stride_gate_other,
                    HAS_GATE, HAS_POSITIONS, OTHER, BLOCK_K,
                )  # fmt: skip
            else:
                index = tl.load(indices_ptr + entry, k < depth, other=0).to(tl.int64)
            other = index * OTHER + within
            if WHOLE:
                other = tl.max_contiguous(tl.multiple_of(other, OTHER), OTHER)
            inside_k = (k < depth) & (other < other_extent)
        if TMA:  # x_ptr describes x; zeros come past its edges
            x = x_ptr.load([first_token, (index * OTHER + start).to(tl.int32)])
        else:
            x = tl.load(
                x_ptr + token[:, None] * stride_x + other[None, :], inside_m[:, None] & inside_k[None, :], other=0.0
            )
        if PACKED:
            block = entry.to(tl.int64)
            if HAS_POSITIONS:
                if OTHER % BLOCK_K == 0:
                    block = tl.load(positions_ptr + entry).to(tl.int64)
                elif WHOLE:
                    block = position
                else:
                    block = tl.load(positions_ptr + entry, k < depth, other=0).to(tl.int64)
            row = block * (SPAN * OTHER) + within * stride_wk
            w_at = row[:, None] + n[None, :] * stride_wn
        else:
            w_at = (other * stride_wk)[:, None] + output[None, :] * stride_wn
        w = tl.load(w_ptr + w_at, inside_k[:, None] & inside_n[None, :], other=0.0)
        if HAS_GATE:
            gate_at = line.to(tl.int64) * stride_gate_line + index * stride_gate_other
            if OTHER % BLOCK_K == 0:
                w = (w.to(tl.float32) * tl.load(gate_ptr + gate_at)).to(w.dtype)
            elif WHOLE:
                w = (w.to(tl.float32) * gate[:, None]).to(w.dtype)
            else:
                gate = tl.load(gate_ptr + gate_at, k < depth, other=0.0)
                w = (w.to(tl.float32) * gate[:, None]).to(w.dtype)
        sums = _dot(x, w, sums, PRECISION)

    at = token[:, None] * extent + output[None, :]
    inside = inside_m[:, None] & inside_n[None, :]
    if SPLIT > 1:
        tl.store(y_ptr + part.to(tl.int64) * tokens * extent + at, sums, inside)
    else:
        if HAS_BIAS:
            sums += tl.load(bias_ptr + output, inside_n, other=0.0).to(tl.float32)[None, :]
        if SAVE:
            tl.store(saved_ptr + at, sums.to(saved_ptr.dtype.element_ty), inside)
        tl.store(y_ptr + at, _activated(sums, ACTIVATION).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _join_kernel(
    parts_ptr, bias_ptr, y_ptr, saved_ptr, total, extent,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts of a split sum, added in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    z = tl.zeros((BLOCK,), tl.float32)
    for _ in range(SPLIT):
        z += tl.load(parts_ptr + at, inside, other=0.0)
        parts_ptr += total
    if HAS_BIAS:
        z += tl.load(bias_ptr + at % extent, inside, other=0.0).to(tl.float32)
    if SAVE:
        tl.store(saved_ptr + at, z.to(saved_ptr.dtype.element_ty), inside)
    tl.store(y_ptr + at, _activated(z, ACTIVATION).to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens", "grid_columns"])
def _sampled_kernel(
    dz_ptr, x_ptr, theta_ptr, gate_ptr, out_ptr, grad_gate_ptr, offsets_ptr, indices_ptr,
    tokens, rows_extent, columns_extent, grid_columns, stride_dz, stride_dz_row, stride_x, stride_theta, stride_out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr, HAS_GATE: tl.constexpr,
    GATE_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One active block of dz^T x, times its gate; and its product with theta, the gradient of the gate."""
    i, slot = tl.program_id(0) // grid_columns, tl.program_id(0) % grid_columns
    first = tl.load(offsets_ptr + i)
    if slot < tl.load(offsets_ptr + i + 1) - first:
        j = tl.load(indices_ptr + first + slot)
        r, c, t = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_T)
        row, column = i.to(tl.int64) * ROWS + r, j.to(tl.int64) * COLUMNS + c
        inside_r, inside_c = (r < ROWS) & (row < rows_extent), (c < COLUMNS) & (column < columns_extent)
        sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for start in range(0, tokens, BLOCK_T):
            token = start + t.to(tl.int64)
            inside_t = token < tokens
            dz = tl.load(
                dz_ptr + row[:, None] * stride_dz_row + token[None, :] * stride_dz,
                inside_r[:, None] & inside_t[None, :], other=0.0,
            )  # fmt: skip
            x = tl.load(
                x_ptr + token[:, None] * stride_x + column[None, :], inside_t[:, None] & inside_c[None, :], other=0.0
            )
            sums = _dot(dz, x, sums, PRECISION)
        inside = inside_r[:, None] & inside_c[None, :]
        b = i.to(tl.int64) * grid_columns + j
        if GATE_GRAD:
            theta = tl.load(theta_ptr + row[:, None] * stride_theta + column[None, :], inside, other=0.0)
            # kept two-dimensional: a sum to a scalar of what tensor memory holds does not compile in Triton 3.7
            of_rows = tl.sum(sums * theta.to(tl.float32), 1, keep_dims=True)
            tl.store(grad_gate_ptr + b + tl.arange(0, 1), tl.sum(of_rows, 0))
        if HAS_GATE:
            sums *= tl.load(gate_ptr + b)
        if PACKED:
            block = (first + slot).to(tl.int64) * (ROWS * COLUMNS)
            whole = (r < ROWS)[:, None] & (c < COLUMNS)[None, :]
            tl.store(out_ptr + block + r[:, None] * COLUMNS + c[None, :], sums.to(out_ptr.dtype.element_ty), whole)
        else:
            tl.store(out_ptr + row[:, None] * stride_out + column[None, :], sums.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows_extent", "grid_columns"])
def _gate_gradient_kernel(
    raw_ptr, theta_ptr, gate_ptr, grad_gate_ptr, rows_extent, columns_extent, grid_columns, stride_theta,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """For every block of a dense raw gradient: its product with theta, and raw *= gate."""
    b = tl.program_id(0).to(tl.int64)
    i, j = b // grid_columns, b % grid_columns
    gate = tl.load(gate_ptr + b)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for r0 in range(0, ROWS, BLOCK_R):
        for c0 in range(0, COLUMNS, BLOCK_C):
            r, c = r0 + tl.arange(0, BLOCK_R)[:, None], c0 + tl.arange(0, BLOCK_C)[None, :]
            row, column = i * ROWS + r, j * COLUMNS + c
            inside = (r < ROWS) & (c < COLUMNS) & (row < rows_extent) & (column < columns_extent)
            raw = tl.load(raw_ptr + row * columns_extent + column, inside, other=0.0).to(tl.float32)
            total += raw * tl.load(theta_ptr + row * stride_theta + column, inside, other=0.0).to(tl.float32)
            all_loaded(BLOCK_R * BLOCK_C)
            tl.store(raw_ptr + row * columns_extent + column, (raw * gate).to(raw_ptr.dtype.element_ty), inside)
    tl.store(grad_gate_ptr + b, tl.sum(tl.sum(total, 1), 0))
