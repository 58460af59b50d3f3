"""Guided stochastic exploration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from spartan.distributed import least_positive
from spartan.masks import MaskedTensor, MaskSet
from spartan.methods.activity import Activity
from spartan.methods.base import require_number
from spartan.methods.rewiring import Rewiring
from spartan.methods.static_random import generator_at
from spartan_kernels import block_grid

__all__ = ["GSE"]


@dataclass(frozen=True, kw_only=True)
class GSE(Rewiring):
    """Train a sparse network; every `interval` steps grow the best of a few candidates that activity suggests.

    After step t the share f = alpha / 2 (1 + cos(pi t / T)) of the kept weights is dropped, the smallest, and as many
    are grown: those of largest mean |dL/dw| among the candidates. These are drawn after step t - 1, in each layer
    gamma times as many as it keeps, each independently with the probability

        p(o, i)  ~  g_o f_i,   f_i = sum_n |x_ni|,   g_o = sum_n |(dL/dy)_no|        (an upper bound of |dL/dw_oi|)

    over the samples n of step t - 1; draws that repeat or are kept already are left out. Kernel positions, and the
    weights of modules that are no linear or convolution layers (as in attention), are drawn uniformly. The gradient of
    step t is that of kept weights and candidates: with blocks, no other is computed; with single weights, whose
    products are dense in any method, no other is read. Grown weights start at zero, with the optimizer's momentum of
    them reset. Where candidates are too few, the largest of what was dropped stay.

    Over ranks the sums f and g run over all of them, each of which draws the same: those of the mesh that divides the
    weight, else of the default process group, on each of which the model trains.

    Attributes:
        distribution: "erk" unless said otherwise.
        candidates: gamma, above 0.
        fraction: alpha, the share dropped at first, in [0, 1].
        interval: steps between changes, an int of at least 1, or a float: a fraction of all steps.
        end: T as a fraction of the steps, after which masks are fixed.
        seed: of the draws, which do not touch PyTorch's global generator.

    Source: Heddes, Srinivasa, Givargis, Nicolau, "Always-Sparse Training by Growing Connections with Guided Stochastic
    Exploration", arXiv 2401.06898, with the distribution of the gradient's bound.
    """

    candidates: float = 1.0

    backward_masks = True
    takes_shards = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("candidates", self.candidates, 0.0)
        if self.candidates == 0:
            raise ValueError("candidates must be above 0; got 0")

    def start(self, masks: MaskSet) -> None:
        """Draw the first masks."""
        super().start(masks)
        for tensor in masks.tensors:
            tensor.observer = Activity(tensor)
        self._look(masks)

    def resume(self, masks: MaskSet) -> None:
        """Watch the passes of the next step if candidates are drawn after it."""
        if not masks.frozen:
            for tensor in masks.tensors:
                tensor.observer.open()
        self._watch(masks)

    def correct_gradients(self, masks: MaskSet) -> None:
        """Before a change, read the gradients of the candidates and leave the optimizer those of kept weights."""
        if masks.frozen or not self.due(masks, masks.step + 1):
            return
        for tensor in masks.tensors:
            grad, hard = tensor.gradient, tensor.hard
            tensor.remembered = None
            if grad is not None:
                assert tensor.backward is not None  # drawn a step before
                looked_at = tensor.magnitudes(grad).where(tensor.backward & ~hard, 0)
                tensor.remembered = looked_at / masks.gradient_scale()
                grad.mul_(tensor.expand(hard.to(grad.dtype)))

    def update(self, masks: MaskSet) -> None:
        """Drop and grow, and let the next step compute the gradients of candidates if masks change after it."""
        super().update(masks)
        self._look(masks)
        for tensor in masks.tensors:
            tensor.remembered = None

    def finish(self, masks: MaskSet) -> None:
        """Fix the masks, and watch no longer."""
        super().finish(masks)
        self._watch(masks)

    def growth(self, masks: MaskSet) -> dict[str, torch.Tensor]:
        """Magnitude of the gradient for candidates; kept blocks come after them, by their own magnitude."""
        growth = {}
        for group in masks.groups:
            gradients = [
                torch.zeros_like(t.hard, dtype=t.seen.dtype) if t.remembered is None else t.remembered
                for t in group.tensors
            ]
            kept = [t.magnitudes(t.values) * t.hard for t in group.tensors]
            costs = [t.costs for t in group.tensors]
            means = [gradient / a for gradient, a in zip(gradients, costs, strict=True)]
            least = least_positive(means, group.group).clamp(max=1)
            largest = group.largest([values / a for values, a in zip(kept, costs, strict=True)])
            below = torch.where(largest > 0, least / (2 * largest), 0.0)
            for tensor, gradient, values in zip(group.tensors, gradients, kept, strict=True):
                growth[tensor.name] = gradient + (below * values).to(gradient.dtype)
        return growth

    def _look(self, masks: MaskSet) -> None:
        """Set which gradients the next step computes."""
        if masks.frozen:
            return
        due = self.due(masks, masks.step + 1)
        generator = generator_at(self.seed, masks.step + 1)  # that of step 0 drew the first masks
        for tensor in masks.tensors:
            tensor.carrier.mask_straight_through = due
            # Always a tensor: copies of the model that follow it, as averages do, count on its buffers staying.
            kept = tensor.carrier.mask_hard
            tensor.set_backward(kept | self._draw(tensor, generator) if due else kept, everywhere=True)
        self._watch(masks)

    def _watch(self, masks: MaskSet) -> None:
        for tensor in masks.tensors:
            tensor.observer.clear()
            tensor.observer.active = not masks.frozen and self.due(masks, masks.step + 2)
            if masks.frozen:
                tensor.observer.close()

    def _draw(self, tensor: MaskedTensor, generator: torch.Generator) -> torch.Tensor:
        """Blocks drawn with replacement, one for each that is kept (times gamma), as a mask.

        They are drawn among those of the whole weight, on every rank alike; the mask is of all that is computed with
        here.
        """
        grid = block_grid(tensor.shape, tensor.carrier.mask_block_size)
        count = math.ceil(self.candidates * tensor.kept_blocks())
        sums = tensor.observer.by_block()
        rows, columns = (
            (torch.ones(side, device=generator.device) for side in grid[:2])
            if sums is None
            else (side.cpu() for side in sums)
        )
        positions = math.prod(grid[2:])
        index = _pick(rows, count, generator) * grid[1] + _pick(columns, count, generator)
        index = index * positions + torch.randint(positions, (count,), generator=generator, device=generator.device)
        chosen = torch.zeros(math.prod(grid), dtype=torch.bool, device=tensor.seen.device)
        chosen[index.to(chosen.device)] = True
        return tensor.seen.slice_of(chosen.reshape(grid))


def _pick(weights: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices drawn independently, in proportion to the weights; never one of weight zero."""
    ends = weights.double().cumsum(0)
    draw = torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device) * ends[-1]
    return torch.searchsorted(ends, draw, right=True).clamp(max=int(weights.nonzero().max()))
