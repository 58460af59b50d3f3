"""The entropic soft top-k by Sinkhorn iterations, and the training step's masks by sort and Sinkhorn.

Written from the algorithm of Tai, Tian, Lim, "Spartan", NeurIPS 2022: optimal transport between the
entries (masses a) and two bins (k kept, the rest dropped), in the log domain. Scaling the kept bin's marginal
moves its potential by log k - log S(mu); scaling the rows is the sigmoid. The stopping test reads a number
back from the device in each iteration, as training code does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_ITERATIONS = 1000
TOLERANCE = 1e-3


def sinkhorn_soft_topk(
    values: Tensor,
    budget: float,
    costs: Tensor | None = None,
    beta: float = 1.0,
    *,
    start: float | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Tensor:
    """Soft mask m = sigmoid(beta v / a + mu) of a flat tensor; mu by the fixed point mu += log(k / sum a m).

    Args:
        values: v, [n].
        budget: k.
        costs: a, [n], or None for ones.
        beta: sharpness.
        start: a threshold on v / a to start from; None starts at mu = 0.
        tolerance: stop when mu moves by less.
        max_iterations: stop after as many steps, converged or not.

    Returns:
        m, [n].
    """
    z = beta * (values if costs is None else values / costs)
    log_costs = None if costs is None else costs.log()
    log_budget = torch.tensor(budget, dtype=values.dtype, device=values.device).log()
    mu = torch.zeros((), dtype=values.dtype, device=values.device)
    if start is not None:
        mu = mu - beta * start
    for _ in range(max_iterations):
        log_mask = logsigmoid(z + mu)
        if log_costs is not None:
            log_mask = log_mask + log_costs
        step = log_budget - torch.logsumexp(log_mask, 0)
        mu = mu + step
        if abs(step.item()) < tolerance:
            break
    return torch.sigmoid(z + mu)


def sort_and_sinkhorn(weights: Sequence[Tensor], budget: float, beta: float) -> tuple[list[Tensor], list[Tensor]]:
    """Soft and hard masks of one training step over |theta|: sort for the hard ones, iterate for the soft."""
    scores = torch.cat([w.reshape(-1) for w in weights]).abs()
    ordered, order = scores.sort(descending=True)
    kept = int(budget)
    hard = torch.zeros_like(scores, dtype=torch.bool)
    hard[order[:kept]] = True
    soft = sinkhorn_soft_topk(scores, budget, beta=beta, start=ordered[kept - 1].item())
    sizes = [w.numel() for w in weights]
    return (
        [m.view_as(w) for m, w in zip(soft.split(sizes), weights, strict=True)],
        [h.view_as(w) for h, w in zip(hard.split(sizes), weights, strict=True)],
    )
