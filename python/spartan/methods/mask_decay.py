"""Decaying masks: what will be dropped fades away, and its gradient with it."""

from __future__ import annotations

from dataclasses import dataclass

from spartan.masks import MaskSet
from spartan.methods.base import SparseMethod, changes_in, require_number, require_order
from spartan.methods.schedules import Exponential, Linear, Schedule

__all__ = ["MaskDecay"]

SHAPES = ("linear", "exponential")


@dataclass(frozen=True, kw_only=True)
class MaskDecay(SparseMethod):
    """Multiply the weights outside the mask by a factor that goes from 1 to 0, in the forward pass and in the backward.

        w = theta (h + (1 - h) d_t),   dL/dtheta = dL/dw (h + (1 - h) d_t)

    with h the n of largest |theta| of each m neighbours, anew in every step; d_t = 1 up to t0 = `begin`, then 1 - x or
    exp(-rate x), with x in [0, 1) the part of the way to t1 = `end`, where the mask is fixed and the rest of the steps
    fine-tunes. No weight is zero before that.

    Attributes:
        pattern: (n, m); None for the sparsity and blocks of the other methods.
        begin: fraction of the steps that are dense.
        end: fraction of the steps after which the mask is fixed; at least `begin`.
        decay: "exponential" or "linear".
        rate: of the exponential decay; exp(-rate) is what is cut off in the end.

    Source: Bambhaniya et al., "Progressive gradient flow for robust N:M sparsity training in transformers",
    arXiv 2402.04744, mask decay gradient flow (MdGf).
    """

    pattern: tuple[int, int] | None = (2, 4)
    begin: float = 0.0
    end: float = 0.8
    decay: str = "exponential"
    rate: float = 5.0

    soft = True
    takes_shards = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("begin", self.begin, 0.0, 1.0)
        require_number("end", self.end, 0.0, 1.0)
        require_order("begin", self.begin, "end", self.end)
        if self.decay not in SHAPES:
            raise ValueError(f"decay must be one of {', '.join(SHAPES)}; got {self.decay!r}")
        require_number("rate", self.rate, 0.0)

    def shortfall(self, total_steps: int) -> str | None:
        """No step in which the weights outside the mask fade."""
        if self.begin == self.end or changes_in(1, total_steps, self.begin, self.end):
            return None
        return f"it has no step to fade in: begin={self.begin:g} and end={self.end:g} of them are less than two apart"

    def start(self, masks: MaskSet) -> None:
        """With no time to decay, fix the masks at once."""
        self.update(masks)

    def update(self, masks: MaskSet) -> None:
        """Select anew and fade the others, or fix the masks at their time."""
        factor = self.schedule(masks.total_steps)(masks.step)
        if masks.frozen or factor == 1.0:
            return
        if factor == 0.0:
            self.finish(masks)
            return
        masks.select(1.0)
        for tensor in masks.tensors:
            tensor.soft.fill_(factor).masked_fill_(tensor.hard, 1.0)
            tensor.hard.fill_(True)
            tensor.changed(soft=True)

    def finish(self, masks: MaskSet) -> None:
        """Select for the last time, and fix the masks."""
        if not masks.frozen:
            for tensor in masks.tensors:
                tensor.soft.fill_(1.0)
                tensor.changed(soft=True)
            super().finish(masks)

    def schedule(self, total_steps: int) -> Schedule:
        """d_t, by step."""
        begin, end = self.begin * total_steps, self.end * total_steps
        if self.decay == "linear":
            return Linear(1.0, 0.0, begin, end)
        return Exponential(1.0, 0.0, begin, end, self.rate)
