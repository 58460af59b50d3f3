"""One budget over a list of tensors, in a fixed number of launches: the host never looks at what they find.

total cost     only where there are costs
start          t and a range of keys, from the state or from a sample
4 x survey     moments and key histogram in one read; then one Halley step and a narrower range
ties           who among equals is kept: nothing to do where the budget runs out between two values
write          masks with their sum, and the thresholds for the backward pass and the next solve
write          the soft masks again, only when that sum missed the budget and the search went on to its end

From the state of the last solve the first survey is enough: its step is exact to rounding, and the entries it keeps
from the range decide the hard threshold. From a sample the soft threshold needs a second.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch

from spartan_kernels.backends.triton import global_kernels as kernels
from spartan_kernels.backends.triton import global_passes as passes
from spartan_kernels.backends.triton import global_steps as steps
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
    vector_length,
)
from spartan_kernels.backends.triton.launches import Launch, Recording, When
from spartan_kernels.backends.triton.solve_launches import (
    HISTOGRAM_BINS,
    STEP_WARPS,
    TYPES,
    SolveLaunches,
    Workspace,
)
from spartan_kernels.backends.triton.tensor_list import ListShape, Table
from spartan_kernels.counts import SolveCounts

# Exact for any hard cut: a range that misses costs one survey, all 32 bits of the key three.
_SURVEYS: tuple[When, ...] = ("always", "cold", "rare", "rare")


class GlobalSolve:
    """The launches of a solve over a list of this shape, with the memory that its kernels share.

    Made once for a shape (`global_solve`) and launched with what is new each time: where the tensors lie.
    """

    def __init__(self, shape: ListShape, absolute: bool, soft: bool, hard: bool) -> None:
        self.shape, self.absolute, self.soft, self.hard = shape, absolute, soft, hard
        programs, costs = shape.programs, bool(shape.array_costs)
        control = int(passes.CONTROL)
        self.zeroed = control + 16 + (HISTOGRAM_BINS if hard else 0)
        self.capacity = candidate_capacity(programs, costs) if hard else 1
        kept = self.capacity * (programs if hard else 1)
        # in 64-bit words: partial, tally, keys, prices
        sizes = (int(passes.MOMENTS) * programs, 2 * programs, -(-kept // 2), -(-kept // 2) * costs)
        begins = [0, *accumulate(size + size % 2 for size in sizes)]
        self.words, self.begins = begins[-1], begins[:-1]
        self.offsets = ((0, 8 * control), tuple(8 * begin for begin in self.begins[: 3 + costs]))
        self.recordings: dict[tuple[bool, bool], Recording] = defaultdict(Recording)

    @property
    def workspace_bytes(self) -> int:
        """Memory that the solve takes besides its masks."""
        return 8 * (self.zeroed + self.words)

    def workspace(self) -> Workspace:
        """Memory for one solve."""
        return self._parts(*self._allocated())

    def _allocated(self) -> tuple[torch.Tensor, torch.Tensor]:
        global _last
        device = self.shape.device
        zeros = _last = torch.zeros(self.zeroed, dtype=torch.int64, device=device)
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

    def launches(
        self,
        table: Table,
        budget: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor | None,
        threshold: torch.Tensor,
        memory: Workspace,
    ) -> SolveLaunches:
        """What this solve is made of."""
        return SolveLaunches(
            self.shape,
            table,
            self.absolute,
            self.soft,
            self.hard,
            self.capacity,
            budget,
            beta,
            state,
            threshold,
            memory,
        )

    def plan(
        self,
        table: Table,
        budget: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor | None,
        threshold: torch.Tensor,
        memory: Workspace,
    ) -> list[Launch]:
        """Everything there is to launch; (c, d) goes to `threshold`."""
        made = self.launches(table, budget, beta, state, threshold, memory)
        plan = [*made.total_cost(), made.start(made.of_programs), *map(made.survey, _SURVEYS), *made.ties()]
        return [*plan, made.write(finish=self.soft), *([made.write(again=True)] if self.soft else [])]

    def run(
        self, table: Table, budget: torch.Tensor, beta: torch.Tensor, state: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Launch everything; returns (c, d)."""
        shape = self.shape
        zeros, rest = self._allocated()
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


def _compile_cases() -> list[CompileCase]:
    words = ("table_ptr", "select_ptr", "tally_ptr")
    pointers = dict.fromkeys(words, "*i64") | {"keys_ptr": "*i32", "prices_ptr": "*fp32"}
    sizes = dict.fromkeys(("n_tensors", "n_chunks", "n_programs", "capacity", "length"), "i32")
    flags: dict[str, Any] = {
        "SOFT": True, "HARD": True, "ABSOLUTE": True, "AGAIN": False, "HAS_STATE": True, "ALIGNED": True,
        "BINS": HISTOGRAM_BINS, "LANES": LANES, "SAMPLE": SAMPLE, "SHARE": 0, "ADVANCE": True, "FINISH": True,
    }  # fmt: skip
    warps_of = {
        passes._total_cost_kernel: (chunk_warps(), True),
        kernels._survey_kernel: (chunk_warps(), True),
        passes._ties_kernel: (chunk_warps(), True),
        kernels._write_kernel: (chunk_warps(), True),
        passes._gradient_sums_kernel: (chunk_warps(), True),
        passes._gradient_totals_kernel: (STEP_WARPS, False),
        passes._gradient_write_kernel: (chunk_warps(), True),
        steps._start_kernel: (SAMPLE_WARPS, False),
    }
    cases = []
    for kernel, (warps, vectors) in warps_of.items():
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
