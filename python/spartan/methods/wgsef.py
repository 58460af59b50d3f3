"""The weighted group sparse envelope: a proximal step towards the weights that the budget allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from spartan.distributed import largest, least_positive, total_over
from spartan.masks import MaskGroup, MaskSet
from spartan.methods.base import require_number, steps_of
from spartan.methods.dual_averaging import DualAveraging

__all__ = ["WGSEF"]

_ITERATIONS = 100
_CLOSE = 1e-6  # of the budget


@dataclass(frozen=True, kw_only=True)
class WGSEF(DualAveraging):
    """Proximal gradient steps on the convex envelope of theta^2 / 2 under the budget.

    s(theta) = min_u sum_b |theta_b|^2 / (2 u_b) with sum_b a_b u_b <= k and 0 <= u_b <= 1, where |.| is the Euclidean
    norm of a block and a its size: convex, |theta|^2 / 2 on what the budget allows, and the largest such function for
    blocks of one size. After each optimizer step, which made t of theta, with tau = eta lambda (eta the learning rate):

        u_b = clip(alpha |t_b| / sqrt(a_b) - tau, 0, 1),   alpha such that sum_b a_b u_b = k
        theta_b <- t_b u_b / (u_b + tau)

    which is argmin tau s(theta) + |theta - t|^2 / 2. Blocks with u = 0 are exactly zero, and skipped in the forward
    pass, but go on getting gradients; those with u = 1 shrink as by weight decay. The larger lambda is, the sooner no
    more blocks are left than the budget allows; in the end the rest is pruned. The number alpha is searched in each
    step, with some ten passes over the norms of blocks: cheap for blocks, less so for single weights. Where ranks
    choose for parts of the weights, they exchange two sums in each pass.

    Attributes:
        strength: lambda, above 0.
        ramp: fraction of the steps over which the budget shrinks; 0: the whole one from the first step.
        freeze: fraction of the steps after which the mask is fixed; at least `ramp`.
        interval: steps between proximal steps, an int of at least 1, or a float: a fraction of all steps; tau is that
            of all steps between.

    Source: Refael, Arbel, Huleihel, "Learning k-level structured sparse neural networks using group envelope
    regularization", arXiv 2212.12921; the proximal step derived from the definition, with budgets in weights.
    """

    keeps_zeros = False

    strength: float = 1.0
    ramp: float = 0.0

    grows_from_zero = True
    takes_pattern = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("strength", self.strength, 0.0)
        if self.strength == 0:
            raise ValueError("strength must be above 0; got 0")

    def start(self, masks: MaskSet) -> None:
        """Nothing: a proximal step follows a gradient step."""

    def choose(self, masks: MaskSet) -> None:
        """Make the proximal step."""
        if not masks.optimizers:
            raise ValueError(
                "WGSEF steps as far as the optimizer's learning rate says and has no optimizer: attach(optimizer), or"
                " by hand step(optimizer)"
            )
        param_groups = [group for optimizer in masks.optimizers for group in optimizer.param_groups]
        rates = {id(p): float(group["lr"]) for group in param_groups for p in group["params"]}
        progress = self.schedule(masks.total_steps)(masks.step)
        steps = steps_of(self.interval, masks.total_steps)
        for group in masks.groups:
            own = {rates[id(t.weight)] for t in group.tensors if id(t.weight) in rates}
            if len(own) > 1:
                raise ValueError(f"weights that share a budget must share a learning rate for WGSEF; got {sorted(own)}")
            _step(group, group.budget(progress), self.strength * steps * (own.pop() if own else 0.0))


def _step(group: MaskGroup, budget: float, tau: float) -> None:
    wide = torch.promote_types(group.tensors[0].values.dtype, torch.float32)
    costs = [tensor.costs.to(wide) for tensor in group.tensors]
    norms = [
        tensor.magnitudes(tensor.values.to(wide).square()).sqrt() / a.sqrt()
        for tensor, a in zip(group.tensors, costs, strict=True)
    ]
    _require_finite(group, norms)
    alpha = _search(norms, costs, tau, budget, group.group)
    for tensor, v in zip(group.tensors, norms, strict=True):
        u = _share(v, alpha, tau)
        tensor.hard.copy_(u > 0)
        factor = torch.where(u > 0, u / (u + tau), 0.0)
        tensor.values.mul_(tensor.expand(factor).to(tensor.values.dtype))
    group.changed()


def _require_finite(group: MaskGroup, norms: list[torch.Tensor]) -> None:
    """Raise, on all ranks alike, where a norm is not finite, before anything is changed."""
    if math.isfinite(float(largest(norms, group.group))):
        return
    for tensor, v in zip(group.tensors, norms, strict=True):
        norm = float(largest([v], group.group))
        if not math.isfinite(norm):
            raise ValueError(f"weight {tensor.name!r} must be finite; the norm of a block is {norm}")


def _share(v: torch.Tensor, alpha: float, tau: float) -> torch.Tensor:
    """u; where alpha is infinite, 1 for all that is not zero."""
    return (v > 0).to(v.dtype) if math.isinf(alpha) else (v * alpha - tau).clamp_(0, 1)


def _search(norms: list[torch.Tensor], costs: list[torch.Tensor], tau: float, budget: float, ranks: str = "") -> float:
    """alpha with sum a u = budget: Newton's method on a line with bends, or half the bracket where that is not fast.

    The sums run over the ranks of that group too, which have the same bits of them and so make the same steps.
    """

    def totals(*rows: list[torch.Tensor]) -> list[float]:
        own = [_total(x, a) for row in rows for x, a in zip(row, costs, strict=True)]
        sums: list[float] = total_over(torch.stack(own).reshape(len(rows), -1).sum(1), ranks).tolist()
        return sums

    taken, steepest, whole = totals([v > 0 for v in norms], norms, [v.new_ones(()).expand_as(v) for v in norms])
    if taken <= budget:
        return math.inf  # all that is not zero has room
    # sum a u <= alpha * steepest, and it is zero up to tau / largest; from the other end on all of them are 1.
    low = max(tau / float(largest(norms, ranks)), budget / steepest)
    high = (1 + tau) / float(least_positive(norms, ranks))
    alpha = (budget + tau * whole) / steepest
    missed = math.inf
    for _ in range(_ITERATIONS):
        if not low < alpha < high:
            alpha = math.sqrt(low) * math.sqrt(high)
        shares = [_share(v, alpha, tau) for v in norms]
        error = totals(shares)[0] - budget
        if abs(error) <= _CLOSE * budget:
            break
        low, high = (alpha, high) if error < 0 else (low, alpha)
        slope = totals([v * ((u > 0) & (u < 1)) for v, u in zip(norms, shares, strict=True)])[0]
        alpha = alpha - error / slope if slope and abs(error) <= missed / 2 else math.inf
        missed = abs(error)
    return alpha


def _total(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return x.sum(dtype=torch.float64) * a if a.dim() == 0 else (x * a).sum(dtype=torch.float64)
