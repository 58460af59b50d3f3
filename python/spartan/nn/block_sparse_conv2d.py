"""A 2-d convolution on the packed blocks of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spartan.functional import block_sparse_conv2d
from spartan.nn.packed import PackedLayer
from spartan_kernels import BlockSparseFilter
from spartan_kernels.arguments import memory_format

__all__ = ["BlockSparseConv2d"]

_Pair = tuple[int, int]


class BlockSparseConv2d(PackedLayer):
    """`nn.Conv2d` on the packed blocks of its weight: for inference, or to train the kept blocks alone.

    It has one group and pads with zeros.

    Args:
        packed: the weight.
        bias: [out_channels] or None.
        stride, dilation: (height, width).
        padding: (height, width), "same" or "valid".
        layout: of the dense weight in memory.

    Attributes:
        values: parameter [blocks, rows, columns]. bias: parameter or None. The index of the blocks is in buffers.
    """

    def __init__(
        self,
        packed: BlockSparseFilter,
        bias: torch.Tensor | None = None,
        stride: _Pair = (1, 1),
        padding: _Pair | str = (0, 0),
        dilation: _Pair = (1, 1),
        *,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__(packed.matrix, bias)
        self.channels_last = layout == torch.channels_last
        self.out_channels, self.in_channels, *_ = packed.shape
        self.kernel_size, self.stride, self.padding, self.dilation = packed.kernel_size, stride, padding, dilation

    @staticmethod
    def replacing(layer: Any, packed: BlockSparseFilter) -> BlockSparseConv2d:
        """What stands for a convolution `layer`, packed or not, with this weight and its bias, device and modes."""
        packed_before = isinstance(layer, BlockSparseConv2d)
        last = layer.channels_last if packed_before else memory_format(layer.weight) == torch.channels_last
        layout = torch.channels_last if last else torch.contiguous_format
        new = BlockSparseConv2d(packed, layer.bias, layer.stride, layer.padding, layer.dilation, layout=layout)
        new.take_modes(layer)
        return new

    @property
    def packed(self) -> BlockSparseFilter:
        """The weight, whose values are the parameter itself."""
        return BlockSparseFilter(self.matrix, self.in_channels, self.kernel_size)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, for modules that read it of their parts."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return self.packed.to_dense().contiguous(memory_format=layout)

    def dense(self) -> nn.Module:
        """The convolution that this stands for, with a dense weight."""
        shape = self.in_channels, self.out_channels, self.kernel_size
        new = nn.Conv2d(*shape, self.stride, self.padding, self.dilation, bias=False, device="meta")
        new.weight = nn.Parameter(self.weight.detach(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.detach(), self.bias.requires_grad)
        return new.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """conv(x, w) + b; in an ONNX graph, which knows no packed products, by the dense weight made of its blocks."""
        if torch.onnx.is_in_onnx_export():
            return functional.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation)
        if isinstance(self.padding, str):
            height, width = (
                step * (side - 1) if self.padding == "same" else 0
                for side, step in zip(self.kernel_size, self.dilation, strict=True)
            )
            if height % 2 or width % 2:  # what cannot be halved goes below and to the right
                input = functional.pad(input, (0, width % 2, 0, height % 2))
            padding = height // 2, width // 2
        else:
            padding = self.padding
        return block_sparse_conv2d(input, self.packed, self.bias, self.stride, padding, self.dilation)

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        density = self.packed.density
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride},"
            f" padding={self.padding!r}, dilation={self.dilation}, block_size={self.block_size}, density={density:.3g}"
        )
