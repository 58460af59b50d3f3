"""Prune what is already trained: scores of weights, a pass over the layers, what it did."""

from __future__ import annotations

from spartan.pruning.admm import ADMM
from spartan.pruning.base import Pruner
from spartan.pruning.cospadi import CoSpaDi
from spartan.pruning.distillation import Distillation, Distilled, distill
from spartan.pruning.dsnot import DSnoT
from spartan.pruning.factorize import (
    FactorizationResult,
    FactorizedLayer,
    FactorizedLinear,
    factorize,
    to_factorized,
)
from spartan.pruning.magnitude import Magnitude
from spartan.pruning.obs import OBS
from spartan.pruning.prune import prune
from spartan.pruning.recalibration import recalibrate
from spartan.pruning.result import PrunedLayer, PruningInterrupted, PruningResult
from spartan.pruning.wanda import Wanda

__all__ = [
    "ADMM",
    "OBS",
    "CoSpaDi",
    "DSnoT",
    "Distillation",
    "Distilled",
    "FactorizationResult",
    "FactorizedLayer",
    "FactorizedLinear",
    "Magnitude",
    "PrunedLayer",
    "Pruner",
    "PruningInterrupted",
    "PruningResult",
    "Wanda",
    "distill",
    "factorize",
    "prune",
    "recalibrate",
    "to_factorized",
]
