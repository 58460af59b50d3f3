"""Short tables for the README and the pages on methods and block sizes, from the committed results of the long ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import save
from bench.accuracy_plan import DENSE, METHODS
from bench.accuracy_subjects import SUBJECTS
from bench.accuracy_table import NOT_RUN, cell
from bench.markdown import markdown_table, provenance
from bench.run import Report, Result

# By page of the documentation: the methods of the accuracy benchmark that it describes.
FAMILIES = {
    "spartan": tuple(name for name in METHODS if name.startswith("Spartan")),
    "magnitude": ("Dual averaging", "DPF", "IHT", "GMP", "One-shot"),
    "growing": ("RigL", "SET", "GSE", "Static random"),
    "top-kast": ("Top-KAST",),
}
_COMPARED = ("Spartan", "Dual averaging", "RigL", "GMP", "One-shot")
_CPU = "cpu-amd-epyc-avx512-2-threads"
# File, case, what it is, and the peers that are named.
_SPEED = (
    ("soft_topk", "8192x4096", "soft top-k of 8192 rows of 4096", ("torch.topk (hard)", "Sinkhorn")),
    ("soft_topk", "forward-backward-8192x4096", "the same with its gradient", ("Sinkhorn", "sigmoid bisection")),
    ("soft_topk_global", "resnet50-warm", "soft masks of a ResNet-50 under one budget", ("sort + Sinkhorn",)),
    ("hard_topk", "one-row-4M", "hard top-k of 4 million values", ("torch.topk", "torch.kthvalue")),
    ("masked_weight", "backward-block-16", "gradient of a masked weight, blocks of 16", ("eager",)),
    ("masked_matmul", "forward-block-32-sparsity-90", "product, 90% of the 32×32 blocks zero", ("dense",)),
    ("training_step", "mlp-9M-batch-512-block-32", "training step, blocks of 32", ("dense",)),
)
_STEPS = {
    "mlp-9M-batch-512": "single weights",
    "mlp-9M-batch-512-95": "single weights, 95% zeros",
    "mlp-9M-batch-512-block-32": "blocks of 32",
    "mlp-9M-batch-512-block-32-top-kast": "blocks of 32, `TopKAST`",
    "mlp-9M-batch-512-block-32-tolerance-1e-2-beta-100": "blocks of 32, `backward_tolerance=0.01`, β = 100",
    "mlp-9M-batch-512-block-32-tolerance-1e-2-beta-400": "blocks of 32, `backward_tolerance=0.01`, β = 400",
}


def _accuracy(results: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((results / "accuracy.json").read_text(encoding="utf-8"))
    return data


def _compared(data: dict[str, Any], names: Sequence[str], wanted: Callable[[dict[str, Any]], bool]) -> str:
    """A row for each model, block size and sparsity, a column for dense and each of `names` that was run there."""
    records = [r for r in data["results"] if r["method"] in names and wanted(r)]
    if not records:
        raise ValueError(f"bench/results/accuracy.json has no runs of {', '.join(names)}")
    seeds = len({r["seed"] for r in data["results"]})
    columns = [name for name in METHODS if any(r["method"] == name for r in records)]
    order = list(dict.fromkeys(r["model"] for r in data["results"]))
    places = {(r["model"], r["block"], r["sparsity"]) for r in records}
    rows = []
    for model, block, sparsity in sorted(places, key=lambda place: (order.index(place[0]), *place[1:])):
        here = [r for r in data["results"] if r["model"] == model]
        dense = cell([r for r in here if r["method"] == DENSE], seeds)
        found = [r for r in here if (r["block"], r["sparsity"]) == (block, sparsity)]
        unit = ", bits per byte" if "bits_per_byte" in here[0] else ""
        title = f"{model}{'' if block == 1 else f', {block}×{block} blocks'}{unit}"
        removed = f"{100 * sparsity:.0f}% {SUBJECTS[model].removed}"
        rows.append([title, removed, dense, *(cell([r for r in found if r["method"] == n], seeds) for n in columns)])
    return (
        f"{markdown_table(['model', 'removed', 'dense', *columns], rows)}\n{data['data']}, test accuracy in percent"
        f" (bits per byte of text, lower is better), mean and standard deviation of {seeds} seeds unless fewer are"
        f" named; {NOT_RUN}: not run. {data['processor']}, PyTorch {data['versions']['torch']}, {data['date'][:10]}.\n"
    )


def accuracy_of(family: str) -> Callable[[Path], str]:
    """The table of a page on methods."""

    def table(results: Path) -> str:
        return _compared(_accuracy(results), FAMILIES[family], lambda record: True)

    return table


def accuracy_short(results: Path) -> str:
    """Five methods at the highest sparsity at which most of them were run, for each model and block size."""
    data = _accuracy(results)
    run: dict[tuple[str, int], dict[float, set[str]]] = {}
    for r in data["results"]:
        if r["method"] in _COMPARED:
            run.setdefault((r["model"], r["block"]), {}).setdefault(r["sparsity"], set()).add(r["method"])
    best = {place: max(found, key=lambda s: (len(found[s]), s)) for place, found in run.items()}
    return _compared(data, _COMPARED, lambda r: best[r["model"], r["block"]] == r["sparsity"])


def _report(results: Path, name: str) -> Report:
    path = results / _CPU / f"{name}.json"
    return save.from_json(path.read_text(encoding="utf-8"), str(path))


def _results(report: Report) -> dict[str, Result]:
    return {r.case.partition("/")[2]: r for r in report.results if r.time is not None}


def speed_short(results: Path) -> str:
    """A case of each kind, with the peers that people know."""
    reports = {name: _report(results, name) for name in dict.fromkeys(row[0] for row in _SPEED)}
    rows = []
    for name, case, what, peers in _SPEED:
        result = _results(reports[name])[case]
        assert result.time is not None
        others = ", ".join(f"{peer} {result.peers[peer].ratio.median:.3g}×" for peer in peers)
        rows.append([what, f"{1e3 * result.time.median:.3g} ms", others])
    header = ["what", "time", "peers, as a multiple of our time"]
    return f"{markdown_table(header, rows)}\n{provenance(list(reports.values()))}"


def training_short(results: Path) -> str:
    """Time and peak memory of a training step against the dense one, by what is masked; a table for each CPU."""
    return "\n".join(_training_table(path) for path in sorted(results.glob("cpu-*/training_step.json")))


def _training_table(path: Path) -> str:
    report = save.from_json(path.read_text(encoding="utf-8"), str(path))
    found = _results(report)
    rows = []
    for case, what in _STEPS.items():
        if case not in found:
            continue
        result = found[case]
        over = result.notes.get("peak over dense, in weights")
        ratio = 1 / result.peers["dense"].ratio.median
        rows.append([what, f"{ratio:.2f}", "–" if over is None else f"{over:.2g}"])
    header = ["masked by", "time / dense time", "peak memory over dense, in copies of the weights"]
    return f"{markdown_table(header, rows)}\n–: not measured. {provenance([report])}"
