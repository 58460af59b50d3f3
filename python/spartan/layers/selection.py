"""Which entries of a row stay: what several layers select by."""

from __future__ import annotations

import torch

from spartan.functional import hard_topk

__all__ = ["kept_indices"]


def kept_indices(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices `[..., k]` int64 of the k largest of each row of `scores` `[..., n]`, in ascending order.

    A row with fewer than k entries above -inf gives some at -inf too; read the scores there to know which.

    Raises:
        ValueError: k outside [1, n]; on the CPU also scores that are NaN or +inf.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be from 1 to the {scores.shape[-1]} entries of a row; got {k}")
    return hard_topk(scores, k, return_indices=True)[1]
