"""Train a network to a sparsity chosen beforehand: soft top-k masks, masked products, training methods, export."""

from __future__ import annotations

from spartan.export import load_pretrained, save_pretrained, sparsity_of
from spartan.functional import hard_topk, masked_linear, masked_weight, soft_topk, soft_topk_global
from spartan.masks import Mask
from spartan.methods import GMP, Dense, OneShot, Spartan, StaticRandom
from spartan.patterns import sparsity_pattern
from spartan.sparsifier import Sparsifier
from spartan_kernels import __version__, backend, checks, info

__all__ = [
    "GMP",
    "Dense",
    "Mask",
    "OneShot",
    "Sparsifier",
    "Spartan",
    "StaticRandom",
    "__version__",
    "backend",
    "checks",
    "hard_topk",
    "info",
    "load_pretrained",
    "masked_linear",
    "masked_weight",
    "save_pretrained",
    "soft_topk",
    "soft_topk_global",
    "sparsity_of",
    "sparsity_pattern",
]
