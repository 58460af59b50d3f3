"""Kernels of the block-sparse convolutions: a product of pixels with the blocks of a line, each at a kernel position.

A line is a row of blocks for y, and a column of blocks for the gradient of x. Each of its entries is a block, and a
place in the source image: its first channel, and how far its pixels lie from those of a tile (`_place`). Then lines are
multiplied as in masked_matmul_kernels.py, with pixels for tokens; pixels outside of the image are zero.

The gradient of x is such a convolution of the gradient of y. With a stride, only some kernel positions reach a pixel:
pixels with the same remainders by the stride, a phase, have lines of their own, which hold the positions that do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spartan_kernels.backends.triton.primitives import dot


@triton.jit
def _quotient(at, divisor, magic, shift):
    """at // divisor of 0 <= at < 2^31 by a multiplication: in a loop, divisions would be most of the instructions."""
    high = tl.umulhi(at.to(tl.uint32), magic.to(tl.uint32)) >> shift.to(tl.uint32)
    return tl.where(divisor == 1, at, high.to(tl.int32))


@triton.jit
def _pixels(image, within, area, of_area, area_shift, columns, of_columns, columns_shift, BLOCK: tl.constexpr):
    """Image, row and column of BLOCK pixels in their order, from one of an image on."""
    within += tl.arange(0, BLOCK)
    images = _quotient(within, area, of_area, area_shift)
    within -= images * area
    row = _quotient(within, columns, of_columns, columns_shift)
    return image + images, row, within - row * columns


@triton.jit
def _within(at, size):
    """0 <= at < size in one comparison."""
    return at.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def _shift(phase, position, base, walk, jump):
    """How far the source of a pixel lies from where tiles count, along a side; it is whole where a phase has it."""
    return (phase + base + position * walk) // jump


@triton.jit
def _phase(position, base, walk, jump):
    """The phase that has a kernel position."""
    rest = (base + position * walk) % jump  # has the sign of what it is the remainder of
    return (jump - rest) % jump


@triton.jit
def _place(index, inner, POSITION_FIRST: tl.constexpr):
    """(block, kernel position) of an entry of a line; `inner` is the number of what lies side by side."""
    outer = index // inner
    if POSITION_FIRST:
        block, position = index % inner, outer
    else:
        block, position = outer, index % inner
    return block, position


@triton.jit(do_not_specialize=[
    "total", "grid_rows", "grid_columns", "positions", "kernel_columns", "base_h", "base_w", "walk_h", "walk_w",
    "jump_h", "jump_w",
])  # fmt: skip
def _conv_transposed_kernel(
    gate_ptr, mask_ptr, active_ptr, total, grid_rows, grid_columns, positions, kernel_columns, base_h, base_w,
    walk_h, walk_w, jump_h, jump_w, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The active blocks of an input gradient: [phase, column, row, position] of a gate [row, column, position]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    line, row, position = at // positions // grid_rows, at // positions % grid_rows, at % positions
    phase, column = line // grid_columns, line % grid_columns
    source = (row * grid_columns + column) * positions + position
    active = tl.load(gate_ptr + source, inside, other=0.0) != 0  # true for NaN
    if HAS_MASK:
        active = active & (tl.load(mask_ptr + source, inside, other=0) != 0)
    down = (phase // jump_w + base_h + position // kernel_columns * walk_h) % jump_h
    right = (phase % jump_w + base_w + position % kernel_columns * walk_w) % jump_w
    tl.store(active_ptr + at, (active & (down == 0) & (right == 0)).to(tl.uint8), inside)


@triton.jit(do_not_specialize=[
    "grid_rows", "grid_columns", "positions", "kernel_columns", "base_h", "base_w", "walk_h", "walk_w", "jump_h",
    "jump_w",
])  # fmt: skip
def _conv_stored_kernel(
    offsets_ptr, indices_ptr, stored_ptr, grid_rows, grid_columns, positions, kernel_columns, base_h, base_w, walk_h,
    walk_w, jump_h, jump_w, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of packed blocks, from a row of them: one more than where each is stored, at its place in the grid."""
    row = tl.program_id(0)
    last = tl.load(offsets_ptr + row + 1)
    for start in range(tl.load(offsets_ptr + row), last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        index = tl.load(indices_ptr + entry, entry < last, other=0)
        column, position = _place(index, grid_columns, True)
        down = _phase(position // kernel_columns, base_h, walk_h, jump_h)
        right = _phase(position % kernel_columns, base_w, walk_w, jump_w)
        line = (down * jump_w + right) * grid_columns + column
        at = (line.to(tl.int64) * grid_rows + row) * positions + position
        tl.store(stored_ptr + at, entry + 1, entry < last)


@triton.jit(do_not_specialize=[
    "tiles", "lines", "inner", "kernel_columns", "base_h", "base_w", "walk_h", "walk_w", "jump_h", "jump_w",
    "stride_gate_line", "stride_gate_other",
])  # fmt: skip
def _conv_blocks_kernel(
    w_ptr, gate_ptr, stored_ptr, blocks_ptr, places_ptr, offsets_ptr, indices_ptr,
    tiles, lines, extent, other_extent, inner, kernel_columns, base_h, base_w, walk_h, walk_w, jump_h, jump_w,
    stride_wn, stride_wk, stride_wh, stride_ww, stride_gate_line, stride_gate_other,
    SPAN: tl.constexpr, OTHER: tl.constexpr, POSITION_FIRST: tl.constexpr, SOURCE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Places of some entries of a line, and their blocks in the line's order, [SPAN, OTHER] each.

    SOURCE: a "weight", times its gates; "packed" blocks in another order, one more than where each lies in `stored`; or
    none, where they lie in this order already.
    """
    line, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = tl.load(offsets_ptr + line)
    depth = (tl.load(offsets_ptr + line + 1) - first) * OTHER
    if tile * BLOCK_K < depth:
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = k < depth
        entry, within = first.to(tl.int64) + k // OTHER, k % OTHER
        index = tl.load(indices_ptr + entry, inside, other=0)
        block, position = _place(index, inner, POSITION_FIRST)
        down, right, phase = position // kernel_columns, position % kernel_columns, line // lines
        place, starts = places_ptr + entry * 3, inside & (within == 0)
        tl.store(place, block * OTHER, starts)
        tl.store(place + 1, _shift(phase // jump_w, down, base_h, walk_h, jump_h), starts)
        tl.store(place + 2, _shift(phase % jump_w, right, base_w, walk_w, jump_w), starts)
        if SOURCE != "":
            column, other = line % lines, block.to(tl.int64) * OTHER + within
            if SOURCE == "weight":
                w_at = other * stride_wk + down.to(tl.int64) * stride_wh + right.to(tl.int64) * stride_ww
                w_at += column.to(tl.int64) * SPAN * stride_wn
                gate_at = column.to(tl.int64) * stride_gate_line + block.to(tl.int64) * stride_gate_other + position
                gate = tl.load(gate_ptr + gate_at, inside, other=0.0)
            else:
                stored = tl.load(stored_ptr + line.to(tl.int64) * stride_gate_line + index, inside, other=1)
                w_at = (stored - 1).to(tl.int64) * (SPAN * OTHER) + within * stride_wk
            for start in range(0, SPAN, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                output = column.to(tl.int64) * SPAN + n
                whole = (n < SPAN)[:, None] & inside[None, :]
                there = (output < extent)[:, None] & (other < other_extent)[None, :]
                at = (n.to(tl.int64) * stride_wn)[:, None] + w_at[None, :]
                w = tl.load(w_ptr + at, whole & there, other=0.0)
                if SOURCE == "weight":  # a gate that is NaN leaves the padding of its block zero
                    w = tl.where(there, w.to(tl.float32) * gate[None, :], 0.0)
                out = blocks_ptr + (entry * (SPAN * OTHER) + within)[None, :] + (n * OTHER)[:, None]
                tl.store(out, w.to(blocks_ptr.dtype.element_ty), whole)


@triton.jit(do_not_specialize=[
    "images", "area", "of_area", "area_shift", "columns", "of_columns", "columns_shift", "lines", "phase_lines",
    "group", "height", "width", "out_height", "out_width", "step_h", "step_w", "jump_h", "jump_w",
])  # fmt: skip
def _conv_product_kernel(
    image_ptr, blocks_ptr, places_ptr, bias_ptr, out_ptr, order_ptr, offsets_ptr,
    images, area, of_area, area_shift, columns, of_columns, columns_shift, lines, phase_lines, group,
    extent, other_extent, height, width, out_height, out_width,
    step_h, step_w, jump_h, jump_w, stride_n, stride_c, stride_h, stride_w, stride_yn, stride_yc, stride_yh, stride_yw,
    SPAN: tl.constexpr, OTHER: tl.constexpr, APART: tl.constexpr, APART_OUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pixels and up to BLOCK_N channels of one line; programs in the order of the product of matrices.

    A step reads BLOCK_M pixels of BLOCK_K channels and as many weights of each output: an element of the image serves
    BLOCK_N outputs, a weight BLOCK_M pixels. `area` and `columns` are those of the pixels of a phase.
    """
    tile = tl.program_id(0)
    pieces: tl.constexpr = (SPAN + BLOCK_N - 1) // BLOCK_N
    RUN: tl.constexpr = OTHER & -OTHER  # channels of a block that lie in one step, whatever the step
    first_tile = tile // (group * lines * pieces) * group
    tile = tile % (group * lines * pieces)
    tiles = tl.minimum(tl.cdiv(images.to(tl.int64) * area, BLOCK_M) - first_tile, group).to(tl.int32)
    pixel = (first_tile + tile % tiles).to(tl.int64) * BLOCK_M
    image, row, column = _pixels(
        (pixel // area).to(tl.int32), (pixel % area).to(tl.int32), area, of_area, area_shift, columns, of_columns,
        columns_shift, BLOCK_M,
    )  # fmt: skip
    line = tl.load(order_ptr + tile // tiles // pieces)
    phase, line_of_phase = line // phase_lines, line % phase_lines
    n = (tile // tiles) % pieces * BLOCK_N + tl.arange(0, BLOCK_N)
    output = line_of_phase.to(tl.int64) * SPAN + n
    inside_m, inside_n = image < images, (n < SPAN) & (output < extent)
    from_row, from_column = row * step_h, column * step_w
    at = image.to(tl.int64) * stride_n + from_row.to(tl.int64) * stride_h + from_column.to(tl.int64) * stride_w
    if APART:  # threads side by side read pixels, not channels; nothing is known of where a run of pixels begins
        at = tl.max_contiguous(at, BLOCK_M)

    first = tl.load(offsets_ptr + line)
    depth = (tl.load(offsets_ptr + line + 1) - first) * OTHER
    blocks_ptr += first.to(tl.int64) * (SPAN * OTHER)
    places_ptr += first.to(tl.int64) * 3
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(depth, BLOCK_K)):
        if OTHER % BLOCK_K == 0:  # the tile lies in one block
            entry = (step * BLOCK_K) // OTHER
            within = tl.multiple_of((step * BLOCK_K) % OTHER, BLOCK_K) + tl.arange(0, BLOCK_K)
            place = places_ptr + entry * 3
            other = tl.multiple_of(tl.load(place), BLOCK_K) + within
            down, right = tl.load(place + 1), tl.load(place + 2)
            inside_k = other < other_extent
            there = inside_m & _within(from_row + down, height) & _within(from_column + right, width)
            inside = there[:, None] & inside_k[None, :]
            x_at = at + (down.to(tl.int64) * stride_h + right.to(tl.int64) * stride_w)
            x_at = x_at[:, None] + (other.to(tl.int64) * stride_c)[None, :]
        else:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            entry, within = k // OTHER, k % OTHER
            place = places_ptr + entry * 3
            other = tl.load(place, k < depth, other=0) + within
            down, right = tl.load(place + 1, k < depth, other=0), tl.load(place + 2, k < depth, other=0)
            other = tl.max_contiguous(tl.multiple_of(other, RUN), RUN)
            inside_k = (k < depth) & (other < other_extent)
            there = _within(from_row[:, None] + down[None, :], height)
            there = there & _within(from_column[:, None] + right[None, :], width)
            inside = there & inside_m[:, None] & inside_k[None, :]
            shift = down.to(tl.int64) * stride_h + right.to(tl.int64) * stride_w
            x_at = at[:, None] + (other.to(tl.int64) * stride_c + shift)[None, :]
        x = tl.load(image_ptr + x_at, inside, other=0.0)
        w_at = (entry.to(tl.int64) * (SPAN * OTHER) + within)[:, None] + (n * OTHER)[None, :]
        w = tl.load(blocks_ptr + w_at, inside_k[:, None] & inside_n[None, :], other=0.0)
        sums = dot(x, w, sums, PRECISION)

    if HAS_BIAS:
        sums += tl.load(bias_ptr + output, inside_n, other=0.0).to(tl.float32)[None, :]
    to_row, to_column = phase // jump_w + row * jump_h, phase % jump_w + column * jump_w
    inside_m = inside_m & (to_row < out_height) & (to_column < out_width)
    y_at = image.to(tl.int64) * stride_yn + to_row.to(tl.int64) * stride_yh + to_column.to(tl.int64) * stride_yw
    if APART_OUT:
        y_at = tl.max_contiguous(y_at, BLOCK_M)
    y_at = y_at[:, None] + (output * stride_yc)[None, :]
    tl.store(out_ptr + y_at, sums.to(out_ptr.dtype.element_ty), inside_m[:, None] & inside_n[None, :])


@triton.jit(do_not_specialize=[
    "images", "area", "of_area", "area_shift", "columns", "of_columns", "columns_shift", "lines", "tiles",
    "height", "width", "inner", "kernel_columns", "step_h", "step_w", "base_h", "base_w", "walk_h", "walk_w",
    "stride_part",
])  # fmt: skip
def _conv_sampled_kernel(
    dz_ptr, x_ptr, parts_ptr, order_ptr, offsets_ptr, indices_ptr,
    images, area, of_area, area_shift, columns, of_columns, columns_shift, lines, tiles,
    extent, other_extent, height, width, inner, kernel_columns,
    step_h, step_w, base_h, base_w, walk_h, walk_w, stride_part,
    stride_zn, stride_zc, stride_zh, stride_zw, stride_n, stride_c, stride_h, stride_w,
    SPAN: tl.constexpr, OTHER: tl.constexpr, POSITION_FIRST: tl.constexpr, APART_Z: tl.constexpr, APART: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A part of the sum over pixels of x dz, for BLOCK_M of the channels of a line, side by side by entries.

    A step reads BLOCK_K pixels of both: an element of x serves BLOCK_N outputs, one of dz BLOCK_M channels.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    pieces: tl.constexpr = (SPAN + BLOCK_N - 1) // BLOCK_N
    line = tl.load(order_ptr + tile // (tiles * pieces))
    first = tl.load(offsets_ptr + line)
    depth = (tl.load(offsets_ptr + line + 1) - first) * OTHER
    m = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // tiles % pieces * BLOCK_N + tl.arange(0, BLOCK_N)
    if tile % tiles * BLOCK_M < depth:
        output = line.to(tl.int64) * SPAN + n
        entry, within = first.to(tl.int64) + m // OTHER, m % OTHER
        index = tl.load(indices_ptr + entry, m < depth, other=0)
        block, position = _place(index, inner, POSITION_FIRST)
        other = block * OTHER + within
        RUN: tl.constexpr = OTHER & -OTHER
        SHARED: tl.constexpr = RUN if RUN < BLOCK_M else BLOCK_M
        other = tl.max_contiguous(tl.multiple_of(other, SHARED), SHARED)
        down = _shift(0, position // kernel_columns, base_h, walk_h, 1)
        right = _shift(0, position % kernel_columns, base_w, walk_w, 1)
        inside_m, inside_n = (m < depth) & (other < other_extent), (n < SPAN) & (output < extent)
        of_entry = other.to(tl.int64) * stride_c + down.to(tl.int64) * stride_h + right.to(tl.int64) * stride_w

        steps = tl.cdiv(tl.cdiv(images.to(tl.int64) * area, BLOCK_K), SPLIT)
        pixel = part * steps * BLOCK_K
        from_image, within_image = (pixel // area).to(tl.int32), (pixel % area).to(tl.int32)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for _ in range(0, steps.to(tl.int32)):
            image, row, column = _pixels(
                from_image, within_image, area, of_area, area_shift, columns, of_columns, columns_shift, BLOCK_K
            )
            inside_k = image < images
            from_row, from_column = row * step_h, column * step_w
            at = image.to(tl.int64) * stride_n + from_row.to(tl.int64) * stride_h
            at += from_column.to(tl.int64) * stride_w
            z_at = image.to(tl.int64) * stride_zn + row.to(tl.int64) * stride_zh + column.to(tl.int64) * stride_zw
            if APART:
                at = tl.max_contiguous(at, BLOCK_K)
            if APART_Z:
                z_at = tl.max_contiguous(z_at, BLOCK_K)
            there = _within(down[:, None] + from_row[None, :], height)
            there = there & _within(right[:, None] + from_column[None, :], width)
            there = there & inside_m[:, None] & inside_k[None, :]
            x = tl.load(x_ptr + of_entry[:, None] + at[None, :], there, other=0.0)
            z_at = z_at[:, None] + (output * stride_zc)[None, :]
            dz = tl.load(dz_ptr + z_at, inside_k[:, None] & inside_n[None, :], other=0.0)
            sums = dot(x, dz, sums, PRECISION)
            within_image += BLOCK_K
            images_passed = _quotient(within_image, area, of_area, area_shift)
            from_image += images_passed
            within_image -= images_passed * area
        out = parts_ptr + part.to(tl.int64) * stride_part + (entry * (SPAN * OTHER) + within)[:, None]
        tl.store(out + (n * OTHER)[None, :], sums, (m < depth)[:, None] & (n < SPAN)[None, :])


@triton.jit(do_not_specialize=["slots", "positions", "kernel_columns", "stride_part"])
def _conv_gradients_kernel(
    parts_ptr, theta_ptr, gate_ptr, out_ptr, grad_gate_ptr, offsets_ptr, indices_ptr,
    slots, extent, other_extent, positions, kernel_columns, stride_part, stride_wn, stride_wk, stride_wh, stride_ww,
    SPAN: tl.constexpr, OTHER: tl.constexpr, WEIGHT_GRAD: tl.constexpr, GATE_GRAD: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The parts of one active block, added in their order: times its gate, and its product with theta."""
    i, slot = tl.program_id(0) // slots, tl.program_id(0) % slots
    entry = tl.load(offsets_ptr + i) + slot
    if entry < tl.load(offsets_ptr + i + 1):
        index = tl.load(indices_ptr + entry)
        block, position = _place(index, positions, False)
        b = i.to(tl.int64) * slots + index
        gate = tl.load(gate_ptr + b)
        down, right = position // kernel_columns, position % kernel_columns
        theta_ptr += down.to(tl.int64) * stride_wh + right.to(tl.int64) * stride_ww
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for r0 in range(0, SPAN, BLOCK_R):
            for c0 in range(0, OTHER, BLOCK_C):
                r, c = r0 + tl.arange(0, BLOCK_R)[:, None], c0 + tl.arange(0, BLOCK_C)[None, :]
                row, column = i.to(tl.int64) * SPAN + r, block.to(tl.int64) * OTHER + c
                inside = (r < SPAN) & (c < OTHER) & (row < extent) & (column < other_extent)
                at = entry.to(tl.int64) * (SPAN * OTHER) + r * OTHER + c
                raw = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
                for part in range(SPLIT):
                    raw += tl.load(parts_ptr + part * stride_part + at, inside, other=0.0)
                if GATE_GRAD:
                    theta = tl.load(theta_ptr + row * stride_wn + column * stride_wk, inside, other=0.0)
                    total += raw * theta.to(tl.float32)
                if WEIGHT_GRAD:
                    out = out_ptr + (row * other_extent + column) * positions + position
                    tl.store(out, (raw * gate).to(out_ptr.dtype.element_ty), inside)
        if GATE_GRAD:
            tl.store(grad_gate_ptr + b, tl.sum(tl.sum(total, 1), 0))
