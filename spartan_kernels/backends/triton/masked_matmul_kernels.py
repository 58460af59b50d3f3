"""Kernels of the product with active blocks: the product, what joins its parts, and the weights times their gates.

A product walks "lines" of blocks: rows of blocks for y = x w^T, columns of blocks for dx = dz w. The active blocks of
a line are gathered side by side into tiles of BLOCK_K columns, whatever the size of a block; tokens are the rows of a
tile.

Integers that make no load wider (sizes of grids, numbers of tokens) are not specialised: they are no reason to compile
a kernel again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.primitives import dot


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """act(z)."""
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
    x_ptr, w_ptr, gate_ptr, bias_ptr, token_scales_ptr, output_scales_ptr, y_ptr, saved_ptr, order_ptr, offsets_ptr,
    indices_ptr, positions_ptr,
    tokens, lines, group, extent, other_extent, stride_x, stride_wn, stride_wk, stride_gate_line, stride_gate_other,
    SPAN: tl.constexpr, OTHER: tl.constexpr, PACKED: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr, ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """act(x w^T + b) for BLOCK_M tokens and up to BLOCK_N outputs of one line; with SPLIT > 1, one part of its sum.

    With scales, of tokens and of outputs, the sums are multiplied by both before the bias is added.

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
        sums = dot(x, w, sums, PRECISION)

    at = token[:, None] * extent + output[None, :]
    inside = inside_m[:, None] & inside_n[None, :]
    if SPLIT > 1:
        tl.store(y_ptr + part.to(tl.int64) * tokens * extent + at, sums, inside)
    else:
        if HAS_SCALES:
            sums *= tl.load(token_scales_ptr + token, inside_m, other=0.0)[:, None]
            sums *= tl.load(output_scales_ptr + output, inside_n, other=0.0)[None, :]
        if HAS_BIAS:
            sums += tl.load(bias_ptr + output, inside_n, other=0.0).to(tl.float32)[None, :]
        if SAVE:
            tl.store(saved_ptr + at, sums.to(saved_ptr.dtype.element_ty), inside)
        tl.store(y_ptr + at, activated(sums, ACTIVATION).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _join_kernel(
    parts_ptr, bias_ptr, token_scales_ptr, output_scales_ptr, y_ptr, saved_ptr, total, extent,
    HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts of a split sum, added in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    z = tl.zeros((BLOCK,), tl.float32)
    for _ in range(SPLIT):
        z += tl.load(parts_ptr + at, inside, other=0.0)
        parts_ptr += total
    if HAS_SCALES:
        z *= tl.load(token_scales_ptr + at // extent, inside, other=0.0)
        z *= tl.load(output_scales_ptr + at % extent, inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + at % extent, inside, other=0.0).to(tl.float32)
    if SAVE:
        tl.store(saved_ptr + at, z.to(saved_ptr.dtype.element_ty), inside)
    tl.store(y_ptr + at, activated(z, ACTIVATION).to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["stride_gate_line", "stride_gate_other"])
def _scaled_kernel(
    w_ptr, gate_ptr, scaled_ptr, offsets_ptr, indices_ptr, extent, other_extent, stride_wn, stride_wk, stride_sn,
    stride_sk, stride_gate_line, stride_gate_other,
    SPAN: tl.constexpr, OTHER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The active blocks of a line times their gates, each at its place; nothing is written to the others."""
    line = tl.program_id(0)
    first = tl.load(offsets_ptr + line)
    depth = (tl.load(offsets_ptr + line + 1) - first) * OTHER
    for step in range(tl.program_id(1), tl.cdiv(depth, BLOCK_K), tl.num_programs(1)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        index = tl.load(indices_ptr + first + k // OTHER, k < depth, other=0).to(tl.int64)
        other = index * OTHER + k % OTHER
        if OTHER >= 8 and BLOCK_K % OTHER == 0:
            other = tl.max_contiguous(tl.multiple_of(other, OTHER), OTHER)
        inside_k = (k < depth) & (other < other_extent)
        gate = tl.load(gate_ptr + line.to(tl.int64) * stride_gate_line + index * stride_gate_other, inside_k, other=0.0)
        for start in range(0, SPAN, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            output = line.to(tl.int64) * SPAN + n
            inside = ((n < SPAN) & (output < extent))[:, None] & inside_k[None, :]
            w = tl.load(w_ptr + output[:, None] * stride_wn + other[None, :] * stride_wk, inside, other=0.0)
            scaled = (w.to(tl.float32) * gate[None, :]).to(scaled_ptr.dtype.element_ty)
            tl.store(scaled_ptr + output[:, None] * stride_sn + other[None, :] * stride_sk, scaled, inside)
