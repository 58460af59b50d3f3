"""Activations at the end of a product, and their gradients at its beginning."""

from __future__ import annotations

import torch
from torch.nn import functional

_aten = torch.ops.aten
ACTIVATIONS = {
    "": lambda z: z,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}


def before_activation(grad: torch.Tensor, saved: torch.Tensor, activation: str) -> torch.Tensor:
    """dL/dz from dL/dy; `saved` is y for relu, z for the others."""
    if activation == "relu":
        return _aten.threshold_backward(grad, saved, 0)
    if activation == "silu":
        return _aten.silu_backward(grad, saved)
    if activation:
        return _aten.gelu_backward(grad, saved, approximate="tanh" if activation == "gelu_tanh" else "none")
    return grad
