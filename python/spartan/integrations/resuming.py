"""What trainers that load the weights of a checkpoint before masks are made need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["weights_kept"]


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Put the weights back in the end: some methods, such as `RigL`, begin a training by zeroing weights at random."""
    before = [(p, p.detach().clone()) for p in model.parameters() if p.dim() > 1]
    yield
    with torch.no_grad():
        for parameter, value in before:
            parameter.copy_(value)
