"""Results files that grow by one run at a time: a later call goes on where the one before ended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import typer

__all__ = ["Record", "complete", "write"]

Record = dict[str, Any]
Task = TypeVar("Task")


def write(path: Path, content: Record) -> None:
    """Write to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def complete(
    out: Path,
    content: Record,
    runs: Sequence[Any],
    load: Callable[[], Task],
    once: Callable[[Task], Record],
    make: Callable[[Any, Task], Record],
) -> None:
    """Make the runs that `out` does not have yet, and write it after each.

    Args:
        out: the file.
        content: what all its runs have in common.
        runs: dataclasses; the record of a run has its fields.
        load: what runs are made with; not called where none is left.
        once: what is measured once and then stays in the file.
        make: the record of a run.

    Raises:
        typer.BadParameter: the file has runs that have something else in common.
    """
    before: Record | None = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
    if before is not None and any(before.get(key) != value for key, value in content.items()):
        raise typer.BadParameter(f"{out} was measured with other settings or versions; move it away first")
    records: list[Record] = [] if before is None else before["results"]
    left = [run for run in runs if not any(asdict(run).items() <= record.items() for record in records)]
    if not left:
        return
    task = load()
    measured = once(task) if before is None else before
    for run in left:
        records.append(make(run, task))
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write(out, {**content, **measured, "date": date, "results": records})
        print(date, *records[-1].values(), flush=True)
