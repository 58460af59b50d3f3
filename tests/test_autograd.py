"""Gradients of the operators where PyTorch's machinery meets them: functorch, compiler, autocast, memory, corners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.func import grad, hessian, jacrev, vmap

import spartan
from spartan_kernels.testing import make_costs, make_values, oracle_soft_topk

pytestmark = [
    pytest.mark.operators(
        "soft_topk_forward",
        "soft_topk_backward",
        "soft_topk_global_forward",
        "soft_topk_global_backward",
        "hard_topk_forward",
        "hard_topk_global_forward",
        "masked_weight_forward",
        "masked_weight_backward",
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]


def uniform(*shape: int, seed: int, device: str) -> Tensor:
    return make_values("uniform", shape, seed=seed, device=device).add(0.5)


# Every public operator with a gradient, as a function of its differentiable arguments: values [.., 3, 8] first.
def rows(v: Tensor, k: Tensor, a: Tensor, b: Tensor, backend: str) -> Tensor:
    return spartan.soft_topk(v, k, a, b, backend=backend)


def straight(v: Tensor, k: Tensor, a: Tensor, b: Tensor, backend: str) -> Tensor:
    return spartan.soft_topk(v, k, a, b, straight_through=True, backend=backend) * v


def columns(v: Tensor, k: Tensor, a: Tensor, b: Tensor, backend: str) -> Tensor:
    return spartan.soft_topk(v, k.sum() / 8, a, b, dim=-2, backend=backend)


def many(v: Tensor, k: Tensor, a: Tensor, b: Tensor, backend: str) -> Tensor:
    first, second = spartan.soft_topk_global([v, v[0]], k.sum(), [a, b], b, backend=backend)
    return first + second


def weight(v: Tensor, k: Tensor, a: Tensor, b: Tensor, backend: str) -> Tensor:
    soft = torch.sigmoid(v.detach())
    return spartan.masked_weight(v, soft, v.detach() > 0, beta=b, costs=a, backend=backend) * k[:, None]


def linear(v: Tensor, k: Tensor, a: Tensor, b: Tensor, backend: str) -> Tensor:
    return spartan.masked_linear(v, a, k[:2].outer(k), (2, 3)) * b


DIFFERENTIABLE = (rows, straight, columns, many, weight, linear)


def operands(device: str, *batch: int) -> list[Tensor]:
    """Values, budget, costs and beta, the last three positive and fit for any row of eight."""
    return [
        make_values("normal", (*batch, 3, 8), device=device),
        uniform(*batch, 3, seed=1, device=device),
        uniform(*batch, 3, 8, seed=2, device=device),
        uniform(*batch, seed=3, device=device) * 3,
    ]


# ------------------------------------------------------------------------------------------- differentiable once


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(target: Any, function: Callable[..., Tensor]) -> None:
    v, *rest = operands(target.device)
    leaf = v.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf, *rest, target.backend).square().sum(), leaf, create_graph=True)
    (plain,) = torch.autograd.grad(function(leaf, *rest, target.backend).square().sum(), leaf)
    assert torch.equal(first, plain)  # create_graph alone is no reason to refuse
    with pytest.raises(RuntimeError, match=r"spartan\.\w+ is differentiable once"):
        first.sum().backward()

    def loss(v: Tensor) -> Tensor:
        return function(v, *rest, target.backend).square().sum()

    for second in (
        lambda: torch.autograd.gradgradcheck(loss, leaf, eps=1e-3),
        lambda: grad(lambda x: grad(loss)(x).sum())(v),
        lambda: jacrev(jacrev(loss))(v),
    ):
        with pytest.raises(RuntimeError, match=r"spartan\.\w+ is differentiable once"):
            second()
    with pytest.raises(RuntimeError, match="forward-mode"):
        hessian(loss)(v)


def test_a_gradient_may_be_scaled_by_what_needs_a_gradient(target: Any) -> None:
    """The first gradient is a constant of the graph where nothing that it came from is differentiated again."""
    v, k, a, b = operands(target.device)
    scale = torch.ones((), device=target.device, requires_grad=True)
    inner = grad(lambda x: rows(x, k, a, b, target.backend).square().sum())(v)
    (outer,) = torch.autograd.grad((inner * scale).sum(), scale)
    torch.testing.assert_close(outer, inner.sum())


# ------------------------------------------------------------------------------------------------------- functorch

# which of values, budget, costs and beta carry the batch, and where
IN_DIMS = [(0, 0, 0, 0), (1, None, None, None), (None, 0, None, None), (None, None, 2, None), (-1, 1, None, 0)]


def looped(function: Callable[..., Any], in_dims: tuple[int | None, ...], arguments: list[Tensor]) -> Any:
    size = next(x.shape[d] for x, d in zip(arguments, in_dims, strict=True) if d is not None)
    results = [
        function(*(x if d is None else x.select(d, i) for x, d in zip(arguments, in_dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def batched(device: str, in_dims: tuple[int | None, ...]) -> list[Tensor]:
    with_batch, without = operands(device, 5), operands(device)
    return [x if d is None else y.movedim(0, d) for x, y, d in zip(without, with_batch, in_dims, strict=True)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_vmap_equals_a_loop(target: Any, function: Callable[..., Tensor], in_dims: tuple[int | None, ...]) -> None:
    arguments = batched(target.device, in_dims)

    def call(*x: Tensor) -> Tensor:
        return function(*x, target.backend)

    torch.testing.assert_close(vmap(call, in_dims)(*arguments), looped(call, in_dims, arguments))
    torch.testing.assert_close(
        vmap(call, in_dims, out_dims=-1)(*arguments), looped(call, in_dims, arguments).movedim(0, -1)
    )

    differentiated = (0,) if function is weight else (0, 2, 3) if function is linear else (0, 1, 2, 3)

    def gradients(*x: Tensor) -> Any:
        return grad(lambda *y: call(*y).square().sum(), argnums=differentiated)(*x)

    per_sample = vmap(gradients, in_dims)(*arguments)
    for got, want in zip(per_sample, looped(gradients, in_dims, arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("costs", ["none", "number", "per_entry", "per_element"])
@pytest.mark.parametrize("shared", [True, False])
def test_vmap_over_every_shape_of_costs(target: Any, costs: str, shared: bool) -> None:
    values = make_values("normal", (4, 3, 8), device=target.device)
    shape = {"none": None, "number": (), "per_entry": (8,), "per_element": (3, 8)}[costs]
    a = None if shape is None else uniform(*(() if shared else (4,)), *shape, seed=2, device=target.device)
    in_dims = (0, None if a is None or shared else 0)

    def gradient(v: Tensor, a: Tensor | None) -> Any:
        def loss(v: Tensor, a: Tensor | None) -> Tensor:
            mask = spartan.soft_topk(v, 1.5, a, 3.0, backend=target.backend)
            hard = spartan.hard_topk(v, 1.5, a, backend=target.backend)
            return (mask * mask + hard * mask).sum()

        return grad(loss, argnums=0 if a is None else (0, 1))(v, a)

    got = vmap(gradient, in_dims)(values, a)
    each = [gradient(values[i], a if in_dims[1] is None else a[i]) for i in range(4)]
    want = torch.stack(each) if a is None else tuple(torch.stack(x) for x in zip(*each, strict=True))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_vmapped_operator_and_nested_vmap(target: Any) -> None:
    v, k, a, b = operands(target.device, 4)
    leaf = v.clone().requires_grad_()
    mask = vmap(lambda v, k, a: rows(v, k, a, b[0], target.backend))(leaf, k, a)
    direct = v.clone().requires_grad_()
    whole = spartan.soft_topk(direct, k, a, b[0], backend=target.backend)
    torch.testing.assert_close(mask, whole)
    upstream = make_values("normal", v.shape, seed=9, device=target.device)
    torch.testing.assert_close(
        *(torch.autograd.grad(m, x, upstream)[0] for m, x in ((mask, leaf), (whole, direct))), rtol=1e-4, atol=1e-6
    )
    nested = vmap(vmap(lambda v, k: spartan.hard_topk(v, k, backend=target.backend)))(v, k)
    assert torch.equal(nested, spartan.hard_topk(v, k, backend=target.backend))
    jacobian = jacrev(lambda v: spartan.soft_topk(v, k[0, 0], beta=b[0], backend=target.backend))(v[0, 0])
    leaf = v[0, 0].clone().requires_grad_()
    mask = spartan.soft_topk(leaf, k[0, 0], beta=b[0], backend=target.backend)
    by_row = [torch.autograd.grad(m, leaf, retain_graph=True)[0] for m in mask]
    torch.testing.assert_close(jacobian, torch.stack(by_row), rtol=1e-4, atol=1e-6)


def test_vmap_over_nothing_says_so(target: Any) -> None:
    with pytest.raises(ValueError, match=r"vmap.*soft_topk_global.*got 0"):
        vmap(lambda v: spartan.soft_topk_global([v], 1.0, backend=target.backend)[0])(
            torch.empty(0, 5, device=target.device)
        )


# -------------------------------------------------------------------------------------------------------- compiler


def annealed(v: Tensor, k: Any, b: Any, backend: str) -> Tensor:
    return (spartan.soft_topk(v, k, None, b, backend=backend) * v).sum()


def annealed_columns(v: Tensor, k: Any, b: Any, backend: str) -> Tensor:
    return (spartan.soft_topk(v, k, b, b, dim=0, straight_through=True, backend=backend) * v).sum()


def annealed_list(v: Tensor, k: Any, b: Any, backend: str) -> Tensor:
    masks = spartan.soft_topk_global([v, v[0]], k, [b, 2.0], b, backend=backend)
    return (masks[0] * v).sum() + masks[1].square().sum()


def annealed_hard(v: Tensor, k: Any, b: Any, backend: str) -> Tensor:
    return (spartan.hard_topk(v, k, backend=backend) * v * b).sum()


def annealed_weight(v: Tensor, k: Any, b: Any, backend: str) -> Tensor:
    return (spartan.masked_weight(v, torch.sigmoid(v.detach()), v.detach() > 0, beta=b, backend=backend) * k).sum()


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("function", [annealed, annealed_columns, annealed_list, annealed_hard, annealed_weight])
def test_one_graph_for_every_shape_beta_and_budget(target: Any, function: Callable[..., Tensor], kind: str) -> None:
    if (target.backend == "reference") != (kind == "tensor"):
        pytest.skip("the graph is of operators, the same whatever backend serves them: each kind of number on one")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, shape in enumerate([(3, 8), (5, 9), (7, 33), (4, 6)]):
        numbers = [1.25 + step / 4, 2.0 + step / 3]
        k, b = (torch.tensor(x, device=target.device) if kind == "tensor" else x for x in numbers)
        values = make_values("normal", shape, seed=step, device=target.device)
        results = []
        for run in (function, compiled):
            leaf = values.clone().requires_grad_()
            loss = run(leaf, k, b, target.backend)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager)
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_functorch(target: Any) -> None:
    v, k, a, b = operands(target.device, 4)

    def gradients(v: Tensor, k: Tensor) -> Tensor:
        return vmap(grad(lambda v, k: rows(v, k, a[0], b[0], target.backend).square().sum()))(v, k)

    compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v, k), gradients(v, k))


@pytest.mark.parametrize("name", ["soft_topk_forward", "soft_topk_backward", "soft_topk_global_backward"])
def test_opcheck(target: Any, name: str) -> None:
    v, k, a, b = operands(target.device)
    k, b = k.double(), b.double()
    threshold = torch.zeros(3, 2, dtype=torch.float64, device=target.device)
    call = {
        "soft_topk_forward": (v.clone().requires_grad_(), k, a, b, target.backend),
        "soft_topk_backward": (a, v, threshold, a.clone(), b, True, target.backend),
        "soft_topk_global_backward": ([a], [v], threshold[0], [a.clone()], b, True, "", target.backend),
    }[name]
    torch.library.opcheck(getattr(torch.ops.spartan, name).default, call)


# -------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_reads_float32_as_softmax_does(target: Any, dtype: torch.dtype, compiled: bool) -> None:
    if compiled and (target.backend == "reference") != (dtype in (torch.bfloat16, torch.float64)):
        pytest.skip("the graph is of operators, the same whatever backend serves them: each dtype on one")
    values = make_values("normal", (3, 40), dtype=dtype, device=target.device)
    a = uniform(3, 40, seed=2, device=target.device)
    upstream = make_values("normal", (3, 40), seed=4, device=target.device)

    def masks(v: Tensor) -> tuple[Tensor, ...]:
        mask = spartan.soft_topk(v, 4.0, a, 3.0, backend=target.backend)
        many = spartan.soft_topk_global([v], 4.0, [a], 3.0, backend=target.backend)[0]
        straight = spartan.soft_topk(v, 4.0, a, 3.0, straight_through=True, backend=target.backend)
        return mask, many, straight

    torch._dynamo.reset()
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    leaf = values.clone().requires_grad_()
    with torch.autocast(target.device, torch.bfloat16):
        inside = (torch.compile(masks, fullgraph=True, backend="aot_eager") if compiled else masks)(leaf)
    wide = values.to(wanted).requires_grad_()
    for got, want in zip(inside, masks(wide), strict=True):
        assert got.dtype == wanted
        assert torch.equal(got, want)
        (gradient,) = torch.autograd.grad(got, leaf, upstream.to(wanted), retain_graph=True)
        (exact,) = torch.autograd.grad(want, wide, upstream.to(wanted))
        assert gradient.dtype == dtype
        assert torch.equal(gradient, exact.to(dtype))


# ---------------------------------------------------------------------------------------------------- what is kept


def saved_bytes(call: Callable[[], Any], *mine: Tensor) -> tuple[int, int]:
    """Bytes of the storages that autograd keeps for `call`, and those of them that the caller does not hold anyway."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = call()  # alive while counted, so that no storage is counted for another
    held = {x.untyped_storage().data_ptr() for x in mine}
    extra = sum(size for pointer, size in storages.items() if pointer not in held)
    assert kept is not None
    return sum(storages.values()), extra


@pytest.mark.parametrize("straight_through", [False, True])
def test_what_the_backward_keeps(target: Any, straight_through: bool) -> None:
    n = 4096
    values = make_values("normal", (6, n), device=target.device).requires_grad_()
    costs = uniform(6, n, seed=1, device=target.device).requires_grad_()
    small = 6 * 16 + 64  # threshold and centre of each row; budget, beta and a cost as single numbers

    def rows(v: Tensor, a: Any, dim: int = -1) -> Tensor:
        options: Any = {"straight_through": straight_through, "backend": target.backend}
        return spartan.soft_topk(v, 2.0, a, 3.0, dim, **options)

    def many(v: Tensor) -> list[Tensor]:
        return spartan.soft_topk_global(
            list(v), 2.0, None, 3.0, straight_through=straight_through, backend=target.backend
        )

    size = values.untyped_storage().nbytes()
    total, extra = saved_bytes(lambda: rows(values, None), values)
    assert size <= total <= size + small and extra <= small  # the values that the caller has, and nothing of their size
    assert saved_bytes(lambda: rows(values, 2.0), values)[1] <= small
    assert saved_bytes(lambda: rows(values, costs), values, costs)[1] <= small
    assert saved_bytes(lambda: many(values), values)[1] <= small
    computed = saved_bytes(lambda: rows(values.mul(2), None), values)  # values that nobody else keeps: once
    assert size <= computed[1] <= size + small
    assert saved_bytes(lambda: rows(values.reshape(3, n, 2), None, 1), values)[1] <= size + small  # rows are a copy


# --------------------------------------------------------------------------------------------------------- corners

CORNERS = {
    "constant": (torch.full((2, 31), 0.7), 7.0, 3.0),
    "constant and sharp": (torch.full((2, 31), -12.5), 7.0, 1e4),
    "flat": (make_values("normal", (2, 31)), 7.0, 0.0),
    "nearly flat": (make_values("normal", (2, 31)), 7.0, 1e-30),
    "nothing": (make_values("normal", (2, 31)), 0.0, 3.0),
    "everything": (make_values("normal", (2, 31)), 1.0, 3.0),  # times the sum of the costs
    "ties at the threshold": (torch.tensor([3.0] * 5 + [2.0] * 10 + [1.0] * 16).expand(2, -1), 8.0, 30.0),
    "one element": (make_values("normal", (3, 1)), 0.3, 3.0),
    "one value stands out": (torch.tensor([1e4] + [0.0] * 30).expand(2, -1), 2.5, 5.0),
}


@pytest.mark.parametrize("costs", ["none", "scalar", "power_of_two"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("corner", CORNERS)
def test_gradients_in_the_corners(target: Any, corner: str, dtype: torch.dtype, costs: str) -> None:
    values, budget, beta = CORNERS[corner]
    a = make_costs(costs, values.shape)
    a = torch.ones(()) if a is None else torch.as_tensor(a)
    total = a.expand(values.shape).sum(-1)
    k = total * (budget / values.shape[-1] if corner != "everything" else 1.0)
    upstream = make_values("normal", values.shape, seed=5).double()

    exact_leaves = [x.double().requires_grad_() for x in (values, k, a, torch.tensor(beta))]
    exact = torch.autograd.grad(oracle_soft_topk(*exact_leaves), exact_leaves, upstream)
    leaves = [x.to(target.device, dtype).requires_grad_() for x in (values, k, a, torch.tensor(beta))]
    mask = spartan.soft_topk(*leaves, backend=target.backend)
    gradients = torch.autograd.grad(mask, leaves, upstream.to(target.device, dtype))
    for name, got, want in zip(("values", "budget", "costs", "beta"), gradients, exact, strict=True):
        loose = {torch.float64: 1e-5, torch.float32: 2e-4}[dtype]
        # a sum of terms that cancel is as exact as its largest term
        reach = float(values.abs().max())
        largest = {"values": beta, "costs": beta * reach, "beta": reach}
        scale = float(want.detach().abs().max()) + largest.get(name, 1.0)
        assert got.isfinite().all(), f"{name} {got}"
        torch.testing.assert_close(
            got.cpu().double(), want, rtol=loose, atol=loose * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("over", ["short rows", "long rows", "list"])
@pytest.mark.parametrize(("offset", "beta"), [(0.0, 1e-30), (0.0, 1e-6), (1e3, 1.0), (-1e3, 30.0)])
def test_the_gradient_of_beta_loses_nothing_where_zero_or_the_threshold_is_far(
    target: Any, over: str, offset: float, beta: float
) -> None:
    """A shift of the values leaves that sum alone; nearly flat masks have their threshold at logit(k/n) / beta."""
    values = make_values("normal", (2, 23 if over == "short rows" else 1201)).add(offset)
    if over == "list":
        values = values.reshape(1, -1)
    n = values.shape[-1]
    upstream = make_values("normal", values.shape, seed=5)
    exact_beta = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    exact_mask = oracle_soft_topk(values.double() - offset, 0.03 * n, None, exact_beta)
    (exact,) = torch.autograd.grad(exact_mask, exact_beta, upstream.double())
    leaf = torch.tensor(beta, dtype=torch.float64, device=target.device, requires_grad=True)
    if over == "list":
        parts = list(values[0].to(target.device).split([n // 3, n - n // 3]))
        mask = torch.cat(spartan.soft_topk_global(parts, 0.03 * n, beta=leaf, backend=target.backend))[None]
    else:
        mask = spartan.soft_topk(values.to(target.device), 0.03 * n, beta=leaf, backend=target.backend)
    (found,) = torch.autograd.grad(mask, leaf, upstream.to(target.device))
    m = exact_mask.detach()
    size = float((m * (1 - m) * (upstream.double() * (values.double() - offset)).abs()).sum())
    assert abs(float(found.cpu() - exact)) <= 1e-5 * size, f"{float(found)} instead of {float(exact)}, terms of {size}"


# ------------------------------------------------------------------------------------------------ straight through


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_straight_through_is_hard_forward_and_soft_backward(target: Any, dtype: torch.dtype) -> None:
    values = make_values("quantised", (4, 37), dtype=dtype, device=target.device)
    upstream = make_values("normal", (4, 37), seed=6, dtype=dtype, device=target.device)
    a = make_costs("power_of_two", (4, 37), dtype=dtype, device=target.device)
    for costs in (None, a):
        results = []
        for straight_through in (True, False):
            leaf = values.clone().requires_grad_()
            mask = spartan.soft_topk(leaf, 9.5, costs, 4.0, straight_through=straight_through, backend=target.backend)
            results.append((mask.detach(), *torch.autograd.grad(mask, leaf, upstream)))
        assert results[0][0].dtype == dtype
        assert torch.equal(results[0][0], spartan.hard_topk(values, 9.5, costs, backend=target.backend).to(dtype))
        assert torch.equal(results[0][1], results[1][1])


def test_straight_through_over_a_list(target: Any) -> None:
    values = [make_values("quantised", (n,), seed=n, device=target.device) for n in (40, 1, 77)]
    results = []
    for straight_through in (True, False):
        leaves = [v.clone().requires_grad_() for v in values]
        masks = spartan.soft_topk_global(
            leaves, 30.0, beta=4.0, straight_through=straight_through, backend=target.backend
        )
        loss = sum((m * torch.arange(m.numel(), device=target.device)).sum() for m in masks)
        results.append((masks, torch.autograd.grad(loss, leaves)))
    hard = torch.cat([m.detach() for m in results[0][0]])
    assert hard.sum() == 30 and set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.bool(), spartan.hard_topk(torch.cat(values), 30.0, backend=target.backend))
    for through, soft in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(through, soft)
