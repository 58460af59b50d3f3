"""Top-KAST: always-sparse forward pass, gradients for a somewhat larger set of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spartan.masks import MaskedTensor, MaskSet
from spartan.methods.base import SparseMethod, require_interval, require_number, steps_of, too_rare

__all__ = ["TopKAST"]

PENALTIES = ("l1", "l2")


@dataclass(frozen=True, kw_only=True)
class TopKAST(SparseMethod):
    """Multiply by the largest weights A only, train those of a larger set B, and leave all others as they are.

    A = the blocks of largest mean |theta| within the budget D, B = those within the budget D + M, so A lies in B.
    Forward theta 1_A; the gradient G of that masked weight reaches theta on B, where the penalty is added:
    G_i + lambda c_i p(theta_i), with c = 1 on A and 1/D on B without A (which keeps what has just entered B from
    staying for nothing), p = sign for the penalty lambda |theta| and p = theta for lambda theta^2 / 2.
    D is the kept fraction of the layer's budget. Weights outside B stay bit for bit what they are, whatever
    momentum, Adam moments and weight decay the optimizer has: a copy of theta is taken before it steps. On the CPU
    its memory is kept from step to step, as fresh memory costs more there than the whole step of the optimizer.
    With `keep_zeros=True` of the sparsifier, blocks of zeros never enter A or B.

    Attributes:
        sparsity: fraction of zeros of the forward pass, from the first step on.
        backward_sparsity: fraction of weights that get no gradient, at most `sparsity`; counted as `sparsity` is.
        penalty: "l2" or "l1".
        strength: lambda, at least 0.
        interval: steps between choices of A and B, an int of at least 1, or a float: a fraction of all steps.
        freeze: fraction of the steps after which A is fixed and alone trained.

    Source: Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, arXiv 2106.03517.
    """

    backward_sparsity: float
    penalty: str = "l2"
    strength: float = 1e-4
    interval: int | float = 0.02
    freeze: float = 1.0

    takes_shards = True
    keeps_zeros = True
    backward_masks = True

    straight_through = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("backward_sparsity", self.backward_sparsity, 0.0, self.sparsity)
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}; got {self.penalty!r}")
        require_number("strength", self.strength, 0.0)
        require_interval(self.interval)
        require_number("freeze", self.freeze, 0.0, 1.0)

    def shortfall(self, total_steps: int) -> str | None:
        """No step after which A and B are chosen anew."""
        what = "it chooses among the first weights alone"
        return too_rare(what, self.interval, total_steps, 0.0, self.freeze)

    def start(self, masks: MaskSet) -> None:
        """Choose A and B among the initial weights."""
        self._choose(masks)

    def correct_gradients(self, masks: MaskSet) -> None:
        """Restrict the gradients to B, add the penalty, and remember the weights."""
        if masks.frozen:
            return
        scale = masks.gradient_scale()
        for group in masks.groups:
            density = group.target / group.capacity
            for tensor in group.tensors:
                if tensor.gradient is not None:
                    self._correct(tensor, density, scale)

    def update(self, masks: MaskSet) -> None:
        """Undo what the optimizer did outside B; choose A and B anew when an interval is over."""
        if masks.frozen:
            return
        for tensor in masks.tensors:
            _restore(tensor)
        if masks.step >= self.freeze * masks.total_steps:
            self.finish(masks)
        elif masks.step % steps_of(self.interval, masks.total_steps) == 0:
            self._choose(masks)

    def finish(self, masks: MaskSet) -> None:
        """Select A within the budget, fix it, and let go of the memory."""
        super().finish(masks)
        for tensor in masks.tensors:
            tensor.spare = None

    def _choose(self, masks: MaskSet) -> None:
        masks.select(self.backward_sparsity / self.sparsity if self.sparsity else 1.0, from_all=True)
        larger = [tensor.hard.clone() for tensor in masks.tensors]
        masks.select(1.0)
        for tensor, chosen in zip(masks.tensors, larger, strict=True):
            # With ragged blocks, room that one budget leaves to the next could put a block into A alone.
            tensor.set_backward(chosen | tensor.hard)

    def _correct(self, tensor: MaskedTensor, density: float, scale: torch.Tensor | float) -> None:
        weight, grad = tensor.values, tensor.gradient
        assert grad is not None
        if self.strength:
            ascent = weight.sign() if self.penalty == "l1" else weight
            factor = torch.where(tensor.hard, self.strength * scale, self.strength / density * scale)
            factor, own, ascent = tensor.by_blocks(factor.to(grad.dtype), grad, ascent)
            own.addcmul_(factor, ascent)
        chosen, own = tensor.by_blocks(_backward(tensor).to(grad.dtype), grad)
        own.mul_(chosen)
        _remember(tensor)


def _remember(tensor: MaskedTensor) -> None:
    values, spare = tensor.values, tensor.spare
    tensor.spare = None
    if spare is None or spare.shape != values.shape or spare.dtype != values.dtype or spare.device != values.device:
        spare = torch.empty_like(values)
    tensor.remembered = spare.copy_(values)


def _restore(tensor: MaskedTensor) -> None:
    """Put back what the optimizer changed outside B."""
    if tensor.remembered is None:
        return
    chosen, weight, remembered = tensor.by_blocks(_backward(tensor), tensor.values, tensor.remembered)
    torch.where(chosen, weight, remembered, out=weight)
    tensor.spare = tensor.remembered if weight.device.type == "cpu" else None
    tensor.remembered = None


def _backward(tensor: MaskedTensor) -> torch.Tensor:
    backward = tensor.backward
    assert backward is not None  # from start on, until the masks are frozen
    return backward
