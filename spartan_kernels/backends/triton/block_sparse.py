"""Products with packed block-sparse matrices on Triton."""

from __future__ import annotations

import torch

from spartan_kernels.backends.shared import before_activation, bias_gradient
from spartan_kernels.backends.triton.block_matrix import BlockMatrix


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
    operand = BlockMatrix(values, (out, x.shape[-1]), (values.shape[1], values.shape[2]), layout, None, positions)
    return operand.product(x, True, bias, activation, save)


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
    operand = BlockMatrix(values, shape, block, layout, None, positions)
    results = [x.new_empty(0) for _ in range(3)]
    if needs[0]:
        results[0] = operand.product(dz, False)[0]
    if needs[1]:
        results[1] = operand.sampled(dz, x, torch.zeros_like(operand.data), None)
    if needs[2]:
        results[2] = bias_gradient(dz)
    return results
