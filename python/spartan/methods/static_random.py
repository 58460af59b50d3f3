"""Static random sparsity."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spartan.masks import MaskSet
from spartan.methods.base import SparseMethod

__all__ = ["StaticRandom"]


@dataclass(frozen=True, kw_only=True)
class StaticRandom(SparseMethod):
    """Keep blocks drawn uniformly at random before training, in exact numbers per layer.

    Attributes:
        distribution: "erk" unless said otherwise.
        seed: of the draw, which does not touch PyTorch's global generator.
    """

    distribution: str = "erk"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int; got {type(self.seed).__name__}")

    def start(self, masks: MaskSet) -> None:
        """Draw the masks."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = {}
        for tensor in masks.tensors:
            costs = tensor.carrier.mask_costs
            draw = torch.rand(tensor.carrier.mask_hard.shape, generator=generator)
            # Blocks at a ragged edge cost less: selection is by score / cost, so the draw is per unit of cost.
            scores[tensor.name] = draw.to(costs.device) * costs.float()
        masks.select(1.0, scores)
        masks.freeze()

    def update(self, masks: MaskSet) -> None:
        """Nothing: the masks stay."""
