"""The masks of a model: weights grouped by the budget they share, and what a training method may do to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from spartan.budgets import LayerSize
from spartan.nn import MaskCarrier, largest_block, unmask_weight
from spartan_kernels import (
    block_scores,
    expand_blocks,
    hard_topk_global,
    masked_weight_correct_,
    masked_weight_coupling,
    new_solver_state,
    solve_masks_,
)

__all__ = ["Mask", "MaskGroup", "MaskSet", "MaskedTensor", "gradient_or_zeros"]

# Sharper than this a soft mask is a hard one in float32, and the solver's accuracy is no longer specified.
_SHARPEST = 1e6
# Sums of costs are rounded: a block that fits exactly must not be left out for that.
_COST_ROUNDING = 1e-9


class Mask(NamedTuple):
    """The masks of one weight, one entry per block: the weight in use is theta * soft * hard."""

    soft: torch.Tensor
    hard: torch.Tensor


@dataclass
class MaskedTensor:
    """A masked weight: its name in the model, the module that has it and the module that carries its masks.

    `parameter` is its name in that module, `shared` are the other modules that have it with its names there;
    `transposed`: its outputs are its second dimension.
    `cost` is that of all its blocks, where a cost model prices them.
    `remembered` is what a method keeps from before an optimizer step until after it, `observer` what it watches the
    module's passes with; no state between steps.
    """

    name: str
    module: nn.Module
    carrier: MaskCarrier
    parameter: str = "weight"
    shared: tuple[tuple[nn.Module, str], ...] = ()
    transposed: bool = False
    cost: float | None = None
    remembered: torch.Tensor | None = field(default=None, init=False)
    observer: Any = field(default=None, init=False)

    @property
    def weight(self) -> nn.Parameter:
        """The trained parameter theta, under the mask."""
        if self.carrier is self.module:
            return self.carrier.get_parameter(self.parameter)
        return self.module.get_parameter(f"parametrizations.{self.parameter}.original")

    @property
    def unstructured(self) -> bool:
        """Whether each weight is a block."""
        return self.carrier.mask_block_size == (1, 1)

    @property
    def size(self) -> LayerSize:
        """Shape and largest block, for budgets."""
        shape = self.weight.shape
        return LayerSize(tuple(shape), largest_block(shape, self.carrier.mask_block_size))

    @property
    def mask(self) -> Mask:
        """The masks now; a soft mask merged into the weight is ones."""
        hard, soft = self.carrier.mask_hard, self.carrier.mask_soft
        return Mask(torch.ones_like(hard, dtype=self.weight.dtype) if soft is None else soft, hard)

    def scores(self) -> torch.Tensor:
        """theta itself where each weight is a block (its magnitude counts), else the sum of |theta| of each block."""
        weight = self.weight.detach()
        return weight if self.unstructured else self.magnitudes(weight)

    def magnitudes(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of |values| of each block, for values shaped like the weight."""
        return values.abs() if self.unstructured else block_scores(values, self.carrier.mask_block_size)

    def expand(self, grid: torch.Tensor) -> torch.Tensor:
        """The value of each weight's block, in the weight's shape."""
        return expand_blocks(grid, self.weight.shape, self.carrier.mask_block_size)

    def kept(self) -> int:
        """Number of weights that the hard mask keeps."""
        return int((self.carrier.mask_hard * self.carrier.mask_sizes.double()).sum())

    def kept_cost(self) -> float:
        """What they take of the budget: their number, or the cost of their blocks."""
        return (
            self.kept()
            if self.cost is None
            else float((self.carrier.mask_hard * self.carrier.mask_costs.double()).sum())
        )

    def project(self) -> None:
        """Make the weight what the forward pass uses: theta <- theta * m * h (* scale), dropped weights exactly +0."""
        with torch.no_grad():
            self.weight.copy_(self.carrier.masked(self.weight).add_(0.0))

    def merge(self) -> None:
        """Project, and go on with the hard mask alone, fixed, without gradients for dropped weights."""
        self.project()
        self.carrier.mask_soft = None
        self.carrier.mask_scale = None
        self.carrier.mask_backward = None
        self.carrier.mask_straight_through = False

    def remove(self) -> None:
        """Give back plain modules."""
        unmask_weight(self.module, self.carrier, self.parameter)
        for module, parameter in self.shared:
            unmask_weight(module, self.carrier, parameter)


@dataclass
class MaskGroup:
    """Weights that share one budget, of `target` out of `capacity` weights (or their cost), and their solver's state.

    Budgets of the same `part` that lend give each other what is left of a block.
    """

    tensors: list[MaskedTensor]
    target: float
    part: int = 0
    lends: bool = True
    state: torch.Tensor = field(init=False)
    solved: bool = False

    def __post_init__(self) -> None:
        self.capacity = sum(tensor.size.count if tensor.cost is None else tensor.cost for tensor in self.tensors)
        self.state = new_solver_state(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tensors[0].weight.device

    def budget(self, progress: float) -> float:
        """What to keep at the part `progress` of the way from all of them to the target."""
        budget = self.capacity + (self.target - self.capacity) * progress
        if self.tensors[0].cost is None:
            return budget
        return min(budget * (1 + _COST_ROUNDING), self.capacity)

    def solve(self, progress: float, beta: float, *, relative: bool) -> None:
        """Write the soft and hard masks for this budget and sharpness in place.

        Args:
            progress: in (0, 1].
            beta: sharpness per unit of block cost, before the scaling by the square root of the block size.
            relative: beta is in units of the hard threshold that the last solve found, on the device.
        """
        budget = self.budget(progress)
        if relative and not self.solved:
            self._solve(budget, beta)  # the first time there is no threshold yet
        self._solve(budget, (beta / self.state[2]).clamp(max=_SHARPEST) if relative else beta)
        self.solved = True
        for tensor in self.tensors:
            _rescale(tensor.carrier)
            tensor.carrier.masks_changed()

    def _solve(self, budget: float, beta: float | torch.Tensor) -> None:
        carriers = [tensor.carrier for tensor in self.tensors]
        self.state = self.state.to(self.device)
        rows, columns = carriers[0].mask_block_size
        for carrier in carriers:
            carrier.mask_beta.fill_(beta * (rows * columns) ** 0.5)
        try:
            solve_masks_(
                [tensor.weight.detach() for tensor in self.tensors],
                budget,
                self._costs(),
                carriers[0].mask_beta,
                [tensor.mask.soft for tensor in self.tensors],
                [carrier.mask_hard for carrier in carriers],
                self.state,
                block_sizes=[carrier.mask_block_size for carrier in carriers],
            )
        except ValueError:
            self._require_finite()
            raise

    def select(self, budget: float, scores: Sequence[torch.Tensor] | None = None) -> float:
        """Write the hard masks of the best blocks within `budget`, and return how much of it that takes.

        `scores` replaces the magnitudes that decide.
        """
        if budget >= self.capacity:
            for tensor in self.tensors:
                tensor.carrier.mask_hard.fill_(True)
                tensor.carrier.masks_changed()
            return self.capacity
        values, absolute = self._values() if scores is None else (list(scores), False)
        try:
            masks = hard_topk_global(values, budget, self._costs(), absolute=absolute)
        except ValueError:
            self._require_finite()
            raise
        for tensor, mask in zip(self.tensors, masks, strict=True):
            tensor.carrier.mask_hard.copy_(mask)
            tensor.carrier.masks_changed()
        return sum(tensor.kept_cost() for tensor in self.tensors)

    def correct_gradients(self) -> None:
        """Complete the gradients of all weights of this budget with the coupling term of equation (2)."""
        if all(tensor.weight.grad is None for tensor in self.tensors):
            return
        grads = [gradient_or_zeros(tensor.weight) for tensor in self.tensors]
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for tensor, grad in zip(self.tensors, grads, strict=True):
            carrier = tensor.carrier
            sums += masked_weight_coupling(
                grad,
                tensor.weight,
                tensor.mask.soft,
                carrier.mask_block_size,
                beta=carrier.mask_beta,
                costs=carrier.mask_costs,
            )
        # Where every block is decided (all s = 0) the budget couples nothing.
        multiplier = torch.where(sums[1] > 0, sums[0] / sums[1], 0.0)
        for tensor, grad in zip(self.tensors, grads, strict=True):
            carrier = tensor.carrier
            masked_weight_correct_(
                grad, tensor.weight, tensor.mask.soft, carrier.mask_beta * multiplier, carrier.mask_block_size
            )

    def _values(self) -> tuple[list[torch.Tensor], bool]:
        return [tensor.scores() for tensor in self.tensors], self.tensors[0].unstructured

    def _costs(self) -> list[float | torch.Tensor] | None:
        if self.tensors[0].unstructured and self.tensors[0].cost is None:
            return None
        return [tensor.carrier.mask_costs for tensor in self.tensors]

    def _require_finite(self) -> None:
        for tensor in self.tensors:
            bad = int((~torch.isfinite(tensor.weight)).sum())
            if bad:
                raise ValueError(f"weight {tensor.name!r} must be finite; {bad} of its entries are NaN or infinite")


@dataclass
class MaskSet:
    """All masked weights of a model with the clock of their training: what a method acts on.

    `optimizer` is the one that trains the weights, where it is known: attached, or given to `Sparsifier.step`.
    """

    groups: list[MaskGroup]
    total_steps: int
    step: int = 0
    frozen: bool = False
    optimizer: torch.optim.Optimizer | None = None

    @property
    def tensors(self) -> list[MaskedTensor]:
        """Every masked weight, in the groups' order."""
        return [tensor for group in self.groups for tensor in group.tensors]

    def select(self, progress: float, scores: dict[str, torch.Tensor] | None = None) -> None:
        """Write the hard masks of all groups, exact to one block over each part of the model.

        What a group's last block leaves of its budget goes to the next group of its part; those with least room
        come first, so that the last one can use it.
        """
        carry: dict[int, float] = {}
        for group in sorted(self.groups, key=lambda g: g.capacity - g.budget(progress)):
            own = None if scores is None else [scores[tensor.name] for tensor in group.tensors]
            if not group.lends:
                group.select(group.budget(progress), own)
                continue
            left = carry.get(group.part, 0.0)
            kept = group.select(min(group.budget(progress) + left, group.capacity), own)
            carry[group.part] = left + group.budget(progress) - kept

    def gradient_scale(self) -> torch.Tensor | float:
        """What `.grad` is a multiple of now: 1, or the loss scale where a fused optimizer unscales in its own step."""
        scale = getattr(self.optimizer, "grad_scale", None)
        return 1.0 if scale is None else scale

    def step_skipped(self) -> bool:
        """Whether a fused optimizer found gradients that are not finite and left the weights as they were."""
        found = getattr(self.optimizer, "found_inf", None)
        return found is not None and bool(found)

    def project(self) -> None:
        """Make every weight what the forward pass uses."""
        for tensor in self.tensors:
            tensor.project()

    def freeze(self) -> None:
        """Merge the soft masks into the weights and keep the hard ones from now on."""
        for tensor in self.tensors:
            tensor.merge()
        self.frozen = True

    def remove(self) -> None:
        """Give back plain modules."""
        for tensor in self.tensors:
            tensor.remove()


def gradient_or_zeros(weight: nn.Parameter) -> torch.Tensor:
    """The gradient of a weight; one that took no part in this step gets zeros, as it shares in the budget."""
    if weight.grad is None:
        zero = torch.zeros_like(weight)
        if not weight.requires_grad:
            return zero
        weight.grad = zero
    return weight.grad


def _rescale(carrier: MaskCarrier) -> None:
    """Set the factor that undoes the mean of the kept soft mask, where this was asked for."""
    if carrier.mask_scale is None or carrier.mask_soft is None:
        return
    kept = carrier.mask_hard * carrier.mask_sizes.to(carrier.mask_soft.dtype)
    mean = (carrier.mask_soft * kept).sum() / kept.sum()
    # A layer that keeps nothing has no mean.
    carrier.mask_scale.copy_(torch.where(mean > 0, 1 / mean, 1.0))
