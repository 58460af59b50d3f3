"""What only the extension has: problems past its sample, every way to the threshold, each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import spartan.functional as F
from spartan_kernels import hard_topk, hard_topk_global, new_solver_state, soft_topk, soft_topk_global, solve_masks_
from spartan_kernels.backends import extension
from spartan_kernels.testing import make_costs, make_values, oracle_hard_topk

pytestmark = pytest.mark.skipif(extension.unavailable() is not None, reason=str(extension.unavailable()))

N = 300_007  # past the sample (131,072 float32 values), not a multiple of anything


def _values(name: str, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(N, generator=g)
    return {
        "normal": normal,
        "sorted": normal.sort().values,
        "heavy": normal / torch.rand(N, generator=g).clamp_min(1e-3),
        "bfloat16": normal.bfloat16().float(),  # ties at every threshold
        "equal": torch.full((N,), 0.3),  # more candidates than there is room for: radix over everything
        "two": (torch.rand(N, generator=g) < 0.3).float(),
        "plateau": torch.where(torch.arange(N) < N // 10, normal.abs() + 5, normal.clamp(-1, 1)),
        "scales": normal * torch.logspace(-3, 3, N),
    }[name]


def _sorted_selection(u: torch.Tensor, costs: torch.Tensor, budget: float) -> torch.Tensor:
    order = u.sort(descending=True, stable=True).indices
    spent = costs.double()[order].cumsum(0)
    return torch.zeros(N, dtype=torch.bool).scatter(0, order, spent <= budget)


@pytest.mark.parametrize("density", [1e-4, 0.03, 0.5, 0.97, 1 - 1e-4])
@pytest.mark.parametrize("name", ["normal", "sorted", "heavy", "bfloat16", "equal", "two", "plateau", "scales"])
def test_large_lists_meet_the_budget_and_select_exactly(name: str, density: float) -> None:
    values = _values(name, seed=len(name))
    parts = list(values.split([N // 3, 0, 1, N - N // 3 - 1]))
    budget = float(int(N * density))
    exact = _sorted_selection(values, torch.ones(N), budget)
    for beta in (0.5, 30.0, 1e4):
        masks = torch.cat(soft_topk_global(parts, budget, beta=beta, backend="native"))
        assert abs(masks.double().sum().item() - budget) <= 1e-6 * budget
        soft = [torch.full_like(p, torch.nan) for p in parts]
        hard = [torch.ones_like(p, dtype=torch.bool) for p in parts]
        solve_masks_(parts, budget, None, beta, soft, hard, new_solver_state(), backend="native")
        assert torch.equal(torch.cat(hard), exact)
        # two thresholds that both meet the budget move every entry the same way: by as much as the budgets differ
        assert (torch.cat(soft) - masks).double().abs().sum() <= 3e-6 * budget
    assert torch.equal(torch.cat(hard_topk_global(parts, budget, backend="native")), exact)


@pytest.mark.parametrize("name", ["normal", "bfloat16", "scales"])
def test_large_lists_with_unequal_costs(name: str) -> None:
    values = _values(name, seed=3).abs() + 0.1
    costs = torch.randint(1, 9, (N,), generator=torch.Generator().manual_seed(4)).float()
    split = [N // 2, N - N // 2]
    budget = 0.2 * costs.double().sum().item()
    masks = soft_topk_global(list(values.split(split)), budget, list(costs.split(split)), 5.0, backend="native")
    assert abs((torch.cat(masks).double() * costs).sum().item() - budget) <= 1e-6 * budget
    hard = torch.cat(hard_topk_global(list(values.split(split)), budget, list(costs.split(split)), backend="native"))
    assert torch.equal(hard, _sorted_selection(values / costs, costs, budget))
    per_tensor = [2.0, 0.5]
    flat = torch.cat([torch.full((n,), c) for n, c in zip(split, per_tensor, strict=True)])
    budget = 0.3 * flat.double().sum().item()
    masks = soft_topk_global(list(values.split(split)), budget, per_tensor, 5.0, backend="native")
    assert abs((torch.cat(masks).double() * flat).sum().item() - budget) <= 1e-6 * budget
    hard = torch.cat(hard_topk_global(list(values.split(split)), budget, per_tensor, backend="native"))
    assert torch.equal(hard, _sorted_selection(values / flat, flat, budget))


def test_warm_solves_follow_a_moving_problem() -> None:
    """Drift, a shrinking budget, a rising beta and a sudden jump: every step as good as a cold one."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(N, generator=g) * 0.02
    state = new_solver_state()
    soft, hard = [torch.empty(N)], [torch.empty(N, dtype=torch.bool)]
    for step in range(30):
        weight = weight + 2e-4 * torch.randn(N, generator=g)
        if step == 20:
            weight = weight * 7
        budget, beta = float(int(N * max(1 - step / 10, 0.05))), 1.0 + 20.0 * step
        solve_masks_([weight], budget, None, beta, soft, hard, state, absolute=True, backend="native")
        assert abs(soft[0].double().sum().item() - budget) <= 1e-6 * budget
        assert torch.equal(hard[0], _sorted_selection(weight.abs(), torch.ones(N), budget))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [7, N])
@pytest.mark.parametrize("budget", [0.0, 3.0])
def test_non_finite_values_raise_wherever_they_are(bad: float, n: int, budget: float) -> None:
    values = torch.randn(n)
    values[n - 2] = bad
    with pytest.raises(ValueError, match="values must be finite"):
        soft_topk_global([values], budget, backend="native")
    with pytest.raises(ValueError, match="values must be finite"):
        hard_topk_global([values], budget, backend="native")
    with pytest.raises(ValueError, match="values must be finite"):
        solve_masks_([values], budget, None, 1.0, [values.clone()], [values > 0], new_solver_state(), backend="native")


def test_long_rows_and_double_precision() -> None:
    values = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    budget = torch.tensor([1000.5, 250_000.0], dtype=torch.float64)
    mask = soft_topk(values, budget, beta=40.0, backend="native")
    assert ((mask.sum(-1) - budget).abs() <= 1e-10 * budget).all()


_VARIANT = """
import sys, torch
from spartan_kernels import hard_topk, info, masked_weight, masked_weight_coupling, soft_topk
assert info()["native"]["instruction_set"] == sys.argv[1], info()["native"]
g = torch.Generator().manual_seed(0)
for dtype, rtol, atol in ((torch.float32, 2e-5, 1e-6), (torch.float64, 1e-9, 1e-12)):
    for n in (1, 15, 1000, 4099):
        v = torch.randn(3, n, generator=g, dtype=torch.float64).to(dtype)
        a = torch.rand(n, generator=g, dtype=torch.float64).to(dtype) + 0.5
        k = 0.3 * a.double().sum().item()
        m, r = (soft_topk(v, k, a, 3.0, backend=b) for b in ("native", "reference"))
        torch.testing.assert_close(m, r, rtol=rtol, atol=atol)
        assert torch.equal(hard_topk(v, k, a, backend="native"), hard_topk(v, k, a, backend="reference"))
    w = torch.randn(33, 50, generator=g, dtype=torch.float64).to(dtype)
    for block, grid in ((1, (33, 50)), ((8, 16), (5, 4))):
        s = torch.rand(grid, generator=g, dtype=torch.float64).to(dtype)
        for f in (lambda b: masked_weight(w, s, s > 0.5, block, backend=b),
                  lambda b: masked_weight_coupling(w * 2, w, s, block, beta=3.0, costs=2.0, backend=b)):
            torch.testing.assert_close(f("native"), f("reference"), rtol=1e-5, atol=1e-6)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_computes_the_same(isa: str) -> None:
    order = ["baseline", "avx2", "avx512"]
    best = extension.build_info()["instruction_set"]
    if order.index(isa) > order.index(best):
        pytest.skip(f"this machine has no {isa}: its best is {best}")
    environment = {**os.environ, "SPARTAN_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", _VARIANT, isa],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_scratch_memory_stays_under_four_mebibytes() -> None:
    for length in (10, 131_072, 131_073, 25_600_000, 2**40):
        assert extension.native.cpu.workspace_bytes(1, length, 4) < 4 << 20
        assert extension.native.cpu.workspace_bytes(1, length, 8) < 4 << 20
        assert extension.native.cpu.workspace_bytes(1, length, 4, grouped=True) < 4 << 20
    for element_size, threads in [(2, 16), (4, 16), (8, 16)]:  # rows that all threads solve together
        assert extension.native.cpu.rows_workspace_bytes(25_600_000, element_size, threads) < 4 << 20


NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("costs", [False, True])
def test_narrow_storage_is_float32_rounded_once(dtype: torch.dtype, costs: bool) -> None:
    """What is stored in 16 bits is computed in float32: the bits of a float32 copy's solve, rounded to even."""
    g = torch.Generator().manual_seed(3)
    parts = [torch.randn(n, generator=g).to(dtype) for n in (N, 5, 2049, 0)]
    prices = [(0.5 + torch.rand(p.shape, generator=g)).to(dtype) for p in parts] if costs else None
    wide = [p.float() for p in parts]
    wide_prices = [a.float() for a in prices] if prices else None
    weights = [a.double() for a in prices or [torch.ones_like(p) for p in parts]]
    budget = 0.1 * sum(a.sum().item() for a in weights)
    upstream = [torch.randn(p.shape, generator=g).to(dtype) for p in parts]
    results = []
    for values, a, grads in ((parts, prices, upstream), (wide, wide_prices, [u.float() for u in upstream])):
        leaves = [v.clone().requires_grad_() for v in values]
        beta = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
        masks = F.soft_topk_global(leaves, budget, a, beta, backend="native")
        gradients = torch.autograd.grad(masks, [*leaves, beta], grads)
        soft = [torch.full_like(v, torch.nan) for v in values]
        hard = [torch.ones_like(v, dtype=torch.bool) for v in values]
        state = new_solver_state()
        for _ in range(2):
            solve_masks_(values, budget, a, 8.0, soft, hard, state, absolute=True, backend="native")
        chosen = hard_topk_global(values, budget, a, absolute=True, backend="native")
        results.append(([*masks, *soft], hard, chosen, gradients, state))
    narrow, full = results
    for got, expected in zip(narrow[0], full[0], strict=True):
        assert torch.equal(got, expected.to(dtype))
    spent = sum((a * m.double()).sum().item() for a, m in zip(weights, full[0][: len(parts)], strict=True))
    assert abs(spent - budget) <= 1e-6 * budget
    for got, expected in zip([*narrow[1], *narrow[2]], [*full[1], *full[2]], strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(narrow[3], full[3], strict=True):
        assert torch.equal(got, expected.to(got.dtype))
    assert torch.equal(narrow[4], full[4])


@pytest.mark.parametrize("priced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW])
def test_rows_beyond_the_cache_are_solved_as_lists(dtype: torch.dtype, priced: bool) -> None:
    values, grad = (make_values("normal", (2, 140_003), seed=i, dtype=dtype) for i in range(2))
    costs = make_costs("power_of_two", values.shape, dtype=dtype) if priced else None
    results = []
    for rows in (True, False):
        leaf = values.clone().requires_grad_()
        if rows:
            soft = F.soft_topk(leaf, 9000.0, costs, 3.0, backend="native")
            hard = hard_topk(values, 9000.0, costs, backend="native")
        else:
            prices = [None if costs is None else [a] for a in (costs if priced else values)]
            parts = list(zip(leaf, prices, strict=True))
            soft = torch.stack([F.soft_topk_global([v], 9000.0, a, 3.0, backend="native")[0] for v, a in parts])
            hard = torch.stack([hard_topk_global([v], 9000.0, a, backend="native")[0] for v, a in parts])
        results.append((soft.detach(), hard, *torch.autograd.grad(soft, leaf, grad)))
    for by_rows, by_lists in zip(*results, strict=True):
        assert torch.equal(by_rows, by_lists)
    assert results[0][0].isfinite().all()
    assert torch.equal(results[0][1], oracle_hard_topk(values, 9000.0, costs))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_a_solve_allocates_less_than_four_mebibytes(dtype: torch.dtype) -> None:
    values = [torch.randn(1 << 22).to(dtype), torch.randn(3000).to(dtype)]
    soft, hard = [torch.empty_like(v) for v in values], [torch.empty_like(v, dtype=torch.bool) for v in values]
    extension._scratch.tensors.clear()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        solve_masks_(values, 1e5, None, 5.0, soft, hard, new_solver_state(), absolute=True, backend="native")
    allocated = sum(event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::empty"))
    assert 1 << 20 < allocated < 4 << 20


def test_masks_larger_than_the_caches() -> None:
    """Past 64 MiB the masks are written around the cache: every entry, also at the edges of tensors and of ties."""
    n = (1 << 24) + 1000
    g = torch.Generator().manual_seed(6)
    parts = [torch.randn(n - 333, generator=g).bfloat16().float(), torch.randn(333, generator=g)]
    soft = [torch.full_like(p, torch.nan) for p in parts]
    hard = [torch.ones_like(p, dtype=torch.bool) for p in parts]
    budget = n // 10 + 3
    state = new_solver_state()
    solve_masks_(parts, budget, None, 7.0, soft, hard, state, absolute=True, backend="native")
    values, mask, kept = (torch.cat(t) for t in (parts, soft, hard))
    assert abs(mask.double().sum().item() - budget) <= 1e-6 * budget
    torch.testing.assert_close(mask, torch.sigmoid(7.0 * (values.abs() - state[0]).float()), rtol=0, atol=1e-6)
    assert int(kept.sum()) == budget
    assert values.abs()[kept].min() >= values.abs()[~kept].max()


@pytest.mark.skipif(not os.environ.get("SPARTAN_LARGE_TESTS"), reason="takes 9 GB; SPARTAN_LARGE_TESTS=1 runs it")
def test_more_than_two_to_the_31_values() -> None:
    """bfloat16, 4.3 GB of values and as much of mask: positions past 2^31 are seen, chosen and written."""
    n = 2**31 + 4099
    values = torch.zeros(n, dtype=torch.bfloat16)
    special = torch.tensor([0, 5, 2**31 - 1, 2**31, 2**31 + 1, n - 1])
    values[special] = torch.tensor([1.0, 4.0, 2.0, 5.0, 3.0, 6.0], dtype=torch.bfloat16)
    (hard,) = hard_topk_global([values], 4.0, backend="native")
    assert hard.nonzero().flatten().tolist() == [5, 2**31, 2**31 + 1, n - 1]
    # ties go to the lowest index: all six, and the first of the zeros
    (hard,) = hard_topk_global([values], n - 3.0, backend="native")
    assert (~hard).nonzero().flatten().tolist() == [n - 4, n - 3, n - 2]
    del hard
    (mask,) = soft_topk_global([values], n / 2.0, beta=1.0, backend="native")
    # all but six entries are zero, so the threshold lies at zero
    torch.testing.assert_close(mask[special].float(), torch.sigmoid(values[special].float()), rtol=5e-3, atol=0)
    for at in (1, 2**31 - 2, 2**31 + 2, n - 2):
        assert abs(mask[at].item() - 0.5) < 2e-3
