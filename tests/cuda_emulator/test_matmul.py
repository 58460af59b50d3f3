"""The CUDA products on the emulator: every kernel that a shape, alignment or dtype can choose, against float64.

Run by tests/test_cuda_emulated.py, which builds the emulated extension and loads it with the plugin beside this file.
Asynchronous copies take place as late as they may there, and what they are to fill holds NaN until then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from spartan_kernels.backends.cuda.block_layout import block_layout
from spartan_kernels.backends.cuda.block_sparse import block_sparse_linear_backward, block_sparse_linear_forward
from spartan_kernels.backends.cuda.masked_matmul import (
    masked_linear_backward,
    masked_linear_forward,
    sampled_matmul_forward,
)
from spartan_kernels.layout import longest_first
from spartan_kernels.operands import (
    BlockLayoutOf,
    MaskedLinear,
    MaskedLinearBackward,
    PackedLinear,
    PackedLinearBackward,
    SampledMatmul,
)
from spartan_kernels.testing import make_values, oracle_block_sum, oracle_expand_blocks

pytestmark = pytest.mark.skipif(not os.environ.get("SPARTAN_EMULATED"), reason="needs the emulated CUDA extension")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS: dict[str, Any] = {
    "": lambda z: z,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}
# tokens, out, in, block: each width of a tile, several pieces of a block, a depth split between thread blocks, blocks
# of less than a chunk, edges in every dimension, nothing aligned
SHAPES = [
    (5, 96, 64, (32, 32)),
    (130, 64, 96, (16, 16)),
    (7, 200, 136, (128, 64)),
    (3, 72, 200, (64, 16)),
    (129, 40, 24, (8, 8)),
    (4, 160, 320, (160, 96)),
    (20, 33, 45, (5, 7)),
    (9, 50, 70, (33, 40)),
    (1, 24, 512, (8, 64)),
    (6, 8, 16, (4, 16)),
    (2, 1, 1, (3, 2)),
]


def close(actual: Tensor, expected: Tensor, terms: int, name: str) -> None:
    """Within the rounding of the result and of `terms` products of numbers about 1 that add up to about 1."""
    dtype = torch.float32 if actual.dtype == torch.float64 else actual.dtype
    scale = max(float(expected.abs().max()), 1e-3) if expected.numel() else 1.0
    error = (actual.double() - expected).abs().max() if expected.numel() else torch.tensor(0.0)
    assert actual.shape == expected.shape, name
    assert error <= (4 * torch.finfo(dtype).eps + terms * 1e-8) * scale, (name, error)


@pytest.fixture
def tf32() -> Iterator[None]:
    """PyTorch's switch, on."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def problem(out: int, in_: int, block: tuple[int, int], density: float, dtype: torch.dtype) -> dict[str, Tensor]:
    grid = (-(-out // block[0]), -(-in_ // block[1]))
    gate = make_values("uniform", grid, seed=3) + 0.5
    return {
        "weight": make_values("normal", (out, in_), seed=2).to(dtype),
        "gate": torch.where(make_values("uniform", grid, seed=4) < density, gate, 0.0),
        "bias": make_values("normal", (out,), seed=5).to(dtype),
    }


def masked(p: dict[str, Tensor], block: tuple[int, int]) -> Tensor:
    """theta * gate as it is multiplied: rounded to the dtype of theta."""
    weight = p["weight"]
    wide = oracle_expand_blocks(p["gate"], weight.shape, block)
    return (weight.float() * wide.float()).to(weight.dtype).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("grid_rows", "grid_columns"), [(1, 1), (3, 70), (40, 9)])
def test_layout(grid_rows: int, grid_columns: int, density: float, dtype: torch.dtype) -> None:
    gate = make_values("uniform", (grid_rows, grid_columns), seed=1) + 0.1
    gate = torch.where(make_values("uniform", gate.shape, seed=2) < density, gate, -0.0).to(dtype)
    gate[-1, -1] = torch.nan
    mask = make_values("uniform", gate.shape, seed=3) < 0.8
    for given in (None, mask):
        active = (gate != 0) if given is None else (gate != 0) & given
        found = block_layout(BlockLayoutOf(gate, given))
        for lines, (offsets, indices) in ((active, found[:2]), (active.mT, found[2:4])):
            expected = [line.nonzero().flatten() for line in lines]
            counts = torch.tensor([0, *(len(e) for e in expected)]).cumsum(0)
            assert offsets.tolist() == counts.tolist()
            flat = torch.cat(expected)
            assert indices.tolist() == flat.tolist() + [0] * (gate.numel() - len(flat))
        assert torch.equal(found[4], longest_first(found[0], found[2]))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_layout_of_nothing(shape: tuple[int, int]) -> None:
    row_offsets, column_indices, column_offsets, row_indices, order = block_layout(
        BlockLayoutOf(torch.ones(shape), None)
    )
    assert row_offsets.tolist() == [0] * (shape[0] + 1) and column_offsets.tolist() == [0] * (shape[1] + 1)
    assert column_indices.numel() == row_indices.numel() == 0
    assert order.tolist() == [*range(shape[0]), *range(shape[1])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "out", "in_", "block"), SHAPES, ids=str)
def test_masked_linear(tokens: int, out: int, in_: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    p = problem(out, in_, block, 0.6, dtype)
    x = make_values("normal", (tokens, in_), seed=1).to(dtype)
    grad = make_values("normal", (tokens, out), seed=8).to(dtype)
    layout, back = (
        list(block_layout(BlockLayoutOf(p["gate"], None))),
        make_values("uniform", p["gate"].shape, seed=9) < 0.5,
    )
    backward = list(block_layout(BlockLayoutOf(back, None)))
    w = masked(p, block)
    z = x.double() @ w.T + p["bias"].double()
    for activation in ACTIVATIONS:
        y, saved = masked_linear_forward(
            MaskedLinear(x, p["weight"], p["gate"], layout, [], p["bias"], activation, *block, True)
        )
        close(y, ACTIVATIONS[activation](z), in_, f"y after {activation}")
        close(saved, z, in_, f"z before {activation}")
    for each in ([], backward):
        dx, grad_weight, grad_gate, grad_bias = masked_linear_backward(
            MaskedLinearBackward(grad, x, p["weight"], p["gate"], layout, each, grad, "", *block, [True] * 4)
        )
        raw = grad.double().T @ x.double()
        raw *= oracle_expand_blocks(back.double(), raw.shape, block) if each else 1.0
        close(dx, grad.double() @ w, out, "grad x")
        close(grad_weight, raw * oracle_expand_blocks(p["gate"].double(), raw.shape, block), tokens, "grad weight")
        sums = oracle_block_sum(raw * p["weight"].double(), block)
        rounded = 4 * torch.finfo(dtype).eps * float(oracle_block_sum((raw * p["weight"].double()).abs(), block).max())
        assert (grad_gate.double() - sums).abs().max() <= rounded + 1e-6, "grad gate"
        close(grad_bias, grad.double().sum(0), tokens, "grad bias")


def rounded_to_tf32(x: Tensor) -> Tensor:
    """To the nearest number of 10 bits behind the point, halves away from zero."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


@pytest.mark.parametrize(("tokens", "out", "in_", "block"), SHAPES, ids=str)
@pytest.mark.usefixtures("tf32")
def test_products_of_tf32_are_those_of_rounded_numbers(tokens: int, out: int, in_: int, block: tuple[int, int]) -> None:
    """To float32's precision, so that no operand is cut off in place of being rounded, or rounded twice."""
    p = problem(out, in_, block, 0.6, torch.float32)
    x, grad = (make_values("normal", (tokens, n), seed=i) for n, i in ((in_, 1), (out, 8)))
    layout = list(block_layout(BlockLayoutOf(p["gate"], None)))
    w = rounded_to_tf32(masked(p, block))
    y, _ = masked_linear_forward(MaskedLinear(x, p["weight"], p["gate"], layout, [], p["bias"], "", *block, False))
    close(y, rounded_to_tf32(x) @ w.T + p["bias"].double(), in_, "y")
    dx, grad_weight, _, _ = masked_linear_backward(
        MaskedLinearBackward(grad, x, p["weight"], p["gate"], layout, layout, grad, "", *block, [True] * 4)
    )
    close(dx, rounded_to_tf32(grad) @ w, out, "grad x")
    raw = rounded_to_tf32(grad).T @ rounded_to_tf32(x)
    close(grad_weight, raw * oracle_expand_blocks(p["gate"].double(), raw.shape, block), tokens, "grad weight")
    special = x.clone()
    special[0, 0] = torch.nan
    special[-1, -1] = torch.inf
    y, _ = masked_linear_forward(MaskedLinear(special, p["weight"], p["gate"], layout, [], None, "", *block, False))
    active = oracle_expand_blocks((p["gate"] != 0).double(), (out, in_), block)
    assert torch.equal(y.isfinite(), (~special.isfinite()).double() @ active.T == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "out", "in_", "block"), SHAPES, ids=str)
def test_packed_blocks(tokens: int, out: int, in_: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    p = problem(out, in_, block, 0.5, dtype)
    x = make_values("normal", (tokens, in_), seed=1).to(dtype)
    grad = make_values("normal", (tokens, out), seed=8).to(dtype)
    rows, columns = block
    active = p["gate"] != 0
    padded = functional.pad(p["weight"], (0, -in_ % columns, 0, -out % rows))
    blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2)
    values, n = blocks[active], int(active.sum())
    layout = list(block_layout(BlockLayoutOf(active, None)))
    order = torch.full(active.shape, -1, dtype=torch.int32)
    order[active] = torch.arange(n, dtype=torch.int32)
    positions = order.T[active.T].contiguous()
    layout = [layout[0], layout[1][:n], layout[2], layout[3][:n], layout[4]]
    w = p["weight"].double() * oracle_expand_blocks(active.double(), (out, in_), block)
    y, _ = block_sparse_linear_forward(PackedLinear(x, values, layout, positions, p["bias"], "", out, False))
    close(y, x.double() @ w.T + p["bias"].double(), in_, "y")
    dx, grad_values, grad_bias = block_sparse_linear_backward(
        PackedLinearBackward(grad, x, values, layout, positions, grad, "", [True] * 3)
    )
    close(dx, grad.double() @ w, out, "grad x")
    raw = functional.pad(grad.double().T @ x.double(), (0, -in_ % columns, 0, -out % rows))
    expected = raw.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2)[active]
    close(grad_values, expected, tokens, "grad values")
    close(grad_bias, grad.double().sum(0), tokens, "grad bias")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_matmul(dtype: torch.dtype) -> None:
    for m, k, n, block in ((48, 70, 64, (16, 32)), (33, 5, 41, (8, 7)), (64, 0, 64, (32, 32))):
        a, b = make_values("normal", (m, k), seed=1).to(dtype), make_values("normal", (k, n), seed=2).to(dtype)
        active = make_values("uniform", (-(-m // block[0]), -(-n // block[1])), seed=3) < 0.5
        found = sampled_matmul_forward(SampledMatmul(a, b, list(block_layout(BlockLayoutOf(active, None))), *block))
        close(found, a.double() @ b.double() * oracle_expand_blocks(active.double(), (m, n), block), k, "a b")


@pytest.mark.parametrize("block", [(16, 16), (5, 6)])
def test_hidden_blocks_are_never_read_and_nan_gates_are_never_skipped(block: tuple[int, int]) -> None:
    p = problem(40, 48, block, 0.5, torch.bfloat16)
    x, grad = torch.ones(3, 48, dtype=torch.bfloat16), torch.ones(3, 40, dtype=torch.bfloat16)
    hidden = oracle_expand_blocks((p["gate"] == 0).double(), (40, 48), block) != 0
    expected = masked(p, block)
    p["weight"][hidden] = torch.nan
    layout = list(block_layout(BlockLayoutOf(p["gate"], None)))
    y, _ = masked_linear_forward(MaskedLinear(x, p["weight"], p["gate"], layout, [], None, "", *block, False))
    close(y, x.double() @ expected.T, 48, "y")
    dx = masked_linear_backward(
        MaskedLinearBackward(grad, x, p["weight"], p["gate"], layout, [], grad, "", *block, [True, False, False, False])
    )[0]
    close(dx, grad.double() @ expected, 40, "grad x")
    p["gate"][1, 0] = torch.nan
    layout = list(block_layout(BlockLayoutOf(p["gate"], None)))
    ones = torch.ones_like(p["weight"])
    y, _ = masked_linear_forward(MaskedLinear(x, ones, p["gate"], layout, [], None, "relu", *block, False))
    rows = torch.arange(40) // block[0] == 1
    assert y[:, rows].isnan().all() and not y[:, ~rows].isnan().any()


def test_strided_operands_and_no_tokens() -> None:
    p = problem(32, 64, (16, 16), 0.5, torch.float32)
    layout = list(block_layout(BlockLayoutOf(p["gate"], None)))
    wide = make_values("normal", (6, 5, 80), seed=1)
    weight = functional.pad(p["weight"], (3, 6))[:, 3:67]
    for x in (wide[..., :64], wide[::2, :, 8:72], wide.transpose(0, 1)[..., 1:65], wide[:0, :, :64]):
        y, _ = masked_linear_forward(MaskedLinear(x, weight, p["gate"], layout, [], p["bias"], "", 16, 16, False))
        close(y, x.double() @ masked(p, (16, 16)).T + p["bias"].double(), 64, "y")
        dx, grad_weight, _, _ = masked_linear_backward(
            MaskedLinearBackward(y, x, weight, p["gate"], layout, layout, y, "", 16, 16, [True] * 4)
        )
        assert dx.shape == x.shape and not dx.isnan().any() and not grad_weight.isnan().any()
