"""Convolution with a weight that is masked by blocks, by forming the masked weight."""

from __future__ import annotations

import torch
from torch.nn import functional

from spartan_kernels.backends.shared import expand, parameter_gradients


def _masked(
    weight: torch.Tensor, gate: torch.Tensor, mask: torch.Tensor | None, rows: int, columns: int
) -> torch.Tensor:
    """theta * gate on the blocks whose gate and mask are not zero."""
    active = gate != 0 if mask is None else (gate != 0) & mask
    gated = (weight * expand(gate, weight.shape, rows, columns)).to(weight.dtype)
    return torch.where(expand(active, weight.shape, rows, columns), gated, 0.0)


def masked_conv2d_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    forward_mask: torch.Tensor | None,
    backward_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """Convolution of x with theta * gate on the active blocks, plus b."""
    masked = _masked(weight, gate, forward_mask, rows, columns)
    return functional.conv2d(x, masked, bias, stride, padding, dilation, groups)


def masked_conv2d_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    forward_mask: torch.Tensor | None,
    backward_mask: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    rows: int,
    columns: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of x, weight, gate and bias; empty where not needed. No backward mask means every block."""
    masked = _masked(weight, gate, forward_mask, rows, columns)
    wanted = [needs[0], needs[1] or needs[2], needs[3]]
    geometry = stride, padding, dilation, False, [0, 0], groups
    dx, dense, dbias = torch.ops.aten.convolution_backward(grad, x, masked, [weight.shape[0]], *geometry, wanted)
    dweight = dgate = empty = x.new_empty(0)
    if wanted[1]:
        dweight, dgate = parameter_gradients(dense, weight, gate, backward_mask, rows, columns, needs)
    return [dx if needs[0] else empty, dweight, dgate, dbias if needs[3] else empty]
