"""How a list of weights becomes the list of block scores that a solve chooses by."""

from __future__ import annotations

from collections.abc import Callable

import torch

Scores = Callable[[torch.Tensor, int, int], torch.Tensor]


def score_list(
    values: list[torch.Tensor], block_sizes: list[int], absolute: bool, scores: Scores
) -> tuple[list[torch.Tensor], bool]:
    """What a solve chooses by: the values as they are, or with block sizes each block's sum of magnitudes.

    Args:
        values: of an operator over a list.
        block_sizes: rows and columns for each tensor in turn; empty where values are scores already.
        absolute: whether values count by magnitude.
        scores: a backend's `block_scores`.

    Returns:
        The list to solve on, and whether it counts by magnitude.
    """
    if not block_sizes:
        return values, absolute
    sides = zip(values, block_sizes[::2], block_sizes[1::2], strict=True)
    return [scores(value, rows, columns) for value, rows, columns in sides], False
