"""The demonstration from data to report, interruptible at any step."""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spartan import __version__
from spartan.demo.plan import FULL, QUICK, Plan, Run
from spartan.demo.results import RunResult, results_table, save_figure, save_json
from spartan.demo.train import DenseProbe, Training, accuracy, inference_ratio, train
from spartan.saving.export import load_pretrained, save_pretrained
from spartan.sparsifier import hidden_matrices, kept_fractions
from spartan.training.checkpoint import load_checkpoint, save_checkpoint
from spartan.training.images import ImageData, load_data
from spartan.training.interrupt import StopRequest
from spartan.training.models import MODELS

CHECKPOINT = "checkpoint.pt"


class Interrupted(Exception):
    """The user asked to stop; the checkpoint is written."""


class Demo:
    """The runs of a plan, one after the other, with everything they leave in `out`."""

    def __init__(self, plan: Plan, data: ImageData, out: Path, seed: int, console: Console) -> None:
        self.plan, self.out, self.seed, self.console = plan, out, seed, console
        self.data = data if plan.training_images is None else data.first(plan.training_images)
        self.finished: list[RunResult] = []
        self.partial: tuple[str, dict[str, Any], list[float]] | None = None
        self.stop = StopRequest()

    def settings(self) -> dict[str, Any]:
        """Collect what a checkpoint must agree on to be resumed."""
        return {
            "data": self.data.name,
            "seed": self.seed,
            "runs": [run.key for run in self.plan.runs],
            "recipes": {model: asdict(recipe) for model, recipe in self.plan.recipes.items()},
        }

    def resume(self) -> None:
        """Take up the checkpoint in `out`.

        Raises:
            ValueError: there is none, it is damaged, or it is of a demonstration with other settings.
        """
        path = self.out / CHECKPOINT
        try:
            state = load_checkpoint(path)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: there is no checkpoint to resume") from error
        ours, theirs = self.settings(), state["settings"]
        different = [key for key in ours if ours[key] != theirs.get(key)]
        if different:
            details = "; ".join(f"{key} was {theirs.get(key)!r}, is {ours[key]!r}" for key in different)
            raise ValueError(f"{path}: is of a demo with other settings: {details}")
        self.finished = [RunResult(**result) for result in state["finished"]]
        if state["partial"] is not None:
            self.partial = (state["partial"]["key"], state["partial"]["training"], state["partial"]["curve"])

    def _save(self, run: Run | None = None, training: Training | None = None, curve: list[float] | None = None) -> None:
        partial = None
        if run is not None and training is not None:
            partial = {"key": run.key, "training": training.state_dict(), "curve": curve}
        content = {
            "settings": self.settings(),
            "finished": [asdict(result) for result in self.finished],
            "partial": partial,
        }
        save_checkpoint(self.out / CHECKPOINT, content)

    def execute(self) -> list[RunResult]:
        """Make every run that is not finished yet.

        Raises:
            Interrupted: stopped by the user, after writing the checkpoint.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        with self.stop.listening(), Progress(*columns, console=self.console) as progress:
            for run in self.plan.runs[len(self.finished) :]:
                self.finished.append(self._execute(run, progress))
                self._save()
        return self.finished

    def _execute(self, run: Run, progress: Progress) -> RunResult:
        recipe = self.plan.recipes[run.model]
        # The twin first: making the training last leaves the random state that its seed gives.
        probe = None if run.method == "Dense" else DenseProbe(run.model, self.data, recipe, self.seed)
        training = Training(run.model, run.build(), self.data, recipe, self.seed)
        curve: list[float] = []
        if self.partial is not None and self.partial[0] == run.key:
            training.load_state_dict(self.partial[1])
            curve = list(self.partial[2])
        self.partial = None
        task = progress.add_task(run.label, total=training.total_steps, completed=training.step, note="")

        def after_step(training: Training, loss: float) -> bool:
            progress.update(task, completed=training.step, note=_note(loss, curve))
            if training.step % training.steps_per_epoch == 0 and training.step < training.total_steps:
                curve.append(accuracy(training.model, self.data))
            return not self.stop.asked

        if not train(training, after_step, probe):
            self._save(run, training, curve)
            raise Interrupted
        result = self._finish(run, training, probe, curve)
        progress.update(task, note=f"accuracy {result.accuracy:.2%}")
        return result

    def _finish(self, run: Run, training: Training, probe: DenseProbe | None, curve: list[float]) -> RunResult:
        """Make the zeros final, save the model, and measure what comes back from the file."""
        training.sparsifier.finalize()
        model, folder = training.model, self.out / run.key
        save_pretrained(model, folder)
        loaded = MODELS[run.model](self.data.side, self.data.classes)
        load_pretrained(loaded, folder)
        kept, measured = kept_fractions(loaded, hidden_matrices(loaded))
        final = accuracy(model, self.data)
        return RunResult(
            model=run.model,
            method=run.method,
            sparsity=run.sparsity,
            block=run.block,
            measured_sparsity=measured,
            accuracy=final,
            loaded_accuracy=accuracy(loaded, self.data),
            step_ratio=1.0 if probe is None else probe.ratio(),
            step_seconds=statistics.median(training.step_seconds),
            mask_seconds=statistics.median(training.mask_seconds),
            inference_ratio=None if run.block == 1 else inference_ratio(model, self.data, run.block),
            file_bytes=sum(file.stat().st_size for file in folder.iterdir()),
            kept=kept,
            curve=[*curve, final],
        )


def _note(loss: float, curve: list[float]) -> str:
    return f"loss {loss:.3f}" + (f", accuracy {curve[-1]:.2%}" if curve else "")


def announce(data: ImageData, console: Console) -> None:
    """Say which data is used; the first line of the demonstration."""
    counts = f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images"
    images = f"{counts} of {data.side}x{data.side}"
    if data.source == "scikit-learn":
        console.print(f"[yellow]Fashion-MNIST could not be found or fetched; using {data.name} instead[/]: {images}.")
    else:
        console.print(f"Data: {data.name}, {images}, from {data.source}.")


def report(demo: Demo, seconds: float) -> None:
    """Print the table and save it as JSON, with the figure."""
    title = f"{demo.data.name}, seed {demo.seed}"
    demo.console.print(results_table(demo.finished, title))
    content = {
        "settings": demo.settings(),
        "seconds": seconds,
        "versions": {"spartan": __version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
    }
    save_json(demo.out / "results.json", content, demo.finished)
    save_figure(demo.out / "results.png", demo.finished, title)
    (demo.out / CHECKPOINT).unlink(missing_ok=True)
    different = [r.label for r in demo.finished if r.loaded_accuracy != r.accuracy]
    equal = "every model loaded back from its file has the same accuracy"
    demo.console.print(
        f"DIFFERENT after loading: {', '.join(different)}" if different else f"Saved and loaded: {equal}."
    )
    demo.console.print(f"{seconds:.0f} s. Models, results.json and results.png are in {demo.out}.")


def _resume_command(quick: bool, data: Path | None, out: Path, seed: int) -> str:
    """The command as it can be pasted, whether or not the environment is activated."""
    program = [sys.argv[0]] if Path(sys.argv[0]).name == "spartan" else [sys.executable, "-m", "spartan"]
    options = ["--out", str(out), "--seed", str(seed)]
    options += ["--quick"] if quick else []
    options += ["--data", str(data)] if data is not None else []
    return shlex.join([*program, "demo", *options, "--resume"])


def run_demo(
    *, quick: bool, data: Path | None, out: Path, seed: int, resume: bool, console: Console | None = None
) -> int:
    """Run the demonstration; the exit status, 130 after an interruption.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: data or checkpoint missing, damaged or of other settings.
    """
    # A pipe has no width: a log should hold the table whole.
    console = console or Console(width=None if sys.stdout.isatty() else 100)
    refused: list[str] = []
    images = load_data(data, notice=refused.append)
    announce(images, console)
    for message in refused:
        console.print(f"[yellow]{message}[/]")
    demo = Demo(QUICK if quick else FULL, images, out, seed, console)
    if resume:
        demo.resume()
    start = time.perf_counter()
    try:
        demo.execute()
    except Interrupted:
        console.print(f"Interrupted. To go on from {out / CHECKPOINT}:")
        console.print(_resume_command(quick, data, out, seed), soft_wrap=True, markup=False, highlight=False)
        return 130
    report(demo, time.perf_counter() - start)
    return 0
