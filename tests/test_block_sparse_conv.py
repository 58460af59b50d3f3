"""block_sparse_conv2d: value and gradients on every backend against float64 autograd of the dense convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_common import CASES as CONVOLUTIONS
from torch import Tensor
from torch.nn import functional

import spartan
from spartan import BlockSparseFilter
from spartan_kernels import ops
from spartan_kernels.testing import assert_within_error_budget, make_values

pytestmark = [
    pytest.mark.operators("block_sparse_conv2d_forward", "block_sparse_conv2d_backward"),
    pytest.mark.usefixtures("poisoned_memory", "convolutions_in_full_precision"),
]

CASES = [
    *CONVOLUTIONS,
    ((2, 3, 1, 1), (4, 3, 1, 5), (2, 2), {"padding": (0, 2)}),
    ((3, 64, 14, 14), (48, 64, 3, 3), (16, 16), {"padding": 1}),
]


def problem(
    image: tuple[int, ...], weight: tuple[int, ...], block: tuple[int, int], kept: float = 0.4, **kind: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight (dropped blocks are not zero), mask and bias."""
    block = (min(block[0], weight[0]), min(block[1], weight[1]))
    grid = ops.block_grid((weight[0], weight[1]), block) + weight[2:]
    return (
        make_values("normal", image, seed=1, **kind),
        make_values("normal", weight, seed=2, scale=0.3, **kind),
        make_values("uniform", grid, seed=3) < kept,
        make_values("normal", weight[:1], seed=4, **kind),
    )


def written_out(mask: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    rows = mask.repeat_interleave(min(block[0], weight.shape[0]), 0)[: weight.shape[0]]
    return rows.repeat_interleave(min(block[1], weight.shape[1]), 1)[:, : weight.shape[1]]


def compare(
    target: Any,
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    block: tuple[int, int],
    geometry: Any,
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    x, weight, mask, bias = operands
    keep = written_out(mask, weight, block)
    exact = [t.double().requires_grad_() for t in (x, weight * keep, bias)]
    y = functional.conv2d(*exact, **geometry)
    upstream = make_values("normal", tuple(y.shape), seed=5, dtype=x.dtype)
    dx, dweight, dbias = torch.autograd.grad(y, exact, upstream.double())
    of_values = BlockSparseFilter.from_dense(dweight * keep, block, mask).values

    packed = BlockSparseFilter.from_dense(weight.to(target.device), block, mask.to(target.device))
    leaf = x.to(target.device).contiguous(memory_format=layout).requires_grad_()
    shift, values = bias.to(target.device).requires_grad_(), packed.values.requires_grad_()
    got = spartan.block_sparse_conv2d(leaf, packed, shift, backend=target.backend, **geometry)
    grads = torch.autograd.grad(got, (leaf, values, shift), upstream.to(target.device))
    names = ("y", "grad x", "grad values", "grad bias")
    for name, ours, want in zip(names, (got, *grads), (y.detach(), dx, of_values, dbias), strict=True):
        assert ours.dtype == x.dtype and ours.shape == want.shape, name
        floor = 16 * torch.finfo(x.dtype).eps * (1 + float(want.abs().max())) if want.numel() else 0.0
        assert_within_error_budget(ours.detach().cpu(), want, want.to(x.dtype), floor=floor, name=name)
    assert got.is_contiguous(memory_format=layout) and grads[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("image", "weight", "block", "geometry"), CASES, ids=str)
def test_value_and_gradients(target: Any, image: Any, weight: Any, block: Any, geometry: Any) -> None:
    compare(target, problem(image, weight, block), block, geometry)


@pytest.mark.parametrize(("image", "weight", "block", "geometry"), CASES[:6], ids=str)
def test_channels_last(target: Any, image: Any, weight: Any, block: Any, geometry: Any) -> None:
    operands = problem(image, weight, block)
    compare(target, operands, block, geometry, torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("image", "weight", "block", "geometry"), CASES[:4], ids=str)
def test_half_precision(target: Any, image: Any, weight: Any, block: Any, geometry: Any, dtype: torch.dtype) -> None:
    compare(target, problem(image, weight, block, dtype=dtype), block, geometry)


@pytest.mark.parametrize("kept", [-1.0, 2.0], ids=["none", "all"])
def test_no_block_and_every_block(target: Any, kept: float) -> None:
    compare(target, problem((2, 5, 6, 6), (7, 5, 3, 3), (4, 2), kept), (4, 2), {"padding": 1})


@pytest.mark.parametrize("block", [(8, 8), (5, 3), (4, 1), (1, 1), (64, 64)])
def test_a_packed_filter_is_its_dense_weight(block: tuple[int, int]) -> None:
    _, weight, mask, _ = problem((1, 10, 3, 3), (13, 10, 3, 2), block)
    packed = BlockSparseFilter.from_dense(weight, block, mask)
    kept = weight * written_out(mask, weight, block)
    assert torch.equal(packed.to_dense(), kept) and torch.equal(packed.mask(), mask)
    assert packed.shape == (13, 10, 3, 2) and packed.density == int(mask.sum()) / mask.numel()
    assert torch.equal(BlockSparseFilter.from_dense(kept, block).to_dense(), kept)


def test_an_image_alone_is_convolved_without_a_batch(target: Any) -> None:
    x, weight, mask, bias = (t.to(target.device) for t in problem((2, 5, 6, 6), (7, 5, 3, 3), (4, 2)))
    packed = BlockSparseFilter.from_dense(weight, (4, 2), mask)
    y = spartan.block_sparse_conv2d(x, packed, bias, padding=1, backend=target.backend)
    torch.testing.assert_close(spartan.block_sparse_conv2d(x[1], packed, bias, padding=1, backend=target.backend), y[1])


def test_opcheck_and_one_compiled_graph() -> None:
    x, weight, mask, bias = problem((2, 6, 5, 4), (8, 6, 3, 2), (4, 2))
    packed = BlockSparseFilter.from_dense(weight, (4, 2), mask)
    index = (packed.matrix.layout.tensors(), packed.matrix.positions)
    geometry = [3, 2], [2, 1], [1, 0], [1, 1]
    values = packed.values.clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.spartan.block_sparse_conv2d_forward.default,
        (x.requires_grad_(), values, *index, bias, *geometry, 8, ""),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    grad = torch.randn(spartan.block_sparse_conv2d(x, packed, bias, (2, 1), (1, 0)).shape)
    torch.library.opcheck(
        torch.ops.spartan.block_sparse_conv2d_backward.default,
        (grad, x.detach(), packed.values, *index, *geometry, [True, True, False], ""),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(
        lambda x: spartan.block_sparse_conv2d(x, packed, bias, 1, 1).relu(), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), spartan.block_sparse_conv2d(x, packed, bias, 1, 1).relu())


def test_under_autocast_it_computes_as_a_convolution_does() -> None:
    x, weight, mask, bias = problem((2, 6, 5, 4), (8, 6, 3, 2), (4, 2))
    packed = BlockSparseFilter.from_dense(weight, (4, 2), mask)
    with torch.autocast("cpu", torch.bfloat16):
        y = spartan.block_sparse_conv2d(x, packed, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), torch.conv2d(x, packed.to_dense(), bias), rtol=0.05, atol=0.1)


def test_a_second_derivative_is_refused() -> None:
    x, weight, mask, bias = problem((1, 4, 3, 3), (4, 4, 2, 2), (2, 2))
    packed = BlockSparseFilter.from_dense(weight, 2, mask)
    (dx,) = torch.autograd.grad(
        spartan.block_sparse_conv2d(x.requires_grad_(), packed, bias).pow(2).sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"spartan\.block_sparse_conv2d is differentiable once"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(1, 5, 4, 4)}, ValueError, "x must have 4 channels"),
        ({"x": torch.ones(4, 4)}, ValueError, r"x must be \[batch, in, height, width\]"),
        ({"x": torch.ones(1, 4, 4, 4, dtype=torch.int32)}, TypeError, "x must be"),
        ({"x": torch.ones(1, 4, 4, 4).double()}, ValueError, "x must be torch.float32 on cpu, as the packed weight"),
        ({"x": torch.ones(1, 4, 1, 1)}, ValueError, "must fit into x"),
        ({"packed": torch.ones(4, 4, 2, 2)}, TypeError, "packed must be a BlockSparseFilter; got Tensor"),
        ({"bias": torch.ones(3)}, ValueError, "bias must"),
        ({"stride": 0}, ValueError, "stride must be an int of at least 1 or a pair of them; got 0"),
        ({"padding": (1, -1)}, ValueError, r"padding must be an int of at least 0 or a pair of them; got \(1, -1\)"),
        ({"dilation": (1, 1, 1)}, ValueError, "dilation must be an int of at least 1"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    packed = BlockSparseFilter.from_dense(torch.ones(4, 4, 2, 2), 2)
    with pytest.raises(error, match=message):
        spartan.block_sparse_conv2d(**{"x": torch.ones(1, 4, 4, 4), "packed": packed} | change)


def test_a_filter_that_does_not_fit_is_refused_by_name() -> None:
    weight = torch.ones(4, 4, 2, 2)
    with pytest.raises(ValueError, match=r"weight must be \[out, in, height, width\]; got \(4, 4\)"):
        BlockSparseFilter.from_dense(weight[:, :, 0, 0], 2)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 2, 2, 2\)"):
        BlockSparseFilter.from_dense(weight, 2, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="matrix must have 24 columns for 5 channels in blocks of 2"):
        BlockSparseFilter(BlockSparseFilter.from_dense(weight, 2).matrix, 5, (2, 2))
