"""The Hessian of a layer's squared error, made regular, and its factor."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spartan.pruning.layers import Layer
from spartan.pruning.statistics import Statistics

__all__ = ["Factor", "damped", "factor", "root"]

_TRIES = 12  # each ten times as much damping as the one before
_CHUNK = 1 << 17  # entries that change places at a time
_SMALL = 128  # sides of a matrix that is inverted at once
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
        matrix = damped(seen, damping)
        _reverse_(matrix)
        columns = matrix.mT  # as LAPACK reads it, so that it is factored in place
        failed = torch.empty(len(matrix), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(columns, out=(columns, failed))
        if not bool(failed.any()):
            _reverse_(matrix)
            return matrix.mT, damping
        damping = max(10 * damping, _LEAST)
    raise ValueError(f"the Hessian of {name!r} cannot be factored, whatever the damping: look at its inputs")


def factor(layer: Layer, seen: Statistics, damping: float) -> Factor:
    """Factor the inverse: G + damping * mean(diag G) * I = R R^T with R upper triangular, and U = R^-1.

    More damping is added, tenfold each time, where the matrix is singular all the same.

    Raises:
        ValueError: no damping helps, which means that the inputs are not finite.
    """
    upper, used = root(layer.name, seen, damping)
    _invert_(upper)
    note = _why_singular(seen)
    if note:
        note = f"{note}; damped by {used:g} of its mean diagonal"
    return Factor(upper, note)


def _reverse_(matrices: torch.Tensor) -> None:
    """Reverse the order of rows and that of columns [groups, n, n], in place, some entries at a time."""
    flat = matrices.view(len(matrices), -1)
    count = flat.shape[-1]
    for start in range(0, count // 2, _CHUNK):
        end = min(start + _CHUNK, count // 2)
        first, last = flat[:, start:end], flat[:, count - end : count - start]
        kept = first.flip(-1)
        first.copy_(last.flip(-1))
        last.copy_(kept)


def _invert_(upper: torch.Tensor) -> None:
    """Invert upper triangular matrices [groups, n, n] in place: of [A B; 0 C] it is [A^-1, -A^-1 B C^-1; 0, C^-1]."""
    n = upper.shape[-1]
    if n <= _SMALL:
        identity = torch.eye(n, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True))
        return
    first, last = slice(0, n // 2), slice(n // 2, n)
    _invert_(upper[:, first, first])
    _invert_(upper[:, last, last])
    half = upper[:, first, last] @ upper[:, last, last]
    upper[:, first, last] = upper[:, first, first] @ half.neg_()


def _why_singular(seen: Statistics) -> str:
    n = seen.squares.shape[-1]
    if seen.count < n:
        return f"its Hessian is singular, as {seen.count} inputs have fewer dimensions than {n}"
    dead = int((seen.squares == 0).sum())
    return f"its Hessian is singular, as {dead} of its {seen.squares.numel()} inputs are always zero" if dead else ""
