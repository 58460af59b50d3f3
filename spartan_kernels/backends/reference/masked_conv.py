"""Convolution with a weight that is masked by blocks, by forming the masked weight."""

from __future__ import annotations

import torch
from torch.nn import functional

from spartan_kernels.backends.shared import LayerNeeds, expand, parameter_gradients
from spartan_kernels.operands import MaskedConv, MaskedConvBackward


def _masked(
    weight: torch.Tensor, gate: torch.Tensor, mask: torch.Tensor | None, rows: int, columns: int
) -> torch.Tensor:
    """theta * gate on the blocks whose gate and mask are not zero."""
    active = gate != 0 if mask is None else (gate != 0) & mask
    gated = (weight * expand(gate, weight.shape, rows, columns)).to(weight.dtype)
    return torch.where(expand(active, weight.shape, rows, columns), gated, 0.0)


def masked_conv2d_forward(o: MaskedConv) -> torch.Tensor:
    """Convolution of x with theta * gate on the active blocks, plus b."""
    masked = _masked(o.weight, o.gate, o.forward_mask, o.rows, o.columns)
    return functional.conv2d(o.x, masked, o.bias, o.stride, o.padding, o.dilation, o.groups)


def masked_conv2d_backward(o: MaskedConvBackward) -> list[torch.Tensor]:
    """Gradients of x, weight, gate and bias; empty where not needed. No backward mask means every block."""
    needs = LayerNeeds(*o.needs)
    masked = _masked(o.weight, o.gate, o.forward_mask, o.rows, o.columns)
    wanted = [needs.x, needs.weight or needs.gate, needs.bias]
    geometry = o.stride, o.padding, o.dilation, False, [0, 0], o.groups
    dx, dense, dbias = torch.ops.aten.convolution_backward(o.grad, o.x, masked, [o.weight.shape[0]], *geometry, wanted)
    dweight = dgate = empty = o.x.new_empty(0)
    if needs.weight or needs.gate:
        mask = o.backward_mask
        keep = None if mask is None else expand(mask, o.weight.shape, o.rows, o.columns)
        dweight, dgate = parameter_gradients(dense, keep, o)
    return [dx if needs.x else empty, dweight, dgate, dbias if needs.bias else empty]
