"""`spartan bench`: the public operators on this machine, each checked in float64 and then timed beside PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spartan_kernels import BlockSparseWeight, ops
from spartan_kernels.devices import Device, device_of
from spartan_kernels.testing import (
    assert_within_error_budget,
    budget_error,
    oracle_expand_blocks,
    oracle_hard_topk,
    oracle_masked_weight,
)

__all__ = ["DTYPES", "Measured", "measure", "table"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BUDGET = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
_LEAST, _MOST = 5, 100
_CHECKED_ROWS = 64
_BLOCK = 32
_SPARSITY = 0.9


@dataclass(frozen=True)
class Problem:
    """An operator on one set of operands; `check` raises AssertionError on a wrong result."""

    name: str
    ours: Callable[[], Any]
    check: Callable[[Any], None]
    peers: dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Measured:
    """Seconds of ours and of each peer, or why ours is not timed."""

    name: str
    seconds: float = 0.0
    peers: dict[str, float] = field(default_factory=dict)
    wrong: str | None = None


def measure(
    device: str, dtype: torch.dtype = torch.float32, backend: str | None = None, quick: bool = False
) -> Iterator[Measured]:
    """Check and time every problem: medians of calls from an idle device, the host's part included.

    Args:
        device: "cpu" or "cuda".
        dtype: of values and weights.
        backend: "auto" or the name of a backend.
        quick: small operands, a few calls.

    Yields:
        What came of each, as it ends; a wrong result is not timed.
    """
    there, seconds = device_of(device), 0.05 if quick else 0.4
    for build in (_rows, _list, _hard, _masked_weight, _masked_linear, _packed):
        torch.manual_seed(0)
        problem = build(device, dtype, backend, quick)
        try:
            for _ in range(2):  # a second call must not depend on what the first left behind
                problem.check(problem.ours())
        except (AssertionError, RuntimeError) as error:
            yield Measured(problem.name, wrong=f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        peers = {name: _median(there, peer, seconds) for name, peer in problem.peers.items()}
        yield Measured(problem.name, _median(there, problem.ours, seconds), peers)


def _median(device: Device, call: Callable[[], Any], seconds: float) -> float:
    call()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < _LEAST or (len(times) < _MOST and time.perf_counter() < until):
        device.synchronize()
        times.append(device.elapsed(call))
    return statistics.median(times)


def table(found: list[Measured]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows: our time, then each peer's as a multiple of it."""
    rows: list[tuple[str, ...]] = []
    for one in found:
        others = ", ".join(f"{name} {seconds / one.seconds:.2f}x" for name, seconds in one.peers.items())
        rows.append((one.name, "wrong" if one.wrong else _time(one.seconds), one.wrong or others))
    return ("operator", "time", "peers take, as a multiple"), rows


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def _check_soft(budget: float, dim: int | None, mask: Tensor) -> None:
    error = budget_error(mask, budget, dim=dim)
    if not error <= _BUDGET[mask.dtype] or not bool(((mask >= 0) & (mask <= 1)).all()):
        raise AssertionError(f"the budget {budget:g} is missed by a relative {error:.2e}")


def _rows(device: str, dtype: torch.dtype, backend: str | None, quick: bool) -> Problem:
    rows, n = (64, 256) if quick else (4096, 1024)
    k, values = n // 16, torch.randn(rows, n, device=device, dtype=dtype)
    return Problem(
        f"soft_topk, {k} of each of {rows} x {n}",
        lambda: ops.soft_topk(values, k, beta=10.0, backend=backend),
        partial(_check_soft, float(k), -1),
        {"copy": values.clone, "torch.topk": lambda: values.topk(k, -1)},
    )


def _list(device: str, dtype: torch.dtype, backend: str | None, quick: bool) -> Problem:
    n = 100_000 if quick else 25_000_000 if device == "cuda" else 4_000_000
    values = [torch.randn(part, device=device, dtype=dtype) for part in (n // 2, n // 4, n - n // 2 - n // 4)]
    k = float(n // 10)
    return Problem(
        f"soft_topk_global, a tenth of {n:,} values",
        lambda: torch.cat(ops.soft_topk_global(values, k, beta=5.0, backend=backend)),
        partial(_check_soft, k, None),
        {"copy": lambda: torch.cat(values)},
    )


def _hard(device: str, dtype: torch.dtype, backend: str | None, quick: bool) -> Problem:
    rows, n = (64, 256) if quick else (4096, 1024)
    k, values = n // 16, torch.randn(rows, n, device=device, dtype=dtype)

    def check(mask: Tensor) -> None:
        if not torch.equal(mask, oracle_hard_topk(values, k)):
            raise AssertionError("the mask is not the hard top-k")

    return Problem(
        f"hard_topk, {k} of each of {rows} x {n}",
        lambda: ops.hard_topk(values, float(k), backend=backend),
        check,
        {"copy": values.clone, "torch.topk": lambda: values.topk(k, -1)},
    )


def _layer(device: str, dtype: torch.dtype, quick: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a weight, and a gate that is zero at nine of ten blocks."""
    side, tokens = (128, 32) if quick else (4096, 8192) if device == "cuda" else (1024, 1024)
    x, weight = (torch.randn(n, side, device=device, dtype=dtype) for n in (tokens, side))
    grid = torch.rand(side // _BLOCK, side // _BLOCK, device=device)
    gate = torch.where(grid > grid.quantile(_SPARSITY), 0.5 + 0.5 * grid, 0.0).to(dtype)
    return x, weight * side**-0.5, gate


def _masked_weight(device: str, dtype: torch.dtype, backend: str | None, quick: bool) -> Problem:
    _, weight, gate = _layer(device, dtype, quick)

    def check(out: Tensor) -> None:
        exact = oracle_masked_weight(weight, gate, None, _BLOCK)
        assert_within_error_budget(out, exact, exact.to(dtype), 0.0)

    return Problem(
        f"masked_weight, {_BLOCK} x {_BLOCK} blocks of {weight.shape[0]} x {weight.shape[1]}",
        lambda: ops.masked_weight(weight, gate, None, _BLOCK, backend=backend),
        check,
        {"copy": weight.clone},
    )


def _check_product(x: Tensor, weight: Tensor, gate: Tensor, y: Tensor) -> None:
    few, wide = x[:_CHECKED_ROWS], oracle_expand_blocks(gate.double(), weight.shape, _BLOCK)
    exact = few.double() @ (weight.double() * wide).mT
    plain = few @ (weight * wide.to(weight.dtype)).mT
    floor = 2 * torch.finfo(y.dtype).eps * exact.abs().max()  # of sums in another order
    assert_within_error_budget(y[:_CHECKED_ROWS], exact, plain, floor)


def _masked_linear(device: str, dtype: torch.dtype, backend: str | None, quick: bool) -> Problem:
    x, weight, gate = _layer(device, dtype, quick)
    return Problem(
        f"masked_linear, {len(x)} tokens, {weight.shape[0]} x {weight.shape[1]}, {_SPARSITY:.0%} zeros",
        lambda: ops.masked_linear(x, weight, gate, _BLOCK, backend=backend),
        partial(_check_product, x, weight, gate),
        {"dense": lambda: functional.linear(x, weight)},
    )


def _packed(device: str, dtype: torch.dtype, backend: str | None, quick: bool) -> Problem:
    x, weight, gate = _layer(device, dtype, quick)
    packed = BlockSparseWeight.from_dense(weight, _BLOCK, gate != 0)
    return Problem(
        f"block_sparse_linear, {len(x)} tokens, {weight.shape[0]} x {weight.shape[1]}, {_SPARSITY:.0%} zeros",
        lambda: ops.block_sparse_linear(x, packed, backend=backend),
        partial(_check_product, x, weight, (gate != 0).to(dtype)),
        {"dense": lambda: functional.linear(x, weight)},
    )
