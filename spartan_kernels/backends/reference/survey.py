"""What a solve knows of its problem before the first pass: checked, and the same on every rank of a group."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spartan_kernels.arguments import clamp_budget, inspectable, require_beta, require_costs, require_scores
from spartan_kernels.groups import gather, refusal, require_agreement, total


class Survey(NamedTuple):
    """For each row, over all ranks, of the entries that are not masked by -inf: u = v / a lies in [lowest, highest].

    `total` is the sum of their costs, to which `budget` is limited; a larger one is NaN.
    """

    lowest: torch.Tensor
    highest: torch.Tensor
    total: torch.Tensor
    budget: torch.Tensor

    @property
    def allowance(self) -> torch.Tensor:
        """The budget of a selection: no limit where it is all or more, however a sum in another order is rounded."""
        return torch.where(self.budget < self.total, self.budget, torch.inf)


def ratio(values: torch.Tensor, costs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """u = v / a and a, in float32 or float64: what decides a selection is rounded once, and alike on every backend."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    a = torch.ones((), dtype=dtype, device=values.device) if costs is None else costs.to(dtype)
    return values.to(dtype) / a, a


def survey(
    values: torch.Tensor,
    u: torch.Tensor,
    costs: torch.Tensor | None,
    budget: torch.Tensor,
    beta: torch.Tensor | None,
    group: str,
) -> Survey:
    """Check values [rows, n], costs, budget [rows] and beta, and sum them up, in one exchange.

    Raises:
        ValueError: on every rank alike, whichever rank has the bad value.
    """

    def check() -> None:
        require_scores("values", values)
        if costs is not None:
            require_costs(costs)
        if beta is not None:
            require_beta(beta)

    refused = refusal(check)
    wide = torch.float64
    a = torch.ones((), dtype=u.dtype, device=u.device) if costs is None else costs.to(u.dtype)
    a = a.expand_as(u)
    unmasked = u != -torch.inf
    infinite = torch.full_like(budget, torch.inf)  # the edges of an empty part
    facts = torch.stack(
        [
            budget.new_full(budget.shape, float(bool(refused))),
            budget,
            torch.zeros_like(budget) if beta is None else beta.to(wide).expand_as(budget),
            torch.where(unmasked, a, 0.0).sum(-1, dtype=wide),
            torch.where(unmasked, u, torch.inf).amin(-1).to(wide) if u.shape[1] else infinite,
            u.amax(-1).to(wide) if u.shape[1] else -infinite,
        ]
    )
    every = gather(facts, group)
    if inspectable(values):
        require_agreement(refused, every, group)
    sum_of_costs = total(every[:, 3])
    return Survey(every[:, 4].amin(0), every[:, 5].amax(0), sum_of_costs, clamp_budget(budget, sum_of_costs))
