"""Tables of text in columns, and rows of a kind as CSV: what the counts without a GPU are shown and kept in."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

__all__ = ["print_columns", "write_rows"]


def print_columns(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print lines of text under a header, each column as wide as it needs."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    for line in [header, *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_rows(kind: Any, rows: Iterable[Any], path: Path) -> None:
    """Write dataclass instances of one kind as CSV, to a temporary name and rename."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(kind)])
        writer.writerows(astuple(row) for row in rows)
    os.replace(temporary, path)
