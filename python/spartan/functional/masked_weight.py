"""Gradient of the masked weight."""

from __future__ import annotations

from typing import Any

import torch

from spartan.functional.autograd import differentiable, differentiable_once, saved_number
from spartan_kernels.operands import MaskedWeight, MaskedWeightBackward
from spartan_kernels.ops import masked_weight
from spartan_kernels.ops.masked_weight import masked_weight_backward

__all__ = ["masked_weight"]


def _setup(ctx: Any, o: MaskedWeight, output: Any) -> None:
    (beta, ctx.beta), (costs, ctx.costs) = saved_number(o.beta), saved_number(o.costs)
    ctx.save_for_backward(o.weight, o.soft, o.hard, beta, costs)
    ctx.settings = o.rows, o.columns, o.straight_through, o.backend


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    weight, soft, hard, beta, costs = ctx.saved_tensors
    beta, costs = ctx.beta if beta is None else beta, ctx.costs if costs is None else costs
    return [masked_weight_backward(MaskedWeightBackward(grad, weight, soft, hard, beta, costs, *ctx.settings))]


differentiable("masked_weight_forward", ("weight",), _setup, _backward)
differentiable_once("masked_weight_backward", "masked_weight")
