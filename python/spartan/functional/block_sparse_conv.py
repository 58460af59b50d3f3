"""Gradient of the convolution with a weight in packed blocks."""

from __future__ import annotations

from typing import Any

import torch

from spartan.functional.autograd import differentiable, differentiable_once, needed
from spartan_kernels.operands import PackedConv, PackedConvBackward
from spartan_kernels.ops import block_sparse_conv2d
from spartan_kernels.ops.block_sparse_conv import block_sparse_conv2d_backward

__all__ = ["block_sparse_conv2d"]

_SETTINGS = ("layout", "positions", "kernel", "stride", "padding", "dilation", "backend")


def _setup(ctx: Any, o: PackedConv, output: Any) -> None:
    ctx.save_for_backward(o.x, o.values)
    ctx.settings = {name: getattr(o, name) for name in _SETTINGS}  # tensors among them are integers


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, values = ctx.saved_tensors
    o = PackedConvBackward(grad, x, values, needs=list(ctx.needs), **ctx.settings)
    return needed(ctx.needs, block_sparse_conv2d_backward(o))


differentiable("block_sparse_conv2d_forward", ("x", "values", "bias"), _setup, _backward)
differentiable_once("block_sparse_conv2d_backward", "block_sparse_conv2d")
