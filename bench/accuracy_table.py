"""The accuracy records as tables: a row for each method, a column for each sparsity, mean and deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.accuracy_plan import DENSE, METHODS

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
    """Mean and standard deviation in percent; how many seeds, where they are not the `seeds` of the file."""
    if not records:
        return NOT_RUN
    accuracies = [100 * record["accuracy"] for record in records]
    if len(accuracies) == 1:
        return f"{accuracies[0]:.2f} (1 seed)"
    fewer = "" if len(accuracies) == seeds else f" ({len(accuracies)} seeds)"
    return f"{statistics.fmean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}{fewer}"


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
    return AccuracyTable(model, block, ["method", *(f"{100 * s:.0f}% zeros" for s in sparsities)], cells, dense)
