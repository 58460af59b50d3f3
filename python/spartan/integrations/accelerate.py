"""Hugging Face Accelerate: masks in the accelerator's own checkpoints, whatever has been prepared already."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from spartan.methods.base import Method
from spartan.sparsifier import Sparsifier

__all__ = ["sparsify"]


def sparsify(
    accelerator: Accelerator,
    model: nn.Module,
    *optimizers: torch.optim.Optimizer,
    method: Method,
    total_steps: int,
    **options: Any,
) -> Sparsifier:
    """Mask a model, attach its optimizers, and have `accelerator.save_state` and `load_state` take the masks along.

    Before or after `accelerator.prepare`, of the model, the optimizers or both; call it at the same point of the script
    when resuming, as `register_for_checkpointing` counts objects. Steps that the accelerator skips, while it
    accumulates gradients or after an overflow, move no masks.

    Args:
        accelerator: of this training.
        model: prepared or not.
        *optimizers: all that train masked weights, prepared or not.
        method: such as `spartan.Spartan(sparsity=0.9)`.
        total_steps: optimizer steps of the whole training: batches by the gradient accumulation.
        **options: `include`, `exclude`, `groups` and others of `spartan.Sparsifier`.

    Returns:
        The sparsifier; call its `finalize()` when training has ended, before the model is saved.

    Raises:
        TypeError, ValueError: as `Sparsifier` and `attach` do.

    Example::

        accelerator = Accelerator()
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        sparsifier = sparsify(accelerator, model, optimizer, method=spartan.Spartan(sparsity=0.9), total_steps=1000)
        ...                      # train as ever
        sparsifier.finalize()
        accelerator.save_model(model, "folder")
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator must be an accelerate.Accelerator; got {type(accelerator).__name__}")
    sparsifier = Sparsifier(accelerator.unwrap_model(model), method, total_steps, **options)
    sparsifier.attach(*optimizers)
    accelerator.register_for_checkpointing(_Checkpointed(sparsifier))
    return sparsifier


class _Checkpointed:
    """What the accelerator saves: nothing once masks are in the weights."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier

    def state_dict(self) -> dict[str, Any]:
        return {} if self._sparsifier.finalized else self._sparsifier.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state and not self._sparsifier.finalized:
            raise ValueError("the checkpoint is of a finalized model, without masks: load it before sparsify, or not")
        if state:
            self._sparsifier.load_state_dict(state)
