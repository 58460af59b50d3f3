"""Product with a packed block-sparse weight."""

from __future__ import annotations

from typing import Any

import torch

from spartan_kernels.arguments import require_float
from spartan_kernels.block_sparse import BlockSparseWeight
from spartan_kernels.operands import Float8Linear, PackedLinear, PackedLinearBackward
from spartan_kernels.ops._define import define
from spartan_kernels.ops.masked_matmul import (
    SAVES_INPUT,
    in_autocast,
    records,
    require_activation,
    require_bias,
)
from spartan_kernels.torch_private import autocast_may_be_on


def _fake_forward(o: PackedLinear) -> Any:
    shape = (*o.x.shape[:-1], o.out)
    return o.x.new_empty(shape), o.x.new_empty(shape if o.save else 0)


def _fake_float8(o: Float8Linear) -> Any:
    return o.x.new_empty((*o.x.shape[:-1], o.out))


def _fake_backward(o: PackedLinearBackward) -> Any:
    shapes = (o.x.shape, o.values.shape, o.grad.shape[-1:])
    return [o.x.new_empty(shape if need else 0) for shape, need in zip(shapes, o.needs, strict=True)]


block_sparse_linear_forward = define("block_sparse_linear_forward", PackedLinear, "(Tensor, Tensor)", _fake_forward)
# -> gradients of x, values, bias; empty where not needed
block_sparse_linear_backward = define("block_sparse_linear_backward", PackedLinearBackward, "Tensor[]", _fake_backward)

block_sparse_linear_float8_forward = define("block_sparse_linear_float8_forward", Float8Linear, "Tensor", _fake_float8)
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)  # what is rounded to 8 bits


def block_sparse_linear(
    x: torch.Tensor,
    packed: BlockSparseWeight,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Linear layer with a packed block-sparse weight, for inference and for masks that no longer change.

    y = act(x w^T + b). With G = dL/dz^T x (z before the activation), the gradient for `packed.values` is G on the
    stored blocks.

    With a weight in 8 bits (`packed.to_float8()`), each token is divided by s_x = its largest magnitude / 448 and
    rounded to float8 too: y = act(s_x s_w (x8 w8^T) + b), summed in float32. There is no gradient. A token that holds
    NaN or infinity, which float8 has not, gives NaN in all outputs.

    Args:
        x: [..., in_features]; with a weight in 8 bits float32, bfloat16 or float16.
        packed: w, [out_features, in_features], dtype of `x` or in 8 bits; under autocast `x`, `bias` and a weight of
            more bits are cast, as in a linear layer.
        bias: [out_features] or None.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu".
        backend: "auto" or the name of a backend.

    Returns:
        y, [..., out_features], in the dtype of `x`; differentiable (once) in x, packed.values and bias once `spartan`
        is imported.

    Raises:
        TypeError: integer tensors, a weight that is not packed. ValueError: shapes, dtypes or devices that do not
            match, an unknown activation. RuntimeError: a gradient through a weight in 8 bits.
    """
    if not isinstance(packed, BlockSparseWeight):
        raise TypeError(f"packed must be a BlockSparseWeight; got {type(packed).__name__}")
    require_float("x", x)
    layout, values, scales = packed.layout, packed.values, packed.scales
    out, in_ = layout.shape
    if autocast_may_be_on():
        x, values = in_autocast(x), values if scales is not None else in_autocast(values)
        bias = None if bias is None else in_autocast(bias)
    if x.dim() < 1 or x.shape[-1] != in_:
        raise ValueError(f"x must be [..., {in_}] for a packed weight {packed.shape}; got {tuple(x.shape)}")
    allowed = (values.dtype,) if scales is None else _ROUNDED
    if x.dtype not in allowed or x.device != values.device:
        raise ValueError(
            f"x must be {' or '.join(map(str, allowed))} on {values.device}, for a packed weight of {values.dtype};"
            f" got {x.dtype} on {x.device}"
        )
    require_bias(bias, x, out)
    require_activation(activation)
    if scales is not None:
        if tuple(scales.shape) != (out, 1):
            raise ValueError(
                f"packed must have the scales of its outputs, of shape ({out}, 1); got {tuple(scales.shape)}"
            )
        index = layout.tensors(), packed.positions
        found: torch.Tensor = block_sparse_linear_float8_forward(
            Float8Linear(x, values, scales, *index, bias, activation or "", out, backend or "")
        )
        return found
    save = activation in SAVES_INPUT and records(x, values, bias)
    o = PackedLinear(x, values, layout.tensors(), packed.positions, bias, activation or "", out, save, backend or "")
    result: torch.Tensor = block_sparse_linear_forward(o)[0]
    return result
