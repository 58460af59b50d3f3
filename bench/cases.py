"""The registry: each case makes its operands and says what is minimal, right and comparable.

To add one: a function of `Settings` that returns a `Work`, under `@case(op, name)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import spartan.functional as F
from bench import cases_conv, cases_global, cases_matmul, cases_stack, layers, training
from bench.case import CASES, Peer, Settings, Work, case, select
from bench.checks import check_budget_mask, check_close
from bench.inputs import normal, rotating
from bench.peers import eager
from bench.peers import soft_topk as relaxations
from spartan_kernels import ops
from spartan_kernels.testing import (
    oracle_block_sum,
    oracle_hard_topk,
    oracle_masked_weight,
    oracle_soft_topk,
    plain_soft_topk,
    soft_topk_tolerance,
)

_SECONDS = 1.5  # for each implementation of the soft top-k by rows: there are many

__all__ = ["CASES", "cases_conv", "cases_global", "cases_matmul", "cases_stack", "layers", "select", "training"]


# ----------------------------------------------------------------------------------------- soft_topk, by rows


def _soft_rows(s: Settings, rows: int, n: int, k: float, beta: float) -> Work:
    return soft_rows(s, max(1, rows // 8) if s.quick else rows, n, k, beta)


def soft_rows(s: Settings, rows: int, n: int, k: float, beta: float, peers: Sequence[str] | None = None) -> Work:
    """A budget k for each of the rows; `peers` names those wanted, all of them by default."""
    nbytes = 2 * rows * n * s.dtype.itemsize
    operands = rotating(s, nbytes // 2, lambda i: (normal((rows, n), s, i),))

    def check(mask: Tensor, values: Tensor) -> None:
        few = slice(0, max(1, 24 * 1024 // n))  # the oracle bisects in float64: a part of the rows has to do
        v, m = values[few], mask[few]
        exact = oracle_soft_topk(v, k, None, beta)
        check_close(m, exact, plain_soft_topk(v, k, None, beta), soft_topk_tolerance(exact, v, k, None, beta))
        check_budget_mask(mask, k, dim=-1)

    others: dict[str, Peer | str] = {
        "copy": lambda v: v.clone(),
        "torch.topk (hard)": lambda v: v.topk(int(k), -1),
        "torch.sort (hard)": lambda v: v.sort(-1, descending=True),
        "torch.kthvalue (hard)": lambda v: eager.kthvalue_mask(v, int(k)),
    }
    if peers is None:
        others |= relaxations.peers(operands[0][0], k, beta)
    return Work(
        ours=lambda v: ops.soft_topk(v, k, beta=beta, backend=s.backend),
        operands=operands,
        check=check,
        bytes=nbytes,
        peers={name: peer for name, peer in others.items() if peers is None or name in peers},
        seconds=_SECONDS,
    )


def _soft_rows_with_gradient(s: Settings, rows: int, n: int, k: float, beta: float) -> Work:
    rows = max(1, rows // 8) if s.quick else rows
    nbytes = 5 * rows * n * s.dtype.itemsize  # values in, mask out; values and upstream in, gradient out

    def ours(values: Tensor, upstream: Tensor) -> Tensor:
        mask = F.soft_topk(values, k, beta=beta, backend=s.backend)
        return torch.autograd.grad(mask, values, upstream)[0]

    def check(gradient: Tensor, values: Tensor, upstream: Tensor) -> None:
        few = slice(0, max(1, 24 * 1024 // n))
        leaf = values[few].detach().double().requires_grad_()
        mask = oracle_soft_topk(leaf, k, None, beta)
        (exact,) = torch.autograd.grad(mask, leaf, upstream[few].double())
        plain = eager.soft_topk_gradient(upstream[few], mask.detach().to(s.dtype), beta)
        check_close(gradient[few], exact, plain, 1e-5 * exact.abs().amax())

    operands = rotating(
        s, nbytes // 5, lambda i: (normal((rows, n), s, i).requires_grad_(), normal((rows, n), s, 1000 + i))
    )
    return Work(
        ours=ours,
        operands=operands,
        check=check,
        bytes=nbytes,
        peers={
            "copy": lambda v, g: v.detach().clone(),
            "torch.topk (hard, forward)": lambda v, g: v.detach().topk(int(k), -1),
            **relaxations.peers(operands[0][0], k, beta, gradient=True),
        },
        seconds=_SECONDS,
    )


@case("soft_topk", "8192x4096", quick=False)
def soft_topk_long_rows(s: Settings) -> Work:
    """A tenth of each row, where sorting or selecting costs most."""
    return _soft_rows(s, 8192, 4096, 409.0, 10.0)


@case("soft_topk", "2:4-1000000x4")
def soft_topk_pattern(s: Settings) -> Work:
    """Two of every four."""
    return _soft_rows(s, 1_000_000, 4, 2.0, 10.0)


@case("soft_topk", "4096x1024")
def soft_topk_rows(s: Settings) -> Work:
    """Sparse-autoencoder sized rows."""
    return _soft_rows(s, 4096, 1024, 64.0, 10.0)


@case("soft_topk", "routing-65536x64")
def soft_topk_routing(s: Settings) -> Work:
    """Many short rows, as in expert routing."""
    return _soft_rows(s, 65536, 64, 8.0, 10.0)


def _soft_rows_backward(s: Settings, rows: int, n: int, k: float, beta: float) -> Work:
    rows = max(1, rows // 8) if s.quick else rows
    nbytes = 3 * rows * n * s.dtype.itemsize  # values and upstream in, gradient out

    def build(i: int) -> tuple[Any, ...]:
        values = normal((rows, n), s, i).requires_grad_()
        return values, F.soft_topk(values, k, beta=beta, backend=s.backend), normal((rows, n), s, 1000 + i)

    def check(gradient: Tensor, values: Tensor, mask: Tensor, upstream: Tensor) -> None:
        few = slice(0, 24)
        leaf = values[few].detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(oracle_soft_topk(leaf, k, None, beta), leaf, upstream[few].double())
        plain = eager.soft_topk_gradient(upstream[few], mask[few].detach(), beta)
        check_close(gradient[few], exact, plain, 1e-5 * exact.abs().amax())

    return Work(
        ours=lambda v, m, g: torch.autograd.grad(m, v, g, retain_graph=True)[0],
        operands=rotating(s, nbytes // 3, build),
        check=check,
        bytes=nbytes,
        peers={
            "copy": lambda v, m, g: g.clone(),
            "eager formula": lambda v, m, g: eager.soft_topk_gradient(g, m.detach(), beta),
        },
    )


@case("soft_topk_backward", "4096x1024")
def soft_topk_backward(s: Settings) -> Work:
    """Gradient for the values, from a finished forward pass."""
    return _soft_rows_backward(s, 4096, 1024, 64.0, 10.0)


@case("soft_topk_backward", "8192x4096", quick=False)
def soft_topk_backward_long_rows(s: Settings) -> Work:
    """The same for longer rows."""
    return _soft_rows_backward(s, 8192, 4096, 409.0, 10.0)


@case("soft_topk", "dictionary-256x131072", quick=False)
def soft_topk_dictionary(s: Settings) -> Work:
    """64 of the 131,072 features of a large sparse autoencoder."""
    return _soft_rows(s, 256, 131_072, 64.0, 10.0)


@case("soft_topk", "forward-backward-8192x4096", quick=False)
def soft_topk_long_rows_with_gradient(s: Settings) -> Work:
    """A tenth of each of 8192 rows of 4096, and its gradient."""
    return _soft_rows_with_gradient(s, 8192, 4096, 409.0, 10.0)


# -------------------------------------------------------------------------------------------------- hard_topk


def _hard(s: Settings, shape: tuple[int, ...], density: float) -> Work:
    k = int(shape[-1] * density)
    nbytes = math.prod(shape) * (s.dtype.itemsize + 1)

    def check(mask: Tensor, values: Tensor) -> None:
        assert torch.equal(mask, oracle_hard_topk(values, k)), "the mask is not the hard top-k"

    return Work(
        ours=lambda v: ops.hard_topk(v, float(k), backend=s.backend),
        operands=rotating(s, math.prod(shape) * s.dtype.itemsize, lambda i: (normal(shape, s, i),)),
        check=check,
        bytes=nbytes,
        peers={
            "copy": lambda v: v.clone(),
            "torch.topk": lambda v: eager.topk_mask(v, k),
            "torch.kthvalue": lambda v: eager.kthvalue_mask(v, k),
            "torch.sort": lambda v: eager.sort_mask(v, k),
        },
    )


@case("hard_topk", "one-row-4M")
def hard_topk_row(s: Settings) -> Work:
    """One budget over four million entries."""
    return _hard(s, (1 << 18 if s.quick else 1 << 22,), 0.1)


@case("hard_topk", "2:4-1000000x4")
def hard_topk_pattern(s: Settings) -> Work:
    """Two of every four."""
    return _hard(s, (125_000 if s.quick else 1_000_000, 4), 0.5)


@case("hard_topk", "4096x1024")
def hard_topk_rows(s: Settings) -> Work:
    """Budget for each row."""
    return _hard(s, (256 if s.quick else 4096, 1024), 0.0625)


@case("hard_topk", "indices-1024x4096")
def hard_topk_indices(s: Settings) -> Work:
    """Mask and indices of a twentieth of each row."""
    rows, n, k = 128 if s.quick else 1024, 4096, 205

    def check(found: tuple[Tensor, Tensor], values: Tensor) -> None:
        mask, indices = found
        assert torch.equal(mask, oracle_hard_topk(values, k)), "the mask is not the hard top-k"
        assert torch.equal(indices, mask.nonzero()[:, 1].view(rows, k)), "the indices are not those of the mask"

    return Work(
        ours=lambda v: ops.hard_topk(v, k, return_indices=True, backend=s.backend),
        operands=rotating(s, rows * n * s.dtype.itemsize, lambda i: (normal((rows, n), s, i),)),
        check=check,
        bytes=rows * (n * (s.dtype.itemsize + 1) + k * 8),
        peers={
            "torch.topk": lambda v: v.topk(k, -1, sorted=False).indices,
            "torch.topk, sorted": lambda v: v.topk(k, -1).indices,
            "hard_topk, nonzero": lambda v: ops.hard_topk(v, k, backend=s.backend).nonzero(),
        },
    )


# ---------------------------------------------------------------------------------------------- masked_weight


def _weight_operands(s: Settings, size: int) -> tuple[int, int, Sequence[tuple[Any, ...]]]:
    """Bytes of the weight, bytes of a forward pass, and sets of weight, soft mask, hard mask and gradient."""
    n = 1024 if s.quick else 3072
    grid = (n // size, n // size)

    def build(i: int) -> tuple[Any, ...]:
        soft = normal(grid, s, 3 * i + 1).sigmoid()
        return normal((n, n), s, 3 * i), soft, soft > 0.7, normal((n, n), s, 3 * i + 2)

    dense = n * n * s.dtype.itemsize
    masks = math.prod(grid) * (s.dtype.itemsize + 1)
    return dense, 2 * dense + masks, rotating(s, dense, build)


def _forward(s: Settings, size: int) -> Work:
    _, nbytes, operands = _weight_operands(s, size)

    def check(out: Tensor, weight: Tensor, soft: Tensor, hard: Tensor, grad: Tensor) -> None:
        exact = oracle_masked_weight(weight, soft, hard, size)
        check_close(out, exact, exact.to(s.dtype), 0.0)

    def plain(w: Tensor, m: Tensor, h: Tensor, g: Tensor) -> Tensor:
        if size == 1:
            return eager.masked_weight(w, m, h)
        return eager.masked_weight(w, eager.expand(m, size), eager.expand(h, size))

    return Work(
        ours=lambda w, m, h, g: ops.masked_weight(w, m, h, size, backend=s.backend),
        operands=operands,
        check=check,
        bytes=nbytes,
        peers={"copy": lambda w, m, h, g: w.clone(), "eager": plain},
    )


def _backward(s: Settings, size: int) -> Work:
    dense, nbytes, operands = _weight_operands(s, size)
    beta, costs = 20.0, float(size**2)

    def build(w: Tensor, m: Tensor, h: Tensor, g: Tensor) -> tuple[Any, ...]:
        leaf = w.requires_grad_()
        out = F.masked_weight(leaf, m, h, size, beta=beta, costs=costs, backend=s.backend)
        return leaf, m, out, g

    def check(gradient: Tensor, weight: Tensor, soft: Tensor, out: Tensor, upstream: Tensor) -> None:
        leaf = weight.detach().double().requires_grad_()
        exact_out = oracle_masked_weight(leaf, soft, None, size, beta=beta, costs=costs)
        (exact,) = torch.autograd.grad(exact_out, leaf, upstream.double())
        scale = oracle_block_sum((upstream.double() * weight.detach().double()).abs(), size).amax() / costs
        floor = 8 * torch.finfo(s.dtype).eps * (beta * scale + upstream.abs().amax())
        check_close(gradient, exact, exact.to(s.dtype), floor)

    def plain(w: Tensor, m: Tensor, out: Tensor, g: Tensor) -> Tensor:
        with torch.no_grad():
            if size == 1:
                return eager.masked_weight_gradient(g, w, m, beta)
            return eager.block_gradient(g, w, m, beta, size)

    return Work(
        ours=lambda w, m, out, g: torch.autograd.grad(out, w, g, retain_graph=True)[0],
        operands=[build(*o) for o in operands],
        check=check,
        bytes=nbytes + dense,
        peers={"copy": lambda w, m, out, g: g.clone(), "eager": plain},
    )


@case("masked_weight", "forward-block-1")
def masked_weight_forward(s: Settings) -> Work:
    """Unstructured."""
    return _forward(s, 1)


@case("masked_weight", "forward-block-16")
def masked_weight_forward_blocks(s: Settings) -> Work:
    """Square blocks."""
    return _forward(s, 16)


@case("masked_weight", "backward-block-1")
def masked_weight_backward(s: Settings) -> Work:
    """Unstructured."""
    return _backward(s, 1)


@case("masked_weight", "backward-block-16")
def masked_weight_backward_blocks(s: Settings) -> Work:
    """Square blocks."""
    return _backward(s, 16)
