"""Products with block-masked matrices by forming the masked matrix and multiplying densely."""

from __future__ import annotations

import torch
from torch.nn import functional

from spartan_kernels.backends.reference.activations import ACTIVATIONS
from spartan_kernels.backends.shared import LayerNeeds, expand, flat, layer_gradients, parameter_gradients
from spartan_kernels.operands import MaskedLinear, MaskedLinearBackward, SampledMatmul


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
    """theta * gate on the layout's blocks; without a layout, where the gate is not zero. A bool gate scales nothing."""
    each = expand(gate, weight.shape, rows, columns)
    active = _active(layout, weight.shape, rows, columns) if layout else each != 0
    gated = weight if gate.dtype == torch.bool else (weight * each).to(weight.dtype)
    return torch.where(active, gated, 0.0)


def masked_linear_forward(o: MaskedLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """act(z), z = x (theta * gate on the layout's blocks)^T + b, and z when it is to be saved."""
    z = functional.linear(o.x, _masked(o.weight, o.gate, o.layout, o.rows, o.columns), o.bias).contiguous()
    return ACTIVATIONS[o.activation](z), z if o.save else None


def masked_linear_backward(o: MaskedLinearBackward) -> list[torch.Tensor | None]:
    """Gradients of x, weight, gate and bias; None where not needed. No backward layout means every block."""

    def of_input(dz: torch.Tensor) -> torch.Tensor:
        return (dz @ _masked(o.weight, o.gate, o.layout, o.rows, o.columns)).contiguous()

    def of_parameters(dz: torch.Tensor, needs: LayerNeeds) -> tuple[torch.Tensor, torch.Tensor]:
        keep = _active(o.backward_layout, o.weight.shape, o.rows, o.columns) if o.backward_layout else None
        return parameter_gradients(flat(dz).mT @ flat(o.x), keep, o)

    return layer_gradients(o, of_input, of_parameters)


def sampled_matmul_forward(o: SampledMatmul) -> torch.Tensor:
    """a b on the layout's blocks, zero elsewhere."""
    product = o.a @ o.b
    return torch.where(_active(o.layout, product.shape, o.rows, o.columns), product, 0.0)
