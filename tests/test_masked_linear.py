"""masked_linear: value and gradients on every backend against float64 autograd of the definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import spartan.functional as F
from spartan_kernels import BlockLayout, ops, tiles
from spartan_kernels.break_even import Crossing, using
from spartan_kernels.testing import (
    ACTIVATIONS,
    assert_within_error_budget,
    make_values,
    oracle_block_sum,
    oracle_expand_blocks,
)

pytestmark = [
    pytest.mark.operators("masked_linear_forward", "masked_linear_backward", "block_layout"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def problem(
    tokens: tuple[int, ...],
    out: int,
    in_: int,
    block_size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Operands with some gates zero, and masks that agree neither with them nor with each other."""
    grid = ops.block_grid((out, in_), block_size)
    gate = make_values("uniform", grid, seed=3, dtype=dtype) + 0.2
    return {
        "x": make_values("normal", (*tokens, in_), seed=1, dtype=dtype),
        "weight": make_values("normal", (out, in_), seed=2, scale=max(in_, 1) ** -0.5, dtype=dtype),
        "gate": torch.where(make_values("uniform", grid, seed=4) < 0.4, torch.zeros_like(gate), gate),
        "bias": make_values("normal", (out,), seed=5, dtype=dtype),
        "forward_mask": make_values("uniform", grid, seed=6) < 0.7,
        "backward_mask": make_values("uniform", grid, seed=7) < 0.7,
        "block_size": block_size,
    }


def exact(p: dict[str, Any], activation: str | None, upstream: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x, weight, gate, bias in float64, from the definition."""
    x, weight, gate = (p[name].double() for name in ("x", "weight", "gate"))
    bias = None if p["bias"] is None else p["bias"].double().requires_grad_()
    size, shape = p["block_size"], weight.shape
    x.requires_grad_()
    mask = torch.ones_like(gate) if p["forward_mask"] is None else p["forward_mask"].double()
    masked = weight * oracle_expand_blocks(gate * mask, shape, size)
    masked.requires_grad_()
    y = ACTIVATIONS[activation](functional.linear(x, masked, bias))
    inputs = [x, masked] if bias is None else [x, masked, bias]
    grads = torch.autograd.grad(y, inputs, upstream.double())
    back = torch.ones_like(gate) if p["backward_mask"] is None else p["backward_mask"].double()
    g = grads[1] * oracle_expand_blocks(back, shape, size)
    weight_grad = g * oracle_expand_blocks(gate, shape, size)
    return (y.detach(), grads[0], weight_grad, oracle_block_sum(g * weight, size), *grads[2:])


def run(p: dict[str, Any], activation: str | None, upstream: Tensor, target: Any) -> tuple[Tensor, ...]:
    moved = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in p.items()}
    leaves = [moved[name] for name in ("x", "weight", "gate", "bias") if moved[name] is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    y = F.masked_linear(**moved, activation=activation, backend=target.backend)
    grads = torch.autograd.grad(y, leaves, upstream.to(target.device))
    return tuple(t.detach().cpu() for t in (y, *grads))


NAMES = ("y", "grad x", "grad weight", "grad gate", "grad bias")
SHAPES = [
    ((5,), 64, 32, (32, 32)),
    ((2, 3), 37, 50, (16, 8)),
    ((), 10, 7, (4, 4)),
    ((1,), 1, 1, (32, 32)),
    ((0,), 6, 5, (2, 2)),
]


@pytest.mark.parametrize(("tokens", "out", "in_", "block_size"), SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_value_and_gradients(
    target: Any,
    tokens: tuple[int, ...],
    out: int,
    in_: int,
    block_size: tuple[int, int],
    activation: str | None,
) -> None:
    base = problem(tokens, out, in_, block_size)
    upstream = make_values("normal", (*tokens, out), seed=8)
    for missing in [(), ("bias",), ("forward_mask",), ("backward_mask",), ("forward_mask", "backward_mask")]:
        p = {**base, **dict.fromkeys(missing)}
        actual, expected = run(p, activation, upstream, target), exact(p, activation, upstream)
        for name, got, want in zip(NAMES, actual, expected, strict=False):
            # sums of products in float32: their order is the kernel's own
            floor = 4e-6 * (1 + float(want.detach().abs().max())) if want.numel() else 0.0
            assert_within_error_budget(got, want, want.float(), floor=floor, name=f"{name} without {missing}")


def check_many_tokens(target: Any, shape: tuple[int, int], block_size: tuple[int, int], contiguous: bool) -> None:
    """Weights of no active block are NaN here: nothing looks at them."""
    p = problem((2050,), *shape, block_size)
    p["backward_mask"] = p["forward_mask"] & (p["gate"] != 0)
    active = oracle_expand_blocks(p["backward_mask"], shape, block_size)
    upstream = make_values("normal", (2050, shape[0]), seed=8)
    expected = exact({**p, "weight": torch.where(active, p["weight"], 0.0)}, "relu", upstream)
    weight = torch.where(active, p["weight"], torch.nan)
    p["weight"] = weight if contiguous else functional.pad(weight, (3, 6), value=torch.nan)[:, 3:-6]
    for name, got, want in zip(NAMES, run(p, "relu", upstream, target), expected, strict=True):
        floor = 4e-6 * (1 + float(want.abs().max()))
        assert_within_error_budget(got, want, want.float(), floor=floor, name=name)


@pytest.mark.parametrize(("block_size", "contiguous"), [((16, 8), True), ((20, 3), False), ((64, 32), False)], ids=str)
def test_many_tokens(target: Any, block_size: tuple[int, int], contiguous: bool) -> None:
    """Weights may be multiplied by their gates first."""
    check_many_tokens(target, (70, 50), block_size, contiguous)


@pytest.mark.parametrize("block_size", [(8, 8), (16, 8)], ids=str)
def test_many_tokens_of_small_blocks(target: Any, block_size: tuple[int, int]) -> None:
    """Lines of blocks may share a program, with a tile that is wider than a block."""
    with tiles.using(tiles.Tile(16, 64, 32, 4)):
        check_many_tokens(target, (125, 70), block_size, False)


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("gate_grad", [True, False])
@pytest.mark.parametrize("whole", [None, 0.5])
def test_a_gate_that_follows_the_weight(target: Any, backward: bool, gate_grad: bool, whole: float | None) -> None:
    """The weight's gradient is then that of theta itself and that through the gate.

    Of every weight it is PyTorch's product, or that of all blocks where this was measured to be the faster (`whole`).
    """
    p = problem((6,), 37, 50, (16, 8))
    p["backward_mask"] = p["backward_mask"] if backward else None
    slope, upstream = make_values("normal", p["gate"].shape, seed=9), make_values("normal", (6, 37), seed=8)
    _, _, of_weight, of_gate, _ = exact(p, None, upstream)
    through = oracle_expand_blocks(slope.double() * of_gate, p["weight"].shape, (16, 8)) * p["weight"].double().sign()
    moved = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in p.items()}
    leaves = [moved["weight"].requires_grad_()] + ([moved["gate"].requires_grad_()] if gate_grad else [])
    with using(() if whole is None else (Crossing("float32", 16, 8, True, None, whole),)):
        y = F.masked_linear(**moved, slope=slope.to(target.device), backend=target.backend)
        got = torch.autograd.grad(y, leaves, upstream.to(target.device))
    torch.testing.assert_close(got[0].cpu().double(), of_weight + through, rtol=1e-5, atol=1e-5)
    if gate_grad:
        torch.testing.assert_close(got[1].cpu().double(), of_gate, rtol=1e-5, atol=1e-5)


def test_layouts_stand_in_for_masks(target: Any) -> None:
    p = problem((6,), 37, 50, (16, 8))
    moved = {k: v.to(target.device).requires_grad_(v.is_floating_point()) for k, v in p.items() if k != "block_size"}
    leaves = [moved[name] for name in ("x", "weight", "gate", "bias")]
    x, weight, gate, bias = leaves
    forward, backward = (
        BlockLayout.from_gate(g, (37, 50), (16, 8), mask, backend=target.backend)
        for g, mask in ((gate, moved["forward_mask"]), (moved["backward_mask"], None))
    )
    runs = []
    for blocks in (
        {"forward_mask": moved["forward_mask"], "backward_mask": moved["backward_mask"]},
        {"layout": forward, "backward_layout": backward},
    ):
        y = F.masked_linear(x, weight, gate, (16, 8), bias, "silu", **blocks, backend=target.backend)
        runs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_bfloat16(target: Any) -> None:
    p = problem((6,), 48, 64, (16, 16), torch.bfloat16)
    upstream = make_values("normal", (6, 48), seed=8, dtype=torch.bfloat16)
    actual, expected = run(p, "gelu", upstream, target), exact(p, "gelu", upstream)
    for name, got, want in zip(NAMES, actual, expected, strict=True):
        assert got.dtype == torch.bfloat16
        # the masked weight itself is rounded to bfloat16 before it is multiplied
        floor = 4 * torch.finfo(torch.bfloat16).eps * float(want.detach().abs().max())
        assert_within_error_budget(got, want, want.bfloat16(), floor=floor, name=name)


def test_gradcheck_through_open_gates(target: Any) -> None:
    # with every gate open and no masks the straight-through gradient is the true one
    p = problem((3,), 5, 6, (2, 3), torch.float64)
    p["gate"] = p["gate"].abs() + 0.3
    leaves = [p[name].to(target.device).requires_grad_() for name in ("x", "weight", "gate", "bias")]

    def linear(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        return F.masked_linear(x, weight, gate, (2, 3), bias, "silu", backend=target.backend)

    assert torch.autograd.gradcheck(linear, leaves)


def test_closed_gates_block_what_they_hide(target: Any) -> None:
    """A closed block takes no part in the value, whatever its weights, and its gate still has a gradient."""
    weight = torch.ones(4, 4, device=target.device)
    weight[:2, 2:] = 1e30
    gate = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=target.device, requires_grad=True)
    x = torch.ones(1, 4, device=target.device)
    y = F.masked_linear(x, weight, gate, (2, 2), backend=target.backend)
    assert y.tolist() == [[2.0, 2.0, 4.0, 4.0]]
    (gate_grad,) = torch.autograd.grad(y.sum(), gate)
    assert gate_grad[0, 1] == 4e30


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4))[1:])
def test_only_the_gradients_asked_for(target: Any, needs: tuple[bool, ...]) -> None:
    p = problem((3,), 8, 8, (4, 4))
    names = ("x", "weight", "gate", "bias")
    upstream = make_values("normal", (3, 8), seed=8)
    expected = dict(zip(names, exact(p, "relu", upstream)[1:], strict=True))
    moved = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in p.items()}
    for name, need in zip(names, needs, strict=True):
        moved[name].requires_grad_(need)
    F.masked_linear(**moved, activation="relu", backend=target.backend).backward(upstream.to(target.device))
    for name, need in zip(names, needs, strict=True):
        assert (moved[name].grad is not None) == need
        if need:
            torch.testing.assert_close(moved[name].grad.cpu().double(), expected[name], rtol=1e-5, atol=1e-5)


@given(
    tokens=st.integers(1, 9),
    out=st.integers(1, 40),
    in_=st.integers(1, 40),
    block_size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_any_shape(target: Any, tokens: int, out: int, in_: int, block_size: tuple[int, int]) -> None:
    p = problem((tokens,), out, in_, block_size)
    upstream = make_values("normal", (tokens, out), seed=8)
    for got, want in zip(run(p, None, upstream, target), exact(p, None, upstream), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


def test_one_token_of_rows_that_are_not_aligned(target: Any) -> None:
    """The rows of tokens past the last are at addresses that no copy may start from, not even of no bytes."""
    p = problem((1,), 18, 16, (8, 8))
    upstream = make_values("normal", (1, 18), seed=8)
    for got, want in zip(run(p, None, upstream, target), exact(p, None, upstream), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("out", "in_"), [(8, 0), (0, 8), (0, 0)])
def test_a_layer_without_features(target: Any, out: int, in_: int) -> None:
    p = problem((3,), out, in_, (4, 4))
    upstream = make_values("normal", (3, out), seed=8)
    y, *gradients = run(p, None, upstream, target)
    expected, *exact_gradients = exact(p, None, upstream)
    torch.testing.assert_close(y.double(), expected)
    for name, got, want in zip(("x", "weight", "gate", "bias"), gradients, exact_gradients, strict=True):
        assert got.shape == p[name].shape
        if name != "gate":  # the oracle's grid has at least one block each way
            torch.testing.assert_close(got.double(), want)


def test_non_contiguous_input(target: Any) -> None:
    p = problem((6,), 20, 12, (8, 4))
    upstream = make_values("normal", (6, 20), seed=8)
    strided = {k: v.mT.contiguous().mT if isinstance(v, Tensor) and v.ndim == 2 else v for k, v in p.items()}
    expected = exact(p, "relu", upstream)
    for got, want in zip(run(strided, "relu", upstream.mT.contiguous().mT, target), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_opcheck_and_compile(target: Any, activation: str | None) -> None:
    p = problem((4,), 10, 12, (4, 8))
    moved = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in p.items()}
    leaves = [moved[name].requires_grad_() for name in ("x", "weight", "gate", "bias")]
    masks = (moved["forward_mask"], moved["backward_mask"])
    layouts = [
        BlockLayout.from_gate(leaves[2], (10, 12), (4, 8), mask, backend=target.backend).tensors() for mask in masks
    ]
    rest = (leaves[3], activation or "", 4, 8, activation == "gelu", -1.0, None, target.backend)
    forward = torch.ops.spartan.masked_linear_forward.default
    torch.library.opcheck(forward, (*leaves[:3], *layouts, *rest))
    torch.library.opcheck(torch.ops.spartan.block_layout.default, (leaves[2].detach(), masks[0], target.backend))

    def step(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        return F.masked_linear(x, weight, gate, (4, 8), bias, activation, *masks, backend=target.backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(
        torch.autograd.grad(step(*leaves).sum(), leaves),
        torch.autograd.grad(compiled(*leaves).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-6)


def test_one_graph_serves_any_number_of_tokens(target: Any) -> None:
    p = problem((7,), 10, 12, (4, 8))
    weight, gate = (p[name].to(target.device).requires_grad_() for name in ("weight", "gate"))

    def step(x: Tensor) -> Tensor:
        return F.masked_linear(x, weight, gate, (4, 8), activation="gelu", backend=target.backend)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 3, 12):
        x = make_values("normal", (tokens, 12), seed=tokens, device=target.device)
        torch.testing.assert_close(compiled(x), step(x), rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_saved_state_is_what_the_gradients_need(target: Any, activation: str | None) -> None:
    """Beside x and the parameters: nothing without an activation, y for relu, z for the others; x only for them."""
    p = problem((64,), 48, 40, (8, 8))
    moved = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in p.items()}
    moved["x"].requires_grad_()

    def saved() -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        def keep(tensor: Tensor) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            F.masked_linear(**moved, activation=activation, backend=target.backend)
        return [s for s in shapes if len(s) == 2 and s[0] == 64]

    outputs = [] if activation is None else [(64, 48)]
    assert saved() == outputs
    moved["weight"].requires_grad_()
    assert sorted(saved()) == sorted([(64, 40), *outputs])


def test_a_layout_replaces_the_gates_zeros(target: Any) -> None:
    p = problem((5,), 20, 24, (4, 8))
    x, weight, gate, mask = (p[n].to(target.device) for n in ("x", "weight", "gate", "forward_mask"))
    layout = BlockLayout.from_gate(gate, (20, 24), (4, 8), mask, backend=target.backend)
    expected = ops.masked_linear(x, weight, gate, (4, 8), forward_mask=mask, backend=target.backend)
    got = ops.masked_linear(x, weight, gate, (4, 8), layout=layout, backend=target.backend)
    assert torch.equal(got, expected)
    nothing = BlockLayout.from_gate(torch.zeros_like(gate), (20, 24), (4, 8), backend=target.backend)
    assert not ops.masked_linear(x, weight, gate, (4, 8), layout=nothing, backend=target.backend).any()
    with pytest.raises(ValueError, match=r"forward_mask.*layout"):
        ops.masked_linear(x, weight, gate, (4, 8), forward_mask=mask, layout=layout, backend=target.backend)
    with pytest.raises(ValueError, match=r"backward_mask.*backward_layout"):
        ops.masked_linear(x, weight, gate, (4, 8), backward_mask=mask, backward_layout=layout, backend=target.backend)
    with pytest.raises(ValueError, match=r"layout.*\(4, 4\).*\(4, 8\)"):
        wide = torch.ones(5, 6, device=target.device)
        ops.masked_linear(x, weight, wide, (4, 4), layout=layout, backend=target.backend)


@pytest.mark.usefixtures("unchecked_operands")
@pytest.mark.parametrize("part", ["row_offsets", "column_indices", "column_offsets", "row_indices"])
@pytest.mark.parametrize("value", [-1, 10**6])
def test_an_index_that_was_written_over_is_refused(target: Any, part: str, value: int) -> None:
    """On the CPU, where it would be read from anywhere."""
    if target.backend != "native":
        pytest.skip("the others index tensors, which checks, or run on a GPU")
    layout = BlockLayout.from_gate(torch.ones(3, 4), (12, 16), (4, 4))
    getattr(layout, part)[1] = value
    x, weight = torch.randn(20, 16, requires_grad=True), torch.randn(12, 16, requires_grad=True)
    with pytest.raises(ValueError, match="layout must be the index of the weight's blocks"):
        y = F.masked_linear(x, weight, torch.ones(3, 4), 4, layout=layout, backward_layout=layout, backend="native")
        y.sum().backward()


def test_a_nan_gate_gives_nan_rows(target: Any) -> None:
    gate = torch.ones(3, 2, device=target.device)
    gate[1, 0] = torch.nan
    y = ops.masked_linear(
        torch.ones(4, 6, device=target.device),
        torch.ones(9, 6, device=target.device),
        gate,
        (3, 3),
        backend=target.backend,
    )
    assert y[:, 3:6].isnan().all() and (y[:, :3] == 6).all() and (y[:, 6:] == 6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_a_linear_layer(target: Any, dtype: torch.dtype) -> None:
    p = problem((5,), 20, 24, (4, 8))
    x, weight, gate, bias = (p[n].to(target.device) for n in ("x", "weight", "gate", "bias"))
    weight.requires_grad_()
    with torch.autocast(target.device, dtype=torch.bfloat16):
        y = F.masked_linear(x.to(dtype), weight, gate, (4, 8), bias, "relu", backend=target.backend)
    half = [t.bfloat16() for t in (x, weight, bias)]
    plain = F.masked_linear(half[0], half[1], gate, (4, 8), half[2], "relu", backend=target.backend)
    assert y.dtype == torch.bfloat16 and torch.equal(y, plain)
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_functional_transforms(target: Any, activation: str) -> None:
    p = problem((3, 5), 6, 8, (2, 4))
    x, weight, gate = (p[n].to(target.device) for n in ("x", "weight", "gate"))

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        y = F.masked_linear(x, weight, gate, (2, 4), activation=activation, backend=target.backend)
        return y.square().sum()

    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(x, weight)
    whole = torch.func.grad(lambda w: torch.func.vmap(loss, in_dims=(0, None))(x, w).sum())(weight)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(each[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(each[1].sum(0), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, expected[1], rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused(target: Any) -> None:
    p = problem((3,), 6, 8, (2, 4))
    x, weight, gate = (p[n].to(target.device).requires_grad_() for n in ("x", "weight", "gate"))
    y = F.masked_linear(x, weight, gate, (2, 4), backend=target.backend)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"masked_linear is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(3, 7)}, ValueError, r"x.*\(3, 7\).*weight.*\(8, 6\)"),
        ({"x": torch.ones(3, 6, dtype=torch.int32)}, TypeError, "x.*int32"),
        ({"x": torch.ones(3, 6, dtype=torch.float64)}, ValueError, "x.*float64.*float32"),
        ({"weight": torch.ones(8)}, ValueError, r"weight.*\(8,\)"),
        ({"gate": torch.ones(2, 2)}, ValueError, r"gate.*\(2, 3\).*\(2, 2\)"),
        ({"gate": torch.ones(2, 3, dtype=torch.bool)}, TypeError, "gate.*bool"),
        ({"bias": torch.ones(6)}, ValueError, r"bias.*\(8,\).*\(6,\)"),
        ({"activation": "swish"}, ValueError, "activation.*relu.*swish"),
        ({"forward_mask": torch.ones(2, 3)}, TypeError, "forward_mask.*float32"),
        (
            {"backward_mask": torch.ones(3, 3, dtype=torch.bool)},
            ValueError,
            r"backward_mask.*\(2, 3\).*\(3, 3\)",
        ),
        ({"slope": torch.ones(3, 2)}, ValueError, r"slope.*\(2, 3\).*\(3, 2\)"),
        ({"block_size": (4, 0)}, ValueError, "block_size.*0"),
        ({"backend": "magic"}, ValueError, "backend.*magic"),
    ],
    ids=lambda x: str(x).replace("\n", "")[:40] if isinstance(x, dict) else "",
)
def test_bad_input_is_named(target: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {
        "x": torch.ones(3, 6),
        "weight": torch.ones(8, 6),
        "gate": torch.ones(2, 3),
        "block_size": (4, 2),
        "backend": target.backend,
        **arguments,
    }
    with pytest.raises(error, match=f"(?is){message}"):
        ops.masked_linear(**call)
