"""The weight of a 2-d convolution that stores its active blocks alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from spartan_kernels.arguments import block_grid, clip_block, require_float
from spartan_kernels.block_sparse import BlockSparseWeight

__all__ = ["BlockSparseFilter"]


@dataclass(frozen=True, eq=False)
class BlockSparseFilter:
    """The weight of a convolution in packed blocks of channels, of which each kernel position has its own.

    It is kept as a matrix [out, kernel positions * in'], whose rows hold the channels of one kernel position after
    another, each padded by zeros to in', a multiple of the blocks' columns.

    Attributes:
        matrix: the packed matrix. channels: in. kernel_size: (height, width).
    """

    matrix: BlockSparseWeight
    channels: int
    kernel_size: tuple[int, int]

    def __post_init__(self) -> None:
        """Refuse a matrix that is not of this many channels and kernel positions, or in 8 bits.

        Raises:
            ValueError: such a matrix.
        """
        if self.matrix.scales is not None:
            raise ValueError(
                "matrix must have values of 16 bits or more: convolutions have no product in 8 bits (float8)"
            )
        height, width = self.kernel_size
        columns = height * width * self._across * self.block_size[1]
        if min(height, width) < 1 or self.matrix.shape[1] != columns:
            raise ValueError(
                f"matrix must have {columns} columns for {self.channels} channels in blocks of {self.block_size[1]} and"
                f" a kernel of {self.kernel_size}; got {self.matrix.shape}"
            )

    @property
    def _across(self) -> int:
        """Blocks of channels at each kernel position."""
        return -(-self.channels // self.block_size[1])

    @property
    def values(self) -> torch.Tensor:
        """The blocks [n, rows, columns], by rows, then kernel positions, then columns of blocks."""
        return self.matrix.values

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight."""
        return self.matrix.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(out, in, kernel height, kernel width)."""
        return (self.matrix.shape[0], self.channels, *self.kernel_size)

    @property
    def block_size(self) -> tuple[int, int]:
        """(rows, columns), of out and in channels."""
        return self.matrix.block_size

    @property
    def density(self) -> float:
        """Stored blocks / blocks."""
        return self.matrix.density

    @staticmethod
    def from_dense(
        weight: torch.Tensor, block_size: int | tuple[int, int], mask: torch.Tensor | None = None
    ) -> BlockSparseFilter:
        """The blocks of `weight` [out, in, height, width] where `mask` is set, or that hold anything but zeros.

        `mask` is bool, [ceil(out / rows), ceil(in / columns), height, width]. A block that is larger than the weight is
        stored as large as the weight.

        Raises:
            TypeError: an integer weight, a mask that is not bool. ValueError: shapes that do not match.
        """
        require_float("weight", weight)
        if weight.dim() != 4 or 0 in weight.shape[1:]:
            raise ValueError(f"weight must be [out, in, height, width]; got {tuple(weight.shape)}")
        rows, columns = clip_block(block_size, weight.shape)
        channels, *kernel = weight.shape[1:]
        if mask is not None:
            grid = (*block_grid(weight.shape[:2], (rows, columns)), *kernel)
            if isinstance(mask, torch.Tensor) and tuple(mask.shape) != grid:
                raise ValueError(f"mask must have shape {grid}, one entry per block; got {tuple(mask.shape)}")
            mask = mask.permute(0, 2, 3, 1).flatten(1)
        lines = functional.pad(weight.permute(0, 2, 3, 1), (0, -channels % columns)).flatten(1)
        packed = BlockSparseWeight.from_dense(lines, (rows, columns), mask)
        return BlockSparseFilter(packed, channels, (kernel[0], kernel[1]))

    def to_dense(self) -> torch.Tensor:
        """The weight [out, in, height, width], zeros where no block is stored."""
        lines = self.matrix.to_dense().unflatten(1, (*self.kernel_size, self._across * self.block_size[1]))
        return lines[..., : self.channels].permute(0, 3, 1, 2).contiguous()

    def mask(self) -> torch.Tensor:
        """bool [ceil(out / rows), ceil(in / columns), height, width]: True at the stored blocks."""
        return self.matrix.layout.mask().unflatten(1, (*self.kernel_size, self._across)).permute(0, 3, 1, 2)
