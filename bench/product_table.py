"""The table of products on a CPU: how many times as fast as the dense one, and what part of the peak they reach."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench import save
from bench.accuracy_table import NOT_RUN
from bench.markdown import markdown_table, provenance
from bench.run import Report, Result

_KINDS = {"forward": "mask moves", "packed": "packed", "one": "mask moves"}
_SHAPE = (768.0, 3072.0)
_SPARSITIES = (0.5, 0.65, 0.8, 0.9, 0.95, 0.98)

Row = tuple[str, float, float, float]  # how blocks are held, rows of x, rows and columns of a block


def products(results: Path) -> str:
    """Products with a 3072 x 768 weight by pattern, tokens and sparsity; a table for each CPU."""
    paths = sorted(results.glob("cpu-*/masked_matmul.json"))
    return "\n".join(_table(save.from_json(path.read_text(encoding="utf-8"), str(path))) for path in paths)


def _row(result: Result) -> Row:
    kind = _KINDS[result.case.partition("/")[2].partition("-")[0]]
    columns = result.notes.get("block columns", result.notes["block"])
    return kind, result.notes["rows"], result.notes["block"], columns


def _shown(result: Result) -> bool:
    kind, notes = result.case.partition("/")[2].partition("-")[0], result.notes
    return kind in _KINDS and notes["passes"] == 1 and (notes["in"], notes["out"]) == _SHAPE and "dense" in result.peers


def _table(report: Report) -> str:
    shown = [r for r in report.results if r.time is not None and _shown(r)]
    rows: dict[Row, dict[float, Result]] = {}
    for result in shown:
        rows.setdefault(_row(result), {})[round(result.notes["sparsity"], 2)] = result
    peak = report.peak

    def cell(found: Result | None) -> str:
        if found is None or found.time is None:
            return NOT_RUN
        return f"{found.peers['dense'].ratio.median:.2g}× ({peak.median * found.flops / found.time.median:.2f})"

    lines = [
        [_block(row), row[0], f"{row[1]:.0f}", *(cell(rows[row].get(sparsity)) for sparsity in _SPARSITIES)]
        for row in sorted(rows, key=lambda row: (row[2] * row[3], row[2], row[1], row[0]))
    ]
    dense = statistics.median(
        peak.median * r.flops / (1 - r.notes["sparsity"]) / r.peers["dense"].time.median for r in shown if _many(r)
    )
    header = ["block", "weight", "rows of x", *(f"{100 * sparsity:.0f}% zeros" for sparsity in _SPARSITIES)]
    what = "multiply-adds in registers alone" if report.fma else "PyTorch's product of large matrices"
    return (
        f"{markdown_table(header, lines)}\nTime of the dense product / ours, and the part that kept weights reach of"
        f" {1e-9 / peak.median:.0f} GFLOP/s, the peak by {what}; the dense product reaches {dense:.2f}."
        f" {NOT_RUN}: not run. {provenance([report])}"
    )


def _many(result: Result) -> bool:
    return result.notes["rows"] > 1000


def _block(row: Row) -> str:
    return "single weights" if row[2:] == (1, 1) else f"{row[2]:.0f}×{row[3]:.0f}"
