"""A model whose training can be followed by hand."""

from __future__ import annotations

import torch
from torch import nn

from spartan.sparsifier import Sparsifier


class Toy(nn.Module):
    """One masked row of weights; `pull` gives its masked weight any gradient."""

    def __init__(self, weight: list[float]) -> None:
        super().__init__()
        self.row = nn.Linear(len(weight), 1, bias=False)
        self.head = nn.Linear(1, 1)
        with torch.no_grad():
            self.row.weight.copy_(torch.tensor([weight]))

    def pull(self, gradient: list[float]) -> torch.Tensor:
        """A loss with dL/dw = gradient."""
        loss: torch.Tensor = self.row(torch.tensor([gradient])).sum()
        return loss

    @property
    def values(self) -> list[float]:
        """theta."""
        return [round(x, 5) for x in self.row.weight.flatten().tolist()]

    @property
    def used(self) -> list[float]:
        """w, what the forward pass multiplies by."""
        with torch.no_grad():
            return [round(x, 5) for x in self.row(torch.eye(self.row.in_features)).flatten().tolist()]


def hard(sparsifier: Sparsifier) -> torch.Tensor:
    """The hard mask of the only masked weight."""
    return next(iter(sparsifier.masks().values())).hard


def step(model: Toy, optimizer: torch.optim.Optimizer, *gradients: list[float]) -> None:
    """One optimizer step on the sum of these gradients."""
    optimizer.zero_grad()
    for gradient in gradients:
        model.pull(gradient).backward()
    optimizer.step()
