"""How far a run is: a bar where rich is installed and a person watches, lines of text elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Progress"]

_LINE_SECONDS = 10.0


class Progress:
    """Shows steps done of `total`; silent unless `shown`."""

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        self.total, self.shown = total, shown
        self._bar: Any = None
        self._task: Any = None
        self._said = time.monotonic()
        if shown and sys.stdout.isatty():
            self._bar = _rich_bar()
            if self._bar is not None:
                self._task = self._bar.add_task("training", total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, note: str) -> None:
        """Say that `step` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif step == self.total or time.monotonic() - self._said > _LINE_SECONDS:
            self.say(f"step {step:,} of {self.total:,}: {note}")
            self._said = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line."""
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


def _rich_bar() -> Any:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, TimeElapsedColumn())
