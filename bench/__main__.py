"""`python -m bench`: check, time, compare, save."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import machine, save
from bench.case import CASES, Settings, select
from bench.compare import Verdict, compare
from bench.run import Report, Result, run_all, trace

console = Console()
if not console.is_terminal:  # a log is wider than the 80 columns that rich assumes
    console = Console(width=140)
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _size(count: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def _ceiling(result: Result, report: Report) -> str:
    assert result.time is not None
    if result.flops:
        name = "FMA" if report.fma else "matmul"
        return f"{result.flops * report.peak.median / result.time.median:.0%} of {name}"
    return f"{result.bytes * report.copy.median / result.time.median:.0%} of copy"


def _efficiency(result: Result) -> str:
    """Dense time * density / our time: what of the work left out is time saved."""
    dense = result.peers.get("dense")
    if dense is None or "sparsity" not in result.notes:
        return ""
    return f"{dense.ratio.median * (1 - result.notes['sparsity']):.2f}"


def _print_report(report: Report) -> None:
    table = Table(title=f"{report.machine['device']}, {report.machine['threads']} threads, {report.dtype}")
    for name in (
        "case",
        "implementation",
        "median",
        "spread",
        "n",
        "peer / ours",
        "ceiling",
        "efficiency",
        "workspace",
    ):
        table.add_column(name, justify="left" if name in ("case", "implementation") else "right")
    for r in report.results:
        if r.time is None:
            table.add_row(r.case, f"[red]wrong: {r.wrong}")
            continue
        count = str(len(r.time.values))
        row = [_seconds(r.time.median), f"{r.time.spread:.0%}", count, "", _ceiling(r, report), _efficiency(r)]
        table.add_row(r.case, "ours", *row, _size(r.peak_bytes - r.kept_bytes))
        for name, p in r.peers.items():
            row = [_seconds(p.time.median), f"{p.time.spread:.0%}", str(len(p.time.values))]
            table.add_row("", name, *row, f"{p.ratio.median:.3g} ± {p.ratio.spread * p.ratio.median / 2:.2g}")
        for name, seconds in r.parts.items():
            table.add_row("", f"  {name}", _seconds(seconds), style="dim")
        table.add_section()
    console.print(table)
    for r in report.results:
        for name, reason in r.missing.items():
            console.print(f"{r.case}: peer {name} is missing: {reason}")
    copy, matmul = 1e-9 / report.copy.median, 1e-9 / report.matmul.median
    fma = f", multiply-adds {1e-9 / report.fma.median:.0f} GFLOP/s" if report.fma else ""
    console.print(f"copy ceiling {copy:.1f} GB/s (read + written), matmul ceiling {matmul:.0f} GFLOP/s{fma}")
    if report.noise:
        console.print(f"[yellow]The machine was not quiet: {'; '.join(report.noise)}.")


def _print_verdicts(verdicts: list[Verdict], source: str) -> None:
    table = Table(title=f"against {source}: time relative to each run's own ceiling")
    for name in ("case", "new / old", "noise", "verdict"):
        table.add_column(name, justify="right" if name in ("new / old", "noise") else "left")
    styles = {"slower": "red", "wrong": "red", "faster": "green"}
    for v in verdicts:
        change = "" if math.isnan(v.change) else f"{v.change:.3f}"
        table.add_row(v.case, change, f"{v.noise:.1%}", v.word, style=styles.get(v.word))
    console.print(table)


def _progress(name: str, result: Result | None, seconds: float) -> None:
    if result is None:
        if console.is_terminal:
            console.print(f"{name} ...", end="\r", highlight=False)
    else:
        state = f"wrong: {result.wrong}" if result.time is None else "checked and timed"
        console.print(f"{name}: {state} in {seconds:.1f} s", highlight=False)


def _settings(device: str, dtype: str, quick: bool, backend: str | None) -> Settings:
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r}; allowed: {', '.join(_DTYPES)}", param_hint="--dtype")
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"{device!r}: this PyTorch sees no CUDA device", param_hint="--device")
    return Settings(device, _DTYPES[dtype], quick, backend)


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops or cases; all of them when none is named.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=", ".join(_DTYPES))] = "float32",
    backend: Annotated[str | None, typer.Option(help="Time this backend instead of the automatic choice.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller cases, fewer samples.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; PyTorch's choice by default.")] = None,
    against: Annotated[list[str] | None, typer.Option(help="Time only this peer; may be repeated.")] = None,
    against_revision: Annotated[
        str | None,
        typer.Option("--compare", metavar="FILE|REV", help="Judge against an earlier result or git revision."),
    ] = None,
    save_results: Annotated[bool, typer.Option("--save", help="Write bench/results/<device>/.")] = False,
    modified: Annotated[bool, typer.Option("--modified", help="Save though files differ from the revision.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of the results' folders.")] = save.RESULTS,
    trace_file: Annotated[Path | None, typer.Option("--trace", help="Write a Chrome trace per case.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="List the cases and stop.")] = False,
) -> None:
    """Benchmarks of spartan-kernels: every answer is checked before it is timed."""
    import bench.cases  # noqa: F401  registers them

    try:
        cases = select(ops or [], quick, device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="OPS") from error
    if list_cases:
        for c in CASES.values():
            console.print(f"{c.name}: {(c.build.__doc__ or '').strip()}", highlight=False)
        return
    settings = _settings(device, dtype, quick, backend)
    if threads:
        torch.set_num_threads(threads)
    if trace_file:
        for c in cases:
            path = (
                trace_file if len(cases) == 1 else trace_file.with_stem(f"{trace_file.stem}-{c.name.replace('/', '-')}")
            )
            trace(c, settings, str(path))
            console.print(f"wrote {path}")
        return
    if save_results and not modified and machine.modified():
        raise typer.BadParameter(
            "files differ from the revision that the results would name; commit them, or add --modified",
            param_hint="--save",
        )
    report = run_all(cases, settings, against or None, _progress)
    _print_report(report)
    folder = results / machine.folder_name(device)
    failed = any(r.wrong for r in report.results)
    if against_revision:
        try:
            earlier = save.load(against_revision, folder, report)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--compare") from error
        verdicts = compare(report, earlier)
        _print_verdicts(verdicts, against_revision)
        failed = failed or any(v.word == "slower" for v in verdicts)
    if save_results and not failed:
        for path in save.write(report, folder):
            console.print(f"wrote {path}", highlight=False)
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
