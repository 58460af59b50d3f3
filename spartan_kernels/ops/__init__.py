"""What is computed: each operator's contract, schema and fake implementation."""

from __future__ import annotations

from spartan_kernels.arguments import block_grid, checks
from spartan_kernels.calls import OPERATORS, Operator
from spartan_kernels.ops._problem import as_in_autocast
from spartan_kernels.ops._shards import is_dtensor, joint_group
from spartan_kernels.ops.block_sparse import block_sparse_linear
from spartan_kernels.ops.block_sparse_conv import block_sparse_conv2d
from spartan_kernels.ops.hard_topk import hard_topk, hard_topk_global
from spartan_kernels.ops.masked_conv import masked_conv2d
from spartan_kernels.ops.masked_matmul import masked_linear, sampled_matmul
from spartan_kernels.ops.masked_weight import (
    block_costs,
    block_scores,
    expand_blocks,
    masked_weight,
    masked_weight_correct_,
    masked_weight_coupling,
)
from spartan_kernels.ops.soft_topk import new_solver_state, soft_topk, soft_topk_global, solve_masks_

__all__ = [
    "OPERATORS",
    "Operator",
    "as_in_autocast",
    "block_costs",
    "block_grid",
    "block_scores",
    "block_sparse_conv2d",
    "block_sparse_linear",
    "checks",
    "expand_blocks",
    "hard_topk",
    "hard_topk_global",
    "is_dtensor",
    "joint_group",
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
