"""Pruning with the optimal brain surgeon: what stays makes up for what goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from spartan.methods.base import require_number
from spartan.pruning.base import Pruned, Score, block_sums, weight_of
from spartan.pruning.hessian import factor
from spartan.pruning.layers import Layer
from spartan.pruning.selection import Budget, best_of_each, kept_cost, within
from spartan.pruning.statistics import Statistics

__all__ = ["OBS"]


@dataclass(frozen=True, kw_only=True)
class OBS(Score):
    """Drop blocks column by column, and let the columns that follow make up for each, as SparseGPT does.

    With G = sum x x^T over the calibration inputs, H = G + damping * mean(diag G) * I and H^-1 = U^T U (U upper
    triangular), dropping w_j of a row, when the columns before j are settled, costs and changes

        v_j = (w_j / U_jj)^2,        w <- w - (w_j / U_jj) U_j,:

    which is the least squared error over all changes of the columns that follow. A block of columns S costs
    ||w_S U_SS^-1||^2, summed over its rows. Of a row without dropped weights but one, that is the optimum in closed
    form, if the others all follow. Masks are chosen for `columns` columns at a time, with the weights as changed so
    far: the scores of all columns that are left share what is left of the layer's budget, which is met exactly.

    Attributes:
        damping: added to the diagonal of G, as a fraction of its mean. A Hessian that is singular all the same (fewer
            inputs than columns, with damping 0) gets more, which the report says.
        columns: how many columns (or blocks of them) to choose for at a time.

    Source: Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992; Frantar,
    Alistarh, "SparseGPT", ICML 2023, section 3; blocks, costs and the budget over all columns, ours.

    Example::

        spartan.prune(model, spartan.OBS(sparsity=0.7, block_size=(4, 1)), batches)
    """

    damping: float = 0.01
    columns: int = 128

    needs_products = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("damping", self.damping, 0.0)
        if type(self.columns) is not int or self.columns < 1:
            raise ValueError(f"columns must be an int of at least 1; got {self.columns!r}")

    def scores(self, layer: Layer, seen: Statistics | None, relative: torch.Tensor | None = None) -> torch.Tensor:
        """Squared error by block, where all columns can make up for it: w_S (H^-1)_SS^-1 w_S^T; of one, w^2 / H^-1_jj.

        For columns in blocks the diagonal of H^-1 stands for (H^-1)_SS.
        """
        assert seen is not None
        upper = factor(layer, seen, self.damping).upper
        matrices = layer.matrices(weight_of(layer)).double()
        alone = matrices.square() / torch.linalg.vector_norm(upper, dim=-2).square()[:, None]
        if relative is not None:
            alone = alone / relative[..., None]
        return block_sums(layer, layer.from_matrices(alone))

    def prune(self, layer: Layer, seen: Statistics | None, budget: Budget | None) -> Pruned:
        """Go through the columns."""
        assert seen is not None and budget is not None
        made = factor(layer, seen, self.damping)
        sweep = _Sweep(layer, made.upper, budget, self.columns)
        return Pruned(*sweep.run(), made.note)


class _Sweep:
    """One pass over the columns of a layer, its blocks of columns made equal by columns of zeros."""

    def __init__(self, layer: Layer, upper: torch.Tensor, budget: Budget, columns: int) -> None:
        self.layer, self.budget = layer, budget
        self.width = layer.block_size[1] if layer.pattern is None else layer.pattern[1]
        self.step = max(1, columns // self.width) * self.width
        inner, self.positions = layer.shape[1] // layer.strips, math.prod(layer.shape[2:])
        self.padded = -(-inner // self.width) * self.width
        self.weights = layer.matrices(weight_of(layer)).to(torch.float64, copy=True)
        self.upper = upper
        if self.padded != inner:
            self.weights = self._pad(self.weights)
            self.upper = self._pad(self._pad(upper).mT).mT  # columns, then rows
            blank = self.upper.diagonal(dim1=-2, dim2=-1)
            blank[blank == 0] = 1.0
        tiles = self.upper.unflatten(-1, (-1, self.width)).unflatten(1, (-1, self.width))
        blocks = tiles.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # U_SS of each block of columns
        identity = torch.eye(self.width, dtype=blocks.dtype, device=blocks.device)
        self.inverses = torch.linalg.solve_triangular(blocks, identity.expand_as(blocks), upper=True)

    def _pad(self, tensor: torch.Tensor) -> torch.Tensor:
        """[..., kernel * in] with zeros after the inputs of each kernel position."""
        by_position = tensor.unflatten(-1, (self.positions, -1))
        return functional.pad(by_position, (0, self.padded - by_position.shape[-1])).flatten(-2)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The new weight [out, in, *kernel] and the mask of its blocks."""
        masks, left = [], self.budget.amount
        n = self.weights.shape[-1]
        for start in range(0, n, self.step):
            end = min(start + self.step, n)
            mask = None
            if self.layer.pattern is None:
                mask, used = self._choose(start, end, left)
                left -= used
            masks.append(self._drop(start, end, mask))
        kept = torch.cat(masks, -1)
        inner = self.layer.shape[1] // self.layer.strips
        weights = (t.unflatten(-1, (self.positions, -1))[..., :inner].flatten(-2) for t in (self.weights, kept))
        values, stays = (self.layer.from_matrices(t) for t in weights)
        rows, columns = self.layer.block_size
        return values, stays[::rows, ::columns]

    def _choose(self, start: int, end: int, left: float) -> tuple[torch.Tensor, float]:
        """Which weights of columns [start, end) stay, where all columns from there share what is left; its cost."""
        rows, width = self.layer.block_size
        groups, height, _ = self.weights.shape
        below = groups * height // self.layer.strips  # rows that lie below each other in the weight
        scores = self._errors(start).square_().sum(-1) if width > 1 else self._errors(start)[..., 0].square_()
        scores = scores.reshape(self.layer.strips, below, -1)
        if rows > 1:
            scores = functional.pad(scores, (0, 0, 0, -below % rows)).unflatten(1, (-1, rows)).sum(2)
        costs = self._costs(start)
        mask = within(scores, left, costs)[..., : (end - start) // width]
        used = kept_cost(mask, costs[..., : mask.shape[-1]] if isinstance(costs, torch.Tensor) else costs)
        tall = mask.repeat_interleave(rows, 1)[:, :below].repeat_interleave(width, 2)
        return tall.reshape(groups, height, -1), used

    def _errors(self, start: int) -> torch.Tensor:
        """w_S U_SS^-1 of the blocks of columns from `start`, [groups, rows, blocks, width]."""
        blocks = self.weights[:, :, start:].unflatten(-1, (-1, self.width))
        inverses = self.inverses[:, start // self.width :]
        if self.width == 1:
            return blocks * inverses.view(len(blocks), 1, -1, 1)
        return (blocks.movedim(2, 1) @ inverses).movedim(1, 2)

    def _costs(self, start: int) -> float | torch.Tensor:
        costs = self.layer.costs
        if not isinstance(costs, torch.Tensor):
            return costs
        return self.layer.in_strips(costs)[..., start // self.width :]

    def _drop(self, start: int, end: int, mask: torch.Tensor | None) -> torch.Tensor:
        """Drop what the mask of columns [start, end) drops, column after column; return it."""
        groups, height, _ = self.weights.shape
        own, upper = self.weights[:, :, start:end].clone(), self.upper[:, start:end, start:end].contiguous()
        errors = torch.zeros_like(own)
        stays = torch.empty_like(own, dtype=torch.bool) if mask is None else mask
        for j in range(end - start):
            if mask is None and j % self.width == 0:
                several = slice(j, j + self.width)
                scores = own[:, :, several] / upper.diagonal(dim1=-2, dim2=-1)[:, None, several]
                assert self.layer.pattern is not None
                stays[:, :, several] = best_of_each(scores.square().flatten(0, 1), self.layer.pattern).view(
                    groups, height, -1
                )
            error = torch.where(stays[:, :, j], 0.0, own[:, :, j] / upper[:, None, j, j])
            own[:, :, j:] -= error[..., None] * upper[:, j, None, j:]
            errors[:, :, j] = error
        self.weights[:, :, start:end] = torch.where(stays, own, 0.0)
        self.weights[:, :, end:].baddbmm_(errors, self.upper[:, start:end, end:], alpha=-1)
        return stays
