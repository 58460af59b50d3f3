"""Products with block-masked matrices by forming the masked matrix and multiplying densely."""

from __future__ import annotations

import torch
from torch.nn import functional

from spartan_kernels.backends.reference.activations import ACTIVATIONS
from spartan_kernels.backends.shared import before_activation, bias_gradient, block_sum, expand


def _active(layout: list[torch.Tensor], shape: torch.Size, rows: int, columns: int) -> torch.Tensor:
    """Which elements of a matrix lie in the layout's blocks."""
    grid_rows, grid_columns = layout[0].shape[0] - 1, layout[2].shape[0] - 1
    entry = torch.arange(layout[1].shape[0], dtype=torch.int32, device=layout[0].device)
    row = torch.searchsorted(layout[0][1:].contiguous(), entry, right=True)
    count = grid_rows * grid_columns
    place = torch.where(entry < layout[0][-1], row * grid_columns + layout[1], count)
    flags = torch.zeros(count + 1, dtype=torch.bool, device=entry.device).index_fill(0, place, True)
    return expand(flags[:-1].view(grid_rows, grid_columns), shape, rows, columns)


def _masked(
    weight: torch.Tensor, gate: torch.Tensor, layout: list[torch.Tensor], rows: int, columns: int
) -> torch.Tensor:
    """theta * gate on the layout's blocks."""
    gated = (weight * expand(gate, weight.shape, rows, columns)).to(weight.dtype)
    return torch.where(_active(layout, weight.shape, rows, columns), gated, 0.0)


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
    z = functional.linear(x, _masked(weight, gate, layout, rows, columns), bias).contiguous()
    return ACTIVATIONS[activation](z), z if save else x.new_empty(0)


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
    """Gradients of x, weight, gate and bias; empty where not needed. No backward layout means every block."""
    dz = before_activation(grad, saved, activation)
    results = [x.new_empty(0)] * 4
    if needs[0]:
        results[0] = (dz @ _masked(weight, gate, layout, rows, columns)).contiguous()
    if needs[1] or needs[2]:
        dense = dz.reshape(dz.shape[:-1].numel(), weight.shape[0]).mT @ x.reshape(x.shape[:-1].numel(), weight.shape[1])
        if backward_layout:
            dense = torch.where(_active(backward_layout, weight.shape, rows, columns), dense, 0.0)
        if needs[1]:
            results[1] = (dense * expand(gate, weight.shape, rows, columns)).to(weight.dtype).contiguous()
        if needs[2]:
            wide = torch.promote_types(gate.dtype, torch.float32)
            results[2] = block_sum(dense.to(wide) * weight, rows, columns).to(gate.dtype).contiguous()
    if needs[3]:
        results[3] = bias_gradient(dz)
    return results


def sampled_matmul_forward(
    a: torch.Tensor, b: torch.Tensor, layout: list[torch.Tensor], rows: int, columns: int
) -> torch.Tensor:
    """a b on the layout's blocks, zero elsewhere."""
    product = a @ b
    return torch.where(_active(layout, product.shape, rows, columns), product, 0.0)
