"""Rows on the extension: every short length, rows in cache and past it, any stride, storage in 16 bits, any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import spartan
from spartan_kernels import hard_topk, soft_topk
from spartan_kernels.backends import extension
from spartan_kernels.backends.native import rows
from spartan_kernels.testing import budget_error, make_costs, oracle_hard_topk, total_cost

pytestmark = [
    pytest.mark.skipif(extension.unavailable() is not None, reason=str(extension.unavailable())),
    pytest.mark.usefixtures("poisoned_memory"),
]

LENGTHS = (*range(1, 71), 128, 255, 256, 257, 1000)


def _random(rows: int, n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _costs(kind: str, rows: int, n: int) -> Any:
    return make_costs("power_of_two", (n,)) if kind == "shared" else make_costs(kind, (rows, n))


@pytest.mark.parametrize("beta", [0.0, 0.3, 30.0, 1e4])
@pytest.mark.parametrize("kind", ["none", "scalar", "shared", "power_of_two"])
def test_every_short_length_meets_its_budgets(kind: str, beta: float) -> None:
    for n in LENGTHS:
        rows = 1 + 7 * n % 53
        values, a = _random(rows, n, n), _costs(kind, rows, n)
        share = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) * 0.98 + 0.01
        budget = total_cost(a, values, -1) * share
        mask = soft_topk(values, budget, a, beta, backend="native")
        assert float(budget_error(mask, budget, a)) <= 1e-6, n
        ratio = values if a is None else values / a
        order = ratio.argsort(-1)
        assert (mask.gather(-1, order).diff(dim=-1) >= -1e-6).all(), f"not monotone for {n}"
        hard = hard_topk(values, budget, a, backend="native")
        assert torch.equal(hard, oracle_hard_topk(values, budget, a)), n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 17, 64, 256, 257, 5000, 131_072, 140_001])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_stored_in_16_bits_are_those_widened(n: int, dtype: torch.dtype, masked: bool) -> None:
    values = _random(21 if n < 9000 else 2, n, n, dtype)
    if masked:
        values[1, n - n // 4 :] = -torch.inf

    def found(v: Tensor) -> list[Tensor]:
        leaf = v.clone().requires_grad_()
        mask = spartan.soft_topk(leaf, 0.4 * n, beta=7.0, backend="native")
        upstream = _random(len(v), n, n + 1).to(dtype).to(v.dtype)
        (gradient,) = torch.autograd.grad(mask, leaf, upstream)
        return [mask.detach(), gradient, hard_topk(v, 0.4 * n, backend="native")]

    for stored, widened in zip(found(values), found(values.float()), strict=True):
        assert torch.equal(stored, widened.to(stored.dtype))


def test_no_row_stored_in_16_bits_is_copied_whole() -> None:
    for n in (4, 5000, 1_000_000):
        values = torch.zeros(2, n, dtype=torch.bfloat16)
        assert rows.Rows(values, None).values.data_ptr() == values.data_ptr()


@pytest.mark.parametrize("n", [2, 4, 30, 300])
def test_rows_apart_in_memory_and_neighbours_change_nothing(n: int) -> None:
    base = _random(50, n + 9, n)
    view = base[3:, 5 : 5 + n]
    mask = soft_topk(view, 0.3 * n, beta=12.0, backend="native")
    assert torch.equal(mask, soft_topk(view.contiguous(), 0.3 * n, beta=12.0, backend="native"))
    alone = torch.cat([soft_topk(row[None], 0.3 * n, beta=12.0, backend="native") for row in view])
    assert torch.equal(mask, alone)


@pytest.mark.parametrize("n", [131_072, 131_073])
def test_rows_at_the_end_of_the_cache(n: int) -> None:
    values = _random(3, n, n)
    budget = torch.tensor([50.0, 0.3 * n, n - 20.0], dtype=torch.float64)
    mask = soft_topk(values, budget, beta=9.0, backend="native")
    assert float(budget_error(mask, budget)) <= 1e-6
    assert torch.equal(hard_topk(values, budget, backend="native").sum(-1), budget.floor().long())


@pytest.mark.parametrize("n", [4, 7, 300])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_row_among_many_raises(n: int, bad: float) -> None:
    values = _random(40, n, n)
    values[33, n - 1] = bad
    for f in (soft_topk, hard_topk):
        with pytest.raises(ValueError, match="values must be finite"):
            f(values, 2.0, backend="native")
    budget = torch.full((40,), 2.0, dtype=torch.float64)
    budget[17] = n + 1.0
    for f in (soft_topk, hard_topk):
        with pytest.raises(ValueError, match="budget must be in"):
            f(values.nan_to_num(0.0, 0.0), budget, backend="native")
