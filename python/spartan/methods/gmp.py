"""Gradual magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass

from spartan.masks import MaskSet
from spartan.methods.base import SparseMethod, require_interval, require_number, require_order, steps_of, too_rare
from spartan.methods.schedules import Cubic

__all__ = ["GMP"]


@dataclass(frozen=True, kw_only=True)
class GMP(SparseMethod):
    """Remove the blocks of smallest mean magnitude little by little; what is removed stays removed.

    s_t = s_f (1 - (1 - (t - t0) / (t1 - t0))^3) every `interval` steps between t0 and t1.

    Attributes:
        begin: fraction of the steps at which pruning starts.
        end: fraction of the steps at which the sparsity is reached; at least `begin`. The rest fine-tunes.
        interval: steps between updates of the masks, an int of at least 1, or a float: a fraction of all steps.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, equation (1), from initial sparsity 0.
    """

    begin: float = 0.0
    end: float = 0.75
    interval: int | float = 0.02

    takes_shards = True
    keeps_zeros = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("begin", self.begin, 0.0, 1.0)
        require_number("end", self.end, 0.0, 1.0)
        require_order("begin", self.begin, "end", self.end)
        require_interval(self.interval)

    def shortfall(self, total_steps: int) -> str | None:
        """No step but the last at which to prune."""
        return too_rare("it prunes once, not little by little", self.interval, total_steps, self.begin, self.end)

    def start(self, masks: MaskSet) -> None:
        """With `end` 0, prune at once."""
        self.update(masks)

    def update(self, masks: MaskSet) -> None:
        """Prune further when an interval is over."""
        if masks.frozen:
            return
        t0, t1 = self.begin * masks.total_steps, self.end * masks.total_steps
        if masks.step >= t1:
            self.finish(masks)
        elif masks.step > t0 and masks.step % steps_of(self.interval, masks.total_steps) == 0:
            # An optimizer that is not known moves dropped weights too; at zero they cannot be selected again.
            masks.project()
            masks.select(Cubic(0.0, 1.0, t0, t1)(masks.step))
            masks.project()
            masks.rest_dropped()

    def finish(self, masks: MaskSet) -> None:
        """Prune to the sparsity asked for, and fix the masks."""
        if not masks.frozen:
            masks.project()
            super().finish(masks)
