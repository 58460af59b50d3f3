"""Masked weight: one tile of whole blocks for each program, every weight read once for each sum and write.

A weight is seen as [out, in, positions] and cut into blocks of (ROWS, COLUMNS) for each position; block size 1 makes it
one long row. A tile is [BLOCK_R, BLOCK_B, BLOCK_C, BLOCK_K]: rows of a block, blocks side by side, columns of a block,
positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from spartan_kernels.backends.triton.configs import TILE, CompileCase, block_tile, name_of
from spartan_kernels.backends.triton.primitives import all_loaded, sign_of
from spartan_kernels.operands import (
    AddBlockSigns,
    BlockScores,
    KeptSoftMass,
    MaskedWeight,
    MaskedWeightBackward,
    MaskedWeightCorrection,
    MaskedWeightCoupling,
)

WARPS = 8


@triton.jit
def _tile_at(
    r0, c0, out, in_, grid_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of the tile whose blocks begin at row r0 and column c0 of themselves."""
    tiles = tl.cdiv(grid_columns, BLOCK_B)
    block_row = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_B
    r = r0 + tl.arange(0, BLOCK_R)[:, None, None, None]
    b = first + tl.arange(0, BLOCK_B)[None, :, None, None]
    c = c0 + tl.arange(0, BLOCK_C)[None, None, :, None]
    k = tl.arange(0, BLOCK_K)[None, None, None, :]
    row = block_row * ROWS + r
    column = b * COLUMNS + c
    mask = (r < ROWS) & (row < out) & (c < COLUMNS) & (column < in_) & (k < POSITIONS)
    return (row * in_ + column) * POSITIONS + k, mask


@triton.jit
def _blocks_at(grid_columns, POSITIONS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """Offsets [BLOCK_B, BLOCK_K] into the grid of blocks, and their mask."""
    tiles = tl.cdiv(grid_columns, BLOCK_B)
    block_row = (tl.program_id(0) // tiles).to(tl.int64)
    b = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    return (block_row * grid_columns + b) * POSITIONS + k, (b < grid_columns) & (k < POSITIONS)


@triton.jit
def _spread(x, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    return tl.reshape(x, (1, BLOCK_B, 1, BLOCK_K))


@triton.jit
def _block_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _masked_weight_forward_kernel(
    weight_ptr, soft_ptr, hard_ptr, result_ptr, out, in_, grid_columns,
    HAS_SOFT: tl.constexpr, HAS_HARD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    at, valid = _blocks_at(grid_columns, POSITIONS, BLOCK_B, BLOCK_K)
    if HAS_SOFT:
        m = _spread(tl.load(soft_ptr + at, valid, other=0.0).to(tl.float32), BLOCK_B, BLOCK_K)
    if HAS_HARD:
        h = _spread(tl.load(hard_ptr + at, valid, other=0), BLOCK_B, BLOCK_K)
    for r0 in range(0, ROWS, BLOCK_R):
        for c0 in range(0, COLUMNS, BLOCK_C):
            offsets, inside = _tile_at(
                r0, c0, out, in_, grid_columns, ROWS, COLUMNS, POSITIONS, BLOCK_R, BLOCK_B, BLOCK_C, BLOCK_K
            )
            result = tl.load(weight_ptr + offsets, inside, other=0.0).to(tl.float32)
            if HAS_SOFT:
                result = result * m
            if HAS_HARD:
                result = tl.where(h != 0, result, 0.0)
            tl.store(result_ptr + offsets, result.to(result_ptr.dtype.element_ty), inside)


@triton.jit
def _masked_weight_backward_kernel(
    grad_ptr, weight_ptr, soft_ptr, hard_ptr, beta_ptr, costs_ptr, result_ptr, out, in_, grid_columns,
    HAS_SOFT: tl.constexpr, HAS_HARD: tl.constexpr, HAS_COSTS: tl.constexpr, IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    at, valid = _blocks_at(grid_columns, POSITIONS, BLOCK_B, BLOCK_K)
    if HAS_SOFT:
        g = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
        for r0 in range(0, ROWS, BLOCK_R):
            for c0 in range(0, COLUMNS, BLOCK_C):
                offsets, inside = _tile_at(
                    r0, c0, out, in_, grid_columns, ROWS, COLUMNS, POSITIONS, BLOCK_R, BLOCK_B, BLOCK_C, BLOCK_K
                )
                weight = tl.load(weight_ptr + offsets, inside, other=0.0).to(tl.float32)
                g += _block_sum(tl.load(grad_ptr + offsets, inside, other=0.0).to(tl.float32) * weight)
        m = tl.load(soft_ptr + at, valid, other=0.0).to(tl.float32)
        if HAS_COSTS:
            a = tl.load(costs_ptr + at, valid, other=1.0).to(tl.float32)
        else:
            a = tl.load(costs_ptr).to(tl.float32)
        pull = _spread(tl.load(beta_ptr).to(tl.float32) * (m * (1 - m)) * g / a, BLOCK_B, BLOCK_K)
        m = _spread(m, BLOCK_B, BLOCK_K)
    if HAS_HARD:
        h = _spread(tl.load(hard_ptr + at, valid, other=0), BLOCK_B, BLOCK_K)
    if IN_PLACE:
        tl.debug_barrier()  # before any warp changes what another has yet to add
    for r0 in range(0, ROWS, BLOCK_R):
        for c0 in range(0, COLUMNS, BLOCK_C):
            offsets, inside = _tile_at(
                r0, c0, out, in_, grid_columns, ROWS, COLUMNS, POSITIONS, BLOCK_R, BLOCK_B, BLOCK_C, BLOCK_K
            )
            result = tl.load(grad_ptr + offsets, inside, other=0.0).to(tl.float32)
            if IN_PLACE:
                all_loaded(BLOCK_R * BLOCK_B * BLOCK_C * BLOCK_K)
            if HAS_SOFT:
                weight = tl.load(weight_ptr + offsets, inside, other=0.0).to(tl.float32)
                result = result * m + sign_of(weight) * pull
            if HAS_HARD:
                result = tl.where(h != 0, result, 0.0)
            tl.store(result_ptr + offsets, result.to(result_ptr.dtype.element_ty), inside)


@triton.jit
def _masked_weight_coupling_kernel(
    grad_ptr, weight_ptr, soft_ptr, beta_ptr, costs_ptr, partial_ptr, out, in_, grid_columns,
    HAS_COSTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    at, valid = _blocks_at(grid_columns, POSITIONS, BLOCK_B, BLOCK_K)
    q = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    v = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for r0 in range(0, ROWS, BLOCK_R):
        for c0 in range(0, COLUMNS, BLOCK_C):
            offsets, inside = _tile_at(
                r0, c0, out, in_, grid_columns, ROWS, COLUMNS, POSITIONS, BLOCK_R, BLOCK_B, BLOCK_C, BLOCK_K
            )
            weight = tl.load(weight_ptr + offsets, inside, other=0.0).to(tl.float32)
            q += _block_sum(tl.load(grad_ptr + offsets, inside, other=0.0).to(tl.float32) * weight)
            v += _block_sum(tl.abs(weight))
    m = tl.load(soft_ptr + at, valid, other=0.0).to(tl.float32)
    if HAS_COSTS:
        a = tl.load(costs_ptr + at, valid, other=1.0).to(tl.float32)
    else:
        a = tl.load(costs_ptr).to(tl.float32)
    gm = q / (1 + tl.load(beta_ptr).to(tl.float32) * (1 - m) * v / a)
    tl.store(partial_ptr + 2 * tl.program_id(0), tl.sum(tl.sum((1 - m) * gm, 1), 0).to(tl.float64))
    tl.store(partial_ptr + 2 * tl.program_id(0) + 1, tl.sum(tl.sum(a * m * (1 - m), 1), 0).to(tl.float64))


@triton.jit
def _masked_weight_correct_kernel(
    grad_ptr, weight_ptr, soft_ptr, scale_ptr, out, in_, grid_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    at, valid = _blocks_at(grid_columns, POSITIONS, BLOCK_B, BLOCK_K)
    m = tl.load(soft_ptr + at, valid, other=0.0).to(tl.float32)
    pull = _spread(m * (1 - m) * tl.load(scale_ptr).to(tl.float32), BLOCK_B, BLOCK_K)
    for r0 in range(0, ROWS, BLOCK_R):
        for c0 in range(0, COLUMNS, BLOCK_C):
            offsets, inside = _tile_at(
                r0, c0, out, in_, grid_columns, ROWS, COLUMNS, POSITIONS, BLOCK_R, BLOCK_B, BLOCK_C, BLOCK_K
            )
            weight = tl.load(weight_ptr + offsets, inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + offsets, inside, other=0.0).to(tl.float32) - sign_of(weight) * pull
            all_loaded(BLOCK_R * BLOCK_B * BLOCK_C * BLOCK_K)
            tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), inside)


@triton.jit
def _add_block_signs_kernel(
    grad_ptr, weight_ptr, pull_ptr, out, in_, grid_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    at, valid = _blocks_at(grid_columns, POSITIONS, BLOCK_B, BLOCK_K)
    pull = _spread(tl.load(pull_ptr + at, valid, other=0.0).to(tl.float32), BLOCK_B, BLOCK_K)
    for r0 in range(0, ROWS, BLOCK_R):
        for c0 in range(0, COLUMNS, BLOCK_C):
            offsets, inside = _tile_at(
                r0, c0, out, in_, grid_columns, ROWS, COLUMNS, POSITIONS, BLOCK_R, BLOCK_B, BLOCK_C, BLOCK_K
            )
            weight = tl.load(weight_ptr + offsets, inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + offsets, inside, other=0.0).to(tl.float32) + sign_of(weight) * pull
            all_loaded(BLOCK_R * BLOCK_B * BLOCK_C * BLOCK_K)
            tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), inside)


@triton.jit
def _kept_soft_mass_kernel(soft_ptr, hard_ptr, partial_ptr, n, TILE: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < n
    kept = tl.load(hard_ptr + at, inside, other=0) != 0
    m = tl.load(soft_ptr + at, inside, other=0.0).to(tl.float32)
    tl.store(partial_ptr + 2 * program, tl.sum(tl.where(kept, m, 0.0), 0).to(tl.float64))
    tl.store(partial_ptr + 2 * program + 1, tl.sum(kept.to(tl.int32), 0).to(tl.float64))


@triton.jit
def _block_scores_kernel(
    weight_ptr, scores_ptr, out, in_, grid_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    at, valid = _blocks_at(grid_columns, POSITIONS, BLOCK_B, BLOCK_K)
    v = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for r0 in range(0, ROWS, BLOCK_R):
        for c0 in range(0, COLUMNS, BLOCK_C):
            offsets, inside = _tile_at(
                r0, c0, out, in_, grid_columns, ROWS, COLUMNS, POSITIONS, BLOCK_R, BLOCK_B, BLOCK_C, BLOCK_K
            )
            v += _block_sum(tl.abs(tl.load(weight_ptr + offsets, inside, other=0.0).to(tl.float32)))
    tl.store(scores_ptr + at, v.to(scores_ptr.dtype.element_ty), valid)


class _Blocks:
    """A weight cut into blocks: the geometry that every kernel takes, and its grid of programs."""

    def __init__(self, shape: torch.Size, rows: int, columns: int) -> None:
        if (rows, columns) == (1, 1):
            shape = torch.Size((1, shape.numel()))
        self.out, self.columns = shape[0], shape[1]
        self.positions = math.prod(shape[2:])
        self.grid_columns = triton.cdiv(self.columns, columns)
        block_r, block_b, block_c, block_k = block_tile(rows, columns, self.positions, self.grid_columns)
        self.programs = triton.cdiv(self.out, rows) * triton.cdiv(self.grid_columns, block_b)
        self.constants: dict[str, Any] = {
            "ROWS": rows, "COLUMNS": columns, "POSITIONS": self.positions,
            "BLOCK_R": block_r, "BLOCK_B": block_b, "BLOCK_C": block_c, "BLOCK_K": block_k,
        }  # fmt: skip

    def launch(self, kernel: Any, *pointers: torch.Tensor, **constants: Any) -> None:
        """Run `kernel` over all blocks; a weight without entries launches nothing."""
        if self.programs * self.positions == 0:
            return
        with torch.cuda.device_of(pointers[0]):
            kernel[(self.programs,)](
                *pointers, self.out, self.columns, self.grid_columns, **constants, **self.constants, num_warps=WARPS
            )


def _bytes(hard: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    return stand_in if hard is None else hard.contiguous().view(torch.uint8)


def masked_weight_forward(o: MaskedWeight) -> torch.Tensor:
    """theta * m * h."""
    weight = o.weight.contiguous()
    result = torch.empty_like(weight)
    _Blocks(weight.shape, o.rows, o.columns).launch(
        _masked_weight_forward_kernel,
        weight, weight if o.soft is None else o.soft.contiguous(), _bytes(o.hard, weight), result,
        HAS_SOFT=o.soft is not None, HAS_HARD=o.hard is not None,
    )  # fmt: skip
    return result


def masked_weight_backward(o: MaskedWeightBackward) -> torch.Tensor:
    """G_i m_b + sign(theta_i) beta s_b g_b / a_b, the local part of equation (2)."""
    result = torch.empty_like(o.weight, memory_format=torch.contiguous_format)
    _backward(o, o.grad.contiguous(), result)
    return result


def masked_weight_backward_(o: MaskedWeightBackward) -> None:
    """The same, in the memory of grad."""
    dense = o.grad.contiguous()
    _backward(o, dense, dense)
    if dense is not o.grad:
        o.grad.copy_(dense)


def _backward(o: MaskedWeightBackward, grad: torch.Tensor, result: torch.Tensor) -> None:
    weight, soft, hard = o.weight.contiguous(), o.soft, None if o.straight_through else o.hard
    _Blocks(weight.shape, o.rows, o.columns).launch(
        _masked_weight_backward_kernel,
        grad, weight, weight if soft is None else soft.contiguous(), _bytes(hard, weight), o.beta, o.costs.contiguous(),
        result,
        HAS_SOFT=soft is not None, HAS_HARD=hard is not None, HAS_COSTS=o.costs.dim() > 0, IN_PLACE=result is grad,
    )  # fmt: skip


def masked_weight_coupling(o: MaskedWeightCoupling) -> torch.Tensor:
    """[sum_b (1 - m_b) g_b m_b, sum_b a_b s_b] of this weight."""
    blocks = _Blocks(o.weight.shape, o.rows, o.columns)
    partial = torch.empty((blocks.programs, 2), dtype=torch.float64, device=o.weight.device)
    blocks.launch(
        _masked_weight_coupling_kernel,
        o.grad.contiguous(), o.weight.contiguous(), o.soft.contiguous(), o.beta, o.costs.contiguous(), partial,
        HAS_COSTS=o.costs.dim() > 0,
    )  # fmt: skip
    return partial.sum(0) if o.weight.numel() else partial.new_zeros(2)


def masked_weight_correct_(o: MaskedWeightCorrection) -> None:
    """grad_i -= sign(theta_i) s_b scale."""
    dense = o.grad.contiguous()
    _Blocks(o.weight.shape, o.rows, o.columns).launch(
        _masked_weight_correct_kernel, dense, o.weight.contiguous(), o.soft.contiguous(), o.scale
    )
    if dense is not o.grad:
        o.grad.copy_(dense)


def add_block_signs_(o: AddBlockSigns) -> None:
    """grad_i += sign(theta_i) pull_b."""
    dense = o.grad.contiguous()
    _Blocks(o.weight.shape, o.rows, o.columns).launch(
        _add_block_signs_kernel, dense, o.weight.contiguous(), o.pull.contiguous()
    )
    if dense is not o.grad:
        o.grad.copy_(dense)


def kept_soft_mass(o: KeptSoftMass) -> torch.Tensor:
    """[sum h m, sum h] where each weight is a block."""
    n = o.hard.numel()
    partial = torch.empty((max(1, triton.cdiv(n, TILE)), 2), dtype=torch.float64, device=o.hard.device)
    if n == 0:
        return partial.new_zeros(2)
    with torch.cuda.device_of(o.hard):
        _kept_soft_mass_kernel[(partial.shape[0],)](
            o.soft.contiguous(), o.hard.contiguous().view(torch.uint8), partial, n, TILE=TILE, num_warps=WARPS
        )
    return partial.sum(0)


def block_scores(o: BlockScores) -> torch.Tensor:
    """Sum of |theta| over each block."""
    blocks = _Blocks(o.weight.shape, o.rows, o.columns)
    shape = o.weight.shape
    if (o.rows, o.columns) != (1, 1):
        shape = torch.Size((triton.cdiv(shape[0], o.rows), blocks.grid_columns, *shape[2:]))
    scores = torch.empty(shape, dtype=o.weight.dtype, device=o.weight.device)
    blocks.launch(_block_scores_kernel, o.weight.contiguous(), scores)
    return scores


def _compile_cases() -> list[CompileCase]:
    sizes = {"out": "i32", "in_": "i32", "grid_columns": "i32"}
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        value = f"*{name_of(dtype)}"
        pointers = {
            _masked_weight_forward_kernel: ("weight", "soft", "hard", "result"),
            _masked_weight_backward_kernel: ("grad", "weight", "soft", "hard", "beta", "costs", "result"),
            _masked_weight_coupling_kernel: ("grad", "weight", "soft", "beta", "costs", "partial"),
            _masked_weight_correct_kernel: ("grad", "weight", "soft", "scale"),
            _add_block_signs_kernel: ("grad", "weight", "pull"),
            _block_scores_kernel: ("weight", "scores"),
        }
        types = {"hard": "*u8", "beta": "*fp64", "costs": "*fp64", "partial": "*fp64", "scale": "*fp64"}
        for shape, block in (((1 << 20,), 1), ((4096, 4096), 4), ((4096, 4096), 32), ((256, 256, 3, 3), 16)):
            blocks = _Blocks(torch.Size(shape), block, block)
            for kernel, names in pointers.items():
                switches = [name for name in kernel.arg_names if name.startswith("HAS_") or name == "IN_PLACE"]
                flags = {name: name not in ("HAS_COSTS", "IN_PLACE") for name in switches}
                signature = {f"{name}_ptr": types.get(name, value) for name in names} | sizes
                label = f"block {block}, {len(shape)}-dim, {name_of(dtype)}"
                cases.append(CompileCase(kernel, signature, flags | blocks.constants, WARPS, label))
                if "IN_PLACE" in flags:
                    constants = flags | {"IN_PLACE": True} | blocks.constants
                    cases.append(CompileCase(kernel, signature, constants, WARPS, f"{label}, in place"))
        signature = {"soft_ptr": value, "hard_ptr": "*u8", "partial_ptr": "*fp64", "n": "i64"}
        cases.append(CompileCase(_kept_soft_mass_kernel, signature, {"TILE": TILE}, WARPS, name_of(dtype)))
    return cases


COMPILE_CASES = _compile_cases()
