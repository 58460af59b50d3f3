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
    return _laid_out(o.gate, o.mask, o.gate.shape[1])


def row_layout(gate: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Offsets and indices by rows alone, and the order of the rows; two launches."""
    offsets, indices, _, _, order = _laid_out(gate, mask, 0)
    return offsets, indices, order


def _laid_out(gate: torch.Tensor, mask: torch.Tensor | None, columns: int) -> tuple[torch.Tensor, ...]:
    """By rows, and by so many columns: all of them, or none."""
    grid_rows, grid_columns = gate.shape
    gate = (gate.view(torch.uint8) if gate.dtype == torch.bool else gate).contiguous()
    lines = grid_rows + columns
    by_columns = gate.numel() if columns else 0
    counts, order, row_offsets, column_offsets, column_indices, row_indices = (
        torch.zeros(n, dtype=torch.int32, device=gate.device)
        for n in (lines, lines, grid_rows + 1, columns + 1, gate.numel(), by_columns)
    )
    given = gate if mask is None else mask.contiguous().view(torch.uint8)
    rest: Any = {"HAS_MASK": mask is not None, "BLOCK": LAYOUT_BLOCK, "num_warps": 4}
    if lines:
        sizes = grid_rows, grid_columns
        start(Launch(kernels._layout_count_kernel, lines, (gate, given, counts, *sizes), rest))
        parts = counts, row_offsets, column_indices, column_offsets, row_indices, order
        start(Launch(kernels._layout_fill_kernel, lines, (gate, given, *parts, *sizes), rest))
    return row_offsets, column_indices, column_offsets, row_indices, order
