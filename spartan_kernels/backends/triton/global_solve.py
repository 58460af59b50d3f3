"""One budget over a list of tensors, in a fixed number of launches: the host never looks at what they find.

total cost     only where there are costs
start          t and a range of keys, from the state or from a sample
4 x (survey, advance)   moments and key histogram in one read; one Halley step and a narrower range
ties           who among equals is kept: nothing to do where the budget runs out between two values
write          masks with their sum
finish, write  only when that sum misses the budget: the search to its end, and the soft masks again
remember       thresholds for the backward pass and for the next solve

From the state of the last solve the first survey is enough: its step is exact to rounding, and the entries it keeps
from the range decide the hard threshold. From a sample the soft threshold needs a second.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from spartan_kernels.arguments import clamp_budget, inspectable, require_beta, require_costs, require_finite
from spartan_kernels.backends.triton import global_passes as passes
from spartan_kernels.backends.triton import global_steps as steps
from spartan_kernels.backends.triton import launches
from spartan_kernels.backends.triton.configs import (
    CHUNK,
    CHUNK_REGISTERS,
    LANES,
    SAMPLE,
    SAMPLE_WARPS,
    CompileCase,
    candidate_capacity,
    chunk_warps,
    name_of,
    program_block,
    register_limit,
    vector_length,
)
from spartan_kernels.backends.triton.launches import Launch, When
from spartan_kernels.backends.triton.masked_weight import block_scores
from spartan_kernels.backends.triton.tables import Table, TensorList
from spartan_kernels.blocks import score_list
from spartan_kernels.counts import SolveCounts
from spartan_kernels.groups import refuse_group

ROUNDS = 4  # exact for any hard cut: a range that misses costs one round, all 32 bits of the key three
_STEP_WARPS = 8
_BINS = 2048
_SURVEYS: tuple[When, ...] = ("always", "cold", "rare", "rare")
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class GlobalSolve:
    """The launches of one solve, and the memory that its kernels share: all of it made before the first launch."""

    def __init__(self, problem: TensorList, absolute: bool, soft: bool, hard: bool) -> None:
        self.problem, self.soft, self.hard = problem, soft, hard
        device, programs = problem.device, problem.programs
        costs = bool(problem.costs)
        control = int(passes.CONTROL)
        words = torch.zeros(control + 16 + (_BINS if hard else 0), dtype=torch.int64, device=device)
        self.control, self.select = words[:control].view(torch.float64), words[control:]
        self.partial = torch.empty((programs, 5), dtype=torch.float64, device=device)
        self.tally = torch.empty((2, programs), dtype=torch.int64, device=device)
        self.capacity = candidate_capacity(programs, costs) if hard else 1
        self.keys = torch.empty((programs if hard else 1, self.capacity), dtype=torch.int32, device=device)
        self.prices = torch.empty_like(self.keys, dtype=torch.float32) if costs else self.keys
        self.threshold = torch.empty(2, dtype=torch.float64, device=device)
        self.kind = {"DTYPE": TYPES[problem.dtype], "HAS_COSTS": costs, "ABSOLUTE": absolute}

    @property
    def workspace_bytes(self) -> int:
        """Memory that the solve takes besides its masks."""
        parts = (self.control, self.select, self.partial, self.tally, self.keys, self.threshold)
        return sum(part.nbytes for part in parts) + (self.prices.nbytes if self.problem.costs else 0)

    def plan(self, table: Table, budget: torch.Tensor, beta: torch.Tensor, state: torch.Tensor | None) -> list[Launch]:
        """Everything there is to launch."""
        p, sides = self.problem, {"SOFT": self.soft, "HARD": self.hard}
        control, select, partial, tally = self.control, self.select, self.partial, self.tally
        words, sizes, aligned = table.words, (table.tensors, table.chunks), {"ALIGNED": table.aligned}
        kind = self.kind | aligned
        walk = _walk(p)
        block = {"BLOCK": program_block(p.device)}
        one = block | {"num_warps": _STEP_WARPS}
        kept = (tally, self.keys, self.prices)
        memory = control if state is None else state
        start = (words, budget, beta, memory, control, select, partial, table.tensors, p.length, p.programs)
        survey = (words, control, select, partial, *kept, *sizes, self.capacity)
        advance = (control, select, partial, tally, p.programs, self.capacity)
        write = (words, control, select, tally, partial, *sizes)
        written = self.soft * p.length * p.dtype.itemsize
        plan = []
        if p.costs:
            total = {"DTYPE": kind["DTYPE"]} | aligned | walk
            array_costs = sum(c.nbytes for c in p.costs if c.dim())
            plan.append(Launch(passes._total_cost_kernel, p.programs, (words, partial, *sizes), total, array_costs))
        options = self.kind | sides | block | {"SAMPLE": SAMPLE, "num_warps": SAMPLE_WARPS}
        plan.append(Launch(steps._start_kernel, 1, start, options | {"HAS_STATE": state is not None}))
        for when in _SURVEYS:
            plan.append(Launch(passes._survey_kernel, p.programs, survey, kind | sides | walk, p.bytes, when=when))
            plan.append(Launch(steps._advance_kernel, 1, advance, sides | one | {"BINS": _BINS}, when=when))
        if self.hard:
            ties = (words, control, select, *kept, *sizes, self.capacity)
            plan.append(Launch(passes._ties_kernel, p.programs, ties, kind | walk, p.bytes, when="rare"))
        options = kind | sides | walk | block
        both = written + self.hard * p.length
        plan.append(Launch(passes._write_kernel, p.programs, write, options | {"AGAIN": False}, p.bytes, both))
        if self.soft:
            finish = (words, control, partial, *sizes, p.programs)
            alone = kind | walk | block
            plan.append(Launch(steps._finish_kernel, 1, finish, alone, p.bytes, when="rare"))
            again = options | {"AGAIN": True}
            plan.append(Launch(passes._write_kernel, p.programs, write, again, p.bytes, written, "rare"))
        options = {"HAS_STATE": state is not None, "num_warps": 1}
        plan.append(Launch(steps._remember_kernel, 1, (memory, self.threshold, control, select), options))
        return plan

    def run(
        self, table: Table, budget: torch.Tensor, beta: torch.Tensor, state: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Launch everything; returns (c, d)."""
        global _last
        launches.run(self.plan(table, budget, beta, state), table.words)
        _last = self.control
        return self.threshold


_last: torch.Tensor | None = None


def last_solve() -> SolveCounts | None:
    """What the last solve over a list in this process had to do; None before the first.

    For benchmarks: it waits for the device. After a replay of a CUDA graph it tells of that replay, if no other solve
    was called since the graph was captured.
    """
    if _last is None:
        return None
    control = _last.tolist()
    reads, trials = int(control[int(passes.READS)]), int(control[int(passes.REWRITE)])
    return SolveCounts(reads - (trials + 1 if trials else 0), int(trials > 0), trials)


def _walk(problem: TensorList) -> dict[str, Any]:
    vector = vector_length(problem.dtype)
    return {"CHUNK": problem.chunk, "LANES": LANES, "VECTOR": vector, "num_warps": chunk_warps()} | register_limit()


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
    solve = GlobalSolve(problem, absolute=False, soft=True, hard=False)
    return masks, solve.run(problem.table(masks), budget, beta)


def solve_masks_(
    values: list[torch.Tensor],
    budget: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor,
    absolute: bool,
    block_sizes: list[int],
    soft: list[torch.Tensor],
    hard: list[torch.Tensor],
    state: torch.Tensor,
    group: str,
) -> None:
    """Soft and hard mask of a training step, in place."""
    values, absolute = score_list(values, block_sizes, absolute, block_scores)
    refuse_group(group, "triton")
    _check(values, budget, costs, beta)
    problem = TensorList(values, costs)
    if problem.length:
        solve = GlobalSolve(problem, absolute, soft=True, hard=True)
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
        solve = GlobalSolve(problem, absolute, soft=False, hard=True)
        solve.run(problem.table(_bytes(masks), _bytes(masks)), budget, torch.ones_like(budget))
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
        launches.run(gradient_plan(p, table, threshold.contiguous(), beta, scalars, cost_grad), table.words)
    return grad_values, grad_costs, scalars[0], scalars[1]


def gradient_plan(
    p: TensorList, table: Table, threshold: torch.Tensor, beta: torch.Tensor, scalars: torch.Tensor, cost_grad: bool
) -> list[Launch]:
    """The launches of a backward pass: sums, the two numbers they give, gradients."""
    partial = torch.empty((p.programs, 4), dtype=torch.float64, device=p.device)
    kind = {"DTYPE": TYPES[p.dtype], "HAS_COSTS": bool(p.costs), "ALIGNED": table.aligned}
    walk = _walk(p)
    entries, sizes = p.length * p.dtype.itemsize, (table.tensors, table.chunks)
    sums = (table.words, threshold, beta, partial, *sizes)
    gradients = (table.words, threshold, beta, scalars, *sizes)
    write = kind | {"COST_GRAD": cost_grad, "CHUNK": p.chunk, "num_warps": chunk_warps()} | register_limit()
    reads = p.bytes + entries
    return [
        Launch(passes._gradient_sums_kernel, p.programs, sums, kind | walk, reads),
        Launch(
            passes._gradient_totals_kernel,
            1,
            (partial, scalars, p.programs),
            {"BLOCK": program_block(p.device), "num_warps": _STEP_WARPS},
        ),
        Launch(passes._gradient_write_kernel, p.programs, gradients, write, reads, entries * (1 + cost_grad)),
    ]


def _compile_cases() -> list[CompileCase]:
    words = ("table_ptr", "select_ptr", "tally_ptr")
    pointers = dict.fromkeys(words, "*i64") | {"keys_ptr": "*i32", "prices_ptr": "*fp32"}
    sizes = dict.fromkeys(("n_tensors", "n_chunks", "n_programs", "capacity", "length"), "i32")
    flags: dict[str, Any] = {
        "SOFT": True, "HARD": True, "ABSOLUTE": True, "AGAIN": False, "HAS_STATE": True, "ALIGNED": True,
        "BINS": _BINS, "LANES": LANES, "SAMPLE": SAMPLE,
    }  # fmt: skip
    kernels = {
        passes._total_cost_kernel: (chunk_warps(), True),
        passes._survey_kernel: (chunk_warps(), True),
        passes._ties_kernel: (chunk_warps(), True),
        passes._write_kernel: (chunk_warps(), True),
        passes._gradient_sums_kernel: (chunk_warps(), True),
        passes._gradient_totals_kernel: (_STEP_WARPS, False),
        passes._gradient_write_kernel: (chunk_warps(), True),
        steps._start_kernel: (SAMPLE_WARPS, False),
        steps._advance_kernel: (_STEP_WARPS, False),
        steps._finish_kernel: (chunk_warps(), True),
        steps._remember_kernel: (1, False),
    }
    cases = []
    for kernel, (warps, vectors) in kernels.items():
        for dtype, costs in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            if "HAS_COSTS" not in kernel.arg_names and (costs or dtype != torch.float32):
                continue  # the same kernel again
            constants = flags | {"DTYPE": TYPES[dtype], "HAS_COSTS": costs, "COST_GRAD": costs, "BLOCK": 1024}
            constants |= {"VECTOR": vector_length(dtype), "CHUNK": CHUNK}
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            signature = {
                name: sizes.get(name) or pointers.get(name, "*fp64")
                for name in kernel.arg_names
                if name not in constants
            }
            label = f"{'costs, ' if costs else ''}{name_of(dtype)}"
            limit = CHUNK_REGISTERS if vectors else None
            cases.append(
                CompileCase(
                    kernel, signature, constants, warps, label,
                    vector_loads=vectors, max_registers=limit, fixed_threads=vectors,
                )
            )  # fmt: skip
    return cases


COMPILE_CASES = _compile_cases()
