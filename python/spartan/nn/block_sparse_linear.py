"""A linear layer on the packed blocks of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spartan.functional import block_sparse_linear
from spartan.nn.packed import PackedLayer
from spartan_kernels import BlockSparseWeight

__all__ = ["BlockSparseLinear"]


class BlockSparseLinear(PackedLayer):
    """`nn.Linear` on the packed blocks of its weight: for inference, or to train the kept blocks alone.

    Args:
        packed: the weight.
        bias: [out_features] or None.
        plain: the class of the layer that it stands for: `nn.Linear`, or transformers' `Conv1D`.

    Attributes:
        values: parameter [blocks, rows, columns]. bias: parameter or None. The index of the blocks is in buffers.
        scales: of values in 8 bits (`packed.to_float8()`), a buffer [out, 1]; else None. Such values are not trained.
    """

    def __init__(
        self, packed: BlockSparseWeight, bias: torch.Tensor | None = None, *, plain: type[nn.Module] = nn.Linear
    ) -> None:
        super().__init__(packed, bias)
        self.plain = plain
        self.out_features, self.in_features = packed.shape

    @staticmethod
    def replacing(layer: Any, packed: BlockSparseWeight) -> BlockSparseLinear:
        """What stands for a linear `layer`, packed or not, with this weight and its bias, device and modes."""
        plain = layer.plain if isinstance(layer, BlockSparseLinear) else type(layer)
        new = BlockSparseLinear(packed, layer.bias, plain=plain)
        new.take_modes(layer)
        return new

    @property
    def packed(self) -> BlockSparseWeight:
        """The weight, whose values are the parameter itself."""
        return self.matrix

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
        new.weight = nn.Parameter(self.weight.detach().contiguous(), requires_grad=self.trained)
        new.bias = None if self.bias is None else nn.Parameter(self.bias.detach(), self.bias.requires_grad)
        return new.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x w^T + b; in an ONNX graph, which knows no packed products, by the dense weight made of its blocks."""
        if torch.onnx.is_in_onnx_export():
            return functional.linear(input, self.packed.to_dense(), self.bias)
        return block_sparse_linear(input, self.packed, self.bias)

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        density, bits = self.packed.density, "" if self.scales is None else ", float8"
        return f"{self.in_features}, {self.out_features}, block_size={self.block_size}, density={density:.3g}{bits}"
