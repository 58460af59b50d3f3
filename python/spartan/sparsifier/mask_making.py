"""The masks of a new sparsifier: the chosen weights masked, and grouped by the budget that they share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from spartan.budgets import distribute, shares
from spartan.distributed import is_dtensor
from spartan.masks import MaskGroup, PatternGroup
from spartan.methods.base import Method, SparseMethod
from spartan.nn.selection import common_kind
from spartan.sparsifier.parts import Part, kept_by_part, seen_of

__all__ = ["mask_groups", "require_takes_shards"]


def mask_groups(
    model: nn.Module, method: SparseMethod, parts: list[Part], counted: int, compute_soft: bool
) -> list[MaskGroup]:
    """Mask the weights of `parts`; nothing is changed if the sparsity, of `counted` weights, cannot be reached.

    `compute_soft`: compute the soft masks of single weights where they are needed, instead of keeping them.
    """
    require_takes_shards(method, {c.name: c.weight for part in parts for c in part.weights})
    seen = seen_of(model, parts)
    costs = [size.cost for part in parts for size in part.sizes() if size.cost is not None]
    kept = kept_by_part(parts, method.sparsity, sum(costs) if costs else counted)
    targets = [distribute(p.sizes(), k, p.distribution) for p, k in zip(parts, kept, strict=True)]
    members = [shares(part.sizes(), part.distribution) for part in parts]
    for part, budgets in zip(parts, members, strict=True):
        for budget in budgets:
            common_kind([part.weights[i].weight for i in budget])
    groups: list[MaskGroup] = []
    for index, part in enumerate(parts):
        tensors = part.masked_tensors(method, seen)
        lends = isinstance(part.distribution, str)  # the sparsity of a layer that was named is its own
        if part.pattern is not None:
            groups += [PatternGroup(tensor, part.pattern) for tensor in tensors]
            continue
        for budget, target in zip(members[index], targets[index], strict=True):
            groups.append(MaskGroup([tensors[i] for i in budget], target, index, lends, compute_soft))
    return groups


def require_takes_shards(method: Method, weights: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError if some weights are divided over ranks and the method does not work on parts."""
    divided = [name for name, weight in weights.items() if is_dtensor(weight)]
    if divided and not method.takes_shards:
        raise ValueError(
            f"{method.name} does not train weights that are divided over ranks, as {divided[0]!r} is;"
            " DistributedDataParallel leaves them whole"
        )
