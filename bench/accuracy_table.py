"""The accuracy records as tables: a row for each method, a column for each sparsity, mean and deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.accuracy_plan import DENSE, METHODS
from bench.accuracy_subjects import SUBJECTS

NOT_RUN = "–"


@dataclass(frozen=True)
class AccuracyTable:
    """One model in blocks of one size; `cells` are as wide as `header`, and `dense` is the model without masks."""

    model: str
    block: int
    header: list[str]
    cells: list[list[str]]
    dense: str

    @property
    def title(self) -> str:
        """What the table is of."""
        return self.model if self.block == 1 else f"{self.model}, {self.block}×{self.block} blocks"


def cell(records: Sequence[dict[str, Any]], seeds: int) -> str:
    """Mean and standard deviation; how many seeds, where they are not the `seeds` of the file.

    In bits per byte where the records have them, else accuracy in percent.
    """
    if not records:
        return NOT_RUN
    text = "bits_per_byte" in records[0]
    values = [record["bits_per_byte"] if text else 100 * record["accuracy"] for record in records]
    digits = 3 if text else 2
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (1 seed)"
    fewer = "" if len(values) == seeds else f" ({len(values)} seeds)"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}{fewer}"


def accuracy_tables(records: Sequence[dict[str, Any]]) -> list[AccuracyTable]:
    """One table for each model and block size, in the records' order; methods in the plan's order."""
    seeds = len({record["seed"] for record in records})
    tables = []
    for model in dict.fromkeys(record["model"] for record in records):
        own = [record for record in records if record["model"] == model]
        dense = cell([record for record in own if record["method"] == DENSE], seeds)
        sparse = [record for record in own if record["method"] != DENSE]
        for block in sorted({record["block"] for record in sparse}):
            tables.append(_table(model, block, [r for r in sparse if r["block"] == block], dense, seeds))
    return tables


def _table(model: str, block: int, records: Sequence[dict[str, Any]], dense: str, seeds: int) -> AccuracyTable:
    by_cell: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in records:
        by_cell.setdefault((record["method"], record["sparsity"]), []).append(record)
    sparsities = sorted({sparsity for _, sparsity in by_cell})
    methods = [method for method in METHODS if any((method, sparsity) in by_cell for sparsity in sparsities)]
    cells = [[method, *(cell(by_cell.get((method, s), []), seeds) for s in sparsities)] for method in methods]
    first = "method, bits per byte" if "bits_per_byte" in records[0] else "method"
    header = [first, *(f"{100 * s:.0f}% {SUBJECTS[model].removed}" for s in sparsities)]
    return AccuracyTable(model, block, header, cells, dense)
