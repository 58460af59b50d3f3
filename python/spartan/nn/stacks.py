"""Weights that are several matrices [..., out, in], such as those of experts: masks are over each matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from spartan.distributed import Shard
from spartan.nn.kinds import is_convolution

__all__ = ["Stack", "stack_of"]


@dataclass(frozen=True)
class Stack:
    """How masks see a stack: as [count * rows, columns], which no block crosses where blocks divide the rows of each.

    Else as [rows, columns, *stack], where each place of the stack has blocks of its own, as each kernel position of a
    convolution has.

    Attributes:
        shape: of the weight. flat: whether it is the first.
    """

    shape: tuple[int, ...]
    flat: bool

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of each matrix, as stored."""
        return self.shape[-2], self.shape[-1]

    @property
    def turned_shape(self) -> torch.Size:
        """Shape of the whole weight as masks see it."""
        return self.turned(torch.empty(self.shape, device="meta")).shape

    def turned(self, values: torch.Tensor) -> torch.Tensor:
        """The weight, a part of it along its first dimension, or its blocks, as masks see them: a view."""
        return values.flatten(0, -2) if self.flat else values.movedim((-2, -1), (0, 1))

    def back(self, values: torch.Tensor) -> torch.Tensor:
        """The stack of matrices that `turned` made `values` of: a view; also of the whole weight's blocks."""
        return values.unflatten(0, (*self.shape[:-2], -1)) if self.flat else values.movedim((0, 1), (-2, -1))

    def spread(self, factors: torch.Tensor) -> torch.Tensor:
        """A factor for each matrix [..., 1, 1], in a shape that broadcasts over the weight as masks see it."""
        return self.turned(factors.expand(*self.shape[:-1], 1))

    def shard(self, shard: Shard) -> Shard:
        """A part of the weight as a part of what masks see.

        Raises:
            ValueError: a part of each matrix.
        """
        if not shard.cut:
            return shard
        if shard.dim:
            raise ValueError(f"a stack of matrices {self.shape} must be cut along its first dimension; got {shard.dim}")
        if not self.flat:
            return replace(shard, dim=2)
        rows = math.prod(self.shape[1:-1])
        start, length, size, most = (n * rows for n in (shard.start, shard.length, shard.size, shard.most))
        return replace(shard, start=start, length=length, size=size, most=most)


def stack_of(module: nn.Module, weight: torch.Tensor, rows: int) -> Stack | None:
    """How masks with blocks of `rows` see a weight of `module` that is a stack of matrices; None if it is one matrix.

    Weights of convolutions and bilinear layers are none.
    """
    if weight.dim() < 3 or isinstance(module, nn.Bilinear) or is_convolution(module):
        return None
    return Stack(tuple(weight.shape), weight.is_contiguous() and weight.shape[-2] % rows == 0)
