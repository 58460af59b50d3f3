"""Hard top-k of rows too long for registers: the key at which a budget runs out, two bits for each pass over the row.

One program walks a row, or, where the rows are longer still, several share each: then every pass is a launch of its
own, whose programs begin with what all parts of their row counted in the one before. An entry of -inf is masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spartan_kernels.backends.triton.configs import (
    LONG_ROW_TILE,
    LONG_ROW_WARPS,
    CompileCase,
    compile_case,
    fits_one_program,
    name_of,
    power_of_two,
    row_parts,
)
from spartan_kernels.backends.triton.launches import Launch
from spartan_kernels.backends.triton.long_rows import load_ratio_tile, store_tile
from spartan_kernels.backends.triton.primitives import INFINITY, clamped_budget, ordered_key
from spartan_kernels.backends.triton.soft_topk_rows import cost_strides
from spartan_kernels.backends.triton.split_rows import part_of
from spartan_kernels.operands import HardTopk

PASSES = tl.constexpr(16)
DIGITS = tl.constexpr(4)  # of two bits
COUNTED_TILE = LONG_ROW_TILE // 4  # where programs share a row: with longer ones the counts spill on sm_80


@triton.jit
def _spent_from(
    values_ptr, costs_ptr, begin, end, n, stride_vn, stride_cn, cut, shift,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Cost of what is live in [begin, end) from the cut with each next digit on upwards, float64 [DIGITS]."""
    least = (cut + (tl.arange(0, DIGITS).to(tl.int64) << shift)).to(tl.uint32)
    spent = tl.zeros((TILE, DIGITS), tl.float64 if HAS_COSTS else tl.int32)
    for start in range(begin, end, TILE):
        u, a, live = load_ratio_tile(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        chosen = live[:, None] & (ordered_key(u)[:, None] >= least[None, :])
        if HAS_COSTS:
            spent += tl.where(chosen, a[:, None], 0.0).to(tl.float64)
        else:
            spent += chosen.to(tl.int32)
    return tl.sum(spent, 0).to(tl.float64)


@triton.jit
def _limit_of(budget, spent):
    """The budget, given what the first pass found; infinite where it buys everything: the cut is the smallest key."""
    total = tl.sum(tl.where(tl.arange(0, DIGITS) == 0, spent, 0.0), 0)
    budget = clamped_budget(budget, total)
    return tl.where(budget >= total, INFINITY, budget)


@triton.jit
def _next_cut(cut, spent, shift, limit):
    over = (spent > limit) & (tl.arange(0, DIGITS) > 0)
    return cut + (tl.sum(over.to(tl.int64), 0) << shift)


@triton.jit
def _cost_at(
    values_ptr, costs_ptr, begin, end, n, stride_vn, stride_cn, cut_key, HAS_COSTS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Cost of what is above the cut, and at it, in [begin, end)."""
    above = tl.zeros((TILE,), tl.float64)
    tied = above
    for start in range(begin, end, TILE):
        u, a, live = load_ratio_tile(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        key = ordered_key(u)
        above += tl.where(live & (key > cut_key), a, 0.0).to(tl.float64)
        tied += tl.where(live & (key == cut_key), a, 0.0).to(tl.float64)
    return tl.sum(above, 0), tl.sum(tied, 0)


@triton.jit
def _write_hard(
    values_ptr, costs_ptr, mask_ptr, begin, end, n, stride_vn, stride_cn, cut_key, room, before,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The masks of [begin, end): of what is at the cut, as much as there is room for; `before` lies in front of it."""
    for start in range(begin, end, TILE):
        u, a, live = load_ratio_tile(values_ptr, costs_ptr, stride_vn, stride_cn, start, n, HAS_COSTS, TILE)
        key = ordered_key(u)
        cost = tl.where(live & (key == cut_key), a, 0.0).to(tl.float64)
        fits = before + tl.cumsum(cost, 0) <= room
        before += tl.sum(cost, 0)
        keep = live & ((key > cut_key) | ((key == cut_key) & fits))
        store_tile(mask_ptr, start, n, keep.to(tl.uint8), TILE)


@triton.jit
def _long_hard_topk_forward_kernel(
    values_ptr, costs_ptr, budget_ptr, mask_ptr, n, stride_vm, stride_vn, stride_cm, stride_cn, stride_bm,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * stride_vm
    costs_ptr += row * stride_cm
    budget = tl.load(budget_ptr + row * stride_bm).to(tl.float64)
    limit, cut = budget, row * 0
    shift = 2 * PASSES - 2
    while shift >= 0:
        spent = _spent_from(values_ptr, costs_ptr, 0, n, n, stride_vn, stride_cn, cut, shift, HAS_COSTS, TILE)
        limit = tl.where(shift == 2 * PASSES - 2, _limit_of(budget, spent), limit)
        cut = _next_cut(cut, spent, shift, limit)
        shift -= 2
    key = cut.to(tl.uint32)
    above, _ = _cost_at(values_ptr, costs_ptr, 0, n, n, stride_vn, stride_cn, key, HAS_COSTS, TILE)
    _write_hard(
        values_ptr, costs_ptr, mask_ptr + row * n, 0, n, n, stride_vn, stride_cn, key, limit - above, above * 0.0,
        HAS_COSTS, TILE,
    )  # fmt: skip


@triton.jit
def _counts_at(counts_ptr, step, BLOCK: tl.constexpr):
    """Where the counts of the row's parts in a pass are kept, and which of them there are: [BLOCK, DIGITS]."""
    row, parts = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    part = tl.arange(0, BLOCK)[:, None]
    begin = ((step.to(tl.int64) * tl.num_programs(0) + row) * parts) * DIGITS
    return counts_ptr + begin + part * DIGITS + tl.arange(0, DIGITS)[None, :], part < parts


@triton.jit
def _cut_before(budget, cuts_ptr, counts_ptr, step, BLOCK: tl.constexpr):
    """The cut and the limit as the passes before `step` > 0 have left them."""
    first_at, there = _counts_at(counts_ptr, step * 0, BLOCK)
    last_at, _ = _counts_at(counts_ptr, step - 1, BLOCK)
    limit = _limit_of(budget, tl.sum(tl.load(first_at, there, other=0.0), 0))
    spent = tl.sum(tl.load(last_at, there, other=0.0), 0)
    cut = tl.load(cuts_ptr + tl.program_id(0).to(tl.int64) * PASSES + step - 1)
    return _next_cut(cut, spent, 2 * (PASSES - step), limit), limit


@triton.jit(do_not_specialize=["step"])
def _split_count_kernel(
    values_ptr, costs_ptr, budget_ptr, cuts_ptr, counts_ptr, step,
    n, part, stride_vm, stride_vn, stride_cm, stride_cn, stride_bm,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass: a cut of two bits more, and what this part counts from it on upwards."""
    row, begin, end = part_of(n, part)
    cut = row * 0
    if step > 0:
        budget = tl.load(budget_ptr + row * stride_bm).to(tl.float64)
        cut, _ = _cut_before(budget, cuts_ptr, counts_ptr, step, BLOCK)
    if begin == 0:
        tl.store(cuts_ptr + row * PASSES + step, cut)
    spent = _spent_from(
        values_ptr + row * stride_vm, costs_ptr + row * stride_cm, begin, end, n, stride_vn, stride_cn,
        cut, 2 * (PASSES - 1 - step), HAS_COSTS, TILE,
    )  # fmt: skip
    own = (step.to(tl.int64) * tl.num_programs(0) + row) * tl.num_programs(1) + tl.program_id(1)
    tl.store(counts_ptr + own * DIGITS + tl.arange(0, DIGITS), spent)


@triton.jit
def _split_ties_kernel(
    values_ptr, costs_ptr, budget_ptr, cuts_ptr, counts_ptr, ties_ptr,
    n, part, stride_vm, stride_vn, stride_cm, stride_cn, stride_bm,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cost of each part above the cut that was found, and at it."""
    row, begin, end = part_of(n, part)
    budget = tl.load(budget_ptr + row * stride_bm).to(tl.float64)
    cut, _ = _cut_before(budget, cuts_ptr, counts_ptr, begin.to(tl.int32) * 0 + PASSES, BLOCK)
    above, tied = _cost_at(
        values_ptr + row * stride_vm, costs_ptr + row * stride_cm, begin, end, n, stride_vn, stride_cn,
        cut.to(tl.uint32), HAS_COSTS, TILE,
    )  # fmt: skip
    own = ties_ptr + 2 * (row * tl.num_programs(1) + tl.program_id(1))
    tl.store(own, above)
    tl.store(own + 1, tied)


@triton.jit
def _split_hard_write_kernel(
    values_ptr, costs_ptr, budget_ptr, cuts_ptr, counts_ptr, ties_ptr, mask_ptr,
    n, part, stride_vm, stride_vn, stride_cm, stride_cn, stride_bm,
    HAS_COSTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ties go to the lowest index: those of the parts in front of this one come first."""
    row, begin, end = part_of(n, part)
    budget = tl.load(budget_ptr + row * stride_bm).to(tl.float64)
    cut, limit = _cut_before(budget, cuts_ptr, counts_ptr, begin.to(tl.int32) * 0 + PASSES, BLOCK)
    at, parts = tl.arange(0, BLOCK), tl.num_programs(1)
    own = ties_ptr + 2 * (row * parts + at)
    above = tl.sum(tl.load(own, at < parts, other=0.0), 0)
    before = tl.sum(tl.load(own + 1, at < tl.program_id(1), other=0.0), 0)
    _write_hard(
        values_ptr + row * stride_vm, costs_ptr + row * stride_cm, mask_ptr + row * n, begin, end, n,
        stride_vn, stride_cn, cut.to(tl.uint32), limit - above, before, HAS_COSTS, TILE,
    )  # fmt: skip


def plan(o: HardTopk, mask: torch.Tensor) -> list[Launch]:
    """All that is launched, for any number of rows; h goes to `mask`, of bytes."""
    values, costs = o.values, o.values if o.costs is None else o.costs
    rows, n = values.shape
    strides = (*values.stride(), *cost_strides(o.costs), o.budget.stride(0))
    options = {"HAS_COSTS": o.costs is not None, "TILE": LONG_ROW_TILE // 2, "num_warps": LONG_ROW_WARPS}
    if fits_one_program(values):
        arguments = (values, costs, o.budget, mask, n, *strides)
        return [Launch(_long_hard_topk_forward_kernel, rows, arguments, options)]
    part, parts = row_parts(values)
    passes, device = int(PASSES), values.device
    cuts = torch.empty((rows, passes), dtype=torch.int64, device=device)
    counts = torch.empty((passes, rows, parts, int(DIGITS)), dtype=torch.float64, device=device)
    ties = torch.empty((rows, parts, 2), dtype=torch.float64, device=device)
    found, sizes = (values, costs, o.budget, cuts, counts), (n, part, *strides)
    options["BLOCK"] = power_of_two(parts)
    narrow = options | {"TILE": COUNTED_TILE}
    return [
        *[Launch(_split_count_kernel, (rows, parts), (*found, step, *sizes), narrow) for step in range(passes)],
        Launch(_split_ties_kernel, (rows, parts), (*found, ties, *sizes), narrow),
        Launch(_split_hard_write_kernel, (rows, parts), (*found, ties, mask, *sizes), options),
    ]


def forward(o: HardTopk, mask: torch.Tensor) -> torch.Tensor:
    """h for each row of values [rows, n], into the bool tensor `mask`."""
    with torch.cuda.device_of(o.values):
        for launch in plan(o, mask.view(torch.uint8)):
            launch()
    return mask


def _compile_cases() -> list[CompileCase]:
    types = dict.fromkeys(("budget", "counts", "ties"), "*fp64") | {"mask": "*u8", "cuts": "*i64"}
    kernels = (_long_hard_topk_forward_kernel, _split_count_kernel, _split_ties_kernel, _split_hard_write_kernel)
    cases = []
    for kernel in kernels:
        tile = COUNTED_TILE if kernel in (_split_count_kernel, _split_ties_kernel) else LONG_ROW_TILE // 2
        for dtype, costs in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            options = {
                "HAS_COSTS": costs, "TILE": tile, "BLOCK": 128, "stride_vn": 1, "stride_cn": 1,
                "num_warps": LONG_ROW_WARPS,
            }  # fmt: skip
            label = f"{'costs, ' if costs else ''}{name_of(dtype)}"
            even = ("n", "part", "stride_vm", "stride_cm")
            cases.append(compile_case(kernel, dtype, options, label, types, even, bounded=("step",)))
    return cases


COMPILE_CASES = _compile_cases()
