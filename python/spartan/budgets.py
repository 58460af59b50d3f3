"""Budgets: how many weights a model may keep, and how layers share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["DISTRIBUTIONS", "LayerSize", "distribute", "kept_total", "shares"]

DISTRIBUTIONS = ("global", "uniform", "erk")
_BISECTIONS = 200


@dataclass(frozen=True)
class LayerSize:
    """What a budget needs to know of a masked weight.

    Attributes:
        shape: of the weight.
        largest_block: number of weights in its largest block.
    """

    shape: tuple[int, ...]
    largest_block: int

    @property
    def count(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def shares(layers: Sequence[LayerSize], distribution: str) -> list[list[int]]:
    """Which layers (by index) share a budget: one group of all for "global", one of each for "uniform" and "erk".

    Raises:
        ValueError: an unknown distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}; got {distribution!r}")
    if distribution == "global":
        return [list(range(len(layers)))]
    return [[index] for index in range(len(layers))]


def kept_total(layers: Sequence[LayerSize], sparsity: float, counted: int, distribution: str) -> int:
    """How many masked weights stay, so that zeros are the fraction `sparsity` of `counted` weights.

    K = sum of layer sizes - round(sparsity * counted).

    Args:
        layers: the masked weights.
        sparsity: asked for, in [0, 1).
        counted: number of weights that the fraction refers to: those of the model, or the masked ones.
        distribution: every group of layers that shares a budget keeps at least one block.

    Raises:
        ValueError: K is too small; the message says which sparsity can be reached.
    """
    masked = sum(layer.count for layer in layers)
    floor = sum(max(layers[i].largest_block for i in group) for group in shares(layers, distribution))
    kept = masked - round(sparsity * counted)
    if kept < floor:
        reachable = math.floor((masked - floor) / counted * 1e6) / 1e6
        raise ValueError(
            f"sparsity {sparsity} cannot be reached: {masked} of the {counted} counted weights are masked and"
            f" {distribution} budgets keep at least one block each; at most {max(reachable, 0.0)} can"
        )
    return kept


def distribute(layers: Sequence[LayerSize], kept: int, distribution: str) -> list[int]:
    """Budget of each group of `shares`, in weights; they sum to `kept` exactly.

    "uniform": the same kept fraction in every layer. "erk" (Erdos-Renyi kernel): density_l = eps * sum(dims)
    / prod(dims), capped at 1, with eps solved for the budget. Each keeps at least one block.

    Source: Evci et al., "Rigging the Lottery", ICML 2020, for ERK.
    """
    groups = shares(layers, distribution)
    if distribution == "global":
        return [kept]
    weights = [float(layer.count if distribution == "uniform" else sum(layer.shape)) for layer in layers]
    low = [float(layer.largest_block) for layer in layers]
    high = [float(layer.count) for layer in layers]
    exact = _scaled(weights, low, high, kept)
    assert len(groups) == len(exact)
    return _whole(exact, low, high, kept)


def _scaled(weights: list[float], low: list[float], high: list[float], total: float) -> list[float]:
    """clamp(eps * weight, low, high), with eps such that they sum to `total`."""

    def at(eps: float) -> list[float]:
        return [min(max(eps * w, lo), hi) for w, lo, hi in zip(weights, low, high, strict=True)]

    below, above = 0.0, max(hi / w for w, hi in zip(weights, high, strict=True))
    for _ in range(_BISECTIONS):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(at(middle)) < total else (below, middle)
    return at(above)


def _whole(exact: list[float], low: list[float], high: list[float], total: int) -> list[int]:
    """Whole numbers next to `exact`, within the bounds, that sum to `total`: largest remainders are rounded up."""
    whole = [max(math.floor(x), int(lo)) for x, lo in zip(exact, low, strict=True)]
    missing = total - sum(whole)
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for index in [i for i in by_remainder if whole[i] < high[i]][:missing]:
        whole[index] += 1
    return whole
