"""Pruning by weights and activations: |W| times the norm of the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spartan.pruning.base import Pruned, Score, block_sums, weight_of
from spartan.pruning.layers import Layer
from spartan.pruning.selection import Budget
from spartan.pruning.statistics import Statistics

__all__ = ["Wanda"]


@dataclass(frozen=True, kw_only=True)
class Wanda(Score):
    """Keep the blocks that weigh most on the calibration inputs x; what stays is as it was.

        v_b = sum over the block of (|W_ij| ||x_j||_2)^2

    ||x_j|| is over all calibration inputs. v_b is the squared error of the outputs that dropping the block makes, where
    inputs are not correlated; for a single weight the order is that of |W_ij| ||x_j||.

    Attributes:
        by_output: compare the weights of an output with each other alone, as the paper does: each output then keeps as
            many as the others. False: compare those of the whole layer. Where blocks differ in cost, the whole layer
            is compared.

    Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    equation (1); for blocks, ours.

    Example::

        spartan.prune(model, spartan.Wanda(sparsity=0.5), batches)
    """

    by_output: bool = True

    def scores(self, layer: Layer, seen: Statistics | None, relative: torch.Tensor | None = None) -> torch.Tensor:
        """Squared error by block."""
        assert seen is not None
        matrices = layer.matrices(weight_of(layer))
        weighed = matrices.square() * seen.squares[:, None].to(matrices.dtype)
        if relative is not None:
            weighed = weighed / relative[..., None]
        return block_sums(layer, layer.from_matrices(weighed))

    def prune(self, layer: Layer, seen: Statistics | None, budget: Budget | None) -> Pruned:
        """Choose by these scores."""
        assert budget is not None
        return Pruned(weight_of(layer), budget.best(self.scores(layer, seen), by_output=self.by_output))
