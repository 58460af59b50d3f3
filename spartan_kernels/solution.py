"""A soft mask as the solution of its solve: two numbers, of which the mask of single weights is computed.

    m = sigmoid(beta (|theta| / a - c) + d),   (c, d) a float64 tensor [2]

`solve_masks_` leaves it in its state where it is to write no soft mask; c is near the soft threshold, d the rest.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_solution", "soft_values", "with_values"]


def is_solution(soft: torch.Tensor | None, weight: torch.Tensor) -> bool:
    """Whether a soft mask of a weight (or of another mask) is a solution instead of one entry for each block."""
    return soft is not None and soft.dim() == 1 < weight.dim()


def soft_values(weight: torch.Tensor, soft: torch.Tensor, beta: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """m of each weight, from the solution, in the dtype of `weight`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    centre, shift = soft.to(wide)
    logits = weight.abs().to(wide).div_(costs.to(wide)).sub_(centre).mul_(beta.to(wide)).add_(shift)
    return logits.sigmoid_().to(weight.dtype)


def with_values(o: Any) -> Any:
    """Operands with the soft mask itself where a weight has its solution, which the native backend alone takes."""
    if not {"soft", "weight"}.issubset(o._fields) or not is_solution(o.soft, o.weight):
        return o
    return o._replace(soft=soft_values(o.weight, o.soft, o.beta, o.costs))
