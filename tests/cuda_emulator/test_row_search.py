"""The CUDA row kernels on the emulator: budgets at any sharpness and density, for every way in which rows are kept.

Run by tests/test_cuda_emulated.py, which builds the emulated extension and loads it with the plugin beside this file.
"""

from __future__ import annotations

import os

import pytest
import torch

from spartan_kernels import ops
from spartan_kernels.backends.cuda import soft_topk
from spartan_kernels.operands import SoftTopk
from spartan_kernels.testing import make_values, oracle_soft_topk

pytestmark = pytest.mark.skipif(not os.environ.get("SPARTAN_EMULATED"), reason="needs the emulated CUDA extension")

DENSITIES = torch.tensor([1e-4, 0.03, 0.25, 0.5, 0.77, 1 - 1e-4], dtype=torch.float64)
# one thread, groups of 4, 8 and 32, blocks of 256; rows of 5000 stay in shared memory, with costs those from 17 on
LENGTHS = (1, 3, 4, 13, 50, 64, 200, 300, 1024, 1500, 5000)


def costs_of(kind: str, shape: tuple[int, int]) -> torch.Tensor | None:
    if kind == "none":
        return None
    return torch.tensor(0.37) if kind == "one" else 10 ** (4 * torch.rand(shape) - 2)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", ["none", "one", "many"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 8.0, 1e4])
def test_budgets_hold_where_entries_are_masked_too(n: int, kind: str, beta: float) -> None:
    values = torch.cat([make_values(spread, (3, n)) for spread in ("normal", "lognormal")])
    values[1::2][torch.rand(3, n) < 0.2] = -torch.inf
    values[:, 0] = 0.1
    costs = costs_of(kind, (6, n))
    values = values if costs is None else values * costs
    a = torch.ones(6, n, dtype=torch.float64) if costs is None else costs.double().expand(6, n)
    live = values > -torch.inf
    total = (a * live).sum(1)
    budget = total * DENSITIES
    soft = ops.soft_topk(values, budget, costs, beta, backend="cuda")
    assert bool((soft[~live] == 0).all()) and bool((soft >= 0).all()) and bool((soft <= 1).all())
    kept = (a * soft.double()).sum(1)
    assert bool(((kept - budget).abs() <= 1e-6 * budget).all()), kept / budget - 1
    for row in range(6):
        here = live[row]
        wide = oracle_soft_topk(values[row, here], budget[row], None if costs is None else a[row, here], beta)
        # beta v / a and the threshold are rounded to float32; at 1e4 one entry may hold all that a budget may miss
        logits = beta * values[row, here].double() / a[row, here]
        slack = (2e-3 + 1e-6 * n if beta == 1e4 else 3e-6) + 2**-21 * float((logits.abs() * wide * (1 - wide)).max())
        assert float((soft[row, here] - wide).abs().max()) < slack


@pytest.mark.parametrize("n", [4, 64, 300, 1500])
def test_rows_that_the_float32_search_leaves(n: int) -> None:
    """Far from zero, 1 / beta is finer than the entries; float64 finds the budget, as near as their steps allow."""
    values = make_values("normal", (4, n)) * 1e13
    budget = torch.tensor([0.3, 0.5, 0.61, 0.9], dtype=torch.float64) * n
    soft = ops.soft_topk(values, budget, None, 1e4, backend="cuda")
    assert float((soft.double().sum(1) / budget - 1).abs().max()) <= 1e-6


@pytest.mark.parametrize("n", LENGTHS)
def test_nothing_everything_and_what_cannot_be(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_topk, "check_rows", lambda *_: None)  # as on a GPU, where the host does not look
    values = make_values("normal", (5, n))
    values[3, n // 2] = torch.nan
    values[4, n // 2] = torch.inf
    budget = torch.tensor([0.0, n, 1.01 * n, 0.5 * n, 0.5 * n], dtype=torch.float64)
    soft, _ = soft_topk.soft_topk_forward(SoftTopk(values, budget, None, torch.tensor(2.0, dtype=torch.float64)))
    assert bool((soft[0] == 0).all()) and bool((soft[1] == 1).all()) and bool(soft[2:].isnan().all())
