"""The Hessian of a layer's squared error, made regular, and its factor."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spartan.pruning.layers import Layer
from spartan.pruning.statistics import Statistics

__all__ = ["Factor", "damped", "factor", "root"]

_TRIES = 12  # each ten times as much damping as the one before
_LEAST = 1e-8  # of the mean of the diagonal: the first damping where none was asked for and it is needed


class Factor(NamedTuple):
    """U, upper triangular, with (G + damping * I)^-1 = U^T U, in float64 [groups, n, n].

    Its trailing part U[s:, s:] is the factor of the inverse of the trailing part of G + damping * I.
    `note`: what had to be done.
    """

    upper: torch.Tensor
    note: str


def damped(seen: Statistics, damping: float) -> torch.Tensor:
    """G + damping * mean(diag G) * I in float64; where all inputs are zero, the identity."""
    assert seen.products is not None
    matrix = seen.products.to(torch.float64, copy=True)
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(mean > 0, damping * mean, 1.0)
    matrix.diagonal(dim1=-2, dim2=-1).add_(added[:, None])
    return matrix


def root(name: str, seen: Statistics, damping: float) -> tuple[torch.Tensor, float]:
    """R, upper triangular, with G + damping * mean(diag G) * I = R R^T, and the damping that it took.

    Raises:
        ValueError: no damping helps, which means that the inputs of the weight `name` are not finite.
    """
    for _ in range(_TRIES):
        lower, failed = torch.linalg.cholesky_ex(damped(seen, damping).flip(-2, -1))
        if not bool(failed.any()):
            return lower.flip(-2, -1), damping
        damping = max(10 * damping, _LEAST)
    raise ValueError(f"the Hessian of {name!r} cannot be factored, whatever the damping: look at its inputs")


def factor(layer: Layer, seen: Statistics, damping: float) -> Factor:
    """Factor the inverse: G + damping * mean(diag G) * I = R R^T with R upper triangular, and U = R^-1.

    More damping is added, tenfold each time, where the matrix is singular all the same.

    Raises:
        ValueError: no damping helps, which means that the inputs are not finite.
    """
    upper, used = root(layer.name, seen, damping)
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device).expand_as(upper)
    note = _why_singular(seen)
    if note:
        note = f"{note}; damped by {used:g} of its mean diagonal"
    return Factor(torch.linalg.solve_triangular(upper, identity, upper=True), note)


def _why_singular(seen: Statistics) -> str:
    n = seen.squares.shape[-1]
    if seen.count < n:
        return f"its Hessian is singular, as {seen.count} inputs have fewer dimensions than {n}"
    dead = int((seen.squares == 0).sum())
    return f"its Hessian is singular, as {dead} of its {seen.squares.numel()} inputs are always zero" if dead else ""
