"""The launches that a solve over a list is made of: each kernel with its grid, its arguments and what it moves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton.language as tl

from spartan_kernels.backends.triton import global_kernels as kernels
from spartan_kernels.backends.triton import global_passes as passes
from spartan_kernels.backends.triton import global_steps as steps
from spartan_kernels.backends.triton.configs import (
    CHUNK,
    LANES,
    SAMPLE,
    SAMPLE_WARPS,
    chunk_warps,
    program_block,
    register_limit,
    vector_length,
)
from spartan_kernels.backends.triton.launches import Launch, When
from spartan_kernels.backends.triton.tensor_list import ListShape, Table

STEP_WARPS = 8
HISTOGRAM_BINS = int(passes.BINS)
_STEP = {"BINS": HISTOGRAM_BINS}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Workspace(NamedTuple):
    """What the kernels of a solve share besides the table: views of two allocations."""

    control: torch.Tensor
    select: torch.Tensor
    partial: torch.Tensor
    tally: torch.Tensor
    keys: torch.Tensor
    prices: torch.Tensor


@dataclass(frozen=True)
class Found:
    """Where a step reads what a pass has found: of the programs of this process, or of the ranks that sent it.

    Attributes:
        sums, sample: float64 numbers, a row of `stride` for each program or rank; float32 entries that ranks drew.
        costs: int64 numbers: the candidates of each program, or the rows again.
        programs: how many have found something.
        share: entries that each rank drew; 0: programs of this process.
    """

    sums: torch.Tensor
    sample: torch.Tensor
    costs: torch.Tensor
    programs: int
    stride: int
    share: int = 0


def walk_options(shape: ListShape) -> dict[str, Any]:
    """How a kernel walks the list."""
    vector = vector_length(shape.dtype)
    return {"CHUNK": CHUNK, "LANES": LANES, "VECTOR": vector, "num_warps": chunk_warps()} | register_limit()


@dataclass(frozen=True)
class SolveLaunches:
    """One solve: its list, what is asked of it, and its memory.

    Attributes:
        soft, hard: which masks.
        capacity: candidates that a program can keep.
        state: of the last solve, or None.
        threshold: where (c, d) goes.
    """

    shape: ListShape
    table: Table
    absolute: bool
    soft: bool
    hard: bool
    capacity: int
    budget: torch.Tensor
    beta: torch.Tensor
    state: torch.Tensor | None
    threshold: torch.Tensor
    memory: Workspace

    @cached_property
    def _list(self) -> dict[str, Any]:
        costs = bool(self.shape.array_costs)
        return {"DTYPE": TYPES[self.shape.dtype], "HAS_COSTS": costs, "ABSOLUTE": self.absolute}

    @cached_property
    def _walk(self) -> dict[str, Any]:
        return self._list | {"ALIGNED": self.table.aligned} | walk_options(self.shape)

    @cached_property
    def _block(self) -> dict[str, Any]:
        return {"BLOCK": program_block(self.shape.device)}

    @property
    def _sides(self) -> dict[str, Any]:
        return {"SOFT": self.soft, "HARD": self.hard}

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.table.tensors, self.table.chunks

    @property
    def _candidates(self) -> tuple[torch.Tensor, ...]:
        return self.memory.tally, self.memory.keys, self.memory.prices

    @property
    def _written(self) -> int:
        return self.soft * self.shape.length * self.shape.dtype.itemsize

    @property
    def of_programs(self) -> Found:
        """What the programs of this process have found."""
        m = self.memory
        return Found(m.partial, m.partial, m.tally, self.shape.programs, int(passes.MOMENTS))

    def total_cost(self) -> list[Launch]:
        """Only where there are costs."""
        if not self.shape.array_costs:
            return []
        options = {name: value for name, value in self._walk.items() if name not in ("HAS_COSTS", "ABSOLUTE")}
        arguments = (self.table.words, self.memory.partial, *self._sizes)
        return [Launch(passes._total_cost_kernel, self.shape.programs, arguments, options, self.shape.cost_bytes)]

    def start(self, found: Found) -> Launch:
        """t and a range of keys, from the state or from a sample."""
        m = self.memory
        where = m.control if self.state is None else self.state
        arguments = (
            self.table.words, self.budget, self.beta, where, m.control, m.select, found.sums, found.sample,
            self.table.tensors, self.shape.length, found.programs,
        )  # fmt: skip
        options = self._list | self._sides | self._block | {"SAMPLE": SAMPLE, "SHARE": found.share}
        options |= {"HAS_STATE": self.state is not None, "num_warps": SAMPLE_WARPS}
        return Launch(steps._start_kernel, 1, arguments, options)

    def survey(self, when: When, advance: bool = True) -> Launch:
        """Moments and key histogram in one read; then one Halley step and a narrower range."""
        m = self.memory
        arguments = (self.table.words, m.control, m.select, m.partial, *self._candidates, *self._sizes, self.capacity)
        options = self._walk | self._sides | self._block | _STEP | {"ADVANCE": advance}
        return Launch(kernels._survey_kernel, self.shape.programs, arguments, options, self.shape.bytes, when=when)

    def advance(self, found: Found, when: When) -> Launch:
        """The step after a survey of several ranks."""
        m = self.memory
        arguments = (m.control, m.select, found.sums, found.costs, found.programs, self.capacity)
        options = self._sides | self._block | _STEP | {"STRIDE": found.stride, "num_warps": STEP_WARPS}
        return Launch(kernels._advance_kernel, 1, arguments, options, when=when)

    def ties(self) -> list[Launch]:
        """Who among equals is kept: nothing to do where the budget runs out between two values."""
        if not self.hard:
            return []
        m, p = self.memory, self.shape
        arguments = (self.table.words, m.control, m.select, *self._candidates, *self._sizes, self.capacity)
        return [Launch(passes._ties_kernel, p.programs, arguments, self._walk, p.bytes, when="rare")]

    def write(self, again: bool = False, finish: bool = False) -> Launch:
        """Masks with their sum, and the thresholds for the backward pass and the next solve.

        Args:
            again: the soft masks alone, if that sum missed the budget.
            finish: where it does, the search goes on to its end.
        """
        m, p = self.memory, self.shape
        where = m.control if self.state is None else self.state
        arguments = (self.table.words, m.control, m.select, m.tally, m.partial, where, self.threshold, *self._sizes)
        options = self._walk | self._sides | self._block
        options |= {"AGAIN": again, "FINISH": finish, "HAS_STATE": self.state is not None}
        written = self._written + (self.hard and not again) * p.length
        when: When = "rare" if again else "always"
        return Launch(kernels._write_kernel, p.programs, arguments, options, p.bytes, written, when)
