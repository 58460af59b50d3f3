"""Products with a block-sparse weight as PyTorch and other packages offer them: y = x W^T, W with whole blocks zero.

A builder packs W once, untimed, and returns a `Layer`; `peers` builds, runs and checks each on a few rows first, and
gives a line instead where one cannot run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.case import Peer
from spartan_kernels.float8 import rounded_rows

_STK_BLOCK = 128  # the block that STK's kernels are written for
_PROBE_ROWS = 128
_AGREEMENT = 3e-2  # of the largest entry: packages may multiply in lower precision; wrong blocks are off by far more
_AGREEMENT_OF_FLOAT8 = 1e-1  # each number of x is rounded by up to 1 / 16


class Missing(Exception):
    """Why a peer cannot take this problem."""


@dataclass(frozen=True)
class Layer:
    """A packed weight.

    Attributes:
        forward: x [M, in] -> y [M, out].
        parameter: the packed weight, which a gradient can be asked for; None where the package computes none.
        dense: the weight that `forward` multiplies by, where it is not the one given.
        agreement: how far off an entry may be, as a part of the largest.
    """

    forward: Callable[[Tensor], Tensor]
    parameter: Tensor | None
    dense: Tensor | None = None
    agreement: float = _AGREEMENT


Block = tuple[int, int]  # rows, columns
Builder = Callable[[Tensor, Block], Layer]  # weight [out, in]


def dense(weight: Tensor, block: Block) -> Layer:
    """Zeros multiplied like everything else: MKL or another BLAS on the CPU, cuBLAS on a GPU."""
    w = weight.clone()
    return Layer(lambda x: functional.linear(x, w), w)


def dense_float8(weight: Tensor, block: Block) -> Layer:
    """PyTorch's product in 8 bits, `torch._scaled_mm`: x is rounded by rows in every call, as ours rounds it."""
    if not weight.is_cuda:
        raise Missing("its products in 8 bits are those of a GPU")
    rows, scales = rounded_rows(weight)

    def forward(x: Tensor) -> Tensor:
        return scaled_product(rounded_rows(x), (rows, scales), x.dtype)

    return Layer(forward, None, (rows.float() * scales).to(weight.dtype), _AGREEMENT_OF_FLOAT8)


def scaled_product(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """x W^T of rows in 8 bits and their scales."""
    return torch._scaled_mm(x[0], weight[0].mT, x[1], weight[1].mT, out_dtype=dtype)


def _bsr(weight: Tensor, block: Block) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the layout is in beta
        return weight.to_sparse_bsr(block)


def torch_bsr(weight: Tensor, block: Block) -> Layer:
    """torch.sparse BSR: MKL on the CPU (several times the speed of `linear` with a BSR weight), cuSPARSE on a GPU."""
    packed = _bsr(weight, block)
    return Layer(lambda x: (packed @ x.mT).mT, packed)


def torch_csr(weight: Tensor, block: Block) -> Layer:
    """torch.sparse CSR: MKL on the CPU, cuSPARSE on a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the layout is in beta
        packed = weight.to_sparse_csr()
    return Layer(lambda x: (packed @ x.mT).mT, packed)


def torch_bsr_triton(weight: Tensor, block: Block) -> Layer:
    """PyTorch's own Triton kernel for BSR."""
    from torch.sparse import _triton_ops

    packed = _bsr(weight, block)

    def forward(x: Tensor) -> Tensor:
        out = x.new_empty(weight.shape[0], x.shape[0])
        return _triton_ops.bsr_dense_addmm(out, packed, x.mT, beta=0).mT

    return Layer(forward, None)


def torch_semi_structured(weight: Tensor, block: Block) -> Layer:
    """2:4 on the tensor cores: half the weights of every row, other ones than the blocks, at the same sparsity."""
    zeros = float((weight == 0).double().mean())
    if abs(zeros - 0.5) > 0.01:
        raise Missing(f"2:4 is a sparsity of 50%, this weight's is {zeros:.0%}")
    full = torch.randn_like(weight) * weight.std()
    groups = full.view(-1, 4)
    pruned = torch.zeros_like(groups).scatter(1, groups.abs().topk(2, 1).indices, 1.0).mul(groups).view_as(full)
    packed = torch.sparse.to_sparse_semi_structured(pruned)
    return Layer(lambda x: functional.linear(x, packed), None, pruned)


def scipy_bsr(weight: Tensor, block: Block) -> Layer:
    """SciPy BSR, on one thread."""
    from scipy import sparse

    packed = sparse.bsr_array(weight.numpy(), blocksize=block)
    return Layer(lambda x: torch.from_numpy(packed @ x.numpy().T).mT, None)


def gathered_bmm(weight: Tensor, block: Block) -> Layer:
    """Kept blocks times gathered column panels of x in one bmm, added up into the rows of blocks."""
    (out, in_), (height, width) = weight.shape, block
    blocks = weight.view(out // height, height, in_ // width, width).transpose(1, 2)
    rows, columns = (blocks != 0).any(-1).any(-1).nonzero(as_tuple=True)
    packed = blocks[rows, columns].clone()

    def forward(x: Tensor) -> Tensor:
        panels = x.view(-1, in_ // width, width).transpose(0, 1)[columns]
        y = x.new_zeros(out // height, x.shape[0], height)
        return y.index_add(0, rows, torch.bmm(panels, packed.mT)).transpose(0, 1).reshape(-1, out)

    return Layer(forward, packed)


def stk_dds(weight: Tensor, block: Block) -> Layer:
    """STK (the kernels of MegaBlocks)."""
    import stk

    if block != (_STK_BLOCK, _STK_BLOCK):
        raise Missing(f"STK's blocks are {_STK_BLOCK} x {_STK_BLOCK}")
    packed = stk.ops.to_sparse(weight.mT.contiguous(), _STK_BLOCK)
    return Layer(lambda x: stk.ops.dds(x, packed), packed.data)


def blksprs_matmul(weight: Tensor, block: Block) -> Layer:
    """The package blksprs; x enters and y leaves dense, as in a network."""
    import blksprs as bs

    size = block[0]
    if block != (size, size):
        raise Missing("its blocks are square")
    transposed = weight.mT.contiguous()[None]
    layout = bs.layouting.build_sparsity_layout(transposed, size)
    packed = bs.ops.to_sparse(transposed, layout, size)

    def forward(x: Tensor) -> Tensor:
        whole_x = bs.layouting.build_sparsity_layout_full(x[None], size)
        whole_y = torch.ones(1, x.shape[0] // size, weight.shape[0] // size, dtype=torch.bool, device=x.device)
        packed_x = bs.ops.to_sparse(x[None], whole_x, size)
        packed_y = bs.ops.matmul(packed_x, whole_x, packed, layout, whole_y, size)
        return bs.ops.to_dense(packed_y, whole_y, size)[0]

    return Layer(forward, packed)


CPU: dict[str, Builder] = {
    "dense": dense,
    "torch BSR": torch_bsr,
    "torch CSR": torch_csr,
    "SciPy BSR": scipy_bsr,
    "gathered bmm": gathered_bmm,
}
GPU: dict[str, Builder] = {
    "dense": dense,
    "dense float8": dense_float8,
    "torch BSR": torch_bsr,
    "torch CSR": torch_csr,
    "torch BSR, Triton": torch_bsr_triton,
    "torch 2:4": torch_semi_structured,
    "gathered bmm": gathered_bmm,
    "STK": stk_dds,
    "blksprs": blksprs_matmul,
}


def peers(
    weight: Tensor, size: int | Block, example: tuple[Tensor, ...], only: Sequence[str] | None = None
) -> dict[str, Peer | str]:
    """Every peer of the weight's device, or why it is missing.

    Args:
        weight: [out, in], blocks of `size` kept or zero.
        size: side of a square block, or its (rows, columns); it divides the weight.
        example: what the peers will be called with: x, or x and the gradient of y for forward and backward.
        only: names of the peers wanted; None for all.
    """
    builders, block = GPU if weight.is_cuda else CPU, (size, size) if isinstance(size, int) else size
    return {name: _ready(build, weight, block, example) for name, build in builders.items() if not only or name in only}


def _ready(build: Builder, weight: Tensor, block: Block, example: tuple[Tensor, ...]) -> Peer | str:
    few = tuple(t.detach()[:_PROBE_ROWS].requires_grad_(t.requires_grad) for t in example)
    try:
        layer = build(weight, block)
        run = _forward_backward(layer) if len(example) == 2 else layer.forward
        result = run(*few)
    except ImportError as error:
        return f"{error.name or error} is not installed"
    except Missing as reason:
        return str(reason)
    except Exception as error:
        # whatever a package dies of on this device, dtype or version is the line that the reader gets
        return f"{type(error).__name__}: {_first_line(error)}"
    multiplied = weight if layer.dense is None else layer.dense
    expected = few[1] @ multiplied if len(example) == 2 else functional.linear(few[0], multiplied)
    got = result[0] if isinstance(result, tuple) else result
    error = float((got - expected).abs().max() / expected.abs().max())
    return run if error <= layer.agreement else f"its result is wrong by {error:.0%} of the largest entry"


def _forward_backward(layer: Layer) -> Peer:
    if layer.parameter is None:
        raise Missing("it computes no gradients")
    parameter = layer.parameter.requires_grad_()

    def run(x: Tensor, grad: Tensor) -> tuple[Any, ...]:
        return torch.autograd.grad(layer.forward(x), (x, parameter), grad)

    return run


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["without a message"])[0][:120]
