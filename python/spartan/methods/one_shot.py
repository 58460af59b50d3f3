"""One-shot magnitude pruning with fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from spartan.masks import MaskSet
from spartan.methods.base import SparseMethod, require_number

__all__ = ["OneShot"]


@dataclass(frozen=True, kw_only=True)
class OneShot(SparseMethod):
    """Train dense, keep the blocks of largest mean magnitude once, then fine-tune with that mask.

    Attributes:
        prune_at: fraction of the steps after which to prune.
    """

    prune_at: float = 0.5

    takes_shards = True
    keeps_zeros = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("prune_at", self.prune_at, 0.0, 1.0)

    def start(self, masks: MaskSet) -> None:
        """With `prune_at` 0, prune what the model comes with."""
        self.update(masks)

    def update(self, masks: MaskSet) -> None:
        """Prune when the time has come."""
        if masks.step >= self.prune_at * masks.total_steps:
            self.finish(masks)
