"""Budgets: how many weights a model may keep, or how much they may cost, and how layers share that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["DISTRIBUTIONS", "Distribution", "LayerSize", "distribute", "kept_total", "require_distribution", "shares"]

DISTRIBUTIONS = ("global", "uniform", "erk")
Distribution = str | Mapping[str, float]
_BISECTIONS = 200
_ROUNDING = 1e-6  # of a sparsity as messages print it
_EQUAL = 1e-12  # of sums of costs in another order


@dataclass(frozen=True)
class LayerSize:
    """What a budget needs to know of a masked weight.

    Attributes:
        shape: of the weight.
        largest_block: number of weights in its largest block; with a cost model, the cost of its dearest block.
        name: of the weight.
        cost: of all its blocks, in the unit of `largest_block`; None where the budget counts weights.
        stacked: how many of its first dimensions count matrices of their own, such as experts.
    """

    shape: tuple[int, ...]
    largest_block: float
    name: str = ""
    cost: float | None = None
    stacked: int = 0

    @property
    def erk(self) -> float:
        """Its density with ERK, but for a factor that all share: sum(dims) / prod(dims), of each matrix of a stack."""
        sides = self.shape[self.stacked :]
        return sum(sides) / math.prod(sides)

    @property
    def count(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def total(self) -> float:
        """What keeping all of it takes of a budget."""
        return self.count if self.cost is None else self.cost


def require_distribution(value: Any) -> None:
    """Raise unless `value` is the name of a distribution, or sparsities by name or pattern.

    Raises:
        TypeError: neither a string nor a dictionary. ValueError: an unknown name, an empty dictionary, a sparsity
            outside [0, 1).
    """
    if isinstance(value, str):
        if value not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}; got {value!r}")
        return
    if not isinstance(value, Mapping):
        raise TypeError(f"distribution must be a name or a dictionary of sparsities; got {type(value).__name__}")
    if not value:
        raise ValueError("distribution must name at least one weight; got an empty dictionary")
    for pattern, sparsity in value.items():
        number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
        if not isinstance(pattern, str) or not number or not 0.0 <= sparsity < 1.0:
            raise ValueError(
                f"distribution must give names or patterns sparsities in [0, 1); got {pattern!r}: {sparsity!r}"
            )


def shares(layers: Sequence[LayerSize], distribution: Distribution) -> list[list[int]]:
    """Which layers (by index) share a budget.

    One group of all for "global", one of each for "uniform" and "erk"; with a dictionary one of each layer that it
    names and one, the last, of all others.

    Raises:
        ValueError: an unknown distribution, or a dictionary with a pattern that matches no layer.
    """
    require_distribution(distribution)
    if distribution == "global":
        return [list(range(len(layers)))]
    if isinstance(distribution, str):
        return [[index] for index in range(len(layers))]
    own = _named(layers, distribution)
    others = [index for index in range(len(layers)) if index not in own]
    return [[index] for index in own] + ([others] if others else [])


def kept_total(layers: Sequence[LayerSize], sparsity: float, counted: float, distribution: Distribution) -> float:
    """How much of the masked weights stays, so that what goes is the fraction `sparsity` of `counted`.

    K = sum of the layers' totals - sparsity * counted; a whole number where weights are counted.

    Args:
        layers: the masked weights.
        sparsity: asked for, in [0, 1).
        counted: what the fraction refers to: the weights of the model, the masked ones, or their cost.
        distribution: every group of layers that shares a budget keeps at least one block.

    Raises:
        ValueError: K is too small, or the dictionary does not let it be met; the message says which sparsity can be
            reached.
    """
    masked = sum(layer.total for layer in layers)
    removed = sparsity * counted
    kept = masked - (round(removed) if _whole_weights(layers) else removed)
    low, high = _limits(layers, distribution)
    if low * (1 - _EQUAL) <= kept <= high * (1 + _EQUAL):
        return kept
    named = not isinstance(distribution, str)
    if named and low == high and abs(kept - low) <= 1 + _ROUNDING * counted:  # no layer is left to take the rest
        return low
    unit = "cost" if not _whole_weights(layers) else "weights"
    least, most = _removable(masked - high, counted, math.ceil), _removable(masked - low, counted, math.floor)
    reach = f"at most {most} can"
    if named:
        reach = f"only {least} can, as every weight is named" if least >= most else f"{least} to {most} can"
    raise ValueError(
        f"sparsity {sparsity} cannot be reached: {masked:.10g} of the {counted:.10g} counted {unit} are masked and"
        f" {'named' if named else distribution} budgets keep at least one block each; {reach}"
    )


def distribute(layers: Sequence[LayerSize], kept: float, distribution: Distribution) -> list[float]:
    """Budget of each group of `shares`; they sum to `kept`, exactly where weights are counted.

    "uniform": the same kept fraction in every layer. "erk" (Erdos-Renyi kernel): density_l = eps * sum(dims)
    / prod(dims), capped at 1, with eps solved for the budget. A dictionary: 1 - its sparsity of each layer that it
    names, and the rest for the others. Each keeps at least one block.

    Source: Evci et al., "Rigging the Lottery", ICML 2020, for ERK.
    """
    if distribution == "global":
        return [kept]
    if not isinstance(distribution, str):
        own = list(_named(layers, distribution).values())
        return own + ([kept - sum(own)] if len(own) < len(layers) else [])
    weights = [layer.total * (layer.erk if distribution == "erk" else 1.0) for layer in layers]
    low = [float(layer.largest_block) for layer in layers]
    high = [float(layer.total) for layer in layers]
    exact = _scaled(weights, low, high, kept)
    return list(_whole(exact, low, high, int(kept))) if _whole_weights(layers) else exact


def _whole_weights(layers: Sequence[LayerSize]) -> bool:
    return all(layer.cost is None for layer in layers)


def _named(layers: Sequence[LayerSize], distribution: Mapping[str, float]) -> dict[int, float]:
    """Budget of each layer, by index, that the dictionary names: exactly, or by the first pattern that matches."""
    used = set()
    budgets = {}
    for index, layer in enumerate(layers):
        patterns = [layer.name] if layer.name in distribution else list(distribution)
        pattern = next((p for p in patterns if fnmatchcase(layer.name, p)), None)
        if pattern is None:
            continue
        used.add(pattern)
        kept = layer.total * (1.0 - distribution[pattern])
        budgets[index] = max(round(kept) if layer.cost is None else kept, layer.largest_block)
    unused = [pattern for pattern in distribution if pattern not in used]
    if unused:
        raise ValueError(
            f"distribution names {unused[0]!r}, which matches no masked weight that an entry before it does not;"
            f" masked are {[layer.name for layer in layers]}"
        )
    return budgets


def _limits(layers: Sequence[LayerSize], distribution: Distribution) -> tuple[float, float]:
    """The least and the most that all layers together can keep."""
    groups = shares(layers, distribution)
    if isinstance(distribution, str):
        return sum(max(layers[i].largest_block for i in group) for group in groups), sum(x.total for x in layers)
    own = _named(layers, distribution)
    others = [layer for index, layer in enumerate(layers) if index not in own]
    named = sum(own.values())
    return named + max((x.largest_block for x in others), default=0), named + sum(x.total for x in others)


def _removable(amount: float, counted: float, rounded: Callable[[float], int]) -> float:
    return max(rounded(amount / counted * 1e6) / 1e6, 0.0)


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
