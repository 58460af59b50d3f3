"""How far a run is: a bar where rich is installed and a person watches, lines of text elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

__all__ = ["Progress"]

_LINE_SECONDS = 10.0  # between two lines of text
_BAR_SECONDS = 0.5  # between two looks of the bar at how training does


class Progress:
    """Shows steps done of `total`; silent unless `shown`."""

    def __init__(self, total: int, done: int, *, shown: bool, label: str = "training") -> None:
        self.total, self.shown = total, shown
        self._bar: Any = None
        self._task: Any = None
        self._said = time.monotonic()
        if shown and sys.stdout.isatty():
            self._bar = _rich_bar()
            if self._bar is not None:
                self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, note: Callable[[], str]) -> None:
        """Say that `step` steps are done; `note` is asked how well only when it is shown, as that takes time."""
        if not self.shown:
            return
        pause = _LINE_SECONDS if self._bar is None else _BAR_SECONDS
        if step < self.total and time.monotonic() - self._said < pause:
            return
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note())
        else:
            print(f"step {step:,} of {self.total:,}: {note()}", flush=True)


def _rich_bar() -> Any:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, TimeElapsedColumn())
