"""Products with a block-masked weight on many tokens, each direction as one call that builds its layout from the gate.

The backward operators are called themselves: a gradient taken by autograd runs on the stream of its forward pass, which
a capture does not allow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.case import Peer, Settings, Work
from bench.cases_matmul import Problem, check_product, float8_peers, packed_float8
from bench.peers import matmul
from spartan_kernels import BlockLayout, BlockSparseWeight, ops
from spartan_kernels.float8 import rounded_rows
from spartan_kernels.operands import MaskedLinearBackward
from spartan_kernels.ops.masked_matmul import masked_linear_backward

BLOCKS = (32, 128, 64, 16)
_SHAPE, _SMALL_SHAPE = (4096, 4096), (128, 96)
_TOKENS, _FEW_TOKENS = 8192, 8
_PEERS = ("dense", "torch BSR", "torch BSR, Triton")


def _problem(s: Settings, block: int, sparsity: float, tokens: int = 0) -> Problem:
    tokens = (min(tokens, _FEW_TOKENS) or _FEW_TOKENS) if s.quick else tokens or _TOKENS
    return Problem(s, (block, block), sparsity, _SMALL_SHAPE if s.quick else _SHAPE, tokens)


def _copy(*moved: Tensor) -> Peer:
    """What everything that a product reads and writes takes to be copied: half of it read, half written."""
    half = sum(t.nbytes for t in moved) // 2
    source, target = (torch.empty(half, dtype=torch.int8, device=moved[0].device) for _ in range(2))
    return lambda *_: target.copy_(source)


def _work(p: Problem, ours: Callable[..., Tensor], operands: tuple[Tensor, ...], **more: Any) -> Work:
    return p.work(passes=1, ours=ours, operands=[operands], **more)


def forward(s: Settings, block: int, sparsity: float, tokens: int = 0) -> Work:
    """y = x (W of the active blocks)^T."""
    p = _problem(s, block, sparsity, tokens)
    x = p.x(0)
    return _work(
        p,
        lambda x: ops.masked_linear(x, p.weight, p.gate, p.block, backend=s.backend),
        (x,),
        check=lambda y, x: check_product(y, x, p.masked.mT, p.exact.mT, "y"),
        peers={
            **matmul.peers(p.masked, p.block, (x,), _PEERS),
            "copy": _copy(x, x.new_empty(p.rows, p.out), x.new_empty(p.kept)),
        },
    )


def single_weights(s: Settings, sparsity: float, tokens: int) -> Work:
    """y = x W^T of few tokens, W in packed single weights."""
    p = _problem(s, 1, sparsity, tokens)
    x, weight = p.x(0), BlockSparseWeight.from_dense(p.masked, p.block, p.mask)
    return _work(
        p,
        lambda x: ops.block_sparse_linear(x, weight, backend=s.backend),
        (x,),
        check=lambda y, x: check_product(y, x, p.masked.mT, p.exact.mT, "y"),
        peers={
            **matmul.peers(p.masked, p.block, (x,), ("dense",)),
            "copy": _copy(x, x.new_empty(p.rows, p.out), weight.values, weight.values),
        },
    )


def float8(s: Settings, block: int, sparsity: float) -> Work:
    """y = x W^T, W in packed blocks of 8 bits; beside the dense product in 8 bits, with x rounded in it and before."""
    p = _problem(s, block, sparsity)
    x = p.x(0)
    peers = float8_peers(p, x)
    if callable(peers["dense float8"]):
        rounded = rounded_rows(x), rounded_rows(p.masked)
        peers["dense float8, x rounded before"] = lambda x: matmul.scaled_product(*rounded, x.dtype)
    return packed_float8(p, peers, [(x,)])


def _backward(p: Problem, grad: Tensor, x: Tensor, needs: list[bool]) -> list[Tensor]:
    shape = (p.out, p.in_)
    index = BlockLayout.from_gate(p.gate, shape, p.block, backend=p.s.backend).tensors()
    saved, backend = x.new_empty(0), p.s.backend or ""
    operands = x, p.weight, p.gate, index, index, saved, "", *p.block, needs, -1.0, None
    found: list[Tensor] = masked_linear_backward(MaskedLinearBackward(grad, *operands, backend))
    return found


def input_gradient(s: Settings, block: int, sparsity: float) -> Work:
    """dx = dy (W of the active blocks)."""
    p = _problem(s, block, sparsity)
    grad, x = p.grad(0), p.x(0)
    return _work(
        p,
        lambda grad: _backward(p, grad, x, [True, False, False, False])[0],
        (grad,),
        check=lambda dx, grad: check_product(dx, grad, p.masked, p.exact, "gradient of x"),
        peers={"dense": lambda grad: grad @ p.masked, "copy": _copy(grad, x, x.new_empty(p.kept))},
    )


def weight_gradient(s: Settings, block: int, sparsity: float) -> Work:
    """dW = the active blocks of dy^T x, times the gate."""
    p = _problem(s, block, sparsity)
    grad, x = p.grad(0), p.x(0)
    return _work(
        p,
        lambda grad: _backward(p, grad, x, [False, True, False, False])[1],
        (grad,),
        check=lambda dw, grad: p.check_weight_gradient(dw, x, grad),
        peers={"dense": lambda grad: grad.mT @ x, "copy": _copy(grad, x, x.new_empty(p.kept))},
    )


DIRECTIONS: dict[str, Callable[..., Work]] = {"forward": forward, "dx": input_gradient, "dW": weight_gradient}
