"""What kind of module one is, where its class alone does not say."""

from __future__ import annotations

from torch import nn

from spartan.distributed import own_class

__all__ = [
    "CONVOLUTIONS",
    "TRANSPOSED_CONVOLUTIONS",
    "is_convolution",
    "is_norm",
    "is_transformers_linear",
    "stored_by_inputs",
]

TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED_CONVOLUTIONS)


def is_convolution(module: nn.Module) -> bool:
    """Whether its weight is [out, in, *kernel]: PyTorch's, or by the name of its class."""
    return isinstance(module, CONVOLUTIONS) or "conv" in type(module).__name__.lower()


def is_norm(module: nn.Module) -> bool:
    """Whether it normalises: by the name of its class."""
    return "norm" in type(module).__name__.lower()


def is_transformers_linear(module: nn.Module | None) -> bool:
    """Whether it is the `Conv1D` of Hugging Face's transformers: y = x w + b with w of shape [in, out]."""
    return (
        module is not None and own_class(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)
    )


def stored_by_inputs(module: nn.Module) -> bool:
    """Whether its weight is stored as [in, out, ...], or as [experts, in, out] where transformers says so."""
    experts = getattr(module, "is_transposed", False) is True and hasattr(module, "num_experts")
    return isinstance(module, TRANSPOSED_CONVOLUTIONS) or is_transformers_linear(module) or experts
