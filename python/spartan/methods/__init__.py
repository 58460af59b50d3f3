"""Training methods, one file each, on the interface of `base.Method`."""

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

__all__ = [
    "DPF",
    "GMP",
    "GSE",
    "IHT",
    "SET",
    "SRSTE",
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
