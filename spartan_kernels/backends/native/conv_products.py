"""The products of convolutions by blocks: matrices of blocks over windows of pixels (conv_windows)."""

from __future__ import annotations

import torch

from spartan_kernels.arguments import memory_format
from spartan_kernels.backends.native.block_matrix import BlockMatrix
from spartan_kernels.backends.native.conv_windows import (
    Geometry,
    image_of,
    result_memory,
    tokens_of_grad,
    tokens_of_input,
    windows,
)

__all__ = ["Lines", "convolved", "gradient_pixels", "image_windows", "input_gradient", "sampled", "spaced"]

_PAGE_FLOATS = 512  # rows this far apart fall into the same few places of the cache


class Lines:
    """Lines of blocks over windows: how many blocks lie before each line, and the column of each block.

    Attributes:
        offsets: int32 [lines + 1]. at: int32 [blocks], in columns of blocks over windows.
    """

    def __init__(self, offsets: torch.Tensor, at: torch.Tensor) -> None:
        self.offsets, self.at = offsets.to(torch.int32), at.to(torch.int32)

    def matrix(self, blocks: torch.Tensor, shape: tuple[int, int]) -> BlockMatrix:
        """The matrix of this shape that has these blocks; its index by columns is empty: only dx would read it."""
        size = (blocks.shape[1], blocks.shape[2])
        no_columns = self.at.new_zeros(shape[1] // size[1] + 1)
        none = torch.zeros_like(self.at)
        return BlockMatrix(blocks, shape, size, [self.offsets, self.at, no_columns, none, none], positions=none)


def spaced(blocks: int, size: int) -> int:
    """Blocks of `size` channels from one pixel to the next."""
    return blocks + (blocks * size % _PAGE_FLOATS == 0)


def image_windows(x: torch.Tensor, g: Geometry, across: int, columns: int) -> torch.Tensor:
    """The windows of x, whose channels are `across` blocks of `columns`."""
    flat = tokens_of_input(x, g, across * columns, spaced(g.phases * across, columns) * columns)
    return windows(flat, g.tokens, g.reach + 1)


def gradient_pixels(grad: torch.Tensor, g: Geometry, down: int, rows: int) -> torch.Tensor:
    """The pixels of the upstream gradient, whose channels are `down` blocks of `rows`."""
    return tokens_of_grad(grad, g, spaced(down, rows) * rows)


def convolved(
    x: torch.Tensor,
    rows_of_x: torch.Tensor,
    lines: Lines,
    blocks: torch.Tensor,
    out: int,
    bias: torch.Tensor | None,
    g: Geometry,
) -> torch.Tensor:
    """Blocks in float32 over the windows of x, plus the bias, as an image."""
    y = result_memory(x, g, g.tokens, out)
    matrix = lines.matrix(blocks, (out, rows_of_x.shape[1]))
    matrix.forward(rows_of_x, None if bias is None else bias.float(), "", False, y)
    strides = (g.height.pitch * g.width.pitch * out, g.width.pitch * out, out, 1)
    return image_of(y.as_strided((g.images, g.height.out, g.width.out, out), strides), x, g)


def sampled(
    pixels: torch.Tensor, rows_of_x: torch.Tensor, lines: Lines, raw: torch.Tensor, out: int, g: Geometry
) -> None:
    """raw = the products of the upstream gradient and the windows of x at these blocks, in float32."""
    matrix = lines.matrix(raw, (out, rows_of_x.shape[1]))
    matrix.sampled(pixels[g.reach : g.reach + g.tokens], rows_of_x, raw, None)


def input_gradient(
    x: torch.Tensor, pixels: torch.Tensor, lines: Lines, blocks: torch.Tensor, across: int, g: Geometry
) -> torch.Tensor:
    """dx: transposed blocks over the upstream gradient; its outputs are the channels of x, phase by phase."""
    rows_of_grad = windows(pixels, g.pixels, g.reach + 1)
    width = across * blocks.shape[1]
    tokens = result_memory(x, g, g.pixels, g.phases * width)
    lines.matrix(blocks, (g.phases * width, rows_of_grad.shape[1])).forward(rows_of_grad, None, "", False, tokens)
    images, parts = g.lines(tokens), g.parts(x.shape[1], width)
    if len(parts) == 1 and x.permute(0, 2, 3, 1)[parts[0][1]].shape == x.permute(0, 2, 3, 1).shape:
        return image_of(images[parts[0][0]], x, g)
    dx = torch.zeros_like(x, memory_format=memory_format(x))  # a stride may leave pixels out
    image = dx.permute(0, 2, 3, 1)
    for place, origin in parts:
        image[origin].copy_(images[place])
    return dx
