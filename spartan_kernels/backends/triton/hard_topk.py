"""Hard top-k by rows: the key at which a budget runs out, found bit by bit on a row that stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spartan_kernels.backends.shared import check_rows, with_indices
from spartan_kernels.backends.triton import long_hard
from spartan_kernels.backends.triton.configs import (
    MAX_RESIDENT_ROW,
    MAX_RESIDENT_ROW_WITH_COSTS,
    CompileCase,
    compile_case,
    fits_in_registers,
    name_of,
    row_tile,
)
from spartan_kernels.backends.triton.launches import FUSED
from spartan_kernels.backends.triton.lists import hard_topk_global_forward
from spartan_kernels.backends.triton.primitives import INFINITY, clamped_budget, ordered_key
from spartan_kernels.backends.triton.soft_topk_rows import cost_strides, dense, load_rows, row_totals
from spartan_kernels.operands import HardTopk, HardTopkIndices

__all__ = ["hard_topk_forward", "hard_topk_global_forward", "hard_topk_indices_forward"]


@triton.jit
def _spent(a, chosen, HAS_COSTS: tl.constexpr):
    """Cost of the chosen entries of each row, exact: counts, or float64 sums of float32 numbers."""
    if HAS_COSTS:
        return tl.sum(tl.where(chosen, a, 0.0).to(tl.float64), 1)
    return tl.sum(chosen.to(tl.int32), 1).to(tl.float64)


@triton.jit
def _hard_topk_forward_kernel(
    values_ptr, costs_ptr, budget_ptr, mask_ptr,
    n_rows, n, stride_vm, stride_vn, stride_cm, stride_cn, stride_bm,
    HAS_COSTS: tl.constexpr, DENSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    u, a, row, offsets, inside = load_rows(
        values_ptr, costs_ptr, n_rows, n, stride_vm, stride_vn, stride_cm, stride_cn, HAS_COSTS, DENSE, BLOCK_M, BLOCK_N
    )
    key, live = ordered_key(u), u != -INFINITY
    total = row_totals(a, live, HAS_COSTS)
    budget = clamped_budget(tl.load(budget_ptr + row * stride_bm, row < n_rows, other=0.0).to(tl.float64), total)
    # the largest key from which on upwards the row costs more than its budget
    cut = tl.zeros((BLOCK_M,), tl.uint32)
    bit = tl.full((BLOCK_M,), 1 << 31, tl.uint32)
    for _ in range(32):
        higher = cut | bit
        cut = tl.where(_spent(a, live & (key >= higher[:, None]), HAS_COSTS) > budget, higher, cut)
        bit = bit >> 1
    above = live & (key > cut[:, None])
    tied = live & (key == cut[:, None])
    room = budget - _spent(a, above, HAS_COSTS)
    if HAS_COSTS:
        fits = tl.cumsum(tl.where(tied, a, 0.0).to(tl.float64), 1) <= room[:, None]
    else:
        fits = tl.cumsum(tied.to(tl.int32), 1) <= tl.floor(room).to(tl.int32)[:, None]
    keep = above | (tied & fits) | (live & (budget >= total)[:, None])
    tl.store(mask_ptr + offsets, keep.to(tl.uint8), inside)


def hard_topk_forward(o: HardTopk) -> torch.Tensor:
    """h for each row of values [rows, n]."""
    check_rows(o.values, o.budget, o.costs, None)
    rows, n = o.values.shape
    mask = torch.empty((rows, n), dtype=torch.bool, device=o.values.device)
    if mask.numel() == 0:
        return mask
    if not fits_in_registers(o.values, o.costs):
        return long_hard.forward(o, mask)
    block_m, block_n, warps = row_tile(n)
    with torch.cuda.device_of(o.values):
        _hard_topk_forward_kernel[(triton.cdiv(rows, block_m),)](
            o.values, o.values if o.costs is None else o.costs, o.budget, mask.view(torch.uint8),
            rows, n, *o.values.stride(), *cost_strides(o.costs), o.budget.stride(0),
            HAS_COSTS=o.costs is not None, DENSE=dense(block_n, o.values),
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, **FUSED,
        )  # fmt: skip
    return mask


def hard_topk_indices_forward(o: HardTopkIndices) -> tuple[torch.Tensor, torch.Tensor]:
    """h for each row of values [rows, n], and the indices of k entries of each."""
    return with_indices(o, hard_topk_forward)


def _compile_cases() -> list[CompileCase]:
    cases = []
    dtype = torch.float32
    for n, costs in ((4, False), (4096, False), (MAX_RESIDENT_ROW, False), (MAX_RESIDENT_ROW_WITH_COSTS, True)):
        block_m, block_n, warps = row_tile(n)
        options = {
            "HAS_COSTS": costs, "BLOCK_M": block_m, "BLOCK_N": block_n, "stride_vn": 1, "DENSE": True,
            "num_warps": warps,
        }  # fmt: skip
        label = f"rows of {n}, {'costs, ' if costs else ''}{name_of(dtype)}"
        types = {"mask": "*u8", "budget": "*fp64"}
        cases.append(compile_case(_hard_topk_forward_kernel, dtype, options, label, types, ()))
    return cases


COMPILE_CASES = _compile_cases()
