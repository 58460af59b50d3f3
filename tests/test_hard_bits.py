"""Hard masks have the same bits on every backend, also where many values are multiples of their costs up to rounding.

The rule: v and a in float32 (float64 where that is what they are), u = v / a rounded to nearest, descending u, ties to
the lowest index, for as long as the next cost fits. The oracle here is NumPy's division and a stable sort.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spartan_kernels import ops
from spartan_kernels.backends import extension

pytestmark = pytest.mark.operators("hard_topk_forward", "hard_topk_global_forward", "solve_masks_")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DENSITIES = (0.03, 0.31, 0.5, 0.88)


def near_ties(n: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Values c a, for few c, each a rounding away from the product or not; costs a in [1/4, 4], no powers of two.

    Costs have 24 bits at most: their float64 sums are exact in any order.
    """
    g = torch.Generator().manual_seed(seed)
    a = (4.0 ** (2 * torch.rand(n, generator=g, dtype=torch.float64) - 1)).float().to(dtype)
    c = torch.tensor([0.3, 0.7, 1.1, -0.9], dtype=torch.float64)[torch.randint(4, (n,), generator=g)]
    products = (c * a.double()).to(dtype)
    away = torch.randint(-1, 2, (n,), generator=g) * torch.finfo(dtype).eps
    return (products.double() * (1 + away)).to(dtype), a


def mask_of_the_rule(values: Tensor, costs: Tensor, budget: float) -> Tensor:
    wide = np.float64 if values.dtype == torch.float64 else np.float32
    v, a = (x.double().cpu().numpy().astype(wide) for x in (values, costs.expand_as(values)))
    order = np.argsort(-(v / a), kind="stable")
    kept = np.zeros(len(v), dtype=bool)
    kept[order[np.cumsum(a[order].astype(np.float64)) <= budget]] = True
    return torch.from_numpy(kept)


def budgets(costs: Tensor, n: int) -> list[float]:
    total = float(costs.double().expand(n).sum())
    return [density * total for density in DENSITIES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 50, 300, 4097, 9000, 20_001])
def test_rows_have_the_bits_of_the_rule(target: Any, n: int, dtype: torch.dtype) -> None:
    values, costs = near_ties(n, dtype, n)
    for a in (costs, costs[:1].squeeze()):
        k = torch.tensor(budgets(a, n), dtype=torch.float64, device=target.device)
        rows = values.expand(len(k), n).to(target.device)
        found = ops.hard_topk(rows, k, a.to(target.device), backend=target.backend)
        for mask, budget in zip(found.cpu(), k.tolist(), strict=True):
            assert torch.equal(mask, mask_of_the_rule(values, a, budget)), (budget, a.dim())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(5,), (1000, 0, 37, 1), (30_000, 11, 5000)], ids=str)
def test_lists_have_the_bits_of_the_rule(target: Any, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    n = sum(sizes)
    values, costs = near_ties(n, dtype, n)
    values, costs = values.to(target.device), costs.to(target.device)
    parts, prices = list(values.split(sizes)), list(costs.split(sizes))
    for budget in budgets(costs, n):
        expected = mask_of_the_rule(values.abs(), costs, budget)
        found = ops.hard_topk_global(parts, budget, prices, absolute=True, backend=target.backend)
        assert torch.equal(torch.cat(found).cpu(), expected), budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_training_have_the_bits_of_the_rule(target: Any, dtype: torch.dtype) -> None:
    """Cold, warm, and after a jump of the budget."""
    sizes = (20_000, 3, 4444)
    values, costs = near_ties(sum(sizes), dtype, 7)
    values, costs = values.to(target.device), costs.to(target.device)
    parts, prices = list(values.split(sizes)), list(costs.split(sizes))
    soft = [torch.empty_like(v) for v in parts]
    hard = [torch.empty_like(v, dtype=torch.bool) for v in parts]
    state = ops.new_solver_state(target.device)
    for budget in [*budgets(costs, sum(sizes))[2:3] * 2, *budgets(costs, sum(sizes))]:
        ops.solve_masks_(parts, budget, prices, 20.0, soft, hard, state, absolute=True, backend=target.backend)
        assert torch.equal(torch.cat(hard).cpu(), mask_of_the_rule(values.abs(), costs, budget)), budget


@pytest.mark.operators()
def test_a_division_in_another_precision_is_found() -> None:
    """The inputs tell the rule apart from a quotient of twice the precision, and from a product with the reciprocal."""
    values, costs = near_ties(300, torch.float32, 300)
    for budget in budgets(costs, 300):
        kept = [torch.zeros(300, dtype=torch.bool) for _ in range(2)]
        for mask, u in zip(kept, (values.double() / costs.double(), values * (1 / costs)), strict=True):
            order = u.argsort(descending=True, stable=True)
            mask[order[costs[order].double().cumsum(0) <= budget]] = True
            assert not torch.equal(mask, mask_of_the_rule(values, costs, budget))


@pytest.mark.operators()
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_has_the_bits_of_the_rule(isa: str) -> None:
    if extension.unavailable() is not None:
        pytest.skip("the native backend is not here")
    order = ["baseline", "avx2", "avx512"]
    best = extension.build_info()["instruction_set"]
    if order.index(isa) >= order.index(best):
        pytest.skip(f"the tests above ran on {best}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "native-cpu"]
    environment = {**os.environ, "SPARTAN_ISA": isa}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
