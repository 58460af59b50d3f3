"""Train a network to a sparsity chosen beforehand: soft top-k masks, masked products, training methods, export."""

from __future__ import annotations

from spartan.functional import hard_topk, masked_linear, masked_weight, soft_topk, soft_topk_global
from spartan_kernels import __version__, backend, checks, info

__all__ = [
    "__version__",
    "backend",
    "checks",
    "hard_topk",
    "info",
    "masked_linear",
    "masked_weight",
    "soft_topk",
    "soft_topk_global",
]
