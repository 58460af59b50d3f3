"""Kernels of a product whose small blocks share a tile of x: lines of blocks are multiplied together.

A program takes all outputs of LINES neighbouring lines and walks the blocks that are active in any of them. A tile of
x then comes from the L2 cache once for all of these lines; the weights of those that are not active are zeros of which
nothing is read. Weights have been multiplied by their gates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.masked_matmul_kernels import activated
from spartan_kernels.backends.triton.primitives import dot


@triton.jit(do_not_specialize=["lines", "grid_other", "trips"])
def _union_kernel(
    offsets_ptr, indices_ptr, united_ptr, lines, grid_other, trips,
    LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The blocks that are active in any of LINES lines, in their order: index << LINES, and a bit for each line.

    Their number stands before them.
    `trips` halvings find a block in the indices of a line, which increase.
    """
    group = tl.program_id(0)
    united_ptr += group.to(tl.int64) * (grid_other + 1)
    member = tl.arange(0, LINES)[:, None]
    line = group * LINES + member
    begin = tl.load(offsets_ptr + line, line < lines, other=0)
    end = tl.load(offsets_ptr + line + 1, line < lines, other=0)
    count = 0
    for start in range(0, grid_other, BLOCK):
        at = start + tl.arange(0, BLOCK)
        low, high = begin + tl.zeros((LINES, BLOCK), tl.int32), end + tl.zeros((LINES, BLOCK), tl.int32)
        for _ in range(trips):
            middle, searching = (low + high) // 2, low < high
            before = tl.load(indices_ptr + middle, searching, other=0) < at[None, :]
            low = tl.where(searching & before, middle + 1, low)
            high = tl.where(searching & (before == 0), middle, high)
        found = tl.load(indices_ptr + low, low < end, other=-1) == at[None, :]
        bits = tl.sum(found.to(tl.int32) << member, 0)
        active = (bits != 0).to(tl.int32)
        place = count + tl.cumsum(active, 0) - active
        tl.store(united_ptr + 1 + place, (at << LINES) + bits, bits != 0)
        count += tl.sum(active)
    tl.store(united_ptr, count)


@triton.jit(do_not_specialize=["tokens", "groups", "group", "grid_other"])
def _united_product_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, saved_ptr, united_ptr,
    tokens, groups, group, grid_other, extent, other_extent, stride_x, stride_wn, stride_wk,
    SPAN: tl.constexpr, OTHER: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act(x w^T + b) for BLOCK_M tokens and all outputs of LINES lines, in the order of `_product_kernel`."""
    LINES: tl.constexpr = BLOCK_N // SPAN
    PER_STEP: tl.constexpr = BLOCK_K // OTHER
    tile = tl.program_id(0)
    first_tile = tile // (group * groups) * group
    tile = tile % (group * groups)
    tiles = tl.minimum(tl.cdiv(tokens, BLOCK_M) - first_tile, group)
    token = ((first_tile + tile % tiles) * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    lines = (tile // tiles).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    output = lines * BLOCK_N + n
    inside_m, inside_n = token < tokens, output < extent
    united_ptr += lines * (grid_other + 1)
    count = tl.load(united_ptr)
    block = tl.arange(0, BLOCK_K) // OTHER
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, count, PER_STEP):
        united = tl.zeros((BLOCK_K,), tl.int32)
        for j in tl.static_range(PER_STEP):  # once for a block: see `_blocks_of_step`
            united = tl.where(block == j, tl.load(united_ptr + 1 + start + j, start + j < count, other=0), united)
        other = (united >> LINES).to(tl.int64) * OTHER + tl.arange(0, BLOCK_K) % OTHER
        other = tl.max_contiguous(tl.multiple_of(other, OTHER), OTHER)
        inside_k = (united != 0) & (other < other_extent)
        x = tl.load(
            x_ptr + token[:, None] * stride_x + other[None, :], inside_m[:, None] & inside_k[None, :], other=0.0
        )
        active = ((united[:, None] >> (n // SPAN)[None, :]) & 1) != 0
        w_at = (other * stride_wk)[:, None] + output[None, :] * stride_wn
        w = tl.load(w_ptr + w_at, active & inside_k[:, None] & inside_n[None, :], other=0.0)
        sums = dot(x, w, sums, PRECISION)
    at = token[:, None] * extent + output[None, :]
    inside = inside_m[:, None] & inside_n[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + output, inside_n, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        tl.store(saved_ptr + at, sums.to(saved_ptr.dtype.element_ty), inside)
    tl.store(y_ptr + at, activated(sums, ACTIVATION).to(y_ptr.dtype.element_ty), inside)
