"""Pruning of models that are trained here first: `python -m bench.pruned_trained`.

A language model of bytes and a vision transformer are trained dense, pruned with `spartan.prune`, and measured as they
are then and after some steps of training that keep the zeros. A seed draws everything: first weights, batches,
calibration. The results file is written after every run, and a later call goes on from it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Annotated, Any

import torch
import typer
from torch import nn

import spartan
from bench import save
from bench.machine import device_name
from bench.markdown import markdown_table
from bench.pruned import METHODS, SCORES
from bench.resumable import Record, complete
from spartan.training.images import load_data
from spartan.training.learning_rate import warmup_cosine
from spartan.training.tasks import ImageTask, Slice, Task, TextTask
from spartan.training.text import load_text

DEFAULT_OUT = save.RESULTS / "pruned-trained.json"
SPARSITIES = (0.5, 0.8)
DENSE, INCLUDE, WARMUP = "Dense", "layers.*.weight", 0.1
_AGAIN = 1000  # added to the seed of batches that pruned models are trained with

# `after`: steps of training after the pruning, with the second learning rate. `calibration`: examples, in batches.
SUBJECTS: dict[str, dict[str, Any]] = {
    "Byte-level language model": {
        "model": {"name": "gpt", "context": 64, "dim": 128, "depth": 2, "heads": 4, "expansion": 4},
        "bytes": [16_000_000, 32_768],
        "block": 1,
        "merit": "bits_per_byte",
        **{"steps": 500, "after": 60, "batch_size": 16, "calibration": 128, "learning_rate": [2e-3, 3e-4]},
    },
    "ViT": {
        "model": {"name": "vit", "dim": 128, "depth": 2, "heads": 4, "expansion": 2},
        "images": [60_000, 5_000],
        "block": 16,
        "merit": "accuracy",
        **{"steps": 500, "after": 60, "batch_size": 64, "calibration": 512, "learning_rate": [2e-3, 3e-4]},
    },
}


@dataclass(frozen=True)
class Run:
    """One cell of a table: a model, the method, the fraction of zeros, and the steps of training after it."""

    subject: str
    method: str
    sparsity: float
    steps: int
    seed: int


def planned(seeds: Iterable[int]) -> list[Run]:
    """All runs; an early end leaves whole comparisons."""
    runs = []
    for seed in seeds:
        for subject, settings in SUBJECTS.items():
            cells = [(DENSE, 0.0), *((score, sparsity) for sparsity in SPARSITIES for score in SCORES)]
            runs += [Run(subject, *cell, steps, seed) for cell in cells for steps in (0, settings["after"])]
    return runs


class Trained:
    """The data of the subjects, and their dense models by seed."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._dense: dict[tuple[str, int], nn.Module] = {}

    def task(self, subject: str) -> Task:
        """The data of a subject, read once."""
        settings = SUBJECTS[subject]
        if subject not in self._tasks and "bytes" in settings:
            text = load_text(None, "*.py", *settings["bytes"])
            self._tasks[subject] = TextTask(text, settings["model"]["context"])
        elif subject not in self._tasks:
            self._tasks[subject] = ImageTask(load_data().first(*settings["images"]), settings["batch_size"])
        return self._tasks[subject]

    def dense(self, subject: str, seed: int) -> nn.Module:
        """A copy of the dense model of a seed, which is trained once."""
        if (subject, seed) not in self._dense:
            settings = SUBJECTS[subject]
            torch.manual_seed(seed)
            model = self.task(subject).model(settings["model"])
            train(self.task(subject), model, settings, settings["steps"], settings["learning_rate"][0], seed)
            self._dense[subject, seed] = model
        return copy.deepcopy(self._dense[subject, seed])


def train(
    task: Task, model: nn.Module, settings: dict[str, Any], steps: int, rate: float, seed: int, sparsity: float = 0.0
) -> None:
    """AdamW on the task's own loss, up to a learning rate; with a sparsity, what is zero stays zero."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    sparsifier = None
    if sparsity:
        method = spartan.OneShot(sparsity=sparsity, prune_at=0, block_size=settings["block"])
        sparsifier = spartan.Sparsifier(model, method, steps, include=INCLUDE, count="masked", keep_zeros=True)
        sparsifier.attach(optimizer)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = warmup_cosine(step, steps, rate, WARMUP)
        task.loss(model, *task.batch(step, settings["batch_size"], seed, Slice())).backward()
        optimizer.step()
        optimizer.zero_grad()
    if sparsifier is not None:
        sparsifier.finalize()


def make(run: Run, trained: Trained) -> Record:
    """Make a run: its settings and what came of it."""
    settings, task = SUBJECTS[run.subject], trained.task(run.subject)
    model = trained.dense(run.subject, run.seed)
    size, error = settings["batch_size"], 0.0
    if run.sparsity:
        method = METHODS[run.method]({"sparsity": run.sparsity, "block_size": settings["block"]})
        batches = [task.batch(i, size, run.seed, Slice())[0] for i in range(settings["calibration"] // size)]
        error = mean(row.error or 0.0 for row in spartan.prune(model, method, batches, include=INCLUDE).rows)
    if run.steps:
        train(task, model, settings, run.steps, settings["learning_rate"][1], run.seed + _AGAIN, run.sparsity)
    masked = [p for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2]
    zeros = sum(int((p == 0).sum()) for p in masked) / sum(p.numel() for p in masked)
    loss, right, count = task.score(model, torch.device("cpu"), Slice()).tolist()
    return {**asdict(run), "measured_sparsity": zeros, "error": error, **task.metrics(loss / count, right / count)}


def tables(data: Record) -> str:
    """The figure of merit by score and zeros, before and after training, one table for each model."""
    found: dict[tuple[str, str, float, int], list[float]] = {}
    for record in data["results"]:
        key = (record["subject"], record["method"], record["sparsity"], bool(record["steps"]))
        found.setdefault(key, []).append(record[data["subjects"][record["subject"]]["merit"]])
    parts = []
    for subject, settings in data["subjects"].items():
        percent, after, block = settings["merit"] == "accuracy", settings["after"], settings["block"]
        columns = [(sparsity, trained) for sparsity in SPARSITIES for trained in (False, True)]
        header = ["score", *(f"{100 * s:.0f}%{f', {after} steps' if t else ''}" for s, t in columns)]
        rows = [[score, *(_cell(found.get((subject, score, *c)), percent) for c in columns)] for score in SCORES]
        dense = [_cell(found.get((subject, DENSE, 0.0, trained)), percent) for trained in (False, True)]
        what = "test accuracy in percent" if percent else "bits per byte on files held out, lower is better"
        shape = "single weights" if block == 1 else f"{block}x{block} blocks"
        parts.append(
            f"{markdown_table(header, rows)}\n{subject}, {shape}: {what}; dense: {dense[0]}, after {after} more steps"
            f" {dense[1]}. {settings['steps']} steps of {settings['batch_size']} to train it, AdamW at"
            f" {settings['learning_rate'][0]:g}, then {settings['learning_rate'][1]:g}; {settings['calibration']}"
            " calibration examples.\n\n"
        )
    seeds = len({record["seed"] for record in data["results"]})
    return (
        f"{''.join(parts)}Mean and standard deviation of {seeds} seeds, each of which trains its own dense model."
        f" {data['processor']}, PyTorch {data['versions']['torch']}, {data['date'][:10]}.\n"
    )


def _cell(values: Sequence[float] | None, percent: bool) -> str:
    if not values:
        return "–"
    scale, form = (100.0, "{:.1f}") if percent else (1.0, "{:.3f}")
    shown = form.format(scale * mean(values))
    return f"{shown} ± {form.format(scale * pstdev(values))}" if len(values) > 1 else shown


def main(
    seeds: Annotated[list[int], typer.Option("--seed", help="Seeds; may be given several times.")] = [0, 1, 2],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Results; what they have is not measured again.")] = DEFAULT_OUT,
) -> None:
    """Make the runs that the results do not have yet."""
    torch.set_num_threads(1)  # so that runs repeat bit for bit
    content: Record = {
        "subjects": SUBJECTS,
        "versions": {"spartan": spartan.__version__, "torch": torch.__version__},
        "processor": device_name("cpu"),
    }
    complete(out, content, planned(seeds), Trained, lambda trained: {}, make)


if __name__ == "__main__":
    typer.run(main)
