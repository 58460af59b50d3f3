"""Products with packed block-sparse matrices on Triton."""

from __future__ import annotations

import torch

from spartan_kernels.backends.shared import packed_gradients
from spartan_kernels.backends.triton import float8_kernels
from spartan_kernels.backends.triton.block_matrix import BlockMatrix, tokens_of
from spartan_kernels.backends.triton.launches import Launch, start
from spartan_kernels.backends.triton.product_plan import rounding_tile
from spartan_kernels.backends.triton.single_weights import single_weights_product
from spartan_kernels.break_even import FEW_TOKENS
from spartan_kernels.float8 import FLOAT8
from spartan_kernels.operands import Float8Linear, PackedLinear, PackedLinearBackward


def block_sparse_linear_forward(o: PackedLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """act(z), z = x w^T + b with w given by its blocks, and z when it is to be saved."""
    block = (o.values.shape[1], o.values.shape[2])
    if block == (1, 1) and o.x.shape[:-1].numel() <= FEW_TOKENS:
        return single_weights_product(o)
    operand = BlockMatrix(o.values, (o.out, o.x.shape[-1]), block, o.layout, None, o.positions)
    return operand.product(o.x, True, o.bias, o.activation, o.save)


def block_sparse_linear_float8_forward(o: Float8Linear) -> torch.Tensor:
    """act(z), z = s_x s_w (x w^T) + b with tokens and blocks in 8 bits, and sums in float32."""
    shape, block = (o.out, o.x.shape[-1]), (o.values.shape[1], o.values.shape[2])
    rounded, scales = _rounded_rows(tokens_of(o.x))
    operand = BlockMatrix(o.values, shape, block, o.layout, None, o.positions)
    y, _ = operand.product(
        rounded, True, o.bias, o.activation, scales=(scales, o.scales.contiguous()), result=o.x.dtype
    )
    return y.view(*o.x.shape[:-1], o.out)


def _rounded_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, features] in 8 bits, and their scales."""
    rounded = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        arguments = x, rounded, scales, x.shape[1], x.stride(0)
        start(Launch(float8_kernels._rounded_rows_kernel, x.shape[0], arguments, rounding_tile(x.shape[1])))
    return rounded, scales


def block_sparse_linear_backward(o: PackedLinearBackward) -> list[torch.Tensor | None]:
    """Gradients of x, values and bias; None where not needed."""
    shape, block = (o.grad.shape[-1], o.x.shape[-1]), (o.values.shape[1], o.values.shape[2])
    matrix = BlockMatrix(o.values, shape, block, o.layout, None, o.positions)
    return packed_gradients(
        o,
        lambda dz: matrix.product(dz, False)[0],
        lambda dz: matrix.sampled(dz, o.x, torch.zeros_like(matrix.data), None),
    )
