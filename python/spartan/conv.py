"""Convolution with a block-sparse weight as people import it: with gradients."""

from __future__ import annotations

from typing import Any

import torch

from spartan._autograd import differentiable, differentiable_once
from spartan_kernels.ops import expand_blocks, masked_conv2d
from spartan_kernels.ops.masked_conv import masked_conv2d_backward

__all__ = ["gate_of_weight", "masked_conv2d"]


def gate_of_weight(
    weight: torch.Tensor, gate: torch.Tensor, slope: torch.Tensor, block_size: tuple[int, int]
) -> torch.Tensor:
    """`gate` as a function of the weight that it was solved from: dgate_b/dtheta_i = slope_b sign(theta_i).

    Args:
        weight: theta, [out, in, ...].
        gate: one per block.
        slope: one per block.
        block_size: (rows, columns).
    """
    result: torch.Tensor = _GateOfWeight.apply(weight, gate, slope, *block_size)
    return result


class _GateOfWeight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: torch.Tensor, gate: torch.Tensor, slope: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return gate.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[2])
        ctx.block_size = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, slope = ctx.saved_tensors
        pull = (slope * grad).to(weight.dtype)
        return torch.sign(weight) * expand_blocks(pull, weight.shape, ctx.block_size), *[None] * 4


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
