"""Convolution with a packed block-sparse weight by unpacking it."""

from __future__ import annotations

import torch
from torch.nn import functional

from spartan_kernels.arguments import memory_format
from spartan_kernels.backends.reference.block_sparse import rows_of, unpacked
from spartan_kernels.backends.shared import PackedNeeds
from spartan_kernels.operands import PackedConv, PackedConvBackward


def _weight(o: PackedConv | PackedConvBackward, out: int) -> torch.Tensor:
    """[out, in, height, width], zeros where no block is stored."""
    channels, columns = o.x.shape[1], o.values.shape[2]
    whole = channels + -channels % columns
    matrix = unpacked(o.values, o.layout, out, o.kernel[0] * o.kernel[1] * whole)
    return matrix.unflatten(1, (*o.kernel, whole))[..., :channels].permute(0, 3, 1, 2)


def block_sparse_conv2d_forward(o: PackedConv) -> torch.Tensor:
    """Convolution of x with the weight that is given by its blocks, plus b."""
    y = functional.conv2d(o.x, _weight(o, o.out), o.bias, o.stride, o.padding, o.dilation)
    return y.contiguous(memory_format=memory_format(o.x))


def block_sparse_conv2d_backward(o: PackedConvBackward) -> list[torch.Tensor | None]:
    """Gradients of x, values and bias; None where not needed. Values past the channels have none: zero."""
    out, needs = o.grad.shape[1], PackedNeeds(*o.needs)
    geometry = o.stride, o.padding, o.dilation, False, [0, 0], 1
    dx, dweight, dbias = torch.ops.aten.convolution_backward(o.grad, o.x, _weight(o, out), [out], *geometry, o.needs)
    of_values = None
    if needs.values:
        _, rows, columns = o.values.shape
        lines = functional.pad(dweight.permute(0, 2, 3, 1), (0, -o.x.shape[1] % columns)).flatten(1)
        lines = functional.pad(lines, (0, 0, 0, -out % rows))
        tiles = lines.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).movedim(2, 1)
        of_values = tiles[rows_of(o.layout), o.layout[1].long()].contiguous()
    dx = dx.contiguous(memory_format=memory_format(o.x)) if needs.x else None
    return [dx, of_values, dbias if needs.bias else None]
