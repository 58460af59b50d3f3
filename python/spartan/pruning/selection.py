"""Masks within a budget: the blocks of largest score, over a layer or each row of it, or n of each m."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spartan.pruning.layers import Layer
from spartan_kernels import hard_topk, hard_topk_global

__all__ = ["Budget", "best_of_each", "joint_masks", "kept_cost", "within"]

# Sums of costs are rounded: a block that fits exactly must not be left out for that.
_COST_ROUNDING = 1e-9


@dataclass(frozen=True)
class Budget:
    """What a layer may keep.

    Attributes:
        layer: the weight.
        amount: the most that its kept blocks may cost; with a pattern n of each m stay instead.
    """

    layer: Layer
    amount: float

    def best(self, scores: torch.Tensor, *, by_output: bool = False) -> torch.Tensor:
        """The blocks to keep: those of largest score, divided by their cost, that fit.

        Args:
            scores: of each block, `layer.grid`.
            by_output: compare the blocks of a row with each other alone, where all cost the same: each row then keeps
                as many as the others, but for one.
        """
        if self.layer.pattern is not None:
            return best_of_each(scores, self.layer.pattern)
        if by_output and not isinstance(self.layer.costs, torch.Tensor):
            blocks = int(self.amount * (1 + _COST_ROUNDING) / self.layer.costs)
            return self.layer.from_strips(_by_rows(self.layer.in_strips(scores), blocks))
        return within(scores, self.amount, self.layer.costs)

    def used(self, mask: torch.Tensor) -> float:
        """What the blocks of a mask cost."""
        return kept_cost(mask, self.layer.costs)


def best_of_each(scores: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """The n largest of each m neighbours along the second dimension."""
    n, m = pattern
    groups = scores.unflatten(1, (scores.shape[1] // m, m))
    return hard_topk(groups, n, dim=2).flatten(1, 2)


def within(scores: torch.Tensor, budget: float, costs: float | torch.Tensor) -> torch.Tensor:
    """The entries of largest score / cost that fit into a budget."""
    capacity = float(costs.double().sum()) if isinstance(costs, torch.Tensor) else costs * scores.numel()
    if budget >= capacity:
        return torch.ones_like(scores, dtype=torch.bool)
    allowed = min(max(budget, 0.0) * (1 + _COST_ROUNDING), capacity)
    each = costs.to(scores.dtype).flatten() if isinstance(costs, torch.Tensor) else costs
    return hard_topk(scores.flatten(), allowed, each).view(scores.shape)


def joint_masks(
    scores: Sequence[torch.Tensor], budget: float, costs: Sequence[float | torch.Tensor]
) -> list[torch.Tensor]:
    """The entries of largest score / cost of all tensors together that fit into one budget."""
    capacity = sum(kept_cost(torch.ones_like(s, dtype=torch.bool), c) for s, c in zip(scores, costs, strict=True))
    allowed = min(budget * (1 + _COST_ROUNDING), capacity)
    return hard_topk_global(list(scores), allowed, list(costs))


def kept_cost(mask: torch.Tensor, costs: float | torch.Tensor) -> float:
    """What the entries of a mask cost."""
    if isinstance(costs, torch.Tensor):
        return float((mask * costs.double()).sum())
    return int(mask.count_nonzero()) * costs


def _by_rows(scores: torch.Tensor, blocks: int) -> torch.Tensor:
    """`blocks` entries, as many in each row [..., :]; what is left over goes to the rows whose next one is largest."""
    rows = scores.flatten(0, -2)
    each, over = divmod(min(blocks, rows.numel()), len(rows))
    mask = hard_topk(rows, each, dim=1)
    if over:
        following = hard_topk(rows, each + 1, dim=1) & ~mask
        mask |= _most(rows, following, over)
    mask &= rows > 0  # zeros that were there before keep no place that another row can use
    for among in (rows > 0, torch.ones_like(mask)):
        mask |= _most(rows, ~mask & among, min(blocks, rows.numel()) - int(mask.count_nonzero()))
    return mask.view(scores.shape)


def _most(rows: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest of some entries; all, where they are fewer."""
    if count >= int(among.count_nonzero()):
        return among
    return within(torch.where(among, rows, -torch.inf), count, 1.0)
