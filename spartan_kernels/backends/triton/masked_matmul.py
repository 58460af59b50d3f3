"""Block-sparse products on Triton: launches and their sizes. Kernels are in masked_matmul_kernels.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from spartan_kernels.backends.shared import flat, layer_gradients
from spartan_kernels.backends.triton import masked_matmul_kernels as kernels
from spartan_kernels.backends.triton.block_layout import LAYOUT_BLOCK
from spartan_kernels.backends.triton.block_matrix import BlockMatrix, dense_float
from spartan_kernels.backends.triton.configs import CompileCase, multiplying_case, name_of, power_of_two
from spartan_kernels.backends.triton.launches import Launch, start
from spartan_kernels.backends.triton.product_launches import JOIN_BLOCK
from spartan_kernels.backends.triton.product_plan import kind_of, sampled_tile
from spartan_kernels.operands import MaskedLinear, MaskedLinearBackward, SampledMatmul
from spartan_kernels.tiles import Tile, default_tile

_WIDEST = 128  # of a block that one program sums


def masked_linear_forward(o: MaskedLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """act(z), z = x (theta * gate on the layout's blocks)^T + b, and z when it is to be saved."""
    shape = (o.weight.shape[0], o.weight.shape[1])
    return BlockMatrix(o.weight, shape, (o.rows, o.columns), o.layout, o.gate, None).product(
        o.x, True, o.bias, o.activation, o.save
    )


def masked_linear_backward(o: MaskedLinearBackward) -> list[torch.Tensor | None]:
    """Gradients of x, weight, gate and bias; None where not needed."""
    shape, block = (o.weight.shape[0], o.weight.shape[1]), (o.rows, o.columns)

    def of_input(dz: torch.Tensor) -> torch.Tensor:
        return BlockMatrix(o.weight, shape, block, o.layout, o.gate, None).product(dz, False)[0]

    return layer_gradients(o, of_input, lambda dz, needs: _parameter_gradients(dz, o, needs.gate))


def _parameter_gradients(
    dz: torch.Tensor, o: MaskedLinearBackward, of_gate: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """On the layout's blocks one program each; on all of them, or on blocks too large for one, the dense product."""
    x, weight, gate, layout, block = o.x, o.weight, o.gate, o.backward_layout, (o.rows, o.columns)
    shape = (weight.shape[0], weight.shape[1])
    sampled = layout and max(block) <= _WIDEST
    grad_gate = torch.zeros(gate.shape, dtype=torch.float32, device=x.device) if of_gate or not sampled else None
    if sampled:
        out = torch.zeros(shape, dtype=weight.dtype, device=x.device)
        return BlockMatrix(weight, shape, block, layout, gate, None).sampled(dz, x, out, grad_gate), grad_gate
    assert grad_gate is not None  # the kernel that scales the dense product by the gate writes both
    raw = (flat(dz).mT @ flat(x)).contiguous()
    theta = weight if weight.stride(-1) == 1 else weight.contiguous()
    scale = dense_float(gate)
    if raw.numel():
        arguments = raw, theta, scale, grad_gate, *shape, gate.shape[1], theta.stride(0)
        start(Launch(kernels._gate_gradient_kernel, gate.numel(), arguments, _gate_tile(*block)))
    if layout:  # the active blocks of a dense result
        active = torch.zeros(gate.numel() + 1, dtype=torch.bool, device=x.device)
        order = torch.arange(gate.numel(), device=x.device)
        row = torch.searchsorted(layout[0][1:].contiguous(), order, right=True)
        place = torch.where(order < layout[0][-1], row * gate.shape[1] + layout[1][: gate.numel()], gate.numel())
        keep = active.index_fill(0, place, True)[:-1].view(gate.shape)
        grad_gate = torch.where(keep, grad_gate, 0.0)
        wide = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
        raw = torch.where(wide, raw, 0.0)
    return raw, grad_gate


def _gate_tile(rows: int, columns: int) -> dict[str, int]:
    block_r, block_c = min(32, power_of_two(rows)), min(64, power_of_two(columns))
    return {"ROWS": rows, "COLUMNS": columns, "BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": 4}


def sampled_matmul_forward(o: SampledMatmul) -> torch.Tensor:
    """a b on the layout's blocks, zero elsewhere."""
    out = torch.zeros((o.a.shape[0], o.b.shape[1]), dtype=o.a.dtype, device=o.a.device)
    operand = BlockMatrix(out, (o.a.shape[0], o.b.shape[1]), (o.rows, o.columns), o.layout, None, None)
    return operand.sampled(o.a.mT, o.b, out, None)


# sizes and strides of layers as they are
_MULTIPLES = (
    "extent", "other_extent", "stride_x", "stride_wn", "rows_extent", "columns_extent", "stride_dz", "stride_theta",
    "stride_out",
)  # fmt: skip


# the architectures that a default tile is chosen for, and the targets of the compile check that stand for them
_ARCHITECTURES = {80: ("sm_80", "gfx942"), 90: ("sm_90",), 100: ("sm_100",)}
_TYPES = {
    "gate": "*fp32", "grad_gate": "*fp32", "order": "*i32", "offsets": "*i32", "indices": "*i32", "positions": "*i32",
    "mask": "*u8", "counts": "*i32", "row_offsets": "*i32", "column_indices": "*i32", "column_offsets": "*i32",
    "row_indices": "*i32", "parts": "*fp32",
}  # fmt: skip


def _compile_cases() -> list[CompileCase]:
    cases = []
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")):
        kind = kind_of(dtype, precision)
        flags: dict[str, Any] = {"PACKED": False, "HAS_GATE": True, "PRECISION": precision}
        for side in (16, 32, 64, 128):
            for tokens in (8, 8192):
                tiles: dict[Tile, list[str]] = {}
                for architecture, targets in _ARCHITECTURES.items():
                    tiles.setdefault(default_tile(architecture, tokens, side, kind), []).extend(targets)
                for tile, here in tiles.items():
                    label = f"block {side}, {tokens} tokens, {kind}"
                    cases.append(_product_case(dtype, flags, side, tile, label, tuple(here)))
            sampled = {"ROWS": side, "COLUMNS": side, "GATE_GRAD": True, "stride_dz_row": 1}
            sampled |= sampled_tile(side, side, kind != "float32", dtype.itemsize)
            cases.append(_case(kernels._sampled_kernel, dtype, flags | sampled, f"block {side}, {kind}"))
    cases += _small_cases()
    copied = replace(default_tile(90, 8192, 128, "bfloat16"), TMA=True)
    cases.append(_product_case(torch.bfloat16, flags, 128, copied, "block 128, TMA", ("sm_90", "sm_100")))
    return cases


def _small_cases() -> list[CompileCase]:
    """Layout, joined sums, and the gradient of all gates."""
    layout = {"HAS_MASK": True, "BLOCK": LAYOUT_BLOCK, "num_warps": 4}
    join = {"HAS_BIAS": True, "ACTIVATION": "gelu", "SAVE": True, "SPLIT": 4, "BLOCK": JOIN_BLOCK}
    cases = [_case(k, torch.float32, layout, "") for k in (kernels._layout_count_kernel, kernels._layout_fill_kernel)]
    for dtype in (torch.float32, torch.bfloat16):
        cases.append(_case(kernels._join_kernel, dtype, join, name_of(dtype)))
        for side in (1, 4, 32, 128):
            label = f"block {side}, {name_of(dtype)}"
            cases.append(_case(kernels._gate_gradient_kernel, dtype, _gate_tile(side, side), label))
    return cases


def _product_case(
    dtype: torch.dtype, flags: dict[str, Any], side: int, tile: Tile, label: str, targets: tuple[str, ...]
) -> CompileCase:
    product = {
        "SPAN": side, "OTHER": side, "HAS_POSITIONS": False, "HAS_BIAS": True, "ACTIVATION": "relu", "SAVE": False,
        "SPLIT": 1, "stride_wk": 1, "stride_gate_other": 1,
    }  # fmt: skip
    return _case(kernels._product_kernel, dtype, flags | product | tile.options(), label, targets)


def _case(
    kernel: Any, dtype: torch.dtype, options: dict[str, Any], label: str, targets: tuple[str, ...] = ()
) -> CompileCase:
    return multiplying_case(kernel, dtype, options, label, _TYPES, _MULTIPLES, targets)


COMPILE_CASES = _compile_cases()
