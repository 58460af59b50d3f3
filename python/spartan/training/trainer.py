"""A training run from its settings to a saved sparse model, which can be killed at any moment and go on."""

from __future__ import annotations

import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spartan.budgets import FLOPs
from spartan.saving.export import load_pretrained, save_pretrained, sparsity_of
from spartan.saving.files import replacing
from spartan.sparsifier import History, OnStep, Sparsifier
from spartan.training.checkpoint import load_checkpoint, save_checkpoint
from spartan.training.config import Config
from spartan.training.interrupt import StopRequest, steps_to_next_look
from spartan.training.learning_rate import warmup_cosine
from spartan.training.progress import Progress
from spartan.training.tasks import ImageTask, Slice, Task, TextTask, make_method, make_model, make_task
from spartan.training.workers import Workers, joined
from spartan_kernels import __version__

__all__ = ["CHECKPOINT", "RESULTS", "Trainer", "TrainingFailed", "load_run", "train"]

CHECKPOINT = "checkpoint.pt"
RESULTS = "results.json"
MODEL_FOLDER = "model"
REPORT = "report.txt"
FIGURE = "masks.png"


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says at which step and which checkpoint is there."""


class Trainer:
    """Model, optimizer and sparsifier of a run, and where it stands.

    Raises:
        ValueError, TypeError: settings that do not fit the model, the method or the processes, named.
    """

    def __init__(self, config: Config, task: Task, workers: Workers, on_step: OnStep | None = None) -> None:
        if config.batch_size % workers.size:
            raise ValueError(f"batch_size {config.batch_size} must be a multiple of the {workers.size} processes")
        self.config, self.task, self.workers = config, task, workers
        self.out = Path(config.out)
        torch.manual_seed(config.seed)
        self.model = task.model(config.model).to(workers.device)
        method, own = make_method(config.method), config.sparsifier
        costs = FLOPs(task.batch(0, 1, config.seed, Slice())[0].to(workers.device)) if own.costs == "flops" else None
        self.sparsifier = Sparsifier(
            self.model, method, config.steps, include=own.include, exclude=own.exclude, count=own.count, costs=costs
        )
        rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=decay)
        self.sparsifier.attach(self.optimizer)
        self.parallel = workers.wrapped(self.model)
        self.history = History(self.sparsifier, config.log_every, on_step if workers.writes else None)
        self.fingerprint = task.fingerprint()
        self.step = 0
        self._next_look = 1
        self.seconds = 0.0
        self.evaluations: list[dict[str, float]] = []

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.config.steps

    def run(self, stop: StopRequest, progress: Progress) -> bool:
        """Train to the end or until asked to stop, with a checkpoint now and then; whether the end was reached.

        Raises:
            TrainingFailed: a loss, gradient or weight that is not finite; the last checkpoint stays.
        """
        saved = looked = time.monotonic()
        looked_step = self.step
        while not self.done:
            examined = self._examined()
            begin = time.perf_counter()
            loss = self._train_step(examined)
            self.seconds += time.perf_counter() - begin
            if self.workers.writes:
                self.history.record(loss=loss, learning_rate=self.optimizer.param_groups[0]["lr"])
            if self.config.evaluate_every and self.step % self.config.evaluate_every == 0 and not self.done:
                self.evaluate()
            if not examined:
                continue
            progress.update(self.step, partial(self._note, loss))
            now = time.monotonic()
            looks = torch.tensor([float(stop.asked), now - looked], device="cpu")
            stopping, seconds = self.workers.total(looks).tolist()
            if stopping:
                self.save()
                return self.done
            # From sums, so that all processes look after the same step.
            mean = seconds / self.workers.size
            self._next_look = self.step + steps_to_next_look(mean, self.step - looked_step, self.config.log_every)
            looked, looked_step = now, self.step
            if time.monotonic() - saved >= 60 * self.config.checkpoint_minutes:
                self.save()
                saved = time.monotonic()
        return True

    def _examined(self) -> bool:
        """Whether the next step waits for its loss: each where that costs nothing, else some of them."""
        free = self.workers.size == 1 and self.workers.device.type == "cpu"
        after = self.step + 1
        return free or after >= self._next_look or after % self.config.log_every == 0 or after == self.config.steps

    def _train_step(self, examined: bool) -> Tensor:
        config, workers = self.config, self.workers
        for group in self.optimizer.param_groups:
            peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup
            group["lr"] = warmup_cosine(self.step, config.steps, peak, warmup)
        self.model.train()
        batch = self.task.batch(self.step, config.batch_size, config.seed, workers.part)
        inputs, targets = (tensor.to(workers.device, non_blocking=True) for tensor in batch)
        with self._precision():
            loss = self.task.loss(self.parallel, inputs, targets)
        self.optimizer.zero_grad()
        loss.backward()
        limit = math.inf if config.optimizer.clip is None else config.optimizer.clip
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if examined and not bool(torch.isfinite(loss.detach() + norm)):
            self._fail(f"loss {loss.item():g}, norm of the gradient {norm.item():g}")
        try:
            self.optimizer.step()
        except ValueError as error:  # the masks' solver met a weight that is not finite
            self._fail(str(error), error)
        self.step += 1
        return loss.detach()

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.workers.device.type, torch.bfloat16)

    def _fail(self, what: str, cause: BaseException | None = None) -> None:
        path = self.out / CHECKPOINT
        kept = f"the last checkpoint stays in {path}" if path.exists() else "there is no checkpoint yet"
        raise TrainingFailed(f"training broke down in step {self.step + 1}: {what}; {kept}") from cause

    def _note(self, loss: Tensor) -> str:
        accuracy = f", accuracy {self.evaluations[-1]['accuracy']:.2%}" if self.evaluations else ""
        return f"loss {loss.item():.3f}, {self.sparsifier.sparsity:.1%} zeros{accuracy}"

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, the work shared out over the processes."""
        self.workers.agree(self.model)
        with self._precision():
            score = self.task.score(self.model, self.workers.device, self.workers.part)
        loss, right, count = self.workers.total(score).tolist()
        metrics = self.task.metrics(loss / count, right / count)
        self.evaluations.append({"step": self.step, **metrics})
        return metrics

    def save(self) -> None:
        """Write the checkpoint."""
        if self.workers.writes:
            save_checkpoint(self.out / CHECKPOINT, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as tensors and plain types."""
        return {
            "settings": self.config.result_settings(),
            "data": self.fingerprint,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
            "random": torch.get_rng_state(),
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "history": self.history.state_dict(),
        }

    def resume(self) -> bool:
        """Go on from the checkpoint in the run's folder, if there is one.

        Raises:
            ValueError: it is damaged, or of other settings or data; what differs is named.
        """
        path = self.out / CHECKPOINT
        try:
            state = load_checkpoint(path)
        except FileNotFoundError:
            return False
        ours, theirs = self.config.result_settings(), state["settings"]
        different = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
        if different:
            details = "; ".join(f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}" for key in different)
            raise ValueError(f"{path}: is of a run with other settings ({details}): choose another out, or --restart")
        if state["data"] != self.fingerprint:
            raise ValueError(f"{path}: is of a run on other data: choose another out, or --restart")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])
        self.history.load_state_dict(state["history"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds, self.evaluations = state["step"], state["seconds"], list(state["evaluations"])
        return True

    def finish(self) -> dict[str, Any]:
        """Make the zeros final, save the model, and write what came out of the run; all processes call this."""
        self.sparsifier.finalize()
        metrics = self.evaluate()
        result: dict[str, Any] = {}
        if self.workers.writes:
            folder = self.out / MODEL_FOLDER
            save_pretrained(self.model, folder)
            load_pretrained(self.model, folder)  # what is read back is what was saved, or this raises
            result = {
                "metrics": metrics,
                "sparsity": self.sparsifier.sparsity,
                "file_sparsity": sparsity_of(folder),
                "file_bytes": sum(file.stat().st_size for file in folder.iterdir()),
                "steps": self.step,
                "seconds": round(self.seconds, 3),
                "processes": self.workers.size,
                "device": str(self.workers.device),
                "threads": torch.get_num_threads(),
                "versions": {"spartan": __version__, "torch": torch.__version__},
                "data": self.task.description,
                "settings": asdict(self.config),
                "given": self.task.given,
                "evaluations": self.evaluations,
                "history": self.history.rows,
            }
            self._save_figure()
            (self.out / REPORT).write_text(f"{self.sparsifier.report()}\n", encoding="utf-8")
            with replacing(self.out / RESULTS) as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            (self.out / CHECKPOINT).unlink(missing_ok=True)
        return result

    def _save_figure(self) -> None:
        try:
            self.history.save_figure(self.out / FIGURE)
        except (ImportError, ValueError):  # matplotlib is an extra; a short run has no record
            (self.out / FIGURE).unlink(missing_ok=True)


def load_run(folder: str | Path) -> nn.Module:
    """The model that a finished run left in its folder, its zeros and all.

    Raises:
        ValueError: a file that is missing, damaged or of another version, by name.
    """
    path = Path(folder) / RESULTS
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        makers = {"images": ImageTask.models, "text": TextTask.models}[result["settings"]["task"]]
        model = make_model(makers, result["settings"]["model"], result["given"])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: is not what a finished run leaves ({error!r})") from error
    return load_pretrained(model, Path(folder) / MODEL_FOLDER)


def train(config: Config, restart: bool = False, on_step: OnStep | None = None) -> bool:
    """Run, or go on with, the training that `config` describes; whether its end was reached.

    The folder `config.out` gets `checkpoint.pt` while it trains; in the end `model` (`spartan.load_pretrained`),
    `results.json`, `report.txt` and, with matplotlib, `masks.png`. The same call goes on from a checkpoint that is
    there.

    Args:
        config: the settings.
        restart: begin anew, whatever is there.
        on_step: called with the step and the scalars of each record, as `spartan.History` does.

    Raises:
        ValueError, TypeError: settings, data or a checkpoint that do not fit one another, named.
        TrainingFailed: a loss, gradient or weight that is not finite.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with joined(config.device) as workers, StopRequest().listening() as stop:
        return _train(config, workers, stop, restart, on_step)


def _train(config: Config, workers: Workers, stop: StopRequest, restart: bool, on_step: OnStep | None) -> bool:
    """As `train`, in this process. It keeps nothing, so that the processes can part."""
    out = Path(config.out)
    say = print if workers.writes else _silent
    if (out / RESULTS).exists() and not (out / CHECKPOINT).exists() and not restart:
        say(f"Trained already: {out / RESULTS}. Train anew with --restart, or choose another out.")
        return True
    task = make_task(config, say)
    say(f"Data: {task.description}.")
    trainer = Trainer(config, task, workers, on_step)
    if workers.writes:
        _prepare(out, restart)
    workers.any(False)  # the folder is as it should be before anyone looks into it
    if trainer.resume():
        say(f"Going on from step {trainer.step:,} of {config.steps:,} ({out / CHECKPOINT}).")
    with Progress(config.steps, trainer.step, shown=workers.writes) as progress:
        reached = trainer.run(stop, progress)
    if not reached:
        say(f"Stopped after step {trainer.step:,}; the same command goes on from {out / CHECKPOINT}.")
        return False
    result = trainer.finish()
    if workers.writes:
        say(str(trainer.sparsifier.report()))
        _announce(result, out)
    return True


def _prepare(out: Path, restart: bool) -> None:
    """Make the folder; remove what a kill during a save left, and with `restart` all that a run leaves."""
    out.mkdir(parents=True, exist_ok=True)
    for file in (*out.glob(f".{CHECKPOINT}.*.tmp"), *out.glob(f".{RESULTS}.*.tmp")):
        file.unlink()
    if restart:
        for name in (CHECKPOINT, RESULTS):
            (out / name).unlink(missing_ok=True)


def _announce(result: dict[str, Any], out: Path) -> None:
    metrics = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result["metrics"].items())
    print(f"{metrics}; {result['sparsity']:.2%} zeros, {result['file_bytes'] / 1024:,.0f} KiB saved.")
    print(f"{result['seconds']:.0f} s of training. The model and {RESULTS} are in {out}.")


def _silent(line: str) -> None:
    """Say nothing."""
