"""Trains a model to a sparsity: the sparsifier, its parts, its state, and what it reports."""

from __future__ import annotations

from spartan.sparsifier.copies import finalize
from spartan.sparsifier.history import History, OnStep, ScalarWriter, scalars_to
from spartan.sparsifier.parts import Group
from spartan.sparsifier.report import LayerReport, Report, hidden_matrices, kept_fractions, stability
from spartan.sparsifier.sparsifier import Sparsifier

__all__ = [
    "Group",
    "History",
    "LayerReport",
    "OnStep",
    "Report",
    "ScalarWriter",
    "Sparsifier",
    "finalize",
    "hidden_matrices",
    "kept_fractions",
    "scalars_to",
    "stability",
]
