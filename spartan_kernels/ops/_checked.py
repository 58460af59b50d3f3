"""The operands of the raw operators, checked before a backend sees them: with SPARTAN_CHECK_OPERANDS=1.

`torch.ops.spartan.*` are private. The public functions check what they are given; the operators trust it, for a check
at every layer would cost more than a small product. The tests run with the checks on, and so can a program that calls
the operators itself: a wrong operand is then an error with its name, not memory read out of place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from spartan_kernels.arguments import block_grid, inspectable
from spartan_kernels.layout import INDEX, active_blocks, longest_first

__all__ = ["CHECKS", "checked"]

enabled = os.environ.get("SPARTAN_CHECK_OPERANDS", "") not in ("", "0")
_FLOAT = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")


def checked(name: str, serve: Callable[..., Any]) -> Callable[..., Any]:
    """`serve` behind the check of its operands, where that is switched on."""
    if not enabled:
        return serve

    @wraps(serve)
    def call(*operands: Any) -> Any:
        try:
            if enabled:
                CHECKS[name](*operands[:-1])
        except ValueError as error:
            raise ValueError(f"torch.ops.spartan.{name}: {error}") from None
        return serve(*operands)

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


def _scalar(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    _tensor(name, tensor, (), torch.float64, device)


# --- masked weights


def _masks(weight: Any, soft: Any, hard: Any, grid: Any) -> None:
    if soft is not None:
        _tensor("soft", soft, grid, _FLOAT, weight.device)
    if hard is not None:
        _tensor("hard", hard, grid, torch.bool, weight.device)


def _masked_weight(weight: Any, soft: Any, hard: Any, beta: Any, costs: Any, rows: int, columns: int, _: Any) -> None:
    grid = _blocks(weight, rows, columns)
    _masks(weight, soft, hard, grid)
    _scalar("beta", beta, weight.device)
    _tensor("costs", costs, grid if costs.dim() else (), _FLOAT, weight.device)


def _masked_weight_backward(grad: Any, weight: Any, *rest: Any) -> None:
    _masked_weight(weight, *rest)
    _tensor("grad", grad, weight.shape, _FLOAT, weight.device)


def _coupling(grad: Any, weight: Any, soft: Any, beta: Any, costs: Any, rows: int, columns: int) -> None:
    _masked_weight_backward(grad, weight, soft, None, beta, costs, rows, columns, True)


def _correct(grad: Any, weight: Any, soft: Any, scale: Any, rows: int, columns: int) -> None:
    _masks(weight, soft, None, _blocks(weight, rows, columns))
    _tensor("grad", grad, weight.shape, _FLOAT, weight.device)
    _scalar("scale", scale, weight.device)


def _signs(grad: Any, weight: Any, pull: Any, rows: int, columns: int) -> None:
    _tensor("pull", pull, _blocks(weight, rows, columns), _FLOAT, weight.device)
    _tensor("grad", grad, weight.shape, _FLOAT, weight.device)


# --- products


def _index(name: str, layout: Any, grid: tuple[int, ...], like: Any, stored: int | None = None) -> None:
    """Raise unless this is the index of blocks in such a grid; `stored` says how many, where they are packed."""
    _length(name, layout, len(INDEX))
    all_blocks = grid[0] * grid[1] if stored is None else stored
    lengths = (grid[0] + 1, all_blocks, grid[1] + 1, all_blocks, grid[0] + grid[1])
    for part, tensor, length in zip(INDEX, layout, lengths, strict=True):
        _tensor(f"{name}.{part}", tensor, (length,), torch.int32, like.device)
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


def _offsets(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _features(name: str, x: Any, features: int, like: Any) -> None:
    if x.dim() < 1 or x.shape[-1] != features:
        raise ValueError(f"{name} must have shape [..., {features}]; got {tuple(x.shape)}")
    _tensor(name, x, None, like.dtype, like.device)


def _linear(x: Any, weight: Any, gate: Any, layout: Any, backward_layout: Any, rows: int, columns: int) -> None:
    _tensor("weight", weight, (weight.shape if weight.dim() == 2 else ("out", "in")), _FLOAT)
    grid = _blocks(weight, rows, columns)
    grid = (math.ceil(weight.shape[0] / rows), math.ceil(weight.shape[1] / columns)) if len(grid) != 2 else grid
    _features("x", x, weight.shape[1], weight)
    _tensor("gate", gate, grid, _FLOAT, weight.device)
    _index("layout", layout, grid, weight)
    if len(backward_layout):  # none: every block
        _index("backward_layout", backward_layout, grid, weight)


def _linear_forward(
    x: Any, weight: Any, gate: Any, layout: Any, backward_layout: Any, bias: Any, activation: str,
    rows: int, columns: int, save: bool, density: float, slope: Any,
) -> None:  # fmt: skip
    _linear(x, weight, gate, layout, backward_layout, rows, columns)
    _activation(activation)
    if bias is not None:
        _tensor("bias", bias, weight.shape[:1], weight.dtype, weight.device)
    if slope is not None:
        _tensor("slope", slope, gate.shape, _FLOAT, weight.device)


def _linear_backward(
    grad: Any, x: Any, weight: Any, gate: Any, layout: Any, backward_layout: Any, saved: Any, activation: str,
    rows: int, columns: int, needs: Any, density: float, slope: Any,
) -> None:  # fmt: skip
    _length("needs", needs, 4)
    _activation(activation)
    if not (needs[1] or needs[2]):  # x and its layout are not read
        x, backward_layout = weight.new_empty(weight.shape[1:]) if weight.dim() == 2 else x, []
    _linear(x, weight, gate, layout, backward_layout, rows, columns)
    _features("grad", grad, weight.shape[0], weight)
    if needs[1] or needs[2]:
        _tensor("x", x, (*grad.shape[:-1], weight.shape[1]), weight.dtype, weight.device)
    if activation:
        _tensor("saved", saved, grad.shape, weight.dtype, weight.device)
    if slope is not None:
        _tensor("slope", slope, gate.shape, _FLOAT, weight.device)


def _sampled(a: Any, b: Any, layout: Any, rows: int, columns: int) -> None:
    _tensor("a", a, a.shape if a.dim() == 2 else ("m", "k"), _FLOAT)
    _tensor("b", b, (a.shape[1], *b.shape[1:]) if b.dim() == 2 else (a.shape[1], "n"), a.dtype, a.device)
    product = a.new_empty((a.shape[0], b.shape[1]), device="meta")
    _index("layout", layout, _blocks(product, rows, columns, "product"), a)


def _packed(x: Any, values: Any, layout: Any, positions: Any, out: int) -> None:
    _number("out", out, 0)
    _tensor("values", values, values.shape if values.dim() == 3 and all(values.shape[1:]) else ("n", "r", "c"), _FLOAT)
    if x.dim() < 1:
        raise ValueError(f"x must have shape [..., in]; got {tuple(x.shape)}")
    _tensor("x", x, None, values.dtype, values.device)
    grid = block_grid((out, x.shape[-1]), (values.shape[1], values.shape[2]))
    _index("layout", layout, grid, values, values.shape[0])
    _tensor("positions", positions, values.shape[:1], torch.int32, values.device)
    if inspectable(positions) and not torch.equal(positions, torch.argsort(layout[1], stable=True).to(torch.int32)):
        raise ValueError("positions must say where each entry by columns is stored")


def _packed_forward(
    x: Any, values: Any, layout: Any, positions: Any, bias: Any, activation: str, out: int, save: bool
) -> None:
    _packed(x, values, layout, positions, out)
    _activation(activation)
    if bias is not None:
        _tensor("bias", bias, (out,), values.dtype, values.device)


def _packed_backward(
    grad: Any, x: Any, values: Any, layout: Any, positions: Any, saved: Any, activation: str, needs: Any
) -> None:
    _length("needs", needs, 3)
    _activation(activation)
    if grad.dim() < 1:
        raise ValueError(f"grad must have shape [..., out]; got {tuple(grad.shape)}")
    _packed(x, values, layout, positions, grad.shape[-1])
    _tensor("grad", grad, (*x.shape[:-1], grad.shape[-1]), values.dtype, values.device)
    if activation:
        _tensor("saved", saved, grad.shape, values.dtype, values.device)


def _layout(gate: Any, mask: Any) -> None:
    _tensor("gate", gate, gate.shape if gate.dim() == 2 else ("rows", "columns"), (*_FLOAT, torch.bool))
    if mask is not None:
        _tensor("mask", mask, gate.shape, torch.bool, gate.device)


# --- convolutions


def _convolution(
    x: Any, weight: Any, gate: Any, forward_mask: Any, backward_mask: Any, stride: Any, padding: Any, dilation: Any,
    groups: int, rows: int, columns: int,
) -> tuple[int, ...]:  # fmt: skip
    _tensor("weight", weight, weight.shape if weight.dim() == 4 else ("out", "in / groups", "h", "w"), _FLOAT)
    grid = _blocks(weight, rows, columns)
    _tensor("gate", gate, grid, _FLOAT, weight.device)
    for name, mask in (("forward_mask", forward_mask), ("backward_mask", backward_mask)):
        if mask is not None:
            _tensor(name, mask, grid, torch.bool, weight.device)
    _number("groups", groups, 1)
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide {weight.shape[0]} outputs; got {groups}")
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        _length(name, pair, 2)
        for side in pair:
            _number(name, side, least)
    channels = (x.shape[0], weight.shape[1] * groups, *x.shape[2:]) if x.dim() == 4 else ("n", "in", "h", "w")
    _tensor("x", x, channels, weight.dtype, weight.device)
    spatial = [
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, p, d, kernel, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    if min(spatial) < 1:
        raise ValueError(f"x must be at least as large as the kernel; got {tuple(x.shape)} for {tuple(weight.shape)}")
    return (x.shape[0], weight.shape[0], *spatial)


def _convolution_forward(
    x: Any, weight: Any, gate: Any, forward_mask: Any, backward_mask: Any, bias: Any, *settings: Any
) -> None:
    _convolution(x, weight, gate, forward_mask, backward_mask, *settings)
    if bias is not None:
        _tensor("bias", bias, weight.shape[:1], weight.dtype, weight.device)


def _convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any) -> None:
    *settings, needs = rest
    _tensor("grad", grad, _convolution(x, weight, *settings), weight.dtype, weight.device)
    _length("needs", needs, 4)


# --- top-k


def _rows(values: Any, budget: Any, costs: Any, beta: Any = None) -> None:
    _tensor("values", values, values.shape if values.dim() == 2 else ("rows", "n"), _FLOAT)
    _tensor("budget", budget, values.shape[:1], torch.float64, values.device)
    if costs is not None:
        shape = values.shape[1:] if costs.dim() == 1 else values.shape
        _tensor("costs", costs, shape if costs.dim() else (), values.dtype, values.device)
    if beta is not None:
        _scalar("beta", beta, values.device)


def _rows_backward(grad: Any, values: Any, threshold: Any, costs: Any, beta: Any, cost_grad: bool) -> None:
    _rows(values, threshold.new_empty(values.shape[:1]), costs, beta)
    _tensor("grad", grad, values.shape, values.dtype, values.device)
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


def _global(values: Any, budget: Any, costs: Any, beta: Any, group: str) -> None:
    _list(values, costs, beta)
    _scalar("budget", budget, values[0].device)


def _hard_global(values: Any, budget: Any, costs: Any, absolute: bool, group: str) -> None:
    _list(values, costs)
    _scalar("budget", budget, values[0].device)


def _global_backward(grads: Any, values: Any, threshold: Any, costs: Any, beta: Any, *_: Any) -> None:
    _list(values, costs, beta)
    _alike("grads", grads, values)
    _tensor("threshold", threshold, (2,), torch.float64, values[0].device)


def _solve_masks(
    values: Any, budget: Any, costs: Any, beta: Any, absolute: bool, block_sizes: Any, soft: Any, hard: Any,
    state: Any, group: str,
) -> None:  # fmt: skip
    _length("block_sizes", block_sizes, 0, 2 * len(values))
    sides = list(zip(block_sizes[::2], block_sizes[1::2], strict=True)) or [(1, 1)] * len(values)
    grids = [_blocks(v, *pair, f"values[{i}]") for i, (v, pair) in enumerate(zip(values, sides, strict=True))]
    _list(values, costs, beta, grids)
    device = values[0].device
    _scalar("budget", budget, device)
    for name, masks, dtype in (("soft", soft, values[0].dtype), ("hard", hard, torch.bool)):
        _length(name, masks, len(values))
        for index, (mask, grid) in enumerate(zip(masks, grids, strict=True)):
            _tensor(f"{name}[{index}]", mask, grid, dtype, device)
            if not mask.is_contiguous():
                raise ValueError(f"{name}[{index}] must be contiguous; got strides {mask.stride()}")
    _tensor("state", state, (8,), torch.float64, device)


CHECKS: dict[str, Callable[..., Any]] = {
    "soft_topk_forward": _rows,
    "soft_topk_backward": _rows_backward,
    "soft_topk_global_forward": _global,
    "soft_topk_global_backward": _global_backward,
    "solve_masks_": _solve_masks,
    "hard_topk_forward": _rows,
    "hard_topk_global_forward": _hard_global,
    "masked_weight_forward": _masked_weight,
    "masked_weight_backward": _masked_weight_backward,
    "masked_weight_backward_": _masked_weight_backward,
    "masked_weight_coupling": _coupling,
    "masked_weight_correct_": _correct,
    "add_block_signs_": _signs,
    "block_scores": _blocks,
    "masked_linear_forward": _linear_forward,
    "masked_linear_backward": _linear_backward,
    "sampled_matmul_forward": _sampled,
    "block_sparse_linear_forward": _packed_forward,
    "block_sparse_linear_backward": _packed_backward,
    "masked_conv2d_forward": _convolution_forward,
    "masked_conv2d_backward": _convolution_backward,
    "block_layout": _layout,
}
