"""Dense: no masks, so that the same loop trains the network to compare with."""

from __future__ import annotations

from dataclasses import dataclass

from spartan.masks import MaskSet
from spartan.methods.base import Method

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Method):
    """Leave the model as it is."""

    takes_shards = True

    def update(self, masks: MaskSet) -> None:
        """Nothing."""

    def finish(self, masks: MaskSet) -> None:
        """Nothing."""
