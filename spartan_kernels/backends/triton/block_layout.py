"""Where the active blocks of a matrix lie, on Triton: two launches."""

from __future__ import annotations

from typing import Any

import torch

from spartan_kernels.backends.triton import block_layout_kernels as kernels
from spartan_kernels.backends.triton.launches import Launch, start
from spartan_kernels.operands import BlockLayoutOf

LAYOUT_BLOCK = 256


def block_layout(o: BlockLayoutOf) -> tuple[torch.Tensor, ...]:
    """The blocks whose gate and mask are not zero, by rows and by columns of blocks; two launches."""
    gate = o.gate
    grid_rows, grid_columns = gate.shape
    gate = (gate.view(torch.uint8) if gate.dtype == torch.bool else gate).contiguous()
    lines = grid_rows + grid_columns
    counts, order, row_offsets, column_offsets, column_indices, row_indices = (
        torch.zeros(n, dtype=torch.int32, device=gate.device)
        for n in (lines, lines, grid_rows + 1, grid_columns + 1, gate.numel(), gate.numel())
    )
    given = gate if o.mask is None else o.mask.contiguous().view(torch.uint8)
    rest: Any = {"HAS_MASK": o.mask is not None, "BLOCK": LAYOUT_BLOCK, "num_warps": 4}
    if lines:
        sizes = grid_rows, grid_columns
        start(Launch(kernels._layout_count_kernel, lines, (gate, given, counts, *sizes), rest))
        parts = counts, row_offsets, column_indices, column_offsets, row_indices, order
        start(Launch(kernels._layout_fill_kernel, lines, (gate, given, *parts, *sizes), rest))
    return row_offsets, column_indices, column_offsets, row_indices, order
