"""hard_topk and hard_topk_global: a prefix of descending v/a within the budget, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spartan_kernels import ops
from spartan_kernels.testing import (
    DISTRIBUTIONS,
    cost_tensor,
    make_costs,
    make_values,
    oracle_hard_topk,
    total_cost,
)

pytestmark = [
    pytest.mark.operators("hard_topk_forward", "hard_topk_global_forward"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DENSITIES = (0.0, 1e-4, 0.02, 0.5, 0.9, 1 - 1e-4, 1.0)


def is_affordable_prefix(mask: Tensor, values: Tensor, budget: float, costs: Any) -> None:
    """The defining property, checked without choosing an order among ratios that rounding makes equal."""
    a = cost_tensor(costs, values)
    spent = float(a[mask].sum())
    assert spent <= budget
    ratio = values.double() / a
    if mask.any() and not mask.all():
        eps = torch.finfo(values.dtype).eps
        lowest_kept, highest_dropped = ratio[mask].min(), ratio[~mask].max()
        assert lowest_kept >= highest_dropped - 2 * eps * highest_dropped.abs()
    if not mask.all():
        rounding = 2 * torch.finfo(values.dtype).eps * ratio.abs()
        next_in_line = ratio[~mask].max()
        candidates = ~mask & (ratio >= next_in_line - rounding)
        assert spent + float(a[candidates].max()) > budget, "the next entry would still fit"


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize("costs", ["none", "scalar", "power_of_two"])
def test_equals_a_stable_sort(target: Any, distribution: str, costs: str) -> None:
    for n, scale in itertools.product((1, 2, 257, 5000), (1e-3, 1e3)):
        values = make_values(distribution, (n,), scale=scale, seed=n)
        a = make_costs(costs, (n,))
        for density in DENSITIES:
            budget = float(total_cost(a, values)) * density
            on_device = a.to(target.device) if isinstance(a, Tensor) else a
            mask = ops.hard_topk(values.to(target.device), budget, on_device, backend=target.backend)
            assert mask.dtype == torch.bool
            assert torch.equal(mask.cpu(), oracle_hard_topk(values, budget, a)), (n, scale, density)


@given(
    distribution=st.sampled_from(sorted(DISTRIBUTIONS)),
    n=st.integers(1, 500),
    # closer to 1 than this is everything: arguments.BUDGET_ROUNDING
    density=st.floats(0.0, 1.0).filter(lambda d: d == 1.0 or d < 1 - 1e-9),
    kind=st.sampled_from(["none", "scalar", "element"]),
    seed=st.integers(0, 1000),
)
def test_never_exceeds_the_budget(target: Any, distribution: str, n: int, density: float, kind: str, seed: int) -> None:
    values = make_values(distribution, (n,), seed=seed, device=target.device)
    a = make_costs(kind, (n,), seed=seed, device=target.device)
    budget = float(total_cost(a, values)) * density
    is_affordable_prefix(ops.hard_topk(values, budget, a, backend=target.backend), values, budget, a)


@given(data=st.data())
def test_any_floats_and_their_exact_count(target: Any, data: st.DataObject) -> None:
    """Zeros of both signs are equal; denormals, duplicates and huge values sort as numbers do."""
    pool = st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45]),
    )
    values = torch.tensor(data.draw(st.lists(pool, min_size=1, max_size=30)), device=target.device)
    k = data.draw(st.integers(0, values.numel()))
    mask = ops.hard_topk(values, float(k), backend=target.backend)
    assert int(mask.sum()) == k
    assert torch.equal(mask.cpu(), oracle_hard_topk(values.cpu(), k))


def test_ties_go_to_the_lowest_index(target: Any) -> None:
    values = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, -0.0, 0.0], device=target.device)
    for k, expected in [(1, [1]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 4, 5])]:
        mask = ops.hard_topk(values, float(k), backend=target.backend)
        assert mask.nonzero().flatten().tolist() == expected
    same = torch.full((3, 70_000), 0.5, device=target.device)
    mask = ops.hard_topk(same, 33_333.0, backend=target.backend)
    assert mask[:, :33_333].all() and not mask[:, 33_333:].any()


def test_long_rows_with_costs(target: Any) -> None:
    """Rows that one program of a GPU cannot hold, many entries alike, budgets from nothing to everything."""
    values = make_values("normal", (4, 8195), seed=5).mul(8).round().div(8)
    a = make_costs("power_of_two", (4, 8195), seed=6)
    budget = a.double().sum(-1) * torch.tensor([0.0, 0.03, 0.6, 1.0])
    mask = ops.hard_topk(values.to(target.device), budget, a.to(target.device), backend=target.backend)
    for row in range(4):
        assert torch.equal(mask[row].cpu(), oracle_hard_topk(values[row], float(budget[row]), a[row]))


def test_stops_at_the_first_entry_that_does_not_fit(target: Any) -> None:
    # in order of v/a: 0 (cost 1), 1 (cost 4: does not fit), 2 (cost 1: would fit, but comes later)
    values = torch.tensor([10.0, 20.0, 3.0], device=target.device)
    costs = torch.tensor([1.0, 4.0, 1.0], device=target.device)
    mask = ops.hard_topk(values, 3.0, costs, backend=target.backend)
    assert mask.tolist() == [True, False, False]


def test_fractional_budget_keeps_the_affordable_number(target: Any) -> None:
    values = make_values("normal", (100,), device=target.device)
    for budget, count in [(9.999, 9), (10.0, 10), (10.5, 10), (0.5, 0)]:
        assert int(ops.hard_topk(values, budget, backend=target.backend).sum()) == count


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 1, 6), (2, 3, 5, 4)])
def test_every_dim_with_a_budget_per_row(target: Any, shape: tuple[int, ...]) -> None:
    values = make_values("quantised", shape)
    a = make_costs("power_of_two", shape)
    for dim in range(-len(shape), len(shape)):
        budget = total_cost(a, values, dim) * 0.4
        mask = ops.hard_topk(
            values.to(target.device),
            budget.to(target.device),
            a.to(target.device),
            dim,
            backend=target.backend,
        )
        assert torch.equal(mask.cpu(), oracle_hard_topk(values, budget, a, dim)), f"{dim=}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(target: Any, dtype: torch.dtype) -> None:
    values = make_values("normal", (3, 999), dtype=dtype)  # bfloat16 has many ties here
    mask = ops.hard_topk(values.to(target.device), 123.0, backend=target.backend)
    assert torch.equal(mask.cpu(), oracle_hard_topk(values, 123.0))


def test_float64_tells_apart_what_float32_cannot(target: Any) -> None:
    values = 1.0 + torch.arange(64, dtype=torch.float64, device=target.device) * 1e-14
    mask = ops.hard_topk(values, 10.0, backend=target.backend)
    assert mask[-10:].all() and not mask[:-10].any()


def test_non_contiguous_and_empty(target: Any) -> None:
    base = make_values("normal", (30, 41), device=target.device)
    for view in (base.T, base[::2, 3:], base[:, :1].expand(-1, 9)):
        expected = ops.hard_topk(view.contiguous(), 4.0 if view.shape[-1] > 4 else 1.0, backend=target.backend)
        assert torch.equal(ops.hard_topk(view, 4.0 if view.shape[-1] > 4 else 1.0, backend=target.backend), expected)
    for shape in [(0,), (3, 0), (0, 3)]:
        empty = torch.empty(shape, device=target.device)
        assert ops.hard_topk(empty, 0.0, backend=target.backend).shape == shape


# ----------------------------------------------------------------------------------------------------- global


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", ["none", "numbers", "power_of_two"])
@pytest.mark.parametrize("distribution", ["normal", "quantised", "mixed_scales", "all_equal"])
def test_list_equals_its_concatenation(target: Any, distribution: str, kind: str, absolute: bool) -> None:
    shapes = [(20, 31), (1,), (0, 3), (4, 3, 3, 3), (777,)]
    values = [make_values(distribution, s, seed=i) for i, s in enumerate(shapes)]
    numbers = [1.0, 2.0, 4.0, 0.5, 1.0]
    costs = {
        "none": None,
        "numbers": numbers,
        "power_of_two": [make_costs("power_of_two", s, seed=i) for i, s in enumerate(shapes)],
    }[kind]
    row = torch.cat([v.flatten() for v in values])
    row = row.abs() if absolute else row
    a = costs and torch.cat([cost_tensor(c, v).flatten() for c, v in zip(costs, values, strict=True)])
    on_device = costs and [c.to(target.device) if isinstance(c, Tensor) else c for c in costs]
    for density in DENSITIES:
        budget = float(cost_tensor(a, row).sum()) * density
        masks = ops.hard_topk_global(
            [v.to(target.device) for v in values],
            budget,
            on_device,
            absolute=absolute,
            backend=target.backend,
        )
        assert [m.shape for m in masks] == [v.shape for v in values]
        mask = torch.cat([m.flatten() for m in masks]).cpu()
        assert torch.equal(mask, oracle_hard_topk(row, budget, a)), density


def test_magnitude_of_views_is_chosen_without_touching_them(target: Any) -> None:
    base = make_values("normal", (40, 50), device=target.device)
    before = base.clone()
    views = [base.T, base[::2, ::3]]
    masks = ops.hard_topk_global(views, 300.0, absolute=True, backend=target.backend)
    row = torch.cat([v.reshape(-1) for v in views]).abs()
    expected = ops.hard_topk(row, 300.0, backend=target.backend)
    assert torch.equal(torch.cat([m.reshape(-1) for m in masks]), expected)
    assert torch.equal(base, before)


def test_same_bits_for_every_thread_count(target: Any, thread_count: None) -> None:
    values = make_values("quantised", (3, 100_003), device=target.device)
    masks = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        masks.append(ops.hard_topk(values, 12_345.0, backend=target.backend))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])


def test_opcheck(target: Any) -> None:
    values = make_values("normal", (3, 20), device=target.device)
    budget = torch.full((3,), 4.0, dtype=torch.float64, device=target.device)
    costs = make_costs("element", (20,), device=target.device)
    torch.library.opcheck(torch.ops.spartan.hard_topk_forward.default, (values, budget, costs, target.backend))
    torch.library.opcheck(
        torch.ops.spartan.hard_topk_global_forward.default,
        ([values, values[0]], budget[0], [], True, "", target.backend),
    )


def test_compiled_equals_eager(target: Any) -> None:
    def step(v: Tensor) -> Tensor:
        return v * ops.hard_topk(v, 3.0, backend=target.backend)

    values = make_values("normal", (5, 12), device=target.device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(values), compiled(values))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": -1.0}, ValueError, "budget.*-1"),
        ({"budget": 3.5}, ValueError, r"budget.*\[0, 3.*3\.5"),
        ({"budget": torch.ones(3)}, ValueError, r"budget.*\(2,\).*\(3,\)"),
        ({"costs": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "costs.*positive.*-1"),
        ({"costs": torch.ones(5)}, ValueError, r"costs.*\(5,\)"),
        (
            {"values": torch.tensor([[1.0, float("nan"), 0.0], [0.0, 0.0, 0.0]])},
            ValueError,
            "values.*(NaN|finite)",
        ),
        ({"values": torch.tensor([[1.0, float("inf"), 0.0], [0.0, 0.0, 0.0]])}, ValueError, "values.*finite"),
        ({"values": torch.arange(6).reshape(2, 3)}, TypeError, "values.*int64"),
        ({"dim": -3}, ValueError, "dim.*-3"),
    ],
    ids=lambda x: str(x).replace("\n", "")[:40] if isinstance(x, dict) else "",
)
def test_bad_input_is_named(target: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    if target.device != "cpu":
        pytest.skip("on a GPU values are inspected only under checks(True)")
    call = {"values": torch.arange(6.0).reshape(2, 3), "budget": 1.0, **arguments}
    with pytest.raises(error, match=f"(?is){message}"):
        ops.hard_topk(**call, backend=target.backend)
