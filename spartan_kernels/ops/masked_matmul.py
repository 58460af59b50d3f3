"""Products with block-masked matrices that stay dense in memory: a masked linear layer, a sampled product."""

from __future__ import annotations

from typing import Any

import torch

from spartan_kernels import dispatch
from spartan_kernels.arguments import block_shape, clip_block, require_device, require_float
from spartan_kernels.break_even import dense_above
from spartan_kernels.layout import BlockLayout, require_mask
from spartan_kernels.operands import AddBlockSigns, BlockLayoutOf, MaskedLinear, MaskedLinearBackward, SampledMatmul
from spartan_kernels.ops._define import define
from spartan_kernels.torch_private import autocast_may_be_on

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
SAVES_INPUT = ("gelu", "gelu_tanh", "silu")  # activations whose gradient is of what went in; relu's is of what came out


def _fake_layout(o: BlockLayoutOf) -> tuple[torch.Tensor, ...]:
    rows, columns = o.gate.shape
    lengths = (rows + 1, rows * columns, columns + 1, rows * columns, rows + columns)
    return tuple(o.gate.new_empty(n, dtype=torch.int32) for n in lengths)


def _fake_forward(o: MaskedLinear) -> Any:
    shape = (*o.x.shape[:-1], o.weight.shape[0])
    return o.x.new_empty(shape), o.x.new_empty(shape if o.save else 0)


def _fake_backward(o: MaskedLinearBackward) -> Any:
    shapes = ((*o.grad.shape[:-1], o.weight.shape[1]), o.weight.shape, o.gate.shape, o.weight.shape[:1])
    dtypes = (o.grad.dtype, o.grad.dtype, o.gate.dtype, o.grad.dtype)
    return [
        o.grad.new_empty(shape, dtype=dtype) if need else o.grad.new_empty(0)
        for shape, dtype, need in zip(shapes, dtypes, o.needs, strict=True)
    ]


def _fake_sampled(o: SampledMatmul) -> torch.Tensor:
    return o.a.new_empty((o.a.shape[0], o.b.shape[1]))


def _serve_forward(o: MaskedLinear) -> Any:
    name, o = _serving("masked_linear_forward", o)
    return dispatch.implementation("masked_linear_forward", name)(o)


def _serve_backward(o: MaskedLinearBackward) -> Any:
    name, o = _serving("masked_linear_backward", o)
    function = dispatch.implementation("masked_linear_backward", name)
    of_x, of_weight, of_gate, of_bias = o.needs
    if o.slope is None or not of_weight or name in _FOLLOW_SLOPE:
        return function(o)
    grads = function(o._replace(needs=[of_x, of_weight, True, of_bias]))
    named = dispatch.requested(o.backend)
    signs = named if named in dispatch.SUPPORT["add_block_signs_"] else "auto"  # not every backend adds them
    add = dispatch.resolve("add_block_signs_", o.weight, signs)
    add(AddBlockSigns(grads[1], o.weight, o.slope * grads[2], o.rows, o.columns))
    if not of_gate:
        grads[2] = None
    return grads


def _serving(operator: str, o: Any) -> tuple[str, Any]:
    """The backend and the operands as it takes them, with an index where it needs one.

    In "auto" that is the dense product where so many blocks are active that it is faster.
    """
    name = dispatch.requested(o.backend)
    if name == "auto":
        limit = dense_above(o.x.device, o.x.dtype, (o.rows, o.columns), o.x.shape[:-1].numel())
        if limit < 1 and _density(o) > limit:
            return "reference", o
    name = dispatch.select(operator, o.x.device.type, o.x.dtype, name)
    if not o.layout and name not in _INDEX_BLOCKS:
        o = o._replace(layout=list(block_layout(BlockLayoutOf(o.gate.detach(), None, o.backend))))
    return name, o


_FOLLOW_SLOPE = ("native",)  # backends that add what a gate which follows the weight brings its gradient
_INDEX_BLOCKS = ("native", "reference")  # backends that find the active blocks themselves


def _density(o: MaskedLinear | MaskedLinearBackward) -> float:
    """Active blocks / blocks where reading it waits for nothing; else -inf, for unknown."""
    blocks = o.gate.numel()
    if o.density >= 0:
        return o.density
    if not o.gate.is_cpu or not blocks or o.gate.dtype == torch.bool:
        return -torch.inf
    return (int(o.layout[0][-1]) if o.layout else int(o.gate.count_nonzero())) / blocks


block_layout = define("block_layout", BlockLayoutOf, "(Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_layout)
masked_linear_forward = define(
    "masked_linear_forward", MaskedLinear, "(Tensor, Tensor)", _fake_forward, serve=_serve_forward
)
# -> gradients of x, weight, gate, bias; empty where not needed
masked_linear_backward = define(
    "masked_linear_backward", MaskedLinearBackward, "Tensor[]", _fake_backward, serve=_serve_backward
)
sampled_matmul_forward = define("sampled_matmul_forward", SampledMatmul, "Tensor", _fake_sampled)


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
    layout: BlockLayout | None = None,
    backward_layout: BlockLayout | None = None,
    slope: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Linear layer whose weight is scaled block by block; a block whose gate or mask is zero takes no part.

    y = act(x (theta * gate * forward_mask)^T + b). The gradient for x goes through that masked weight. With
    G = dL/dz^T x (z before the activation) the gradient for the weight is G * gate and for the gate the sum of
    G_i theta_i over the block, both on the blocks of `backward_mask` (None: all, also where gate or mask is zero).

    Args:
        x: [..., in_features].
        weight: theta, [out_features, in_features], dtype of `x`; under autocast both are cast, as in a linear layer.
        gate: [ceil(out / rows), ceil(in / columns)], any floating dtype.
        block_size: an int or (rows, columns); shapes need not divide by it.
        bias: [out_features] or None.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu".
        forward_mask: bool, shape of `gate`; None for all blocks.
        backward_mask: bool, shape of `gate`; None for all blocks.
        layout: the blocks to multiply, in place of those where gate and forward_mask are not zero.
        backward_layout: the blocks that get a gradient, in place of backward_mask.
        slope: shape of `gate`, for a gate that follows the weight with dgate_b/dtheta_i = slope_b sign(theta_i), as a
            soft top-k of block magnitudes does: the weight's gradient gets slope_b sign(theta_i) times the gate's too.
            A constant itself.
        backend: "auto" or the name of a backend. "auto" multiplies densely where that is faster: see `spartan.tune`.

    Returns:
        y, [..., out_features]; differentiable (once) in x, weight, gate and bias once `spartan` is imported.

    Raises:
        TypeError: integer tensors or masks that are not bool. ValueError: shapes, dtypes or devices that do not match,
            an unknown activation, a block size that is not positive, a layout beside the mask that it replaces.

    Source: Tai, Tian, Lim, "Spartan", NeurIPS 2022: its forward and straight-through backward, by blocks.
    """
    block = rows, columns = block_shape(block_size)
    require_float("gate", gate)
    x, weight, bias = linear_operands(x, weight, bias, activation)
    device = weight.device
    require_device("gate", gate, device, "weight")
    shape = out, in_ = weight.shape[0], weight.shape[1]
    grid = (-(-out // rows), -(-in_ // columns))
    if gate.shape != grid:
        raise ValueError(
            f"gate must have shape {grid}, one entry per {block} block of weight {shape}; got {tuple(gate.shape)}"
        )
    for name, mask in (("forward_mask", forward_mask), ("backward_mask", backward_mask)):
        if mask is not None:
            require_mask(name, mask, weight, shape, block)
    if layout is not None:
        if forward_mask is not None:
            raise ValueError("forward_mask must be None with a layout, which says itself what blocks are multiplied")
        require_layout("layout", layout, shape, block, device)
    elif forward_mask is not None or device.type != "cpu":  # on a CPU the product finds the gates that are not zero
        layout = BlockLayout.from_gate(gate, shape, block, forward_mask, backend=backend)
    if backward_layout is not None:
        if backward_mask is not None:
            raise ValueError("backward_mask must be None with a backward_layout, which says itself what it would say")
        require_layout("backward_layout", backward_layout, shape, block, device)
    if slope is not None:
        if (slope.shape, slope.device) != (gate.shape, gate.device):
            raise ValueError(
                f"slope must have shape {tuple(gate.shape)} on {gate.device}, as gate; got {tuple(slope.shape)} on"
                f" {slope.device}"
            )
        slope = slope.detach()
    learns = torch.is_grad_enabled() and (weight.requires_grad or gate.requires_grad)
    if learns and backward_mask is not None:
        backward_layout = BlockLayout.from_gate(backward_mask, shape, block, backend=backend)
    index, backward = ([] if known is None else known.tensors() for known in (layout, backward_layout))
    o = MaskedLinear(
        x,
        weight,
        gate,
        index,
        [] if not learns else index if backward_layout is layout else backward,
        bias,
        activation or "",
        *clip_block(block, shape),
        activation in SAVES_INPUT and records(x, weight, gate, bias),
        -1.0 if layout is None or layout.density is None else layout.density,
        slope,
        backend or "",
    )
    result: torch.Tensor = masked_linear_forward(o)[0]
    return result


def sampled_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    mask: torch.Tensor | None,
    block_size: int | tuple[int, int] = (32, 32),
    *,
    layout: BlockLayout | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Product of two dense matrices at the active blocks of the result; zero elsewhere, where nothing is computed.

    c = (a b) * mask by blocks. With G = dL/dc on the active blocks: dL/da = G b^T, dL/db = a^T G.

    Args:
        a: [m, k].
        b: [k, n], dtype of `a`.
        mask: float (what is not zero counts) or bool, [ceil(m / rows), ceil(n / columns)]; None with a layout.
        block_size: an int or (rows, columns) of the result.
        layout: the active blocks, in place of a mask.
        backend: "auto" or the name of a backend.

    Returns:
        c, [m, n], dtype of `a`; differentiable (once) in a and b once `spartan` is imported.

    Raises:
        TypeError: integer tensors. ValueError: shapes, dtypes or devices that do not match, a block size that is not
            positive, both or neither of mask and layout.
    """
    rows, columns = block_shape(block_size)
    require_float("a", a)
    require_float("b", b)
    if autocast_may_be_on():
        a, b = in_autocast(a), in_autocast(b)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a must be [m, k] and b [k, n]; got a {tuple(a.shape)} and b {tuple(b.shape)}")
    if (a.dtype, a.device) != (b.dtype, b.device):
        raise ValueError(f"b must be {a.dtype} on {a.device}, as a; got {b.dtype} on {b.device}")
    shape = (a.shape[0], b.shape[1])
    if (mask is None) == (layout is None):
        raise ValueError("one of mask and layout says which blocks are computed; got both or neither")
    if layout is None:
        assert mask is not None
        require_device("mask", mask, a.device, "a")
        layout = BlockLayout.from_gate(mask, shape, (rows, columns), backend=backend)
    require_layout("layout", layout, shape, (rows, columns), a.device)
    rows, columns = clip_block((rows, columns), shape)
    product: torch.Tensor = sampled_matmul_forward(SampledMatmul(a, b, layout.tensors(), rows, columns, backend or ""))
    return product


def linear_operands(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What a linear layer takes, checked, in the dtype that autocast wants."""
    require_float("x", x)
    require_float("weight", weight)
    if autocast_may_be_on():
        x, weight = in_autocast(x), in_autocast(weight)
        bias = None if bias is None else in_autocast(bias)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., in] and weight [out, in]; got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"x and weight must share a dtype and a device; got x {x.dtype} on {x.device}, weight {weight.dtype} on"
            f" {weight.device}"
        )
    require_bias(bias, x, weight.shape[0])
    require_activation(activation)
    return x, weight, bias


def require_bias(bias: torch.Tensor | None, x: torch.Tensor, out: int) -> None:
    """Raise unless `bias` is None or fits `out` features of the dtype and on the device of `x`."""
    if bias is not None and (tuple(bias.shape) != (out,) or (bias.dtype, bias.device) != (x.dtype, x.device)):
        raise ValueError(
            f"bias must be {x.dtype} of shape ({out},) on {x.device}; got {bias.dtype} {tuple(bias.shape)} on"
            f" {bias.device}"
        )


def require_activation(activation: str | None) -> None:
    """Raise unless `activation` is None or a known name."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def require_layout(
    name: str, layout: BlockLayout, shape: tuple[int, int], block_size: tuple[int, int], device: torch.device
) -> None:
    """Raise unless the layout is of this shape and block size, on this device."""
    if layout.shape != shape or layout.block_size != block_size or layout.row_offsets.device != device:
        raise ValueError(
            f"{name} must be of shape {shape} in blocks of {block_size} on {device}; got {layout.shape} in blocks of"
            f" {layout.block_size} on {layout.device}"
        )


def in_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of the autocast region, as matrix products take it; float64 stays."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def records(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd wants a gradient of one of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
