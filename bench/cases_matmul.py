"""Products with a block-masked weight, over sparsity and block size.

The reference backend forms the masked weight and multiplies densely: with it, ours takes longer than `dense`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

import spartan.functional as F
from bench.case import Settings, Work, case
from bench.checks import check_close
from bench.inputs import normal, rotating
from bench.peers import eager, matmul
from spartan_kernels import ops

_IN, _OUT = 768, 3072  # the first layer of a transformer's MLP
_BLOCKS = (16, 32, 64)
_SPARSITIES = (0.5, 0.8, 0.9, 0.95)
_QUICK = {(32, 0.5), (32, 0.9)}
_SECONDS = 0.8  # for each implementation: the table has 24 cases
_FEW = 64  # rows of each result that are compared with float64


def _gate(s: Settings, size: int, sparsity: float) -> Tensor:
    """Positive at random blocks, zero at the others."""
    grid = (_OUT // size, _IN // size)
    kept = round((1 - sparsity) * math.prod(grid))
    order = normal(grid, s, 2).flatten().argsort()
    gate = normal(grid, s, 3).sigmoid()
    gate.view(-1)[order[kept:]] = 0
    return gate


def _few(rows: int) -> slice:
    return slice(None, None, rows // _FEW)


def _check_product(got: Tensor, left: Tensor, right: Tensor, exact_right: Tensor, name: str) -> None:
    """Compare rows of left @ right with float64, where `right` is `exact_right` rounded."""
    rows = _few(got.shape[0])
    exact = left[rows].double() @ exact_right
    # sums in another order may be off by a rounding of the largest result
    floor = 2 * torch.finfo(got.dtype).eps * exact.abs().max()
    check_close(got[rows], exact, left[rows] @ right, floor, name=name)


class _Problem:
    """A layer's weight and gate, and what a pass through it takes."""

    def __init__(self, s: Settings, size: int, sparsity: float) -> None:
        self.s, self.size = s, size
        self.rows = 512 if s.quick else 2048
        self.gate = _gate(s, size, sparsity)
        self.mask = self.gate != 0
        self.weight = normal((_OUT, _IN), s, 1, _IN**-0.5)
        self.masked = self.weight * eager.expand(self.gate, size)
        self.exact = self.weight.double() * eager.expand(self.gate.double(), size)
        self.kept = int(self.mask.sum()) * size**2
        self.x_bytes, self.y_bytes, self.kept_bytes = (
            n * s.dtype.itemsize for n in (self.rows * _IN, self.rows * _OUT, self.kept)
        )

    def work(self, passes: int, **more: Any) -> Work:
        """A Work of one pass (forward) or three: forward, gradient of x, gradient of the kept weights."""
        sparsity = 1 - self.kept / (_IN * _OUT)
        notes = {"rows": self.rows, "in": _IN, "out": _OUT, "block": self.size, "sparsity": sparsity, "passes": passes}
        nbytes = self.x_bytes + self.y_bytes + self.kept_bytes
        if (
            passes == 3
        ):  # the backward passes read x, the kept weights and dy once, and write dx and the weights' gradient
            nbytes += 2 * self.x_bytes + 2 * self.kept_bytes + self.y_bytes
        return Work(
            bytes=nbytes,
            flops=passes * 2 * self.rows * self.kept,
            notes={name: float(value) for name, value in notes.items()},
            seconds=_SECONDS,
            **more,
        )


def _forward(s: Settings, size: int, sparsity: float) -> Work:
    p = _Problem(s, size, sparsity)
    operands = rotating(s, p.x_bytes + p.y_bytes, lambda i: (normal((p.rows, _IN), s, 10 + i),))
    return p.work(
        passes=1,
        ours=lambda x: ops.masked_linear(x, p.weight, p.gate, size, backend=s.backend),
        operands=operands,
        check=lambda y, x: _check_product(y, x, p.masked.mT, p.exact.mT, "y"),
        peers=matmul.peers(p.masked, size, operands[0]),
    )


def _forward_backward(s: Settings, size: int, sparsity: float) -> Work:
    p = _Problem(s, size, sparsity)
    leaf = p.weight.clone().requires_grad_()

    def build(i: int) -> tuple[Tensor, Tensor]:
        return normal((p.rows, _IN), s, 10 + i).requires_grad_(), normal((p.rows, _OUT), s, 1000 + i)

    def ours(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        y = F.masked_linear(x, leaf, p.gate, size, backward_mask=p.mask, backend=s.backend)
        return torch.autograd.grad(y, (x, leaf), grad)

    def check(gradients: tuple[Tensor, Tensor], x: Tensor, grad: Tensor) -> None:
        dx, dw = gradients
        _check_product(dx, grad, p.masked, p.exact, "gradient of x")
        # by rows of the weight, each a column of grad; the gate multiplies at the end
        few, inputs = _few(_OUT), x.detach()
        gate = eager.expand(p.gate, size)[few]
        exact = (grad.mT[few].double() @ inputs.double()) * gate.double()
        floor = 2 * torch.finfo(s.dtype).eps * exact.abs().max()
        check_close(dw[few], exact, (grad.mT[few] @ inputs) * gate, floor, name="gradient of the weight")

    operands = rotating(s, p.x_bytes + p.y_bytes, build)
    return p.work(passes=3, ours=ours, operands=operands, check=check, peers=matmul.peers(p.masked, size, operands[0]))


def _register(size: int, sparsity: float) -> None:
    name, quick = f"block-{size}-sparsity-{sparsity:.0%}".rstrip("%"), (size, sparsity) in _QUICK
    what = f"{sparsity:.0%} of the {size} x {size} blocks of a {_OUT} x {_IN} weight zero"

    def forward(s: Settings) -> Work:
        return _forward(s, size, sparsity)

    def forward_backward(s: Settings) -> Work:
        return _forward_backward(s, size, sparsity)

    forward.__doc__, forward_backward.__doc__ = f"Forward, {what}.", f"Forward and backward, {what}."
    case("masked_matmul", f"forward-{name}", quick=quick)(forward)
    case("masked_matmul", f"forward-backward-{name}", quick=quick)(forward_backward)


for _size, _sparsity in itertools.product(_BLOCKS, _SPARSITIES):
    _register(_size, _sparsity)
