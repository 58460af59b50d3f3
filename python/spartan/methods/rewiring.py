"""What SET, RigL and GSE share: sparse from the first step on, with blocks dropped and grown now and then."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch

from spartan.budgets import Distribution
from spartan.masks import MaskSet
from spartan.methods.base import SparseMethod, require_interval, require_number, steps_of, too_rare
from spartan.methods.static_random import draw_scores, require_seed

__all__ = ["Rewiring"]

_NO_GROWTH = 1e-30  # less than that of any block with a gradient


@dataclass(frozen=True, kw_only=True)
class Rewiring(SparseMethod):
    """Begin with random blocks; every `interval` steps drop the smallest and grow as many by `growth`.

    After step t the share f = alpha / 2 (1 + cos(pi t / T)) of the kept weights is dropped, those of smallest mean
    magnitude, and the room is given to the best of all that are not kept then. A grown weight starts at zero, with
    the optimizer's momentum of it reset, and what Adam and its kin divide by like that of settled weights, so that its
    first steps are no longer than theirs; one that is dropped and grown at once stays as it is, which the dropped do
    before any that would not grow from zero. After T = `end` of the
    steps the masks are fixed. The number of kept weights never changes.

    With `keep_zeros=True` of the sparsifier the first masks are of blocks that are not zero, the largest that fit,
    instead of random ones; should they be fewer than the budget, the first change fills it.

    The masks have exactly the sparsity asked for. The trained weights may have more zeros: a kept one is still zero if
    it got no gradient since it was grown, as that of an embedding not looked up, of a unit that is never active, or of
    any weight where the last change is the last step.
    """

    distribution: Distribution = "erk"
    fraction: float = 0.3
    interval: int | float = 0.02
    end: float = 0.75
    seed: int = 0

    grows_from_zero = True
    takes_pattern = False
    keeps_zeros = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("fraction", self.fraction, 0.0, 1.0)
        require_interval(self.interval)
        require_number("end", self.end, 0.0, 1.0)
        require_seed(self.seed)

    @abstractmethod
    def growth(self, masks: MaskSet) -> dict[str, torch.Tensor]:
        """How much each block deserves to be grown, at least 0, summed over its weights; by name."""

    def shortfall(self, total_steps: int) -> str | None:
        """No step after which masks change."""
        return too_rare("its random masks never change", self.interval, total_steps, 0.0, self.end)

    def start(self, masks: MaskSet) -> None:
        """Draw the first masks, or take those of a model that is sparse already."""
        masks.select(1.0, None if masks.keep_zeros else draw_scores(masks, self.seed))
        masks.project()

    def update(self, masks: MaskSet) -> None:
        """Drop and grow when an interval is over; fix the masks at their time."""
        if masks.frozen:
            return
        if masks.step >= self.end * masks.total_steps:
            self.finish(masks)
        elif self.due(masks, masks.step):
            self._rewire(masks)

    def finish(self, masks: MaskSet) -> None:
        """Fix the masks, which have the sparsity asked for all along."""
        if not masks.frozen:
            masks.freeze()

    def due(self, masks: MaskSet, step: int) -> bool:
        """Whether masks change after that step."""
        return step % steps_of(self.interval, masks.total_steps) == 0 and step < self.end * masks.total_steps

    def share(self, masks: MaskSet) -> float:
        """f, the share of the kept weights that is dropped after this step."""
        return self.fraction / 2 * (1 + math.cos(math.pi * masks.step / (self.end * masks.total_steps)))

    def _rewire(self, masks: MaskSet) -> None:
        if not masks.optimizers:
            raise ValueError(
                f"{self.name} resets the optimizer's moments of the weights it grows and has no optimizer:"
                " attach(optimizer), or by hand step(optimizer)"
            )
        growth = self.growth(masks)
        masks.project()  # momentum moves dropped weights too
        before = [tensor.hard.clone() for tensor in masks.tensors]
        self._drop(masks)
        self._grow(masks, growth, before)
        masks.project()
        for tensor, old in zip(masks.tensors, before, strict=True):
            masks.begin_moments(tensor, tensor.hard & ~old, tensor.hard & old)

    def _drop(self, masks: MaskSet) -> None:
        for group in masks.groups:
            kept = sum(tensor.kept_cost() for tensor in group.tensors)
            scores = [torch.where(t.hard, t.magnitudes(t.values), -t.costs.to(t.seen.dtype)) for t in group.tensors]
            group.select(kept - round(self.share(masks) * kept), scores)

    def _grow(self, masks: MaskSet, growth: dict[str, torch.Tensor], before: list[torch.Tensor]) -> None:
        """Fill the budgets up: first the blocks that are still kept, then by growth, then those just dropped."""
        scores = {}
        for tensor, old in zip(masks.tensors, before, strict=True):
            some = growth[tensor.name].clamp(min=_NO_GROWTH)
            growth[tensor.name] = torch.where(old & ~tensor.hard, some, growth[tensor.name])
        for group in masks.groups:
            best = group.largest([growth[t.name] / t.costs for t in group.tensors])
            for tensor in group.tensors:
                first = ((1 + 2 * best) * tensor.costs).to(best.dtype)
                scores[tensor.name] = torch.where(tensor.hard, first, growth[tensor.name])
        masks.select(1.0, scores)
