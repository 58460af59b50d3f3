"""RigL: rigging the lottery."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spartan.masks import MaskSet
from spartan.methods.rewiring import Rewiring

__all__ = ["RigL"]


@dataclass(frozen=True, kw_only=True)
class RigL(Rewiring):
    """Train a sparse network; every `interval` steps drop its smallest blocks and grow those of largest gradient.

    After step t the share f = alpha / 2 (1 + cos(pi t / T)) of the kept weights is dropped; as many are grown, those
    of largest mean |dL/dw| among all that are not kept then, with the gradient of step t: dense, accumulated and
    reduced as the optimizer gets it. Only the steps before a change compute it; the others differentiate kept blocks
    alone. Grown weights start at zero, with the optimizer's momentum of them reset; one that is dropped and grown at
    once stays as it is.

    Attributes:
        distribution: "erk" unless said otherwise.
        fraction: alpha, the share dropped at first, in [0, 1].
        interval: steps between changes, an int of at least 1, or a float: a fraction of all steps.
        end: T as a fraction of the steps, after which masks are fixed.
        seed: of the first masks, whose draw does not touch PyTorch's global generator.

    Source: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134.
    """

    takes_shards = True

    def start(self, masks: MaskSet) -> None:
        """Draw the first masks."""
        super().start(masks)
        self._look(masks)

    def correct_gradients(self, masks: MaskSet) -> None:
        """Before a change, read the dense gradient and leave the optimizer that of kept weights."""
        if masks.frozen or not self.due(masks, masks.step + 1):
            return
        for tensor in masks.tensors:
            grad = tensor.gradient
            tensor.remembered = None
            if grad is not None:
                tensor.remembered = tensor.magnitudes(grad) / masks.gradient_scale()
                grad.mul_(tensor.expand(tensor.hard.to(grad.dtype)))

    def update(self, masks: MaskSet) -> None:
        """Drop and grow, and let the next step compute dense gradients if masks change after it."""
        super().update(masks)
        if not masks.frozen:
            self._look(masks)
        for tensor in masks.tensors:
            tensor.remembered = None

    def growth(self, masks: MaskSet) -> dict[str, torch.Tensor]:
        """Magnitude of the gradient; none where a weight took no part in the step."""
        growth = {}
        for tensor in masks.tensors:
            none = torch.zeros_like(tensor.hard, dtype=tensor.seen.dtype)
            growth[tensor.name] = none if tensor.remembered is None else tensor.remembered
        return growth

    def _look(self, masks: MaskSet) -> None:
        for tensor in masks.tensors:
            tensor.carrier.mask_straight_through = self.due(masks, masks.step + 1)
