"""masked_weight, its gradient and the coupling of a budget, against float64 autograd of the exact op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import spartan.functional as F
from spartan_kernels import ops
from spartan_kernels.arguments import block_shape
from spartan_kernels.testing import (
    assert_within_error_budget,
    cost_tensor,
    make_values,
    oracle_block_sum,
    oracle_expand_blocks,
    oracle_hard_topk,
    oracle_masked_weight,
    oracle_soft_topk,
)

pytestmark = [
    pytest.mark.operators(
        "masked_weight_forward",
        "masked_weight_backward",
        "masked_weight_coupling",
        "masked_weight_correct_",
        "block_scores",
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]

# shape and block size: dividing, ragged at one edge or both, larger than the weight, convolutions, vectors
LAYOUTS = [
    ((33, 17), 1),
    ((7,), 1),
    ((4, 3, 3, 3), 1),
    ((64, 32), 16),
    ((64, 32), (8, 4)),
    ((37, 50), 16),
    ((37, 50), (8, 4)),
    ((5, 3), (16, 16)),
    ((1, 100), (1, 32)),
    ((100, 1), (32, 1)),
    ((16, 8, 3, 3), 8),
    ((10, 6, 3, 2), (4, 4)),
    ((9, 5, 4), (2, 3)),
]
layouts = pytest.mark.parametrize(("shape", "block_size"), LAYOUTS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def layer(
    shape: tuple[int, ...],
    block_size: Any,
    *,
    beta: float = 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Any, Tensor]:
    """Weight with some exact zeros, its soft and hard mask, costs and an upstream gradient."""
    weight = make_values("normal", shape, seed=seed, dtype=dtype)
    weight = torch.where(make_values("uniform", shape, seed=seed + 1) < 0.1, torch.zeros_like(weight), weight)
    costs = ops.block_costs(shape, block_size)
    scores = oracle_block_sum(weight.abs(), block_size)
    budget = 0.4 * float(cost_tensor(costs, scores).sum())
    flat_costs = costs.flatten() if isinstance(costs, Tensor) else costs
    soft = oracle_soft_topk(scores.flatten(), budget, flat_costs, beta).reshape(scores.shape).to(dtype)
    hard = oracle_hard_topk(scores.flatten(), budget, flat_costs).reshape(scores.shape)
    return weight, soft, hard, costs, make_values("normal", shape, seed=seed + 2, dtype=dtype)


def to(device: str, *tensors: Any) -> list[Any]:
    return [t.to(device) if isinstance(t, Tensor) else t for t in tensors]


# ----------------------------------------------------------------------------------------------------- blocks


@layouts
def test_block_geometry(shape: tuple[int, ...], block_size: Any) -> None:
    grid = ops.block_grid(shape, block_size)
    assert grid == tuple(oracle_block_sum(torch.zeros(shape), block_size).shape)
    numbers = torch.arange(float(torch.Size(grid).numel())).reshape(grid)
    assert torch.equal(ops.expand_blocks(numbers, shape, block_size), oracle_expand_blocks(numbers, shape, block_size))
    counted = oracle_block_sum(torch.ones(shape), block_size)
    assert torch.equal(cost_tensor(ops.block_costs(shape, block_size), counted), counted)


@layouts
@dtypes
def test_block_scores(target: Any, shape: tuple[int, ...], block_size: Any, dtype: torch.dtype) -> None:
    weight = make_values("normal", shape, dtype=dtype)
    exact = oracle_block_sum(weight.abs(), block_size)
    plain = oracle_block_sum(weight.abs(), block_size).to(dtype)
    actual = ops.block_scores(weight.to(target.device), block_size, backend=target.backend)
    assert actual.dtype == dtype
    # a block is summed in some order of its own: a few roundings beside the final one
    floor = 4 * torch.finfo(dtype).eps * exact
    assert_within_error_budget(actual.cpu(), exact, plain, floor=floor)


# --------------------------------------------------------------------------------------- forward and backward


@layouts
@dtypes
@pytest.mark.parametrize("given_masks", ["both", "soft", "hard", "none"])
@pytest.mark.parametrize("straight_through", [True, False])
def test_forward_and_gradient(
    target: Any,
    shape: tuple[int, ...],
    block_size: Any,
    dtype: torch.dtype,
    given_masks: str,
    straight_through: bool,
) -> None:
    weight, soft, hard, costs, upstream = layer(shape, block_size, dtype=dtype)
    soft = soft if given_masks in ("both", "soft") else None
    hard = hard if given_masks in ("both", "hard") else None
    options = {"beta": 2.0, "costs": costs, "straight_through": straight_through}
    exact_leaf = weight.double().requires_grad_()
    exact = oracle_masked_weight(exact_leaf, soft, hard, block_size, **options)
    (exact_gradient,) = torch.autograd.grad(exact, exact_leaf, upstream.double())

    leaf, soft_d, hard_d, upstream_d = to(target.device, weight, soft, hard, upstream)
    leaf.requires_grad_()
    options["costs"] = to(target.device, costs)[0]
    actual = F.masked_weight(leaf, soft_d, hard_d, block_size, **options, backend=target.backend)
    (gradient,) = torch.autograd.grad(actual, leaf, upstream_d)
    assert actual.dtype == gradient.dtype == dtype
    assert_within_error_budget(actual.cpu(), exact, exact.to(dtype), name="forward")

    # The plain computation rounds every factor once; a block's g_b = Σ G θ may lose a few ulps of Σ |G θ|.
    eps = torch.finfo(dtype).eps
    floor = 2 * eps * exact_gradient.abs()
    if soft is not None:
        m = soft.double()
        moved = oracle_block_sum((upstream.double() * weight.double()).abs(), block_size)
        pull = 2.0 * m * (1 - m) * moved / cost_tensor(costs, m)
        floor = floor + 8 * eps * (oracle_expand_blocks(pull, shape, block_size) + upstream.double().abs())
    assert_within_error_budget(gradient.cpu(), exact_gradient, exact_gradient.to(dtype), floor=floor, name="gradient")


def test_gradient_at_zero_weights_has_no_sign(target: Any) -> None:
    weight = torch.tensor([[0.0, -0.0, 2.0, -3.0]], device=target.device, requires_grad=True)
    soft = torch.full((1, 4), 0.5, device=target.device)
    out = F.masked_weight(weight, soft, None, beta=4.0, backend=target.backend)
    (gradient,) = torch.autograd.grad(out, weight, torch.ones_like(weight))
    # G m + sign(θ) β s G θ with G = 1, m = 1/2, β s = 1: 1/2 + |θ|
    assert gradient.tolist() == [[0.5, 0.5, 2.5, 3.5]]


def test_dropped_weights_are_exact_zeros_even_beside_infinities(target: Any) -> None:
    weight = torch.tensor([[float("inf"), 1.0], [float("nan"), -1.0]], device=target.device)
    hard = torch.tensor([[False, True], [False, True]], device=target.device)
    out = ops.masked_weight(weight, None, hard, backend=target.backend)
    assert out.tolist() == [[0.0, 1.0], [0.0, -1.0]]


@layouts
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_non_contiguous_input(target: Any, shape: tuple[int, ...], block_size: Any, layout: str) -> None:
    def view(tensor: Tensor) -> Tensor:
        if layout == "transposed":
            return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
        return tensor.repeat_interleave(2, -1)[..., ::2]

    weight, soft, hard, costs, upstream = to(target.device, *layer(shape, block_size))
    results = []
    for arrange in (Tensor.contiguous, view):
        leaf = arrange(weight.clone()).requires_grad_()
        masks = arrange(soft), arrange(hard)
        out = F.masked_weight(leaf, *masks, block_size, beta=2.0, costs=costs, backend=target.backend)
        (gradient,) = torch.autograd.grad(out, leaf, arrange(upstream))
        final = arrange(gradient.clone())
        sums = ops.masked_weight_coupling(
            final, leaf, masks[0], block_size, beta=2.0, costs=costs, backend=target.backend
        )
        ops.masked_weight_correct_(final, leaf, masks[0], 0.3, block_size, backend=target.backend)
        scores = ops.block_scores(leaf, block_size, backend=target.backend)
        results.append((out.detach(), gradient, sums, final, scores))
    for contiguous, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, contiguous, rtol=1e-5, atol=1e-6)


@given(
    shape=st.lists(st.integers(1, 20), min_size=2, max_size=4).map(tuple),
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    seed=st.integers(0, 100),
)
def test_any_shape_and_block(target: Any, shape: tuple[int, ...], rows: int, columns: int, seed: int) -> None:
    block_size = (rows, columns)
    weight, soft, hard, costs, upstream = layer(shape, block_size, seed=seed)
    exact_leaf = weight.double().requires_grad_()
    exact = oracle_masked_weight(exact_leaf, soft, hard, block_size, beta=2.0, costs=costs)
    (exact_gradient,) = torch.autograd.grad(exact, exact_leaf, upstream.double())
    leaf, soft, hard, costs, upstream = to(target.device, weight, soft, hard, costs, upstream)
    leaf.requires_grad_()
    actual = F.masked_weight(leaf, soft, hard, block_size, beta=2.0, costs=costs, backend=target.backend)
    (gradient,) = torch.autograd.grad(actual, leaf, upstream)
    torch.testing.assert_close(actual.cpu().double(), exact, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.cpu().double(), exact_gradient, rtol=1e-5, atol=1e-5)


def test_empty_weights(target: Any) -> None:
    for shape in [(0, 4), (4, 0), (6, 8, 0)]:
        weight = torch.empty(shape, device=target.device, requires_grad=True)
        mask = torch.empty(shape, device=target.device)
        out = F.masked_weight(weight, mask, mask.bool(), beta=1.0, backend=target.backend)
        assert out.shape == shape
        assert torch.autograd.grad(out.sum(), weight)[0].shape == shape


# --------------------------------------------------------------------------------------------------- coupling


@pytest.mark.parametrize("block_size", [1, 8, (4, 16)], ids=str)
@pytest.mark.parametrize("beta", [0.5, 5.0])
def test_local_parts_and_coupling_make_the_exact_gradient(target: Any, block_size: Any, beta: float) -> None:
    """Two layers under one budget: local backward over micro-batches, then the two shared sums."""
    shapes = [(24, 20), (11, 37)]
    weights = [make_values("normal", s, seed=i, scale=0.3 + i, dtype=torch.float64) for i, s in enumerate(shapes)]
    costs = [ops.block_costs(s, block_size) for s in shapes]
    grids = [ops.block_grid(s, block_size) for s in shapes]
    row_costs = torch.cat([cost_tensor(c, torch.empty(g)).flatten() for c, g in zip(costs, grids, strict=True)])
    budget = 0.3 * float(row_costs.sum())
    upstreams = [
        [make_values("normal", s, seed=10 * j + i, dtype=torch.float64) for j in range(1, 4)]
        for i, s in enumerate(shapes)
    ]

    leaves = [w.clone().requires_grad_() for w in weights]
    row = torch.cat([oracle_block_sum(w.abs(), block_size).flatten() for w in leaves])
    soft_row = oracle_soft_topk(row, budget, row_costs, beta)
    hard_row = oracle_hard_topk(row.detach(), budget, row_costs)
    sizes = [torch.Size(g).numel() for g in grids]
    softs = [m.reshape(g) for m, g in zip(soft_row.split(sizes), grids, strict=True)]
    hards = [h.reshape(g) for h, g in zip(hard_row.split(sizes), grids, strict=True)]
    loss = sum(
        (leaf * oracle_expand_blocks(m, s, block_size) * sum(g)).sum()
        for leaf, m, s, g in zip(leaves, softs, shapes, upstreams, strict=True)
    )
    exact = torch.autograd.grad(loss, leaves)

    masks = [m.detach().to(target.device) for m in softs]
    params = [w.to(target.device).requires_grad_() for w in weights]
    device_costs = to(target.device, *costs)
    for batch in range(3):
        for p, m, h, a, g in zip(params, masks, hards, device_costs, upstreams, strict=True):
            out = F.masked_weight(p, m, h.to(target.device), block_size, beta=beta, costs=a, backend=target.backend)
            out.backward(g[batch].to(target.device))
    sums = sum(
        ops.masked_weight_coupling(p.grad, p, m, block_size, beta=beta, costs=a, backend=target.backend)
        for p, m, a in zip(params, masks, device_costs, strict=True)
    )
    assert sums.dtype == torch.float64 and sums.shape == (2,)
    r = sums[0] / sums[1]
    for p, m, expected in zip(params, masks, exact, strict=True):
        ops.masked_weight_correct_(p.grad, p, m, beta * r, block_size, backend=target.backend)
        torch.testing.assert_close(p.grad.cpu(), expected, rtol=1e-10, atol=1e-10)


@layouts
@dtypes
def test_coupling_and_correction(target: Any, shape: tuple[int, ...], block_size: Any, dtype: torch.dtype) -> None:
    weight, soft, _, costs, grad = layer(shape, block_size, dtype=dtype)
    m, a = soft.double(), cost_tensor(costs, soft)
    q = oracle_block_sum(grad.double() * weight.double(), block_size)
    v = oracle_block_sum(weight.abs(), block_size)
    terms = (1 - m) * q / (1 + 3.0 * (1 - m) * v / a)
    exact = torch.stack([terms.sum(), (a * m * (1 - m)).sum()])
    grad_d, weight_d, soft_d, costs_d = to(target.device, grad.clone(), weight, soft, costs)
    actual = ops.masked_weight_coupling(
        grad_d, weight_d, soft_d, block_size, beta=3.0, costs=costs_d, backend=target.backend
    ).cpu()
    # products G θ may be rounded to the weight's dtype before they are summed
    size = oracle_block_sum((grad.double() * weight.double()).abs(), block_size).sum()
    allowed = 4 * torch.finfo(dtype).eps * torch.stack([size, exact[1]])
    assert ((actual - exact).abs() <= allowed).all(), (actual, exact)

    ops.masked_weight_correct_(grad_d, weight_d, soft_d, 0.7, block_size, backend=target.backend)
    pull = oracle_expand_blocks(m * (1 - m), shape, block_size) * 0.7
    corrected = grad.double() - weight.double().sign() * pull
    assert_within_error_budget(
        grad_d.cpu(),
        corrected,
        corrected.to(dtype),
        floor=4 * torch.finfo(dtype).eps * (grad.double().abs() + pull),
    )


@pytest.mark.operators("masked_weight_backward_")
@layouts
@dtypes
@pytest.mark.parametrize("straight_through", [True, False])
def test_gradient_in_the_memory_of_its_input(
    target: Any, shape: tuple[int, ...], block_size: Any, dtype: torch.dtype, straight_through: bool
) -> None:
    """The gradient that gets memory of its own, with and without a soft mask, however the input is laid out."""
    weight, soft, hard, costs, grad = to(target.device, *layer(shape, block_size, dtype=dtype))
    costs = costs.to(dtype) if isinstance(costs, torch.Tensor) else torch.tensor(costs, device=target.device)
    beta = torch.tensor(3.0, dtype=torch.float64, device=target.device)
    for mask in (soft, None):
        rest = weight, mask, hard, beta, costs, *block_shape(block_size), straight_through, target.backend
        expected = torch.ops.spartan.masked_weight_backward(grad, *rest)
        for own in (grad.clone(), grad.transpose(0, -1).contiguous().transpose(0, -1)):
            torch.ops.spartan.masked_weight_backward_(own, *rest)
            torch.testing.assert_close(own, expected)


@pytest.mark.operators("add_block_signs_")
@layouts
@dtypes
def test_signs_are_added_by_blocks(target: Any, shape: tuple[int, ...], block_size: Any, dtype: torch.dtype) -> None:
    weight, soft, _, _, grad = layer(shape, block_size, dtype=dtype)
    pull = soft - 0.3
    grad_d, weight_d, pull_d = to(target.device, grad.clone(), weight, pull)
    torch.ops.spartan.add_block_signs_(grad_d, weight_d, pull_d, *block_shape(block_size), target.backend)
    exact = grad.double() + weight.double().sign() * oracle_expand_blocks(pull.double(), shape, block_size)
    assert_within_error_budget(
        grad_d.cpu(), exact, exact.to(dtype), floor=2 * torch.finfo(dtype).eps * (grad.double().abs() + 1)
    )
    assert torch.equal(grad_d.cpu()[weight == 0], grad[weight == 0])


def test_correction_takes_a_tensor_and_skips_zero_weights(target: Any) -> None:
    weight = torch.tensor([[0.0, -0.0, 2.0, -3.0]], device=target.device)
    grad, soft = torch.zeros_like(weight), torch.full_like(weight, 0.5)
    scale = torch.tensor(4.0, dtype=torch.float64, device=target.device)
    ops.masked_weight_correct_(grad, weight, soft, scale, backend=target.backend)
    assert grad.tolist() == [[0.0, 0.0, -1.0, 1.0]]


def test_same_bits_for_every_thread_count(target: Any, thread_count: None) -> None:
    if target.backend == "reference":
        pytest.skip("its sums are PyTorch's, whose order may depend on the thread count")
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        weight, soft, hard, costs, upstream = to(target.device, *layer((300, 500), (8, 4)))
        leaf = weight.requires_grad_()
        out = F.masked_weight(leaf, soft, hard, (8, 4), beta=2.0, costs=costs, backend=target.backend)
        (gradient,) = torch.autograd.grad(out, leaf, upstream)
        sums = ops.masked_weight_coupling(gradient, leaf, soft, (8, 4), beta=2.0, costs=costs, backend=target.backend)
        scores = ops.block_scores(leaf, (8, 4), backend=target.backend)
        results.append((out.detach(), gradient, sums, scores))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# -------------------------------------------------------------------------------------- torch.library, errors


@pytest.mark.parametrize("block_size", [1, (4, 8)], ids=str)
def test_opcheck(target: Any, block_size: Any) -> None:
    rows, columns = (block_size, block_size) if isinstance(block_size, int) else block_size
    weight, soft, hard, _, upstream = to(target.device, *layer((12, 16), block_size))
    beta, costs, scale = (torch.tensor(x, dtype=torch.float64, device=target.device) for x in (2.0, 32.0, 0.1))
    spartan_ops = torch.ops.spartan
    leaf = weight.clone().requires_grad_()
    torch.library.opcheck(
        spartan_ops.masked_weight_forward.default,
        (leaf, soft, hard, beta, costs, rows, columns, True, target.backend),
    )
    torch.library.opcheck(
        spartan_ops.masked_weight_backward.default,
        (upstream, weight, soft, hard, beta, costs, rows, columns, True, target.backend),
    )
    torch.library.opcheck(
        spartan_ops.masked_weight_coupling.default,
        (upstream, weight, soft, beta, costs, rows, columns, target.backend),
    )
    torch.library.opcheck(
        spartan_ops.masked_weight_correct_.default,
        (upstream, weight, soft, scale, beta, costs, rows, columns, target.backend),
    )
    torch.library.opcheck(spartan_ops.block_scores.default, (weight, rows, columns, target.backend))


def test_compiled_equals_eager_and_masks_do_not_recompile(target: Any) -> None:
    weight, soft, hard, _, _ = to(target.device, *layer((12, 16), (4, 8)))
    beta = torch.tensor(2.0, dtype=torch.float64, device=target.device)
    x = make_values("normal", (5, 16), seed=7, device=target.device)

    def step(w: Tensor, m: Tensor, h: Tensor, b: Tensor) -> Tensor:
        masked = F.masked_weight(w, m, h, (4, 8), beta=b, costs=32.0, backend=target.backend)
        return torch.nn.functional.linear(x, masked).relu()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    compilations = []
    for shift in (0.0, 0.1, 0.2):
        results = []
        for function in (step, compiled):
            leaf = weight.clone().requires_grad_()
            out = function(leaf, (soft + shift).clamp_max(1.0), hard, beta + shift)
            results.append((out.detach(), *torch.autograd.grad(out.sum(), leaf)))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


W = torch.ones(4, 6)
M = torch.full((4, 6), 0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "weight.*int64"),
        ({"soft": torch.ones(4, 5)}, ValueError, r"soft.*\(4, 6\).*\(4, 5\)"),
        ({"soft": torch.ones(4, 6, dtype=torch.bool)}, TypeError, "soft.*bool"),
        ({"hard": torch.ones(4, 6)}, TypeError, "hard.*bool.*float32"),
        ({"hard": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"hard.*\(4, 6\).*\(2, 2\)"),
        ({"block_size": 2}, ValueError, r"soft.*\(2, 3\).*\(4, 6\)"),
        ({"block_size": 0}, ValueError, "block_size.*0"),
        ({"block_size": (2, -1)}, ValueError, "block_size.*-1"),
        ({"block_size": (2, 2, 2)}, ValueError, r"block_size.*\(2, 2, 2\)"),
        ({"beta": torch.ones(3)}, ValueError, r"beta.*\(3,\)"),
        ({"costs": torch.ones(3)}, ValueError, r"costs.*\(4, 6\).*\(3,\)"),
        ({"backend": "magic"}, ValueError, "backend.*magic"),
    ],
    ids=lambda x: str(x).replace("\n", "")[:40] if isinstance(x, dict) else "",
)
def test_bad_input_is_named(target: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"weight": W, "soft": M, "hard": M > 0, "block_size": 1, "backend": target.backend, **arguments}
    with pytest.raises(error, match=f"(?is){message}"):
        ops.masked_weight(**call)


def test_coupling_and_correction_refuse_what_does_not_fit(target: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)grad.*\(4, 6\).*\(6, 4\)"):
        ops.masked_weight_coupling(W.T, W, M, beta=1.0, costs=1.0, backend=target.backend)
    with pytest.raises(ValueError, match=r"(?s)grad.*float32.*float64"):
        ops.masked_weight_correct_(W.double(), W, M, 0.1, backend=target.backend)
    with pytest.raises(ValueError, match=r"(?s)soft.*\(4, 6\).*\(4, 5\)"):
        ops.masked_weight_coupling(W, W, M[:, 1:], beta=1.0, costs=1.0, backend=target.backend)
    with pytest.raises(TypeError, match=r"(?s)weight.*int64"):
        ops.block_scores(torch.ones(3, 3, dtype=torch.int64), 2, backend=target.backend)
    with pytest.raises(ValueError, match=r"(?s)block_size.*two dimensions.*\(5,\)"):
        ops.block_grid((5,), 2)
    with pytest.raises(ValueError, match=r"(?s)grid.*\(2, 3\).*\(4, 6\)"):
        ops.expand_blocks(M, (4, 6), 2)
