"""A linear layer on the packed blocks of its weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spartan.functional import block_sparse_linear
from spartan_kernels import BlockLayout, BlockSparseWeight, block_grid
from spartan_kernels.layout import INDEX

__all__ = ["BlockSparseLinear"]


class BlockSparseLinear(nn.Module):
    """`nn.Linear` on the packed blocks of its weight: for inference, or to train the kept blocks alone.

    Args:
        packed: the weight.
        bias: [out_features] or None.
        plain: the class of the layer that it stands for: `nn.Linear`, or transformers' `Conv1D`.

    Attributes:
        values: parameter [blocks, rows, columns]. bias: parameter or None. The index of the blocks is in buffers.
    """

    def __init__(
        self, packed: BlockSparseWeight, bias: torch.Tensor | None = None, *, plain: type[nn.Module] = nn.Linear
    ) -> None:
        super().__init__()
        self.plain = plain
        self.out_features, self.in_features = packed.shape
        self.block_size = packed.block_size
        self.values = nn.Parameter(packed.values.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        for name in INDEX:
            self.register_buffer(name, getattr(packed.layout, name))
        self.register_buffer("positions", packed.positions)

    @staticmethod
    def replacing(layer: Any, packed: BlockSparseWeight) -> BlockSparseLinear:
        """What stands for a linear `layer`, packed or not, with this weight and its bias, device and modes."""
        values = layer.values if isinstance(layer, BlockSparseLinear) else layer.weight
        plain = layer.plain if isinstance(layer, BlockSparseLinear) else type(layer)
        new = BlockSparseLinear(packed, layer.bias, plain=plain).to(values.device).train(layer.training)
        new.values.requires_grad_(values.requires_grad)
        if new.bias is not None and layer.bias is not None:
            new.bias.requires_grad_(layer.bias.requires_grad)
        return new

    @property
    def packed_names(self) -> tuple[str, ...]:
        """The names of the parameter and the buffers that make the weight."""
        return ("values", *INDEX, "positions")

    def load_packed(self, packed: BlockSparseWeight) -> None:
        """Take over a weight of the same shape, number and size of blocks; the parameter stays the same object.

        Raises:
            ValueError: another shape, number or size of blocks.
        """
        if packed.shape != (self.out_features, self.in_features) or packed.values.shape != self.values.shape:
            raise ValueError(
                f"packed must be {(self.out_features, self.in_features)} in blocks of shape {tuple(self.values.shape)};"
                f" got {packed.shape} in {tuple(packed.values.shape)}"
            )
        parts = (packed.values.detach(), *packed.layout.tensors(), packed.positions)
        with torch.no_grad():
            for name, part in zip(self.packed_names, parts, strict=True):
                getattr(self, name).copy_(part)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load, and refuse an index that is not one: products would read past their tensors by it."""
        *_, error_msgs = rest
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if any(tensor.is_meta for tensor in self.state_dict().values()):
            return
        try:
            self.packed.require_valid()
        except ValueError as error:
            error_msgs.append(f"{prefix or 'the packed layer'}: {error}")

    @property
    def packed(self) -> BlockSparseWeight:
        """The weight, whose values are the parameter itself."""
        grid = block_grid((self.out_features, self.in_features), self.block_size)
        density = self.values.shape[0] / max(1, math.prod(grid))
        a, b, c, d, e = (self.get_buffer(name) for name in INDEX)
        layout = BlockLayout((self.out_features, self.in_features), self.block_size, a, b, c, d, e, density)
        return BlockSparseWeight(self.values, layout, self.get_buffer("positions"))

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight as the layer that this stands for stores it, for modules that read it of their parts."""
        dense = self.packed.to_dense()
        return dense.mT if self.by_inputs else dense

    @property
    def by_inputs(self) -> bool:
        """Whether the layer that this stands for stores its weight as [in, out]."""
        return self.plain is not nn.Linear

    @property
    def stored(self) -> BlockSparseWeight:
        """`packed`, as that layer stores it."""
        return self.packed.transposed() if self.by_inputs else self.packed

    def dense(self) -> nn.Module:
        """The layer that this stands for, with a dense weight."""
        new: Any = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        if self.by_inputs:
            new = self.plain.__new__(self.plain)
            nn.Module.__init__(new)
            new.nf, new.nx = self.out_features, self.in_features
        new.weight = nn.Parameter(self.weight.detach().contiguous(), requires_grad=self.values.requires_grad)
        new.bias = None if self.bias is None else nn.Parameter(self.bias.detach(), self.bias.requires_grad)
        return new.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x w^T + b; in an ONNX graph, which knows no packed products, by the dense weight made of its blocks."""
        if torch.onnx.is_in_onnx_export():
            return functional.linear(input, self.packed.to_dense(), self.bias)
        return block_sparse_linear(input, self.packed, self.bias)

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        density = self.packed.density
        return f"{self.in_features}, {self.out_features}, block_size={self.block_size}, density={density:.3g}"
