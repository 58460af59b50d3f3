"""The operands of the raw operators, checked before a backend sees them: with SPARTAN_CHECK_OPERANDS=1.

`torch.ops.spartan.*` are private. The public functions check what they are given; the operators trust it, for a check
at every layer would cost more than a small product. The tests run with the checks on, and so can a program that calls
the operators itself: a wrong operand is then an error with its name, not memory read out of place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from spartan_kernels.arguments import block_grid, inspectable
from spartan_kernels.float8 import FLOAT8
from spartan_kernels.layout import INDEX, active_blocks, longest_first
from spartan_kernels.operands import (
    AddBlockSigns,
    BlockLayoutOf,
    Float8Linear,
    HardTopkGlobal,
    HardTopkIndices,
    KeptSoftMass,
    MaskedConv,
    MaskedConvBackward,
    MaskedLinear,
    MaskedLinearBackward,
    MaskedWeight,
    MaskedWeightBackward,
    MaskedWeightCorrection,
    MaskedWeightCoupling,
    PackedConv,
    PackedConvBackward,
    PackedLinear,
    PackedLinearBackward,
    SampledMatmul,
    SoftTopkBackward,
    SoftTopkGlobal,
    SoftTopkGlobalBackward,
    SolveMasks,
)
from spartan_kernels.solution import is_solution

__all__ = ["CHECKS", "checked"]

enabled = os.environ.get("SPARTAN_CHECK_OPERANDS", "") not in ("", "0")
_FLOAT = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")


def checked(name: str, serve: Callable[..., Any]) -> Callable[..., Any]:
    """`serve` behind the check of its operands, where that is switched on."""
    if not enabled:
        return serve

    @wraps(serve)
    def call(o: Any) -> Any:
        try:
            if enabled:
                CHECKS[name](o)
        except ValueError as error:
            raise ValueError(f"torch.ops.spartan.{name}: {error}") from None
        return serve(o)

    return call


def _tensor(
    name: str, tensor: Any, shape: Sequence[Any] | None, dtypes: Any, device: torch.device | None = None
) -> None:
    """Raise unless `tensor` has this shape, where one is given, one of these dtypes and, where given, this device."""
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    fits = tensor.dtype in dtypes and (shape is None or tuple(tensor.shape) == tuple(shape))
    if not fits or tensor.device != (tensor.device if device is None else device):
        allowed = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{name} must be {allowed} of shape {'any' if shape is None else tuple(shape)} on {device or 'any device'};"
            f" got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )


def _number(name: str, value: int, least: int) -> None:
    if value < least or value >= 1 << 31:
        raise ValueError(f"{name} must be in [{least}, 2^31); got {value}")


def _length(name: str, found: Sequence[Any], *allowed: int) -> None:
    if len(found) not in allowed:
        raise ValueError(f"{name} must hold {' or '.join(map(str, allowed))} entries; got {len(found)}")


def _activation(activation: str) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {_ACTIVATIONS}; got {activation!r}")


def _blocks(weight: torch.Tensor, rows: int, columns: int, name: str = "weight") -> tuple[int, ...]:
    """The grid of a weight's blocks."""
    _tensor(name, weight, None, _FLOAT)
    _number("rows", rows, 1)
    _number("columns", columns, 1)
    return block_grid(weight.shape, (rows, columns))


def _scalar(name: str, tensor: torch.Tensor | float, device: torch.device) -> None:
    if not isinstance(tensor, float):  # which an operator takes in place of a tensor (`operands.as_declared`)
        _tensor(name, tensor, (), torch.float64, device)


# --- masked weights


def _masks(weight: Any, soft: Any, hard: Any, grid: Any) -> None:
    if soft is not None and is_solution(soft, weight) and weight.shape == grid:
        _tensor("soft", soft, (2,), torch.float64, weight.device)
    elif soft is not None:
        _tensor("soft", soft, grid, _FLOAT, weight.device)
    if hard is not None:
        _tensor("hard", hard, grid, torch.bool, weight.device)


def _masked_weight(o: MaskedWeight | MaskedWeightBackward) -> None:
    grid = _blocks(o.weight, o.rows, o.columns)
    _masks(o.weight, o.soft, o.hard, grid)
    _prices(o.beta, o.costs, grid, o.weight.device)


def _prices(beta: Any, costs: Any, grid: Any, device: torch.device) -> None:
    _scalar("beta", beta, device)
    if not isinstance(costs, float):
        _tensor("costs", costs, grid if costs.dim() else (), _FLOAT, device)


def _gradient(grad: Any, weight: Any) -> None:
    _tensor("grad", grad, weight.shape, _FLOAT, weight.device)


def _masked_weight_backward(o: MaskedWeightBackward) -> None:
    _masked_weight(o)
    _gradient(o.grad, o.weight)


def _coupling(o: MaskedWeightCoupling) -> None:
    grid = _blocks(o.weight, o.rows, o.columns)
    _masks(o.weight, o.soft, None, grid)
    _prices(o.beta, o.costs, grid, o.weight.device)
    _gradient(o.grad, o.weight)


def _correct(o: MaskedWeightCorrection) -> None:
    grid = _blocks(o.weight, o.rows, o.columns)
    _masks(o.weight, o.soft, None, grid)
    _prices(o.beta, o.costs, grid, o.weight.device)
    _gradient(o.grad, o.weight)
    _scalar("scale", o.scale, o.weight.device)


def _kept(o: KeptSoftMass) -> None:
    _tensor("weight", o.weight, None, _FLOAT)
    _masks(o.weight, o.soft, o.hard, tuple(o.weight.shape))
    _prices(o.beta, o.costs, tuple(o.weight.shape), o.weight.device)


def _signs(o: AddBlockSigns) -> None:
    _tensor("pull", o.pull, _blocks(o.weight, o.rows, o.columns), _FLOAT, o.weight.device)
    _gradient(o.grad, o.weight)


# --- products


def _index(name: str, layout: Any, grid: tuple[int, ...], like: Any, stored: int | None = None) -> None:
    """Raise unless this is the index of blocks in such a grid; `stored` says how many, where they are packed."""
    _length(name, layout, len(INDEX))
    all_blocks = grid[0] * grid[1] if stored is None else stored
    lengths = (grid[0] + 1, all_blocks, grid[1] + 1, all_blocks, grid[0] + grid[1])
    for part, tensor, length in zip(INDEX, layout, lengths, strict=True):
        _tensor(f"{name}.{part}", tensor, (length,), torch.int32, like.device)
        _side_by_side(f"{name}.{part}", tensor)
    if not inspectable(layout[0]):
        return
    try:
        mask = active_blocks(layout[0], layout[1], grid[1])
    except (IndexError, RuntimeError):
        raise ValueError(f"{name}.row_offsets and .column_indices must lie within a grid of {grid} blocks") from None
    entries = mask.nonzero().to(torch.int32)
    by_column = mask.mT.nonzero().to(torch.int32)
    right = [_offsets(mask.sum(1)), entries[:, 1], _offsets(mask.sum(0)), by_column[:, 1]]
    right.append(longest_first(right[0], right[2]))
    for part, tensor, expected in zip(INDEX, layout, right, strict=True):
        if not torch.equal(tensor[: expected.shape[0]], expected):
            raise ValueError(f"{name}.{part} must be the index of its blocks")


def _side_by_side(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; got strides {tensor.stride()}")


def _offsets(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _features(name: str, x: Any, features: int, like: Any) -> None:
    if x.dim() < 1 or x.shape[-1] != features:
        raise ValueError(f"{name} must have shape [..., {features}]; got {tuple(x.shape)}")
    _tensor(name, x, None, like.dtype, like.device)


def _linear(o: MaskedLinear | MaskedLinearBackward) -> None:
    """What both passes take, but x and the layout of the gradient."""
    weight = o.weight
    _tensor("weight", weight, (weight.shape if weight.dim() == 2 else ("out", "in")), _FLOAT)
    grid = _blocks(weight, o.rows, o.columns)
    if len(o.layout):
        _tensor("gate", o.gate, grid, _FLOAT, weight.device)
        _index("layout", o.layout, grid, weight)
    else:
        _tensor("gate", o.gate, grid, (*_FLOAT, torch.bool), weight.device)
    _activation(o.activation)
    if o.slope is not None:
        _tensor("slope", o.slope, o.gate.shape, _FLOAT, weight.device)


def _backward_index(o: MaskedLinear | MaskedLinearBackward) -> None:
    if len(o.backward_layout):  # none: every block
        _index("backward_layout", o.backward_layout, _blocks(o.weight, o.rows, o.columns), o.weight)


def _linear_forward(o: MaskedLinear) -> None:
    _linear(o)
    _features("x", o.x, o.weight.shape[1], o.weight)
    _backward_index(o)
    if o.bias is not None:
        _tensor("bias", o.bias, o.weight.shape[:1], o.weight.dtype, o.weight.device)


def _linear_backward(o: MaskedLinearBackward) -> None:
    _length("needs", o.needs, 4)
    _linear(o)
    _features("grad", o.grad, o.weight.shape[0], o.weight)
    _, of_weight, of_gate, _ = o.needs
    if of_weight or of_gate:  # else x and its layout are not read
        _tensor("x", o.x, (*o.grad.shape[:-1], o.weight.shape[1]), o.weight.dtype, o.weight.device)
        _backward_index(o)
    if o.activation:
        _tensor("saved", o.saved, o.grad.shape, o.weight.dtype, o.weight.device)


def _sampled(o: SampledMatmul) -> None:
    a, b = o.a, o.b
    _tensor("a", a, a.shape if a.dim() == 2 else ("m", "k"), _FLOAT)
    _tensor("b", b, (a.shape[1], *b.shape[1:]) if b.dim() == 2 else (a.shape[1], "n"), a.dtype, a.device)
    product = a.new_empty((a.shape[0], b.shape[1]), device="meta")
    _index("layout", o.layout, _blocks(product, o.rows, o.columns, "product"), a)


def _packed(
    o: PackedLinear | PackedLinearBackward | Float8Linear, out: int, stored: Any = _FLOAT, given: Any = None
) -> None:
    """`stored` and `given`: dtypes of values and of x; None for that of the values."""
    x, values = o.x, o.values
    _activation(o.activation)
    _number("out", out, 0)
    _blocks_stored(values, stored)
    if x.dim() < 1:
        raise ValueError(f"x must have shape [..., in]; got {tuple(x.shape)}")
    _tensor("x", x, None, given or values.dtype, values.device)
    _stored(o, (out, x.shape[-1]))


def _blocks_stored(values: Any, dtypes: Any = _FLOAT) -> None:
    _tensor("values", values, values.shape if values.dim() == 3 and all(values.shape[1:]) else ("n", "r", "c"), dtypes)


def _stored(o: Any, shape: tuple[int, int]) -> None:
    """Raise unless layout and positions are the index of the values in a matrix of this shape."""
    values, layout, positions = o.values, o.layout, o.positions
    grid = block_grid(shape, (values.shape[1], values.shape[2]))
    _index("layout", layout, grid, values, values.shape[0])
    _tensor("positions", positions, values.shape[:1], torch.int32, values.device)
    _side_by_side("positions", positions)
    if inspectable(positions) and not torch.equal(positions, torch.argsort(layout[1], stable=True).to(torch.int32)):
        raise ValueError("positions must say where each entry by columns is stored")


def _packed_forward(o: PackedLinear) -> None:
    _packed(o, o.out)
    if o.bias is not None:
        _tensor("bias", o.bias, (o.out,), o.values.dtype, o.values.device)


def _float8_forward(o: Float8Linear) -> None:
    _packed(o, o.out, FLOAT8, (torch.float32, torch.bfloat16, torch.float16))
    _tensor("scales", o.scales, (o.out, 1), torch.float32, o.values.device)
    if o.bias is not None:
        _tensor("bias", o.bias, (o.out,), o.x.dtype, o.values.device)


def _packed_backward(o: PackedLinearBackward) -> None:
    _length("needs", o.needs, 3)
    if o.grad.dim() < 1:
        raise ValueError(f"grad must have shape [..., out]; got {tuple(o.grad.shape)}")
    _packed(o, o.grad.shape[-1])
    _tensor("grad", o.grad, (*o.x.shape[:-1], o.grad.shape[-1]), o.values.dtype, o.values.device)
    if o.activation:
        _tensor("saved", o.saved, o.grad.shape, o.values.dtype, o.values.device)


def _layout(o: BlockLayoutOf) -> None:
    gate, mask = o.gate, o.mask
    _tensor("gate", gate, gate.shape if gate.dim() == 2 else ("rows", "columns"), (*_FLOAT, torch.bool))
    if mask is not None:
        _tensor("mask", mask, gate.shape, torch.bool, gate.device)


# --- convolutions


def _convolution(o: MaskedConv | MaskedConvBackward) -> tuple[int, ...]:
    """The shape of the result."""
    x, weight, groups = o.x, o.weight, o.groups
    _tensor("weight", weight, weight.shape if weight.dim() == 4 else ("out", "in / groups", "h", "w"), _FLOAT)
    grid = _blocks(weight, o.rows, o.columns)
    _tensor("gate", o.gate, grid, _FLOAT, weight.device)
    for name, mask in (("forward_mask", o.forward_mask), ("backward_mask", o.backward_mask)):
        if mask is not None:
            _tensor(name, mask, grid, torch.bool, weight.device)
    _number("groups", groups, 1)
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide {weight.shape[0]} outputs; got {groups}")
    channels = (x.shape[0], weight.shape[1] * groups, *x.shape[2:]) if x.dim() == 4 else ("n", "in", "h", "w")
    _tensor("x", x, channels, weight.dtype, weight.device)
    return (x.shape[0], weight.shape[0], *_result_size(o, weight.shape[2:]))


def _result_size(o: Any, kernels: Sequence[int]) -> list[int]:
    """Height and width of a convolution's result."""
    for name, pair, least in (("stride", o.stride, 1), ("padding", o.padding, 0), ("dilation", o.dilation, 1)):
        _length(name, pair, 2)
        for side in pair:
            _number(name, side, least)
    spatial = [
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, p, d, kernel, s in zip(o.x.shape[2:], o.padding, o.dilation, kernels, o.stride, strict=True)
    ]
    if min(spatial) < 1:
        raise ValueError(f"x must be at least as large as the kernel; got {tuple(o.x.shape)} for {tuple(kernels)}")
    return spatial


def _convolution_forward(o: MaskedConv) -> None:
    _convolution(o)
    if o.bias is not None:
        _tensor("bias", o.bias, o.weight.shape[:1], o.weight.dtype, o.weight.device)


def _convolution_backward(o: MaskedConvBackward) -> None:
    _tensor("grad", o.grad, _convolution(o), o.weight.dtype, o.weight.device)
    _length("needs", o.needs, 4)


def _packed_convolution(o: PackedConv | PackedConvBackward, out: int) -> tuple[int, ...]:
    """The shape of the result."""
    x, kernel = o.x, o.kernel
    _length("kernel", kernel, 2)
    for side in kernel:
        _number("kernel", side, 1)
    _number("out", out, 0)
    _blocks_stored(o.values)
    _tensor("x", x, x.shape if x.dim() == 4 else ("n", "in", "h", "w"), o.values.dtype, o.values.device)
    columns = o.values.shape[2]
    _stored(o, (out, kernel[0] * kernel[1] * (x.shape[1] + -x.shape[1] % columns)))
    return (x.shape[0], out, *_result_size(o, kernel))


def _packed_convolution_forward(o: PackedConv) -> None:
    _packed_convolution(o, o.out)
    if o.bias is not None:
        _tensor("bias", o.bias, (o.out,), o.values.dtype, o.values.device)


def _packed_convolution_backward(o: PackedConvBackward) -> None:
    _length("needs", o.needs, 3)
    if o.grad.dim() != 4:
        raise ValueError(f"grad must have shape [n, out, h, w]; got {tuple(o.grad.shape)}")
    _tensor("grad", o.grad, _packed_convolution(o, o.grad.shape[1]), o.values.dtype, o.values.device)


# --- top-k


def _rows(values: Any, budget: Any, costs: Any, beta: Any = None) -> None:
    _tensor("values", values, values.shape if values.dim() == 2 else ("rows", "n"), _FLOAT)
    if not isinstance(budget, float):
        _tensor("budget", budget, values.shape[:1], torch.float64, values.device)
    if costs is not None:
        shape = values.shape[1:] if costs.dim() == 1 else values.shape
        _tensor("costs", costs, shape if costs.dim() else (), values.dtype, values.device)
    if beta is not None:
        _scalar("beta", beta, values.device)


def _rows_backward(o: SoftTopkBackward) -> None:
    values, threshold = o.values, o.threshold
    _rows(values, threshold.new_empty(values.shape[:1]), o.costs, o.beta)
    _tensor("grad", o.grad, values.shape, values.dtype, values.device)
    _tensor("threshold", threshold, (values.shape[0], 2), torch.float64, values.device)


def _alike(name: str, parts: Any, like: Any) -> None:
    _length(name, parts, len(like))
    for index, (part, value) in enumerate(zip(parts, like, strict=True)):
        _tensor(f"{name}[{index}]", part, value.shape, value.dtype, value.device)


def _list(values: Any, costs: Any, beta: Any = None, shapes: Any = None) -> None:
    if not len(values):
        raise ValueError("values must hold at least one tensor; got none")
    first = values[0]
    for index, value in enumerate(values):
        _tensor(f"values[{index}]", value, None, first.dtype if first.dtype in _FLOAT else _FLOAT, first.device)
    _length("costs", costs, 0, len(values))
    wanted = shapes or [value.shape for value in values]
    for index, (cost, shape) in enumerate(zip(costs, wanted, strict=False)):
        _tensor(f"costs[{index}]", cost, shape if cost.dim() else (), first.dtype, first.device)
    if beta is not None:
        _scalar("beta", beta, first.device)


def _global(o: SoftTopkGlobal) -> None:
    _list(o.values, o.costs, o.beta)
    _scalar("budget", o.budget, o.values[0].device)


def _hard_indices(o: HardTopkIndices) -> None:
    _rows(o.values, 0.0, None)
    if not 0 <= o.k <= o.values.shape[1]:
        raise ValueError(f"k must be in [0, {o.values.shape[1]}]; got {o.k}")


def _hard_global(o: HardTopkGlobal) -> None:
    _list(o.values, o.costs)
    _scalar("budget", o.budget, o.values[0].device)


def _global_backward(o: SoftTopkGlobalBackward) -> None:
    _list(o.values, o.costs, o.beta)
    _alike("grads", o.grads, o.values)
    _tensor("threshold", o.threshold, (2,), torch.float64, o.values[0].device)


def _solve_masks(o: SolveMasks) -> None:
    values, block_sizes = o.values, o.block_sizes
    _length("block_sizes", block_sizes, 0, 2 * len(values))
    sides = list(zip(block_sizes[::2], block_sizes[1::2], strict=True)) or [(1, 1)] * len(values)
    grids = [_blocks(v, *pair, f"values[{i}]") for i, (v, pair) in enumerate(zip(values, sides, strict=True))]
    _list(values, o.costs, o.beta, grids)
    device = values[0].device
    _scalar("budget", o.budget, device)
    for name, masks, dtype in (("soft", o.soft, values[0].dtype), ("hard", o.hard, torch.bool)):
        if name == "soft" and not masks:
            continue  # not written
        _length(name, masks, len(values))
        for index, (mask, grid) in enumerate(zip(masks, grids, strict=True)):
            _tensor(f"{name}[{index}]", mask, grid, dtype, device)
            _side_by_side(f"{name}[{index}]", mask)
    _tensor("state", o.state, (8,), torch.float64, device)


CHECKS: dict[str, Callable[..., Any]] = {
    "soft_topk_forward": lambda o: _rows(o.values, o.budget, o.costs, o.beta),
    "soft_topk_backward": _rows_backward,
    "soft_topk_global_forward": _global,
    "soft_topk_global_backward": _global_backward,
    "solve_masks_": _solve_masks,
    "hard_topk_forward": lambda o: _rows(o.values, o.budget, o.costs),
    "hard_topk_indices_forward": _hard_indices,
    "hard_topk_global_forward": _hard_global,
    "masked_weight_forward": _masked_weight,
    "masked_weight_backward": _masked_weight_backward,
    "masked_weight_backward_": _masked_weight_backward,
    "masked_weight_coupling": _coupling,
    "masked_weight_correct_": _correct,
    "kept_soft_mass": _kept,
    "add_block_signs_": _signs,
    "block_scores": lambda o: _blocks(o.weight, o.rows, o.columns),
    "masked_linear_forward": _linear_forward,
    "masked_linear_backward": _linear_backward,
    "sampled_matmul_forward": _sampled,
    "block_sparse_linear_forward": _packed_forward,
    "block_sparse_linear_float8_forward": _float8_forward,
    "block_sparse_linear_backward": _packed_backward,
    "block_sparse_conv2d_forward": _packed_convolution_forward,
    "block_sparse_conv2d_backward": _packed_convolution_backward,
    "masked_conv2d_forward": _convolution_forward,
    "masked_conv2d_backward": _convolution_backward,
    "block_layout": _layout,
}
