"""The backward pass over a list of tensors that shares one budget: sums, the two numbers they give, gradients."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from spartan_kernels.backends.triton import global_passes as passes
from spartan_kernels.backends.triton import launches
from spartan_kernels.backends.triton.configs import CHUNK, chunk_warps, program_block, register_limit
from spartan_kernels.backends.triton.launches import Launch, Recording
from spartan_kernels.backends.triton.solve_launches import STEP_WARPS, TYPES, walk_options
from spartan_kernels.backends.triton.tensor_list import ListShape, Table
from spartan_kernels.groups import gather


class GlobalGradient:
    """The launches of a backward pass over a list of this shape: sums, the two numbers they give, gradients."""

    def __init__(self, shape: ListShape, cost_grad: bool, aligned: bool) -> None:
        self.shape, self.cost_grad, self.aligned = shape, cost_grad, aligned
        self.recording, self.of_rank, self.of_ranks = Recording(), Recording(), Recording()

    @property
    def _kind(self) -> dict[str, Any]:
        p = self.shape
        return {"DTYPE": TYPES[p.dtype], "HAS_COSTS": bool(p.array_costs), "ALIGNED": self.aligned}

    @property
    def _read(self) -> int:
        return self.shape.bytes + self._entries

    @property
    def _entries(self) -> int:
        return self.shape.length * self.shape.dtype.itemsize

    def sums(self, table: Table, threshold: torch.Tensor, beta: torch.Tensor, partial: torch.Tensor) -> Launch:
        """What each program finds, to `partial` [programs, 4]."""
        arguments = (table.words, threshold, beta, partial, table.tensors, table.chunks)
        options = self._kind | walk_options(self.shape)
        return Launch(passes._gradient_sums_kernel, self.shape.programs, arguments, options, self._read)

    def totals(self, partial: torch.Tensor, scalars: torch.Tensor) -> Launch:
        """The gradients of budget and beta, from what the rows of `partial` add up to."""
        options = {"BLOCK": program_block(self.shape.device), "num_warps": STEP_WARPS}
        return Launch(passes._gradient_totals_kernel, 1, (partial, scalars, partial.shape[0]), options)

    def write(self, table: Table, threshold: torch.Tensor, beta: torch.Tensor, scalars: torch.Tensor) -> Launch:
        """The gradients of all entries."""
        arguments = (table.words, threshold, beta, scalars, table.tensors, table.chunks)
        options = self._kind | {"COST_GRAD": self.cost_grad, "CHUNK": CHUNK, "num_warps": chunk_warps()}
        written = self._entries * (1 + self.cost_grad)
        return Launch(
            passes._gradient_write_kernel,
            self.shape.programs,
            arguments,
            options | register_limit(),
            self._read,
            written,
        )

    def plan(
        self, table: Table, threshold: torch.Tensor, beta: torch.Tensor, scalars: torch.Tensor, partial: torch.Tensor
    ) -> list[Launch]:
        """Everything there is to launch in one process; the gradients of budget and beta go to `scalars`."""
        return [
            self.sums(table, threshold, beta, partial),
            self.totals(partial, scalars),
            self.write(table, threshold, beta, scalars),
        ]

    def run(
        self, table: Table, threshold: torch.Tensor, beta: torch.Tensor, scalars: torch.Tensor, group: str = ""
    ) -> None:
        """Launch everything; over the ranks of a group their sums are added in their order."""
        partial = torch.empty((self.shape.programs, 4), dtype=torch.float64, device=self.shape.device)
        pointers = [table.words, threshold, beta, scalars, partial]
        if not group:
            launches.run(self.recording, pointers, lambda: self.plan(table, threshold, beta, scalars, partial))
            return
        launches.run(self.of_rank, pointers, lambda: [self.sums(table, threshold, beta, partial)])
        every = gather(partial.sum(0), group)
        pointers[-1] = every
        launches.run(
            self.of_ranks,
            pointers,
            lambda: [self.totals(every, scalars), self.write(table, threshold, beta, scalars)],
        )


global_gradient = lru_cache(maxsize=256)(GlobalGradient)
