"""soft_topk by rows: every backend against the float64 oracle, its invariants, gradients and errors."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spartan.functional as F
from spartan_kernels import ops
from spartan_kernels.testing import (
    DISTRIBUTIONS,
    assert_within_error_budget,
    budget_error,
    cost_tensor,
    make_costs,
    make_values,
    oracle_soft_topk,
    plain_soft_topk,
    soft_topk_tolerance,
    total_cost,
)

pytestmark = [
    pytest.mark.operators("soft_topk_forward", "soft_topk_backward"),
    pytest.mark.usefixtures("poisoned_memory"),
]

SCALES = (1e-3, 1.0, 1e3)
DENSITIES = (1e-4, 0.02, 0.3, 0.5, 0.9, 1 - 1e-4)
BETAS = (0.0, 1e-3, 1.0, 20.0, 1e3, 1e4)
COSTS = ("none", "scalar", "element")
ROWS = tuple(itertools.product(DISTRIBUTIONS, SCALES, DENSITIES))


@functools.cache
def grid_of_problems(costs: str, beta: float) -> tuple[Tensor, ...]:
    """All distributions, scales and densities as rows of one call; computed once for every backend."""
    rows = [make_values(name, (199,), scale=scale, seed=i) for i, (name, scale, _) in enumerate(ROWS)]
    values = torch.stack(rows)
    a = make_costs(costs, values.shape)
    budget = total_cost(a, values, -1) * torch.tensor([density for *_, density in ROWS], dtype=torch.float64)
    exact = oracle_soft_topk(values, budget, a, beta)
    plain = plain_soft_topk(values, budget, a, beta)
    return values, a, budget, exact, plain, soft_topk_tolerance(exact, values, budget, a, beta)


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("beta", BETAS)
def test_matches_the_oracle(target: Any, beta: float, costs: str) -> None:
    values, a, budget, exact, plain, floor = grid_of_problems(costs, beta)
    on_device = a.to(target.device) if isinstance(a, Tensor) else a
    mask = ops.soft_topk(values.to(target.device), budget.to(target.device), on_device, beta, backend=target.backend)
    mask = mask.cpu()
    for row, (name, scale, density) in enumerate(ROWS):
        where = f"{name} scale={scale} density={density}"
        assert_within_error_budget(mask[row], exact[row], plain[row], floor=floor[row], name=where)
        row_costs = a[row] if isinstance(a, Tensor) else a
        assert budget_error(mask[row], budget[row], row_costs) <= 1e-6, where
    assert mask.min() >= 0 and mask.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("costs", COSTS)
def test_other_dtypes(target: Any, dtype: torch.dtype, costs: str) -> None:
    values = make_values("normal", (5, 301), dtype=dtype)
    a = make_costs(costs, values.shape, dtype=dtype)
    budget = total_cost(a, values, -1) * 0.2
    exact = oracle_soft_topk(values, budget, a, 20.0)
    mask = ops.soft_topk(
        values.to(target.device),
        budget.to(target.device),
        a.to(target.device) if isinstance(a, Tensor) else a,
        20.0,
        backend=target.backend,
    )
    assert mask.dtype == dtype
    plain = plain_soft_topk(values, budget, a, 20.0)
    floor = soft_topk_tolerance(exact, values, budget, a, 20.0)
    assert_within_error_budget(mask.cpu(), exact, plain, floor=floor)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 1, 6), (2, 3, 5, 4), (1, 1)])
def test_every_dim_with_a_budget_per_row(target: Any, shape: tuple[int, ...]) -> None:
    values = make_values("student_t", shape)
    a = make_costs("element", shape)
    for dim in range(-len(shape), len(shape)):
        budget = total_cost(a, values, dim) * 0.4
        mask = ops.soft_topk(
            values.to(target.device),
            budget.to(target.device),
            a.to(target.device),
            3.0,
            dim,
            backend=target.backend,
        ).cpu()
        exact = oracle_soft_topk(values, budget, a, 3.0, dim)
        floor = soft_topk_tolerance(exact, values, budget, a, 3.0, dim)
        assert_within_error_budget(mask, exact, exact.float(), floor=floor, name=f"dim={dim}")
        assert budget_error(mask, budget, a, dim) <= 1e-6


def test_costs_per_entry_of_the_dimension(target: Any) -> None:
    values = make_values("normal", (4, 33), device=target.device)
    a = make_costs("element", (33,), device=target.device)
    mask = ops.soft_topk(values, 5.0, a, 2.0, backend=target.backend)
    full = ops.soft_topk(values, 5.0, a.expand(4, 33), 2.0, backend=target.backend)
    torch.testing.assert_close(mask, full, rtol=0, atol=1e-6)
    assert budget_error(mask, 5.0, a) <= 1e-6


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset"])
def test_non_contiguous_input(target: Any, layout: str) -> None:
    base = make_values("normal", (34, 35), device=target.device)
    values = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(6, -1),
        "offset": base.flatten()[3:-4],
    }[layout]
    before = values.clone()
    mask = ops.soft_topk(values, 3.3, beta=5.0, backend=target.backend)
    same = ops.soft_topk(values.contiguous(), 3.3, beta=5.0, backend=target.backend)
    assert mask.shape == values.shape
    # vectorised and scalar code may round differently, so not bit for bit
    torch.testing.assert_close(mask, same, rtol=4e-6, atol=1e-9)
    assert torch.equal(values, before)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 4095, 4097])
def test_odd_lengths(target: Any, n: int) -> None:
    values = make_values("normal", (n,), seed=n)
    mask = ops.soft_topk(values.to(target.device), 0.37 * n, beta=4.0, backend=target.backend).cpu()
    exact = oracle_soft_topk(values, 0.37 * n, beta=4.0)
    floor = soft_topk_tolerance(exact, values, 0.37 * n, None, 4.0)
    assert_within_error_budget(mask, exact, plain_soft_topk(values, 0.37 * n, None, 4.0), floor=floor)


@pytest.mark.parametrize("costs", ["none", "element"])
def test_long_rows_of_any_stride_and_their_gradients(target: Any, costs: str) -> None:
    """Rows that one program of a GPU cannot hold, not a whole number of tiles long, against float64."""
    base = make_values("student_t", (9001, 3), seed=1)
    a = None if costs == "none" else make_costs(costs, (9001,), seed=2)
    grad, results = make_values("normal", (3, 9001), seed=3), []
    for dtype, device, backend in ((torch.float32, target.device, target.backend), (torch.float64, "cpu", "reference")):
        v = base.detach().to(device, dtype).requires_grad_()
        k = torch.tensor([20.0, 900.0, 7000.0], device=device, dtype=torch.float64, requires_grad=True)
        beta = torch.tensor(7.0, device=device, dtype=torch.float64, requires_grad=True)
        price = None if a is None else a.detach().to(device, dtype).requires_grad_()
        mask = F.soft_topk(v.T, k, price, beta, backend=backend)
        mask.backward(grad.to(device, dtype))
        found = [mask, v.grad, k.grad, beta.grad] + ([] if price is None else [price.grad])
        results.append([t.detach().cpu().double() for t in found if t is not None])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


# -------------------------------------------------------------------------------------- limits and degenerate


def test_empty(target: Any) -> None:
    for shape, dim in [((0,), 0), ((3, 0), -1), ((0, 3), -1)]:
        values = torch.empty(shape, device=target.device)
        assert ops.soft_topk(values, 0.0 if shape[dim] == 0 else 1.0, dim=dim, backend=target.backend).shape == shape


def test_one_element_is_its_share_of_the_budget(target: Any) -> None:
    values = torch.tensor([[-3.0], [1e3]], device=target.device)
    mask = ops.soft_topk(values, 0.7, costs=2.0, beta=1e4, backend=target.backend)
    torch.testing.assert_close(mask.cpu(), torch.full((2, 1), 0.35), rtol=1e-6, atol=0)


@pytest.mark.parametrize("costs", COSTS)
def test_nothing_and_everything(target: Any, costs: str) -> None:
    values = make_values("normal", (3, 50), device=target.device)
    a = make_costs(costs, values.shape, device=target.device)
    total = total_cost(a, values, -1)
    assert torch.equal(ops.soft_topk(values, total * 0, a, 5.0, backend=target.backend), torch.zeros_like(values))
    everything = ops.soft_topk(values, total, a, 5.0, backend=target.backend)
    if costs == "element":  # their sum in another order may be larger than the budget by its rounding, which is dropped
        dropped = ((1 - everything.double()) * a.double()).sum(-1)
        assert (dropped.abs() <= 1e-6 * total.double()).all()
    else:
        assert torch.equal(everything, torch.ones_like(values))


@pytest.mark.parametrize("beta", BETAS)
def test_all_ties_share_equally(target: Any, beta: float) -> None:
    values = torch.full((2, 77), -12.5, device=target.device)
    mask = ops.soft_topk(values, 7.0, beta=beta, backend=target.backend)
    torch.testing.assert_close(mask, torch.full_like(mask, 7 / 77), rtol=1e-6, atol=0)


def test_plateau_between_two_values(target: Any) -> None:
    # k is exactly the number of large entries: any threshold in the gap is right, and the mask is 0 and 1
    values = torch.tensor([0.0] * 60 + [1.0] * 40, device=target.device)
    mask = ops.soft_topk(values, 40.0, beta=1e4, backend=target.backend)
    torch.testing.assert_close(mask, values, rtol=0, atol=1e-6)
    assert budget_error(mask, 40.0) <= 1e-6


def test_ties_at_the_threshold_share_the_rest(target: Any) -> None:
    values = torch.tensor([3.0] * 5 + [2.0] * 10 + [1.0] * 20, device=target.device)
    mask = ops.soft_topk(values, 8.0, beta=1e4, backend=target.backend)
    expected = torch.tensor([1.0] * 5 + [0.3] * 10 + [0.0] * 20, device=target.device)
    torch.testing.assert_close(mask, expected, rtol=0, atol=2e-6)


def test_beta_limits(target: Any) -> None:
    values = make_values("uniform", (4, 100)).sort(-1).values.add(torch.arange(100.0)).to(target.device)
    flat = ops.soft_topk(values, 13.0, beta=0.0, backend=target.backend)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.13), rtol=1e-6, atol=0)
    sharp = ops.soft_topk(values, 13.0, beta=1e4, backend=target.backend)
    hard = ops.hard_topk(values, 13.0, backend="reference")
    torch.testing.assert_close(sharp, hard.float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values(target: Any, bad: float) -> None:
    values = make_values("normal", (3, 40)).index_put((torch.tensor(1), torch.tensor(7)), torch.tensor(bad))
    values = values.to(target.device)
    if target.device == "cpu":
        with pytest.raises(ValueError, match=r"values.*(NaN|infinit|finite)"):
            ops.soft_topk(values, 4.0, backend=target.backend)
    else:
        assert ops.soft_topk(values, 4.0, backend=target.backend)[1].isnan().all()


# ------------------------------------------------------------------------------------------------- invariants

problems = st.tuples(
    st.sampled_from(sorted(DISTRIBUTIONS)),
    st.integers(2, 400),
    st.sampled_from(COSTS),
    st.one_of(st.just(0.0), st.floats(1e-6, 1e4)),
    st.floats(0.01, 0.99),
    st.integers(0, 1000),
)


def build(problem: Any, device: str) -> tuple[Tensor, Any, float, float]:
    name, n, kind, beta, density, seed = problem
    values = make_values(name, (n,), seed=seed, device=device)
    a = make_costs(kind, (n,), seed=seed, device=device)
    return values, a, float(total_cost(a, values)) * density, beta


def slack(values: Tensor, budget: float, a: Any, beta: float, steps: float = 2.0) -> Tensor:
    """How far two correct masks of one problem may lie apart: each within its tolerance of the exact one."""
    exact = oracle_soft_topk(values, budget, a, beta)
    return steps * soft_topk_tolerance(exact, values, budget, a, beta) + 1e-6


@given(problem=problems)
def test_monotone_and_permutation_equivariant(target: Any, problem: Any) -> None:
    values, a, budget, beta = build(problem, target.device)
    mask = ops.soft_topk(values, budget, a, beta, backend=target.backend)
    ratio = values if a is None else values / a
    order = ratio.argsort()
    # equal ratios give equal masks and a larger one never a smaller mask, up to the rounding of β(v/a)
    step = mask[order].diff()
    assert (step >= -slack(values, budget, a, beta)[order][1:]).all()
    permutation = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0)).to(values.device)
    a_moved = a[permutation] if isinstance(a, Tensor) else a
    moved = ops.soft_topk(values[permutation], budget, a_moved, beta, backend=target.backend)
    assert ((moved - mask[permutation]).abs() <= slack(values, budget, a, beta)[permutation]).all()


@given(problem=problems, shift=st.integers(-8, 8))
def test_shift_by_the_costs_and_scaling(target: Any, problem: Any, shift: int) -> None:
    values, a, budget, beta = build(problem, target.device)
    values = (values * 64).round() / 64  # exact sums below
    allowed = slack(values, budget, a, beta) + slack(values + shift * 4, budget, a, beta)
    mask = ops.soft_topk(values, budget, a, beta, backend=target.backend)
    shifted = ops.soft_topk(values + shift * (1.0 if a is None else a), budget, a, beta, backend=target.backend)
    if not isinstance(a, Tensor):  # v + c·a rounds for arbitrary a, and β times that rounding is not small
        assert ((shifted - mask).abs() <= allowed).all()
    scaled = ops.soft_topk(values * 4, budget * 4, 4.0 if a is None else a * 4, beta, backend=target.backend)
    assert ((scaled - mask).abs() <= allowed).all()


@given(problem=problems)
def test_complement(target: Any, problem: Any) -> None:
    values, a, budget, beta = build(problem, target.device)
    total = float(total_cost(a, values))
    mask = ops.soft_topk(values, budget, a, beta, backend=target.backend)
    other = ops.soft_topk(-values, total - budget, a, beta, backend=target.backend)
    allowed = slack(values, budget, a, beta) + slack(-values, total - budget, a, beta)
    assert ((mask - (1 - other)).abs() <= allowed).all()


@given(data=st.data())
def test_arbitrary_values(target: Any, data: st.DataObject) -> None:
    numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True)
    values = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=40)), device=target.device)
    budget = values.numel() * data.draw(st.floats(1e-3, 0.999))
    beta = data.draw(st.sampled_from(BETAS))
    mask = ops.soft_topk(values, budget, beta=beta, backend=target.backend)
    assert mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1
    if beta * float(values.abs().max()) <= 1e8:  # beyond, float64 itself cannot hold the threshold finely enough
        assert budget_error(mask, budget) <= 1e-6


def test_same_bits_twice_and_for_every_thread_count(target: Any, thread_count: None) -> None:
    values = make_values("normal", (2, 70_001), device=target.device)
    upstream = make_values("normal", (2, 70_001), seed=1, device=target.device)
    results = []
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        leaf = values.clone().requires_grad_()
        mask = F.soft_topk(leaf, 7000.0, beta=10.0, backend=target.backend)
        (gradient,) = torch.autograd.grad(mask, leaf, upstream)
        results.append((mask.detach(), gradient))
    if target.backend == "reference":  # its sums are PyTorch's, which promise only repeatability
        results = results[::2]
    for mask, gradient in results[1:]:
        assert torch.equal(mask, results[0][0])
        assert torch.equal(gradient, results[0][1])


# -------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_gradcheck(target: Any, costs: str, density: float) -> None:
    values = make_values("normal", (3, 9), dtype=torch.float64, device=target.device).requires_grad_()
    a = make_costs(costs, (3, 9), dtype=torch.float64, device=target.device)
    a = a.requires_grad_() if isinstance(a, Tensor) else a
    budget = (total_cost(a, values, -1).detach() * density).requires_grad_()
    beta = torch.tensor(1.7, dtype=torch.float64, device=target.device, requires_grad=True)

    def soft(v: Tensor, k: Tensor, c: Any, b: Tensor) -> Tensor:
        return F.soft_topk(v, k, c, b, backend=target.backend)

    assert torch.autograd.gradcheck(soft, (values, budget, a, beta), eps=1e-5, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["number", "per_entry", "per_element"])
def test_gradients_of_broadcast_arguments(target: Any, kind: str) -> None:
    """Costs, budget and beta that are shared by rows receive the sum of their rows' gradients."""
    shape = {"number": (), "per_entry": (9,), "per_element": (3, 9)}[kind]
    leaves = [
        make_values("normal", (3, 9), dtype=torch.float64),
        torch.tensor(2.5, dtype=torch.float64),
        make_values("uniform", shape, dtype=torch.float64).add(0.5),
        torch.tensor(3.0, dtype=torch.float64),
    ]
    upstream = make_values("normal", (3, 9), seed=5, dtype=torch.float64)
    expected_leaves = [x.clone().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(oracle_soft_topk(*expected_leaves), expected_leaves, upstream)
    leaves = [x.to(target.device).requires_grad_() for x in leaves]
    mask = F.soft_topk(*leaves, backend=target.backend)
    actual = torch.autograd.grad(mask, leaves, upstream.to(target.device))
    for name, got, want in zip(("values", "budget", "costs", "beta"), actual, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def plain_gradient(mask: Tensor, upstream: Tensor, costs: Any, beta: float) -> Tensor:
    """∂L/∂v = β s (g/a − r) in the mask's own dtype."""
    a = cost_tensor(costs, mask).to(mask.dtype)
    s = mask * (1 - mask)
    r = (upstream * s).sum(-1, keepdim=True) / (a * s).sum(-1, keepdim=True)
    return beta * s * (upstream / a - r)


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("beta", [1.0, 20.0, 300.0])
@pytest.mark.parametrize("density", [0.02, 0.5, 0.9])
def test_float32_gradient_within_the_error_budget(target: Any, costs: str, beta: float, density: float) -> None:
    values = make_values("normal", (4, 1025))
    a = make_costs(costs, values.shape)
    budget = total_cost(a, values, -1) * density
    upstream = make_values("normal", values.shape, seed=3)
    exact_leaf = values.double().requires_grad_()
    exact_mask = oracle_soft_topk(exact_leaf, budget, a, beta)
    (exact,) = torch.autograd.grad(exact_mask, exact_leaf, upstream.double())
    leaf = values.to(target.device).requires_grad_()
    on_device = a.to(target.device) if isinstance(a, Tensor) else a
    mask = F.soft_topk(leaf, budget.to(target.device), on_device, beta, backend=target.backend)
    (actual,) = torch.autograd.grad(mask, leaf, upstream.to(target.device))
    plain = plain_gradient(plain_soft_topk(values, budget, a, beta), upstream, a, beta)
    # A mask within its tolerance has s within a relative `loose`, and r, an average weighted by s, with it.
    m = exact_mask.detach()
    s = m * (1 - m)
    loose = soft_topk_tolerance(m, values, budget, a, beta) / s.clamp_min(1e-30)
    typical = (loose * s).sum(-1, keepdim=True) / s.sum(-1, keepdim=True)
    r = upstream.abs().amax(-1, keepdim=True)
    floor = 2 * beta * s * (upstream.abs() / cost_tensor(a, values) + r) * (loose + typical)
    assert_within_error_budget(actual.cpu(), exact, plain, floor=floor)
    # Σ a ∂v = 0: shifting v by c·a leaves the mask where it is
    balance = (cost_tensor(a, values) * actual.cpu().double()).sum(-1).abs()
    assert (balance <= 1e-5 * (cost_tensor(a, values) * actual.cpu().double().abs()).sum(-1)).all()


def test_gradient_at_saturation_is_finite(target: Any) -> None:
    values = torch.tensor([0.0] * 60 + [1.0] * 40, device=target.device, requires_grad=True)
    mask = F.soft_topk(values, 40.0, beta=1e4, backend=target.backend)
    (gradient,) = torch.autograd.grad(mask, values, torch.ones_like(mask))
    assert gradient.isfinite().all()


def test_opcheck(target: Any) -> None:
    values = make_values("normal", (3, 20), device=target.device)
    budget = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64, device=target.device)
    beta = torch.tensor(2.0, dtype=torch.float64, device=target.device)
    costs = make_costs("element", (3, 20), device=target.device)
    for operands in [
        (values, budget, None, beta, target.backend),
        (values.clone().requires_grad_(), budget, costs, beta, target.backend),
    ]:
        torch.library.opcheck(torch.ops.spartan.soft_topk_forward.default, operands)


def test_compiled_equals_eager(target: Any) -> None:
    def step(v: Tensor, k: Tensor, b: Tensor) -> Tensor:
        return (F.soft_topk(v, k, None, b, backend=target.backend) * v).sum(-1)

    values = make_values("normal", (4, 30), device=target.device)
    budget = torch.full((4,), 5.0, dtype=torch.float64, device=target.device)
    beta = torch.tensor(3.0, dtype=torch.float64, device=target.device)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = values.clone().requires_grad_()
        out = function(leaf, budget, beta)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), leaf)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


# ----------------------------------------------------------------------------------------------------- errors

V = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": -1.0}, ValueError, r"budget.*\[0, 3.*-1"),
        ({"budget": 3.5}, ValueError, r"budget.*\[0, 3.*3\.5"),
        ({"budget": float("nan")}, ValueError, "budget.*nan"),
        ({"budget": torch.tensor([1.0, 9.0])}, ValueError, r"budget.*9"),
        ({"budget": torch.ones(3)}, ValueError, r"budget.*\(2,\).*\(3,\)"),
        ({"budget": "two"}, TypeError, "budget.*str"),
        ({"costs": 0.0}, ValueError, "costs.*positive.*0"),
        ({"costs": -2.0}, ValueError, "costs.*positive.*-2"),
        ({"costs": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "costs.*positive.*0"),
        ({"costs": torch.tensor([1.0, float("nan"), 1.0])}, ValueError, "costs"),
        ({"costs": torch.ones(4)}, ValueError, r"costs.*\(4,\)"),
        ({"costs": torch.ones(3, 2)}, ValueError, r"costs.*\(2, 3\).*\(3, 2\)"),
        ({"beta": -0.5}, ValueError, "beta.*-0.5"),
        ({"beta": float("inf")}, ValueError, "beta.*inf"),
        ({"beta": torch.ones(2)}, ValueError, r"beta.*\(2,\)"),
        ({"dim": 2}, ValueError, r"dim.*2"),
        ({"values": torch.arange(6)}, TypeError, "values.*int64"),
        ({"values": [1.0, 2.0]}, TypeError, "values.*list"),
        ({"values": torch.tensor(1.0)}, ValueError, "values.*0-dim"),
        ({"backend": "magic"}, ValueError, "backend.*magic"),
    ],
    ids=lambda x: str(x).replace("\n", "")[:40] if isinstance(x, dict) else "",
)
def test_bad_input_is_named(target: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"values": V, "budget": 1.0, "backend": target.backend, **arguments}
    if target.device != "cpu":
        pytest.skip("on a GPU values are inspected only under checks(True)")
    with pytest.raises(error, match=f"(?is){message}"):
        ops.soft_topk(**call)


def test_a_budget_for_each_row_is_learned(target: Any) -> None:
    """Row r has r + 1 large entries, whose loss is less than a unit of budget costs if they are dropped."""
    large = torch.tensor([[j <= r for j in range(6)] for r in range(5)], device=target.device)
    rows = 4.0 * large
    logits = torch.zeros(5, device=target.device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.1)
    for _ in range(120):
        budget = 6 * logits.sigmoid()
        mask = F.soft_topk(rows, budget, beta=3.0, backend=target.backend)
        loss = ((1 - mask) * rows).sum() + 0.5 * budget.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert budget.round().tolist() == [1, 2, 3, 4, 5]
    exact = budget.detach().double().requires_grad_()
    oracle = oracle_soft_topk(rows.double(), exact, None, 3.0)
    (expected,) = torch.autograd.grad(((1 - oracle) * rows).sum() + 0.5 * exact.sum(), exact)
    leaf = budget.detach().requires_grad_()
    mask = F.soft_topk(rows, leaf, beta=3.0, backend=target.backend)
    (found,) = torch.autograd.grad(((1 - mask) * rows).sum() + 0.5 * leaf.sum(), leaf)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
