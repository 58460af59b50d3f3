"""Modules: masked while a model trains, packed afterwards; and which weights of a model are masked."""

from __future__ import annotations

from spartan.nn.block_sparse_conv2d import BlockSparseConv2d
from spartan.nn.block_sparse_linear import BlockSparseLinear
from spartan.nn.modules import MaskedConv2d, MaskedLinear, MaskedWeight, mask_weight, swappable, unmask_weight
from spartan.nn.packed import PackedLayer

__all__ = [
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedWeight",
    "PackedLayer",
    "mask_weight",
    "swappable",
    "unmask_weight",
]
