"""Rows that several programs share: what they compute, and that no number of rows takes more launches."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import spartan
from spartan_kernels import ops
from spartan_kernels.backends.triton import configs, long_hard, split_rows
from spartan_kernels.operands import HardTopk, SoftTopk, SoftTopkBackward
from spartan_kernels.testing import budget_error, make_costs, make_values, oracle_hard_topk

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
N = 9_001  # three tiles, the last of which is not whole
SCALAR = torch.ones((), dtype=torch.float64)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts for each of three rows."""
    monkeypatch.setattr(configs, "MAX_LONG_ROW", 8192)
    monkeypatch.setattr(configs, "INTERPRETED_PROGRAMS", 9)
    assert configs.row_parts(torch.empty(3, N)) == (configs.LONG_ROW_TILE, 3)


def problem(costs: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Rows with masked entries, a whole part of them in one, and budgets of what is not masked."""
    values = make_values("student_t", (N, 3), seed=1).T
    values[1, ::3], values[2, : configs.LONG_ROW_TILE] = -torch.inf, -torch.inf
    a = make_costs(costs, (3, N), seed=2)
    assert a is None or isinstance(a, torch.Tensor)
    live = torch.where(values == -torch.inf, 0.0, torch.ones(3, N) if a is None else a).sum(-1, dtype=torch.float64)
    return values, a, live * torch.tensor([0.01, 0.4, 0.9], dtype=torch.float64)


@interpreted
@pytest.mark.usefixtures("shared", "poisoned_memory")
@pytest.mark.parametrize("costs", ["none", "element"])
def test_masks_and_gradients_are_those_of_the_reference(costs: str) -> None:
    values, a, budget = problem(costs)
    weights, found = make_values("normal", (3, N), seed=3), []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [values.to(dtype), budget.clone(), 7 * SCALAR, *([] if a is None else [a.to(dtype)])]
        v, k, beta, *price = (leaf.detach().clone().requires_grad_() for leaf in leaves)
        mask = spartan.soft_topk(v, k, price[0] if price else None, beta, backend=backend)
        grads = torch.autograd.grad((mask * weights).sum(), [v, k, beta, *price])
        found.append([t.detach().double() for t in (mask, *grads)])
    assert budget_error(found[0][0], budget, a) < 1e-6
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@interpreted
@pytest.mark.usefixtures("shared", "poisoned_memory")
@pytest.mark.parametrize("beta", [0.0, 1e4])
def test_rows_that_a_few_trials_do_not_solve(beta: float) -> None:
    """And rows without a search: flat, nothing, everything."""
    values = torch.cat([make_values("student_t", (1, N), seed=4), torch.full((1, N), 1e13), torch.randn(1, N)])
    budget = torch.tensor([123.4, 0.37 * N, 0.0 if beta else float(N)], dtype=torch.float64)
    mask = ops.soft_topk(values, budget, beta=beta, backend="triton")
    assert budget_error(mask[:2], budget[:2]) < 1e-6
    assert torch.equal(mask[2], torch.full((N,), 0.0 if beta else 1.0))


@interpreted
@pytest.mark.usefixtures("shared", "poisoned_memory")
@pytest.mark.parametrize("costs", ["none", "power_of_two"])
def test_ties_go_to_the_lowest_index_whichever_part_it_is_in(costs: str) -> None:
    values = make_values("normal", (3, N), seed=5).mul(2).round()
    values[1, ::2] = -torch.inf
    a = make_costs(costs, (3, N), seed=6)
    assert a is None or isinstance(a, torch.Tensor)
    each = torch.ones(3, N) if a is None else a
    live = torch.where(values == -torch.inf, 0.0, each).sum(-1, dtype=torch.float64)
    for share in (0.3, 1.0):
        budget = (live * share).floor()
        hard = ops.hard_topk(values, budget, a, backend="triton")
        for row in range(3):
            kept = values[row] != -torch.inf
            exact = oracle_hard_topk(values[row][kept], budget[row], None if a is None else a[row][kept])
            assert torch.equal(hard[row][kept], exact), (row, share)
            assert not bool(hard[row][~kept].any())


@pytest.mark.usefixtures("shared")
def test_launches_do_not_grow_with_the_rows() -> None:
    counts = []
    for rows in (1, 3, 50):
        values, budget = torch.empty(rows, N), torch.ones(rows, dtype=torch.float64)
        threshold = torch.empty(rows, 2, dtype=torch.float64)
        forward = split_rows.forward_plan(SoftTopk(values, budget, None, SCALAR), values, threshold)
        grads = (values, values, budget, budget)
        backward = split_rows.backward_plan(SoftTopkBackward(values, values, threshold, None, SCALAR, False), grads)
        hard = long_hard.plan(HardTopk(values, budget, None), values.bool().view(torch.uint8))
        counts.append((len(forward), len(backward), len(hard)))
    assert counts == [(12, 2, 18)] * 3
