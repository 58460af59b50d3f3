"""Tables as text: drawn by rich where it is installed, in plain columns elsewhere."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

__all__ = ["text_table"]

_UNLIMITED = 1000  # a file or a pipe has no width: nothing is cut


def text_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A title, rows of cells under headings, and notes below; all columns but the first are aligned to the right."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return "\n".join([title, *_plain([headings, *rows]), *notes])
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(table)
    drawn: str = console.file.getvalue()  # type: ignore[attr-defined]
    lines = "\n".join(line.rstrip() for line in drawn.splitlines()).strip("\n")
    return "\n".join([title, lines, *notes])


def _plain(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
