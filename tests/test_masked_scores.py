"""An entry of -inf is masked: mask 0, gradient 0, no part of the budget. The others are solved as if alone."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spartan
from spartan_kernels import arguments, ops
from spartan_kernels.backends import shared
from spartan_kernels.backends.reference import survey
from spartan_kernels.testing import (
    assert_within_error_budget,
    cost_tensor,
    make_costs,
    make_values,
    oracle_hard_topk,
    oracle_soft_topk,
    plain_soft_topk,
    soft_topk_tolerance,
)

pytestmark = [
    pytest.mark.operators("soft_topk_forward", "soft_topk_backward", "soft_topk_global_forward"),
    pytest.mark.usefixtures("poisoned_memory", "one_thread"),
]

COSTS = ("none", "scalar", "element")
SHARES = (0.5, 0.95, 0.0, 1.1, 0.2)  # of masked entries by row: none in one, all in another
LENGTHS = (1, 3, 4, 8, 9, 33, 64, 257, 1000, 5001)
CASES = list(zip(LENGTHS, cycle(COSTS), cycle((1.0, 30.0, 0.0, 2.0)), strict=False))


def masked_rows(n: int, dtype: torch.dtype = torch.float32, kind: str = "normal", seed: int = 0) -> Tensor:
    """Rows of n entries with some masked."""
    values = make_values(kind, (len(SHARES), n), dtype=dtype, seed=seed)
    draw = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed + 1))
    return values.masked_fill(draw < torch.tensor(SHARES)[:, None], -torch.inf)


def entries(costs: Any, row: int, kept: Tensor) -> Any:
    return costs[row][kept] if isinstance(costs, Tensor) else costs


def unmasked_cost(values: Tensor, costs: Any) -> Tensor:
    return torch.where(values == -torch.inf, 0.0, cost_tensor(costs, values)).sum(-1)


def on(device: str, *tensors: Any) -> list[Any]:
    return [t.to(device) if isinstance(t, Tensor) else t for t in tensors]


@pytest.fixture
def unasked(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is inspected on the CPU is not: the kernels see it as on a GPU."""
    if target.backend == "native":
        pytest.skip("asks in its kernels")
    for module in (arguments, shared, survey):
        monkeypatch.setattr(module, "inspectable", lambda tensor: False)


def require_mask(mask: Tensor, values: Tensor, budget: float, costs: Any, beta: float, name: str = "mask") -> None:
    """Of one row or list: 0 where masked, elsewhere what the float64 oracle finds for the rest alone."""
    kept = values != -torch.inf
    assert bool((mask[~kept] == 0).all()), name
    if not bool(kept.any()):
        return
    v, a = values[kept], costs[kept] if isinstance(costs, Tensor) and costs.dim() else costs
    exact, plain = oracle_soft_topk(v, budget, a, beta), plain_soft_topk(v, budget, a, beta)
    floor = soft_topk_tolerance(exact, v, budget, a, beta)
    assert_within_error_budget(mask[kept], exact, plain, floor=floor, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "costs", "beta"), CASES)
def test_rows_are_those_of_the_entries_that_are_not_masked(
    target: Any, n: int, dtype: torch.dtype, costs: str, beta: float
) -> None:
    values, a = masked_rows(n, dtype), make_costs(costs, (len(SHARES), n), dtype=dtype)
    for share in (0.2, 0.85):
        budget = unmasked_cost(values, a) * share
        v, k, c = on(target.device, values, budget, a)
        mask = ops.soft_topk(v, k, c, beta, backend=target.backend).cpu()
        for row in range(len(values)):
            own = a[row] if isinstance(a, Tensor) else a
            require_mask(mask[row], values[row], float(budget[row]), own, beta, f"row {row}, share {share}")


@pytest.mark.parametrize(
    ("kind", "costs"), [("quantised", "none"), ("all_equal", "power_of_two"), ("student_t", "none")]
)
@pytest.mark.parametrize("n", LENGTHS)
def test_hard_rows_select_among_the_entries_that_are_not_masked(target: Any, n: int, costs: str, kind: str) -> None:
    values, a = masked_rows(n, kind=kind), make_costs(costs, (len(SHARES), n))
    for share in (0.0, 0.4, 1.0):
        budget = (unmasked_cost(values, a) * share).floor()
        v, k, c = on(target.device, values, budget, a)
        hard = ops.hard_topk(v, k, c, backend=target.backend).cpu()
        for row, kept in enumerate(values != -torch.inf):
            exact = oracle_hard_topk(values[row][kept], budget[row], entries(a, row, kept))
            assert torch.equal(hard[row][kept], exact), (row, share)
            assert not bool(hard[row][~kept].any()), (row, share)


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize(("n", "costs", "beta"), CASES)
def test_a_row_that_cannot_spend_its_budget_is_refused(
    target: Any, n: int, costs: str, beta: float, share: float
) -> None:
    if target.device != "cpu":
        pytest.skip("a GPU is not asked")
    values, a = masked_rows(n), make_costs(costs, (len(SHARES), n))
    live, total = unmasked_cost(values, a), cost_tensor(a, values).sum(-1)
    for row in (live < total).nonzero()[:, 0].tolist():
        budget = torch.where(torch.arange(len(SHARES)) == row, live + (total - live) * share, 0.5 * live)
        v, k, c = on(target.device, values, budget, a)
        for op, extra in ((ops.soft_topk, (beta,)), (ops.hard_topk, ())):
            with pytest.raises(ValueError, match=r"budget must be in \[0, .*costs of entries that are not -inf"):
                op(v, k, c, *extra, backend=target.backend)


@pytest.mark.parametrize("n", [3, 4, 33, 257, 5001])
def test_a_device_that_is_not_asked_gives_nan_for_such_a_row(target: Any, n: int, unasked: None) -> None:
    values = masked_rows(n)
    live = unmasked_cost(values, None)
    budget = torch.where(live < n, live + 0.5, 0.5 * live)
    v, k = on(target.device, values, budget)
    for beta in (0.0, 2.0):
        mask = ops.soft_topk(v, k, None, beta, backend=target.backend).cpu()
        assert torch.equal(mask.isnan(), (live < n)[:, None].expand_as(mask)), beta
        for row in (live == n).nonzero()[:, 0].tolist():
            require_mask(mask[row], values[row], float(budget[row]), None, beta)
    assert torch.equal(ops.hard_topk(v, k, backend=target.backend).cpu()[live < n], (values != -torch.inf)[live < n])


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("budget", ["little", "all"])
def test_a_device_that_is_not_asked_gives_nan_for_such_a_list(
    target: Any, costs: str, budget: str, unasked: None
) -> None:
    values, a = masked_list(costs)
    row, each = flat(values), flat([cost_tensor(c, v) for c, v in zip(a or [None] * len(values), values, strict=True)])
    k = float(unmasked_cost(row, each)) * 1.01 if budget == "little" else float(each.sum())
    own, own_costs = on(target.device, *values), None if a is None else on(target.device, *a)
    for beta in (0.0, 2.0):
        masks = ops.soft_topk_global(own, k, own_costs, beta, backend=target.backend)
        assert bool(flat(masks).isnan().all()), beta
    hard = ops.hard_topk_global(own, k, own_costs, backend=target.backend)
    assert torch.equal(flat(hard), row != -torch.inf)


def gradients(values: Tensor, budget: Tensor, costs: Any, beta: float, weights: Tensor, backend: str) -> list[Tensor]:
    """Of values, budget, beta and costs; by the oracle of the entries that are not masked, row by row, or a backend."""
    v, k = values.detach().clone().requires_grad_(), budget.detach().clone().requires_grad_()
    b = torch.tensor(beta, dtype=torch.float64, device=values.device, requires_grad=True)
    a = costs.detach().clone().requires_grad_() if isinstance(costs, Tensor) else costs
    if backend == "oracle":
        loss = torch.zeros((), dtype=torch.float64)
        for row, kept in enumerate(values != -torch.inf):
            mask = oracle_soft_topk(v[row][kept], k[row], entries(a, row, kept), b)
            loss = loss + (mask * weights[row][kept]).sum()
    else:
        loss = (spartan.soft_topk(v, k, a, b, backend=backend) * weights).sum()
    loss.backward()
    grads = [leaf.grad for leaf in (v, k, b, *([a] if isinstance(a, Tensor) else []))]
    return [torch.zeros(()) if g is None else g.cpu().double() for g in grads]


@pytest.mark.parametrize(("n", "costs"), list(zip(LENGTHS, cycle(COSTS), strict=False)))
def test_gradients_are_those_of_the_entries_that_are_not_masked(target: Any, n: int, costs: str) -> None:
    values, a = masked_rows(n), make_costs(costs, (len(SHARES), n))
    budget, weights = unmasked_cost(values, a) * 0.3, make_values("normal", values.shape, seed=7)
    exact = gradients(values.double(), budget, a.double() if isinstance(a, Tensor) else a, 2.0, weights, "oracle")
    v, k, c, w = on(target.device, values, budget, a, weights)
    found = gradients(v, k, c, 2.0, w, target.backend)
    for name, one, other in zip(("values", "budget", "beta", "costs"), found, exact, strict=False):
        scale = max(1.0, float(other.abs().max()))
        assert float((one - other).abs().max()) < 2e-5 * scale, name
    for grad in (found[0], *found[3:]):
        assert bool((grad[values == -torch.inf] == 0).all())


def masked_list(costs: str) -> tuple[list[Tensor], Any]:
    shapes = ((70, 5), (0,), (801,), (3,))
    values = [make_values("normal", shape, seed=i) for i, shape in enumerate(shapes)]
    shares = (0.5, 0.5, 0.3, 1.1)
    values = [
        v.masked_fill(torch.rand(v.shape, generator=torch.Generator().manual_seed(i)) < share, -torch.inf)
        for i, (v, share) in enumerate(zip(values, shares, strict=True))
    ]
    if costs == "none":
        return values, None
    if costs == "scalar":
        return values, [2.5] * len(values)
    return values, [make_costs("element", v.shape, seed=i) if i != 3 else 0.75 for i, v in enumerate(values)]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors]).cpu()


@pytest.mark.parametrize("beta", [0.0, 3.0])
@pytest.mark.parametrize("costs", COSTS)
def test_masked_lists_are_those_of_the_entries_that_are_not_masked(target: Any, costs: str, beta: float) -> None:
    values, a = masked_list(costs)
    row = flat(values)
    cost_row = flat([cost_tensor(c, v) for c, v in zip(a or [None] * len(values), values, strict=True)])
    live = float(unmasked_cost(row, cost_row))
    own, own_costs = on(target.device, *values), None if a is None else on(target.device, *a)
    for budget in (0.0, 0.2 * live, 0.85 * live, live):
        leaves = [v.clone().requires_grad_() for v in own]
        masks = spartan.soft_topk_global(leaves, budget, own_costs, beta, backend=target.backend)
        hard = ops.hard_topk_global(own, budget, own_costs, backend=target.backend)
        require_mask(flat(masks), row, budget, cost_row, beta, f"budget {budget}")
        kept = row != -torch.inf
        some = oracle_hard_topk(row[kept], budget, cost_row[kept]) if budget < live else torch.ones_like(row[kept]) > 0
        assert torch.equal(flat(hard)[kept], some) and not bool(flat(hard)[~kept].any()), budget
        flat_grads = _grad(sum((m * m).sum() for m in masks), leaves)
        assert bool((flat(flat_grads)[~kept] == 0).all()) and bool(flat(flat_grads).isfinite().all())
        through = spartan.soft_topk_global(own, budget, own_costs, beta, straight_through=True, backend=target.backend)
        assert torch.equal(flat(through), flat(hard).float())


def _grad(loss: Any, leaves: list[Tensor]) -> Any:
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("costs", COSTS)
def test_gradients_of_a_masked_list(target: Any, costs: str) -> None:
    values, a = masked_list(costs)
    grads = {}
    for backend, dtype in ((target.backend, torch.float32), ("reference", torch.float64)):
        device = target.device if backend == target.backend else "cpu"
        leaves = [v.to(device, dtype).requires_grad_() for v in values]
        given = None if a is None else [c.to(device, dtype).requires_grad_() if isinstance(c, Tensor) else c for c in a]
        beta = torch.tensor(2.0, dtype=torch.float64, device=device, requires_grad=True)
        masks = spartan.soft_topk_global(leaves, 150.0, given, beta, backend=backend)
        weights = [make_values("normal", m.shape, seed=9 + i).to(device, dtype) for i, m in enumerate(masks)]
        loss = sum((m * w).sum() for m, w in zip(masks, weights, strict=True))
        groups = [leaves, [c for c in given or [] if isinstance(c, Tensor)], [beta]]
        grads[dtype] = [flat(_grad(loss, group)) for group in groups if group]
    for one, other in zip(grads[torch.float32], grads[torch.float64], strict=True):
        scale = max(1.0, float(other.abs().max()))
        assert float((one.double() - other.double()).abs().max()) < 2e-5 * scale
    assert bool((grads[torch.float32][0][flat(values) == -torch.inf] == 0).all())


@pytest.mark.parametrize("costs", COSTS)
def test_masks_of_a_training_step(target: Any, costs: str) -> None:
    """Signed scores: of magnitudes none can be -inf."""
    values, a = masked_list(costs)
    own, own_costs = on(target.device, *values), None if a is None else on(target.device, *a)
    soft, hard = [torch.empty_like(v) for v in own], [torch.empty_like(v, dtype=torch.bool) for v in own]
    state = ops.new_solver_state(target.device)
    for budget in (150.0, 155.0, 160.0):
        ops.solve_masks_(own, budget, own_costs, 3.0, soft, hard, state, backend=target.backend)
        exact = ops.soft_topk_global(values, budget, a, 3.0, backend="reference")
        torch.testing.assert_close(flat(soft), flat(exact), rtol=0, atol=5e-6)
        assert torch.equal(flat(hard), flat(ops.hard_topk_global(values, budget, a, backend="reference")))


@pytest.mark.parametrize("n", [140_001])
def test_long_masked_rows(target: Any, n: int) -> None:
    if target.backend in ("triton", "cuda") and target.device == "cpu":
        pytest.skip("minutes in an interpreter or emulator")
    values = masked_rows(n)
    budget = unmasked_cost(values, None) * 0.3
    v, k = on(target.device, values, budget)
    v.requires_grad_()
    mask = spartan.soft_topk(v, k, beta=2.0, backend=target.backend)
    mask.square().sum().backward()
    hard = ops.hard_topk(v.detach(), k, backend=target.backend).cpu()
    assert v.grad is not None and bool((v.grad.cpu()[values == -torch.inf] == 0).all())
    assert torch.equal(hard, ops.hard_topk(values, budget, backend="reference"))
    for row in range(len(values)):
        require_mask(mask[row].detach().cpu(), values[row], float(budget[row]), None, 2.0, f"row {row}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [4, 40, 300])
def test_what_is_no_score_beside_masked_ones_is_refused(target: Any, n: int, bad: float) -> None:
    values = masked_rows(n).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(bad)).to(target.device)
    for solve in (ops.soft_topk, lambda v, k, backend: ops.soft_topk_global([v], k, backend=backend)[0]):
        if target.device == "cpu":
            with pytest.raises(ValueError, match=r"values.*must be finite"):
                solve(values, 1.0, backend=target.backend)
        else:
            assert bool(solve(values, 1.0, backend=target.backend)[1, 2].isnan())


def test_a_list_that_cannot_spend_its_budget_is_refused(target: Any) -> None:
    if target.device != "cpu":
        pytest.skip("a GPU is not asked")
    values = masked_rows(30)
    for solve_list in (ops.soft_topk_global, ops.hard_topk_global):
        for budget in (float((values != -torch.inf).sum()) + 0.5, 150.5):
            with pytest.raises(ValueError, match=r"budget must be in \[0, .*costs of entries that are not -inf"):
                solve_list([values], budget, backend=target.backend)


def test_transforms_and_graphs_agree_on_masked_rows(target: Any) -> None:
    values = masked_rows(40)[::2].to(target.device)

    def loss(v: Tensor) -> Tensor:
        return spartan.soft_topk(v, 7.0, beta=2.0, backend=target.backend).square().sum()

    v = values.clone().requires_grad_()
    loss(v).backward()
    assert v.grad is not None
    torch.testing.assert_close(torch.func.grad(loss)(values), v.grad)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(values), v.grad)
    hard = torch.func.vmap(lambda row: ops.hard_topk(row, 7.0, backend=target.backend))(values)
    assert torch.equal(hard, ops.hard_topk(values, 7.0, backend=target.backend))
    through = spartan.soft_topk(values, 7.0, beta=2.0, straight_through=True, backend=target.backend)
    assert torch.equal(through, hard.float())


def test_masked_rows_compiled(target: Any) -> None:
    values = masked_rows(40)[::2].to(target.device)

    def both(v: Tensor) -> tuple[Tensor, Tensor]:
        soft = spartan.soft_topk(v, 7.0, beta=2.0, backend=target.backend)
        return soft, ops.hard_topk(v, 7.0, backend=target.backend)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    v, w = values.clone().requires_grad_(), values.clone().requires_grad_()
    (soft, hard), (soft_compiled, hard_compiled) = both(v), compiled(w)
    soft.square().sum().backward()
    soft_compiled.square().sum().backward()
    assert torch.equal(soft, soft_compiled) and torch.equal(hard, hard_compiled) and torch.equal(v.grad, w.grad)


def test_causal_rows_keep_a_budget_of_what_they_may_see(target: Any) -> None:
    n = 37
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    scores = make_values("normal", (n, n)).masked_fill(~allowed, -torch.inf)
    seen = torch.arange(1, n + 1).clamp(max=5)
    v, k = on(target.device, scores, seen)
    mask = ops.soft_topk(v, k, beta=4.0, backend=target.backend).cpu()
    hard = ops.hard_topk(v, k, backend=target.backend).cpu()
    torch.testing.assert_close(mask.double().sum(-1), seen.double(), rtol=1e-6, atol=0)
    assert torch.equal(hard.sum(-1), seen) and not bool((mask[~allowed] != 0).any())


@given(
    n=st.integers(1, 400),
    masked=st.floats(0.0, 1.0),
    costs=st.sampled_from(COSTS),
    beta=st.sampled_from([0.0, 1e-3, 1.0, 20.0, 1e3]),
    share=st.floats(0.01, 0.99),
    kind=st.sampled_from(["normal", "quantised", "lognormal", "all_equal"]),
    seed=st.integers(0, 1000),
)
def test_drawn_problems_match_the_oracle(
    target: Any, n: int, masked: float, costs: str, beta: float, share: float, kind: str, seed: int
) -> None:
    values, a = make_values(kind, (1, n), seed=seed), make_costs(costs, (1, n), seed=seed)
    draw = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))
    values = values.masked_fill(draw < masked, -torch.inf)
    budget = unmasked_cost(values, a) * share
    v, k, c = on(target.device, values, budget, a)
    own = a[0] if isinstance(a, Tensor) else a
    rows = ops.soft_topk(v, k, c, beta, backend=target.backend).cpu()
    require_mask(rows[0], values[0], float(budget), own, beta)
    listed = ops.soft_topk_global([v], float(budget), None if c is None else [c], beta, backend=target.backend)
    require_mask(listed[0][0].cpu(), values[0], float(budget), own, beta)


@pytest.mark.parametrize("costs", [False, True])
def test_gradcheck_beside_masked_entries(target: Any, costs: bool) -> None:
    if target.backend not in ("native", "reference"):
        pytest.skip("in float64 only")
    values = masked_rows(6, torch.float64)[:1].to(target.device)
    kept = values != -torch.inf
    assert 1 < int(kept.sum()) < 6
    a = make_costs("element", values.shape, dtype=torch.float64)
    assert isinstance(a, Tensor)

    def mask(unmasked: Tensor, price: Tensor, budget: Tensor, beta: Tensor) -> Tensor:
        v = values.masked_scatter(kept, unmasked)
        return spartan.soft_topk(v, budget[None], price if costs else None, beta, backend=target.backend)

    inputs = [values[kept], a, torch.tensor(0.8, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)]
    torch.autograd.gradcheck(mask, [i.clone().requires_grad_() for i in inputs])
