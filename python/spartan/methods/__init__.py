"""Training methods, one file each, on the interface of `base.Method`."""

from __future__ import annotations

from spartan.methods.base import Method, SparseMethod
from spartan.methods.dense import Dense
from spartan.methods.gmp import GMP
from spartan.methods.one_shot import OneShot
from spartan.methods.spartan import Spartan
from spartan.methods.static_random import StaticRandom

__all__ = ["GMP", "Dense", "Method", "OneShot", "SparseMethod", "Spartan", "StaticRandom"]
