"""Hugging Face's `Trainer`: a callback that masks the model, trains, saves and resumes with it, and finalizes it."""

from __future__ import annotations

import copy
import inspect
import uuid
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from spartan.integrations.resuming import weights_kept
from spartan.methods.base import Method
from spartan.saving.files import replacing
from spartan.sparsifier import Sparsifier
from spartan.sparsifier.copies import has_masks

__all__ = ["FILE", "SparsityCallback"]

FILE = "sparsity.pt"  # in each of the Trainer's checkpoints
_KEY = "spartan"  # in `trainer_state.json`


class SparsityCallback(TrainerCallback):  # type: ignore[misc]
    """Trains the model of a `Trainer` sparse; the only line that changes is the one that names it.

    It makes the `Sparsifier` when training begins and attaches the Trainer's optimizer, so gradients are corrected
    after accumulation, unscaling and clipping, and masks move after each optimizer step. Each checkpoint has the masks
    beside the weights, in `sparsity.pt`: resuming from it equals going on. The last checkpoint has exact zeros; when
    training ends, the model is plain and sparse, before `save_model`. With `load_best_model_at_end` the best weights
    get the masks of their step. "sparsity" is in the logs.

    Averages: other callbacks may copy theirs into the model when training ends, before or after this one in the list;
    finalizing comes last. An `AveragedModel` that another callback keeps, or a copy of the model with masks, becomes
    plain and sparse too; for others call `callback.sparsifier.finalize_copy(average)`.

    Checkpoints on the way hold the trained weights without their masks, as the Trainer resumes from those.

    Args:
        method: such as `spartan.Spartan(sparsity=0.9)`.
        total_steps: optimizer steps of the whole training; None: the Trainer's.
        resume_from: the checkpoint that `train(resume_from_checkpoint=...)` is given, if that is neither in the output
            folder nor in the arguments.
        **options: `include`, `exclude`, `groups` and others of `spartan.Sparsifier`.

    Attributes:
        sparsifier: None until training begins.

    Raises:
        TypeError: a method of the wrong type. ValueError, when training begins: as `Sparsifier` and `attach` do; no
            masks for the checkpoint that training resumes from.

    Example::

        trainer = Trainer(model, args, train_dataset=..., callbacks=[SparsityCallback(spartan.Spartan(sparsity=0.9))])
        trainer.train()
        trainer.save_model("folder")
    """

    def __init__(
        self,
        method: Method,
        *,
        total_steps: int | None = None,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method must be a spartan method such as Spartan(sparsity=0.9); got {method!r}")
        self.method, self.total_steps, self.resume_from, self.options = method, total_steps, resume_from, options
        self.sparsifier: Sparsifier | None = None
        self._run = ""
        self._handler: CallbackHandler | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mask, attach, and go on where the checkpoint was."""
        self._surround()
        model, total = kwargs["model"], self.total_steps or state.max_steps
        with weights_kept(model) if state.global_step else nullcontext():
            self.sparsifier = Sparsifier(model, self.method, total, **self.options)
        self.sparsifier.attach(kwargs["optimizer"])
        known = state.stateful_callbacks.get(_KEY, {})
        self._run = known.get("run") or uuid.uuid4().hex
        if state.global_step:
            self._resume(args, state, bool(known))
        _mask_averages(self._handler, model)
        state.stateful_callbacks[_KEY] = {"run": self._run}  # so that a checkpoint's masks are known as its own

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the masks into the checkpoint that has just been written."""
        if self.sparsifier is None or self.sparsifier.finalized:
            return
        content = {"run": self._run, "step": state.global_step, "state": self.sparsifier.state_dict()}
        folder = _checkpoint(args, state)
        if args.should_save and folder.is_dir():
            with replacing(folder / FILE) as temporary:
                torch.save(content, temporary)

    def log(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """Add the sparsity to what is logged, and to the Trainer's history."""
        if self.sparsifier is not None and not self.sparsifier.finalized:
            logs["sparsity"] = self.sparsifier.sparsity
            if state.log_history:
                state.log_history[-1]["sparsity"] = logs["sparsity"]

    def end_of_step(self, state: TrainerState) -> None:
        """Have exact zeros in the last checkpoint."""
        if self.sparsifier is not None and state.global_step >= state.max_steps:
            self.sparsifier.freeze()

    def end_of_training(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Finalize, with the masks that belong to the weights that are there now."""
        if self.sparsifier is None or self.sparsifier.finalized:
            return
        for average in _averages(self._handler, model):
            self.sparsifier.finalize_copy(average)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = self._read(Path(state.best_model_checkpoint))
            self.sparsifier.load_state_dict(best["state"])
            if not self.sparsifier.frozen:
                warnings.warn(
                    f"the best model is of step {best['step']}, when masks still moved, at a sparsity of"
                    f" {self.sparsifier.sparsity:.3f}; finalizing goes the rest of the way in one step. To choose among"
                    " models that are as sparse as they will be, evaluate them late (eval_delay)",
                    stacklevel=2,
                )
        self.sparsifier.finalize()
        if self._handler is not None:
            self._handler.callbacks = [c for c in self._handler.callbacks if getattr(c, "owner", None) is not self]
            self._handler = None

    def _surround(self) -> None:
        """Have a callback before all others, for the logs, and one after them, which the end of training needs.

        Callbacks that write averages into the model when training ends may come after this one in the list. Nothing
        that a callback is given leads to that list, so it is looked for in the call that is in progress.
        """
        frame = inspect.currentframe()
        while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
            frame = frame.f_back
        if frame is None:
            raise RuntimeError("SparsityCallback must be called by a transformers.Trainer")
        self._handler = frame.f_locals["self"]
        others = [c for c in self._handler.callbacks if getattr(c, "owner", None) is not self]
        self._handler.callbacks = [_First(self), *others, _Last(self)]

    def _resume(self, args: TrainingArguments, state: TrainerState, known: bool) -> None:
        given = (self.resume_from, args.resume_from_checkpoint, _checkpoint(args, state))
        tried = [Path(folder) for folder in given if isinstance(folder, (str, Path))]
        for folder in tried:
            if not (folder / FILE).is_file():
                continue
            content = self._read(folder)
            if content["step"] == state.global_step and (content["run"] == self._run or not known):
                self._run = content["run"]
                assert self.sparsifier is not None
                self.sparsifier.load_state_dict(content["state"])
                return
        raise ValueError(
            f"training resumes at step {state.global_step}, but there are no masks of that step of that training in"
            f" {', '.join(str(folder / FILE) for folder in tried)}; say where the checkpoint is with"
            " SparsityCallback(resume_from=...)"
        )

    def _read(self, folder: Path) -> dict[str, Any]:
        path = folder / FILE
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: cannot be read as masks ({error})") from error
        if not isinstance(content, dict) or set(content) != {"run", "step", "state"}:
            raise ValueError(f"{path}: is not what SparsityCallback saves")
        return content


class _First(TrainerCallback):  # type: ignore[misc]
    """Before all others, which write the logs."""

    def __init__(self, owner: SparsityCallback) -> None:
        self.owner = owner

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs is not None:
            self.owner.log(state, logs)


class _Last(TrainerCallback):  # type: ignore[misc]
    """After all others, which may stop the training or write averages."""

    def __init__(self, owner: SparsityCallback) -> None:
        self.owner = owner

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.owner.end_of_step(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.owner.end_of_training(args, state, kwargs["model"])


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _mask_averages(handler: CallbackHandler | None, model: nn.Module) -> None:
    """Have averages that were made of the plain model follow the masked one, whose buffers they keep too."""
    names = model.state_dict().keys()
    for callback in handler.callbacks if handler is not None else ():
        for average in list(vars(callback).values()):
            if isinstance(average, AveragedModel) and not has_masks(average.module):
                state = average.module.state_dict()
                if state.keys() == names:
                    average.module = copy.deepcopy(model)
                    average.module.load_state_dict(state)


def _averages(handler: CallbackHandler | None, model: nn.Module) -> Iterator[nn.Module]:
    """Averages of the model, or copies with masks, that other callbacks have."""
    for callback in handler.callbacks if handler is not None else ():
        for value in list(vars(callback).values()):
            average = value.module if isinstance(value, AveragedModel) else value
            if isinstance(average, nn.Module) and average is not model:
                if isinstance(value, AveragedModel) or has_masks(average):
                    yield average
