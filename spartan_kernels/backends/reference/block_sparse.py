"""Products with packed block-sparse matrices by unpacking them."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from spartan_kernels.backends.reference.activations import ACTIVATIONS
from spartan_kernels.backends.shared import flat, packed_gradients
from spartan_kernels.float8 import rounded_rows
from spartan_kernels.operands import Float8Linear, PackedLinear, PackedLinearBackward


def rows_of(layout: list[torch.Tensor]) -> torch.Tensor:
    """The block row of each block."""
    entry = torch.arange(layout[1].shape[0], dtype=torch.int32, device=layout[0].device)
    return torch.searchsorted(layout[0][1:].contiguous(), entry, right=True)


def unpacked(values: torch.Tensor, layout: list[torch.Tensor], out: int, in_: int) -> torch.Tensor:
    """The matrix [out, in] of these blocks."""
    _, rows, columns = values.shape
    grid = math.ceil(out / rows), math.ceil(in_ / columns)
    tiles = values.new_zeros(*grid, rows, columns)
    tiles[rows_of(layout), layout[1].long()] = values
    return tiles.movedim(2, 1).reshape(grid[0] * rows, grid[1] * columns)[:out, :in_]


def block_sparse_linear_forward(o: PackedLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """act(z), z = x w^T + b with w given by its blocks, and z when it is to be saved."""
    z = functional.linear(o.x, unpacked(o.values, o.layout, o.out, o.x.shape[-1]), o.bias).contiguous()
    return ACTIVATIONS[o.activation](z), z if o.save else None


def block_sparse_linear_float8_forward(o: Float8Linear) -> torch.Tensor:
    """act(z), z = s_x s_w (x w^T) + b with tokens and blocks in 8 bits, multiplied and added in float32."""
    x, scales = rounded_rows(o.x)
    w = unpacked(o.values.to(torch.float32), o.layout, o.out, o.x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):  # which would multiply in fewer bits
        z = functional.linear(x.to(torch.float32), w) * scales * o.scales[:, 0]
    z = z if o.bias is None else z + o.bias
    return ACTIVATIONS[o.activation](z).to(o.x.dtype).contiguous()


def block_sparse_linear_backward(o: PackedLinearBackward) -> list[torch.Tensor | None]:
    """Gradients of x, values and bias; None where not needed. Values past the matrix's edge have none: zero."""
    out, in_ = o.grad.shape[-1], o.x.shape[-1]
    _, rows, columns = o.values.shape

    def of_values(dz: torch.Tensor) -> torch.Tensor:
        padded = functional.pad(flat(dz).mT @ flat(o.x), (0, -in_ % columns, 0, -out % rows))
        tiles = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).movedim(1, 2)
        return tiles[rows_of(o.layout), o.layout[1].long()].contiguous()

    return packed_gradients(o, lambda dz: (dz @ unpacked(o.values, o.layout, out, in_)).contiguous(), of_values)
