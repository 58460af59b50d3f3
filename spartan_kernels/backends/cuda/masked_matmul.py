"""Products with block-masked matrices in CUDA C++.

The gradient of a weight with every block active is PyTorch's own dense product.
"""

from __future__ import annotations

import torch

from spartan_kernels.backends.cuda.block_matrix import BlockMatrix
from spartan_kernels.backends.shared import LayerNeeds, flat, layer_gradients
from spartan_kernels.operands import MaskedLinear, MaskedLinearBackward, SampledMatmul


def masked_linear_forward(o: MaskedLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """act(z), z = x (theta * gate on the layout's blocks)^T + b, and z when it is to be saved."""
    matrix = BlockMatrix(o.weight, (o.weight.shape[0], o.weight.shape[1]), (o.rows, o.columns), o.layout, o.gate)
    return matrix.forward(o.x, o.bias, o.activation, o.save)


def masked_linear_backward(o: MaskedLinearBackward) -> list[torch.Tensor | None]:
    """Gradients of x, weight, gate and bias; None where not needed."""
    shape, block = (o.weight.shape[0], o.weight.shape[1]), (o.rows, o.columns)

    def of_input(dz: torch.Tensor) -> torch.Tensor:
        return BlockMatrix(o.weight, shape, block, o.layout, o.gate).input_gradient(dz)

    def of_parameters(dz: torch.Tensor, needs: LayerNeeds) -> tuple[torch.Tensor, torch.Tensor]:
        matrix = BlockMatrix(o.weight, shape, block, o.backward_layout, o.gate)
        grad_gate = torch.zeros(o.gate.shape, dtype=torch.float32, device=o.gate.device)
        if o.backward_layout:
            result = torch.zeros(shape, dtype=o.weight.dtype, device=o.weight.device)
            matrix.sampled(dz, o.x, result, grad_gate)
        else:
            result = (flat(dz).mT @ flat(o.x)).contiguous()
            matrix.gate_gradient(result, grad_gate)
        return result, grad_gate

    return layer_gradients(o, of_input, of_parameters)


def sampled_matmul_forward(o: SampledMatmul) -> torch.Tensor:
    """a b on the layout's blocks, zero elsewhere."""
    result = torch.zeros((o.a.shape[0], o.b.shape[1]), dtype=o.a.dtype, device=o.a.device)
    BlockMatrix(result, (o.a.shape[0], o.b.shape[1]), (o.rows, o.columns), o.layout).sampled(o.a.mT, o.b, result, None)
    return result
