"""Lightning: a callback that masks the module, trains, saves and resumes with it, and finalizes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from spartan.integrations.resuming import weights_kept
from spartan.methods.base import Method
from spartan.sparsifier import Sparsifier
from spartan.sparsifier.attaching import training

__all__ = ["SparsityCallback"]


class SparsityCallback(Callback):  # type: ignore[misc]
    """Trains a `LightningModule` sparse; the only line that changes is the one that names it.

    It makes the `Sparsifier` when the module is on its device and optimizers exist, and attaches those that train
    masked weights. Gradients are corrected after accumulation and clipping, in the closure that Lightning gives to
    `step`, and masks move after each optimizer step. The callback's state in each checkpoint is that of the masks:
    `fit(ckpt_path=...)` equals going on, and `test` or `validate(ckpt_path=...)` of a checkpoint from the middle
    applies its masks. Checkpoints of the last step have exact zeros; after `fit` the module is plain and sparse.
    "sparsity" is logged every `log_every_n_steps`.

    `WeightAveraging`, `EMAWeightAveraging` and `StochasticWeightAveraging` average with the masks of now, before or
    after this callback in the list.

    Args:
        method: such as `spartan.Spartan(sparsity=0.9)`.
        total_steps: optimizer steps of the whole training; None: `trainer.estimated_stepping_batches`. Under manual
            optimization say it, as Lightning then counts the steps of every optimizer.
        **options: `include`, `exclude`, `groups` and others of `spartan.Sparsifier`.

    Attributes:
        sparsifier: None until fitting begins.

    Raises:
        TypeError: a method of the wrong type. ValueError, when fitting begins: as `Sparsifier` and `attach` do; a
            training without an end.

    Example::

        trainer = Trainer(max_epochs=10, callbacks=[SparsityCallback(spartan.Spartan(sparsity=0.9))])
        trainer.fit(module, loader)
    """

    def __init__(self, method: Method, *, total_steps: int | None = None, **options: Any) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method must be a spartan method such as Spartan(sparsity=0.9); got {method!r}")
        self.method, self.total_steps, self.options = method, total_steps, options
        self.sparsifier: Sparsifier | None = None
        self._loaded: dict[str, Any] | None = None
        self._to_train = True  # whether the checkpoint that is being loaded is one to go on from

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask, attach, and go on where the checkpoint was."""
        total = self.total_steps or trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError("total_steps must be given, as the trainer has neither max_steps nor max_epochs")
        with weights_kept(pl_module) if self._loaded else nullcontext():
            self.sparsifier = Sparsifier(pl_module, self.method, int(total), **self.options)
        self.sparsifier.attach(*training(trainer.optimizers, self.sparsifier.masked_weights()))
        if self._loaded:
            self.sparsifier.load_state_dict(self._loaded)
            self._loaded = None
        _mask_averages(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Have exact zeros in a checkpoint of the last step, and log."""
        if self.sparsifier is None:
            return
        if self.sparsifier.step_count >= self.sparsifier.total_steps:
            self.sparsifier.freeze()
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:
            self.log("sparsity", self.sparsifier.sparsity)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages are validated with the masks of now."""
        self._sync_averages(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages take the place of the weights when training ends, with buffers and all."""
        self._sync_averages(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_train_epoch_end`, for those that are written after this callback's turn."""
        self._sync_averages(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalize, after averages have been written into the module."""
        if self.sparsifier is None or self.sparsifier.finalized:
            return
        for average in _averages(trainer):
            self.sparsifier.finalize_copy(average)
        self.sparsifier.finalize()

    def state_dict(self) -> dict[str, Any]:
        """The masks, while there are some."""
        if self.sparsifier is None or self.sparsifier.finalized:
            return {}
        return self.sparsifier.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take masks from a checkpoint, which Lightning reads before fitting begins or after."""
        if not self._to_train:
            return
        if self.sparsifier is None or self.sparsifier.finalized:
            self._loaded = state_dict
        else:
            self.sparsifier.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Where weights are loaded to be used, apply the masks that they had."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        self._to_train = trainer.state.fn == TrainerFn.FITTING
        if not state or self._to_train:
            return
        with weights_kept(pl_module):
            sparsifier = Sparsifier(pl_module, self.method, state["total_steps"], **self.options)
        sparsifier.load_state_dict(state)
        sparsifier.finalize(complete=False)

    def _sync_averages(self, trainer: Trainer) -> None:
        if self.sparsifier is not None and not self.sparsifier.finalized:
            for average in _averages(trainer):
                self.sparsifier.copy_masks(average)


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    """The averages that Lightning's callbacks have."""
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            yield average.module
        elif isinstance(average, LightningModule):
            yield average


def _mask_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Make averages anew, of the masked module, where callbacks made them of the plain one: both must have the same."""
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, (AveragedModel, LightningModule)):
            state = average.state_dict()
            callback.setup(trainer, pl_module, "fit")
            callback._average_model.load_state_dict(state)
