"""Products with packed block-sparse matrices by unpacking them."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from spartan_kernels.backends.reference.activations import ACTIVATIONS
from spartan_kernels.backends.shared import before_activation, bias_gradient


def _rows_of(layout: list[torch.Tensor]) -> torch.Tensor:
    """The block row of each block."""
    entry = torch.arange(layout[1].shape[0], dtype=torch.int32, device=layout[0].device)
    return torch.searchsorted(layout[0][1:].contiguous(), entry, right=True)


def _dense(values: torch.Tensor, layout: list[torch.Tensor], out: int, in_: int) -> torch.Tensor:
    _, rows, columns = values.shape
    grid = math.ceil(out / rows), math.ceil(in_ / columns)
    tiles = values.new_zeros(*grid, rows, columns)
    tiles[_rows_of(layout), layout[1].long()] = values
    return tiles.movedim(2, 1).reshape(grid[0] * rows, grid[1] * columns)[:out, :in_]


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
    z = functional.linear(x, _dense(values, layout, out, x.shape[-1]), bias).contiguous()
    return ACTIVATIONS[activation](z), z if save else x.new_empty(0)


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
    """Gradients of x, values and bias; empty where not needed. Values past the matrix's edge have none: zero."""
    dz = before_activation(grad, saved, activation)
    out, in_ = grad.shape[-1], x.shape[-1]
    _, rows, columns = values.shape
    results = [x.new_empty(0)] * 3
    if needs[0]:
        results[0] = (dz @ _dense(values, layout, out, in_)).contiguous()
    if needs[1]:
        dense = dz.reshape(dz.shape[:-1].numel(), out).mT @ x.reshape(x.shape[:-1].numel(), in_)
        padded = functional.pad(dense, (0, -in_ % columns, 0, -out % rows))
        tiles = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).movedim(1, 2)
        results[1] = tiles[_rows_of(layout), layout[1].long()].contiguous()
    if needs[2]:
        results[2] = bias_gradient(dz)
    return results
