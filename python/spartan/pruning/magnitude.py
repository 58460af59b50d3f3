"""Pruning by magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spartan.pruning.base import Pruned, Score, block_sums, weight_of
from spartan.pruning.layers import Layer
from spartan.pruning.selection import Budget
from spartan.pruning.statistics import Statistics

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(Score):
    """Keep the blocks of largest magnitude; what stays is as it was.

        v_b = sum over the block of |W_ij|

    A global budget compares magnitudes as they are. It needs no calibration batches; with them the report has errors.

    Example::

        spartan.prune(model, spartan.Magnitude(sparsity=0.5))
    """

    needs_inputs = False

    def scores(self, layer: Layer, seen: Statistics | None, relative: torch.Tensor | None = None) -> torch.Tensor:
        """Magnitude of each block, whatever goes in."""
        return block_sums(layer, weight_of(layer).abs())

    def prune(self, layer: Layer, seen: Statistics | None, budget: Budget | None) -> Pruned:
        """Choose by magnitude."""
        assert budget is not None
        return Pruned(weight_of(layer), budget.best(self.scores(layer, seen)))
