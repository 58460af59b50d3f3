"""Gradients of the convolution with a block-sparse weight, and of a gate that follows its weight."""

from __future__ import annotations

from typing import Any

import torch

from spartan.functional.autograd import differentiable, differentiable_once, needed
from spartan_kernels.operands import MaskedConv, MaskedConvBackward
from spartan_kernels.ops import expand_blocks, masked_conv2d
from spartan_kernels.ops.masked_conv import masked_conv2d_backward

__all__ = ["gate_of_weight", "masked_conv2d"]

_SETTINGS = ("stride", "padding", "dilation", "groups", "rows", "columns", "backend")


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
        weight, _, slope, *ctx.block_size = inputs
        ctx.save_for_backward(weight, slope)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, slope = ctx.saved_tensors
        pull = (slope * grad).to(weight.dtype)
        of_weight = torch.sign(weight) * expand_blocks(pull, weight.shape, tuple(ctx.block_size))
        return of_weight, None, None, None, None


def _setup(ctx: Any, o: MaskedConv, output: Any) -> None:
    ctx.save_for_backward(o.x, o.weight, o.gate, o.forward_mask, o.backward_mask)
    ctx.settings = {name: getattr(o, name) for name in _SETTINGS}


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, weight, gate, forward_mask, backward_mask = ctx.saved_tensors
    needs = list(ctx.needs)
    o = MaskedConvBackward(grad, x, weight, gate, forward_mask, backward_mask, needs=needs, **ctx.settings)
    return needed(ctx.needs, masked_conv2d_backward(o))


differentiable("masked_conv2d_forward", ("x", "weight", "gate", "bias"), _setup, _backward)
differentiable_once("masked_conv2d_backward", "masked_conv2d")
