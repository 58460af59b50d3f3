"""Figures from committed results: `python -m bench.plot` reads bench/results, runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import save
from bench.run import Report, Result

_OURS, _PEER = "#1f6f8b", "#c9c9c9"


def _caption(report: Report) -> str:
    machine = report.machine
    where = f"{machine['device']}, {machine['threads']} threads, {report.dtype}, PyTorch {machine['torch']}"
    quiet = "; machine not quiet" if report.noise else ""
    return f"{where}, {machine['date'][:10]}, {machine['revision'][:9]}{quiet}"


def _bars(axis: Axes, result: Result, unit: float) -> None:
    """Draw ours and its peers as horizontal bars, in units of `unit` seconds."""
    assert result.time is not None
    times = {"ours": result.time, **{name: p.time for name, p in result.peers.items()}}
    ordered = sorted(times.items(), key=lambda item: -item[1].median)
    names = [name for name, _ in ordered]
    medians = [t.median / unit for _, t in ordered]
    errors = [t.spread * t.median / unit / 2 for _, t in ordered]
    colours = [_OURS if name == "ours" else _PEER for name in names]
    axis.barh(names, medians, xerr=errors, color=colours, error_kw={"elinewidth": 1})
    for row, (median, error) in enumerate(zip(medians, errors, strict=True)):
        axis.annotate(f" {median:.3g}", (median + error, row), va="center", fontsize=7)
    axis.set_xscale("log")
    axis.set_xlim(min(medians) / 2, max(medians) * 3)
    axis.tick_params(labelsize=7)
    axis.set_title(result.case, fontsize=8, loc="left")


def figure_of_op(report: Report, path: Path) -> None:
    """Draw every case of one op against its peers, in copies of its tensor where a copy was timed."""
    results = [r for r in report.results if r.time is not None]
    height = sum(1.0 + 0.3 * len(r.peers) for r in results)
    ratios = [2 + len(r.peers) for r in results]
    figure, axes = plt.subplots(
        len(results), 1, figsize=(7, height + 0.6), squeeze=False, gridspec_kw={"height_ratios": ratios}
    )
    for axis, result in zip(axes[:, 0], results, strict=True):
        copied = result.peers.get("copy")
        _bars(axis, result, copied.time.median if copied else 1.0)
        axis.set_xlabel("copies of the same tensor" if copied else "seconds", fontsize=8)
    figure.text(0.01, 0.003, _caption(report), fontsize=6)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    _write(figure, path)


def figure_of_step(report: Report, path: Path) -> None:
    """Draw a training step, part by part, beside the dense step."""
    results = [r for r in report.results if r.parts and r.time is not None]
    figure, axis = plt.subplots(figsize=(7, 1.6 + 0.8 * len(results)))
    colours = plt.get_cmap("viridis")
    for row, result in enumerate(results):
        left = 0.0
        for i, (name, seconds) in enumerate(result.parts.items()):
            label = name if row == 0 else None
            colour = colours(i / max(1, len(result.parts) - 1))
            axis.barh(f"{result.case}\nSpartan", seconds, left=left, color=colour, label=label)
            left += seconds
        dense = result.peers.get("dense")
        if dense:
            axis.barh(f"{result.case}\ndense", dense.time.median, color=_PEER)
            axis.annotate(
                f" Spartan takes {1 / dense.ratio.median:.2f} of the dense step",
                (dense.time.median, f"{result.case}\ndense"),
                va="center",
                fontsize=7,
            )
    axis.set_xlabel("seconds per step", fontsize=8)
    axis.set_xlim(right=axis.get_xlim()[1] * 1.3)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    figure.text(0.01, 0.01, _caption(report), fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    # no date or version inside: the same results give the same bytes
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def figures(folder: Path) -> list[Path]:
    """Draw every figure of one device's folder beside its results."""
    written = []
    for source in sorted(folder.glob("*.json")):
        report = save.from_json(source.read_text(encoding="utf-8"), str(source))
        if not any(r.time for r in report.results):
            continue
        path = source.with_suffix(".png")
        (figure_of_step if any(r.parts for r in report.results) else figure_of_op)(report, path)
        written.append(path)
    return written


def main(
    results: Annotated[Path, typer.Argument(help="Folder of the devices' folders.")] = save.RESULTS,
) -> None:
    """Draw the figures of every device's results."""
    folders = [f for f in sorted(results.glob("*")) if f.is_dir()]
    paths = [path for folder in folders for path in figures(folder)]
    if not paths:
        raise typer.BadParameter(f"{results} holds no results; run `python -m bench --save` first")
    for path in paths:
        print(path)


if __name__ == "__main__":
    typer.run(main)
