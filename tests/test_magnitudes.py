"""The budget holds at any finite scale of the values, and where entries are masked by the lowest number there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spartan

pytestmark = pytest.mark.operators("soft_topk_forward", "soft_topk_backward", "soft_topk_global_forward")

DTYPES = [torch.float32, torch.float64]


def miss(values: torch.Tensor, budget: float, beta: float, target: Any, listed: bool) -> float:
    """Relative error of the budget."""
    values = values.to(target.device)
    if listed:
        (mask,) = spartan.soft_topk_global([values], budget, beta=beta, backend=target.backend)
    else:
        mask = spartan.soft_topk(values, budget, beta=beta, backend=target.backend)
    assert bool((mask >= 0).all()) and bool((mask <= 1).all())
    return abs(mask.double().sum().item() / budget - 1)


@pytest.mark.parametrize("listed", [False, True], ids=["rows", "list"])
@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("n", [10, 1000])
@pytest.mark.parametrize("scale", [1e8, 1e13, -1e13, 1e20, -1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_entries_share_the_budget_at_any_scale(
    target: Any, dtype: torch.dtype, scale: float, n: int, beta: float, listed: bool
) -> None:
    values = torch.full((n,), scale, dtype=dtype)
    for budget in (0.1 * n, 0.37 * n + 0.2, 0.9 * n):
        assert miss(values, budget, beta, target, listed) < 1e-6
    values[::2] = -scale
    for budget in (0.2 * n, 0.5 * n, 0.8 * n):
        assert miss(values, budget, beta, target, listed) < 1e-6


@pytest.mark.parametrize("listed", [False, True], ids=["rows", "list"])
@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("n", [9, 64, 1000])
@pytest.mark.parametrize("lowest", ["smallest", -1e30, -1e9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_masked_by_the_lowest_number_take_no_part_of_the_budget(
    target: Any, dtype: torch.dtype, lowest: float | str, n: int, beta: float, listed: bool
) -> None:
    torch.manual_seed(0)
    values = torch.randn(n, dtype=dtype)
    values[n // 2 :] = torch.finfo(dtype).min if lowest == "smallest" else lowest
    beyond = lowest == "smallest" and dtype == torch.float64 and target.backend == "native"  # refused, see below
    for budget in (1.0, n // 4 + 0.3, float(n // 2), *(() if beyond else (0.5 * n + 1.5, n - 1.0))):
        assert miss(values, budget, beta, target, listed) < 1e-6
    kept = spartan.soft_topk(values.to(target.device), 0.25 * n, beta=beta, backend=target.backend)
    assert beta < 1 or kept[n // 2 :].max() < 1e-36  # where the exponential is cut off


@pytest.mark.parametrize("listed", [False, True], ids=["rows", "list"])
@pytest.mark.parametrize("lowest", ["smallest", -1e30, 1e13])
@pytest.mark.parametrize("n", [9, 64])
def test_bfloat16_is_solved_as_float32_and_then_rounded(target: Any, n: int, lowest: Any, listed: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(n).bfloat16()
    values[n // 2 :] = torch.finfo(torch.bfloat16).min if lowest == "smallest" else lowest
    values = values.to(target.device)
    for budget in (1.0, 0.37 * n + 0.2, 0.9 * n):
        masks = []
        for v in (values, values.float()):
            if listed:
                masks += spartan.soft_topk_global([v], budget, beta=2.0, backend=target.backend)
            else:
                masks.append(spartan.soft_topk(v, budget, beta=2.0, backend=target.backend))
        assert abs(masks[1].double().sum().item() / budget - 1) < 1e-6
        torch.testing.assert_close(masks[0].float(), masks[1], rtol=2**-8, atol=1e-36)


def test_a_budget_may_run_out_far_from_both_ends_of_the_values(target: Any) -> None:
    values = torch.tensor([0.0, 0.0, 1.0, -5.7648674184736196e29, -1.0053379514461109e30], device=target.device)
    mask = spartan.soft_topk(values, 3.75, beta=20.0, backend=target.backend)
    torch.testing.assert_close(mask.cpu(), torch.tensor([1.0, 1.0, 1.0, 0.75, 0.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("listed", [False, True], ids=["rows", "list"])
def test_a_budget_that_runs_out_at_the_edge_of_float64_is_refused(target: Any, listed: bool) -> None:
    if target.backend != "native":
        pytest.skip("float64 without the reference's patience")
    values = torch.randn(64, dtype=torch.float64)
    values[32:] = torch.finfo(torch.float64).min
    with pytest.raises(ValueError, match="values must not span so many magnitudes"):
        miss(values, 40.0, 1.0, target, listed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_masked_scores_is_zero(target: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(40, dtype=dtype, device=target.device)
    values[20:] = torch.finfo(dtype).min
    values.requires_grad_()
    weights = torch.randn(40, dtype=dtype, device=target.device)
    (spartan.soft_topk(values, 5.0, beta=2.0, backend=target.backend) * weights).sum().backward()
    part = values.detach()[:20].double().requires_grad_()
    (spartan.soft_topk(part, 5.0, beta=2.0, backend="reference") * weights[:20]).sum().backward()
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(values.grad[:20].double(), part.grad, **close)
    assert values.grad[20:].abs().max() < 1e-36
