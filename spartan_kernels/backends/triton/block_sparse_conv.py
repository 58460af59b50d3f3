"""Convolution with a packed block-sparse weight on Triton, by the kernels of the masked one."""

from __future__ import annotations

import torch

from spartan_kernels.arguments import memory_format, output_size
from spartan_kernels.backends.shared import PackedNeeds
from spartan_kernels.backends.triton import masked_conv_kernels as kernels
from spartan_kernels.backends.triton.block_layout import row_layout
from spartan_kernels.backends.triton.conv_lines import (
    STORED_BLOCK,
    Lines,
    Walk,
    convolved,
    placed,
    reordered,
    sampled_parts,
)
from spartan_kernels.backends.triton.launches import Launch, start
from spartan_kernels.operands import PackedConv, PackedConvBackward


def block_sparse_conv2d_forward(o: PackedConv) -> torch.Tensor:
    """Convolution of x with the weight that is given by its blocks, plus b."""
    shape = output_size(o.x.shape, (o.out, 0, *o.kernel), o.stride, o.padding, o.dilation)
    y = torch.empty(shape, dtype=o.x.dtype, device=o.x.device, memory_format=memory_format(o.x))
    if y.numel() == 0:
        return y
    lines, walk, values = _by_rows(o, o.out), Walk.of_output(o, o.kernel), o.values.contiguous()
    return convolved(o.x, lines, walk, values, placed(lines, walk, values), o.bias, y)


def block_sparse_conv2d_backward(o: PackedConvBackward) -> list[torch.Tensor | None]:
    """Gradients of x, values and bias; None where not needed. Values past the channels have none: zero."""
    needs = PackedNeeds(*o.needs)
    dvalues = None
    if needs.values and o.grad.numel():
        lines, walk = _by_rows(o, o.grad.shape[1]), Walk.of_output(o, o.kernel)
        dvalues = sampled_parts(o.grad, o.x, lines, walk, o.values.shape[0]).sum(0).to(o.values.dtype)
    elif needs.values:
        dvalues = torch.zeros_like(o.values)
    dx = _input_gradient(o) if needs.x else None
    return [dx, dvalues, o.grad.sum((0, 2, 3)) if needs.bias else None]


def _by_rows(o: PackedConv | PackedConvBackward, out: int) -> Lines:
    """Rows of blocks, in the order in which these are stored."""
    offsets, indices, _, _, order = o.layout
    _, rows, columns = o.values.shape
    return Lines(offsets, indices, order, rows, columns, out, o.x.shape[1], True)


def _input_gradient(o: PackedConvBackward) -> torch.Tensor:
    """dx: lines are columns of blocks, phase by phase."""
    dx = torch.empty(o.x.shape, dtype=o.x.dtype, device=o.x.device, memory_format=memory_format(o.x))
    if dx.numel() == 0:
        return dx
    walk, by_rows = Walk.of_input(o, o.kernel), _by_rows(o, o.grad.shape[1])
    grid_rows, grid_columns = by_rows.of_phase, by_rows.blocks
    stored = torch.zeros((walk.phases * grid_columns, grid_rows * walk.positions), dtype=torch.int32, device=dx.device)
    if grid_rows:
        sizes = grid_rows, grid_columns, walk.positions, walk.kernel[1], *walk.shifts
        arguments = by_rows.offsets, by_rows.indices, stored, *sizes
        start(Launch(kernels._conv_stored_kernel, grid_rows, arguments, {"BLOCK": STORED_BLOCK, "num_warps": 4}))
    lines = Lines(*row_layout(stored, None), by_rows.other, by_rows.span, by_rows.other_extent, by_rows.extent, False)
    return convolved(o.grad, lines, walk, *reordered(lines, walk, o.values.contiguous(), stored), None, dx)
