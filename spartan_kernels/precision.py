"""How GPU kernels multiply float32: in full precision or in TF32, as PyTorch's switches for its own kernels say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["convolving_in_full", "tf32", "tf32_of_convolutions", "using"]

_forced: list[bool] = []


def tf32() -> bool:
    """Whether PyTorch multiplies float32 in TF32 on CUDA, whichever of its switches said so.

    `fp32_precision` is read: it follows `allow_tf32` and `set_float32_matmul_precision`, which cannot be read any more
    once somebody has used it.
    """
    return _forced[-1] if _forced else torch.backends.cuda.matmul.fp32_precision == "tf32"


def tf32_of_convolutions() -> bool:
    """The same of convolutions, for which PyTorch has a switch of its own, in cuDNN's name; it starts as TF32."""
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # PyTorch puts it there as it is imported
    return _forced[-1] if _forced else conv.fp32_precision == "tf32"


@contextmanager
def using(enabled: bool) -> Iterator[None]:
    """TF32 or not for the products of this package in this process, whatever PyTorch's switch says: for a search."""
    _forced.append(enabled)
    try:
        yield
    finally:
        _forced.pop()


@contextmanager
def convolving_in_full() -> Iterator[None]:
    """No TF32 in convolutions, neither in those of this package nor in PyTorch's: for a check against float64."""
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before
