"""Settings of their own for some of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from spartan.budgets import (
    BlockCosts,
    CostModel,
    Distribution,
    LayerSize,
    PricedWeight,
    PricePerBlock,
    distribute,
    kept_total,
    price,
    require_distribution,
    shares,
)
from spartan.distributed import Seen, is_dtensor, own_class, require_aligned, seen_weights
from spartan.masks import MaskedTensor, require_divisible
from spartan.methods.base import MaskSettings, SparseMethod, require_number, require_pattern
from spartan.nn.masked_attribute import mask_attribute
from spartan.nn.modules import largest_block, mask_weight, swappable
from spartan.nn.selection import (
    Candidate,
    Selector,
    find_weights,
    select_weights,
    skipped_weights,
)
from spartan_kernels.arguments import block_shape

__all__ = ["Group", "Part", "kept_by_part", "masked_tensor", "parts_of", "price_parts", "seen_of"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Weights that have a budget of their own, and settings that differ from the method's.

    Attributes:
        include: which weights: a pattern ("blocks.*.weight"), a type of module, a function of (name, module), or
            several of these; those that are dense by default too.
        exclude: the same, taken from the choice.
        sparsity: fraction of zeros of these weights alone, in [0, 1); None: they share the method's with the rest.
        block_size: 1, an int or (rows, columns); None: the method's.
        distribution: "global", "uniform", "erk" or sparsities by name, within the group; None: the method's.
        pattern: (n, m), such as (2, 4), in the place of the other three; None: the method's, but in a group with a
            sparsity of its own, which has blocks.

    Raises:
        TypeError, ValueError: a setting of the wrong type or outside its range, named.
    """

    include: Selector
    exclude: Selector | None = None
    sparsity: float | None = None
    block_size: int | tuple[int, int] | None = None
    distribution: Distribution | None = None
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            object.__setattr__(self, "pattern", require_pattern(self.pattern))
            others = {"sparsity": self.sparsity, "block_size": self.block_size, "distribution": self.distribution}
            for name, value in others.items():
                if value is not None:
                    raise ValueError(f"{name} must be left out with pattern {self.pattern}; got {value!r}")
        if self.sparsity is not None:
            require_number("sparsity", self.sparsity, 0.0, 1.0, open_end=True)
        if self.block_size is not None:
            block_shape(self.block_size)
        if self.distribution is not None:
            require_distribution(self.distribution)


@dataclass(frozen=True)
class Part:
    """Weights with the same settings; `sparsity` None: as the whole model has it; that of a pattern is its own."""

    weights: list[Candidate]
    block_size: tuple[int, int]
    distribution: Distribution
    sparsity: float | None = None
    costs: Sequence[BlockCosts] | None = None
    pattern: tuple[int, int] | None = None

    def sizes(self) -> list[LayerSize]:
        """What budgets need to know of each weight."""
        sizes = []
        for index, c in enumerate(self.weights):
            costs = None if self.costs is None else self.costs[index]
            if costs is None:
                largest: float = largest_block(c.masked_shape(self.block_size), c.block_size(self.block_size))
            else:
                largest = costs.largest
            stacked = c.weight.dim() - 2 if c.stack(self.block_size) else 0
            sizes.append(LayerSize(tuple(c.weight.shape), largest, c.name, costs and costs.total, stacked))
        return sizes

    def masked_tensors(self, method: SparseMethod, seen: dict[str, Seen]) -> list[MaskedTensor]:
        """Mask the weights, wherever they are used; `seen`: as what modules compute with them, by name."""
        costs: Sequence[BlockCosts | None] = self.costs or [None] * len(self.weights)
        return [
            masked_tensor(c, self.block_size, method, seen[c.name], own)
            for c, own in zip(self.weights, costs, strict=True)
        ]


def parts_of(
    model: nn.Module,
    method: MaskSettings,
    include: Selector | None,
    exclude: Selector | None,
    groups: Sequence[Group],
) -> tuple[list[Part], dict[str, str]]:
    """The weights to mask, by their settings, and why the other parameters are not, by name.

    A weight is in the first group that includes it; what is in none of them and chosen by `include`, or by default,
    comes first, with the settings of the method.

    Raises:
        ValueError: nothing is left to mask, a group without weights, a pattern of names that matches none; a pattern of
            n in m that the method does not take or that does not divide a weight.
    """
    if not isinstance(groups, Sequence) or not all(isinstance(group, Group) for group in groups):
        raise TypeError(f"groups must be a sequence of spartan.Group; got {groups!r}")
    found = find_weights(model)
    rest = select_weights(model, found, include, exclude)
    taken: set[str] = set()
    parts = []
    for index, group in enumerate(groups):
        free = [c for c in select_weights(model, found, group.include, group.exclude) if c.name not in taken]
        free = free if exclude is None else [c for c in free if not c.matches(exclude)]
        if not free:
            raise ValueError(f"groups[{index}] has no weight that is not in an earlier group or excluded; got {group}")
        taken |= {c.name for c in free}
        parts.append(_part(free, index, group, method))
    rest = [c for c in rest if c.name not in taken]
    if rest:
        parts.insert(0, _part(rest, None, Group(include=()), method))
    chosen = [c for part in parts for c in part.weights]
    skipped = skipped_weights(model, found, chosen, include, exclude)
    if not chosen:
        raise ValueError(f"model has no weight to sparsify; include= can choose others. Skipped: {skipped}")
    return parts, skipped


def _part(weights: list[Candidate], index: int | None, group: Group, method: MaskSettings) -> Part:
    """Weights with the settings of a group, and the method's where it has none."""
    pattern = group.pattern if group.pattern or group.sparsity is not None else method.pattern
    if pattern is None:
        size = method.block_size if group.block_size is None else group.block_size
        return Part(weights, block_shape(size), group.distribution or method.distribution, group.sparsity)
    if group.block_size is not None or group.distribution is not None:
        raise ValueError(
            f"groups[{index}] must have a sparsity of its own to have blocks where the method has the pattern"
            f" {pattern}; got {group}"
        )
    method.require_takes_pattern(pattern)
    for candidate in weights:
        stack = candidate.stack((1, 1))
        shape = candidate.weight.shape if stack is None else stack.matrix
        require_divisible(candidate.name, shape, pattern, candidate.transposed)
    return Part(weights, (1, 1), "uniform", 1 - pattern[0] / pattern[1], pattern=pattern)


def price_parts(parts: Sequence[Part], costs: CostModel | PricePerBlock, model: nn.Module) -> tuple[list[Part], float]:
    """The parts with the costs of their blocks, and what a unit of these is worth in the cost model's own.

    Raises:
        TypeError, ValueError: as `price`; a part with a pattern.
    """
    for part in parts:
        if part.pattern is not None:
            raise ValueError(f"costs are not for weights with a pattern; {part.weights[0].name!r} has {part.pattern}")
    weights = [
        PricedWeight(
            c.name,
            c.uses[0].module,
            c.weight,
            c.block_size(part.block_size),
            c.uses[0].parameter,
            c.stack(part.block_size),
        )
        for part in parts
        for c in part.weights
    ]
    priced, unit = price(costs, model, weights)
    own = iter(priced)
    return [replace(part, costs=[next(own) for _ in part.weights]) for part in parts], unit


def kept_by_part(parts: Sequence[Part], sparsity: float, counted: float) -> list[float]:
    """What each part keeps, weights or cost: by its own sparsity, or together with others so the rest has `sparsity`.

    Args:
        parts: of the masked weights.
        sparsity: of the method.
        counted: number of parameters, or the cost, that it refers to, those of parts with their own sparsity among
            them; these are not counted.

    Raises:
        ValueError: a sparsity that cannot be reached; the message says which can.
    """
    kept = [0.0] * len(parts)
    together = []
    for index, part in enumerate(parts):
        if part.sparsity is None:
            together.append(index)
        else:
            own = sum(size.total for size in part.sizes())
            kept[index] = kept_total(part.sizes(), part.sparsity, own, part.distribution)
            counted -= own
    if len(together) == 1:
        part = parts[together[0]]
        kept[together[0]] = kept_total(part.sizes(), sparsity, counted, part.distribution)
    elif together:
        for index in together:
            if not isinstance(parts[index].distribution, str):
                raise ValueError(
                    "distribution must be a name where groups share a budget, as a dictionary's would not be theirs"
                    f" alone; got {parts[index].distribution}"
                )
        whole = [_as_one_layer(parts[index]) for index in together]
        budgets = distribute(whole, kept_total(whole, sparsity, counted, "uniform"), "uniform")
        for index, budget in zip(together, budgets, strict=True):
            kept[index] = budget
    return kept


def _as_one_layer(part: Part) -> LayerSize:
    """A part as a layer whose largest block is the least that its budgets keep."""
    sizes = part.sizes()
    least = sum(max(sizes[i].largest_block for i in group) for group in shares(sizes, part.distribution))
    cost = None if part.costs is None else sum(size.total for size in sizes)
    return LayerSize((sum(size.count for size in sizes),), least, cost=cost)


def seen_of(model: nn.Module, parts: Sequence[Part]) -> dict[str, Seen]:
    """What modules compute with on this rank as each weight, by name.

    Raises:
        ValueError: a weight that FSDP divides already and that can only be masked before, or one whose blocks tensor
            parallelism divides.
    """
    weights = [candidate for part in parts for candidate in part.weights]
    sides = [candidate.block_size(part.block_size) for part in parts for candidate in part.weights]
    seen = seen_weights(model, [(c.uses[0].module, c.uses[0].parameter) for c in weights])
    for candidate, one, block_size in zip(weights, seen, sides, strict=True):
        weight: Any = candidate.weight
        require_aligned(candidate.name, weight, one, block_size)
        gathered = is_dtensor(weight) and weight.device_mesh != one.mesh
        if gathered and (candidate.read_elsewhere or not swappable(candidate.uses[0].module)):
            raise ValueError(
                f"weight {candidate.name!r} of {own_class(candidate.uses[0].module).__name__} must be masked before it"
                " is sharded: make the Sparsifier first and call fully_shard then, or leave it out with exclude="
            )
    return {candidate.name: one for candidate, one in zip(weights, seen, strict=True)}


def masked_tensor(
    candidate: Candidate,
    block_size: tuple[int, int],
    method: SparseMethod,
    seen: Seen,
    costs: BlockCosts | None = None,
) -> MaskedTensor:
    """Mask a weight wherever it is used.

    Raises:
        ValueError: a stack of matrices that tensor parallelism divides.
    """
    first, *others = candidate.uses
    stack = candidate.stack(block_size)
    if stack is not None:
        if seen.mesh is not None:
            raise ValueError(
                f"weight {candidate.name!r} is a stack of matrices {tuple(candidate.weight.shape)}, which cannot be"
                f" masked where tensor parallelism divides it ({seen.placements}); leave it out with exclude="
            )
        seen = replace(seen, shape=stack.turned_shape)
    carrier = mask_weight(
        first.module,
        candidate.block_size(block_size),
        soft=method.soft,
        preserve_scale=method.preserve_scale,
        straight_through=method.straight_through,
        read_elsewhere=candidate.read_elsewhere,
        parameter=first.parameter,
        seen=seen,
        stack=stack,
    )
    for use in others:
        mask_attribute(use.module, use.parameter, carrier)
    shared = tuple((use.module, use.parameter) for use in others)
    total = None
    if costs is not None:
        blocks = costs.blocks
        if stack is not None and isinstance(blocks, torch.Tensor):
            blocks = stack.turned(blocks)
        carrier.set_costs(seen.slice_of(blocks) if isinstance(blocks, torch.Tensor) else blocks)
        total = costs.total
    return MaskedTensor(
        candidate.name, first.module, carrier, seen, first.parameter, shared, candidate.transposed, total, stack
    )
