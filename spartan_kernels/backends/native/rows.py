"""Rows of one tensor as the compiled extension takes them."""

from __future__ import annotations

from array import array

import torch

from spartan_kernels.backends import extension

__all__ = ["Budgets", "Rows"]


_LONG = 65_536  # rows longer than this may be solved as lists, of which the caller leaves masked entries out


class Rows:
    """Rows of one tensor: the arguments that every row kernel takes first, and the workspace that it takes last."""

    def __init__(self, values: torch.Tensor, costs: torch.Tensor | None) -> None:
        rows, length = values.shape
        cpu, threads = extension.native.cpu, torch.get_num_threads()
        self.dtype, self.long = values.dtype, length > _LONG
        if self.dtype not in extension.DTYPES:
            self.dtype = torch.float32
        self.values = self.brought(values)
        if self.values.stride(1) != 1 and length > 1:
            self.values = self.values.contiguous()
        unit, cost_stride = 1.0, 0
        self.costs: torch.Tensor | None = None
        if costs is not None and costs.dim() == 0:
            unit = float(costs)
        elif costs is not None:
            self.costs = self.brought(costs).contiguous()
            cost_stride = length if costs.dim() == 2 else 0
        address, stride = self.values.data_ptr(), self.values.stride(0)
        table = cpu.Rows(address, extension.pointer(self.costs), unit, rows, length, stride, cost_stride)
        self.arguments = (extension.DTYPES[self.dtype], table)
        self.scratch = extension.workspace(cpu.rows_workspace_bytes(length, self.values.element_size(), threads))
        self.rest = (self.scratch.data_ptr(), self.scratch.numel(), threads)

    def brought(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the dtype that the kernel reads."""
        return tensor if tensor.dtype is self.dtype else tensor.detach().to(self.dtype)

    def empty(self) -> torch.Tensor:
        """Room for one entry for each value."""
        return self.values.new_empty(*self.values.shape)


class Budgets:
    """The budgets of rows: one for each, or one number for all; keeps what it points to."""

    def __init__(self, budget: torch.Tensor | float) -> None:
        self.keeps: torch.Tensor | array[float]
        if isinstance(budget, float):
            self.keeps = array("d", [budget])
            self.arguments = (self.keeps.buffer_info()[0], 0)
        else:
            self.keeps = budget
            self.arguments = (budget.data_ptr(), budget.stride(0))
