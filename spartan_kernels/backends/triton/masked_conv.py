"""Convolution with active blocks alone on Triton. Kernels are in masked_conv_kernels.py, launches in conv_lines.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton

from spartan_kernels.arguments import memory_format, output_size
from spartan_kernels.backends.shared import LayerNeeds, dense_filter_gradients, require_one_group
from spartan_kernels.backends.triton import masked_conv_kernels as kernels
from spartan_kernels.backends.triton.block_layout import row_layout
from spartan_kernels.backends.triton.block_matrix import dense_float
from spartan_kernels.backends.triton.configs import CompileCase, compile_case, name_of, power_of_two
from spartan_kernels.backends.triton.conv_lines import (
    STORED_BLOCK,
    Lines,
    Walk,
    blocks_tile,
    convolution_tile,
    convolved,
    gathered,
    sampled_parts,
    sampled_tile,
    tile_options,
)
from spartan_kernels.backends.triton.launches import Launch, start
from spartan_kernels.backends.triton.masked_weight import masked_weight_forward
from spartan_kernels.backends.triton.product_plan import kind_of
from spartan_kernels.operands import MaskedConv, MaskedConvBackward
from spartan_kernels.tiles import Tile

_TRANSPOSED_BLOCK = 1024


def masked_conv2d_forward(o: MaskedConv) -> torch.Tensor:
    """Convolution of x with theta * gate on the active blocks, plus b."""
    require_one_group(o.groups, "triton")
    shape = output_size(o.x.shape, o.weight.shape, o.stride, o.padding, o.dilation)
    y = torch.empty(shape, dtype=o.x.dtype, device=o.x.device, memory_format=memory_format(o.x))
    if y.numel() == 0:
        return y
    lines, walk = _of_output(o, o.gate, o.forward_mask), Walk.of_output(o, o.weight.shape[2:])
    gate = dense_float(o.gate)
    packed = gathered(lines, walk, o.weight, (*o.weight.stride(), gate.stride(0), gate.stride(1)), gate)
    return convolved(o.x, lines, walk, *packed, o.bias, y)


def masked_conv2d_backward(o: MaskedConvBackward) -> list[torch.Tensor | None]:
    """Gradients of x, weight, gate and bias; None where not needed."""
    require_one_group(o.groups, "triton")
    needs = LayerNeeds(*o.needs)
    dweight = dgate = None
    if needs.weight or needs.gate:
        dense = o.backward_mask is None
        dweight, dgate = dense_filter_gradients(o, masked_weight_forward) if dense else _sampled_gradients(o)
    dx = _input_gradient(o) if needs.x else None
    return [
        dx,
        dweight if needs.weight else None,
        dgate if needs.gate else None,
        o.grad.sum((0, 2, 3)) if needs.bias else None,
    ]


def _of_output(o: MaskedConv | MaskedConvBackward, active: torch.Tensor, mask: torch.Tensor | None) -> Lines:
    """Rows of blocks; each holds the kernel positions of one column of blocks before those of the next."""
    mask = None if mask is None else mask.flatten(1)
    out, in_ = o.weight.shape[:2]
    return Lines(*row_layout(active.flatten(1), mask), o.rows, o.columns, out, in_, False)


def _input_gradient(o: MaskedConvBackward) -> torch.Tensor:
    """dx: lines are columns of blocks, phase by phase."""
    dx = torch.empty(o.x.shape, dtype=o.x.dtype, device=o.x.device, memory_format=memory_format(o.x))
    if dx.numel() == 0:
        return dx
    walk, gate = Walk.of_input(o, o.weight.shape[2:]), o.gate.contiguous()
    grid_rows, grid_columns = gate.shape[:2]
    active = torch.empty(
        (walk.phases * grid_columns, grid_rows * walk.positions), dtype=torch.uint8, device=gate.device
    )
    mask = gate if o.forward_mask is None else o.forward_mask.contiguous().view(torch.uint8)
    arguments = (
        gate, mask, active, active.numel(), grid_rows, grid_columns, walk.positions, walk.kernel[1], *walk.shifts,
    )  # fmt: skip
    options = {"HAS_MASK": o.forward_mask is not None, "BLOCK": _TRANSPOSED_BLOCK, "num_warps": 4}
    if active.numel():
        programs = triton.cdiv(active.numel(), _TRANSPOSED_BLOCK)
        start(Launch(kernels._conv_transposed_kernel, programs, arguments, options))
    out, in_ = o.weight.shape[:2]
    lines = Lines(*row_layout(active, None), o.columns, o.rows, in_, out, False)
    (stride_r, stride_c, *of_kernel), scale = o.weight.stride(), dense_float(gate)
    strides = (stride_c, stride_r, *of_kernel, scale.stride(1), scale.stride(0))
    return convolved(o.grad, lines, walk, *gathered(lines, walk, o.weight, strides, scale), None, dx)


def _sampled_gradients(o: MaskedConvBackward) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and gate on the blocks of the backward mask alone."""
    needs, weight, mask = LayerNeeds(*o.needs), o.weight, o.backward_mask
    assert mask is not None
    dweight = torch.zeros(weight.shape if needs.weight else 0, dtype=weight.dtype, device=weight.device)
    dgate = torch.zeros(o.gate.shape if needs.gate else 0, dtype=torch.float32, device=weight.device)
    if weight.numel() and o.grad.numel():
        lines, walk = _of_output(o, mask, None), Walk.of_output(o, weight.shape[2:])
        parts = sampled_parts(o.grad, o.x, lines, walk, mask.numel())
        slots = mask[0].numel()
        arguments = (
            parts, weight, dense_float(o.gate), dweight, dgate, lines.offsets, lines.indices, slots,
            *weight.shape[:2], walk.positions, walk.kernel[1], parts.stride(0), *weight.stride(),
        )  # fmt: skip
        options = {
            "WEIGHT_GRAD": needs.weight, "GATE_GRAD": needs.gate, "SPLIT": parts.shape[0],
            **_gradients_tile(o.rows, o.columns),
        }  # fmt: skip
        start(Launch(kernels._conv_gradients_kernel, mask.numel(), arguments, options))
    return dweight, dgate.to(o.gate.dtype)


def _gradients_tile(rows: int, columns: int) -> dict[str, int]:
    block_c = min(64, power_of_two(columns))
    return {
        "SPAN": rows, "OTHER": columns, "BLOCK_R": min(1024 // block_c, power_of_two(rows)), "BLOCK_C": block_c,
        "num_warps": 4,
    }  # fmt: skip


# the architectures that a default tile is chosen for, and the targets of the compile check that stand for them
_ARCHITECTURES = {80: ("sm_80", "gfx942"), 90: ("sm_90",), 100: ("sm_100",)}
_TYPES = {
    "gate": "*fp32", "grad_gate": "*fp32", "order": "*i32", "offsets": "*i32", "indices": "*i32", "places": "*i32",
    "stored": "*i32", "mask": "*u8", "active": "*u8", "parts": "*fp32",
}  # fmt: skip
# sizes and strides of layers as they are: channels in multiples of 16; where they lie apart, images of 28 x 28
_CHANNELS = ("extent", "other_extent", "stride_wn")
_LAST = tuple(f"stride_{image}{side}" for image in ("", "y", "z") for side in "nhw")
_APART = tuple(f"stride_{image}{side}" for image in ("", "y", "z") for side in "nc")
_BOUNDED = (
    "area", "of_area", "area_shift", "columns", "of_columns", "columns_shift", "height", "width", "out_height",
    "out_width", "step_h", "step_w", "jump_h", "jump_w", "base_h", "base_w", "walk_h", "walk_w", "kernel_columns",
    "positions", "inner", "grid_rows", "grid_columns", "slots",
)  # fmt: skip
_PIXELS = 12544


def _compile_cases() -> list[CompileCase]:
    cases = _small_cases()
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")):
        kind = kind_of(dtype, precision)
        for side, last in ((32, True), (32, False), (3, True), (16, True), (24, True), (64, True), (128, True)):
            label = f"block {side}, channels {'last' if last else 'first'}, {kind}"
            scattered = not last or side % 8 != 0
            for kernel in (kernels._conv_product_kernel, kernels._conv_sampled_kernel):
                tiles: dict[Tile, list[str]] = {}
                for architecture, targets in _ARCHITECTURES.items():
                    multiplies = kernel is kernels._conv_product_kernel
                    tile = convolution_tile(architecture, _PIXELS, 8, side, side, kind, scattered)
                    tile = tile if multiplies else sampled_tile(architecture, 9 * side * 8, side, kind, scattered)
                    tiles.setdefault(tile, []).extend(targets)
                for tile, here in tiles.items():
                    options = {"PRECISION": precision, **tile_options(tile)}
                    cases.append(_case(kernel, dtype, side, last, options, label, tuple(here)))
    return cases


def _small_cases() -> list[CompileCase]:
    """What stands around the products."""
    transposed = {"HAS_MASK": True, "BLOCK": _TRANSPOSED_BLOCK, "num_warps": 4}
    cases = [_case(kernels._conv_transposed_kernel, torch.float32, 1, True, transposed, "")]
    cases.append(_case(kernels._conv_stored_kernel, torch.float32, 1, True, {"BLOCK": STORED_BLOCK}, ""))
    for dtype in (torch.float32, torch.bfloat16):
        for side in (1, 3, 32, 128):
            label = f"block {side}, {name_of(dtype)}"
            for source in ("weight", "packed"):
                tile = {"SOURCE": source, **blocks_tile(side, side)}
                cases.append(_case(kernels._conv_blocks_kernel, dtype, side, True, tile, f"{source}, {label}"))
            cases.append(_case(kernels._conv_gradients_kernel, dtype, side, True, _gradients_tile(side, side), label))
    return cases


def _case(
    kernel: Any,
    dtype: torch.dtype,
    side: int,
    last: bool,
    options: dict[str, Any],
    label: str,
    targets: tuple[str, ...] = (),
) -> CompileCase:
    flags = {
        "SPAN": side, "OTHER": side, "APART": not last, "APART_OUT": not last, "APART_Z": not last, "HAS_BIAS": True,
        "POSITION_FIRST": False, "SOURCE": "weight", "SPLIT": 4, "WEIGHT_GRAD": True, "GATE_GRAD": True, "stride_ww": 1,
    }  # fmt: skip
    ones = {f"stride_{image}{'c' if last else 'w'}": 1 for image in ("", "y", "z")}
    divisible = (*_CHANNELS, *(_LAST if last else _APART)) if side % 8 == 0 else ()
    case = compile_case(kernel, dtype, flags | ones | options, label, _TYPES, divisible, targets, _BOUNDED)
    # single elements of 2 bytes cannot be copied ahead of the arithmetic: other programs of the processor hide them
    return replace(case, tensor_cores=case.tensor_cores and (dtype.itemsize == 4 or (last and side % 8 == 0)))


COMPILE_CASES = _compile_cases()
