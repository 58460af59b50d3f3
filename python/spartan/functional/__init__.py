"""The operators as people import them: with gradients.

Each gradient has a file, named as the operator's in `spartan_kernels.ops`.
"""

from __future__ import annotations

from spartan.functional.block_sparse import block_sparse_linear
from spartan.functional.block_sparse_conv import block_sparse_conv2d
from spartan.functional.masked_conv import masked_conv2d
from spartan.functional.masked_matmul import masked_linear, sampled_matmul
from spartan.functional.masked_weight import masked_weight
from spartan.functional.soft_topk import soft_topk, soft_topk_global
from spartan_kernels.ops import hard_topk, hard_topk_global

__all__ = [
    "block_sparse_conv2d",
    "block_sparse_linear",
    "hard_topk",
    "hard_topk_global",
    "masked_conv2d",
    "masked_linear",
    "masked_weight",
    "sampled_matmul",
    "soft_topk",
    "soft_topk_global",
]
