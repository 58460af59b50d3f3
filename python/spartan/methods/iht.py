"""Iterative hard thresholding."""

from __future__ import annotations

from dataclasses import dataclass

from spartan.masks import MaskSet
from spartan.methods.dual_averaging import DualAveraging

__all__ = ["IHT"]


@dataclass(frozen=True, kw_only=True)
class IHT(DualAveraging):
    """Step with the dense gradient, then project onto the k-sparse weights: theta <- H_k(theta - eta G).

    G is the gradient at the sparse weights, of all entries; H_k keeps the blocks of largest mean magnitude within
    the budget k and sets the others to zero. With `interval` above 1, dropped weights collect the gradients of
    that many steps before they compete; the forward pass is sparse all the while. With momentum or moments, eta G is
    what the optimizer makes of the dense gradients so far: those of dropped weights are kept, the weights made zero
    after each projection.

    Attributes:
        ramp: fraction of the steps over which k shrinks linearly from all weights; 0: sparse from the first step.
        freeze: fraction of the steps after which the support is fixed; at least `ramp`.
        interval: steps between projections, an int of at least 1, or a float: a fraction of all steps.

    Source: Blumensath and Davies, "Iterative hard thresholding for compressed sensing", 2009, equation (2); Jin et al.,
    "Training skinny deep neural networks with iterative hard thresholding methods", 2016.
    """

    ramp: float = 0.0

    grows_from_zero = True

    def choose(self, masks: MaskSet) -> None:
        """Select, and make zero what was not selected."""
        super().choose(masks)
        masks.project()
