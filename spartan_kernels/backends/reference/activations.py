"""Activations at the end of a product."""

from __future__ import annotations

from torch.nn import functional

ACTIVATIONS = {
    "": lambda z: z,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}
