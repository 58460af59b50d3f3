"""Train a network to a sparsity chosen beforehand: soft top-k masks, masked products, training methods, export."""

from __future__ import annotations

from spartan.budgets import CostModel, FLOPs, LatencyTable
from spartan.functional import (
    block_sparse_linear,
    hard_topk,
    masked_conv2d,
    masked_linear,
    masked_weight,
    sampled_matmul,
    soft_topk,
    soft_topk_global,
)
from spartan.functional.sparsity_pattern import sparsity_pattern
from spartan.masks import Mask
from spartan.methods import (
    DPF,
    GMP,
    GSE,
    IHT,
    SET,
    SRSTE,
    WGSEF,
    Dense,
    DualAveraging,
    MaskDecay,
    OneShot,
    Powerpropagation,
    RigL,
    Spartan,
    StaticRandom,
    TopKAST,
)
from spartan.pruning import ADMM, OBS, DSnoT, Magnitude, PrunedLayer, PruningInterrupted, PruningResult, Wanda, prune
from spartan.saving.export import describe_pretrained, load_pretrained, save_pretrained, sparsity_of
from spartan.saving.inspection import inspect_file
from spartan.saving.packing import PackingReport, packing_report, to_block_sparse, to_dense
from spartan.sltrain import SLTrainLinear, merge_sltrain, to_sltrain
from spartan.sparsifier import Group, History, Sparsifier, finalize, scalars_to
from spartan.tuning import tune
from spartan_kernels import BlockLayout, BlockSparseWeight, __version__, backend, checks, info

__all__ = [
    "ADMM",
    "DPF",
    "GMP",
    "GSE",
    "IHT",
    "OBS",
    "SET",
    "SRSTE",
    "WGSEF",
    "BlockLayout",
    "BlockSparseWeight",
    "CostModel",
    "DSnoT",
    "Dense",
    "DualAveraging",
    "FLOPs",
    "Group",
    "History",
    "LatencyTable",
    "Magnitude",
    "Mask",
    "MaskDecay",
    "OneShot",
    "PackingReport",
    "Powerpropagation",
    "PrunedLayer",
    "PruningInterrupted",
    "PruningResult",
    "RigL",
    "SLTrainLinear",
    "Sparsifier",
    "Spartan",
    "StaticRandom",
    "TopKAST",
    "Wanda",
    "__version__",
    "backend",
    "block_sparse_linear",
    "checks",
    "describe_pretrained",
    "finalize",
    "hard_topk",
    "info",
    "inspect_file",
    "load_pretrained",
    "masked_conv2d",
    "masked_linear",
    "masked_weight",
    "merge_sltrain",
    "packing_report",
    "prune",
    "sampled_matmul",
    "save_pretrained",
    "scalars_to",
    "soft_topk",
    "soft_topk_global",
    "sparsity_of",
    "sparsity_pattern",
    "to_block_sparse",
    "to_dense",
    "to_sltrain",
    "tune",
]
