"""Products with packed block-sparse matrices on the compiled extension."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension
from spartan_kernels.backends.native.block_matrix import BlockMatrix
from spartan_kernels.backends.shared import packed_gradients
from spartan_kernels.operands import PackedLinear, PackedLinearBackward


def block_sparse_linear_forward(o: PackedLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """act(z), z = x w^T + b with w given by its blocks, and z when it is to be saved."""
    block = (o.values.shape[1], o.values.shape[2])
    return BlockMatrix(o.values, (o.out, o.x.shape[-1]), block, o.layout, positions=o.positions).forward(
        o.x, o.bias, o.activation, o.save
    )


def block_sparse_linear_backward(o: PackedLinearBackward) -> list[torch.Tensor | None]:
    """Gradients of x, values and bias; None where not needed."""
    shape, block = (o.grad.shape[-1], o.x.shape[-1]), (o.values.shape[1], o.values.shape[2])
    matrix = BlockMatrix(o.values, shape, block, o.layout, positions=o.positions)

    def of_values(dz: torch.Tensor) -> torch.Tensor:
        raw = extension.empty(o.values.shape, torch.float32)
        matrix.sampled(dz, o.x, raw, None)
        return raw.to(o.values.dtype)

    return packed_gradients(o, matrix.input_gradient, of_values)
