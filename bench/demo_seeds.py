"""Accuracy of the demonstration's perceptron over several seeds: python -m bench.demo_seeds.

Dense, Spartan, gradual and one-shot magnitude pruning, each run a fresh model; methods share seed and order.
Written to bench/results/demo_seeds.json after every run: a later call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from spartan import __version__
from spartan.demo.plan import FULL, SPARTAN_SETTINGS, Run
from spartan.demo.train import Recipe, Training, accuracy, train
from spartan.report import hidden_matrices, kept_fractions
from spartan.training.images import ImageData, load_data

DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "demo_seeds.json"
SPARSITIES = (0.90, 0.95, 0.98)
METHODS = ("Spartan", "GMP", "One-shot")


def processor() -> str:
    """Name of the processor as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(run: Run, seed: int, data: ImageData, recipe: Recipe) -> dict[str, Any]:
    """Train once; accuracy and the zeros really there."""
    training = Training(run.model, run.build(), data, recipe, seed)
    start = time.perf_counter()
    train(training)
    seconds = time.perf_counter() - start
    training.sparsifier.finalize()
    _, zeros = kept_fractions(training.model, hidden_matrices(training.model))
    return {
        "method": run.method,
        "sparsity": run.sparsity,
        "seed": seed,
        "measured_sparsity": zeros,
        "accuracy": accuracy(training.model, data),
        "seconds": round(seconds, 2),
    }


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, and the mean difference to dense, seed by seed, in points."""
    dense = {result["seed"]: result["accuracy"] for result in results if result["method"] == "Dense"}
    rows = []
    for method, sparsity in dict.fromkeys((result["method"], result["sparsity"]) for result in results):
        own = [r for r in results if (r["method"], r["sparsity"]) == (method, sparsity)]
        accuracies = [result["accuracy"] for result in own]
        differences = [100 * (r["accuracy"] - dense[r["seed"]]) for r in own if r["seed"] in dense]
        rows.append(
            {
                "method": method,
                "sparsity": sparsity,
                "seeds": len(own),
                "accuracy_mean": statistics.fmean(accuracies),
                "accuracy_deviation": statistics.stdev(accuracies) if len(own) > 1 else None,
                "points_to_dense": statistics.fmean(differences) if differences else None,
            }
        )
    return rows


def save(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print the means as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "sparsity", "seeds", "accuracy", "deviation", "points to dense")
    for row in rows:
        deviation, points = row["accuracy_deviation"], row["points_to_dense"]
        table.add_row(
            row["method"],
            f"{row['sparsity']:.0%}",
            str(row["seeds"]),
            f"{row['accuracy_mean']:.2%}",
            "" if deviation is None else f"{100 * deviation:.2f}",
            "" if points is None else f"{points:+.2f}",
        )
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the file does not have yet, and print the means."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo_seeds", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the four idx files")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="FILE")
    parser.add_argument("--epochs", type=int, help="other than the demo's, for a trial")
    parser.add_argument("--images", type=int, help="only the first so many training images, for a trial")
    options = parser.parse_args(arguments)
    data = load_data(options.data, notice=print)
    data = data if options.images is None else data.first(options.images)
    recipe = FULL.recipes["MLP"]
    if options.epochs is not None:
        recipe = Recipe(**{**asdict(recipe), "epochs": options.epochs})
    content = {
        "what": "multilayer perceptron 784-512-256-10, batch normalisation; sparsity of the two hidden matrices",
        "data": data.name,
        "recipe": asdict(recipe),
        "spartan": SPARTAN_SETTINGS["MLP", 1],
        "versions": {"spartan": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    results: list[dict[str, Any]] = []
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if any(before.get(key) != value for key, value in content.items()):
            raise SystemExit(f"{options.out}: holds results of other settings; move it away first")
        results = before["results"]
    runs = [Run("MLP", "Dense"), *(Run("MLP", m, s) for s in SPARSITIES for m in METHODS)]
    have = {(result["method"], result["sparsity"], result["seed"]) for result in results}
    for seed in options.seeds:
        for run in runs:
            if (run.method, run.sparsity, seed) in have:
                continue
            results.append(measure(run, seed, data, recipe))
            print(
                f"seed {seed}: {run.label} {results[-1]['accuracy']:.2%} in {results[-1]['seconds']:.0f} s",
                flush=True,
            )
            date = datetime.now(timezone.utc).isoformat(timespec="seconds")
            save(options.out, {**content, "date": date, "summary": summarize(results), "results": results})
    print_summary(summarize(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
