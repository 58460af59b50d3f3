"""Products of few tokens with packed single weights, which have a kernel of their own in Triton."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import spartan
from spartan import BlockSparseWeight
from spartan_kernels.testing import assert_within_error_budget, make_values

pytestmark = [
    pytest.mark.operators("block_sparse_linear_forward"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def sparse(out: int, in_: int, density: float, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight and which of it is kept: a row of nothing, and one of all."""
    keep = make_values("uniform", (out, in_), seed=seed) < density
    keep[0], keep[out // 2] = False, True
    return make_values("normal", (out, in_), seed=seed + 1, scale=in_**-0.5, dtype=dtype), keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("out", "in_", "density", "tokens"),
    [
        pytest.param(5, 700, 0.6, 1, id="rows of some steps"),
        pytest.param(37, 90, 0.2, 3, id="short rows that share a program"),
        pytest.param(3, 1500, 0.9, 2, id="rows that warps share"),
        pytest.param(9, 33, 0.5, 16, id="several groups of tokens"),
        pytest.param(6, 40000, 0.001, 5, id="columns past two bytes"),
    ],
)
def test_value(target: Any, out: int, in_: int, density: float, tokens: int, dtype: torch.dtype) -> None:
    weight, keep = sparse(out, in_, density, out + tokens, dtype)
    x = make_values("normal", (tokens, in_ + 3), seed=7, dtype=dtype).to(target.device)[:, 2:-1]  # with gaps
    bias = make_values("normal", (out,), seed=8, dtype=dtype)
    packed = BlockSparseWeight.from_dense(weight.to(target.device), 1, keep.to(target.device))
    y = spartan.block_sparse_linear(x, packed, bias.to(target.device), "relu", backend=target.backend)
    kept = torch.where(keep, weight, 0.0)
    exact = functional.linear(x.cpu().double(), kept.double(), bias.double()).relu()
    floor = 16 * torch.finfo(dtype).eps * (1 + float(exact.abs().max()))
    assert_within_error_budget(y.cpu(), exact, exact.to(dtype), floor=floor)


@pytest.mark.parametrize("tokens", [1, 6])
def test_what_is_not_finite_reaches_what_keeps_it(target: Any, tokens: int) -> None:
    """A column that a row does not keep, and a weight of another row, change nothing."""
    if target.backend != "triton":
        pytest.skip("other backends may multiply what is not kept by zero")
    weight, keep = sparse(11, 300, 0.4, 3, torch.float32)
    x = make_values("normal", (tokens, 300), seed=4)
    x[:, 17], x[0, 18] = torch.inf, torch.nan
    keep[4, 20], weight[4, 20] = True, torch.nan
    kept = torch.where(keep, weight, 0.0)
    terms = torch.where(keep, x[:, None].double() * kept.double(), 0.0)
    packed = BlockSparseWeight.from_dense(weight.to(target.device), 1, keep.to(target.device))
    y = spartan.block_sparse_linear(x.to(target.device), packed, backend=target.backend)
    exact = terms.sum(-1)
    assert exact.isfinite().any() and not exact.isfinite().all()
    torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_columns_that_are_changed_in_place_are_read_anew(target: Any) -> None:
    weight, keep = sparse(6, 50, 0.5, 5, torch.float32)
    other = keep.roll(1, 1)  # as many in each row
    x = make_values("normal", (2, 50), seed=6)
    here = [t.to(target.device) for t in (weight, keep, other, x)]
    packed, after = (BlockSparseWeight.from_dense(here[0], 1, mask) for mask in here[1:3])
    spartan.block_sparse_linear(here[3], packed, backend=target.backend)
    packed.values.copy_(after.values)
    for ours, theirs in zip(packed.layout.tensors(), after.layout.tensors(), strict=True):
        ours.copy_(theirs)
    packed.positions.copy_(after.positions)
    y = spartan.block_sparse_linear(here[3], packed, backend=target.backend)
    exact = functional.linear(x.double(), torch.where(other, weight, 0.0).double())
    torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_another_stream_reads_the_copy_of_columns_once_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is captured on a stream of its own takes the copy of a warm-up, and asks for nothing."""
    module = importlib.import_module("spartan_kernels.backends.triton.single_weights")
    state = SimpleNamespace(stream=1, capturing=False, written=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)

    def copy() -> Any:
        return module._Copy(torch.zeros(2, dtype=torch.int16), 0, SimpleNamespace(query=lambda: state.written), 1)

    ours, captured = copy(), copy()
    assert ours.usable()
    state.stream = 2
    assert not ours.usable()
    state.written = True
    assert ours.usable()
    state.written, state.capturing = False, True
    assert ours.usable() and captured.usable()
