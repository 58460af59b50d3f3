"""Convolution with a weight that is masked by blocks and stays dense in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spartan_kernels import dispatch
from spartan_kernels.arguments import (
    block_grid,
    block_shape,
    clip_block,
    memory_format,
    output_size,
    require_device,
    require_float,
)
from spartan_kernels.break_even import dense_convolution_on_gpu, dense_convolution_wins
from spartan_kernels.operands import MaskedConv, MaskedConvBackward, MaskedWeight
from spartan_kernels.ops._define import define
from spartan_kernels.ops.masked_matmul import in_autocast, require_bias
from spartan_kernels.torch_private import transforms_active


def _fake_forward(o: MaskedConv) -> Any:
    shape = output_size(o.x.shape, o.weight.shape, o.stride, o.padding, o.dilation)
    return o.x.new_empty(shape).to(memory_format=memory_format(o.x))


def _fake_backward(o: MaskedConvBackward) -> Any:
    plain = torch.contiguous_format
    like = (o.x, memory_format(o.x)), (o.weight, plain), (o.gate, plain), (o.x.new_empty(o.weight.shape[0]), plain)
    return [
        torch.empty_like(tensor, memory_format=layout) if need else o.x.new_empty(0)
        for (tensor, layout), need in zip(like, o.needs, strict=True)
    ]


def _serve_forward(o: MaskedConv) -> Any:
    function = _dense_forward if _goes_dense(o, o.rows) else dispatch.resolve("masked_conv2d_forward", o.x, o.backend)
    return function(o).contiguous(memory_format=memory_format(o.x))


def _serve_backward(o: MaskedConvBackward) -> Any:
    dense = _goes_dense(o, o.columns)
    function = _dense_backward if dense else dispatch.resolve("masked_conv2d_backward", o.x, o.backend)
    dx, *others = function(o)
    if dx is not None and dx.numel():
        dx = dx.contiguous(memory_format=memory_format(o.x))
    return [dx, *others]


def _goes_dense(o: MaskedConv | MaskedConvBackward, side: int) -> bool:
    """In "auto", whether PyTorch's own convolution takes the masked weight: for groups and where that is faster."""
    if dispatch.requested(o.backend) != "auto":
        return False
    return o.groups != 1 or dense_wins(o.x, o.weight, o.gate, side, o.forward_mask)


def _dense_forward(o: MaskedConv) -> Any:
    masked = _gated(o.weight, _active(o.gate, o.forward_mask), o)
    return torch.conv2d(o.x, masked, o.bias, o.stride, o.padding, o.dilation, o.groups)


def _dense_backward(o: MaskedConvBackward) -> Any:
    of_x, of_weight, of_gate, of_bias = o.needs
    if of_gate:  # sums over blocks
        return dispatch.implementation("masked_conv2d_backward", "reference")(o)
    masked = _gated(o.weight, _active(o.gate, o.forward_mask), o) if of_x else o.weight
    wanted, geometry = [of_x, of_weight, of_bias], (o.stride, o.padding, o.dilation, False, [0, 0], o.groups)
    dx, dense, dbias = torch.ops.aten.convolution_backward(o.grad, o.x, masked, [o.weight.shape[0]], *geometry, wanted)
    if of_weight:
        dense = _gated(dense.contiguous(), o.backward_mask, o)
    empty = o.x.new_empty(0)
    return [part if need else empty for part, need in zip((dx, dense, empty, dbias), o.needs, strict=True)]


def _gated(weight: torch.Tensor, mask: torch.Tensor | None, o: MaskedConv | MaskedConvBackward) -> Any:
    """weight * gate by blocks, on the fastest backend; zero where the mask is not set, whatever the weight is."""
    gate = o.gate.to(torch.promote_types(weight.dtype, torch.float32))
    unused = gate.new_ones(())  # what a gradient would take
    name = "reference" if transforms_active() else "auto"
    function = dispatch.resolve("masked_weight_forward", weight, name)
    return function(MaskedWeight(weight, gate, mask, unused, unused, o.rows, o.columns, True))


def _active(gate: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return gate != 0 if mask is None else (gate != 0) & mask


def dense_wins(
    x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, side: int, mask: torch.Tensor | None = None
) -> bool:
    """Whether PyTorch's own convolution with the masked weight is the faster one; False where that cannot be seen.

    `side`: outputs of a block, as `break_even.dense_convolution_wins` takes it.
    """
    if not weight.numel() or transforms_active():
        return False
    if x.device.type != "cpu":
        return x.device.type == "cuda" and dense_convolution_on_gpu(side)
    active = int(torch.count_nonzero(_active(gate, mask)))
    return dense_convolution_wins(x, weight, active / gate.numel(), side)


# backward_mask is there for the gradient alone
masked_conv2d_forward = define("masked_conv2d_forward", MaskedConv, "Tensor", _fake_forward, serve=_serve_forward)
# -> gradients of x, weight, gate, bias; empty where not needed
masked_conv2d_backward = define(
    "masked_conv2d_backward", MaskedConvBackward, "Tensor[]", _fake_backward, serve=_serve_backward
)


def masked_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    block_size: int | tuple[int, int] = (32, 32),
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    forward_mask: torch.Tensor | None = None,
    backward_mask: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Convolution whose weight is scaled block by block; a block whose gate or mask is zero takes no part.

    y = conv(x, w) + b, w = theta * gate * forward_mask by blocks of the channels; each kernel position has blocks of
    its own. With G = dL/dw, the gradients are G * gate * backward_mask for the weight and the sum over a block of
    G * theta * backward_mask for its gate: straight through the forward mask, as in `masked_linear`.

    Only the active blocks are multiplied, with no im2col in memory: on the CPU where few enough are active, on a GPU
    where blocks have at least 16 outputs (in channels for the gradient of x). Elsewhere, and for groups other than 1,
    PyTorch's own convolution takes the masked weight.

    Args:
        x: [batch, in, height, width] or [in, height, width].
        weight: theta, [out, in / groups, kernel height, kernel width], dtype and device of `x`.
        gate: [ceil(out / rows), ceil(in / groups / columns), kernel height, kernel width], any float dtype. NaN is
            multiplied.
        block_size: an int or (rows, columns), of out and in channels.
        bias: [out] or None.
        stride: pixels from one result to the next, an int or (height, width).
        padding: pixels of zeros around the image, an int or (height, width).
        dilation: pixels from one kernel position to the next, an int or (height, width).
        groups: groups of channels.
        forward_mask: bool, shape of `gate`, for y and the gradient of x; None for all blocks.
        backward_mask: bool, shape of `gate`, for the gradients of weight and gate; None for all blocks.
        backend: "auto" or the name of a backend.

    Returns:
        y, [batch, out, ...], laid out in memory as x is; differentiable (once) in x, weight, gate and bias once
        `spartan` is imported.

    Raises:
        TypeError: integer tensors, a mask that is not bool. ValueError: shapes, dtypes or devices that do not match, a
            block size, stride or dilation that is not positive, a kernel larger than the padded image.
    """
    rows, columns = block_shape(block_size)
    require_float("x", x)
    require_float("weight", weight)
    x, weight = in_autocast(x), in_autocast(weight)
    bias = None if bias is None else in_autocast(bias)
    geometry = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
    require_image(x, weight.shape, groups, *geometry)
    if (x.dtype, x.device) != (weight.dtype, weight.device):
        raise ValueError(
            f"x and weight must share a dtype and a device; got x {x.dtype} on {x.device}, weight {weight.dtype} on"
            f" {weight.device}"
        )
    require_bias(bias, x, weight.shape[0])
    require_float("gate", gate)
    for name, grid in (("gate", gate), ("forward_mask", forward_mask), ("backward_mask", backward_mask)):
        if grid is not None:
            _require_grid(name, grid, weight, (rows, columns))
            require_device(name, grid, weight.device, "weight")
    rows, columns = clip_block((rows, columns), weight.shape)
    batch = x if x.dim() == 4 else x[None]
    settings = *map(list, geometry), groups, rows, columns, backend or ""
    o = MaskedConv._make((batch, weight, gate, forward_mask, backward_mask, bias, *settings))
    y: torch.Tensor = masked_conv2d_forward(o)
    return y if x.dim() == 4 else y[0]


def pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    """(height, width) from an int or both.

    Raises:
        ValueError: another number of ints, or one that is smaller than `least`.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= least for side in pair):
        raise ValueError(f"{name} must be an int of at least {least} or a pair of them; got {value!r}")
    return pair[0], pair[1]


def require_image(
    x: torch.Tensor,
    weight: Sequence[int],
    groups: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    """Raise unless the convolution of x with a weight of this shape is defined."""
    if len(weight) != 4 or x.dim() not in (3, 4) or 0 in weight[2:]:
        raise ValueError(
            f"x must be [batch, in, height, width] or [in, height, width] and weight [out, in, height, width];"
            f" got x {tuple(x.shape)} and weight {tuple(weight)}"
        )
    if not isinstance(groups, int) or groups < 1 or weight[0] % groups:
        raise ValueError(f"groups must be a positive int that divides out = {weight[0]}; got {groups!r}")
    if x.shape[-3] != weight[1] * groups:
        raise ValueError(
            f"x must have {weight[1] * groups} channels for weight {tuple(weight)} and groups {groups};"
            f" got x {tuple(x.shape)}"
        )
    size = output_size((1, 0, *x.shape[-2:]), weight, stride, padding, dilation)[2:]
    if min(size) < 1:
        raise ValueError(
            f"weight {tuple(weight)} with dilation {dilation} must fit into x {tuple(x.shape)} with padding {padding}"
        )


def _require_grid(name: str, grid: torch.Tensor, weight: torch.Tensor, block_size: tuple[int, int]) -> None:
    """Raise unless `grid` has one entry for each block of `weight`, on its device; bool where it is a mask."""
    if name != "gate" and (not isinstance(grid, torch.Tensor) or grid.dtype != torch.bool):
        found = f"dtype {grid.dtype}" if isinstance(grid, torch.Tensor) else type(grid).__name__
        raise TypeError(f"{name} must be a bool tensor; got {found}")
    shape = (*block_grid(weight.shape[:2], block_size), *weight.shape[2:])
    if tuple(grid.shape) != shape or grid.device != weight.device:
        raise ValueError(
            f"{name} must have shape {shape}, one entry per {block_size} block of each kernel position of weight"
            f" {tuple(weight.shape)}, on {weight.device}; got {tuple(grid.shape)} on {grid.device}"
        )
