"""N:M masks for training: each n of m neighbours are a budget of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spartan.distributed import total_over
from spartan.masks.mask_set import MaskedTensor, MaskGroup
from spartan_kernels import hard_topk, soft_topk

__all__ = ["PatternGroup", "require_divisible"]


class PatternGroup(MaskGroup):
    """One weight [out, in, ...] of whose every m neighbours along `in` the n of largest magnitude stay.

    The soft mask is m_i = sigmoid(beta |theta_i| + mu), with mu for each group of m such that the m_i of the group sum
    to k; the hard one keeps floor(k). k goes from m to n. Equation (2) has an r for each group of m.
    """

    def __init__(self, tensor: MaskedTensor, pattern: tuple[int, int]) -> None:
        self.pattern = pattern
        self.dim = _input_dim(tensor.transposed)
        n, m = pattern
        require_divisible(tensor.name, tensor.values.shape, pattern, tensor.transposed)  # the part of this rank
        super().__init__([tensor], tensor.size.count // m * n, lends=False)

    def select(self, budget: float, scores: Sequence[torch.Tensor] | None = None) -> None:
        """Write the hard mask of the best of each m neighbours."""
        tensor = self.tensors[0]
        self._refuse_together()
        values = tensor.values.abs() if scores is None else scores[0]
        try:
            mask = hard_topk(self._rows(values), self._kept_of_each(budget), dim=self.dim + 1)
        except ValueError:
            self._require_finite()
            raise
        tensor.hard.copy_(mask.flatten(self.dim, self.dim + 1))
        self.changed()

    def correct_gradients(self) -> None:
        """Complete the gradient with the coupling term of equation (2), which is that of each group of m.

        g_i m_i = grad_i theta_i / (1 + beta (1 - m_i) |theta_i|);  r = sum (1 - m_i) g_i m_i / sum m_i (1 - m_i).
        """
        tensor = self.tensors[0]
        if tensor.weight.grad is None:
            return
        weight, grad = tensor.values, tensor.gradient_or_zeros()
        wide = torch.promote_types(weight.dtype, torch.float32)
        theta, soft = self._rows(weight).to(wide), self._rows(tensor.soft).to(wide)
        beta, rest = tensor.carrier.mask_beta.to(wide), 1 - soft
        spread = soft * rest
        gained = self._rows(grad).to(wide) * theta / (1 + beta * rest * theta.abs())
        share, total = (rest * gained).sum(self.dim + 1, keepdim=True), spread.sum(self.dim + 1, keepdim=True)
        multiplier = torch.where(total > 0, share / total, 0.0)  # where all is decided nothing is coupled
        grad.sub_((theta.sign() * spread * (beta * multiplier)).flatten(self.dim, self.dim + 1))

    def _solve(self, budget: float, beta: float | torch.Tensor) -> None:
        tensor = self.tensors[0]
        self._refuse_together()
        carrier, soft = tensor.carrier, tensor.soft
        carrier.mask_beta.fill_(beta)
        kept = self._kept_of_each(budget)
        values = self._rows(tensor.values.abs())
        try:
            soft.copy_(
                soft_topk(values, kept, beta=carrier.mask_beta, dim=self.dim + 1).flatten(self.dim, self.dim + 1)
            )
        except ValueError:
            self._require_finite()
            raise
        hard = hard_topk(values, kept, dim=self.dim + 1)
        tensor.hard.copy_(hard.flatten(self.dim, self.dim + 1))
        # The hard threshold that beta can be relative to: the mean over the groups of m.
        self.state = self.state.to(self.device)
        least = torch.where(hard, values, torch.inf).amin(self.dim + 1).double()
        total, count = total_over(torch.stack([least.sum(), torch.ones_like(least).sum()]), self.group)
        self.state[2] = total / count

    def _refuse_together(self) -> None:
        """Over ranks, refuse on all of them what one would: here each chooses alone, and would go on."""
        if self.group and self.device.type == "cpu":
            self._require_finite()

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        m = self.pattern[1]
        return values.unflatten(self.dim, (values.shape[self.dim] // m, m))

    def _kept_of_each(self, budget: float) -> float:
        """The budget of one group of m; rounding must not make 2 - 1e-16 of 2, of which only one would fit."""
        return round(min(budget / self.capacity, 1.0) * self.pattern[1], 9)


def require_divisible(name: str, shape: Sequence[int], pattern: tuple[int, int], transposed: bool = False) -> None:
    """Raise ValueError unless groups of m fill the rows of the weight `name`."""
    dim = _input_dim(transposed)
    if shape[dim] % pattern[1]:
        raise ValueError(
            f"weight {name!r} of shape {tuple(shape)} does not divide into groups of {pattern[1]} along its dimension"
            f" {dim}, as pattern {pattern} needs; leave it out with exclude="
        )


def _input_dim(transposed: bool) -> int:
    """The dimension of input features or channels."""
    return 0 if transposed else 1
