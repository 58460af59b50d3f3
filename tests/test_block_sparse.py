"""block_sparse_linear: value and gradients on every backend, and the packed weight's conversions."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import spartan
from spartan import BlockSparseWeight
from spartan_kernels.testing import ACTIVATIONS, assert_within_error_budget, make_values, oracle_expand_blocks

pytestmark = [
    pytest.mark.operators("block_sparse_linear_forward", "block_sparse_linear_backward"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def sparse_weight(
    out: int, in_: int, block_size: tuple[int, int], density: float, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A weight that is zero outside its mask of blocks, and the mask."""
    grid = (-(-out // block_size[0]), -(-in_ // block_size[1]))
    mask = make_values("uniform", grid, seed=seed) < density
    weight = make_values("normal", (out, in_), seed=seed + 1, scale=in_**-0.5, dtype=dtype)
    return torch.where(oracle_expand_blocks(mask, (out, in_), block_size), weight, 0.0), mask


@given(
    tokens=st.lists(st.integers(0, 9), max_size=2),
    out=st.integers(1, 40),
    in_=st.integers(1, 40),
    block_size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_value_and_gradients(
    target: Any,
    tokens: list[int],
    out: int,
    in_: int,
    block_size: tuple[int, int],
    density: float,
    activation: str | None,
    dtype: torch.dtype,
    has_bias: bool,
    seed: int,
) -> None:
    weight, mask = sparse_weight(out, in_, block_size, density, seed, dtype)
    x = make_values("normal", (*tokens, in_), seed=seed + 2, dtype=dtype)
    bias = make_values("normal", (out,), seed=seed + 3, dtype=dtype) if has_bias else None
    upstream = make_values("normal", (*tokens, out), seed=seed + 4, dtype=dtype)

    wide = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = ACTIVATIONS[activation](functional.linear(*wide))
    exact = [y.detach(), *torch.autograd.grad(y, wide, upstream.double())]
    exact[2] = BlockSparseWeight.from_dense(exact[2], block_size, mask).values

    packed = BlockSparseWeight.from_dense(weight.to(target.device), block_size, mask.to(target.device))
    leaves = [t.to(target.device).requires_grad_() for t in (x, packed.values, bias) if t is not None]
    packed = BlockSparseWeight(leaves[1], packed.layout, packed.positions)
    ours = spartan.block_sparse_linear(leaves[0], packed, *leaves[2:], activation=activation, backend=target.backend)
    got = [ours, *torch.autograd.grad(ours, leaves, upstream.to(target.device))]
    for name, actual, want in zip(("y", "grad x", "grad values", "grad bias"), got, exact, strict=False):
        # half precision rounds dz as well, and float32 sums in another order
        floor = 16 * torch.finfo(dtype).eps * (1 + float(want.abs().max())) if want.numel() else 0.0
        assert_within_error_budget(actual.detach().cpu(), want, want.to(dtype), floor=floor, name=name)


def test_gradcheck_opcheck_and_compile(target: Any) -> None:
    weight, _ = sparse_weight(7, 9, (3, 4), 0.6, 0, torch.float64)
    packed = BlockSparseWeight.from_dense(weight.to(target.device), (3, 4))
    x = make_values("normal", (2, 9), seed=5, dtype=torch.float64, device=target.device).requires_grad_()
    bias = make_values("normal", (7,), seed=6, dtype=torch.float64, device=target.device).requires_grad_()

    def layer(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        w = BlockSparseWeight(values, packed.layout, packed.positions)
        return spartan.block_sparse_linear(x, w, bias, "gelu", backend=target.backend)

    leaves = (x, packed.values.clone().requires_grad_(), bias)
    single = tuple(t.detach().float().requires_grad_() for t in leaves)
    operator = torch.ops.spartan.block_sparse_linear_forward.default
    rest = (packed.layout.tensors(), packed.positions, single[2], "gelu", 7, True, target.backend)
    torch.library.opcheck(operator, (*single[:2], *rest))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(*single).sum(), single)
    for got, want in zip(torch.autograd.grad(compiled(*single).sum(), single), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"block_sparse_linear is differentiable once"):
        torch.autograd.grad(layer(*single).sum(), single[0], create_graph=True)[0].sum().backward()
    assert torch.autograd.gradcheck(layer, leaves)  # the last: not every backend has float64


@given(
    out=st.integers(1, 20),
    in_=st.integers(1, 20),
    block_size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_packing_is_exact(out: int, in_: int, block_size: tuple[int, int], density: float, seed: int) -> None:
    weight, mask = sparse_weight(out, in_, block_size, density, seed)
    packed = BlockSparseWeight.from_dense(weight, block_size)
    assert torch.equal(packed.to_dense(), weight)
    clipped = min(block_size[0], out), min(block_size[1], in_)  # a block reaches no further than the weight
    assert packed.shape == (out, in_) and packed.block_size == clipped
    assert packed.density == pytest.approx(float(mask.float().mean()))
    assert torch.equal(packed.layout.mask(), mask)
    # by columns: the same blocks
    order = packed.positions.long()
    assert torch.equal(packed.layout.column_indices[order], packed.layout.column_indices.sort(stable=True).values)
    kept = BlockSparseWeight.from_dense(weight, block_size, torch.ones_like(mask))
    assert kept.density == 1 and torch.equal(kept.to_dense(), weight)


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), density=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0))
def test_conversions(rows: int, columns: int, density: float, seed: int) -> None:
    weight, _ = sparse_weight(3 * rows, 2 * columns, (3, 2), density, seed % 2**31)
    packed = BlockSparseWeight.from_dense(weight, (3, 2))
    bsr, array = packed.to_bsr(), packed.to_scipy()
    assert torch.equal(bsr.to_dense(), weight) and torch.equal(torch.from_numpy(array.toarray()), weight)
    assert torch.equal(BlockSparseWeight.from_bsr(bsr).to_dense(), weight)
    assert torch.equal(BlockSparseWeight.from_scipy(array).to_dense(), weight)


def test_half_precision_to_scipy() -> None:
    weight = torch.eye(4).bfloat16()
    assert torch.equal(torch.from_numpy(BlockSparseWeight.from_dense(weight, 2).to_scipy().toarray()), weight.float())


def test_edges_are_zero() -> None:
    values = torch.ones(1, 4, 4)
    packed = BlockSparseWeight.from_blocks(values, torch.tensor([0, 1]), torch.tensor([0]), (3, 2))
    assert packed.values.sum() == 6 and torch.equal(packed.to_dense(), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BlockSparseWeight.from_dense(torch.ones(4), 2), ValueError, r"weight.*\(4,\)"),
        (lambda: BlockSparseWeight.from_dense(torch.ones(4, 4), 0), ValueError, "block_size.*0"),
        (lambda: BlockSparseWeight.from_dense(torch.ones(4, 4), 2, torch.ones(2, 2)), TypeError, "mask.*float32"),
        (lambda: BlockSparseWeight.from_dense(torch.ones(5, 4), 2).to_bsr(), ValueError, r"whole blocks.*\(5, 4\)"),
        (lambda: BlockSparseWeight.from_dense(torch.ones(5, 4), 2).to_scipy(), ValueError, r"whole blocks.*\(5, 4\)"),
        (lambda: BlockSparseWeight.from_bsr(torch.ones(4, 4)), TypeError, "sparse_bsr.*strided"),
        (lambda: BlockSparseWeight.from_scipy(scipy.sparse.csr_array((4, 4))), TypeError, "BSR.*csr_array"),
        (lambda: blocks([0, 2], [0, 0]), ValueError, "increase"),
        (lambda: blocks([0, 2], [1, 0]), ValueError, "increase"),
        (lambda: blocks([0, 2], [0, 5]), ValueError, r"\[0, 3\)"),
        (lambda: blocks([0, 1], [0, 1]), ValueError, "rise from 0 to 2"),
        (lambda: blocks([0, 1, 2], [0, 1]), ValueError, "2 entries"),
        (lambda: linear(torch.ones(3, 5)), ValueError, r"x.*4.*\(3, 5\)"),
        (lambda: linear(torch.ones(3, 4).double()), ValueError, "x.*float32.*float64"),
        (lambda: linear(torch.ones(3, 4).int()), TypeError, "x.*int32"),
        (lambda: linear(torch.ones(3, 4), bias=torch.ones(4)), ValueError, r"bias.*\(6,\).*\(4,\)"),
        (lambda: linear(torch.ones(3, 4), activation="swish"), ValueError, "activation.*relu.*swish"),
        (lambda: spartan.block_sparse_linear(torch.ones(3, 4), torch.ones(6, 4)), TypeError, "packed.*Tensor"),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?is){message}"):
        call()


def blocks(offsets: list[int], columns: list[int]) -> BlockSparseWeight:
    return BlockSparseWeight.from_blocks(torch.ones(2, 4, 4), torch.tensor(offsets), torch.tensor(columns), (4, 12))


def linear(x: Tensor, **rest: Any) -> Tensor:
    return spartan.block_sparse_linear(x, BlockSparseWeight.from_dense(torch.ones(6, 4), 2), **rest)
