"""What is known of the inputs of a weight: their number, sums, squares and products."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from spartan.pruning.layers import wide

__all__ = ["Statistics", "collected"]

_ROWS = 256  # of a weight whose outputs are measured at a time


def collected(inputs: Iterable[tuple[int, torch.Tensor]], name: str, *, products: bool) -> Statistics:
    """What `inputs` of the weight `name` are like: numbers of batches, and their rows [groups, rows, n].

    Raises:
        ValueError: some are not finite, or too large to square.
    """
    seen = Statistics(products=products)
    for batch, rows in inputs:
        seen.add(rows)
        if not seen.finite:
            raise ValueError(f"batches[{batch}] makes inputs of {name!r} that are not finite, or too large to square")
    return seen


class Statistics:
    """Sums over the inputs x of one or several matrices, in float32 at least.

    Attributes:
        count: number of inputs.
        total: sum x, [groups, n].
        squares: sum x_j^2, [groups, n].
        products: G = sum x x^T, [groups, n, n]; None where only squares were asked for.
    """

    def __init__(self, *, products: bool) -> None:
        self.count = 0
        self._whole = products
        self._total: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs [groups, rows, n]."""
        inputs = inputs.to(wide(inputs.dtype))
        if self._total is None or self._squares is None:
            groups, _, n = inputs.shape
            self._total = inputs.new_zeros(groups, n, dtype=torch.float64)
            self._squares = inputs.new_zeros(groups, n, n) if self._whole else torch.zeros_like(self._total)
        self.count += inputs.shape[1]
        self._total += inputs.sum(1, dtype=torch.float64)
        if self._whole:
            self._squares.baddbmm_(inputs.mT, inputs)
        else:
            self._squares += inputs.square().sum(1, dtype=torch.float64)

    def settle(self) -> bool:
        """Take inputs that are all zero for independent ones of size 1; whether all were, of any of the matrices."""
        if self._total is None or self._squares is None:
            return False
        idle = ~self.squares.any(-1)
        if not bool(idle.any()):
            return False
        ones = self._squares.new_ones(self._total.shape[-1])
        self._squares[idle] = ones.diag() if self._whole else ones
        return True

    @property
    def total(self) -> torch.Tensor:
        """Sum of the inputs."""
        assert self._total is not None
        return self._total

    @property
    def squares(self) -> torch.Tensor:
        """Sum of the squares of each input."""
        assert self._squares is not None
        return self._squares.diagonal(dim1=-2, dim2=-1) if self._whole else self._squares

    @property
    def products(self) -> torch.Tensor | None:
        """Sum of the products of each two inputs."""
        return self._squares if self._whole else None

    @property
    def finite(self) -> bool:
        """Whether all inputs so far were finite, and their squares too."""
        return self._total is None or bool((self.total + self.squares).isfinite().all())

    def spread(self, matrices: torch.Tensor) -> torch.Tensor:
        """Sum of squares of each output of matrices [groups, rows, n] about its mean, [groups, rows]; never zero.

        An output that hardly varies counts as one with a millionth of the mean over all.
        """
        assert self._whole and self._squares is not None
        about_zero = self._by_output(matrices)
        outputs = (matrices.double() @ self.total[..., None])[..., 0]
        spread = about_zero - outputs.square() / max(self.count, 1)
        return spread.clamp(min=1e-6 * float(spread.mean()) + torch.finfo(torch.float64).tiny)

    def energy(self, matrices: torch.Tensor) -> torch.Tensor:
        """Sum of squared outputs of matrices [groups, rows, n]: trace(W G W^T), without products its diagonal part."""
        if self._whole:
            return self._by_output(matrices).sum()
        return (matrices.square().sum(1).double() * self.squares).sum()

    def _by_output(self, matrices: torch.Tensor) -> torch.Tensor:
        """Sum of squares of each output of matrices [groups, rows, n] in float64, some rows at a time."""
        assert self._squares is not None
        products = self._squares.to(matrices.dtype)
        parts = [(part @ products).mul_(part).sum(-1, dtype=torch.float64) for part in matrices.split(_ROWS, 1)]
        return torch.cat(parts, 1)
