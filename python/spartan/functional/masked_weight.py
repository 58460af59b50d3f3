"""Gradient of the masked weight."""

from __future__ import annotations

from typing import Any

import torch

from spartan.functional.autograd import differentiable, differentiable_once
from spartan_kernels.operands import MaskedWeight, MaskedWeightBackward
from spartan_kernels.ops import masked_weight
from spartan_kernels.ops.masked_weight import masked_weight_backward

__all__ = ["masked_weight"]


def _setup(ctx: Any, o: MaskedWeight, output: Any) -> None:
    ctx.save_for_backward(o.weight, o.soft, o.hard, o.beta, o.costs)
    ctx.settings = {name: getattr(o, name) for name in ("rows", "columns", "straight_through", "backend")}


def _backward(ctx: Any, grad: torch.Tensor) -> dict[str, Any]:
    weight, soft, hard, beta, costs = ctx.saved_tensors
    return {
        "weight": masked_weight_backward(*MaskedWeightBackward(grad, weight, soft, hard, beta, costs, **ctx.settings))
    }


differentiable("masked_weight_forward", _setup, _backward)
differentiable_once("masked_weight_backward", "masked_weight")
