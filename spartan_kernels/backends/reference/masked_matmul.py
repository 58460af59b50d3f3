"""Masked linear by forming the masked weight and multiplying densely."""

from __future__ import annotations

import torch
from torch.nn import functional

from spartan_kernels.backends.reference.masked_weight import block_sum, expand

_aten = torch.ops.aten
_ACTIVATIONS = {
    "": lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
}
_ACTIVATION_GRADIENTS = {
    "relu": lambda grad, y: _aten.threshold_backward(grad, y, 0),
    "gelu": lambda grad, y: _aten.gelu_backward(grad, y),
    "gelu_tanh": lambda grad, y: _aten.gelu_backward(grad, y, approximate="tanh"),
    "silu": lambda grad, y: _aten.silu_backward(grad, y),
}


def _gated(
    weight: torch.Tensor, gate: torch.Tensor, mask: torch.Tensor | None, rows: int, columns: int
) -> torch.Tensor:
    scale = gate if mask is None else torch.where(mask, gate, 0.0)
    return weight * expand(scale.to(weight.dtype), weight.shape, rows, columns)


def masked_linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    forward_mask: torch.Tensor | None,
    backward_mask: torch.Tensor | None,
    activation: str,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """act(x (theta * gate * mask)^T + b)."""
    y = functional.linear(x, _gated(weight, gate, forward_mask, rows, columns), bias)
    return _ACTIVATIONS[activation](y).contiguous()


def masked_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    forward_mask: torch.Tensor | None,
    backward_mask: torch.Tensor | None,
    activation: str,
    rows: int,
    columns: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of x, weight, gate and bias; empty where not needed."""
    masked = _gated(weight, gate, forward_mask, rows, columns)
    if activation:
        grad = _ACTIVATION_GRADIENTS[activation](grad, functional.linear(x, masked, bias))
    results = [x.new_empty(0)] * 4
    if needs[0]:
        results[0] = grad @ masked
    if needs[1] or needs[2]:
        dense = grad.reshape(-1, weight.shape[0]).mT @ x.reshape(-1, weight.shape[1])
        if backward_mask is not None:
            dense = torch.where(expand(backward_mask, weight.shape, rows, columns), dense, 0.0)
        if needs[1]:
            results[1] = dense * expand(gate.to(weight.dtype), weight.shape, rows, columns)
        if needs[2]:
            results[2] = block_sum(dense * weight, rows, columns).to(gate.dtype).contiguous()
    if needs[3]:
        results[3] = grad.reshape(-1, weight.shape[0]).sum(0)
    return results
