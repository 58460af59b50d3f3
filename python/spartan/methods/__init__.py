"""Training methods, one file each, on the interface of `base.Method`: what happens to masks around optimizer steps.

Two relatives are none. SLTrain trains other parameters than the model's, so it is a module (`spartan.sltrain`). DSnoT
takes no steps: it chooses the mask of a pruned model anew by statistics of its activations, and needs the dense
weights beside the pruned ones, which masks here do not keep; it would be a function of a model, and is left out.
"""

from __future__ import annotations

from spartan.methods.base import Method, SparseMethod
from spartan.methods.dense import Dense
from spartan.methods.dpf import DPF
from spartan.methods.dual_averaging import DualAveraging
from spartan.methods.gmp import GMP
from spartan.methods.gse import GSE
from spartan.methods.iht import IHT
from spartan.methods.mask_decay import MaskDecay
from spartan.methods.one_shot import OneShot
from spartan.methods.powerpropagation import Powerpropagation
from spartan.methods.rigl import RigL
from spartan.methods.set import SET
from spartan.methods.spartan import Spartan
from spartan.methods.sr_ste import SRSTE
from spartan.methods.static_random import StaticRandom
from spartan.methods.top_kast import TopKAST
from spartan.methods.wgsef import WGSEF

__all__ = [
    "DPF",
    "GMP",
    "GSE",
    "IHT",
    "SET",
    "SRSTE",
    "WGSEF",
    "Dense",
    "DualAveraging",
    "MaskDecay",
    "Method",
    "OneShot",
    "Powerpropagation",
    "RigL",
    "SparseMethod",
    "Spartan",
    "StaticRandom",
    "TopKAST",
]
