"""Convolution with a packed block-sparse weight, as products over windows of pixels (conv_windows)."""

from __future__ import annotations

import torch
from torch.nn import functional

from spartan_kernels.arguments import memory_format
from spartan_kernels.backends import extension
from spartan_kernels.backends.native.conv_products import (
    Lines,
    convolved,
    gradient_pixels,
    image_windows,
    input_gradient,
    sampled,
    spaced,
)
from spartan_kernels.backends.native.conv_windows import Geometry, geometry
from spartan_kernels.backends.shared import PackedNeeds
from spartan_kernels.operands import PackedConv, PackedConvBackward


def _across(o: PackedConv | PackedConvBackward) -> int:
    """Blocks of channels at each kernel position."""
    return -(-o.x.shape[1] // o.values.shape[2])


def _by_rows(o: PackedConv | PackedConvBackward, g: Geometry) -> Lines:
    """Rows of blocks, as they are stored, over windows of x."""
    across, columns = _across(o), o.layout[1].long()
    wide = spaced(g.phases * across, o.values.shape[2])
    places = [shift * wide + phase * across for shift, phase in zip(g.shift, g.phase, strict=True)]
    return Lines(o.layout[0], columns.new_tensor(places)[columns // across] + columns % across)


def _by_columns(o: PackedConvBackward, g: Geometry, wide: int) -> tuple[Lines, torch.Tensor]:
    """Columns of blocks, phase by phase, over windows of the gradient; and where each block is stored."""
    across, offsets = _across(o), o.layout[2].long()
    columns = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())
    position = columns // across
    line = position.new_tensor(g.phase)[position] * across + columns % across
    order = torch.argsort(line, stable=True)
    counts = torch.bincount(line, minlength=g.phases * across)
    at = (g.reach - position.new_tensor(g.shift)[position]) * wide + o.layout[3]
    return Lines(functional.pad(counts.cumsum(0), (1, 0)), at[order]), o.positions.long()[order]


def block_sparse_conv2d_forward(o: PackedConv) -> torch.Tensor:
    """Convolution of x with the weight that is given by its blocks, plus b."""
    g = geometry(o.x, o.kernel, o.stride, o.padding, o.dilation)
    shape = (g.images, o.out, g.height.out, g.width.out)
    if 0 in shape:
        return o.x.new_empty(shape)
    rows_of_x = image_windows(o.x, g, _across(o), o.values.shape[2])
    return convolved(o.x, rows_of_x, _by_rows(o, g), o.values.float(), o.out, o.bias, g)


def block_sparse_conv2d_backward(o: PackedConvBackward) -> list[torch.Tensor | None]:
    """Gradients of x, values and bias; None where not needed."""
    needs, g = PackedNeeds(*o.needs), geometry(o.x, o.kernel, o.stride, o.padding, o.dilation)
    dbias = o.grad.sum((0, 2, 3)) if needs.bias else None
    if 0 in (*o.grad.shape, *o.x.shape):
        zeros = torch.zeros_like(o.x, memory_format=memory_format(o.x)), torch.zeros_like(o.values)
        return [zeros[0] if needs.x else None, zeros[1] if needs.values else None, dbias]
    _, rows, columns = o.values.shape
    out = o.grad.shape[1]
    pixels = gradient_pixels(o.grad, g, -(-out // rows), rows)
    dx: torch.Tensor | None = None
    dvalues: torch.Tensor | None = None
    if needs.values:
        raw = extension.empty(o.values.shape, torch.float32)
        sampled(pixels, image_windows(o.x, g, _across(o), columns), _by_rows(o, g), raw, out, g)
        dvalues = raw.to(o.values.dtype)
    if needs.x:
        lines, stored = _by_columns(o, g, pixels.shape[1] // rows)
        blocks = o.values[stored].float().mT.contiguous()
        dx = input_gradient(o.x, pixels, lines, blocks, _across(o), g)
    return [dx, dvalues, dbias]
