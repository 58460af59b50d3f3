"""soft_topk_global and solve_masks_: one budget over a list of tensors, cold and warm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spartan.functional as F
from bench.checks import check_budget_mask
from spartan_kernels import ops
from spartan_kernels.testing import (
    DISTRIBUTIONS,
    assert_within_error_budget,
    budget_error,
    cost_tensor,
    make_costs,
    make_values,
    oracle_hard_topk,
    oracle_soft_topk,
    plain_soft_topk,
    soft_topk_tolerance,
)

pytestmark = [
    pytest.mark.operators("soft_topk_global_forward", "soft_topk_global_backward", "solve_masks_"),
    pytest.mark.usefixtures("poisoned_memory"),
]

SHAPES = [(40, 33), (7,), (1, 1), (16, 5, 3, 3), (0, 4), (1001,)]
LAYER_SCALES = [1.0, 30.0, 1.0, 1e-2, 1.0, 0.2]


def layers(distribution: str = "normal", device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors of many shapes and very different scale, one of them empty."""
    return [
        make_values(distribution, shape, scale=scale, seed=i, dtype=dtype, device=device)
        for i, (shape, scale) in enumerate(zip(SHAPES, LAYER_SCALES, strict=True))
    ]


def layer_costs(kind: str, values: list[Tensor]) -> list[float | Tensor] | None:
    """Costs for a list: none, a number for each tensor, or numbers, 0-dim tensors and full tensors mixed."""
    if kind == "none":
        return None
    if kind == "numbers":
        return [float(2**i) for i in range(len(values))]
    mixed: list[float | Tensor] = []
    for i, v in enumerate(values):
        full = make_costs("element", v.shape, seed=i, device=v.device)
        mixed.append([2.0, torch.tensor(0.5, device=v.device), full][i % 3])
    return mixed


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def joined_costs(costs: list[float | Tensor] | None, values: list[Tensor]) -> Tensor | None:
    return None if costs is None else joined([cost_tensor(a, v) for a, v in zip(costs, values, strict=True)])


@pytest.mark.parametrize("kind", ["none", "numbers", "mixed"])
@pytest.mark.parametrize("beta", [0.0, 1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("density", [1e-3, 0.1, 0.7, 1 - 1e-4])
def test_matches_the_oracle_on_the_concatenation(target: Any, kind: str, beta: float, density: float) -> None:
    values = layers("student_t")
    costs = layer_costs(kind, values)
    row, a = joined(values), joined_costs(costs, values)
    budget = float(cost_tensor(a, row).sum()) * density
    on_device = costs and [c.to(target.device) if isinstance(c, Tensor) else c for c in costs]
    masks = ops.soft_topk_global([v.to(target.device) for v in values], budget, on_device, beta, backend=target.backend)
    assert [m.shape for m in masks] == [v.shape for v in values]
    mask, exact = joined(masks).cpu(), oracle_soft_topk(row, budget, a, beta)
    floor = soft_topk_tolerance(exact, row, budget, a, beta)
    assert_within_error_budget(mask, exact, plain_soft_topk(row, budget, a, beta), floor=floor)
    assert budget_error(mask, budget, a) <= 1e-6


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
def test_larger_lists_of_every_distribution(target: Any, distribution: str) -> None:
    """Several chunks and threads; checked by the form of the mask and its budget, which need no root finder."""
    values = [make_values(distribution, (40_001 + i,), seed=i, scale=10.0**i) for i in range(-2, 2)]
    row = joined(values)
    for beta, density in [(0.3, 0.5), (5.0, 0.02), (1e3, 0.1), (1e4, 0.9)]:
        budget = row.numel() * density
        masks = ops.soft_topk_global([v.to(target.device) for v in values], budget, beta=beta, backend=target.backend)
        check_budget_mask(joined(masks).cpu(), budget, values=row, beta=beta)


def test_list_equals_one_row(target: Any) -> None:
    values = layers(device=target.device)
    masks = joined(ops.soft_topk_global(values, 200.0, beta=5.0, backend=target.backend))
    row = ops.soft_topk(joined(values), 200.0, beta=5.0, backend=target.backend)
    torch.testing.assert_close(masks, row, rtol=2e-6, atol=1e-7)


def test_sharded_parts_of_a_list_agree_with_the_whole(target: Any) -> None:
    """How a list is cut into tensors does not matter."""
    whole = make_values("lognormal", (3001,), device=target.device)
    expected = ops.soft_topk_global([whole], 300.0, beta=0.5, backend=target.backend)[0]
    for cuts in ([1, 3000], [1500, 1501], [1] * 10 + [2991]):
        parts = ops.soft_topk_global(list(whole.split(cuts)), 300.0, beta=0.5, backend=target.backend)
        torch.testing.assert_close(joined(parts), expected, rtol=2e-6, atol=1e-7)


def test_non_contiguous_tensors(target: Any) -> None:
    base = make_values("normal", (60, 50), device=target.device)
    views = [base.T, base[::3, 1::2], base[:, 0]]
    masks = ops.soft_topk_global(views, 500.0, beta=5.0, backend=target.backend)
    dense = ops.soft_topk_global([v.contiguous() for v in views], 500.0, beta=5.0, backend=target.backend)
    for mask, same, view in zip(masks, dense, views, strict=True):
        assert mask.shape == view.shape
        torch.testing.assert_close(mask, same, rtol=4e-6, atol=1e-9)


def test_nothing_everything_and_empty(target: Any) -> None:
    values = layers(device=target.device)
    n = sum(v.numel() for v in values)
    for budget, expected in [(0.0, 0.0), (float(n), 1.0)]:
        for mask in ops.soft_topk_global(values, budget, beta=3.0, backend=target.backend):
            assert torch.equal(mask, torch.full_like(mask, expected))
    empty = torch.empty(0, 3, device=target.device)
    assert ops.soft_topk_global([empty], 0.0, backend=target.backend)[0].shape == (0, 3)


# -------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", ["none", "numbers", "mixed"])
def test_gradcheck(target: Any, kind: str) -> None:
    shapes = [(3, 4), (5,), (2, 1)]
    values = [make_values("normal", s, seed=i, dtype=torch.float64, device=target.device) for i, s in enumerate(shapes)]
    costs = layer_costs(kind, values)
    costs = costs and [torch.as_tensor(c, dtype=torch.float64, device=target.device) for c in costs]
    budget = torch.tensor(4.0, dtype=torch.float64, device=target.device)
    beta = torch.tensor(1.5, dtype=torch.float64, device=target.device)
    leaves = [x.clone().requires_grad_() for x in (*values, budget, beta, *(costs or []))]

    def soft(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.soft_topk_global(x[:3], x[3], x[5:] or None, x[4], backend=target.backend))

    assert torch.autograd.gradcheck(soft, leaves, eps=1e-5, atol=1e-5, rtol=1e-4)


def test_gradient_when_only_some_tensors_need_one(target: Any) -> None:
    values = layers(dtype=torch.float64)
    exact_row = joined(values).requires_grad_()
    exact_mask = oracle_soft_topk(exact_row, 150.0, None, 2.0)
    upstream = make_values("normal", exact_row.shape, seed=9, dtype=torch.float64)
    used = SHAPES[0][0] * SHAPES[0][1]  # the loss reads the first mask only; the others still couple through k
    upstream[used:] = 0
    (exact,) = torch.autograd.grad(exact_mask, exact_row, upstream)
    leaves = [v.to(target.device).requires_grad_(i != 1) for i, v in enumerate(values)]
    masks = F.soft_topk_global(leaves, 150.0, None, 2.0, backend=target.backend)
    loss = (masks[0].flatten() * upstream[:used].to(target.device)).sum()
    loss.backward()
    for leaf, expected in zip(leaves, exact.split([v.numel() for v in values]), strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad.cpu().flatten(), expected, rtol=1e-6, atol=1e-9)


def test_opcheck(target: Any) -> None:
    values = [make_values("normal", s, device=target.device) for s in [(3, 4), (5,)]]
    budget = torch.tensor(3.0, dtype=torch.float64, device=target.device)
    beta = torch.tensor(2.0, dtype=torch.float64, device=target.device)
    costs = [torch.tensor(2.0, device=target.device), make_costs("element", (5,), device=target.device)]
    op = torch.ops.spartan.soft_topk_global_forward.default
    torch.library.opcheck(op, (values, budget, [], beta, "", target.backend))
    torch.library.opcheck(op, (values, budget, costs, beta, "", target.backend))
    state = ops.new_solver_state(target.device)
    soft, hard = (
        [torch.zeros_like(v) for v in values],
        [torch.zeros_like(v, dtype=torch.bool) for v in values],
    )
    # its state makes a second call start elsewhere by design: no test that runs it twice
    torch.library.opcheck(
        torch.ops.spartan.solve_masks_.default,
        (values, budget, costs, beta, True, [], soft, hard, state, "", target.backend),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiled_equals_eager(target: Any) -> None:
    def step(a: Tensor, b: Tensor, beta: Tensor) -> Tensor:
        first, second = F.soft_topk_global([a, b], 9.0, None, beta, backend=target.backend)
        return (first * a).sum() + second.square().sum()

    beta = torch.tensor(2.0, dtype=torch.float64, device=target.device)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [make_values("normal", s, device=target.device).requires_grad_() for s in [(5, 4), (11,)]]
        out = function(*leaves, beta)
        results.append((out.detach(), *torch.autograd.grad(out, leaves)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


# ----------------------------------------------------------------------------------------------- solve_masks_


def solve(values: list[Tensor], budget: Any, costs: Any, beta: Any, state: Tensor, target: Any, absolute: bool) -> Any:
    soft = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in values]
    hard = [torch.empty_like(v, dtype=torch.bool, memory_format=torch.contiguous_format) for v in values]
    ops.solve_masks_(values, budget, costs, beta, soft, hard, state, absolute=absolute, backend=target.backend)
    return soft, hard


def check_solution(values: list[Tensor], budget: float, costs: Any, beta: float, result: Any, absolute: bool) -> None:
    soft, hard = (joined(masks).cpu() for masks in result)
    row, a = joined(values).cpu(), joined_costs(costs, values)
    row, a = row.abs() if absolute else row, None if a is None else a.cpu()
    exact = oracle_soft_topk(row, budget, a, beta)
    floor = soft_topk_tolerance(exact, row, budget, a, beta)
    assert_within_error_budget(soft, exact, plain_soft_topk(row, budget, a, beta), floor=floor, name="soft")
    assert budget_error(soft, budget, a) <= 1e-6
    assert torch.equal(hard, oracle_hard_topk(row, budget, a))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", ["none", "numbers"])
def test_solve_masks_along_a_training_run(target: Any, kind: str, absolute: bool) -> None:
    """Values drift, the budget shrinks, beta rises: every step is right, and warm equals cold."""
    values = layers(device=target.device)
    costs = layer_costs(kind, values)
    total = float(cost_tensor(joined_costs(costs, values), joined(values)).sum())
    state = ops.new_solver_state(target.device)
    for step in range(12):
        values = [v + 0.02 * make_values("normal", v.shape, seed=100 + step, device=target.device) for v in values]
        beta = 1.0 + 4.0 * step
        budget = total * (1.0 - 0.08 * step)
        if step == 0:
            budget *= 0.999
        warm = solve(values, budget, costs, beta, state, target, absolute)
        check_solution(values, budget, costs, beta, warm, absolute)
        cold = solve(values, budget, costs, beta, ops.new_solver_state(target.device), target, absolute)
        torch.testing.assert_close(joined(warm[0]), joined(cold[0]), rtol=0, atol=1e-6)
        assert torch.equal(joined(warm[1]), joined(cold[1]))


@pytest.mark.parametrize("sizes", [[1, 1, 1], [(3, 4), (3, 4), (3, 4)], [(2, 5), 1, (16, 16)]])
def test_weights_with_block_sizes_are_solved_as_their_block_scores(target: Any, sizes: list[Any]) -> None:
    """Edges and convolutions included; the masks and the state are those of a solve on the scores."""
    shapes = [(40, 33), (9, 20), (16, 5, 3, 3)]
    weights = [make_values("normal", s, scale=10.0**i, seed=i, device=target.device) for i, s in enumerate(shapes)]
    scores = [ops.block_scores(w, b, backend=target.backend) for w, b in zip(weights, sizes, strict=True)]
    costs = [ops.block_costs(s, b) for s, b in zip(shapes, sizes, strict=True)]
    costs = [a.to(target.device) if isinstance(a, Tensor) else a for a in costs]
    budget = 0.2 * sum(w.numel() for w in weights)
    states = [ops.new_solver_state(target.device) for _ in range(2)]
    for _ in range(2):
        expected = solve(scores, budget, costs, 3.0, states[0], target, False)
        soft, hard = ([torch.empty_like(m) for m in masks] for masks in expected)
        ops.solve_masks_(weights, budget, costs, 3.0, soft, hard, states[1], block_sizes=sizes, backend=target.backend)
        for got, mask in zip((*soft, *hard), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(got, mask)
        assert torch.equal(*states)
    with pytest.raises(ValueError, match=r"block_sizes must hold one for each of the 3 values; got 1"):
        ops.solve_masks_(weights, budget, costs, 3.0, soft, hard, states[1], block_sizes=[2], backend=target.backend)


@pytest.mark.parametrize("jump", ["scale", "values", "beta", "budget"])
def test_a_stale_state_costs_time_not_accuracy(target: Any, jump: str) -> None:
    values, budget, beta = [make_values("normal", (2000,), device=target.device)], 100.0, 20.0
    state = ops.new_solver_state(target.device)
    for _ in range(3):
        solve(values, budget, None, beta, state, target, True)
    if jump == "scale":
        values = [values[0] * 1e4]
    if jump == "values":
        values = [make_values("lognormal", (2000,), seed=4, device=target.device) + 50]
    beta = 1e3 if jump == "beta" else beta
    budget = 1990.0 if jump == "budget" else budget
    check_solution(values, budget, None, beta, solve(values, budget, None, beta, state, target, True), True)


def test_solver_state_carries_the_thresholds(target: Any) -> None:
    values = [
        make_values("normal", (400,), device=target.device),
        make_values("normal", (30, 20), device=target.device),
    ]
    state = ops.new_solver_state(target.device)
    soft, hard = solve(values, 100.0, None, 8.0, state, target, True)
    row, kept = joined(values).abs(), joined(hard)
    # t is where the mask passes one half; the hard threshold is the smallest value kept
    torch.testing.assert_close(torch.sigmoid(8.0 * (row - state[0])).float(), joined(soft), rtol=1e-4, atol=1e-6)
    assert row[~kept].max() <= state[2] <= row[kept].min()
    first = state[0].clone()
    solve([v * 1.01 for v in values], 100.0, None, 8.0, state, target, True)
    assert torch.equal(state[1], first)


def test_a_restored_state_gives_the_same_bits(target: Any) -> None:
    states, bits = [], []
    for resumed in (False, True):
        state = ops.new_solver_state(target.device)
        for step in range(6):
            values = [make_values("normal", (3000,), seed=step, device=target.device)]
            soft, hard = solve(values, 300.0, None, 3.0 + step, state, target, True)
            if resumed and step == 2:
                saved = state.clone()
                state = ops.new_solver_state(target.device)
                state.copy_(saved)
        states.append(state)
        bits.append((soft[0], hard[0]))
    assert torch.equal(bits[0][0], bits[1][0]) and torch.equal(bits[0][1], bits[1][1])
    assert torch.equal(*states)


def test_solve_masks_nothing_and_everything(target: Any) -> None:
    """The ramp of the kept fraction starts at one; the next step must not suffer from it."""
    values = [make_values("normal", (50, 8), device=target.device)]
    state = ops.new_solver_state(target.device)
    for budget in (400.0, 400.0, 399.0, 200.0, 0.0, 17.0):
        soft, hard = solve(values, budget, None, 4.0, state, target, True)
        assert int(hard[0].sum()) == int(budget)
        assert budget_error(soft[0], max(budget, 1e-30), dim=None) <= 1e-6 or budget == 0.0
        if budget in (0.0, 400.0):
            assert torch.equal(soft[0], torch.full_like(soft[0], budget / 400))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "numbers"])
def test_other_dtypes(target: Any, dtype: torch.dtype, kind: str) -> None:
    values = [make_values("normal", s, seed=i, dtype=dtype) for i, s in enumerate([(40, 33), (7,), (2000,)])]
    costs = layer_costs(kind, values)
    row, a = joined(values).abs(), joined_costs(costs, values)
    budget = 0.15 * float(cost_tensor(a, row).sum())
    state = ops.new_solver_state(target.device)
    for beta in (6.0, 7.0):
        moved = [v.to(target.device) for v in values]
        soft, hard = (joined(m).cpu() for m in solve(moved, budget, costs, beta, state, target, True))
        assert soft.dtype == dtype
        exact, plain = oracle_soft_topk(row, budget, a, beta), plain_soft_topk(row, budget, a, beta)
        assert_within_error_budget(soft, exact, plain, soft_topk_tolerance(exact, row, budget, a, beta))
        assert torch.equal(hard, oracle_hard_topk(row, budget, a))


def test_absolute_and_tensor_arguments(target: Any) -> None:
    values = [make_values("normal", (64, 9), device=target.device)]
    budget = torch.tensor(60.0, dtype=torch.float64, device=target.device)
    beta = torch.tensor(6.0, device=target.device)
    signed = solve(values, budget, None, beta, ops.new_solver_state(target.device), target, True)
    magnitude = solve([values[0].abs()], 60.0, None, 6.0, ops.new_solver_state(target.device), target, False)
    assert torch.equal(signed[0][0], magnitude[0][0])
    assert torch.equal(signed[1][0], magnitude[1][0])


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5).filter(lambda s: sum(s) > 0),
    distribution=st.sampled_from(sorted(DISTRIBUTIONS)),
    beta=st.sampled_from([0.0, 1e-3, 1.0, 40.0, 1e4]),
    density=st.floats(0.001, 0.999),
    absolute=st.booleans(),
)
def test_solve_masks_of_any_list(
    target: Any, sizes: list[int], distribution: str, beta: float, density: float, absolute: bool
) -> None:
    values = [make_values(distribution, (n,), seed=n, device=target.device) for n in sizes]
    budget = sum(sizes) * density
    state = ops.new_solver_state(target.device)
    for _ in range(2):
        check_solution(values, budget, None, beta, solve(values, budget, None, beta, state, target, absolute), absolute)


def test_same_bits_for_every_thread_count(target: Any, thread_count: None) -> None:
    if target.backend == "reference":
        pytest.skip("its sums are PyTorch's, whose order may depend on the thread count")
    values = [make_values("normal", (n,), seed=n, device=target.device) for n in (50_000, 3, 91_237)]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        state = ops.new_solver_state(target.device)
        for beta in (5.0, 6.0):
            soft, hard = solve(values, 9000.0, None, beta, state, target, True)
        results.append((joined(soft), joined(hard), state))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# ----------------------------------------------------------------------------------------------------- errors

V = [torch.ones(2, 3), torch.arange(4.0)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": []}, ValueError, "values.*at least one"),
        (
            {"values": [torch.ones(2), torch.ones(2, dtype=torch.float64)]},
            ValueError,
            r"values\[1\].*float64",
        ),
        ({"values": [torch.ones(2), torch.arange(3)]}, TypeError, r"values\[1\].*int64"),
        ({"values": [torch.tensor([1.0, float("nan"), 0.0, 2.0])]}, ValueError, "values.*(NaN|finite)"),
        ({"budget": 10.5}, ValueError, r"budget.*\[0, 10.*10\.5"),
        ({"budget": -0.1}, ValueError, "budget.*-0.1"),
        ({"budget": torch.ones(2)}, ValueError, r"budget.*\(2,\)"),
        ({"costs": [1.0]}, ValueError, "costs.*2 values.*1"),
        ({"costs": 1.0}, ValueError, "costs.*float"),
        ({"costs": [1.0, torch.ones(3)]}, ValueError, r"costs\[1\].*\(4,\).*\(3,\)"),
        ({"costs": [1.0, 0.0]}, ValueError, "costs.*positive.*0"),
        ({"costs": [torch.tensor(-1.0), 1.0]}, ValueError, "costs.*positive.*-1"),
        ({"beta": -1.0}, ValueError, "beta.*-1"),
        ({"beta": float("nan")}, ValueError, "beta.*nan"),
    ],
    ids=lambda x: str(x).replace("\n", "")[:40] if isinstance(x, dict) else "",
)
def test_bad_input_is_named(target: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    if target.device != "cpu":
        pytest.skip("on a GPU values are inspected only under checks(True)")
    call = {"values": V, "budget": 3.0, "costs": None, "beta": 1.0, **arguments}
    with pytest.raises(error, match=f"(?is){message}"):
        ops.soft_topk_global(**call, backend=target.backend)
    values = call["values"]
    soft = [torch.empty(v.shape, dtype=v.dtype) for v in values]
    hard = [torch.empty(v.shape, dtype=torch.bool) for v in values]
    with pytest.raises(error, match=f"(?is){message}"):
        ops.solve_masks_(**call, soft=soft, hard=hard, state=ops.new_solver_state(), backend=target.backend)


def test_solve_masks_refuses_masks_and_states_that_do_not_fit(target: Any) -> None:
    soft, hard = [torch.empty_like(v) for v in V], [torch.empty_like(v, dtype=torch.bool) for v in V]
    state = ops.new_solver_state()
    for bad_soft, bad_hard, bad_state, message in [
        (soft[:1], hard, state, "soft.*2.*1"),
        (soft, [hard[0], torch.empty(3, dtype=torch.bool)], state, r"hard\[1\].*\(4,\).*\(3,\)"),
        ([soft[0], soft[1].double()], hard, state, r"soft\[1\].*float32.*float64"),
        ([soft[0].mT.contiguous().mT, soft[1]], hard, state, r"soft\[0\].*contiguous"),
        (soft, soft, state, r"hard\[0\].*bool.*float32"),
        (soft, hard, torch.zeros(2), "state.*new_solver_state"),
    ]:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            ops.solve_masks_(V, 3.0, None, 1.0, bad_soft, bad_hard, bad_state, backend=target.backend)
