"""One budget over a list of tensors, in a fixed number of launches: the host never looks at what they find.

total cost     only where there are costs
start          t and a range of keys, from the state or from a sample
4 x (survey, advance)   moments and key histogram in one read; one Halley step and a narrower range
finish         the last resort of the soft search, one program
ties           who among equals is kept: nothing to do where the budget runs out between two values
write, finish, write    masks with their sum; again only when it misses the budget
remember       thresholds for the backward pass and for the next solve
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from spartan_kernels.arguments import clamp_budget, inspectable, require_beta, require_costs, require_finite
from spartan_kernels.backends.triton import global_passes as passes
from spartan_kernels.backends.triton import global_steps as steps
from spartan_kernels.backends.triton.configs import (
    CHUNK,
    CHUNK_WARPS,
    SAMPLE,
    SAMPLE_WARPS,
    CompileCase,
    name_of,
    power_of_two,
)
from spartan_kernels.backends.triton.tables import TensorList
from spartan_kernels.groups import refuse_group

ROUNDS = 4  # exact for any hard cut: a range that misses costs one round, all 32 bits of the key three
_STEP_WARPS = 8
_BINS = 2048
_TIE_BLOCK = 1024
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Solve:
    """The launches of one solve: workspace, constants and grid shared by its kernels."""

    def __init__(self, problem: TensorList, absolute: bool, soft: bool, hard: bool) -> None:
        self.problem = problem
        device, programs = problem.device, problem.programs
        self.control = torch.zeros(16, dtype=torch.float64, device=device)
        self.select = torch.zeros(16 + (_BINS if hard else 0), dtype=torch.int64, device=device)
        self.partial = torch.zeros((programs, 6), dtype=torch.float64, device=device)
        self.ties = torch.empty(problem.chunks if hard else 1, dtype=torch.int64, device=device)
        self.sides = {"SOFT": soft, "HARD": hard}
        self.kind = {"DTYPE": TYPES[problem.values[0].dtype], "HAS_COSTS": bool(problem.costs), "ABSOLUTE": absolute}
        self.block = power_of_two(programs)

    def run(
        self, table: torch.Tensor, budget: torch.Tensor, beta: torch.Tensor, state: torch.Tensor | None
    ) -> torch.Tensor:
        """Launch everything; returns (c, d)."""
        p, sides, kind = self.problem, self.sides, self.kind
        control, select, partial, ties = self.control, self.select, self.partial, self.ties
        threshold = torch.empty(2, dtype=torch.float64, device=p.device)
        memory = torch.zeros(8, dtype=torch.float64, device=p.device) if state is None else state
        walk: Any = {"CHUNK": CHUNK, "num_warps": CHUNK_WARPS}
        one: Any = {"BLOCK": self.block, "num_warps": _STEP_WARPS}
        grid, sizes = (p.programs,), (len(p.values), p.chunks)
        soft, hard = sides["SOFT"], sides["HARD"]
        with torch.cuda.device_of(table):
            if p.costs:
                passes._total_cost_kernel[grid](table, partial, *sizes, DTYPE=kind["DTYPE"], **walk)
            steps._start_kernel[(1,)](
                table, budget, beta, memory, control, select, partial, len(p.values), p.length, p.programs,
                **kind, **sides, SAMPLE=SAMPLE, BLOCK=self.block, num_warps=SAMPLE_WARPS,
            )  # fmt: skip
            for _ in range(ROUNDS):
                passes._survey_kernel[grid](
                    table, control, select, partial, *sizes, **kind, **sides, BINS=_BINS, **walk
                )
                steps._advance_kernel[(1,)](control, select, partial, p.programs, **sides, BINS=_BINS, **one)
            finish = (table, control, partial, *sizes, p.programs)
            if soft:
                steps._finish_kernel[(1,)](*finish, **kind, AFTER_WRITE=False, CHUNK=CHUNK, **one)
            if hard:
                passes._ties_kernel[grid](table, control, select, ties, *sizes, **kind, **walk)
                passes._tie_prefix_kernel[(1,)](select, ties, p.chunks, BLOCK=_TIE_BLOCK)
            write = (table, control, select, ties, partial, *sizes)
            passes._write_kernel[grid](*write, **kind, **sides, AGAIN=False, **walk)
            if soft:
                steps._finish_kernel[(1,)](*finish, **kind, AFTER_WRITE=True, CHUNK=CHUNK, **one)
                passes._write_kernel[grid](*write, **kind, **sides, AGAIN=True, **walk)
            steps._remember_kernel[(1,)](memory, threshold, control, select, HAS_STATE=state is not None, num_warps=1)
        return threshold


def _check(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], beta: torch.Tensor | None
) -> None:
    if not inspectable(values[0]):
        return
    if beta is not None:
        require_beta(beta)
    for index, v in enumerate(values):
        require_finite(f"values[{index}]", v)
    for cost in costs:
        require_costs(cost)
    each = [c.expand_as(v).sum(dtype=torch.float64) for v, c in zip(values, costs, strict=True)] if costs else []
    clamp_budget(budget, torch.stack(each).sum() if each else float(sum(v.numel() for v in values)))


def _empty(values: list[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [torch.empty(v.shape, dtype=dtype or v.dtype, device=v.device) for v in values]


def _bytes(masks: list[torch.Tensor]) -> list[torch.Tensor]:
    return [m.view(torch.uint8) for m in masks]


def soft_topk_global_forward(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], beta: torch.Tensor, group: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """m and (c, d) for a list that shares one budget."""
    refuse_group(group, "triton")
    _check(values, budget, costs, beta)
    masks = _empty(values)
    problem = TensorList(values, costs)
    if problem.length == 0:
        return masks, budget.new_zeros(2)
    solve = _Solve(problem, absolute=False, soft=True, hard=False)
    return masks, solve.run(problem.table(masks), budget, beta, None)


def solve_masks_(
    values: list[torch.Tensor],
    budget: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor,
    absolute: bool,
    soft: list[torch.Tensor],
    hard: list[torch.Tensor],
    state: torch.Tensor,
    group: str,
) -> None:
    """Soft and hard mask of a training step, in place."""
    refuse_group(group, "triton")
    _check(values, budget, costs, beta)
    problem = TensorList(values, costs)
    if problem.length:
        solve = _Solve(problem, absolute, soft=True, hard=True)
        solve.run(problem.table(soft, _bytes(hard)), budget, beta, state)


def hard_topk_global_forward(
    values: list[torch.Tensor], budget: torch.Tensor, costs: list[torch.Tensor], absolute: bool, group: str
) -> list[torch.Tensor]:
    """h for a list that shares one budget."""
    refuse_group(group, "triton")
    _check(values, budget, costs, None)
    masks = _empty(values, torch.bool)
    problem = TensorList(values, costs)
    if problem.length:
        solve = _Solve(problem, absolute, soft=False, hard=True)
        solve.run(problem.table(_bytes(masks), _bytes(masks)), budget, torch.ones_like(budget), None)
    return masks


def soft_topk_global_backward(
    grads: list[torch.Tensor],
    values: list[torch.Tensor],
    threshold: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor,
    cost_grad: bool,
    group: str,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta of a list that shares one budget."""
    refuse_group(group, "triton")
    p = TensorList(values, costs)
    upstream = [g.contiguous() for g in grads]
    grad_values, grad_costs = _empty(values), _empty(values) if cost_grad else []
    scalars = torch.zeros(2, dtype=torch.float64, device=p.device)
    if p.length:
        table = p.table(upstream, grad_values, *([grad_costs] if cost_grad else []))
        partial = torch.empty((p.programs, 4), dtype=torch.float64, device=p.device)
        kind: Any = {"DTYPE": TYPES[values[0].dtype], "HAS_COSTS": bool(costs), "CHUNK": CHUNK}
        kind["num_warps"] = CHUNK_WARPS
        sizes, threshold = (len(values), p.chunks), threshold.contiguous()
        with torch.cuda.device_of(table):
            passes._gradient_sums_kernel[(p.programs,)](table, threshold, beta, partial, *sizes, **kind)
            passes._gradient_totals_kernel[(1,)](partial, scalars, p.programs, BLOCK=power_of_two(p.programs))
            passes._gradient_write_kernel[(p.programs,)](
                table, threshold, beta, scalars, *sizes, COST_GRAD=cost_grad, **kind
            )
    return grad_values, grad_costs, scalars[0], scalars[1]


def _compile_cases() -> list[CompileCase]:
    pointers = {"table_ptr": "*i64", "select_ptr": "*i64", "ties_ptr": "*i64"}
    sizes = {"n_tensors": "i32", "n_chunks": "i32", "n_programs": "i32", "length": "i32"}
    flags: dict[str, Any] = {
        "SOFT": True, "HARD": True, "ABSOLUTE": True, "AGAIN": False, "AFTER_WRITE": True, "HAS_STATE": True,
        "BINS": _BINS, "CHUNK": CHUNK, "SAMPLE": SAMPLE,
    }  # fmt: skip
    kernels = {
        passes._total_cost_kernel: CHUNK_WARPS,
        passes._survey_kernel: CHUNK_WARPS,
        passes._ties_kernel: CHUNK_WARPS,
        passes._tie_prefix_kernel: 4,
        passes._write_kernel: CHUNK_WARPS,
        passes._gradient_sums_kernel: CHUNK_WARPS,
        passes._gradient_totals_kernel: 4,
        passes._gradient_write_kernel: CHUNK_WARPS,
        steps._start_kernel: SAMPLE_WARPS,
        steps._advance_kernel: _STEP_WARPS,
        steps._finish_kernel: _STEP_WARPS,
        steps._remember_kernel: 1,
    }
    cases = []
    for kernel, warps in kernels.items():
        for dtype, costs in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            if "HAS_COSTS" not in kernel.arg_names and (costs or dtype != torch.float32):
                continue  # the same kernel again
            constants = flags | {"DTYPE": TYPES[dtype], "HAS_COSTS": costs, "COST_GRAD": costs, "BLOCK": 1024}
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            signature = {
                name: sizes.get(name) or pointers.get(name, "*fp64")
                for name in kernel.arg_names
                if name not in constants
            }
            label = f"{'costs, ' if costs else ''}{name_of(dtype)}"
            cases.append(CompileCase(kernel, signature, constants, warps, label))
    return cases


COMPILE_CASES = _compile_cases()
