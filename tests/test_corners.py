"""The hard corners of the soft top-k: 7 sharpnesses x 4 densities x 4 kinds of values = 112, by rows and over a list.

At each of them, on every backend, in float32: the budget is met to 1e-6, the mask is monotone in the values, equal
values get equal masks, the gradient is finite and its sum vanishes, because v + c leaves the mask alone.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import spartan.functional as F
from spartan_kernels import new_solver_state, ops
from spartan_kernels.testing import budget_error, make_values

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BETAS = (1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6)
DENSITIES = (1e-6, 0.01, 0.9, 1 - 1e-6)
KINDS = ("normal", "quantised", "all_equal", "two_valued")
CORNERS = tuple(itertools.product(BETAS, DENSITIES, KINDS))
assert len(CORNERS) == 112


def lengths(backend: str) -> tuple[int, int]:
    """Of a row, and of a list: native kernels sample long lists, interpreted ones are slow."""
    return (4099, 140_007) if backend == "native" else (1009, 5003)


@functools.cache
def values_of(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return make_values(kind, shape, seed=seed)


@functools.cache
def order_of(kind: str, n: int) -> Tensor:
    """From the largest value to the smallest, ties in their own order: the hard top-k is its beginning."""
    return values_of(kind, (n,)).sort(descending=True, stable=True).indices


def split_sizes(n: int) -> list[int]:
    return [n // 3, 0, 1, n - n // 3 - 1]


def check_mask(values: Tensor, order: Tensor, mask: Tensor, budget: float) -> None:
    """Within [0, 1], the budget met, monotone in the values and the same for the same value, up to rounding."""
    assert mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1
    assert budget_error(mask, budget) <= 1e-6
    falling = mask[order]
    steps, larger = -falling.diff(), falling[:-1]
    assert (steps >= -1e-6 * larger).all(), f"a larger value has a mask smaller by {float(-steps.min()):.1e}"
    assert (steps <= 1e-6 * larger)[values[order].diff() == 0].all(), "equal values get different masks"


def check_gradient(gradient: Tensor, mask: Tensor, upstream: Tensor, beta: float) -> None:
    """Finite, and its sum, β Σ s (g − r), vanishes beside the sizes of the terms that cancel in it."""
    assert gradient.isfinite().all()
    m = mask.double()
    size = beta * (m * (1 - m) * upstream.double().abs()).sum(-1)
    # where few entries share what slope there is, float32 cannot tell 1 − m finely
    size = size + beta * m.numel() * torch.finfo(torch.float32).eps
    assert float(gradient.double().sum().abs() / size) <= 1e-4


@pytest.mark.operators("soft_topk_forward", "soft_topk_backward")
@pytest.mark.parametrize(("beta", "density", "kind"), CORNERS)
def test_rows(target: Any, beta: float, density: float, kind: str) -> None:
    n, _ = lengths(target.backend)
    leaf = values_of(kind, (3, n)).to(target.device, copy=True).requires_grad_()
    upstream = values_of("normal", (3, n), 1).to(target.device)
    mask = F.soft_topk(leaf, density * n, beta=beta, backend=target.backend)
    (gradient,) = torch.autograd.grad(mask, leaf, upstream)
    for row in range(3):
        values = leaf[row].detach()
        check_mask(values, values.argsort(descending=True), mask[row].detach(), density * n)
        check_gradient(gradient[row], mask[row].detach(), upstream[row], beta)


@pytest.mark.operators("soft_topk_global_forward", "soft_topk_global_backward")
@pytest.mark.parametrize(("beta", "density", "kind"), CORNERS)
def test_list(target: Any, beta: float, density: float, kind: str) -> None:
    _, n = lengths(target.backend)
    leaf = values_of(kind, (n,)).to(target.device, copy=True).requires_grad_()
    upstream = values_of("normal", (n,), 1).to(target.device)
    parts = list(leaf.split(split_sizes(n)))
    mask = torch.cat(F.soft_topk_global(parts, density * n, beta=beta, backend=target.backend))
    check_mask(leaf.detach(), order_of(kind, n).to(target.device), mask.detach(), density * n)
    (gradient,) = torch.autograd.grad(mask, leaf, upstream)
    check_gradient(gradient, mask.detach(), upstream, beta)


@pytest.mark.operators("solve_masks_")
@pytest.mark.parametrize(("beta", "density", "kind"), CORNERS)
def test_training_masks_cold_and_warm(target: Any, beta: float, density: float, kind: str) -> None:
    _, n = lengths(target.backend)
    whole = values_of(kind, (n,)).to(target.device)
    values, state = whole.split(split_sizes(n)), new_solver_state(target.device)
    order = order_of(kind, n).to(target.device)
    expected = torch.zeros(n, dtype=torch.bool, device=target.device)
    expected[order[: int(density * n)]] = True
    for _ in range(3):
        soft = [torch.full_like(v, torch.nan) for v in values]
        hard = [torch.ones_like(v, dtype=torch.bool) for v in values]
        ops.solve_masks_(values, density * n, None, beta, soft, hard, state, backend=target.backend)
        check_mask(whole, order, torch.cat(soft), density * n)
        assert torch.equal(torch.cat(hard), expected), f"{int(torch.cat(hard).sum())} entries are kept"
