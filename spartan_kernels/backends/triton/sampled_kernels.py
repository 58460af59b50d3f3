"""Kernels of the weight's gradient: the product of two dense matrices on active blocks alone, and a gate's gradient.

The active blocks of a row of blocks lie side by side, several to a program, which share the rows of dz. Their columns
are the rows of a tile, so that the tensor cores have 64 and more whatever the size of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.primitives import all_loaded, dot


@triton.jit(do_not_specialize=["tokens", "grid_columns", "parts"])
def _sampled_kernel(
    dz_ptr, x_ptr, theta_ptr, gate_ptr, out_ptr, grad_gate_ptr, offsets_ptr, indices_ptr,
    tokens, rows_extent, columns_extent, grid_columns, parts, stride_dz, stride_dz_row, stride_x, stride_theta,
    stride_out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr, HAS_GATE: tl.constexpr,
    GATE_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCKS active blocks of a row of dz^T x, times their gates; and their products with theta, the gates' gradients.

    Sums are kept transposed: a block is WIDTH rows of the tile, of which COLUMNS are its own.
    """
    WIDTH: tl.constexpr = BLOCK_C // BLOCKS
    i = tl.program_id(0) // parts
    first, end = tl.load(offsets_ptr + i) + tl.program_id(0) % parts * BLOCKS, tl.load(offsets_ptr + i + 1)
    if first < end:
        c, r, t = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)
        entry, within = first + c // WIDTH, c % WIDTH
        j = tl.load(indices_ptr + entry, entry < end, other=0).to(tl.int64)
        row, column = i.to(tl.int64) * ROWS + r, j * COLUMNS + within
        if COLUMNS == WIDTH:
            column = tl.max_contiguous(tl.multiple_of(column, WIDTH), WIDTH)
        whole_r, whole_c = r < ROWS, (entry < end) & (within < COLUMNS)
        inside_r, inside_c = whole_r & (row < rows_extent), whole_c & (column < columns_extent)
        # distances from the first token of a step: its own is one number, and the sums below take fewer instructions
        x_at = column[:, None] + t.to(tl.int64)[None, :] * stride_x
        dz_at = t.to(tl.int64)[:, None] * stride_dz + row[None, :] * stride_dz_row
        sums = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
        for start in range(0, tokens, BLOCK_T):
            inside_t, token = t < tokens - start, tl.cast(start, tl.int64)
            x = tl.load(x_ptr + token * stride_x + x_at, inside_c[:, None] & inside_t[None, :], other=0.0)
            dz = tl.load(dz_ptr + token * stride_dz + dz_at, inside_t[:, None] & inside_r[None, :], other=0.0)
            sums = dot(x, dz, sums, PRECISION)
        inside = inside_c[:, None] & inside_r[None, :]
        gates = i.to(tl.int64) * grid_columns
        if GATE_GRAD:
            theta = tl.load(theta_ptr + row[None, :] * stride_theta + column[:, None], inside, other=0.0)
            of_columns = tl.sum(sums * theta.to(tl.float32), 1)
            block = first + tl.arange(0, BLOCKS)
            at = gates + tl.load(indices_ptr + block, block < end, other=0)
            tl.store(grad_gate_ptr + at, tl.sum(tl.reshape(of_columns, [BLOCKS, WIDTH]), 1), block < end)
        if HAS_GATE:
            sums *= tl.load(gate_ptr + gates + j, entry < end, other=0.0)[:, None]
        sums = sums.to(out_ptr.dtype.element_ty)
        if PACKED:
            at = entry.to(tl.int64) * (ROWS * COLUMNS) + within
            tl.store(out_ptr + at[:, None] + r[None, :] * COLUMNS, sums, whole_c[:, None] & whole_r[None, :])
        else:
            tl.store(out_ptr + row[None, :] * stride_out + column[:, None], sums, inside)


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
