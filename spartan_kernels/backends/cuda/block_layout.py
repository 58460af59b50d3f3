"""Where the active blocks of a matrix lie, in CUDA C++."""

from __future__ import annotations

import torch

from spartan_kernels.backends import extension
from spartan_kernels.operands import BlockLayoutOf


def block_layout(o: BlockLayoutOf) -> tuple[torch.Tensor, ...]:
    """The blocks whose gate and mask are not zero, by rows and by columns of blocks; two launches."""
    gate, mask = o.gate, o.mask
    gate = gate.detach().contiguous()
    mask = None if mask is None else mask.contiguous()
    grid_rows, grid_columns = gate.shape
    lines = grid_rows + grid_columns
    sizes = (lines, grid_rows + 1, gate.numel(), grid_columns + 1, gate.numel(), lines)
    make = torch.empty if gate.numel() else torch.zeros  # of a gate without entries not every line writes
    counts, *parts = (make(size, dtype=torch.int32, device=gate.device) for size in sizes)
    extension.call(
        extension.native.cuda.block_layout,
        gate,
        gate.data_ptr(),
        gate.element_size(),
        extension.pointer(mask),
        grid_rows,
        grid_columns,
        counts.data_ptr(),
        *(part.data_ptr() for part in parts),
    )
    return tuple(parts)
