"""Accuracy of every training method over several seeds: `python -m bench.accuracy`.

Each run trains a fresh model on one thread, so that it can be repeated bit for bit; all methods of a seed share first
weights and batches. The results file is written after every run, and a later call goes on from it.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import save
from bench.accuracy_plan import Run, planned
from bench.accuracy_subjects import SUBJECTS
from bench.accuracy_table import accuracy_tables
from bench.machine import device_name
from bench.resumable import Record, write
from spartan import __version__
from spartan.training.images import ImageData, load_data

DEFAULT_OUT = save.RESULTS / "accuracy.json"
FIELDS = ("model", "method", "sparsity", "block", "seed")


def measure(run: Run, data: ImageData, epochs: int | None = None) -> Record:
    """Train once: the settings, the figures of merit, and the zeros really there."""
    method = run.build()
    outcome = SUBJECTS[run.model].measure(method, data, run.seed, epochs)
    return {**asdict(run), "settings": method.settings(), **outcome}


@dataclass(frozen=True)
class Worker:
    """What a process needs to make runs: where the data is, how much of it, and how long to train."""

    data: Path | None = None
    images: int | None = None
    epochs: int | None = None

    def load(self, notice: Callable[[str], None] = lambda message: None) -> ImageData:
        """Load the data, cut to `images`."""
        data = load_data(self.data, notice=notice)
        return data if self.images is None else data.first(self.images)


_state: tuple[Worker, ImageData] | None = None  # of a worker process


def _begin(worker: Worker) -> None:
    global _state
    torch.set_num_threads(1)
    _state = worker, worker.load()


def _work(run: Run) -> Record:
    assert _state is not None  # set by _begin
    worker, data = _state
    return measure(run, data, worker.epochs)


def in_processes(runs: Sequence[Run], worker: Worker, processes: int) -> Iterator[Record]:
    """Make the runs in `processes` processes of one thread each; records come as runs end."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (worker,)) as pool:
        try:
            for future in as_completed([pool.submit(_work, run) for run in runs]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def missing(runs: Sequence[Run], records: Sequence[Record]) -> list[Run]:
    """The runs that have no record yet.

    Raises:
        ValueError: a record was made with other settings than its run has now.
    """
    have = {tuple(record[field] for field in FIELDS): record for record in records}
    left = []
    for run in runs:
        record = have.get(tuple(asdict(run)[field] for field in FIELDS))
        if record is None:
            left.append(run)
            continue
        settings = run.build().settings()
        for name, value in record["settings"].items():
            if name not in settings or settings[name] != value:
                raise ValueError(f"{run} was measured with {name} = {value!r}, now it is {settings.get(name)!r}")
    return left


def print_tables(records: Sequence[Record]) -> None:
    """Print what the documentation shows."""
    from rich.console import Console
    from rich.table import Table

    for accuracies in accuracy_tables(records):
        table = Table(*accuracies.header, title=f"{accuracies.title}; dense {accuracies.dense}")
        for row in accuracies.cells:
            table.add_row(*row)
        Console().print(table)


def describe(worker: Worker, data: str) -> Record:
    """What all runs of a file have in common."""
    return {
        "data": data,
        "models": {name: subject.description(worker.epochs) for name, subject in SUBJECTS.items()},
        "versions": {"spartan": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "processor": device_name("cpu"),
    }


def read(path: Path, content: Record) -> list[Record]:
    """The records of `path`, if it is there.

    Raises:
        ValueError: they were made with other data, models or versions than `content` has.
    """
    if not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    known = {name: content["models"].get(name) for name in before["models"]}
    for key, value in {**content, "models": known}.items():
        if before.get(key) != value:
            raise ValueError(f"{path} was measured with another {key}; move it away first")
    return before["results"]


def main(
    seeds: Annotated[list[int], typer.Option("--seed", help="Seeds; may be given several times.")] = [0, 1, 2],  # noqa: B006
    workers: Annotated[int, typer.Option(help="Processes, of one thread each.")] = 1,
    data: Annotated[Path | None, typer.Option(help="Folder with the four idx files.")] = None,
    out: Annotated[Path, typer.Option(help="Results; what they have is not measured again.")] = DEFAULT_OUT,
    epochs: Annotated[int | None, typer.Option(help="Other than the recipes', for a trial.")] = None,
    images: Annotated[int | None, typer.Option(help="Only so many training images, for a trial.")] = None,
    only: Annotated[str, typer.Option(help="Only runs with this in their model or method.")] = "",
) -> None:
    """Make the runs that the results do not have yet, and print the tables."""
    worker = Worker(data, images, epochs)
    content = describe(worker, worker.load(print).name)
    try:
        records = read(out, content)
        left = missing([run for run in planned(seeds) if only in f"{run.model}, {run.method}"], records)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for record in in_processes(left, worker, workers):
        records.append(record)
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write(out, {**content, "date": date, "results": records})
        print(date, *(record[field] for field in (*FIELDS, "accuracy")), flush=True)
    print_tables(records)


if __name__ == "__main__":
    typer.run(main)
