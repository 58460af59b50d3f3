"""Dynamic pruning with feedback."""

from __future__ import annotations

from dataclasses import dataclass

from spartan.methods.dual_averaging import DualAveraging
from spartan.methods.schedules import Cubic, Schedule

__all__ = ["DPF"]


@dataclass(frozen=True, kw_only=True)
class DPF(DualAveraging):
    """Take the gradient at the pruned weights, apply it to the dense ones, prune those anew now and then.

    theta <- theta - eta g(theta h), with h the blocks of largest mean |theta|: what was pruned too early keeps
    learning from the error and comes back. The sparsity follows s_t = s_f (1 - (1 - t / t1)^3).

    Attributes:
        ramp: t1 as a fraction of the steps.
        freeze: fraction of the steps after which the mask is fixed; at least `ramp`. The default never fixes it.
        interval: steps between updates of the masks, an int of at least 1 (published: 16), or a float: a fraction of
            all steps.

    Source: Lin, Stich, Barba, Dmitriev, Jaggi, "Dynamic Model Pruning with Feedback", ICLR 2020.
    """

    ramp: float = 0.5
    freeze: float = 1.0
    interval: int | float = 0.01

    def schedule(self, total_steps: int) -> Schedule:
        """Cubic, as in gradual magnitude pruning."""
        return Cubic(0.0, 1.0, 0, self.ramp * total_steps)
