"""Sparse-refined straight-through estimation."""

from __future__ import annotations

from dataclasses import dataclass

from spartan.masks import MaskSet
from spartan.methods.base import require_number
from spartan.methods.dual_averaging import DualAveraging

__all__ = ["SRSTE"]


@dataclass(frozen=True, kw_only=True)
class SRSTE(DualAveraging):
    """Train dense weights by the sparse network's gradient, and pull those that are masked now towards zero.

    w = theta h with h the n of largest |theta| of each m neighbours, anew in every step, G = dL/dw:

        theta <- theta - eta (G + lambda (1 - h) theta)

    The decay of what is masked makes it less likely to come back, so that the masks settle. Weight decay of the
    optimizer comes on top, for all weights.

    Attributes:
        pattern: (n, m); None for the sparsity and blocks of the other methods.
        strength: lambda, at least 0.
        ramp: fraction of the steps over which the budget shrinks; 0, as published: sparse from the first step.
        freeze: fraction of the steps after which the mask is fixed; at least `ramp`. The default never fixes it.
        interval: steps between updates of the masks, an int of at least 1, or a float: a fraction of all steps.

    Source: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch", ICLR 2021,
    arXiv 2102.04010.
    """

    pattern: tuple[int, int] | None = (2, 4)
    strength: float = 2e-4
    ramp: float = 0.0
    freeze: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("strength", self.strength, 0.0)

    def correct_gradients(self, masks: MaskSet) -> None:
        """Add the decay of what is masked."""
        if masks.frozen or not self.strength:
            return
        strength = self.strength * masks.gradient_scale()
        for tensor in masks.tensors:
            grad = tensor.gradient
            if grad is not None:
                decay = (~tensor.hard).to(grad.dtype) * strength
                grad.addcmul_(tensor.expand(decay.to(grad.dtype)), tensor.values)
