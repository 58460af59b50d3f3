"""Where the active blocks of a matrix lie, on the compiled extension."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension
from spartan_kernels.operands import BlockLayoutOf


def block_layout(o: BlockLayoutOf) -> tuple[torch.Tensor, ...]:
    """The blocks whose gate and mask are not zero, by rows and by columns of blocks."""
    rows, columns = o.gate.shape
    gates = _Gates(o.gate, o.mask)
    # tensors of their own, not parts of one: what an operator returns may share no memory
    sizes = (rows + 1, rows * columns, columns + 1, rows * columns, rows + columns)
    parts = tuple(torch.empty(size, dtype=torch.int32) for size in sizes)
    gates.count(parts[0])
    gates.index(*parts, capacity=rows * columns)
    return parts


def passing_layout(gate: torch.Tensor, by_row: bool) -> list[torch.Tensor]:
    """The index of the blocks whose gate is set, as one product reads it; in scratch that the next call writes over.

    Args:
        gate: bool, [rows, columns].
        by_row: only what the product by rows reads; else also the index by columns.
    """
    rows, columns = gate.shape
    gates = _Gates(gate, None)
    row_offsets = torch.empty(rows + 1, dtype=torch.int32)
    active = gates.count(row_offsets)
    room = extension.workspace(4 * active * (1 if by_row else 2), "index").view(torch.int32)
    parts = [row_offsets, room[:active]]
    if not by_row:
        parts += [torch.empty(columns + 1, dtype=torch.int32), room[active : 2 * active]]
    gates.index(*parts, capacity=active)
    return parts


class _Gates:
    """The gates as the kernels take them; keeps what it points to."""

    def __init__(self, gate: torch.Tensor, mask: torch.Tensor | None) -> None:
        self.gate = gate.detach().contiguous()
        self.mask = None if mask is None else mask.contiguous()
        self.threads = torch.get_num_threads()
        self.handle = extension.native.cpu.ActiveGates(
            self.gate.data_ptr(), self.gate.element_size(), extension.pointer(self.mask), *gate.shape
        )

    def count(self, row_offsets: torch.Tensor) -> int:
        """Write the offsets of the rows; the number of active blocks."""
        count: int = extension.native.cpu.block_layout_rows(self.handle, row_offsets.data_ptr(), self.threads)
        return count

    def index(self, *parts: torch.Tensor, capacity: int) -> None:
        """Write the parts after the offsets of the rows, as many as are given."""
        size = extension.native.cpu.block_layout_scratch(*self.gate.shape, self.threads)
        scratch = extension.workspace(4 * size)
        pointers = [part.data_ptr() for part in parts] + [0] * (5 - len(parts))
        extension.native.cpu.block_layout(self.handle, *pointers, capacity, scratch.data_ptr(), self.threads)
