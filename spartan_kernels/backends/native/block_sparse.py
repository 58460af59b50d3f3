"""Products with packed block-sparse matrices on the compiled extension."""

from __future__ import annotations

import torch

from spartan_kernels.backends.native.block_matrix import BlockMatrix
from spartan_kernels.backends.shared import before_activation, bias_gradient


def block_sparse_linear_forward(
    x: torch.Tensor,
    values: torch.Tensor,
    layout: list[torch.Tensor],
    positions: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(z), z = x w^T + b with w given by its blocks, and z when it is to be saved."""
    block = (values.shape[1], values.shape[2])
    return BlockMatrix(values, (out, x.shape[-1]), block, layout, positions=positions).forward(
        x, bias, activation, save
    )


def block_sparse_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    layout: list[torch.Tensor],
    positions: torch.Tensor,
    saved: torch.Tensor,
    activation: str,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of x, values and bias; empty where not needed."""
    shape, block = (grad.shape[-1], x.shape[-1]), (values.shape[1], values.shape[2])
    dz = before_activation(grad, saved, activation)
    matrix = BlockMatrix(values, shape, block, layout, positions=positions)
    results = [x.new_empty(0) for _ in range(3)]
    if needs[0]:
        results[0] = matrix.input_gradient(dz)
    if needs[1]:
        raw = torch.empty(values.shape, dtype=torch.float32)
        matrix.sampled(dz, x, raw, None)
        results[1] = raw.to(values.dtype)
    if needs[2]:
        results[2] = bias_gradient(dz)
    return results
