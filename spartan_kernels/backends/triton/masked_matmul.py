"""Block-sparse products on Triton: launches and their sizes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch

from spartan_kernels.backends.shared import flat, layer_gradients
from spartan_kernels.backends.triton import block_layout_kernels, float8_kernels, sampled_kernels, united_kernels
from spartan_kernels.backends.triton import masked_matmul_kernels as kernels
from spartan_kernels.backends.triton.block_layout import LAYOUT_BLOCK
from spartan_kernels.backends.triton.block_matrix import BlockMatrix, dense_float
from spartan_kernels.backends.triton.configs import CompileCase, compile_case, name_of, power_of_two
from spartan_kernels.backends.triton.launches import Launch, start
from spartan_kernels.backends.triton.product_launches import JOIN_BLOCK
from spartan_kernels.backends.triton.product_plan import (
    ProductPlan,
    SampledPlan,
    kind_of,
    rounding_tile,
    scaled_tile,
    union_tile,
)
from spartan_kernels.float8 import FLOAT8
from spartan_kernels.operands import MaskedLinear, MaskedLinearBackward, SampledMatmul
from spartan_kernels.tiles import BLACKWELL, MANY_TOKENS, Tile, default_tile

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
    """On the layout's blocks, some to a program; on all of them, or on blocks too large for one, the dense product."""
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
        start(Launch(sampled_kernels._gate_gradient_kernel, gate.numel(), arguments, _gate_tile(*block)))
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
    "extent", "other_extent", "stride_x", "stride_wn", "stride_wk", "stride_sn", "stride_sk", "rows_extent",
    "columns_extent", "stride_dz", "stride_theta", "stride_out",
)  # fmt: skip


# the architectures that a default tile is chosen for, and the targets of the compile check that stand for them
_ARCHITECTURES = {80: ("sm_80", "gfx942"), 90: ("sm_90",), 100: ("sm_100",)}
_TYPES = {
    "gate": "*fp32", "grad_gate": "*fp32", "order": "*i32", "offsets": "*i32", "indices": "*i32", "positions": "*i32",
    "mask": "*u8", "counts": "*i32", "row_offsets": "*i32", "column_indices": "*i32", "column_offsets": "*i32",
    "united": "*i32", "row_indices": "*i32", "parts": "*fp32", "token_scales": "*fp32", "output_scales": "*fp32",
    "scales": "*fp32", "rounded": "*fp8e4nv",
}  # fmt: skip
_OF_FLOAT8 = {"bias": "*bf16", "y": "*bf16", "saved": "*bf16"}


def _compile_cases() -> list[CompileCase]:
    cases = []
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")):
        for side in (16, 32, 64, 128):
            for tokens in (8, MANY_TOKENS // 2, 8192):
                cases += _product_cases(dtype, precision, (side, side), True, tokens)
            cases += _sampled_cases(dtype, precision, (side, side))
        for forward in (True, False):
            cases += [_scaled_case(dtype, side, forward) for side in (4, 32, 128)]
    for side in (16, 32, 64, 128):
        cases += _product_cases(torch.bfloat16, "ieee", (side, side), False, 8192)
    cases += _product_cases(torch.bfloat16, "ieee", (8, 8), True, 8192)
    for columns in (16, 32):
        cases += _product_cases(torch.bfloat16, "ieee", (128, columns), True, 8192)
        cases += _product_cases(torch.bfloat16, "ieee", (128, columns), False, 8192)
        cases += _sampled_cases(torch.bfloat16, "ieee", (128, columns))
    cases += _small_cases() + _float8_cases()
    copied = replace(default_tile(90, 8192, 128, "bfloat16"), TMA=True)
    flags = _product_flags((128, 128), True, 8192, "ieee")
    cases.append(
        _case(
            kernels._product_kernel,
            torch.bfloat16,
            flags | copied.options(),
            "block 128 x 128, TMA",
            ("sm_90", "sm_100"),
        )
    )
    return cases


def _product_cases(
    dtype: torch.dtype, precision: str, block: tuple[int, int], forward: bool, tokens: int
) -> list[CompileCase]:
    """A product, or an input gradient, with the tile of each architecture."""
    kind, tiles = kind_of(dtype, precision), dict[Tile, list[str]]()
    for architecture, targets in _ARCHITECTURES.items():
        tile = default_tile(architecture, tokens, block[0] if forward else block[1], kind)
        tiles.setdefault(tile, []).extend(targets)
    label = f"block {block[0]} x {block[1]}, {tokens} tokens, {kind}" + ("" if forward else ", input gradient")
    flags, cases = _product_flags(block, forward, tokens, precision), []
    span, other = block if forward else block[::-1]
    for tile, here in tiles.items():
        plan = ProductPlan(tokens, 4096, 4096, span, other, dtype.itemsize, tile)
        alone = flags | plan.fitted(scaled=False).tile.options()
        cases.append(_case(kernels._product_kernel, dtype, alone, label, tuple(here)))
        if plan.fitted(scaled=not flags["HAS_GATE"]).united > 1:
            kernel = united_kernels._united_product_kernel
            cases.append(_case(kernel, dtype, flags | tile.options(), label, tuple(here)))
    return cases


def _product_flags(block: tuple[int, int], forward: bool, tokens: int, precision: str) -> dict[str, Any]:
    span, other = block if forward else block[::-1]
    return {
        "SPAN": span, "OTHER": other, "PACKED": False, "HAS_POSITIONS": False, "HAS_GATE": tokens < MANY_TOKENS,
        "HAS_BIAS": forward, "HAS_SCALES": False, "ACTIVATION": "relu" if forward else "", "SAVE": False,
        "PRECISION": precision, "SPLIT": 1, **_strides(forward, "w"), **_strides(forward, "gate"),
    }  # fmt: skip


def _float8_cases() -> list[CompileCase]:
    """Products with packed blocks in 8 bits, and what rounds their tokens; no tensor core before sm_89 has them."""
    cases = []
    problems = [(*pair, 8192) for pair in ((128, 16), (128, 32))]
    problems += [(side, side, tokens) for side in (16, 32, 64, 128) for tokens in (8, MANY_TOKENS // 2, 8192)]
    for (rows, columns, tokens), architecture in itertools.product(problems, (90, 100)):
        tile = default_tile(architecture, tokens, rows, "float8")
        flags = _product_flags((rows, columns), True, tokens, "promoted" if architecture < BLACKWELL else "ieee")
        flags |= {"PACKED": True, "HAS_GATE": False, "HAS_SCALES": True, **tile.options()}
        label, types = f"block {rows} x {columns}, {tokens} tokens, float8", _TYPES | _OF_FLOAT8
        here = (f"sm_{architecture}",)
        cases.append(compile_case(kernels._product_kernel, FLOAT8, flags, label, types, _MULTIPLES, here))
    for dtype in (torch.float32, torch.bfloat16):
        kernel = float8_kernels._rounded_rows_kernel
        cases.append(_case(kernel, dtype, rounding_tile(4096), f"4096, {name_of(dtype)}", ("sm_90", "sm_100")))
    return cases


def _strides(forward: bool, of: str) -> dict[str, int]:
    """The stride that is one: along the sum of a product, along the outputs of an input gradient."""
    along, across = ("_other", "_line") if of == "gate" else ("k", "n")
    return {f"stride_{of}{along if forward else across}": 1}


def _scaled_case(dtype: torch.dtype, side: int, forward: bool) -> CompileCase:
    options = {
        "SPAN": side, "OTHER": side, **scaled_tile(side), **_strides(forward, "w"), **_strides(forward, "s"),
        **_strides(forward, "gate"),
    }  # fmt: skip
    label = f"block {side}, {name_of(dtype)}" + ("" if forward else ", input gradient")
    return _case(kernels._scaled_kernel, dtype, options, label)


def _sampled_cases(dtype: torch.dtype, precision: str, block: tuple[int, int]) -> list[CompileCase]:
    """A weight's gradient, for weights of 4096 x 4096 and of 16384 x 4096."""
    kind = kind_of(dtype, precision)
    flags = {
        "ROWS": block[0], "COLUMNS": block[1], "PACKED": False, "HAS_GATE": True, "GATE_GRAD": True,
        "PRECISION": precision, "stride_dz_row": 1,
    }  # fmt: skip
    found: dict[tuple[tuple[str, int], ...], tuple[str, list[str]]] = {}
    for out in (4096, 16384):
        for architecture, targets in _ARCHITECTURES.items():
            plan = SampledPlan((out // block[0], 4096 // block[1]), *block, kind, architecture)
            label = f"block {block[0]} x {block[1]}, {plan.blocks} to a program, {kind}"
            found.setdefault(tuple(plan.options().items()), (label, []))[1].extend(targets)
    return [
        _case(sampled_kernels._sampled_kernel, dtype, flags | dict(options), label, tuple(dict.fromkeys(here)))
        for options, (label, here) in found.items()
    ]


def _small_cases() -> list[CompileCase]:
    """Layout, joined sums, and the gradient of all gates."""
    layout = {"HAS_MASK": True, "BLOCK": LAYOUT_BLOCK, "num_warps": 4}
    join = {"HAS_BIAS": True, "HAS_SCALES": True, "ACTIVATION": "gelu", "SAVE": True, "SPLIT": 4, "BLOCK": JOIN_BLOCK}
    found = block_layout_kernels._layout_count_kernel, block_layout_kernels._layout_fill_kernel
    cases = [_case(kernel, torch.float32, layout, "") for kernel in found]
    cases += [_case(united_kernels._union_kernel, torch.float32, union_tile(n), f"{n} lines") for n in (8, 16)]
    for dtype in (torch.float32, torch.bfloat16):
        cases.append(_case(kernels._join_kernel, dtype, join, name_of(dtype)))
        for side in (1, 4, 32, 128):
            label = f"block {side}, {name_of(dtype)}"
            cases.append(_case(sampled_kernels._gate_gradient_kernel, dtype, _gate_tile(side, side), label))
    return cases


def _case(
    kernel: Any, dtype: torch.dtype, options: dict[str, Any], label: str, targets: tuple[str, ...] = ()
) -> CompileCase:
    return compile_case(kernel, dtype, options, label, _TYPES, _MULTIPLES, targets)


COMPILE_CASES = _compile_cases()
