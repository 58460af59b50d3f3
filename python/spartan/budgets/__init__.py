"""What may be kept: shares of a budget for each weight, what a weight costs, and measured times."""

from __future__ import annotations

from spartan.budgets.costs import (
    BlockCosts,
    CostModel,
    FLOPs,
    LayerCost,
    Parameters,
    PricedWeight,
    PricePerBlock,
    one_forward,
    price,
)
from spartan.budgets.distributions import (
    DISTRIBUTIONS,
    Distribution,
    LayerSize,
    distribute,
    kept_total,
    require_distribution,
    shares,
)
from spartan.budgets.latency import LatencyEntry, LatencyTable

__all__ = [
    "DISTRIBUTIONS",
    "BlockCosts",
    "CostModel",
    "Distribution",
    "FLOPs",
    "LatencyEntry",
    "LatencyTable",
    "LayerCost",
    "LayerSize",
    "Parameters",
    "PricePerBlock",
    "PricedWeight",
    "distribute",
    "kept_total",
    "one_forward",
    "price",
    "require_distribution",
    "shares",
]
