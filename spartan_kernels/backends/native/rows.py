"""Rows of one tensor as the compiled extension takes them."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension

__all__ = ["Rows"]


_LONGEST_STORED = 131_072  # longer rows of 16-bit numbers are widened whole
_LONG = 65_536  # rows longer than this may be solved as lists, of which the caller leaves masked entries out


class Rows:
    """Rows of one tensor: the arguments that every row kernel takes first, and the workspace that it takes last."""

    def __init__(self, values: torch.Tensor, costs: torch.Tensor | None) -> None:
        rows, length = values.shape
        self.dtype, self.long = values.dtype, length > _LONG
        if self.dtype not in extension.DTYPES or (values.element_size() == 2 and length > _LONGEST_STORED):
            self.dtype = torch.float32
        self.values = self.brought(values)
        if self.values.stride(-1) != 1 and length > 1:
            self.values = self.values.contiguous()
        self.costs = None if costs is None or costs.dim() == 0 else self.brought(costs).contiguous()
        unit = float(costs) if costs is not None and costs.dim() == 0 else 1.0
        cost_stride = length if self.costs is not None and self.costs.dim() == 2 else 0
        address, stride = self.values.data_ptr(), self.values.stride(0)
        table = extension.native.cpu.Rows(
            address, extension.pointer(self.costs), unit, rows, length, stride, cost_stride
        )
        self.arguments = (extension.DTYPES[self.dtype], table)
        threads = torch.get_num_threads()
        self.scratch = extension.workspace(
            extension.native.cpu.rows_workspace_bytes(length, self.values.element_size(), threads)
        )
        self.rest = (self.scratch.data_ptr(), self.scratch.numel(), threads)

    def brought(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor without its graph, in the dtype that the kernel reads."""
        return tensor.detach().to(self.dtype)

    def empty(self) -> torch.Tensor:
        """Room for one entry for each value."""
        return torch.empty(self.values.shape, dtype=self.dtype)
