"""Hard top-k: by sorting; over several ranks, which cannot sort together, by radix."""

from __future__ import annotations

import torch

from spartan_kernels.backends.reference.survey import ratio, survey
from spartan_kernels.backends.shared import with_indices
from spartan_kernels.groups import sum_before, summed
from spartan_kernels.operands import HardTopk, HardTopkGlobal, HardTopkIndices

_DIGIT_BITS = 8


def select(ratio: torch.Tensor, costs: torch.Tensor, budget: torch.Tensor, group: str = "") -> torch.Tensor:
    """The longest prefix of each row, in descending `ratio`, whose costs sum to at most its budget; bool [rows, n].

    Ties go to the lowest index; over ranks to the lowest rank, then to the lowest index there. -inf is never selected.
    """
    unmasked = ratio != -torch.inf
    if group:
        kept = _select_over_ranks(ratio[0], costs.expand_as(ratio)[0].to(torch.float64), budget[0], group)
        return kept[None] & unmasked
    order = ratio.sort(dim=-1, descending=True, stable=True).indices
    spent = costs.expand_as(ratio).gather(-1, order).to(torch.float64).cumsum(-1)
    return torch.zeros_like(ratio, dtype=torch.bool).scatter(-1, order, spent <= budget[:, None]) & unmasked


def _select_over_ranks(ratio: torch.Tensor, costs: torch.Tensor, budget: torch.Tensor, group: str) -> torch.Tensor:
    """The selection of this rank's part [n]: where the budget runs out, one digit of the values' bits at a time."""
    keys, bits = _ordered_bits(ratio)
    kept = torch.zeros_like(keys, dtype=torch.bool)
    tied = torch.ones_like(kept)  # equal to the value at which it runs out, in the digits seen so far
    spent = torch.zeros_like(budget)
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        digit = (keys >> shift) & (2**_DIGIT_BITS - 1)
        own = costs.new_zeros(2**_DIGIT_BITS).index_add_(0, digit[tied], costs[tied])
        above = spent + summed(own, group).flip(0).cumsum(0).flip(0)  # costs of this digit and all greater
        last = (above > budget).sum() - 1  # the digit that exceeds the budget; -1: everything fits
        kept |= tied & (digit > last)
        tied &= digit == last
        spent = torch.where(last + 1 < 2**_DIGIT_BITS, above[(last + 1).clamp(max=2**_DIGIT_BITS - 1)], spent)
    before = spent + sum_before(costs[tied].sum(), group)
    kept[tied] = before + costs[tied].cumsum(0) <= budget
    return kept


def _ordered_bits(ratio: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Integers whose low bits, unsigned, are in the order of the floats; and how many bits."""
    size = ratio.element_size()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = (ratio + 0.0).view(integer)  # -0 is +0
    return torch.where(bits < 0, ~bits, bits ^ torch.iinfo(integer).min).to(torch.int64), 8 * size


def hard_topk_forward(o: HardTopk, group: str = "") -> torch.Tensor:
    """h for each row of values [rows, n]."""
    u, a = ratio(o.values, o.costs)
    return select(u, a, survey(o.values, u, o.costs, o.budget, None, group).allowance, group)


def hard_topk_indices_forward(o: HardTopkIndices) -> tuple[torch.Tensor, torch.Tensor]:
    """h for each row of values [rows, n], and the indices of k entries of each."""
    return with_indices(o, hard_topk_forward)


def hard_topk_global_forward(o: HardTopkGlobal) -> list[torch.Tensor]:
    """h for a list that shares one budget: one row, concatenated."""
    row = torch.cat([v.reshape(-1) for v in o.values])[None]
    a = (
        torch.cat([c.expand_as(v).reshape(-1) for v, c in zip(o.values, o.costs, strict=True)])[None]
        if o.costs
        else None
    )
    mask = hard_topk_forward(HardTopk(row.abs() if o.absolute else row, o.budget[None], a), o.group)
    parts = mask[0].split([v.numel() for v in o.values])
    return [part.reshape(v.shape).clone() for part, v in zip(parts, o.values, strict=True)]
