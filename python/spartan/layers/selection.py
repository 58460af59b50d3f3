"""Which entries of a row stay: what several layers select by."""

from __future__ import annotations

import torch

__all__ = ["kept_indices"]


def kept_indices(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices `[..., k]` int64 of the k largest of each row of `scores` `[..., n]`, in no order of rank.

    A row with fewer than k entries above -inf gives some at -inf too; read the scores there to know which.

    Raises:
        ValueError: k outside [1, n].
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be from 1 to the {scores.shape[-1]} entries of a row; got {k}")
    return scores.topk(k, dim=-1, sorted=False).indices
