"""Lists of tensors as tables of pointers for the compiled extension, and its exchange between ranks."""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

import torch

from spartan_kernels.backends import extension
from spartan_kernels.groups import gather
from spartan_kernels.torch_private import process_group

__all__ = ["TensorList"]


_ROW_BYTES = 7 * 8  # of a TableRow (csrc/ops.h)


class _Ranks:
    """The exchange of a solve over the ranks of a process group; keeps what the extension reads last."""

    def __init__(self, name: str) -> None:
        self.name, self.last = name, extension.empty(0, torch.uint8)
        group = process_group(name)
        self.native = extension.native.Ranks(group.rank(), group.size(), self._gather)

    def _gather(self, address: int, count: int) -> int:
        own = torch.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype=torch.uint8)
        self.last = gather(own, self.name)
        return self.last.data_ptr()


class TensorList:
    """A list of tensors as the extension's table: one row of seven 64-bit words for each (ops.h, TableRow)."""

    def __init__(self, values: list[torch.Tensor], costs: list[torch.Tensor], group: str = "") -> None:
        self.values = [v if v.is_contiguous() else v.contiguous() for v in values]
        self.arrays = [c.contiguous() if c.dim() else None for c in costs]
        self.unit = array("d", [1.0 if c.dim() else float(c) for c in costs] or [1.0]) * (1 if costs else len(values))
        self.lengths = array("q", [v.numel() for v in values])
        self.dtype = values[0].dtype
        self.ranks = _Ranks(group) if group else None

    def empty(self) -> list[torch.Tensor]:
        """Room for one entry for each value, in the values' dtype."""
        return [torch.empty_like(v) for v in self.values]

    def first(self, *extra: list[torch.Tensor]) -> tuple[array[int], tuple[int, int, int]]:
        """The table, to be kept alive, and the arguments that every kernel takes first."""
        count = len(self.values)
        words = array("q", bytes(_ROW_BYTES * count))
        words[0::7] = array("q", [v.data_ptr() for v in self.values])
        if self.arrays:
            words[1::7] = array("q", [extension.pointer(c) for c in self.arrays])
        words[2::7] = array("q", self.unit.tobytes())
        words[3::7] = self.lengths
        for column, tensors in enumerate(extra, start=4):
            if tensors:
                words[column::7] = array("q", [t.data_ptr() for t in tensors])
        return words, (extension.DTYPES[self.dtype], words.buffer_info()[0], count)

    def rest(self) -> tuple[int, int, int, Any]:
        """The arguments that every kernel takes last."""
        element = 8 if self.dtype == torch.float64 else 4
        size = extension.native.cpu.workspace_bytes(
            len(self.values), sum(self.lengths), element, self.ranks is not None
        )
        self.workspace = extension.workspace(size)  # alive as long as the table
        ranks = None if self.ranks is None else self.ranks.native
        return self.workspace.data_ptr(), self.workspace.numel(), torch.get_num_threads(), ranks
