"""What goes on from a mask, be it one that a first stage chooses or one that is given."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spartan.methods.base import MaskSettings
from spartan.pruning.base import Pruned, Pruner, weight_of
from spartan.pruning.layers import Layer
from spartan.pruning.selection import Budget
from spartan.pruning.statistics import Statistics

__all__ = ["GivenMasks", "SecondStage"]


class GivenMasks(Pruner):
    """Masks by name of the weight, bool and of its shape; True stays."""

    needs_inputs = False

    def __init__(self, masks: Mapping[str, torch.Tensor]) -> None:
        if not masks:
            raise ValueError("first must have a mask for at least one weight; got an empty mapping")
        for name, mask in masks.items():
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                shown = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise TypeError(f"first must map names of weights to bool tensors; got {shown} for {name!r}")
        self._masks = dict(masks)

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        """They."""
        return self._masks

    @property
    def masking(self) -> None:
        """None: nothing is chosen."""
        return None

    def require(self, layer: Layer) -> None:
        """Raise ValueError unless there is a mask of the weight's shape."""
        shape = tuple(layer.candidate.weight.shape)
        if tuple(self.masks[layer.name].shape) != shape:
            raise ValueError(f"mask of {layer.name!r} must be {shape}; got {tuple(self.masks[layer.name].shape)}")

    def scores(self, layer: Layer, seen: Statistics | None, relative: torch.Tensor | None = None) -> torch.Tensor:
        """Refused: masks that are given have none, and no budget is shared.

        Raises:
            TypeError: always.
        """
        raise TypeError("masks that are given have no scores")

    def prune(self, layer: Layer, seen: Statistics | None, budget: Budget | None) -> Pruned:
        """Take the mask."""
        mask = self.masks[layer.name].to(layer.candidate.weight.device)
        return Pruned(weight_of(layer), layer.oriented(mask))


@dataclass(frozen=True)
class SecondStage(Pruner):
    """A way to improve on the mask of a first stage.

    Attributes:
        first: a score or another second stage; or masks of the weights by name, bool and of their shapes.
    """

    first: Pruner | Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        if isinstance(self.first, Mapping):
            object.__setattr__(self, "first", GivenMasks(self.first))
        if not isinstance(self.first, Pruner):
            raise TypeError(
                f"first must be a score such as spartan.Wanda(sparsity=0.5), or masks by name; got {self.first!r}"
            )

    @property
    def stage(self) -> Pruner:
        """The first stage."""
        assert isinstance(self.first, Pruner)
        return self.first

    @property
    def name(self) -> str:
        """Its own and the first stage's."""
        return f"{type(self).__name__} after {self.stage.name}"

    @property
    def scorer(self) -> Pruner:
        """The first stage's."""
        return self.stage.scorer

    @property
    def masking(self) -> MaskSettings | None:
        """The first stage's."""
        return self.stage.masking

    @property
    def masks(self) -> Mapping[str, torch.Tensor] | None:
        """The masks that were given, if any."""
        return self.stage.masks

    def require(self, layer: Layer) -> None:
        """As the first stage, and as what needs inputs."""
        super().require(layer)
        self.stage.require(layer)

    def scores(self, layer: Layer, seen: Statistics | None, relative: torch.Tensor | None = None) -> torch.Tensor:
        """Those of the first stage."""
        return self.stage.scores(layer, seen, relative)

    def prune(self, layer: Layer, seen: Statistics | None, budget: Budget | None) -> Pruned:
        """Let the first stage choose, and improve on that."""
        assert seen is not None
        first = self.stage.prune(layer, seen, budget)
        return self.improve(layer, seen, budget, first)._replace(note=first.note)

    @abstractmethod
    def improve(self, layer: Layer, seen: Statistics, budget: Budget | None, first: Pruned) -> Pruned:
        """A better mask, better values, or both."""
