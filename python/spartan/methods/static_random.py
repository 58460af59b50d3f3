"""Static random sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spartan.budgets import Distribution
from spartan.masks import MaskSet
from spartan.methods.base import SparseMethod
from spartan_kernels.arguments import block_grid

__all__ = ["StaticRandom"]

# An odd number: different steps of one seed, and small seeds at any steps, draw from different generators.
_SEED_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True)
class StaticRandom(SparseMethod):
    """Keep blocks drawn uniformly at random before training, in exact numbers per layer.

    With `keep_zeros=True` of the sparsifier those that are not zero are kept instead, or the largest of them that fit.

    Attributes:
        distribution: "erk" unless said otherwise.
        seed: of the draw, which does not touch PyTorch's global generator.
    """

    distribution: Distribution = "erk"
    seed: int = 0

    takes_shards = True
    keeps_zeros = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seed(self.seed)

    def start(self, masks: MaskSet) -> None:
        """Draw the masks, or take those of a model that is sparse already."""
        masks.select(1.0, None if masks.keep_zeros else draw_scores(masks, self.seed))
        masks.freeze()

    def update(self, masks: MaskSet) -> None:
        """Nothing: the masks stay."""


def draw_scores(masks: MaskSet, seed: int, step: int = 0) -> dict[str, torch.Tensor]:
    """Scores of all blocks by name, drawn for this seed and step, so that every block is as likely to be selected."""
    generator = generator_at(seed, step)
    scores = {}
    for tensor in masks.tensors:
        costs = tensor.costs
        grid = block_grid(tensor.shape, tensor.carrier.mask_block_size)
        whole = torch.rand(grid, generator=generator, device=generator.device)  # the same over any ranks
        draw = tensor.own_of(whole.to(costs.device))
        # Blocks at a ragged edge cost less: selection is by score / cost, so the draw is per unit of cost.
        scores[tensor.name] = draw * costs.float()
    return scores


def generator_at(seed: int, step: int) -> torch.Generator:
    """A generator on the CPU of its own for every step, the same after resuming and on every rank."""
    return torch.Generator().manual_seed((seed + step * _SEED_STRIDE) % 2**63)


def require_seed(value: Any) -> None:
    """Raise unless `value` is a seed."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"seed must be an int; got {type(value).__name__}")
