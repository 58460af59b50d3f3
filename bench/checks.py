"""Checks that stay affordable on tens of millions of entries; the exact oracle serves the smaller cases."""

from __future__ import annotations

import torch
from torch import Tensor

from spartan_kernels.testing import assert_within_error_budget, budget_error, soft_topk_tolerance

check_close = assert_within_error_budget
_BUDGET = {torch.float32: 1e-6, torch.float64: 1e-9, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def check_budget_mask(
    mask: Tensor, budget: float, *, values: Tensor | None = None, beta: float = 1.0, dim: int | None = None
) -> None:
    """Check that a mask spends its budget and, given `values`, is m = sigmoid(beta v + mu) for one mu.

    Equation (1) has one solution, so a mask of that form that spends k is it, and no root need be found.
    mu is read off the entry nearest 1/2; two Newton steps in float64 correct its rounding.

    Raises:
        AssertionError: otherwise.
    """
    error = budget_error(mask, budget, dim=dim)
    if not error <= _BUDGET[mask.dtype]:
        raise AssertionError(f"the budget {budget:g} is missed by a relative {error:.2e}")
    if values is None:
        return
    v, m = values.detach().double(), mask.detach().double()
    center = int((m - 0.5).abs().argmin())
    logit = torch.logit(m[center])
    if not bool(logit.isfinite()):
        raise AssertionError(f"no entry of the mask lies inside (0, 1); the closest to 1/2 is {float(m[center])}")
    x = beta * (v - v[center]) + logit
    for _ in range(2):
        exact = torch.sigmoid(x)
        x = x + (budget - exact.sum()) / (exact * (1 - exact)).sum()
    exact = torch.sigmoid(x)
    assert_within_error_budget(
        mask,
        exact,
        exact.to(mask.dtype),
        floor=soft_topk_tolerance(exact, values, budget, None, beta),
        name="mask",
    )


def check_hard_mask(mask: Tensor, values: Tensor, budget: float) -> None:
    """Check that a mask keeps the floor(budget) largest of a flat tensor, ties to the lowest index.

    Raises:
        AssertionError: otherwise.
    """
    kept = int(mask.sum())
    if kept != int(budget):
        raise AssertionError(f"{kept} entries are kept, the budget affords {int(budget)}")
    if kept in (0, mask.numel()):
        return
    threshold = values[mask].min()
    if values[~mask].max() > threshold:
        raise AssertionError(f"an entry above the smallest one kept, {float(threshold):g}, is dropped")
    tied = mask[values == threshold]
    if bool((tied[1:] & ~tied[:-1]).any()):
        raise AssertionError("ties at the threshold do not go to the lowest index")
