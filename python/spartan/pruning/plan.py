"""What each layer may keep: its budget alone, or its share of one over several layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from spartan.budgets import BlockCosts, CostModel, PricePerBlock, distribute, shares
from spartan.methods.base import MaskSettings
from spartan.pruning.layers import Layer
from spartan.pruning.selection import joint_masks, kept_cost
from spartan.sparsifier.parts import Part, kept_by_part, price_parts

__all__ = ["Planned", "plan_of"]

Scores = Callable[[Sequence[Layer]], list[torch.Tensor]]


@dataclass
class Planned:
    """A layer with what it may keep.

    Attributes:
        amount: the most that its kept blocks may cost; None: its mask is given.
        part: whose layers give each other what is left of a block; None: it lends nothing.
    """

    layer: Layer
    amount: float | None
    part: int | None = None


def plan_of(
    model: nn.Module,
    settings: MaskSettings | None,
    parts: Sequence[Part],
    count: str,
    costs: CostModel | PricePerBlock | None,
    scores: Scores,
) -> dict[str, Planned]:
    """The layers of all parts by name, with their budgets; `scores` makes those of several layers comparable.

    Raises:
        ValueError: a sparsity that cannot be reached.
    """
    if settings is None:
        return {c.name: Planned(Layer(c, part.block_size), None) for part in parts for c in part.weights}
    if costs is not None:
        parts, _ = price_parts(parts, costs, model)
    plan: dict[str, Planned] = {}
    together: list[tuple[list[Planned], float]] = []
    amounts = kept_by_part(parts, settings.sparsity, _counted(model, parts, count))
    for index, (part, kept) in enumerate(zip(parts, amounts, strict=True)):
        own: Sequence[BlockCosts | None] = part.costs or [None] * len(part.weights)
        layers = [Layer(c, part.block_size, part.pattern, cost) for c, cost in zip(part.weights, own, strict=True)]
        lends = index if part.pattern is None and isinstance(part.distribution, str) else None
        budgets = distribute(part.sizes(), kept, part.distribution)
        for members, amount in zip(shares(part.sizes(), part.distribution), budgets, strict=True):
            planned = [Planned(layers[i], amount, lends) for i in members]
            if len(planned) > 1:
                together.append((planned, amount))
            plan.update({one.layer.name: one for one in planned})
    _share_out(together, scores)
    return plan


def _counted(model: nn.Module, parts: Sequence[Part], count: str) -> float:
    """What a sparsity is a fraction of: the cost of all weights, their number, or that of all parameters."""
    sizes = [size for part in parts for size in part.sizes()]
    if count == "masked" or any(size.cost is not None for size in sizes):
        return sum(size.total for size in sizes)
    return sum(weight.numel() for weight in model.parameters())


def _share_out(together: Sequence[tuple[list[Planned], float]], scores: Scores) -> None:
    """Give layers that share a budget what they keep of it when the blocks of all compete."""
    if not together:
        return
    grids = dict(zip(*_scored([one.layer for planned, _ in together for one in planned], scores), strict=True))
    for planned, amount in together:
        values = [grids[one.layer.name] for one in planned]
        costs = [_costs_of(one.layer, grid) for one, grid in zip(planned, values, strict=True)]
        masks = joint_masks(values, amount, costs)
        kept = [kept_cost(mask, one.layer.costs) for one, mask in zip(planned, masks, strict=True)]
        kept[0] += amount - sum(kept)  # what is left of a block
        for one, own in zip(planned, kept, strict=True):
            one.amount = own


def _scored(layers: list[Layer], scores: Scores) -> tuple[list[str], list[torch.Tensor]]:
    grids = scores(layers)
    return [layer.name for layer in layers], [grid.to(grids[0].device, torch.float32) for grid in grids]


def _costs_of(layer: Layer, grid: torch.Tensor) -> float | torch.Tensor:
    return layer.costs.to(grid) if isinstance(layer.costs, torch.Tensor) else layer.costs
