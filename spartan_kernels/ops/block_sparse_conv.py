"""Convolution with a packed block-sparse weight."""

from __future__ import annotations

from typing import Any

import torch

from spartan_kernels.arguments import memory_format, output_size, require_float
from spartan_kernels.block_sparse_filter import BlockSparseFilter
from spartan_kernels.operands import PackedConv, PackedConvBackward
from spartan_kernels.ops._define import define
from spartan_kernels.ops.masked_conv import pair, require_image
from spartan_kernels.ops.masked_matmul import in_autocast, require_bias
from spartan_kernels.torch_private import autocast_may_be_on


def _fake_forward(o: PackedConv) -> Any:
    shape = output_size(o.x.shape, (o.out, 0, *o.kernel), o.stride, o.padding, o.dilation)
    return o.x.new_empty(shape).to(memory_format=memory_format(o.x))


def _fake_backward(o: PackedConvBackward) -> Any:
    made = (
        torch.empty_like(o.x, memory_format=memory_format(o.x)),
        o.values.new_empty(o.values.shape),
        o.x.new_empty(o.grad.shape[1]),
    )
    return [part if need else o.x.new_empty(0) for part, need in zip(made, o.needs, strict=True)]


block_sparse_conv2d_forward = define("block_sparse_conv2d_forward", PackedConv, "Tensor", _fake_forward)
# -> gradients of x, values, bias; empty where not needed
block_sparse_conv2d_backward = define("block_sparse_conv2d_backward", PackedConvBackward, "Tensor[]", _fake_backward)


def block_sparse_conv2d(
    x: torch.Tensor,
    packed: BlockSparseFilter,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Convolution with a packed block-sparse weight, for inference and for masks that no longer change.

    y = conv(x, w) + b. The gradient for `packed.values` is dL/dw on the stored blocks. Only these are multiplied, with
    no im2col in memory, on the CPU and on GPUs; elsewhere PyTorch's own convolution takes the weight made of them.

    Args:
        x: [batch, in, height, width] or [in, height, width].
        packed: w, [out, in, kernel height, kernel width], dtype of `x`; under autocast both are cast, as in a
            convolution.
        bias: [out] or None.
        stride: pixels from one result to the next, an int or (height, width).
        padding: pixels of zeros around the image, an int or (height, width).
        dilation: pixels from one kernel position to the next, an int or (height, width).
        backend: "auto" or the name of a backend.

    Returns:
        y, [batch, out, ...], laid out in memory as x is; differentiable (once) in x, packed.values and bias once
        `spartan` is imported.

    Raises:
        TypeError: integer tensors, a weight that is not packed. ValueError: shapes, dtypes or devices that do not
            match, a stride or dilation that is not positive, a kernel larger than the padded image.
    """
    if not isinstance(packed, BlockSparseFilter):
        raise TypeError(f"packed must be a BlockSparseFilter; got {type(packed).__name__}")
    require_float("x", x)
    values = packed.values
    if autocast_may_be_on():
        x, values = in_autocast(x), in_autocast(values)
        bias = None if bias is None else in_autocast(bias)
    geometry = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
    require_image(x, packed.shape, 1, *geometry)
    if x.dtype != values.dtype or x.device != values.device:
        raise ValueError(
            f"x must be {values.dtype} on {values.device}, as the packed weight; got {x.dtype} on {x.device}"
        )
    out, index = packed.shape[0], (packed.matrix.layout.tensors(), packed.matrix.positions)
    require_bias(bias, x, out)
    batch = x if x.dim() == 4 else x[None]
    settings = *map(list, (packed.kernel_size, *geometry)), out, backend or ""
    y: torch.Tensor = block_sparse_conv2d_forward(PackedConv._make((batch, values, *index, bias, *settings)))
    return y if x.dim() == 4 else y[0]
