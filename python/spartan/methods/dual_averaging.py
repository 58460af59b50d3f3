"""Dual averaging: the forward pass uses the largest weights, and its gradient trains all of them."""

from __future__ import annotations

from dataclasses import dataclass

from spartan.masks import MaskSet
from spartan.methods.base import SparseMethod, require_interval, require_number, require_order, steps_of, too_rare
from spartan.methods.schedules import Linear, Schedule

__all__ = ["DualAveraging"]


@dataclass(frozen=True, kw_only=True)
class DualAveraging(SparseMethod):
    """Keep dense weights theta, multiply by the largest of them, train all: theta <- theta - eta G.

    w = theta h with h the blocks of largest mean |theta| within the budget, G = dL/dw, straight through h. This is
    Spartan without the soft mask. The kept fraction goes from 1 to the target linearly over the first `ramp` of the
    steps; after `freeze` of them the mask is fixed, and the rest fine-tunes.

    Attributes:
        ramp: fraction of the steps over which the budget shrinks; 0: sparse from the first step.
        freeze: fraction of the steps after which the mask is fixed; at least `ramp`.
        interval: steps between updates of the masks, an int of at least 1, or a float: a fraction of all steps.

    Source: Tai, Tian, Lim, "Spartan", NeurIPS 2022, section 3.3; Xiao, "Dual averaging methods for regularized
    stochastic learning", JMLR 2010.
    """

    ramp: float = 0.2
    freeze: float = 0.8
    interval: int | float = 1

    straight_through = True
    takes_shards = True
    keeps_zeros = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("ramp", self.ramp, 0.0, 1.0)
        require_number("freeze", self.freeze, 0.0, 1.0)
        require_order("ramp", self.ramp, "freeze", self.freeze)
        require_interval(self.interval)

    def shortfall(self, total_steps: int) -> str | None:
        """No step but the last at which masks are chosen."""
        return too_rare("it chooses its masks once", self.interval, total_steps, 0.0, self.freeze)

    def start(self, masks: MaskSet) -> None:
        """Without a ramp, select at once."""
        self.update(masks)

    def update(self, masks: MaskSet) -> None:
        """Select anew when an interval is over; fix the masks at their time."""
        if masks.frozen:
            return
        if masks.step >= self.freeze * masks.total_steps:
            self.finish(masks)
        elif masks.step % steps_of(self.interval, masks.total_steps) == 0:
            self.choose(masks)

    def choose(self, masks: MaskSet) -> None:
        """Select the masks of the next forward pass."""
        masks.select(self.schedule(masks.total_steps)(masks.step))

    def schedule(self, total_steps: int) -> Schedule:
        """Part of the way from dense to the target, by step."""
        return Linear(0.0, 1.0, 0, self.ramp * total_steps)
