"""Kernels for training sparse networks: soft and hard top-k, masked weights, masked products.

This package computes. It has no autograd, no modules and no training: those are in the package `spartan`, whose import
gives the operators here their gradients. Until then PyTorch warns in a backward
pass and leaves the gradients out.
"""

from __future__ import annotations

__version__ = "0.1.0"

from spartan_kernels.block_sparse import BlockSparseWeight
from spartan_kernels.block_sparse_filter import BlockSparseFilter
from spartan_kernels.dispatch import backend, info
from spartan_kernels.layout import BlockLayout
from spartan_kernels.ops import (
    block_costs,
    block_grid,
    block_scores,
    block_sparse_conv2d,
    block_sparse_linear,
    checks,
    expand_blocks,
    hard_topk,
    hard_topk_global,
    masked_conv2d,
    masked_linear,
    masked_weight,
    masked_weight_correct_,
    masked_weight_coupling,
    new_solver_state,
    sampled_matmul,
    soft_topk,
    soft_topk_global,
    solve_masks_,
)

__all__ = [
    "BlockLayout",
    "BlockSparseFilter",
    "BlockSparseWeight",
    "__version__",
    "backend",
    "block_costs",
    "block_grid",
    "block_scores",
    "block_sparse_conv2d",
    "block_sparse_linear",
    "checks",
    "expand_blocks",
    "hard_topk",
    "hard_topk_global",
    "info",
    "masked_conv2d",
    "masked_linear",
    "masked_weight",
    "masked_weight_correct_",
    "masked_weight_coupling",
    "new_solver_state",
    "sampled_matmul",
    "soft_topk",
    "soft_topk_global",
    "solve_masks_",
]
