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
    parts = tuple([extension.empty(size, torch.int32) for size in sizes])
    row_offsets, *rest = [part.data_ptr() for part in parts]
    gates.count(row_offsets)
    gates.index(row_offsets, *rest, capacity=rows * columns)
    return parts


def passing_layout(gate: torch.Tensor, by_row: bool) -> extension.Index:
    """The index of the blocks whose gate is not zero, as one product reads it; the next call writes over it.

    Args:
        gate: float or bool, [rows, columns].
        by_row: only what the product by rows reads; else also the index by columns.
    """
    rows, columns = gate.shape
    gates = _Gates(gate, None)
    offsets = extension.workspace(4 * (rows + columns + 2), "offsets")
    row_offsets = offsets.data_ptr()
    active = gates.count(row_offsets)
    indices = extension.workspace(4 * active * (1 if by_row else 2), "index")
    column_indices = indices.data_ptr()
    by_column = (0, 0) if by_row else (row_offsets + 4 * (rows + 1), column_indices + 4 * active)
    found = (row_offsets, column_indices, *by_column, 0)  # no product on a CPU reads the order
    gates.index(*found, capacity=active)
    return extension.Index(found, (offsets, indices))


class _Gates:
    """The gates as the kernels take them; keeps what it points to."""

    def __init__(self, gate: torch.Tensor, mask: torch.Tensor | None) -> None:
        self.gate, self.mask = gate.contiguous(), None if mask is None else mask.contiguous()
        self.threads = torch.get_num_threads()
        rows, columns = self.shape = gate.shape
        self.handle = extension.native.cpu.ActiveGates(
            self.gate.data_ptr(), self.gate.element_size(), extension.pointer(self.mask), rows, columns
        )

    def count(self, row_offsets: int) -> int:
        """Write the offsets of the rows; the number of active blocks."""
        count: int = extension.native.cpu.block_layout_rows(self.handle, row_offsets, self.threads)
        return count

    def index(self, *addresses: int, capacity: int) -> None:
        """Write the parts after the offsets of the rows, those that have an address."""
        cpu = extension.native.cpu
        scratch = extension.workspace(4 * cpu.block_layout_scratch(*self.shape, self.threads))
        cpu.block_layout(self.handle, *addresses, capacity, scratch.data_ptr(), self.threads)
