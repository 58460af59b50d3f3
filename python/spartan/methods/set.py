"""Sparse evolutionary training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spartan.masks import MaskSet
from spartan.methods.rewiring import Rewiring
from spartan.methods.static_random import draw_scores

__all__ = ["SET"]


@dataclass(frozen=True, kw_only=True)
class SET(Rewiring):
    """Train a sparse network; every `interval` steps drop its smallest blocks and grow others at random.

    After step t the share f = alpha / 2 (1 + cos(pi t / T)) of the kept weights is dropped; as many are grown, drawn
    uniformly from all that are not kept then. Grown weights start at zero, with the optimizer's momentum of them
    reset. Gradients are those of kept weights alone.

    Attributes:
        distribution: "erk" unless said otherwise.
        fraction: alpha, the share dropped at first, in [0, 1].
        interval: steps between changes, an int of at least 1, or a float: a fraction of all steps.
        end: T as a fraction of the steps, after which masks are fixed.
        seed: of the draws, which do not touch PyTorch's global generator.

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", Nature Communications 2018; the schedule of the share from Dettmers and Zettlemoyer, 2019.
    """

    takes_shards = True

    def growth(self, masks: MaskSet) -> dict[str, torch.Tensor]:
        """A draw of its own for every step, the same after resuming."""
        return draw_scores(masks, self.seed, masks.step)
