"""The best values of the weights that stay, by splitting and conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spartan.methods.base import require_number
from spartan.pruning.base import Pruned, block_sums, weight_of
from spartan.pruning.hessian import damped
from spartan.pruning.layers import Layer, wide
from spartan.pruning.second_stage import SecondStage
from spartan.pruning.selection import Budget
from spartan.pruning.statistics import Statistics

__all__ = ["ADMM"]

_LOOK_EVERY = 3  # iterations between two looks at the mask
_FASTER = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # by the part of the mask that changed: what rho grows by
_FIRST_RHO = 0.1  # of a Hessian with a diagonal of ones


@dataclass(frozen=True)
class ADMM(SecondStage):
    """Reconstruct the outputs of a layer with the weights that stay, after a first stage that chose a mask.

    With W_0 the dense weight, H = G + damping * mean(diag G) * I, and k what the first stage may keep, the problem

        minimise trace((W - W_0) H (W - W_0)^T)   such that W fits into k

    is split in two, with D the sparse copy of W, V the multipliers and rho > 0 (H scaled to a diagonal of ones):

        W <- (W_0 H - V + rho D) (H + rho I)^-1,    D <- P_k(W + V / rho),    V <- V + rho (W - D).

    P_k keeps the blocks of largest squared norm within the budget. It starts from the mask of the first stage; rho
    grows by 1.3, 1.2 or 1.1 every three iterations, as more than 10%, 0.5% or less of the mask changed, until none
    does. The values are then the least squares on the mask, by conjugate gradients with the diagonal as preconditioner.

    Attributes:
        first: a score, such as `Wanda(sparsity=0.7)`, or masks by name of the weight (bool, of its shape).
        reselect: let the mask change as above; False: the mask of the first stage stays, and only values change.
        iterations: at most so many of the splitting. steps: at most so many of the conjugate gradients.
        damping: added to the diagonal of G, as a fraction of its mean.
        tolerance: where the conjugate gradients end, as a fraction of the first residual.

    Raises:
        TypeError, ValueError: a setting of the wrong type or outside its range, named; `reselect` with given masks.

    Source: Meng, Behdin, Wang, Mazumder, "ALPS", NeurIPS 2024, sections 3.2 and 3.3; Boža, "Fast and effective weight
    update for pruned large language models", TMLR 2024.

    Example::

        spartan.prune(model, spartan.ADMM(spartan.Wanda(sparsity=0.7)), batches)
    """

    reselect: bool = True
    iterations: int = 120
    steps: int = 60
    damping: float = 0.01
    tolerance: float = 1e-5

    needs_products = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1; got {value!r}")
        require_number("damping", self.damping, 0.0)
        require_number("tolerance", self.tolerance, 0.0)
        if self.reselect and self.masks is not None:
            raise ValueError(
                "reselect must be False with given masks, as no budget says what others may keep; got True"
            )

    def improve(self, layer: Layer, seen: Statistics, budget: Budget | None, first: Pruned) -> Pruned:
        """Choose the mask anew, if that is asked for, and fit the values to it."""
        dense = layer.matrices(weight_of(layer)).double()
        hessian = damped(seen, self.damping)
        scale = hessian.diagonal(dim1=-2, dim2=-1).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)[:, None]  # of the columns
        hessian = hessian / (scale * scale.mT)
        target = dense * scale
        mask = first.mask
        start = layer.matrices(first.values).double() * scale
        if self.reselect:
            assert budget is not None
            mask, start = self._split(layer, hessian, target, budget, mask, start)
        stays = layer.matrices(layer.expand(mask))
        values = fitted(hessian, target, stays, torch.where(stays, start, 0.0), self.steps, self.tolerance)
        return Pruned(layer.from_matrices(values / scale), mask)

    def _split(
        self,
        layer: Layer,
        hessian: torch.Tensor,
        target: torch.Tensor,
        budget: Budget,
        mask: torch.Tensor,
        start: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask that the splitting comes to rest at, and the sparse weights there."""
        dtype = wide(layer.values().dtype)  # to choose by; the values are fitted in float64
        values, vectors = (part.to(dtype) for part in torch.linalg.eigh(hessian))
        wanted, start = (target @ hessian).to(dtype) @ vectors, start.to(dtype)
        stays = layer.matrices(layer.expand(mask))
        sparse, multipliers, rho = torch.where(stays, start, 0.0), torch.zeros_like(start), _FIRST_RHO
        looked_at, all_kept = mask, max(int(mask.count_nonzero()), 1)
        for iteration in range(1, self.iterations + 1):
            right = wanted + (rho * sparse - multipliers) @ vectors
            moved = (right / (values[:, None] + rho)) @ vectors.mT
            proposed = moved + multipliers / rho
            mask = budget.best(block_sums(layer, layer.from_matrices(proposed.square())))
            sparse = torch.where(layer.matrices(layer.expand(mask)), proposed, 0.0)
            multipliers = multipliers + rho * (moved - sparse)
            if iteration % _LOOK_EVERY == 0:
                changed = int((mask ^ looked_at).count_nonzero())
                if not changed:
                    break
                looked_at = mask
                rho *= next(factor for part, factor in _FASTER if changed > part * all_kept)
        return mask, sparse.double()


def fitted(
    hessian: torch.Tensor, target: torch.Tensor, stays: torch.Tensor, start: torch.Tensor, steps: int, tolerance: float
) -> torch.Tensor:
    """Weights W, zero where `stays` is False, that minimise trace((W - W_0) H (W - W_0)^T), each row by itself.

    Args:
        hessian: H, [groups, n, n].
        target: W_0, [groups, rows, n].
        stays: bool, likewise.
        start: where to begin, likewise; zero where `stays` is False.
        steps: of conjugate gradients, at most.
        tolerance: norm of the residual in the end, of that at first.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)[:, None]
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)  # 0: an input that is always zero
    weights = start
    residual = torch.where(stays, (target - weights) @ hessian, 0.0)
    first = residual.square().sum()
    conditioned = residual * inverse
    direction = conditioned
    product = (residual * conditioned).sum(-1, keepdim=True)
    for _ in range(steps):
        if bool(residual.square().sum() <= tolerance**2 * first):
            break
        turned = torch.where(stays, direction @ hessian, 0.0)
        curvature = (direction * turned).sum(-1, keepdim=True)
        length = torch.where(curvature > 0, product / curvature, 0.0)  # 0: this row is solved
        weights = weights + length * direction
        residual = residual - length * turned
        conditioned = residual * inverse
        following = (residual * conditioned).sum(-1, keepdim=True)
        direction = conditioned + torch.where(product > 0, following / product, 0.0) * direction
        product = following
    return weights
