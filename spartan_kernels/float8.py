"""Numbers in 8 bits: float8 with 4 bits of exponent and 3 of mantissa (e4m3fn), each row with a scale of its own.

A row's scale is its largest magnitude / 448, the largest number of this format. It is multiplied by 1 / scale, in
float32, which costs a GPU less than a division of each entry, and rounded to the nearest. The
format has no infinity: a row with one, or with NaN, gets the scale NaN, and with it all that is computed of the row.
"""

from __future__ import annotations

import torch

__all__ = ["FLOAT8", "rounded", "rounded_rows", "row_scales"]

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of rows of zeros too: no division by zero, nor by a subnormal


def row_scales(rows: torch.Tensor) -> torch.Tensor:
    """The scales of rows [..., n] as float32 [..., 1]; NaN where an entry is not finite."""
    if not rows.shape[-1]:
        return rows.new_full((*rows.shape[:-1], 1), SMALLEST_SCALE, dtype=torch.float32)
    largest = rows.abs().amax(-1, keepdim=True).to(torch.float32)
    return torch.where(largest < torch.inf, (largest / LARGEST).clamp(min=SMALLEST_SCALE), torch.nan)


def rounded(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rows [..., n] in float8, given their scales [..., 1]."""
    return (rows.to(torch.float32) * (1 / scales)).to(FLOAT8)


def rounded_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., n] in float8, and their scales."""
    scales = row_scales(rows)
    return rounded(rows, scales), scales
