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

from collections import defaultdict
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import triton.language as tl

from spartan_kernels.backends.shared import check_list
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
from spartan_kernels.backends.triton.launches import Launch, Recording, When
from spartan_kernels.backends.triton.masked_weight import block_scores
from spartan_kernels.backends.triton.tensor_list import ListShape, Table, TensorList, contiguous
from spartan_kernels.blocks import score_list
from spartan_kernels.counts import SolveCounts
from spartan_kernels.groups import refuse_group
from spartan_kernels.operands import HardTopkGlobal, SoftTopkGlobal, SoftTopkGlobalBackward, SolveMasks

_STEP_WARPS = 8
_BINS = 2048
# Exact for any hard cut: a range that misses costs one survey, all 32 bits of the key three.
_SURVEYS: tuple[When, ...] = ("always", "cold", "rare", "rare")
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Workspace(NamedTuple):
    """What the kernels of a solve share besides the table: views of two allocations."""

    control: torch.Tensor
    select: torch.Tensor
    partial: torch.Tensor
    tally: torch.Tensor
    keys: torch.Tensor
    prices: torch.Tensor


class GlobalSolve:
    """The launches of a solve over a list of this shape, with the memory that its kernels share.

    Made once for a shape (`global_solve`) and launched with what is new each time: where the tensors lie.
    """

    def __init__(self, shape: ListShape, absolute: bool, soft: bool, hard: bool) -> None:
        self.shape, self.soft, self.hard = shape, soft, hard
        programs, costs = shape.programs, bool(shape.array_costs)
        control = int(passes.CONTROL)
        self.zeroed = control + 16 + (_BINS if hard else 0)
        self.capacity = candidate_capacity(programs, costs) if hard else 1
        kept = self.capacity * (programs if hard else 1)
        # in 64-bit words: partial, tally, keys, prices
        sizes = (int(passes.MOMENTS) * programs, 2 * programs, -(-kept // 2), -(-kept // 2) * costs)
        begins = [0, *accumulate(size + size % 2 for size in sizes)]
        self.words, self.begins = begins[-1], begins[:-1]
        self.offsets = ((0, 8 * control), tuple(8 * begin for begin in self.begins[: 3 + costs]))
        self.kind = {"DTYPE": TYPES[shape.dtype], "HAS_COSTS": costs, "ABSOLUTE": absolute}
        self.recordings: dict[tuple[bool, bool], Recording] = defaultdict(Recording)

    @property
    def workspace_bytes(self) -> int:
        """Memory that the solve takes besides its masks."""
        return 8 * (self.zeroed + self.words)

    def workspace(self) -> Workspace:
        """Memory for one solve."""
        return self._parts(*self._allocated())

    def _allocated(self) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.shape.device
        zeros = torch.zeros(self.zeroed, dtype=torch.int64, device=device)
        return zeros, torch.empty(self.words, dtype=torch.int64, device=device)

    def _parts(self, zeros: torch.Tensor, rest: torch.Tensor) -> Workspace:
        control, programs = int(passes.CONTROL), self.shape.programs
        parts = [rest[begin:end] for begin, end in pairwise([*self.begins, self.words])]
        moments = int(passes.MOMENTS)
        partial = parts[0].view(torch.float64)[: moments * programs].view(programs, moments)
        tally = parts[1][: 2 * programs].view(2, programs)
        keys = parts[2].view(torch.int32).view(-1)[: self.capacity * (programs if self.hard else 1)]
        prices = parts[3].view(torch.float32)[: keys.numel()] if self.shape.array_costs else keys
        return Workspace(zeros[:control].view(torch.float64), zeros[control:], partial, tally, keys, prices)

    def plan(
        self,
        table: Table,
        budget: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor | None,
        threshold: torch.Tensor,
        memory_of_kernels: Workspace,
    ) -> list[Launch]:
        """Everything there is to launch; (c, d) goes to `threshold`."""
        p, sides = self.shape, {"SOFT": self.soft, "HARD": self.hard}
        control, select, partial, tally, keys, prices = memory_of_kernels
        words, sizes, aligned = table.words, (table.tensors, table.chunks), {"ALIGNED": table.aligned}
        kind = self.kind | aligned
        walk = _walk(p)
        block = {"BLOCK": program_block(p.device)}
        one = block | {"num_warps": _STEP_WARPS}
        kept = (tally, keys, prices)
        memory = control if state is None else state
        start = (words, budget, beta, memory, control, select, partial, table.tensors, p.length, p.programs)
        survey = (words, control, select, partial, *kept, *sizes, self.capacity)
        advance = (control, select, partial, tally, p.programs, self.capacity)
        write = (words, control, select, tally, partial, *sizes)
        written = self.soft * p.length * p.dtype.itemsize
        plan = []
        if p.array_costs:
            total = {"DTYPE": kind["DTYPE"]} | aligned | walk
            plan.append(Launch(passes._total_cost_kernel, p.programs, (words, partial, *sizes), total, p.cost_bytes))
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
        plan.append(Launch(steps._remember_kernel, 1, (memory, threshold, control, select), options))
        return plan

    def run(
        self, table: Table, budget: torch.Tensor, beta: torch.Tensor, state: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Launch everything; returns (c, d)."""
        global _last
        shape = self.shape
        zeros, rest = self._allocated()
        _last = zeros
        threshold = torch.empty(2, dtype=torch.float64, device=shape.device)
        pointers = [table.words, budget, beta, threshold, *(() if state is None else (state,))]
        addresses = [pointer.data_ptr() for pointer in pointers]
        recording = self.recordings[state is not None, table.aligned]
        for base, offsets in zip((zeros.data_ptr(), rest.data_ptr()), self.offsets, strict=True):
            addresses += [base + offset for offset in offsets]
        if recording.knows(addresses):
            recording.replay(addresses, shape.device)
            return threshold
        workspace = self._parts(zeros, rest)
        plan = self.plan(table, budget, beta, state, threshold, workspace)
        recording.record(plan, pointers + list(workspace[: 5 + bool(shape.array_costs)]))
        return threshold


global_solve = lru_cache(maxsize=256)(GlobalSolve)
_last: torch.Tensor | None = None


def last_solve() -> SolveCounts | None:
    """What the last solve over a list in this process had to do; None before the first.

    For benchmarks: it waits for the device. After a replay of a CUDA graph it tells of that replay, if no other solve
    was called since the graph was captured.
    """
    if _last is None:
        return None
    control = _last[: int(passes.CONTROL)].view(torch.float64).tolist()
    reads, trials = int(control[int(passes.READS)]), int(control[int(passes.REWRITE)])
    return SolveCounts(reads - (trials + 1 if trials else 0), int(trials > 0), trials)


def _walk(shape: ListShape) -> dict[str, Any]:
    vector = vector_length(shape.dtype)
    return {"CHUNK": CHUNK, "LANES": LANES, "VECTOR": vector, "num_warps": chunk_warps()} | register_limit()


def _empty(values: list[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [torch.empty(v.shape, dtype=dtype or v.dtype, device=v.device) for v in values]


def soft_topk_global_forward(o: SoftTopkGlobal) -> tuple[list[torch.Tensor], torch.Tensor]:
    """m and (c, d) for a list that shares one budget."""
    refuse_group(o.group, "triton")
    check_list(o.values, o.budget, o.costs, o.beta)
    masks = _empty(o.values)
    problem = TensorList(o.values, o.costs)
    if problem.shape.length == 0:
        return masks, o.budget.new_zeros(2)
    solve = global_solve(problem.shape, False, True, False)
    return masks, solve.run(problem.table(masks), o.budget, o.beta)


def solve_masks_(o: SolveMasks) -> None:
    """Soft and hard mask of a training step, in place."""
    values, absolute = score_list(o, block_scores)
    refuse_group(o.group, "triton")
    check_list(values, o.budget, o.costs, o.beta)
    problem = TensorList(values, o.costs)
    if problem.shape.length:
        solve = global_solve(problem.shape, absolute, True, True)
        soft = o.soft or _empty(values)  # the table holds addresses alone
        threshold = solve.run(problem.table(soft, o.hard), o.budget, o.beta, o.state)
        if not o.soft:
            o.state[6:] = threshold


def hard_topk_global_forward(o: HardTopkGlobal) -> list[torch.Tensor]:
    """h for a list that shares one budget."""
    refuse_group(o.group, "triton")
    check_list(o.values, o.budget, o.costs, None)
    masks = _empty(o.values, torch.bool)
    problem = TensorList(o.values, o.costs)
    if problem.shape.length:
        solve = global_solve(problem.shape, o.absolute, False, True)
        solve.run(problem.table(masks, masks), o.budget, torch.ones_like(o.budget))
    return masks


def soft_topk_global_backward(
    o: SoftTopkGlobalBackward,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta of a list that shares one budget."""
    refuse_group(o.group, "triton")
    problem = TensorList(o.values, o.costs)
    grad_values, grad_costs = _empty(o.values), _empty(o.values) if o.cost_grad else []
    scalars = torch.zeros(2, dtype=torch.float64, device=problem.shape.device)
    if problem.shape.length:
        table = problem.table(contiguous(o.grads), grad_values, *([grad_costs] if o.cost_grad else []))
        gradient = global_gradient(problem.shape, o.cost_grad, table.aligned)
        gradient.run(table, o.threshold.contiguous(), o.beta, scalars)
    return grad_values, grad_costs, scalars[0], scalars[1]


class GlobalGradient:
    """The launches of a backward pass over a list of this shape: sums, the two numbers they give, gradients."""

    def __init__(self, shape: ListShape, cost_grad: bool, aligned: bool) -> None:
        self.shape, self.cost_grad, self.aligned = shape, cost_grad, aligned
        self.recording = Recording()

    def plan(
        self, table: Table, threshold: torch.Tensor, beta: torch.Tensor, scalars: torch.Tensor, partial: torch.Tensor
    ) -> list[Launch]:
        """Everything there is to launch; the gradients of budget and beta go to `scalars`."""
        p = self.shape
        kind = {"DTYPE": TYPES[p.dtype], "HAS_COSTS": bool(p.array_costs), "ALIGNED": self.aligned}
        walk = _walk(p)
        entries, sizes = p.length * p.dtype.itemsize, (table.tensors, table.chunks)
        sums = (table.words, threshold, beta, partial, *sizes)
        gradients = (table.words, threshold, beta, scalars, *sizes)
        write = kind | {"COST_GRAD": self.cost_grad, "CHUNK": CHUNK, "num_warps": chunk_warps()} | register_limit()
        reads = p.bytes + entries
        totals = {"BLOCK": program_block(p.device), "num_warps": _STEP_WARPS}
        return [
            Launch(passes._gradient_sums_kernel, p.programs, sums, kind | walk, reads),
            Launch(passes._gradient_totals_kernel, 1, (partial, scalars, p.programs), totals),
            Launch(
                passes._gradient_write_kernel, p.programs, gradients, write, reads, entries * (1 + self.cost_grad)
            ),
        ]  # fmt: skip

    def run(self, table: Table, threshold: torch.Tensor, beta: torch.Tensor, scalars: torch.Tensor) -> None:
        """Launch everything."""
        partial = torch.empty((self.shape.programs, 4), dtype=torch.float64, device=self.shape.device)
        pointers = [table.words, threshold, beta, scalars, partial]
        launches.run(self.recording, pointers, lambda: self.plan(table, threshold, beta, scalars, partial))


global_gradient = lru_cache(maxsize=256)(GlobalGradient)


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
                    bounded=("n_tensors", "n_programs", "capacity"),
                )
            )  # fmt: skip
    return cases


COMPILE_CASES = _compile_cases()
