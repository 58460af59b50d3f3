"""Figures from committed results: `python -m bench.plot` reads bench/results, runs nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench import save
from bench.markdown import named
from bench.run import Report, Result

_OURS, _PEER = "#1f6f8b", "#c9c9c9"
_PASSES = {1.0: "forward", 3.0: "forward and backward"}

Curve = list[tuple[float, float]]  # (sparsity, speed-up)


def _caption(report: Report) -> str:
    machine = report.machine
    where = f"{named(machine)}, {machine['threads']} threads, {report.dtype}, PyTorch {machine['torch']}"
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
    axis.set_xlim(right=axis.get_xlim()[1] * 1.6)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    figure.text(0.01, 0.01, _caption(report), fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    _write(figure, path)


def speed_ups(results: Sequence[Result]) -> dict[str, Curve]:
    """Speed-up over the dense product against sparsity, for ours and each peer, from the ratios pair by pair."""
    curves: dict[str, Curve] = {}
    for r in sorted(results, key=lambda r: r.notes["sparsity"]):
        if "dense" not in r.peers:
            continue
        over_ours = r.peers["dense"].ratio.median
        curves.setdefault("ours", []).append((r.notes["sparsity"], over_ours))
        for name, p in r.peers.items():
            if name != "dense":
                curves.setdefault(name, []).append((r.notes["sparsity"], over_ours / p.ratio.median))
    return curves


def break_even(curve: Curve) -> float | None:
    """Sparsity from which a curve stays above a speed-up of 1, log-linear between points; None where it ends below."""
    sparsity = None
    for (s0, y0), (s1, y1) in zip([curve[0], *curve], curve, strict=False):
        if y1 < 1:
            sparsity = None
        elif sparsity is None:
            sparsity = s1 if y0 >= 1 else s0 + (s1 - s0) * math.log(y0) / math.log(y0 / y1)
    return sparsity


def _curves(axis: Axes, results: Sequence[Result], colours: dict[str, str]) -> None:
    for name, curve in speed_ups(results).items():
        even = break_even(curve)
        remark = (
            "slower" if even is None else f"even at {even:.0%}" if even > curve[0][0] else f"faster from {even:.0%}"
        )
        width, order = (2.2, 3) if name == "ours" else (1.2, 2)
        axis.plot(
            *zip(*curve, strict=True),
            "o-",
            ms=3,
            lw=width,
            color=colours[name],
            label=f"{name}: {remark}",
            zorder=order,
        )
        if even is not None and even > curve[0][0]:
            axis.plot(even, 1, "o", ms=8, mfc="none", color=colours[name])
    sparsities = sorted({r.notes["sparsity"] for r in results})
    steps = [sparsities[0] + (sparsities[-1] - sparsities[0]) * i / 50 for i in range(51)]
    axis.plot(steps, [1 / (1 - s) for s in steps], "k--", lw=0.8, label="ideal, 1 / (1 - s)")
    axis.axhline(1, color="k", lw=0.8)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(sparsities, [f"{s:.0%}" for s in sparsities])
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6, frameon=False, loc="upper left")


def _of_one_shape(results: Sequence[Result]) -> list[Result]:
    """Those of the shape that most results are of; of several with the same numbers, the whole passes."""

    def shape(r: Result) -> tuple[float, ...]:
        return *(r.notes[key] for key in ("rows", "in", "out")), r.notes.get("channels last", 0.0)

    counts = Counter(shape(r) for r in results)
    most = max(counts, key=lambda key: counts[key])
    return [r for r in results if shape(r) == most and "gradient" not in r.case]


def _block(r: Result) -> tuple[float, float]:
    return r.notes["block"], r.notes.get("block columns", r.notes["block"])


def figure_of_sparsity(report: Report, path: Path) -> None:
    """Draw the speed-up over the dense product against sparsity: a row for each pass, a column for each block size."""
    results = _of_one_shape([r for r in report.results if r.time is not None and "passes" in r.notes])
    passes, blocks = sorted({r.notes["passes"] for r in results}), sorted({_block(r) for r in results})
    names = dict.fromkeys(["ours", *(name for r in results for name in r.peers if name != "dense")])
    palette = plt.get_cmap("tab10")
    colours = {name: _OURS if i == 0 else palette(i % 10) for i, name in enumerate(names)}
    size = (1 + 2.9 * len(blocks), 0.6 + 2.9 * len(passes))
    figure, axes = plt.subplots(len(passes), len(blocks), figsize=size, squeeze=False, sharey="row")
    for row, count in enumerate(passes):
        for column, block in enumerate(blocks):
            axis = axes[row, column]
            here = [r for r in results if (r.notes["passes"], _block(r)) == (count, block)]
            if not here:
                axis.set_axis_off()
                continue
            _curves(axis, here, colours)
            axis.set_title(f"{_PASSES[count]}, blocks of {block[0]:.0f} x {block[1]:.0f}", fontsize=8, loc="left")
            axis.set_xlabel("sparsity", fontsize=8)
        next(axis for axis in axes[row] if axis.axison).set_ylabel("speed-up over dense", fontsize=8)
    notes = results[0].notes
    shape = f"{notes['rows']:.0f} x {notes['in']:.0f} times {notes['in']:.0f} x {notes['out']:.0f}; "
    figure.text(0.01, 0.005, shape + _caption(report), fontsize=6)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    _write(figure, path)


def figure_of_roofline(report: Report, path: Path) -> None:
    """Draw the rate of every case that states flops and bytes, under the ceilings measured in its own process."""
    results = [r for r in report.results if r.time is not None and r.flops and r.bytes]
    bandwidth, peak = 1 / report.copy.median, 1 / report.peak.median
    limit = "multiply-adds in registers" if report.fma else "matmul"
    groups: dict[str, Curve] = {}
    for r in results:
        assert r.time is not None
        group = r.case
        if "passes" in r.notes:
            rows, columns = _block(r)
            group = f"{_PASSES[r.notes['passes']]}, blocks of {rows:.0f}" + (
                "" if rows == columns else f" x {columns:.0f}"
            )
        groups.setdefault(group, []).append((r.flops / r.bytes, r.flops / r.time.median / 1e9))
    figure, axis = plt.subplots(figsize=(7, 4.4))
    intensities = [r.flops / r.bytes for r in results]
    ends = min(*intensities, peak / bandwidth) / 2, max(*intensities, peak / bandwidth) * 2
    corners = [ends[0], peak / bandwidth, ends[1]]
    axis.plot(corners, [min(peak, x * bandwidth) / 1e9 for x in corners], "k-", lw=1)
    axis.annotate(f"{limit}, {peak / 1e9:.3g} GFLOP/s", (ends[1], peak / 1e9), ha="right", va="bottom", fontsize=7)
    axis.annotate(f"  copy, {bandwidth / 1e9:.3g} GB/s", (ends[0], ends[0] * bandwidth / 1e9), va="top", fontsize=7)
    for i, (name, points) in enumerate(groups.items()):
        marker = "os^Dv*"[i % 6]
        axis.plot(*zip(*points, strict=True), marker, ms=5, alpha=0.8, color=plt.get_cmap("tab10")(i % 10), label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
    axis.set_xlabel("operational intensity, flop per byte (needed ones only)", fontsize=8)
    axis.set_ylabel("GFLOP/s (needed ones only)", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6, frameon=False, loc="lower right")
    figure.text(0.01, 0.01, _caption(report), fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    _write(figure, path)


def figure_of_traffic(report: Report, path: Path) -> None:
    """Draw the time of every memory-bound case against the bytes it cannot avoid, over the line that a copy takes."""
    results = [r for r in report.results if r.time is not None and r.bytes and not r.flops]
    figure, axis = plt.subplots(figsize=(7, 4.4))
    ends = min(r.bytes for r in results) / 2e6, max(r.bytes for r in results) * 2e-6
    axis.plot(
        ends,
        [1e9 * x * report.copy.median for x in ends],
        "k-",
        lw=1,
        label=f"copy, {1e-9 / report.copy.median:.3g} GB/s",
    )
    for i, r in enumerate(results):
        assert r.time is not None
        share = r.bytes * report.copy.median / r.time.median
        label = f"{r.case.partition('/')[2]}: {share:.0%} of copy"
        axis.plot(
            r.bytes / 1e6, 1e3 * r.time.median, "os^Dv*"[i % 6], ms=6, color=plt.get_cmap("tab10")(i % 10), label=label
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter(NullFormatter())
    axis.set_xlabel("megabytes that have to be read and written", fontsize=8)
    axis.set_ylabel("milliseconds", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6, frameon=False, loc="upper left")
    figure.text(0.01, 0.01, _caption(report), fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    # no date or version inside: the same results give the same bytes
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _drawings(report: Report, path: Path) -> list[tuple[Callable[[Report, Path], None], Path]]:
    timed = [r for r in report.results if r.time is not None]
    main: Callable[[Report, Path], None] = figure_of_op
    if any(r.parts for r in timed):
        main = figure_of_step
    elif any("in" in r.notes for r in timed):
        main = figure_of_sparsity
    drawings = [(main, path)]
    if any(r.flops and r.bytes for r in timed):
        drawings.append((figure_of_roofline, path.with_stem(f"{path.stem}-roofline")))
    elif sum(bool(r.bytes) for r in timed) > 1 and not any(r.parts for r in timed):
        drawings.append((figure_of_traffic, path.with_stem(f"{path.stem}-roofline")))
    return drawings


def figures(folder: Path) -> list[Path]:
    """Draw every figure of one device's folder beside its results."""
    written = []
    for source in sorted(folder.glob("*.json")):
        report = save.from_json(source.read_text(encoding="utf-8"), str(source))
        if not any(r.time for r in report.results):
            continue
        for draw, path in _drawings(report, source.with_suffix(".png")):
            draw(report, path)
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
