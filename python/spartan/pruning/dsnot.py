"""Masks that change places, without training: DSnoT."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spartan.pruning.base import Pruned, weight_of
from spartan.pruning.layers import Layer
from spartan.pruning.second_stage import SecondStage
from spartan.pruning.selection import Budget
from spartan.pruning.statistics import Statistics

__all__ = ["DSnoT"]


@dataclass(frozen=True)
class DSnoT(SecondStage):
    """Let weights that were dropped change places with weights that stay, so that outputs are right on average.

    For an output with dense weights w, what it has now u (zero where dropped) and inputs x of mean E[x] and variance
    Var(x), the expected error is e = sum_k (w_k - u_k) E[x_k]. A swap

        grows    i = argmax over dropped k of   sign(e) w_k E[x_k] / Var(x_k)
        drops    j = argmin over kept k with sign(e) u_k E[x_k] < 0 of   |u_k| ||x_k||_2

    and is made where it brings e closer to zero. Swaps are within an output, so each keeps as many weights as before;
    with a pattern they are within the m neighbours. Values of weights that stay do not change; one that grows has its
    dense value.

    Attributes:
        first: a score for single weights or a pattern, such as `Wanda(sparsity=0.6)`, or masks by name of the weight.
        cycles: swaps of an output, at most.

    Raises:
        TypeError, ValueError: a setting of the wrong type or outside its range, named; blocks.

    Source: Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ICLR 2024. That a
    swap must lower the error, and that an output stops where none does, is ours, in the place of a threshold.

    Example::

        spartan.prune(model, spartan.DSnoT(spartan.Wanda(sparsity=0.6)), batches)
    """

    cycles: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.cycles) is not int or self.cycles < 1:
            raise ValueError(f"cycles must be an int of at least 1; got {self.cycles!r}")

    def require(self, layer: Layer) -> None:
        """Raise ValueError unless each weight is a block and costs the same."""
        super().require(layer)
        if layer.block_size != (1, 1):
            raise ValueError(
                f"block_size must be 1 with DSnoT, which swaps weights; {layer.name!r} has {layer.block_size}"
            )
        if isinstance(layer.costs, torch.Tensor):
            raise ValueError(
                f"costs must be the same for all weights of a layer with DSnoT; those of {layer.name!r} differ"
            )

    def improve(self, layer: Layer, seen: Statistics, budget: Budget | None, first: Pruned) -> Pruned:
        """Swap."""
        dense = layer.matrices(weight_of(layer)).double()
        now = torch.where(first.mask, first.values, 0.0)
        stays = self._swapped(layer, seen, dense, layer.matrices(now).double(), layer.matrices(first.mask))
        mask = layer.from_matrices(stays)
        return Pruned(torch.where(first.mask, first.values, weight_of(layer)), mask)

    def _swapped(
        self, layer: Layer, seen: Statistics, dense: torch.Tensor, now: torch.Tensor, stays: torch.Tensor
    ) -> torch.Tensor:
        """The mask [groups, rows, n] after all swaps."""
        count = max(seen.count, 1)
        mean = (seen.total / count)[:, None]
        variance = (seen.squares.double() / count)[:, None] - mean.square()
        norm = seen.squares.double().sqrt()[:, None]
        stays, values = stays.clone(), torch.where(stays, now, dense)  # of a weight, if it stays or grows
        gains = values * mean
        worth = gains / variance.clamp(min=1e-12 * float(variance.max()) + torch.finfo(torch.float64).tiny)
        weighs = values.abs() * norm
        error = ((dense - now) * mean).sum(-1, keepdim=True)
        for _ in range(self.cycles):
            sign = error.sign()
            grown = torch.where(stays, -torch.inf, sign * worth).argmax(-1, keepdim=True)
            fits = stays & (sign * gains < 0)
            if layer.pattern is not None:
                fits &= self._neighbours(layer, grown, stays)
            dropped = torch.where(fits, weighs, torch.inf).argmin(-1, keepdim=True)
            after = error - gains.gather(-1, grown) + gains.gather(-1, dropped)
            swaps = fits.gather(-1, dropped) & ~stays.gather(-1, grown) & (after.abs() < error.abs())
            if not bool(swaps.any()):
                break
            stays.scatter_(-1, grown, stays.gather(-1, grown) | swaps)
            stays.scatter_(-1, dropped, stays.gather(-1, dropped) & ~swaps)
            error = torch.where(swaps, after, error)
        return stays

    def _neighbours(self, layer: Layer, grown: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
        """The weights of the same m as the one that grows; columns are [kernel, in], and m divides in."""
        assert layer.pattern is not None
        m = layer.pattern[1]
        columns = torch.arange(stays.shape[-1], device=stays.device)
        return (columns // m) == (grown // m)
