"""What every way to prune a trained weight is: frozen settings, scores of blocks, and what becomes of the weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from spartan.budgets import Distribution
from spartan.methods.base import MaskSettings
from spartan.pruning.layers import Layer, require_whole_columns, wide
from spartan.pruning.selection import Budget
from spartan.pruning.statistics import Statistics
from spartan_kernels import block_scores

__all__ = ["Pruned", "Pruner", "Score", "block_sums", "weight_of"]


class Pruned(NamedTuple):
    """What becomes of a weight.

    Attributes:
        values: [out, in, *kernel], in float32 at least; those of dropped blocks do not count.
        mask: of its blocks, True for those that stay.
        note: what the user should know of it; empty: nothing.
    """

    values: torch.Tensor
    mask: torch.Tensor
    note: str = ""


class Pruner(ABC):
    """A way to prune a trained weight: settings only, no state.

    Attributes:
        needs_inputs: whether it needs the inputs of the weight. needs_products: whether their products too.
    """

    needs_inputs: bool = True
    needs_products: bool = False

    @property
    def name(self) -> str:
        """Name in reports."""
        return type(self).__name__

    @property
    def scorer(self) -> Pruner:
        """The method whose scores choose."""
        return self

    @property
    @abstractmethod
    def masking(self) -> MaskSettings | None:
        """The settings that say what the masks are like; None where `masks` are given."""

    @property
    def masks(self) -> Mapping[str, torch.Tensor] | None:
        """Masks that were given by name of the weight, in the place of settings; None: there are none."""
        return None

    def require(self, layer: Layer) -> None:
        """Raise ValueError where a layer is none for this method; asked before anything is changed."""
        if self.needs_inputs:
            require_whole_columns(layer)

    @abstractmethod
    def scores(self, layer: Layer, seen: Statistics | None, relative: torch.Tensor | None = None) -> torch.Tensor:
        """What dropping each block adds to the squared error of the layer's outputs, as this method estimates it.

        Args:
            layer: the weight.
            seen: what is known of its inputs; None where `needs_inputs` is False.
            relative: [groups, out / groups], what the squared error of each output is divided by; None: nothing.
        """

    @abstractmethod
    def prune(self, layer: Layer, seen: Statistics | None, budget: Budget | None) -> Pruned:
        """Choose a mask within the budget, and values for what stays.

        Args:
            layer: the weight.
            seen: what is known of its inputs; None where `needs_inputs` is False.
            budget: None where `masking` is.
        """


@dataclass(frozen=True, kw_only=True)
class Score(MaskSettings, Pruner):
    """Settings that `Magnitude`, `Wanda` and `OBS` share.

    Attributes:
        sparsity: fraction of zeros to reach, in [0, 1); with `pattern` it is 1 - n / m and may be left out.
        block_size: 1, an int or (rows, columns): blocks of weights that stay or go together.
        distribution: "uniform" (each layer the same), "erk", "global" (one budget over all layers: see `prune`), or
            the sparsity of some layers by name or pattern of names; the others then share one budget.
        pattern: (n, m), such as (2, 4): of each m neighbours along the input features (or channels) n stay. Takes the
            place of blocks and of the distribution.

    Raises:
        TypeError, ValueError: a setting of the wrong type or outside its range, named.
    """

    distribution: Distribution = "uniform"

    @property
    def masking(self) -> MaskSettings:
        """Itself."""
        return self


def block_sums(layer: Layer, scores: torch.Tensor) -> torch.Tensor:
    """Sum of the scores, none negative, [out, in, *kernel], of each block."""
    return scores if layer.block_size == (1, 1) else block_scores(scores.contiguous(), layer.block_size)


def weight_of(layer: Layer) -> torch.Tensor:
    """The weight [out, in, *kernel] in float32 at least."""
    values = layer.values()
    return values.to(wide(values.dtype))
