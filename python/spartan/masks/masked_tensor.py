"""A masked weight: its values, gradient and masks as a training method works on them, whole or the part of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from spartan.budgets import LayerSize
from spartan.distributed import Seen, Shard, fill, is_dtensor, local, shard_of, total_over, totals_over
from spartan.nn.mask_carrier import MaskCarrier
from spartan.nn.modules import largest_block, unmask_weight
from spartan.nn.stacks import Stack
from spartan_kernels import (
    block_grid,
    block_scores,
    expand_blocks,
    masked_weight,
    masked_weight_correct_,
    masked_weight_coupling,
)
from spartan_kernels.operands import KeptSoftMass
from spartan_kernels.ops.masked_weight import kept_soft_mass
from spartan_kernels.solution import is_solution

__all__ = ["Mask", "MaskedTensor"]


# What optimizers divide a weight's step by: name in torch.optim, and of which power of the gradient it is.
_DIVISORS = {"exp_avg_sq": 2, "square_avg": 2, "sum": 2, "exp_inf": 1}


class Mask(NamedTuple):
    """The masks of one weight, one entry per block: the weight in use is theta * soft * hard."""

    soft: torch.Tensor
    hard: torch.Tensor


@dataclass
class MaskedTensor:
    """A masked weight: its name in the model, the module that has it and the module that carries its masks.

    `parameter` is its name in that module, `shared` are the other modules that have it with its names there;
    `transposed`: its outputs are its second dimension. `stack`: how all here see it where it is several matrices.
    `cost` is that of all its blocks, where a cost model prices them. `made_for` is what modules computed with on this
    rank when that was last asked for.
    Where the weight is divided over ranks, `values` and `gradient` are what this rank trains of it, and `hard`, `soft`,
    `costs`, `backward` and block scores are of the blocks that it chooses for: its own where each weight is a block,
    else all that its module computes with, as the ranks then add up the scores of blocks, which a cut may divide.
    `remembered` is what a method keeps from before an optimizer step until after it, `observer` what it watches the
    module's passes with; no state between steps. `spare` is memory for what is remembered next.
    """

    name: str
    module: nn.Module
    carrier: MaskCarrier
    made_for: Seen
    parameter: str = "weight"
    shared: tuple[tuple[nn.Module, str], ...] = ()
    transposed: bool = False
    cost: float | None = None
    stack: Stack | None = None
    remembered: torch.Tensor | None = field(default=None, init=False)
    spare: torch.Tensor | None = field(default=None, init=False)
    observer: Any = field(default=None, init=False)
    _placed: tuple[Any, Shard] | None = field(default=None, init=False)

    @property
    def weight(self) -> nn.Parameter:
        """The trained parameter theta, under the mask."""
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    @property
    def seen(self) -> Seen:
        """What modules compute with on this rank, as the model is now: it may have been moved or converted."""
        dtype, device = self.carrier.mask_dtype, self.carrier.mask_hard.device
        if (self.made_for.dtype, self.made_for.device) != (dtype, device):
            self.made_for = replace(self.made_for, dtype=dtype, device=device)
        return self.made_for

    @property
    def shard(self) -> Shard:
        """Which part of what the module computes with this rank trains."""
        weight = self.weight
        if self._placed is None or self._placed[0] is not weight:
            self._placed = weight, self._shard_now(weight)
        return self._placed[1]

    @property
    def group(self) -> str:
        """Name of the group of ranks whose choices together make up the weight; empty: each chooses for all of it."""
        return self.shard.ranks if self.unstructured else self.shard.split

    @property
    def values(self) -> torch.Tensor:
        """theta, this rank's part of it, without a graph; the parameter's own memory."""
        return self._turned(local(self.weight))

    @property
    def shape(self) -> torch.Size:
        """Of the whole weight, as masks see it."""
        return self.weight.shape if self.stack is None else self.stack.turned_shape

    @property
    def gradient(self) -> torch.Tensor | None:
        """The `.grad` of `values`, its own memory."""
        grad = self.weight.grad
        return None if grad is None else self._turned(local(grad))

    def gradient_or_zeros(self) -> torch.Tensor:
        """The gradient of a weight; one that took no part in this step gets zeros, as it shares in the budget."""
        weight = self.weight
        if weight.grad is None:
            zero = torch.zeros_like(weight)
            if not weight.requires_grad:
                return self._turned(local(zero))
            weight.grad = zero
        elif self.stack is not None and not weight.grad.is_contiguous():
            weight.grad = weight.grad.contiguous()  # of which all that is written must be a view
        return self._turned(local(weight.grad))

    @property
    def unstructured(self) -> bool:
        """Whether each weight is a block."""
        return self.carrier.mask_block_size == (1, 1)

    @property
    def size(self) -> LayerSize:
        """Shape and largest block of the whole weight, for budgets."""
        return LayerSize(tuple(self.weight.shape), largest_block(self.shape, self.carrier.mask_block_size))

    @property
    def mask(self) -> Mask:
        """The masks now, of all that the module computes with; a soft mask merged into the weight is ones."""
        hard, soft = self.carrier.mask_hard, self.carrier.mask_soft
        if self.carrier.soft_is_solution:
            soft = self.carrier.soft_of(self._whole_values())
        return Mask(torch.ones_like(hard, dtype=self.seen.dtype) if soft is None else soft, hard)

    @property
    def shown_mask(self) -> Mask:
        """The same, of a stack of matrices in the order of its dimensions."""
        return self.mask if self.stack is None else Mask(*map(self.stack.back, self.mask))

    @property
    def hard(self) -> torch.Tensor:
        """h, of the blocks that this rank chooses for; call `changed` after writing to it."""
        return self._own(self.carrier.mask_hard)

    @property
    def soft(self) -> torch.Tensor:
        """m, likewise; writing to it has no effect where it is computed."""
        return self._own(self.mask.soft)

    @property
    def soft_or_solution(self) -> torch.Tensor:
        """What operators take as the soft mask: m, likewise, or the solution that it is computed from."""
        soft = self.carrier.mask_soft
        return soft if soft is not None and self.carrier.soft_is_solution else self.soft

    @property
    def can_compute_soft(self) -> bool:
        """Whether the soft mask need not be kept: this process has all of the weight, each weight is a block."""
        whole = self.stack is None and not self.carrier.mask_divided and not is_dtensor(self.weight)
        return whole and self.unstructured and self.carrier.mask_hard.device.type == "cpu"

    @property
    def costs(self) -> torch.Tensor:
        """a, likewise: 0-dim or one per block."""
        costs = self.carrier.mask_costs
        return self._own(costs) if costs.dim() else costs

    @property
    def backward(self) -> torch.Tensor | None:
        """The blocks whose weight needs a gradient where those are not the kept ones, likewise."""
        backward = self.carrier.mask_backward
        return None if backward is None else self._own(backward)

    def set_backward(self, blocks: torch.Tensor, *, everywhere: bool = False) -> None:
        """Let `blocks` be the ones whose weight needs a gradient.

        They are of those that this rank chooses for; with `everywhere` of all that its module computes with, as far as
        each rank knows them alike: nothing is exchanged then.
        """
        if self.carrier.mask_backward is None:
            self.carrier.mask_backward = torch.zeros_like(self.carrier.mask_hard)
        if everywhere:
            self.carrier.mask_backward.copy_(blocks)
            return
        self._own(self.carrier.mask_backward).copy_(blocks)
        fill(self.parts(self.carrier.mask_backward))

    def changed(self, *, soft: bool = False) -> None:
        """Bring what this rank wrote to `hard` (and to `soft`) to where the module computes with it."""
        fill(self.parts(self.carrier.mask_hard, self.carrier.mask_soft if soft else None))
        self.carrier.masks_changed()

    def parts(self, *masks: torch.Tensor | None) -> list[tuple[torch.Tensor, Shard]]:
        """Those of the masks that this rank writes a part of, for `fill`."""
        written = (mask for mask in masks if mask is not None and not is_solution(mask, self.carrier.mask_hard))
        return [(mask, self.shard) for mask in written if self.unstructured and self.shard.cut]

    def own_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Of a tensor with one entry for each block of the whole weight, the blocks that this rank chooses for."""
        return self._own(self.seen.slice_of(whole))

    def scores(self) -> torch.Tensor:
        """theta itself where each weight is a block (its magnitude counts), else the sum of |theta| of each block."""
        values = self.values
        return values if self.unstructured else self.magnitudes(values)

    def magnitudes(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of |values| of each block that this rank chooses for, of values shaped like `self.values`."""
        if self.unstructured:
            return values.abs()
        block_size = self.carrier.mask_block_size
        if not self.shard.cut:
            return block_scores(values, block_size)
        return total_over(self.partial(values), self.shard.cut).to(values.dtype)

    def expand(self, grid: torch.Tensor) -> torch.Tensor:
        """The value of each weight's block, in the shape of `values`; `grid` has the blocks this rank chooses for."""
        block_size, shard = self.carrier.mask_block_size, self.shard
        if self.unstructured or not shard.cut:
            return expand_blocks(grid, self.values.shape, block_size)
        blocks, before = shard.blocks(grid, block_size)
        shape = list(self.values.shape)
        shape[shard.dim] += before
        return expand_blocks(blocks, torch.Size(shape), block_size).narrow(shard.dim, before, shard.length)

    def by_blocks(self, grid: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`grid` and `values` in shapes that broadcast, a block to its weights: views, where blocks divide them."""
        rows, columns = self.carrier.mask_block_size
        if self.unstructured or self.shard.cut or not all(v.is_contiguous() for v in values):
            return self.expand(grid), *values
        if values[0].shape[0] % rows or values[0].shape[1] % columns:
            return self.expand(grid), *values
        tiled = (v.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)) for v in values)
        return grid[:, None, :, None], *tiled

    def kept(self) -> int:
        """Number of weights that the hard mask keeps, of the whole weight."""
        return int(total_over(self._sum_of_kept(self.carrier.mask_sizes), self.shard.split))

    def kept_blocks(self) -> int:
        """Number of blocks that the hard mask keeps, of the whole weight."""
        return int(total_over(self.carrier.mask_hard.count_nonzero(), self.shard.split))

    def kept_cost(self) -> float:
        """What they take of the budget: their number, or the cost of their blocks."""
        if self.cost is None:
            return self.kept()
        return float(total_over(self._sum_of_kept(self.carrier.mask_costs), self.shard.split))

    def _sum_of_kept(self, of_block: torch.Tensor) -> torch.Tensor:
        """Sum over the kept blocks of a number for all, which needs no more than their count, or of one for each."""
        hard = self.carrier.mask_hard
        if of_block.dim() == 0:
            return hard.count_nonzero() * of_block.double()
        return (hard * of_block.double()).sum()

    def not_finite(self) -> int:
        """Number of values that are NaN or infinite, on all ranks."""
        return int(total_over((~torch.isfinite(self.values)).sum(), self.shard.ranks))

    def coupling(self, grad: torch.Tensor) -> torch.Tensor:
        """The two sums of `masked_weight_coupling` over the blocks that this rank chooses for."""
        carrier, weight = self.carrier, self.values
        if self.unstructured or not self.shard.cut:
            return masked_weight_coupling(
                grad, weight, self.soft_or_solution, carrier.mask_block_size, beta=carrier.mask_beta, costs=self.costs
            )
        soft, costs = self.soft.double(), self.costs.double()
        rest, beta = 1 - soft, carrier.mask_beta
        sums = totals_over([self.partial(grad * weight, _block_sums), self.partial(weight)], self.shard.cut)
        gained = sums[0] / (1 + beta * rest * sums[1] / costs)
        return torch.stack([(rest * gained).sum(), (costs * soft * rest).sum()])

    def correct(self, grad: torch.Tensor, scale: torch.Tensor) -> None:
        """grad_i -= sign(theta_i) s_b scale, in place."""
        weight, carrier = self.values, self.carrier
        if self.unstructured or not self.shard.cut:
            masked_weight_correct_(
                grad,
                weight,
                self.soft_or_solution,
                scale,
                carrier.mask_block_size,
                beta=carrier.mask_beta,
                costs=self.costs,
            )
        else:
            soft = self.soft
            grad.addcmul_(weight.sign(), self.expand(soft * (1 - soft) * scale).to(grad.dtype), value=-1)

    def project(self) -> None:
        """Make the weight what the forward pass uses: theta <- theta * m * h (* scale), dropped weights exactly +0."""
        carrier, values = self.carrier, self.values
        with torch.no_grad():
            if self.shard.cut:
                soft = None if carrier.mask_soft is None else self.expand(self.soft)
                used = masked_weight(values, soft, self.expand(self.hard))
                factor = carrier.mask_factor
                if factor is not None:
                    used = used * (self.shard.of(factor) if factor.dim() else factor)
            else:
                used = carrier.masked_part(values)
            values.copy_(used.add_(0.0))

    def merge(self) -> None:
        """Project, and go on with the hard mask alone, fixed, without gradients for dropped weights."""
        self.project()
        self.carrier.set_soft(None, None)
        self.carrier.mask_backward = None
        self.carrier.mask_straight_through = False

    def reset_moments(self, optimizer: torch.optim.Optimizer, blocks: torch.Tensor) -> None:
        """Set what the optimizer keeps for each weight of these blocks of this rank's part to where it starts from.

        That is zero for momentum, moments and sums, but for two. Only state of the weight's shape is for each weight;
        what is kept for rows and columns together stays.
        """
        where = self.expand(blocks)
        for state, settings in _states(optimizer, self.weight):
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == self.weight.shape:
                    sign, start = _STARTS.get(name, ("", ""))
                    self._turned(local(value)).masked_fill_(where, settings.get(start, 0) if sign in settings else 0)

    def begin_moments(self, optimizer: torch.optim.Optimizer, grown: torch.Tensor, settled: torch.Tensor) -> None:
        """Forget the past of grown blocks, and let their steps be no longer than those of settled ones.

        What a step is divided by is not zeroed: optimizers correct its bias by the steps of the whole tensor, so with
        Adam the first steps from zero would be some three times as long as any other. It begins at what is usual for
        settled weights, or at what a constant gradient like that in `remembered` would have made it, if that is more.
        """
        self.reset_moments(optimizer, grown)
        where, among = self.expand(grown), self.expand(settled)
        for state, settings in _states(optimizer, self.weight):
            for name, power in _DIVISORS.items():
                value = state.get(name)
                if not isinstance(value, torch.Tensor) or value.shape != self.weight.shape:
                    continue
                own = self._turned(local(value))
                # The mean of magnitudes, not of their squares: a few weights of huge gradients are not usual.
                sizes = (own ** (1 / power) * among).sum(dtype=torch.float64)
                sums = total_over(torch.stack([sizes, among.sum(dtype=torch.float64)]), self.shard.ranks)
                first = torch.where(sums[1] > 0, sums[0] / sums[1], 0.0).to(own.dtype) ** power
                if self.remembered is not None:
                    size = self.carrier.mask_sizes
                    mean = self.remembered / (self._own(size) if size.dim() else size)
                    reached = self.expand(mean**power) * _history(name, state, settings)
                    first = torch.maximum(first, reached.to(own.dtype))
                own.copy_(torch.where(where, first, own))

    def remove(self) -> None:
        """Give back plain modules, which nothing watches."""
        if self.observer is not None:
            self.observer.close()
        unmask_weight(self.module, self.carrier, self.parameter)
        for module, parameter in self.shared:
            unmask_weight(module, self.carrier, parameter)

    def zeros(self) -> int:
        """Number of zeros in the whole weight, once its modules are plain again."""
        weight = self.module.get_parameter(self.parameter)
        return int(total_over((local(weight) == 0).sum(), self._shard_now(weight).ranks))

    def rescale(self) -> None:
        """Set the factor that undoes the mean of the kept soft mask, of each matrix, where this was asked for."""
        carrier, stack = self.carrier, self.stack
        if carrier.mask_scale is None or carrier.mask_soft is None:
            return
        if carrier.soft_is_solution:
            operands = self.values, carrier.mask_soft, carrier.mask_hard, carrier.mask_beta, carrier.mask_costs
            sums = kept_soft_mass(KeptSoftMass(*operands))
        else:
            kept = carrier.mask_hard * carrier.mask_sizes.to(carrier.mask_soft.dtype)
            both = carrier.mask_soft * kept, kept
            own = [grid.sum() if stack is None else stack.back(grid).sum((-2, -1), keepdim=True) for grid in both]
            sums = total_over(torch.stack(own), self.shard.split)
        mean = sums[0] / sums[1]
        # A layer that keeps nothing has no mean.
        carrier.mask_scale.copy_(torch.where(mean > 0, 1 / mean, 1.0))

    def _turned(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.stack is None else self.stack.turned(values)

    def _shard_now(self, weight: nn.Parameter) -> Shard:
        if self.stack is None:
            return shard_of(self.name, weight, self.made_for)
        return self.stack.shard(shard_of(self.name, weight, replace(self.made_for, shape=weight.shape)))

    def _whole_values(self) -> torch.Tensor:
        """theta as the module computes with it: gathered where it is divided."""
        weight: Any = self.weight
        return self.seen.slice_of(self._turned(weight.detach().full_tensor())) if is_dtensor(weight) else self.values

    def _own(self, grid: torch.Tensor) -> torch.Tensor:
        return self.shard.of(grid) if self.unstructured else grid

    def partial(self, values: torch.Tensor, sums: Callable[..., torch.Tensor] = block_scores) -> torch.Tensor:
        """`sums` of each block of `values`, to be added over the ranks that a block is cut over; zeros elsewhere."""
        shard, block_size = self.shard, self.carrier.mask_block_size
        wide = torch.promote_types(values.dtype, torch.float32)
        grid = torch.zeros(block_grid(self.seen.shape, block_size), dtype=wide, device=values.device)
        own, before = shard.blocks(grid, block_size)
        if values.numel():
            shape = (*values.shape[: shard.dim], before, *values.shape[shard.dim + 1 :])
            whole = torch.cat([values.new_zeros(shape), values], shard.dim) if before else values
            own.copy_(sums(whole, block_size))
        return grid


# State that does not start from zero: the setting that tells the optimizer which has it (Rprop, Adagrad) and its start.
_STARTS = {"step_size": ("step_sizes", "lr"), "sum": ("initial_accumulator_value", "initial_accumulator_value")}


def _states(optimizer: Any, weight: nn.Parameter) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What an optimizer keeps for a weight, with the weight's settings; also in one that works inside it.

    `ZeroRedundancyOptimizer` has such, on the rank that trains the weight.
    """
    while isinstance(optimizer, torch.optim.Optimizer):
        if weight in optimizer.state:
            groups = (group for group in optimizer.param_groups if any(p is weight for p in group["params"]))
            yield optimizer.state[weight], next(groups, {})
        optimizer = getattr(optimizer, "optim", None)


def _history(name: str, state: dict[str, Any], settings: dict[str, Any]) -> torch.Tensor | float:
    """What an optimizer's record of a constant squared gradient has come to by now, as a multiple of it."""
    step: torch.Tensor = state.get("step", torch.ones((), device="cpu"))
    if name == "exp_avg_sq" and "betas" in settings:
        return 1 - settings["betas"][1] ** step
    return step if name == "sum" else 1.0


def _block_sums(values: torch.Tensor, block_size: tuple[int, int]) -> torch.Tensor:
    """Sum of the values of each block, in float32 at least."""
    rows, columns = block_size
    pad = [0, 0] * (values.dim() - 2) + [0, -values.shape[1] % columns, 0, -values.shape[0] % rows]
    tiles = functional.pad(values, pad).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return tiles.sum((1, 3), dtype=torch.promote_types(values.dtype, torch.float32))
