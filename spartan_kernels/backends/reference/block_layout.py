"""Where the active blocks of a matrix lie."""

from __future__ import annotations

import torch
from torch.nn import functional

from spartan_kernels.layout import longest_first
from spartan_kernels.operands import BlockLayoutOf


def block_layout(o: BlockLayoutOf) -> tuple[torch.Tensor, ...]:
    """The blocks whose gate and mask are not zero, by rows and by columns of blocks; no host waits for their number."""
    active = o.gate != 0 if o.mask is None else (o.gate != 0) & o.mask
    rows, columns = _compressed(active), _compressed(active.mT)
    return *rows, *columns, longest_first(rows[0], columns[0])


def _compressed(active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets of the rows, and the columns of what is active, zeros behind them."""
    lines, length = active.shape
    flat = active.reshape(-1)
    offsets = functional.pad(active.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    place = torch.where(flat, flat.cumsum(0) - 1, flat.numel())  # what is not active: one place past the end
    column = torch.arange(length, dtype=torch.int32, device=active.device).repeat(lines)
    indices = torch.zeros(flat.numel() + 1, dtype=torch.int32, device=active.device)
    indices.scatter_(0, place, torch.where(flat, column, 0))
    return offsets, indices[:-1].clone()
