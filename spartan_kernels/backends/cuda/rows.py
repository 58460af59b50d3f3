"""Rows of one tensor as the CUDA kernels take them, and which of them are solved as lists."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension


class Rows:
    """Rows of one tensor; costs of every shape are one array with two strides."""

    def __init__(self, values: torch.Tensor, costs: torch.Tensor | None) -> None:
        self.values = values.detach() if values.stride(-1) == 1 else values.detach().contiguous()
        self.costs = extension.contiguous(costs)
        rows, length = values.shape
        step = int(costs is not None and costs.dim() > 0)
        stride = length if costs is not None and costs.dim() == 2 else 0
        self.dtype = extension.DTYPES[values.dtype]
        apart = self.values.stride(0)
        self.rows = extension.native.cuda.Rows(
            self.values.data_ptr(), extension.pointer(self.costs), rows, length, apart, stride, step
        )


# Longer rows, where they are too few to give every multiprocessor one, are each solved by the whole device.
_LONGEST_ROW = 131_072

_FEW_ROWS = 64


def as_lists(values: torch.Tensor) -> bool:
    """Whether the rows are few and long."""
    return values.shape[1] > _LONGEST_ROW and values.shape[0] <= _FEW_ROWS
