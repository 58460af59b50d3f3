"""A weight as pruning sees it: its blocks and what they cost, and its matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spartan.budgets import BlockCosts
from spartan.distributed import is_dtensor
from spartan.nn.kinds import CONVOLUTIONS
from spartan.nn.selection import Candidate
from spartan_kernels import block_costs, block_grid

__all__ = ["Layer", "require_plain", "require_whole_columns", "wide"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights and statistics of `dtype` are computed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Layer:
    """A weight to prune, with the settings of its part of the model.

    Scores and masks are in the grid of its blocks [rows of blocks, columns of blocks, *kernel]; `values` has shape
    [out, in, *kernel]. Linear algebra takes it as `matrices` [groups, rows, columns], of which each multiplies inputs
    of its own. Groups of a convolution share the columns and have outputs of their own: [groups, out / groups,
    kernel * in / groups], where `values` is [out, in / groups, *kernel]. Those of a transposed one share the rows and
    have inputs of their own, as its weight does: `values` is [out / groups, in, *kernel], in strips of columns.

    Attributes:
        grid: shape of scores and masks. groups: number of matrices.
        strips: how many of these lie side by side in the columns of `values`; 1 where they lie below each other.

    Args:
        candidate: the weight.
        block_size: (rows, columns) of [out, in].
        pattern: (n, m) or None.
        costs: of its blocks in the weight's own dimensions; None: each weight costs 1.
    """

    def __init__(
        self,
        candidate: Candidate,
        block_size: tuple[int, int],
        pattern: tuple[int, int] | None = None,
        costs: BlockCosts | None = None,
    ) -> None:
        self.candidate, self.block_size, self.pattern = candidate, block_size, pattern
        self._stack = candidate.stack(block_size)
        self.shape = self.values().shape
        self.grid = block_grid(self.shape, block_size)
        device = candidate.weight.device
        own = block_costs(self.shape, block_size, device) if costs is None else costs.blocks
        if isinstance(own, torch.Tensor) and costs is not None:
            own = self.oriented(own).to(device)
        self.costs = own
        module = candidate.uses[0].module
        self.groups = int(module.groups) if isinstance(module, CONVOLUTIONS) else 1
        self.strips = self.groups if candidate.transposed else 1

    @property
    def name(self) -> str:
        """Of the weight in the model."""
        return self.candidate.name

    @property
    def capacity(self) -> float:
        """Cost of all its blocks."""
        if isinstance(self.costs, torch.Tensor):
            return float(self.costs.double().sum())
        return self.costs * math.prod(self.grid)

    def values(self) -> torch.Tensor:
        """The weight as [out, in, *kernel], a view without a graph."""
        return self.oriented(self.candidate.weight.detach())

    def write(self, values: torch.Tensor) -> None:
        """Make these [out, in, *kernel] the weight's values, at once."""
        with torch.no_grad():
            self.values().copy_(values)

    def in_strips(self, values: torch.Tensor) -> torch.Tensor:
        """Of values [out, in, *kernel], or of their blocks, the strips [strips, out, kernel * in / strips]."""
        return values.unflatten(1, (self.strips, -1)).movedim(1, 0).movedim(2, -1).flatten(2)

    def from_strips(self, strips: torch.Tensor) -> torch.Tensor:
        """The inverse of `in_strips`."""
        return strips.unflatten(-1, (*self.shape[2:], -1)).movedim(-1, 2).movedim(0, 1).flatten(1, 2)

    def matrices(self, values: torch.Tensor) -> torch.Tensor:
        """Of values [out, in, *kernel] the matrices [groups, rows, columns], columns by kernel position and input."""
        strips = self.in_strips(values)
        return strips.reshape(self.groups, -1, strips.shape[-1])

    def from_matrices(self, matrices: torch.Tensor) -> torch.Tensor:
        """The inverse of `matrices`."""
        return self.from_strips(matrices.reshape(self.strips, self.shape[0], -1))

    def expand(self, grid: torch.Tensor) -> torch.Tensor:
        """The value of each weight's block, [out, in, *kernel]."""
        rows, columns = self.block_size
        if (rows, columns) == (1, 1):
            return grid
        tall = grid.repeat_interleave(rows, 0)[: self.shape[0]]
        return tall.repeat_interleave(columns, 1)[:, : self.shape[1]]

    def zeros(self) -> int:
        """Number of zeros in the weight."""
        return self.candidate.weight.numel() - int(self.candidate.weight.count_nonzero())

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape or its blocks', in the dimensions [out, in, *kernel]: a view."""
        if self._stack is not None:
            tensor = self._stack.turned(tensor)
        return tensor.transpose(0, 1) if self.candidate.transposed else tensor


def require_plain(layers: Sequence[Layer]) -> None:
    """Raise ValueError at a weight that is sharded, or not finite."""
    for layer in layers:
        weight = layer.candidate.weight
        if is_dtensor(weight):
            raise ValueError(f"weight {layer.name!r} is sharded; prune the model before it is")
        bad = weight.numel() - int(weight.isfinite().count_nonzero())
        if bad:
            raise ValueError(f"weight {layer.name!r} must be finite; {bad} of its entries are NaN or infinite")


def require_whole_columns(layer: Layer) -> None:
    """Raise ValueError where a block of columns, or a pattern, goes over from one group of inputs to the next."""
    width = layer.block_size[1] if layer.pattern is None else layer.pattern[1]
    inputs = layer.shape[1] // layer.strips
    if layer.strips > 1 and inputs % width:
        what = f"block_size {layer.block_size}" if layer.pattern is None else f"pattern {layer.pattern}"
        raise ValueError(
            f"{what} must have a number of columns that divides the {inputs} inputs of each group of {layer.name!r}, a"
            " transposed convolution"
        )
