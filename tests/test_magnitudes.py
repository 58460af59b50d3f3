"""The budget holds at any finite scale of the values, and where entries are masked by the lowest number there is."""

from __future__ import annotations

import pytest
import torch

import spartan
from spartan_kernels import dispatch

BACKENDS = [
    n for n in ("native", "reference") if dispatch.refusal("soft_topk_forward", n, "cpu", torch.float32) is None
]
DTYPES = [torch.float32, torch.float64]


def miss(values: torch.Tensor, budget: float, beta: float, backend: str, listed: bool) -> float:
    """Relative error of the budget."""
    if listed:
        (mask,) = spartan.soft_topk_global([values], budget, beta=beta, backend=backend)
    else:
        mask = spartan.soft_topk(values, budget, beta=beta, backend=backend)
    assert bool((mask >= 0).all()) and bool((mask <= 1).all())
    return abs(mask.double().sum().item() / budget - 1)


@pytest.mark.parametrize("listed", [False, True], ids=["rows", "list"])
@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("n", [10, 1000])
@pytest.mark.parametrize("scale", [1e8, 1e13, -1e13, 1e20, -1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_entries_share_the_budget_at_any_scale(
    backend: str, dtype: torch.dtype, scale: float, n: int, beta: float, listed: bool
) -> None:
    values = torch.full((n,), scale, dtype=dtype)
    for budget in (0.1 * n, 0.37 * n + 0.2, 0.9 * n):
        assert miss(values, budget, beta, backend, listed) < 1e-6
    values[::2] = -scale
    for budget in (0.2 * n, 0.5 * n, 0.8 * n):
        assert miss(values, budget, beta, backend, listed) < 1e-6


@pytest.mark.parametrize("listed", [False, True], ids=["rows", "list"])
@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("n", [9, 64, 1000])
@pytest.mark.parametrize("lowest", ["smallest", -1e30, -1e9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_masked_by_the_lowest_number_take_no_part_of_the_budget(
    backend: str, dtype: torch.dtype, lowest: float | str, n: int, beta: float, listed: bool
) -> None:
    torch.manual_seed(0)
    values = torch.randn(n, dtype=dtype)
    values[n // 2 :] = torch.finfo(dtype).min if lowest == "smallest" else lowest
    beyond = lowest == "smallest" and dtype == torch.float64 and backend == "native"  # refused, see below
    for budget in (1.0, n // 4 + 0.3, float(n // 2), *(() if beyond else (0.5 * n + 1.5, n - 1.0))):
        assert miss(values, budget, beta, backend, listed) < 1e-6
    kept = spartan.soft_topk(values, 0.25 * n, beta=beta, backend=backend)
    assert beta < 1 or kept[n // 2 :].max() < 1e-36  # where the exponential is cut off


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_budget_may_run_out_far_from_both_ends_of_the_values(backend: str) -> None:
    values = torch.tensor([0.0, 0.0, 1.0, -5.7648674184736196e29, -1.0053379514461109e30])
    mask = spartan.soft_topk(values, 3.75, beta=20.0, backend=backend)
    torch.testing.assert_close(mask, torch.tensor([1.0, 1.0, 1.0, 0.75, 0.0]), rtol=0, atol=1e-5)


@pytest.mark.skipif("native" not in BACKENDS, reason="needs the extension")
@pytest.mark.parametrize("listed", [False, True], ids=["rows", "list"])
def test_a_budget_that_runs_out_at_the_edge_of_float64_is_refused(listed: bool) -> None:
    values = torch.randn(64, dtype=torch.float64)
    values[32:] = torch.finfo(torch.float64).min
    with pytest.raises(ValueError, match="values must not span so many magnitudes"):
        miss(values, 40.0, 1.0, "native", listed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_masked_scores_is_zero(backend: str) -> None:
    torch.manual_seed(0)
    values = torch.randn(40, dtype=torch.float64)
    values[20:] = torch.finfo(torch.float64).min
    values.requires_grad_()
    weights = torch.randn(40, dtype=torch.float64)
    (spartan.soft_topk(values, 5.0, beta=2.0, backend=backend) * weights).sum().backward()
    part = values.detach()[:20].requires_grad_()
    (spartan.soft_topk(part, 5.0, beta=2.0, backend="reference") * weights[:20]).sum().backward()
    torch.testing.assert_close(values.grad[:20], part.grad, rtol=1e-9, atol=1e-12)
    assert values.grad[20:].abs().max() < 1e-36
