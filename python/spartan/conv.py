"""Convolution with a block-sparse weight as people import it: with gradients."""

from __future__ import annotations

from typing import Any

import torch

from spartan._autograd import differentiable, differentiable_once
from spartan_kernels.ops import masked_conv2d
from spartan_kernels.ops.masked_conv import masked_conv2d_backward

__all__ = ["masked_conv2d"]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, gate, forward_mask, backward_mask, _, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, gate, forward_mask, backward_mask)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    *rest, backend = ctx.rest
    needs = [ctx.needs[i] for i in (0, 1, 2, 5)]
    grads = masked_conv2d_backward(grad, *ctx.saved_tensors, *rest, needs, backend)
    dx, dweight, dgate, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dx, dweight, dgate, None, None, dbias, *[None] * 7


differentiable("masked_conv2d_forward", _setup, _backward)
differentiable_once("masked_conv2d_backward", "masked_conv2d")
