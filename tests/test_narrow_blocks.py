"""Products with single weights and blocks of a few rows: packed and masked, forward and backward, against float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import spartan
from spartan import BlockSparseWeight
from spartan_kernels.testing import assert_within_error_budget, make_values, oracle_block_sum, oracle_expand_blocks

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BLOCKS = [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (1, 2), (1, 16), (2, 3), (4, 8)]
TOKENS = [1, 8, 9, 150]  # one, a vector, one more, several tiles of them
SHAPE = (133, 71)


def masked(block: tuple[int, int], dtype: torch.dtype, density: float = 0.3) -> tuple[Tensor, Tensor]:
    """A weight, NaN where its block is dropped, and the mask of its blocks."""
    mask = make_values("uniform", tuple(-(-n // b) for n, b in zip(SHAPE, block, strict=True)), seed=3) < density
    weight = make_values("normal", SHAPE, seed=4, scale=SHAPE[1] ** -0.5, dtype=dtype)
    return torch.where(oracle_expand_blocks(mask, SHAPE, block), weight, torch.nan), mask


def compare(got: Tensor, want: Tensor, name: str, rounded: torch.dtype | None = None) -> None:
    """`rounded`: the dtype of what was multiplied, where that is not the result's."""
    dtype = rounded or got.dtype
    eps = 4e-7 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    floor = 10 * eps * (1 + float(want.detach().abs().max())) if want.numel() else 0.0
    assert_within_error_budget(got.cpu(), want, want.to(got.dtype), floor=floor, name=name)


@pytest.mark.operators("block_sparse_linear_forward", "block_sparse_linear_backward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_packed(target: Any, block: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    weight, mask = masked(block, dtype)
    packed = BlockSparseWeight.from_dense(weight.nan_to_num(0.0).to(target.device), block, mask.to(target.device))
    values = packed.values.clone().requires_grad_()
    x = make_values("normal", (tokens, SHAPE[1]), seed=5, dtype=dtype)
    upstream = make_values("normal", (tokens, SHAPE[0]), seed=6, dtype=dtype)
    bias = make_values("normal", SHAPE[:1], seed=7, dtype=dtype)
    leaf, shift = (t.to(target.device).requires_grad_() for t in (x, bias))
    own = dataclasses.replace(packed, values=values)
    y = spartan.block_sparse_linear(leaf, own, shift, "relu", backend=target.backend)
    grads = torch.autograd.grad(y, (leaf, values, shift), upstream.to(target.device))
    dense = weight.nan_to_num(0.0).double()
    z = x.double() @ dense.T + bias.double()
    compare(y.detach(), z.relu(), "y")
    dz = upstream.double() * (y.detach().cpu() > 0)
    compare(grads[0], dz @ dense, "gradient of x")
    of_weight = BlockSparseWeight.from_dense(dz.T @ x.double(), block, mask).values
    compare(grads[1], of_weight, "gradient of the values")
    compare(grads[2], dz.sum(0), "gradient of the bias")


@pytest.mark.operators("block_sparse_linear_forward")
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (1, 16)], ids=str)
def test_long_sums_are_as_accurate_as_a_dense_product(target: Any, block: tuple[int, int], tokens: int) -> None:
    weight = make_values("uniform", (8, 8192), seed=4)  # all positive: a sum, and its roundings, only grow
    mask = make_values("uniform", (8 // block[0], 8192 // block[1]), seed=3) < 0.5
    packed = BlockSparseWeight.from_dense(weight.to(target.device), block, mask.to(target.device))
    x = make_values("uniform", (tokens, 8192), seed=5)
    dense = weight * oracle_expand_blocks(mask, (8, 8192), block)
    y = spartan.block_sparse_linear(x.to(target.device), packed, backend=target.backend).cpu()
    exact = x.double() @ dense.double().T
    rounding = 2 * torch.finfo(torch.float32).eps * float(exact.abs().max())  # of sums in another order
    assert_within_error_budget(y, exact, x @ dense.T, floor=rounding, name="y")


@pytest.mark.operators("masked_linear_forward", "masked_linear_backward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_masked(target: Any, block: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    """Dropped blocks are NaN in memory: none of them may be read into the result."""
    weight, mask = masked(block, dtype)
    gate = torch.where(mask, make_values("uniform", mask.shape, seed=8) + 0.5, 0.0)
    x = make_values("normal", (tokens, SHAPE[1]), seed=5, dtype=dtype)
    upstream = make_values("normal", (tokens, SHAPE[0]), seed=6, dtype=dtype)
    leaves = [t.to(target.device).requires_grad_() for t in (x, weight, gate)]
    kept = mask.to(target.device)
    y = spartan.masked_linear(*leaves, block, None, None, kept, kept, backend=target.backend)
    of_x, of_weight, of_gate = torch.autograd.grad(y, leaves, upstream.to(target.device))
    wide = oracle_expand_blocks(gate.double(), SHAPE, block)
    theta = weight.nan_to_num(0.0).double()
    compare(y.detach(), x.double() @ (theta * wide).T, "y")
    compare(of_x, upstream.double() @ (theta * wide), "gradient of x")
    dense = torch.where(oracle_expand_blocks(mask, SHAPE, block), upstream.double().T @ x.double(), 0.0)
    compare(of_weight, dense * wide, "gradient of the weight")
    compare(of_gate, oracle_block_sum(dense * theta, block), "gradient of the gate", dtype)


@pytest.mark.operators("block_sparse_linear_forward")
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("block", [(1, 1), (4, 1)], ids=str)
def test_no_weight_and_every_weight(target: Any, block: tuple[int, int], density: float) -> None:
    weight, mask = masked(block, torch.float32, density)
    dense = weight.nan_to_num(0.0)
    packed = BlockSparseWeight.from_dense(dense.to(target.device), block, mask.to(target.device))
    x, bias = make_values("normal", (20, SHAPE[1]), seed=5), make_values("normal", SHAPE[:1], seed=7)
    y = spartan.block_sparse_linear(x.to(target.device), packed, bias.to(target.device), backend=target.backend)
    compare(y, x.double() @ dense.double().T + bias.double(), "y")
