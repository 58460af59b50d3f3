"""Where the active blocks of a matrix lie, on the compiled extension."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension
from spartan_kernels.operands import BlockLayoutOf


def block_layout(o: BlockLayoutOf) -> tuple[torch.Tensor, ...]:
    """The blocks whose gate and mask are not zero, by rows and by columns of blocks."""
    gate, mask = o.gate, o.mask
    gate = gate.detach().contiguous()
    mask = None if mask is None else mask.contiguous()
    grid_rows, grid_columns = gate.shape
    lines = grid_rows + grid_columns
    sizes = (lines + 2, grid_rows + 1, gate.numel(), grid_columns + 1, gate.numel(), lines)
    # tensors of their own, not parts of one: what an operator returns may share no memory
    counts, *parts = (torch.empty(size, dtype=torch.int32) for size in sizes)
    extension.native.cpu.block_layout(
        gate.data_ptr(),
        gate.element_size(),
        0 if mask is None else mask.data_ptr(),
        grid_rows,
        grid_columns,
        counts.data_ptr(),
        *(part.data_ptr() for part in parts),
    )
    return tuple(parts)
