"""masked_conv2d: value and gradients on every backend against float64 autograd of the definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conv_common import CASES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import spartan
from spartan_kernels import ops
from spartan_kernels.testing import (
    assert_within_error_budget,
    make_values,
    oracle_block_sum,
    oracle_expand_blocks,
)

pytestmark = [
    pytest.mark.operators("masked_conv2d_forward", "masked_conv2d_backward"),
    pytest.mark.usefixtures("poisoned_memory", "convolutions_in_full_precision"),
]


@pytest.fixture(autouse=True)
def small_problems_are_worth_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native backend makes weight gradients on the blocks of a backward mask, though here that saves nothing."""
    monkeypatch.setattr("spartan_kernels.backends.native.masked_conv.dense_convolution_wins", lambda *_: False)


NAMES = ("y", "grad x", "grad weight", "grad gate", "grad bias")


def problem(
    image: tuple[int, ...],
    weight: tuple[int, ...],
    block_size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    **geometry: Any,
) -> dict[str, Any]:
    """Operands with some gates zero, and masks that agree neither with them nor with each other."""
    grid = ops.block_grid((weight[0], weight[1]), block_size) + weight[2:]
    gate = make_values("uniform", grid, seed=3, dtype=dtype) + 0.2
    return {
        "x": make_values("normal", image, seed=1, dtype=dtype),
        "weight": make_values("normal", weight, seed=2, scale=0.3, dtype=dtype),
        "gate": torch.where(make_values("uniform", grid, seed=4) < 0.4, torch.zeros_like(gate), gate),
        "bias": make_values("normal", weight[:1], seed=5, dtype=dtype),
        "forward_mask": make_values("uniform", grid, seed=6) < 0.7,
        "backward_mask": make_values("uniform", grid, seed=7) < 0.7,
        "block_size": block_size,
        **geometry,
    }


def exact(p: dict[str, Any], upstream: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x, weight, gate, bias in float64, from the definition."""
    x, weight, gate = (p[name].detach().double() for name in ("x", "weight", "gate"))
    bias = None if p["bias"] is None else p["bias"].detach().double().requires_grad_()
    geometry = {k: p[k] for k in ("stride", "padding", "dilation", "groups") if k in p}
    size, shape = p["block_size"], weight.shape
    mask = torch.ones_like(gate) if p["forward_mask"] is None else p["forward_mask"].double()
    masked = weight * expand(gate * mask, shape, size)
    x.requires_grad_()
    masked.requires_grad_()
    y = functional.conv2d(x, masked, bias, **geometry)
    inputs = [x, masked] if bias is None else [x, masked, bias]
    grads = torch.autograd.grad(y, inputs, upstream.double())
    back = torch.ones_like(gate) if p["backward_mask"] is None else p["backward_mask"].double()
    g = grads[1] * expand(back, shape, size)
    sums = by_position(lambda part: oracle_block_sum(part, size), g * weight)
    return y.detach(), grads[0], g * expand(gate, shape, size), sums, *grads[2:]


def by_position(function: Any, tensor: Tensor) -> Tensor:
    """A function of matrices, at each kernel position."""
    height, width = tensor.shape[2:]
    rows = [torch.stack([function(tensor[:, :, i, j]) for j in range(width)], -1) for i in range(height)]
    return torch.stack(rows, -2)


def expand(grid: Tensor, shape: torch.Size, size: tuple[int, int]) -> Tensor:
    return by_position(lambda part: oracle_expand_blocks(part, shape[:2], size), grid)


def run(p: dict[str, Any], upstream: Tensor, target: Any) -> tuple[Tensor, ...]:
    moved = {k: v.detach().to(target.device) if isinstance(v, Tensor) else v for k, v in p.items()}
    leaves = [moved[name] for name in ("x", "weight", "gate", "bias") if moved[name] is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    y = spartan.masked_conv2d(**moved, backend=target.backend)
    grads = torch.autograd.grad(y, leaves, upstream.to(target.device))
    return tuple(t.detach().cpu() for t in (y, *grads))


def compare(p: dict[str, Any], target: Any, note: str = "") -> None:
    shape = functional.conv2d(
        p["x"], p["weight"], **{k: p[k] for k in ("stride", "padding", "dilation", "groups") if k in p}
    )
    upstream = make_values("normal", tuple(shape.shape), seed=8, dtype=p["x"].dtype)
    for name, got, want in zip(NAMES, run(p, upstream, target), exact(p, upstream), strict=False):
        assert got.dtype == p["x"].dtype
        # sums of products: their order is the kernel's own; the masked weight is rounded before it is multiplied
        floor = 16 * torch.finfo(got.dtype).eps * (1 + float(want.abs().max())) if want.numel() else 0.0
        assert_within_error_budget(got, want, want.to(got.dtype), floor=floor, name=f"{name} {note}")


@pytest.mark.parametrize(("image", "weight", "block_size", "geometry"), CASES, ids=str)
def test_value_and_gradients(
    target: Any, image: tuple[int, ...], weight: tuple[int, ...], block_size: tuple[int, int], geometry: Any
) -> None:
    base = problem(image, weight, block_size, **geometry)
    for missing in [(), ("bias",), ("forward_mask",), ("backward_mask",)]:
        compare({**base, **dict.fromkeys(missing)}, target, f"without {missing}")


@given(
    image=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)),
    out=st.integers(1, 20),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    block_size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_any_geometry(target: Any, image: Any, out: int, kernel: Any, block_size: Any, **geometry: Any) -> None:
    size = zip(image[2:], kernel, geometry["padding"], geometry["dilation"], strict=True)
    if any(side + 2 * p <= d * (k - 1) for side, k, p, d in size):
        return
    compare(problem(image, (out, image[1], *kernel), block_size, **geometry), target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(target: Any, dtype: torch.dtype) -> None:
    compare(problem((2, 24, 7, 7), (20, 24, 3, 3), (8, 8), dtype, padding=1), target)


def test_gradcheck_through_open_gates(target: Any) -> None:
    # with every gate open and no masks the straight-through gradient is the true one
    p = problem((2, 3, 5, 4), (4, 3, 2, 3), (2, 2), torch.float64)
    p["gate"] = p["gate"].abs() + 0.3
    leaves = [p[name].to(target.device).requires_grad_() for name in ("x", "weight", "gate", "bias")]

    def conv(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        return spartan.masked_conv2d(x, weight, gate, (2, 2), bias, stride=2, padding=1, backend=target.backend)

    assert torch.autograd.gradcheck(conv, leaves)


def test_no_block_and_blocks_that_are_not_a_number(target: Any) -> None:
    p = problem((2, 4, 5, 5), (6, 4, 3, 3), (2, 2), padding=1)
    empty = {**p, "gate": torch.zeros_like(p["gate"])}
    compare(empty, target)
    gate = p["gate"].clone()
    gate[1, 0, 1, 1] = torch.nan
    arguments = {**p, "gate": gate, "forward_mask": None}
    del arguments["backward_mask"]
    moved = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    y = spartan.masked_conv2d(**moved, backend=target.backend)
    assert y.isnan().any(-1).any(-1).any(0).tolist() == [False, False, True, True, False, False]


def test_a_closed_block_takes_no_part_whatever_its_weights(target: Any) -> None:
    p = problem((1, 4, 3, 3), (4, 4, 1, 1), (2, 2))
    closed = ((p["gate"] == 0) | ~p["forward_mask"]).double()
    p["weight"] = torch.where(expand(closed, p["weight"].shape, (2, 2)) > 0, torch.inf, p["weight"])
    moved = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in p.items()}
    assert spartan.masked_conv2d(**moved, backend=target.backend).isfinite().all()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4))[1:])
def test_only_the_gradients_asked_for(target: Any, needs: tuple[bool, ...]) -> None:
    p = problem((2, 4, 5, 5), (6, 4, 3, 3), (2, 2), padding=1)
    names = ("x", "weight", "gate", "bias")
    upstream = make_values("normal", (2, 6, 5, 5), seed=8)
    expected = dict(zip(names, exact(p, upstream)[1:], strict=True))
    moved = {k: v.detach().clone().to(target.device) if isinstance(v, Tensor) else v for k, v in p.items()}
    for name, need in zip(names, needs, strict=True):
        moved[name].requires_grad_(need)
    spartan.masked_conv2d(**moved, backend=target.backend).backward(upstream.to(target.device))
    for name, need in zip(names, needs, strict=True):
        assert (moved[name].grad is not None) == need
        if need:
            torch.testing.assert_close(moved[name].grad.cpu().double(), expected[name], rtol=1e-5, atol=2e-5)


def test_results_lie_in_memory_as_the_image_does(target: Any) -> None:
    p = problem((2, 8, 6, 6), (8, 8, 3, 3), (4, 4), padding=1)
    plain = run(p, make_values("normal", (2, 8, 6, 6), seed=8), target)
    p["x"] = p["x"].to(memory_format=torch.channels_last)
    last = run(p, make_values("normal", (2, 8, 6, 6), seed=8), target)
    point = problem((2, 8, 6, 6), (8, 8, 1, 1), (4, 4))
    point["x"] = point["x"].to(memory_format=torch.channels_last)
    compare(point, target, "where a channels-last image is read in place")
    for i in (0, 1):
        assert plain[i].is_contiguous()
        assert last[i].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(plain[i], last[i])
    single = p["x"][0].to(target.device)
    rest = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in p.items() if k != "x"}
    y = spartan.masked_conv2d(single, **rest, backend=target.backend)
    torch.testing.assert_close(y.cpu(), plain[0][0])


def test_opcheck_and_compile(target: Any) -> None:
    p = problem((2, 4, 5, 6), (6, 4, 3, 3), (2, 2))
    moved = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in p.items()}
    leaves = [moved[name].requires_grad_() for name in ("x", "weight", "gate", "bias")]
    masks, geometry = (moved["forward_mask"], moved["backward_mask"]), ([1, 2], [1, 0], [1, 1], 1, 2, 2)
    operands = (*leaves[:3], *masks, leaves[3], *geometry, target.backend)
    torch.library.opcheck(torch.ops.spartan.masked_conv2d_forward, operands)

    def loss(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        y = spartan.masked_conv2d(x, weight, gate, (2, 2), bias, (1, 2), (1, 0), backend=target.backend)
        return y.square().sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), eager, strict=True):
        torch.testing.assert_close(got, want)


def test_groups_and_dense_weights_are_pytorchs_own(target: Any) -> None:
    p = problem((2, 6, 5, 5), (4, 3, 3, 3), (2, 2), groups=2)
    if target.backend != "reference":
        with pytest.raises(ValueError, match=f"groups must be 1 for backend='{target.backend}'"):
            run(p, torch.ones(2, 4, 3, 3), target)
        return
    compare(p, target)
    auto = type(target)("auto", target.device)
    compare(p, auto)
    compare({**problem((2, 6, 5, 5), (4, 6, 3, 3), (2, 2)), "forward_mask": None}, auto)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("missing", [(), ("backward_mask",), ("forward_mask", "bias")], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_where_the_dense_gradient_is_the_faster_one(
    monkeypatch: pytest.MonkeyPatch, target: Any, dtype: torch.dtype, missing: tuple[str, ...], groups: int
) -> None:
    """The weight's gradient without the gate's, made densely and masked: by the native backend, and by the choice."""
    monkeypatch.setattr("spartan_kernels.backends.native.masked_conv.dense_convolution_wins", lambda *_: True)
    backend = target.backend if groups == 1 else "auto"
    p = {**problem((2, 6, 5, 5), (8, 6 // groups, 3, 3), (4, 2), dtype, padding=1), **dict.fromkeys(missing)}
    p["groups"] = groups
    upstream = make_values("normal", (2, 8, 5, 5), seed=8, dtype=dtype)
    _, dx, dweight, _, *dbias = exact(p, upstream)
    moved = {k: v.detach().to(target.device) if isinstance(v, Tensor) else v for k, v in p.items()}
    leaves = [moved[name].requires_grad_() for name in ("x", "weight", "bias") if moved[name] is not None]
    y = spartan.masked_conv2d(**moved, backend=backend)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for got, want in zip(
        torch.autograd.grad(y, leaves, upstream.to(target.device)), (dx, dweight, *dbias), strict=True
    ):
        torch.testing.assert_close(got.cpu().double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def test_bad_arguments() -> None:
    def conv(
        x: tuple[int, ...] = (1, 4, 5, 5), weight: tuple[int, ...] = (6, 4, 3, 3), gate: Any = None, **more: Any
    ) -> None:
        grid = torch.ones(3, 2, 3, 3) if gate is None else gate
        spartan.masked_conv2d(torch.ones(x), torch.ones(weight), grid, 2, **more)

    conv()
    for match, arguments in {
        r"x must be \[batch, in, height, width\].*got x \(4, 5\)": {"x": (4, 5)},
        r"x must have 4 channels.*got x \(1, 3, 5, 5\)": {"x": (1, 3, 5, 5)},
        r"gate must have shape \(3, 2, 3, 3\).*got \(3, 2\)": {"gate": torch.ones(3, 2)},
        r"stride must be an int of at least 1.*got 0": {"stride": 0},
        r"padding must be an int of at least 0.*got -1": {"padding": -1},
        r"dilation must be .*got \(1, 2, 3\)": {"dilation": (1, 2, 3)},
        r"groups must be a positive int that divides out = 6; got 4": {"groups": 4},
        r"must fit into x \(1, 4, 2, 5\)": {"x": (1, 4, 2, 5)},
        r"bias must be .*shape \(6,\)": {"bias": torch.ones(5)},
        r"forward_mask must have shape": {"forward_mask": torch.ones(3, 2, dtype=torch.bool)},
    }.items():
        with pytest.raises(ValueError, match=match):
            conv(**arguments)
    with pytest.raises(TypeError, match="gate must be a floating-point tensor"):
        conv(gate=torch.ones(3, 2, 3, 3, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"backward_mask must be a bool tensor; got dtype torch.float32"):
        conv(backward_mask=torch.ones(3, 2, 3, 3))
