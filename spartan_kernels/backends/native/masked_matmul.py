"""Products with block-masked matrices on the compiled extension."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension
from spartan_kernels.backends.native.block_layout import passing_layout
from spartan_kernels.backends.native.block_matrix import BlockMatrix
from spartan_kernels.backends.native.masked_weight import add_block_signs_, gate_gradient_
from spartan_kernels.backends.shared import LayerNeeds, flat, layer_gradients
from spartan_kernels.break_even import whole_block
from spartan_kernels.operands import AddBlockSigns, MaskedLinear, MaskedLinearBackward, SampledMatmul


def masked_linear_forward(o: MaskedLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """act(z), z = x (theta * gate on the layout's blocks)^T + b, and z when it is to be saved."""
    return _matrix(o, True).forward(o.x, o.bias, o.activation, o.save)


def masked_linear_backward(o: MaskedLinearBackward) -> list[torch.Tensor | None]:
    """Gradients of x, weight, gate and bias; None where not needed."""
    shape = (o.weight.shape[0], o.weight.shape[1])
    matrix = _matrix(o, False) if o.needs[0] else None
    follows = o.slope is not None and o.needs[1]  # the gate's gradient is part of the weight's

    def of_input(dz: torch.Tensor) -> torch.Tensor:
        assert matrix is not None
        return matrix.input_gradient(dz)

    def of_parameters(dz: torch.Tensor, needs: LayerNeeds) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if _of_every_weight(o):
            raw = torch.mm(flat(dz).t(), flat(o.x))
            return raw, gate_gradient_(raw, o)
        raw = dz.new_empty(*shape) if dz.dtype is torch.float32 else extension.empty(shape, torch.float32)
        grad_gate = extension.empty(o.gate.shape, torch.float32) if needs.gate or follows else None
        if matrix is not None and o.layout and o.backward_layout is o.layout:
            sampled = matrix
        else:
            sampled = BlockMatrix(o.weight, shape, (o.rows, o.columns), o.backward_layout, o.gate)
        sampled.sampled(dz, o.x, raw, grad_gate)
        if follows:
            assert o.slope is not None and grad_gate is not None
            add_block_signs_(AddBlockSigns(raw, o.weight, o.slope * grad_gate, o.rows, o.columns))
        return _in(o.weight.dtype, raw) if needs.weight else None, grad_gate

    return layer_gradients(o, of_input, of_parameters)


def _of_every_weight(o: MaskedLinearBackward) -> bool:
    """Whether the weight's gradient is PyTorch's product, which is scaled then: the kernels' own is not faster here."""
    dense = not o.backward_layout and (o.rows, o.columns) != (1, 1)
    if not dense or not o.weight.dtype is o.x.dtype is o.grad.dtype is torch.float32:
        return False
    return whole_block(o.x.device, o.x.dtype, o.x.shape[:-1].numel()) is None


def _matrix(o: MaskedLinear | MaskedLinearBackward, by_row: bool) -> BlockMatrix:
    """The weight on the layout's blocks; without a layout, where the gate is not zero. A bool gate scales nothing."""
    layout = o.layout or passing_layout(o.gate, by_row)
    gate = None if o.gate.dtype is torch.bool else o.gate
    return BlockMatrix(o.weight, (o.weight.shape[0], o.weight.shape[1]), (o.rows, o.columns), layout, gate)


def sampled_matmul_forward(o: SampledMatmul) -> torch.Tensor:
    """a b on the layout's blocks, zero elsewhere."""
    shape = (o.a.shape[0], o.b.shape[1])
    raw = extension.empty(shape, torch.float32)
    BlockMatrix(_in(o.a.dtype, raw), shape, (o.rows, o.columns), o.layout).sampled(o.a.mT, o.b, raw, None)
    return _in(o.a.dtype, raw)


def _in(dtype: torch.dtype, raw: torch.Tensor) -> torch.Tensor:
    """The sums as numbers of this dtype; themselves where they are that already."""
    return raw if raw.dtype is dtype else raw.to(dtype)
