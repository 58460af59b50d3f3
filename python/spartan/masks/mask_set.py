"""The masks of a model: weights grouped by the budget they share, and what a training method may do to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from spartan.distributed import fill, largest, total_over, totals_over
from spartan.masks.masked_tensor import Mask, MaskedTensor
from spartan_kernels import hard_topk_global, new_solver_state, solve_masks_

__all__ = ["Mask", "MaskGroup", "MaskSet", "MaskedTensor"]

# Sharper than this a soft mask is a hard one in float32, and the solver's accuracy is no longer specified.
_SHARPEST = 1e6
# Sums of costs are rounded: a block that fits exactly must not be left out for that.
_COST_ROUNDING = 1e-9


@dataclass
class MaskGroup:
    """Weights that share one budget, of `target` out of `capacity` weights (or their cost), and their solver's state.

    Budgets of the same `part` that lend give each other what is left of a block. `compute_soft`: soft masks are
    solved for after each step, and computed from the weights instead of kept, where that can be.
    """

    tensors: list[MaskedTensor]
    target: float
    part: int = 0
    lends: bool = True
    compute_soft: bool = False
    state: torch.Tensor = field(init=False)
    solved: bool = False

    def __post_init__(self) -> None:
        self.capacity = sum(tensor.size.count if tensor.cost is None else tensor.cost for tensor in self.tensors)
        self.initial = float(self.capacity)
        self.state = new_solver_state(self.device)
        self._choose_soft()

    def start_from_zeros(self) -> None:
        """Keep at first only the blocks that are not all zeros; at least one."""
        kept = [(tensor.magnitudes(tensor.values) > 0) * tensor.costs.double() for tensor in self.tensors]
        total = total_over(torch.stack([own.sum() for own in kept]).sum(), self.group)
        largest = max(float(tensor.carrier.mask_costs.max()) for tensor in self.tensors)
        self.initial = min(max(float(total), largest), float(self.capacity))

    @property
    def keeps_zeros(self) -> bool:
        """Whether it began with blocks of zeros dropped: magnitude never selects those."""
        return self.initial < self.capacity

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tensors[0].seen.device

    @property
    def group(self) -> str:
        """Name of the group of ranks that choose together, each for its part; empty for this rank alone.

        Raises:
            ValueError: some weights are divided over other ranks than others.
        """
        names = {tensor.group: tensor.name for tensor in self.tensors}
        if len(names) > 1:
            raise ValueError(
                "weights that share a budget must be divided over the same ranks, or none of them; "
                f"{' and '.join(map(repr, names.values()))} are not: use another distribution, or exclude="
            )
        return next(iter(names))

    def budget(self, progress: float, *, from_all: bool = False) -> float:
        """What to keep at the part `progress` of the way from what is kept at first, or `from_all`, to the target."""
        initial = self.capacity if from_all else self.initial
        budget = initial + (self.target - initial) * progress
        if self.tensors[0].cost is None:
            return budget
        return min(budget * (1 + _COST_ROUNDING), self.capacity)

    def solve(self, progress: float, beta: float, units: str) -> None:
        """Write the soft and hard masks for this budget and sharpness in place.

        Args:
            progress: in (0, 1].
            beta: sharpness per unit of block cost, before the scaling by the square root of the block size.
            units: what beta is relative to, on the device: "paper": nothing; "mean": the mean of magnitude / cost now,
                each block counted by its cost; "threshold": the hard threshold that the last solve found.
        """
        budget = self.budget(progress)
        if units == "threshold" and not self.solved:
            self._solve(budget, beta)  # the first time there is no threshold yet
        self._solve(budget, beta if units == "paper" else (beta / self._unit(units)).clamp(max=_SHARPEST))
        self.solved = True
        self._expect(budget)
        self.changed(soft=True)
        for tensor in self.tensors:
            tensor.rescale()

    def _unit(self, units: str) -> torch.Tensor:
        if units == "threshold":
            return self.state[2]
        sums: dict[str, list[torch.Tensor]] = {}
        for tensor in self.tensors:
            wide = torch.promote_types(tensor.values.dtype, torch.float32)
            norm = torch.linalg.vector_norm(tensor.values, 1, dtype=wide)
            sums.setdefault(tensor.shard.ranks, []).append(norm)
        totals = [total_over(torch.stack(own).double().sum(), ranks) for ranks, own in sums.items()]
        return torch.stack(totals).sum() / self.capacity

    def changed(self, *, soft: bool = False) -> None:
        """Bring what this rank wrote to the hard masks (and the soft ones) to where the modules compute with them."""
        carriers = [(tensor, tensor.carrier) for tensor in self.tensors]
        fill([part for t, c in carriers for part in t.parts(c.mask_hard, c.mask_soft if soft else None)])
        for _, carrier in carriers:
            carrier.masks_changed()

    def _expect(self, budget: float) -> None:
        for tensor in self.tensors:
            tensor.carrier.mask_expected = budget / self.capacity

    def _choose_soft(self) -> bool:
        """Keep soft masks, or compute them from their solution: all of a budget alike. Whether they are computed."""
        if not self.compute_soft:
            return False
        computed = all(tensor.can_compute_soft for tensor in self.tensors)
        for tensor in self.tensors:
            if tensor.carrier.soft_is_solution != computed:
                tensor.carrier.compute_soft(computed)
        return computed

    def place_solution(self) -> None:
        """Let soft masks that are computed be those of the state, which may have been solved for elsewhere."""
        if not self._choose_soft() or not self.solved:
            return
        solution = self.state[6:]
        if not bool(solution.any()):  # solved for where soft masks are kept
            centre = self.state[0].to(self.tensors[0].seen.dtype).double()
            solution = torch.stack([centre, self.tensors[0].carrier.mask_beta * (centre - self.state[0])])
        self._take_solution(solution)

    def _take_solution(self, solution: torch.Tensor) -> None:
        for tensor in self.tensors:
            soft = tensor.carrier.mask_soft
            assert soft is not None
            soft.copy_(solution)

    def _solve(self, budget: float, beta: float | torch.Tensor) -> None:
        carriers = [tensor.carrier for tensor in self.tensors]
        self.state = self.state.to(self.device)
        computed = self._choose_soft()
        rows, columns = carriers[0].mask_block_size
        for carrier in carriers:
            carrier.mask_beta.fill_(beta * (rows * columns) ** 0.5)
        together = any(tensor.shard.cut for tensor in self.tensors) and not self.tensors[0].unstructured
        soft, hard = [] if computed else [t.soft for t in self.tensors], [tensor.hard for tensor in self.tensors]
        into_soft, into_hard = [_contiguous(mask) for mask in soft], [_contiguous(mask) for mask in hard]
        try:
            solve_masks_(
                self._added_scores() if together else [tensor.values for tensor in self.tensors],
                budget,
                self._costs(),
                carriers[0].mask_beta,
                into_soft or None,
                into_hard,
                self.state,
                block_sizes=None if together else [carrier.mask_block_size for carrier in carriers],
                group=self.group or None,
            )
        except ValueError:
            self._require_finite()
            raise
        for mask, written in zip(soft + hard, into_soft + into_hard, strict=True):
            if written is not mask:
                mask.copy_(written)
        if computed:
            self._take_solution(self.state[6:])

    def select(self, budget: float, scores: Sequence[torch.Tensor] | None = None) -> None:
        """Write the hard masks of the best blocks within `budget`; `scores` replaces the magnitudes that decide."""
        self._expect(min(budget, self.capacity))
        if budget >= self.capacity and not (self.keeps_zeros and scores is None):
            for tensor in self.tensors:
                tensor.carrier.mask_hard.fill_(True)
                tensor.carrier.masks_changed()
            return
        values, absolute = self._values() if scores is None else (list(scores), False)
        if not self.tensors[0].unstructured:  # costs are read in the dtype of what decides: half precision would round
            values = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]
        try:
            masks = hard_topk_global(values, budget, self._costs(), absolute=absolute, group=self.group or None)
        except ValueError:
            self._require_finite()
            raise
        if self.keeps_zeros and scores is None:
            masks = [mask & (value != 0) for mask, value in zip(masks, values, strict=True)]
        for tensor, mask in zip(self.tensors, masks, strict=True):
            tensor.hard.copy_(mask)
        self.changed()

    def kept_cost(self) -> float:
        """How much of its budget the hard masks take; a GPU is waited for."""
        return sum(tensor.kept_cost() for tensor in self.tensors)

    def correct_gradients(self) -> None:
        """Complete the gradients of all weights of this budget with the coupling term of equation (2)."""
        if all(tensor.weight.grad is None for tensor in self.tensors):
            return
        grads = [tensor.gradient_or_zeros() for tensor in self.tensors]
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for tensor, grad in zip(self.tensors, grads, strict=True):
            sums += tensor.coupling(grad)
        sums = total_over(sums, self.group)
        # Where every block is decided (all s = 0) the budget couples nothing. Nor do gradients that are not finite: the
        # weights that have them break down, or are left out of the step, but not those of another optimizer.
        multiplier = torch.where((sums[1] > 0) & sums[0].isfinite(), sums[0] / sums[1], 0.0)
        for tensor, grad in zip(self.tensors, grads, strict=True):
            tensor.correct(grad, tensor.carrier.mask_beta * multiplier)

    def largest(self, scores: Sequence[torch.Tensor]) -> torch.Tensor:
        """The largest score that any rank has for a block of this budget."""
        return largest(scores, self.group)

    def _added_scores(self) -> list[torch.Tensor]:
        """Scores of blocks that are cut over ranks, in as few exchanges as there are groups of these."""
        scores: dict[str, torch.Tensor] = {}
        for cut in {tensor.shard.cut: None for tensor in self.tensors}:
            own = [tensor for tensor in self.tensors if tensor.shard.cut == cut]
            grids = [tensor.partial(tensor.values) if cut else tensor.scores() for tensor in own]
            for tensor, grid in zip(own, totals_over(grids, cut), strict=True):
                scores[tensor.name] = grid.to(tensor.seen.dtype)
        return [scores[tensor.name] for tensor in self.tensors]

    def _values(self) -> tuple[list[torch.Tensor], bool]:
        return [tensor.scores() for tensor in self.tensors], self.tensors[0].unstructured

    def _costs(self) -> list[float | torch.Tensor] | None:
        if self.tensors[0].unstructured and self.tensors[0].cost is None:
            return None
        return [tensor.costs for tensor in self.tensors]

    def _require_finite(self) -> None:
        for tensor in self.tensors:
            bad = tensor.not_finite()
            if bad:
                raise ValueError(f"weight {tensor.name!r} must be finite; {bad} of its entries are NaN or infinite")


@dataclass
class MaskSet:
    """All masked weights of a model with the clock of their training: what a method acts on.

    `optimizers` are those that train the weights, where they are known: attached, or given to `Sparsifier.step`.
    `keep_zeros`: whether the first masks are to be those of a model that is sparse already.
    """

    groups: list[MaskGroup]
    total_steps: int
    step: int = 0
    frozen: bool = False
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    keep_zeros: bool = False

    @property
    def tensors(self) -> list[MaskedTensor]:
        """Every masked weight, in the groups' order."""
        return [tensor for group in self.groups for tensor in group.tensors]

    def start_from_zeros(self) -> None:
        """Drop blocks of zeros from the first step on."""
        self.keep_zeros = True
        for group in self.groups:
            group.start_from_zeros()
        self.select(0.0)

    def select(self, progress: float, scores: dict[str, torch.Tensor] | None = None, *, from_all: bool = False) -> None:
        """Write the hard masks of all groups, exact to one block over each part of the model.

        What a group's last block leaves of its budget goes to the next group of its part; those with least room
        come first, so that the last one can use it, of which nobody has to know how much it takes.
        """
        carry: dict[int, float] = {}
        followers = Counter(group.part for group in self.groups if group.lends)
        budgets = [(group, group.budget(progress, from_all=from_all)) for group in self.groups]
        for group, budget in sorted(budgets, key=lambda pair: pair[0].capacity - pair[1]):
            own = None if scores is None else [scores[tensor.name] for tensor in group.tensors]
            if not group.lends:
                group.select(budget, own)
                continue
            budget += carry.get(group.part, 0.0)
            group.select(min(budget, group.capacity), own)
            followers[group.part] -= 1
            if followers[group.part]:
                carry[group.part] = budget - group.kept_cost()

    def gradient_scale(self) -> torch.Tensor | float:
        """What `.grad` is a multiple of now: 1, or the loss scale where a fused optimizer unscales in its own step."""
        scales = (getattr(optimizer, "grad_scale", None) for optimizer in self.optimizers)
        return next((scale for scale in scales if scale is not None), 1.0)

    def step_skipped(self) -> bool:
        """Whether a fused optimizer found gradients that are not finite and left the weights as they were."""
        return any(_found_inf(optimizer) for optimizer in self.optimizers)

    def reset_moments(self, tensor: MaskedTensor, blocks: torch.Tensor) -> None:
        """Zero what the optimizers keep for each weight of these blocks of `tensor`."""
        for optimizer in self.optimizers:
            tensor.reset_moments(optimizer, blocks)

    def begin_moments(self, tensor: MaskedTensor, grown: torch.Tensor, settled: torch.Tensor) -> None:
        """Let the optimizers forget the past of grown blocks of `tensor`, and step no further there than elsewhere."""
        for optimizer in self.optimizers:
            tensor.begin_moments(optimizer, grown, settled)

    def require_finite(self) -> None:
        """Raise ValueError at a weight that is not finite, by name, also where no mask is chosen any more."""
        for group in self.groups:
            group._require_finite()

    def project(self) -> None:
        """Make every weight what the forward pass uses."""
        for tensor in self.tensors:
            tensor.project()

    def rest_dropped(self) -> None:
        """Zero the moments of dropped weights, if the optimizer is known: without gradients they stay at zero then."""
        if self.optimizers:
            for tensor in self.tensors:
                self.reset_moments(tensor, ~tensor.hard)

    def freeze(self) -> None:
        """Merge the soft masks into the weights and keep the hard ones from now on; dropped weights rest at zero."""
        for tensor in self.tensors:
            tensor.merge()
        self.rest_dropped()
        self.frozen = True

    def remove(self) -> None:
        """Give back plain modules."""
        for tensor in self.tensors:
            tensor.remove()


def _found_inf(optimizer: torch.optim.Optimizer) -> bool:
    found = getattr(optimizer, "found_inf", None)
    if found is None or (found.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return bool(found)


def _contiguous(mask: torch.Tensor) -> torch.Tensor:
    """Where a solve writes `mask`: itself, or room of its shape where it is a part cut along inner dimensions."""
    return mask if mask.is_contiguous() else torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
