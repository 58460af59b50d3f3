"""Sparse dictionary learning: a weight as a dictionary times coefficients of which each output has a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from spartan.methods.base import require_number
from spartan.pruning.admm import fitted
from spartan.pruning.hessian import root
from spartan.pruning.statistics import Statistics

__all__ = ["CoSpaDi", "Factors"]

_RIDGE = 1e-9  # of the mean of a diagonal: atoms that nobody uses leave a matrix singular
_ENOUGH = 1e-3  # a step that gains less than this part of the error is the last
_TOLERANCE = 1e-6  # where conjugate gradients end, as a fraction of the first residual


class Factors(NamedTuple):
    """W ~ C D.

    Attributes:
        dictionary: D [atoms, in]. coefficients: C [out, atoms], with the same number of entries that are not zero in
            each row. error: squared error of the outputs on the calibration inputs, as a fraction of their squares.
    """

    dictionary: torch.Tensor
    coefficients: torch.Tensor
    error: float


@dataclass(frozen=True, kw_only=True)
class CoSpaDi:
    """Factor W [out, in] into C D with `nonzeros` coefficients for each output, by the error of the outputs.

    With G = sum x x^T over the calibration inputs and G + damping * mean(diag G) * I = R R^T,

        minimise ||(W - C D) R||^2   such that each row of C has at most s entries that are not zero.

    In P = D R and B = W R this is dictionary learning: B ~ C P. P begins with the first right singular vectors of
    B. Then by turns: a gradient step on C and the s largest of each row choose which coefficients there are (hard
    thresholding pursuit), conjugate gradients fit them, and P is their least squares (method of optimal directions);
    an atom that no row uses becomes what is left of the worst row.
    The layer y = x W^T + b becomes a product with D and a sparse one with C; of `in out` numbers remain
    atoms * in + s * out.

    Attributes:
        compression: part of the numbers that goes, in (0, 1).
        ratio: atoms / s: with a larger one there are more directions to choose from, and each output has fewer.
        steps: turns, at most. damping: added to the diagonal of G, as a fraction of its mean.

    Raises:
        TypeError, ValueError: a setting outside its range, named.

    Source: Shopkhoev et al., "CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning", 2025, arXiv
    2509.22075, for the problem and its calibration; Foucart, "Hard Thresholding Pursuit", SIAM J. Numer. Anal. 2011,
    and Engan et al., "Method of optimal directions", ICASSP 1999, for how it is solved here.

    Example::

        result = spartan.factorize(model, spartan.CoSpaDi(compression=0.4), batches)
    """

    compression: float
    ratio: float = 2.0
    steps: int = 20
    damping: float = 0.01

    def __post_init__(self) -> None:
        require_number("compression", self.compression, 0.0, 1.0)
        if not 0 < self.compression < 1:
            raise ValueError(f"compression must be above 0 and below 1; got {self.compression}")
        require_number("ratio", self.ratio, 1.0)
        require_number("damping", self.damping, 0.0)
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps must be an int of at least 1; got {self.steps!r}")

    def sizes(self, out: int, in_: int) -> tuple[int, int]:
        """(atoms, coefficients of an output) with at most (1 - compression) * in * out numbers.

        Raises:
            ValueError: not even one of each is so small.
        """
        most = (1 - self.compression) * out * in_
        nonzeros = max(1, int(most / (self.ratio * in_ + out)))
        atoms = int((most - nonzeros * out) / in_)
        if atoms < nonzeros or atoms < 1:
            raise ValueError(
                f"compression must leave an atom and a coefficient for each output: {self.compression} of {out} x {in_}"
                " does not"
            )
        return atoms, nonzeros

    def factor(self, weight: torch.Tensor, seen: Statistics, name: str = "weight") -> Factors:
        """D and C of a weight [out, in] called `name`, in float64; its inputs have `seen.products` [1, in, in]."""
        upper = root(name, seen, self.damping)[0][0]
        target = weight.double() @ upper
        atoms, nonzeros = self.sizes(*target.shape)
        dictionary = _first_atoms(target, atoms)
        coefficients = torch.zeros(len(target), atoms, dtype=target.dtype, device=target.device)
        best, total = (coefficients, dictionary), float(target.square().sum())
        least = total
        for _ in range(self.steps):
            coefficients = _coded(target, dictionary, coefficients, nonzeros)
            dictionary = _solved(coefficients.mT @ coefficients, coefficients.mT @ target)
            error = float((target - coefficients @ dictionary).square().sum())
            if not error < least:
                break
            gained, least, best = 1 - error / least, error, (coefficients, dictionary)
            if gained < _ENOUGH:
                break
            left = target - coefficients @ dictionary
            size = dictionary.norm(dim=1, keepdim=True)
            scale = torch.where(size > 0, size, 1.0)
            dictionary, coefficients = _revived(dictionary / scale, coefficients, left), coefficients * scale.mT
        coefficients, dictionary = best
        dictionary = torch.linalg.solve_triangular(upper, dictionary, upper=True, left=False)
        return Factors(dictionary, coefficients, least / total if total > 0 else 0.0)


def _first_atoms(target: torch.Tensor, atoms: int) -> torch.Tensor:
    """The directions in which the rows of the target [out, in] spread most; where there are not so many, rows too."""
    directions = torch.linalg.svd(target, full_matrices=False)[2][:atoms]
    if len(directions) == atoms:
        return directions
    rows = target[target.norm(dim=1).argsort(descending=True)[: atoms - len(directions)]]
    more = torch.cat([directions, rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)])
    return torch.cat([more, more.new_zeros(atoms - len(more), more.shape[1])])


def _revived(dictionary: torch.Tensor, coefficients: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """The dictionary, with what is left of the worst rows in the place of atoms that no row uses."""
    unused = (coefficients != 0).sum(0) == 0
    number = min(int(unused.sum()), len(left))
    if number:
        size, worst = left.norm(dim=1).topk(number)
        where = unused.nonzero()[:number, 0]
        dictionary = dictionary.index_copy(0, where, left[worst] / size.clamp(min=1e-300)[:, None])
    return dictionary


def _coded(target: torch.Tensor, dictionary: torch.Tensor, before: torch.Tensor, nonzeros: int) -> torch.Tensor:
    """Coefficients [out, atoms], `nonzeros` of each row, fitted to the target with these atoms."""
    gram = dictionary @ dictionary.mT
    wanted = target @ dictionary.mT
    step = 1 / float(torch.linalg.eigvalsh(gram)[-1].clamp(min=1e-300))
    ahead = before + step * (wanted - before @ gram)
    stays = torch.zeros_like(before, dtype=torch.bool).scatter_(1, ahead.abs().topk(nonzeros, 1).indices, True)
    exact = _solved(gram, wanted.mT).mT
    start = torch.where(stays, before, 0.0)
    return fitted(gram[None], exact[None], stays[None], start[None], 4 * nonzeros, _TOLERANCE)[0]


def _solved(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The solution of a symmetric system that may be singular."""
    ridge = _RIDGE * matrix.diagonal().mean().clamp(min=1e-300)
    lower = torch.linalg.cholesky(matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))
    return torch.cholesky_solve(right, lower)
