"""Product with a block-masked weight that stays dense in memory."""

from __future__ import annotations

from typing import Any

import torch

from spartan_kernels.arguments import block_shape, require_float
from spartan_kernels.ops._define import define
from spartan_kernels.ops.masked_weight import block_grid

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def _fake_forward(x: Any, weight: Any, *rest: Any) -> Any:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(
    grad: Any,
    x: Any,
    weight: Any,
    gate: Any,
    bias: Any,
    forward_mask: Any,
    backward_mask: Any,
    activation: str,
    rows: int,
    columns: int,
    needs: Any,
    backend: str,
) -> Any:
    like = (x, weight, gate, bias)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for t, need in zip(like, needs, strict=True)
    ]


masked_linear_forward = define(
    "masked_linear_forward(Tensor x, Tensor weight, Tensor gate, Tensor? bias, Tensor? forward_mask,"
    " Tensor? backward_mask, str activation, int rows, int columns, str backend) -> Tensor",
    _fake_forward,
)
# -> gradients of x, weight, gate, bias; empty where not needed
masked_linear_backward = define(
    "masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor gate, Tensor? bias, Tensor? forward_mask,"
    " Tensor? backward_mask, str activation, int rows, int columns, bool[] needs, str backend) -> Tensor[]",
    _fake_backward,
)


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    block_size: int | tuple[int, int] = (32, 32),
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    forward_mask: torch.Tensor | None = None,
    backward_mask: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Linear layer whose weight is scaled block by block; a block whose gate or mask is zero takes no part.

    y = act(x (theta * gate * forward_mask)^T + b). The gradient for x goes through that masked weight. With
    G = dL/dy' x (y' before the activation) the gradient for the weight is G * gate and for the gate the sum of
    G_i theta_i over the block, both on the blocks of `backward_mask` (None: all, also where gate or mask is zero).

    Args:
        x: [..., in_features].
        weight: theta, [out_features, in_features], dtype of `x`.
        gate: [ceil(out / rows), ceil(in / columns)], any floating dtype.
        block_size: an int or (rows, columns); shapes need not divide by it.
        bias: [out_features] or None.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu".
        forward_mask: bool, shape of `gate`; None for all blocks.
        backward_mask: bool, shape of `gate`; None for all blocks.
        backend: "auto" or the name of a backend.

    Returns:
        y, [..., out_features]; differentiable in x, weight, gate and bias under `spartan`.

    Raises:
        TypeError: integer tensors or masks that are not bool. ValueError: shapes, dtypes or devices that do not match,
            an unknown activation, a block size that is not positive.

    Source: Tai, Tian, Lim, "Spartan", NeurIPS 2022: its forward and straight-through backward, by blocks.
    """
    rows, columns = block_shape(block_size)
    for name, tensor in (("x", x), ("weight", weight), ("gate", gate)):
        require_float(name, tensor)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., in] and weight [out, in]; got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or len({t.device for t in (x, weight, gate)}) != 1:
        raise ValueError(
            f"x and weight must share a dtype, and all a device; got x {x.dtype} on {x.device}, weight"
            f" {weight.dtype} on {weight.device}, gate on {gate.device}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype} of shape ({weight.shape[0]},); got {bias.dtype} {tuple(bias.shape)}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    grid = block_grid(weight.shape, (rows, columns))
    for name, mask in (("gate", gate), ("forward_mask", forward_mask), ("backward_mask", backward_mask)):
        if mask is None:
            continue
        if name != "gate" and mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor; got dtype {mask.dtype}")
        if tuple(mask.shape) != grid:
            raise ValueError(
                f"{name} must have shape {grid}, one entry per ({rows}, {columns}) block of weight"
                f" {tuple(weight.shape)}; got {tuple(mask.shape)}"
            )
    return masked_linear_forward(
        x, weight, gate, bias, forward_mask, backward_mask, activation or "", rows, columns, backend or ""
    )
