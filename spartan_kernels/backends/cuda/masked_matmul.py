"""Products with block-masked matrices in CUDA C++.

The gradient of a weight with every block active is PyTorch's own dense product.
"""

from __future__ import annotations

import torch

from spartan_kernels.backends.cuda.block_matrix import BlockMatrix, tokens_of
from spartan_kernels.backends.shared import before_activation, bias_gradient


def masked_linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    layout: list[torch.Tensor],
    bias: torch.Tensor | None,
    activation: str,
    rows: int,
    columns: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(z), z = x (theta * gate on the layout's blocks)^T + b, and z when it is to be saved."""
    matrix = BlockMatrix(weight, (weight.shape[0], weight.shape[1]), (rows, columns), layout, gate)
    return matrix.forward(x, bias, activation, save)


def masked_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    layout: list[torch.Tensor],
    backward_layout: list[torch.Tensor],
    saved: torch.Tensor,
    activation: str,
    rows: int,
    columns: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of x, weight, gate and bias; empty where not needed."""
    shape, block = (weight.shape[0], weight.shape[1]), (rows, columns)
    dz = before_activation(grad, saved, activation)
    results = [x.new_empty(0)] * 4
    if needs[0]:
        results[0] = BlockMatrix(weight, shape, block, layout, gate).input_gradient(dz)
    if needs[1] or needs[2]:
        matrix = BlockMatrix(weight, shape, block, backward_layout, gate)
        grad_gate = torch.zeros(gate.shape, dtype=torch.float32, device=gate.device)
        if backward_layout:
            result = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            matrix.sampled(dz, x, result, grad_gate)
        else:
            result = (tokens_of(dz).mT @ tokens_of(x)).contiguous()
            matrix.gate_gradient(result, grad_gate)
        results[1] = result if needs[1] else results[1]
        results[2] = grad_gate.to(gate.dtype) if needs[2] else results[2]
    if needs[3]:
        results[3] = bias_gradient(dz)
    return results


def sampled_matmul_forward(
    a: torch.Tensor, b: torch.Tensor, layout: list[torch.Tensor], rows: int, columns: int
) -> torch.Tensor:
    """a b on the layout's blocks, zero elsewhere."""
    result = torch.zeros((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    BlockMatrix(result, (a.shape[0], b.shape[1]), (rows, columns), layout).sampled(a.mT, b, result, None)
    return result
