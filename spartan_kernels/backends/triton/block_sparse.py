"""Products with packed block-sparse matrices on Triton."""

from __future__ import annotations

import torch

from spartan_kernels.backends.shared import packed_gradients
from spartan_kernels.backends.triton.block_matrix import BlockMatrix
from spartan_kernels.backends.triton.single_weights import single_weights_product
from spartan_kernels.break_even import FEW_TOKENS
from spartan_kernels.operands import PackedLinear, PackedLinearBackward


def block_sparse_linear_forward(o: PackedLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """act(z), z = x w^T + b with w given by its blocks, and z when it is to be saved."""
    block = (o.values.shape[1], o.values.shape[2])
    if block == (1, 1) and o.x.shape[:-1].numel() <= FEW_TOKENS:
        return single_weights_product(o)
    operand = BlockMatrix(o.values, (o.out, o.x.shape[-1]), block, o.layout, None, o.positions)
    return operand.product(o.x, True, o.bias, o.activation, o.save)


def block_sparse_linear_backward(o: PackedLinearBackward) -> list[torch.Tensor | None]:
    """Gradients of x, values and bias; None where not needed."""
    shape, block = (o.grad.shape[-1], o.x.shape[-1]), (o.values.shape[1], o.values.shape[2])
    matrix = BlockMatrix(o.values, shape, block, o.layout, None, o.positions)
    return packed_gradients(
        o,
        lambda dz: matrix.product(dz, False)[0],
        lambda dz: matrix.sampled(dz, o.x, torch.zeros_like(matrix.data), None),
    )
