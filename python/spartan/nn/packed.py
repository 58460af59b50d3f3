"""What layers on packed blocks of their weight have in common: parameters, index and state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spartan_kernels import BlockLayout, BlockSparseFilter, BlockSparseWeight, block_grid
from spartan_kernels.layout import INDEX

__all__ = ["PackedLayer"]


class PackedLayer(nn.Module, ABC):
    """A layer on the packed blocks of a matrix.

    Args:
        matrix: the packed matrix.
        bias: [outputs] or None.

    Attributes:
        values: parameter [blocks, rows, columns]. bias: parameter or None. The index of the blocks is in buffers.
        scales: of values in 8 bits, a buffer; else None. Such values are not trained.
    """

    scales: torch.Tensor | None

    def __init__(self, matrix: BlockSparseWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.matrix_shape, self.block_size = matrix.shape, matrix.block_size
        self.values = nn.Parameter(matrix.values.detach().clone(), requires_grad=matrix.scales is None)
        self.rounded_from = matrix.rounded_from
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        for name in INDEX:
            self.register_buffer(name, getattr(matrix.layout, name))
        self.register_buffer("positions", matrix.positions)
        self.register_buffer("scales", matrix.scales)

    def take_modes(self, layer: Any) -> None:
        """Follow a layer that this one replaces: its device, its mode and which of its parameters are trained."""
        packed = isinstance(layer, PackedLayer)
        self.to((layer.values if packed else layer.weight).device).train(layer.training)
        self.values.requires_grad_((layer.trained if packed else layer.weight.requires_grad) and self.scales is None)
        if self.bias is not None and layer.bias is not None:
            self.bias.requires_grad_(layer.bias.requires_grad)

    @property
    def trained(self) -> bool:
        """Whether the weight that this stands for is trained; values in 8 bits never are, so they do not say no."""
        return self.values.requires_grad or self.scales is not None

    @property
    def packed_names(self) -> tuple[str, ...]:
        """The names of the parameter and the buffers that make the weight."""
        return ("values", *INDEX, "positions", *(() if self.scales is None else ("scales",)))

    @property
    def matrix(self) -> BlockSparseWeight:
        """The packed matrix, whose values are the parameter itself."""
        shape, block = self.matrix_shape, self.block_size
        density = self.values.shape[0] / max(1, math.prod(block_grid(shape, block)))
        a, b, c, d, e = (self.get_buffer(name) for name in INDEX)
        layout, positions = BlockLayout(shape, block, a, b, c, d, e, density), self.get_buffer("positions")
        return BlockSparseWeight(self.values, layout, positions, self.scales, self.rounded_from)

    @property
    @abstractmethod
    def packed(self) -> BlockSparseWeight | BlockSparseFilter:
        """The weight, by outputs, whose values are the parameter itself."""

    @property
    def stored(self) -> BlockSparseWeight | BlockSparseFilter:
        """`packed`, as the layer that this stands for stores it."""
        return self.packed

    @abstractmethod
    def dense(self) -> nn.Module:
        """The layer that this stands for, with a dense weight."""

    def load_packed(self, packed: BlockSparseWeight) -> None:
        """Take over a matrix of the same shape, number, size and bits of blocks; the parameter stays the same object.

        Raises:
            ValueError: another shape, number or size of blocks, or in 8 bits where the layer is not, or otherwise.
        """
        if packed.shape != self.matrix_shape or packed.values.shape != self.values.shape:
            raise ValueError(
                f"packed must be {self.matrix_shape} in blocks of shape {tuple(self.values.shape)};"
                f" got {packed.shape} in {tuple(packed.values.shape)}"
            )
        if (packed.scales is None) != (self.scales is None):
            raise ValueError(f"packed must have values like those of {self.values.dtype}; got {packed.values.dtype}")
        parts = (packed.values.detach(), *packed.layout.tensors(), packed.positions, packed.scales)
        with torch.no_grad():
            for name, part in zip(self.packed_names, parts, strict=False):  # no scales, no name of them
                getattr(self, name).copy_(part)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move or cast all tensors; 8 bits and their scales keep their dtype, the new one is that of `to_dense`."""
        if self.scales is None:
            return super()._apply(fn, recurse)
        kept = {id(self.values), id(self.scales)}

        def applied(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            if id(tensor) not in kept or new.dtype == tensor.dtype:
                return new
            self.rounded_from = new.dtype
            return tensor.to(new.device)

        return super()._apply(applied, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load, and refuse an index that is not one: products would read past their tensors by it."""
        *_, error_msgs = rest
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if any(tensor.is_meta for tensor in self.state_dict().values()):
            return
        try:
            self.matrix.require_valid()
        except ValueError as error:
            error_msgs.append(f"{prefix or 'the packed layer'}: {error}")
