"""Products with block-masked matrices on the compiled extension."""

from __future__ import annotations

import torch

from spartan_kernels.backends.native.block_layout import passing_layout
from spartan_kernels.backends.native.block_matrix import BlockMatrix
from spartan_kernels.backends.shared import LayerNeeds, layer_gradients
from spartan_kernels.operands import MaskedLinear, MaskedLinearBackward, SampledMatmul


def masked_linear_forward(o: MaskedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """act(z), z = x (theta * gate on the layout's blocks)^T + b, and z when it is to be saved."""
    return _matrix(o, True).forward(o.x, o.bias, o.activation, o.save)


def masked_linear_backward(o: MaskedLinearBackward) -> list[torch.Tensor]:
    """Gradients of x, weight, gate and bias; empty where not needed."""
    shape, block = (o.weight.shape[0], o.weight.shape[1]), (o.rows, o.columns)

    def of_input(dz: torch.Tensor) -> torch.Tensor:
        return _matrix(o, False).input_gradient(dz)

    def of_parameters(dz: torch.Tensor, needs: LayerNeeds) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        raw = torch.empty(shape, dtype=torch.float32)
        grad_gate = torch.empty(o.gate.shape, dtype=torch.float32) if needs.gate else None
        BlockMatrix(o.weight, shape, block, o.backward_layout, o.gate).sampled(dz, o.x, raw, grad_gate)
        return raw.to(o.weight.dtype) if needs.weight else None, grad_gate

    return layer_gradients(o, of_input, of_parameters)


def _matrix(o: MaskedLinear | MaskedLinearBackward, by_row: bool) -> BlockMatrix:
    """The weight on the layout's blocks; without a layout, where the gate is set."""
    layout, gate = (o.layout, o.gate) if o.layout else (passing_layout(o.gate, by_row), None)
    return BlockMatrix(o.weight, (o.weight.shape[0], o.weight.shape[1]), (o.rows, o.columns), layout, gate)


def sampled_matmul_forward(o: SampledMatmul) -> torch.Tensor:
    """a b on the layout's blocks, zero elsewhere."""
    shape = (o.a.shape[0], o.b.shape[1])
    raw = torch.empty(shape, dtype=torch.float32)
    BlockMatrix(raw.to(o.a.dtype), shape, (o.rows, o.columns), o.layout).sampled(o.a.mT, o.b, raw, None)
    return raw.to(o.a.dtype)
