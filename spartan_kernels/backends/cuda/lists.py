"""Lists of tensors as tables of pointers for the CUDA kernels, their launches, and what those move."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spartan_kernels.backends import extension
from spartan_kernels.backends.shared import check_list
from spartan_kernels.counts import SolveCounts


class TensorList:
    """A list of tensors as the extension's table: one row of seven 64-bit words for each (ops.h, cuda::TableRow)."""

    def __init__(self, values: list[torch.Tensor], costs: list[torch.Tensor]) -> None:
        self.values = [v.detach().contiguous() for v in values]
        self.costs = [c.contiguous() for c in costs]
        self.dtype = extension.DTYPES[values[0].dtype]
        self.length = sum(v.numel() for v in values)

    def arguments(self, *extra: list[torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
        """The table in host memory, the workspace, and what every kernel of a list takes first."""
        words = torch.zeros((len(self.values), 7), dtype=torch.int64, device="cpu")
        columns = [[v.data_ptr() for v in self.values], [c.data_ptr() for c in self.costs]]
        columns += [[int(c.dim() > 0) for c in self.costs], [v.numel() for v in self.values]]
        columns += [[t.data_ptr() for t in tensors or []] for tensors in extra]
        for index, column in enumerate(columns):
            if column:
                words[:, index] = words.new_tensor(column)
        size = extension.native.cuda.global_workspace_bytes(words.data_ptr(), len(words))
        workspace = torch.empty(size, dtype=torch.uint8, device=self.values[0].device)
        return words, workspace, (self.dtype, words.data_ptr(), len(words))


def solve_list(
    values: list[torch.Tensor],
    budget: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor,
    absolute: bool,
    masks: tuple[list[torch.Tensor] | None, list[torch.Tensor] | None],
    state: torch.Tensor | None,
    threshold: torch.Tensor | None,
) -> None:
    """Check what the host may look at, then launch."""
    check_list(values, budget, costs, beta)
    launch_list(values, budget, costs, beta, absolute, masks, state, threshold)


def launch_list(
    values: list[torch.Tensor],
    budget: torch.Tensor,
    costs: list[torch.Tensor],
    beta: torch.Tensor,
    absolute: bool,
    masks: tuple[list[torch.Tensor] | None, list[torch.Tensor] | None],
    state: torch.Tensor | None,
    threshold: torch.Tensor | None,
) -> None:
    """Write the (soft, hard) masks that are given, the state and the threshold."""
    problem = TensorList(values, costs)
    if problem.length == 0:
        return
    global _last
    _table, workspace, first = problem.arguments(*masks)
    _last = workspace
    extension.call(
        extension.native.cuda.topk_global,
        values[0],
        *first,
        budget.data_ptr(),
        beta.data_ptr(),
        absolute,
        extension.pointer(state),
        extension.pointer(threshold),
        workspace.data_ptr(),
    )


_last: torch.Tensor | None = None


def last_solve() -> SolveCounts | None:
    """What the last solve over a list in this process had to do; None before the first.

    For benchmarks: it waits for the device. After a replay of a CUDA graph it tells of that replay, if no other solve
    was called since the graph was captured.
    """
    if _last is None:
        return None
    passes, rewrites, trials = _last[:12].view(torch.int32).tolist()  # Counts of csrc/cuda/global_solve.cuh
    return SolveCounts(passes - trials, rewrites, trials)


class Launch(NamedTuple):
    """One launch of a call over a list: bytes for each entry in one pass over them, and the passes it makes.

    `cold` and `warm` passes: when the solve starts afresh and when it continues from its state. More than 2048 ties at
    the hard threshold, and a trial that misses the budget, cost one pass more.
    """

    kernel: str
    read: int
    written: int
    cold: int
    warm: int


def launch_plan(dtype: torch.dtype, *, soft: bool = True, hard: bool = True, cost_arrays: bool = False) -> list[Launch]:
    """What `solve_masks_`, or one of its masks alone, launches and moves, from the code that launches it."""
    return [
        Launch(*note)
        for note in extension.native.cuda.topk_global_launches(extension.DTYPES[dtype], soft, hard, cost_arrays)
    ]


def backward_launch_plan(dtype: torch.dtype, *, cost_arrays: bool = False, cost_grad: bool = False) -> list[Launch]:
    """The same for the gradient of `soft_topk_global`."""
    notes = extension.native.cuda.soft_topk_global_backward_launches(extension.DTYPES[dtype], cost_arrays, cost_grad)
    return [Launch(*note) for note in notes]
