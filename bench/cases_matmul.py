"""Products with a block-masked weight, over sparsity, block size and shape; for many tokens and for one.

Every call of ours builds the layout of its blocks from the gate: a mask that moves costs nothing more. The cases of
8192 tokens are for a GPU (`--device cuda --dtype bfloat16`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import spartan.functional as F
from bench.case import Peer, Settings, Work, case
from bench.checks import check_close
from bench.inputs import normal, rotating
from bench.peers import eager, matmul
from spartan_kernels import BlockSparseWeight, ops
from spartan_kernels.float8 import rounded_rows

_SHAPE = (768, 3072)  # the first layer of a transformer's MLP: in, out
_OTHER_SHAPES = ((3072, 768), (1024, 4096))
_TOKENS = 2048
_BLOCKS = (16, 32, 64)
_SPARSITIES = (0.0, 0.05, 0.5, 0.8, 0.9, 0.95)
_FEW_SPARSITIES = (0.5, 0.9, 0.95)
_QUICK = {(32, 0.5), (32, 0.9)}
_NARROW_BLOCKS = ((1, 1), (4, 1), (1, 16))  # single weights, and blocks of a few of them
_NARROW_SPARSITIES = (0.5, 0.65, 0.8, 0.9, 0.95, 0.98)
_NARROW_TOKENS = (1, 128, 2048)
_SECONDS = 0.8  # for each implementation: the table has 24 cases
_GPU_TOKENS = 8192
_GPU_SHAPES = ((4096, 4096), (4096, 16384))
_GPU_BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128))
_TALL_BLOCKS = ((128, 16), (128, 32))  # each element of x serves 128 outputs in the forward pass
_GPU_SPARSITIES = (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95)
_GPU_QUICK = {((32, 32), 0.9), ((128, 128), 0.8), ((128, 16), 0.9)}
_FEW = 64  # rows of each result that are compared with float64


def _gate(s: Settings, shape: tuple[int, int], block: tuple[int, int], sparsity: float) -> Tensor:
    """Positive at random blocks, zero at the others."""
    grid = (shape[1] // block[0], shape[0] // block[1])
    kept = round((1 - sparsity) * math.prod(grid))
    order = normal(grid, s, 2).flatten().argsort()
    gate = normal(grid, s, 3).sigmoid()
    gate.view(-1)[order[kept:]] = 0
    return gate


def _few(rows: int) -> slice:
    return slice(None, None, max(1, rows // _FEW))


def check_product(got: Tensor, left: Tensor, right: Tensor, exact_right: Tensor, name: str) -> None:
    """Compare rows of left @ right with float64, where `right` is `exact_right` rounded."""
    rows = _few(got.shape[0])
    exact = left[rows].double() @ exact_right
    # sums in another order may be off by a rounding of the largest result
    floor = 2 * torch.finfo(got.dtype).eps * exact.abs().max()
    check_close(got[rows], exact, left[rows] @ right, floor, name=name)


class Problem:
    """A layer's weight and gate, and what a pass through it takes."""

    def __init__(
        self, s: Settings, block: tuple[int, int], sparsity: float, shape: tuple[int, int] = _SHAPE, rows: int = 0
    ) -> None:
        self.s, self.block = s, block
        self.in_, self.out = shape
        self.rows = rows or (512 if s.quick else _TOKENS)
        self.gate = _gate(s, shape, block, sparsity)
        self.mask = self.gate != 0
        self.weight = normal((self.out, self.in_), s, 1, self.in_**-0.5)
        self.masked = self.weight * eager.expand(self.gate, block)
        self.exact = self.weight.double() * eager.expand(self.gate.double(), block)
        self.kept = int(self.mask.sum()) * math.prod(block)
        self.x_bytes, self.y_bytes, self.kept_bytes = (
            n * s.dtype.itemsize for n in (self.rows * self.in_, self.rows * self.out, self.kept)
        )

    def work(self, passes: int, **more: Any) -> Work:
        """A Work of one pass (forward) or three: forward, gradient of x, gradient of the kept weights."""
        sparsity = 1 - self.kept / (self.in_ * self.out)
        notes = {
            "rows": self.rows, "in": self.in_, "out": self.out, "block": self.block[0], "block columns": self.block[1],
            "sparsity": sparsity, "passes": passes,
        }  # fmt: skip
        nbytes = self.x_bytes + self.y_bytes + self.kept_bytes
        if passes == 3:
            # the backward passes read x, the kept weights and dy once, and write dx and the weights' gradient
            nbytes += 2 * self.x_bytes + 2 * self.kept_bytes + self.y_bytes
        return Work(
            bytes=nbytes,
            flops=passes * 2 * self.rows * self.kept,
            notes={name: float(value) for name, value in notes.items()},
            seconds=_SECONDS,
            **more,
        )

    def x(self, i: int) -> Tensor:
        """The i-th set of tokens."""
        return normal((self.rows, self.in_), self.s, 10 + i)

    def grad(self, i: int) -> Tensor:
        """The i-th upstream gradient."""
        return normal((self.rows, self.out), self.s, 1000 + i)

    def check_weight_gradient(self, dw: Tensor, x: Tensor, grad: Tensor) -> None:
        """By rows of the weight, each a column of grad; the gate multiplies at the end."""
        few, inputs = _few(self.out), x.detach()
        gate = eager.expand(self.gate, self.block)[few]
        exact = (grad.mT[few].double() @ inputs.double()) * gate.double()
        floor = 2 * torch.finfo(self.s.dtype).eps * exact.abs().max()
        check_close(dw[few], exact, (grad.mT[few] @ inputs) * gate, floor, name="gradient of the weight")


def _forward(p: Problem, only: tuple[str, ...] | None = None) -> Work:
    # one token rotates the weight through the cache, many rotate the tokens
    operands = rotating(p.s, p.x_bytes + p.y_bytes, lambda i: (p.x(i),)) if p.rows > 1 else [(p.x(0),)]
    return p.work(
        passes=1,
        ours=lambda x: ops.masked_linear(x, p.weight, p.gate, p.block, backend=p.s.backend),
        operands=operands,
        check=lambda y, x: check_product(y, x, p.masked.mT, p.exact.mT, "y"),
        peers=matmul.peers(p.masked, p.block, operands[0], only),
    )


def _forward_backward(p: Problem, only: tuple[str, ...] | None = None) -> Work:
    leaf = p.weight.clone().requires_grad_()

    def ours(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        y = F.masked_linear(x, leaf, p.gate, p.block, backward_mask=p.mask, backend=p.s.backend)
        return torch.autograd.grad(y, (x, leaf), grad)

    def check(gradients: tuple[Tensor, Tensor], x: Tensor, grad: Tensor) -> None:
        dx, dw = gradients
        check_product(dx, grad, p.masked, p.exact, "gradient of x")
        p.check_weight_gradient(dw, x, grad)

    operands = rotating(p.s, p.x_bytes + p.y_bytes, lambda i: (p.x(i).requires_grad_(), p.grad(i)))
    return p.work(
        passes=3, ours=ours, operands=operands, check=check, peers=matmul.peers(p.masked, p.block, operands[0], only)
    )


def _packed(p: Problem, only: tuple[str, ...] | None = None) -> Work:
    weight = BlockSparseWeight.from_dense(p.masked, p.block, p.mask)
    operands = rotating(p.s, p.x_bytes + p.y_bytes, lambda i: (p.x(i),)) if p.rows > 1 else [(p.x(0),)]
    return p.work(
        passes=1,
        ours=lambda x: ops.block_sparse_linear(x, weight, backend=p.s.backend),
        operands=operands,
        check=lambda y, x: check_product(y, x, p.masked.mT, p.exact.mT, "y"),
        peers=matmul.peers(p.masked, p.block, operands[0], only),
    )


def packed_float8(p: Problem, peers: dict[str, Peer | str], operands: Sequence[tuple[Tensor, ...]]) -> Work:
    """Packed blocks in 8 bits, checked against the product of the rounded numbers."""
    weight = BlockSparseWeight.from_dense(p.masked, p.block, p.mask).to_float8()
    exact = weight.to_dense().double()
    multiplied = exact.to(p.s.dtype)

    def check(y: Tensor, x: Tensor) -> None:
        rows, scales = rounded_rows(x[_few(x.shape[0])])
        numbers = rows.double() * scales.double()
        reference = numbers @ exact.mT
        # the tensor cores add products in 8 bits in fewer bits than float32
        floor = (2 * torch.finfo(y.dtype).eps + 2**-12) * reference.abs().max()
        check_close(y[_few(x.shape[0])], reference, numbers.to(p.s.dtype) @ multiplied.mT, floor, name="y")

    return p.work(
        passes=1,
        ours=lambda x: ops.block_sparse_linear(x, weight, backend=p.s.backend),
        operands=operands,
        check=check,
        peers=peers,
    )


def float8_peers(p: Problem, x: Tensor) -> dict[str, Peer | str]:
    """Dense products, in the dtype of x and in 8 bits, or why there is none."""
    found = matmul.peers(p.masked, p.block, (x,), ("dense", "dense float8"))
    found.setdefault("dense float8", "its products in 8 bits are those of a GPU")
    return found


def _float8(p: Problem) -> Work:
    operands = rotating(p.s, p.x_bytes + p.y_bytes, lambda i: (p.x(i),))
    return packed_float8(p, float8_peers(p, operands[0][0]), operands)


def _input_gradient(p: Problem) -> Work:
    def ours(x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    def build(i: int) -> tuple[Tensor, ...]:
        x = p.x(i).requires_grad_()
        return x, F.masked_linear(x, p.weight, p.gate, p.block, backend=p.s.backend), p.grad(i)

    return p.work(
        passes=1,
        ours=ours,
        operands=rotating(p.s, p.x_bytes + p.y_bytes, build),
        check=lambda dx, x, y, grad: check_product(dx, grad, p.masked, p.exact, "gradient of x"),
        peers={"dense": lambda x, y, grad: grad @ p.masked},
    )


def _weight_gradient(p: Problem) -> Work:
    leaf = p.weight.clone().requires_grad_()

    def ours(x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        return torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]

    def build(i: int) -> tuple[Tensor, ...]:
        x = p.x(i)
        y = F.masked_linear(x, leaf, p.gate, p.block, backward_mask=p.mask, backend=p.s.backend)
        return x, y, p.grad(i)

    return p.work(
        passes=1,
        ours=ours,
        operands=rotating(p.s, p.x_bytes + p.y_bytes, build),
        check=lambda dw, x, y, grad: p.check_weight_gradient(dw, x, grad),
        peers={"dense": lambda x, y, grad: grad.mT @ x},
    )


def _register(
    kind: str,
    build: Callable[..., Work],
    size: int | tuple[int, int],
    sparsity: float,
    shape: tuple[int, int] = _SHAPE,
    tokens: int = 0,
    quick: bool = False,
    gpu: bool = False,
    **more: Any,
) -> None:
    block = (size, size) if isinstance(size, int) else size
    side = str(block[0]) if block[0] == block[1] else f"{block[0]}x{block[1]}"
    where = "" if shape == _SHAPE else f"-{shape[0]}x{shape[1]}"
    name = f"{kind}{where}-block-{side}-sparsity-{sparsity:.0%}".rstrip("%")

    def builder(s: Settings) -> Work:
        return build(Problem(s, block, sparsity, shape, tokens), **more)

    what, blocks = kind.replace("-", " ").capitalize(), f"{block[0]} x {block[1]} blocks"
    builder.__doc__ = f"{what}, {sparsity:.0%} of the {blocks} of a {shape[1]} x {shape[0]} weight zero."
    case("masked_matmul", name, quick=quick, gpu=gpu)(builder)


for _size, _sparsity in itertools.product(_BLOCKS, _SPARSITIES):
    _quick = (_size, _sparsity) in _QUICK
    _register("forward", _forward, _size, _sparsity, quick=_quick)
    _register("forward-backward", _forward_backward, _size, _sparsity, quick=_quick)
for _size, _sparsity, _shape in itertools.product(_BLOCKS, _FEW_SPARSITIES, _OTHER_SHAPES):
    _register("forward", _forward, _size, _sparsity, _shape, only=("dense",))
for _size in _BLOCKS:
    _register("input-gradient", _input_gradient, _size, 0.9)
    _register("weight-gradient", _weight_gradient, _size, 0.9)
    for _shape in (_SHAPE, (4096, 4096)):
        _register("one-token", _forward, _size, 0.9, _shape, tokens=1, only=("dense", "torch BSR"))
for _block, _sparsity, _tokens in itertools.product(_NARROW_BLOCKS, _NARROW_SPARSITIES, _NARROW_TOKENS):
    _quick = (_block, _sparsity, _tokens) == ((1, 1), 0.9, 128)
    _register(
        f"packed-{_tokens}", _packed, _block, _sparsity, tokens=_tokens, quick=_quick, only=("dense", "torch CSR")
    )
for _block, _sparsity, _shape in itertools.product((*_GPU_BLOCKS, *_TALL_BLOCKS), _GPU_SPARSITIES, _GPU_SHAPES):
    _quick = _shape == _GPU_SHAPES[0] and (_block, _sparsity) in _GPU_QUICK
    _where: dict[str, Any] = {"shape": _shape, "tokens": _GPU_TOKENS, "quick": _quick, "gpu": True}
    _register("many-tokens-forward", _forward, _block, _sparsity, **_where)
    if _sparsity in (0.8, 0.9):
        _register("many-tokens-packed-float8", _float8, _block, _sparsity, **_where)
    if _block in _GPU_BLOCKS:
        _register("many-tokens-forward-backward", _forward_backward, _block, _sparsity, **_where)
