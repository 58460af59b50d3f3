"""How a list of weights becomes the list of block scores that a solve chooses by."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spartan_kernels.operands import BlockScores, SolveMasks


def score_list(o: SolveMasks, scores: Callable[[BlockScores], torch.Tensor]) -> tuple[list[torch.Tensor], bool]:
    """What a solve chooses by: the values as they are, or with block sizes each block's sum of magnitudes.

    Args:
        o: what the solve takes.
        scores: a backend's `block_scores`.

    Returns:
        The list to solve on, and whether it counts by magnitude.
    """
    if not o.block_sizes:
        return o.values, o.absolute
    sides = zip(o.values, o.block_sizes[::2], o.block_sizes[1::2], strict=True)
    return [scores(BlockScores(value, rows, columns)) for value, rows, columns in sides], False
