"""Ctrl-C and termination requests that wait for a step to end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest", "steps_to_next_look"]

LOOK_SECONDS = 1.0  # torchrun kills what has not ended 30 s after its signal, which the step and the save share


class StopRequest:
    """Asked for by the first Ctrl-C, so that a step is never cut in two; a later one interrupts at once.

    A signal that reaches a process twice, from the terminal and from torchrun, is still one request.
    """

    PATIENCE = 1.0  # seconds within which a second Ctrl-C is the first one

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
        elif signal_number == signal.SIGINT and time.monotonic() - self._since > self.PATIENCE:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take Ctrl-C and termination requests within the block."""
        previous = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def steps_to_next_look(seconds: float, steps: int, most: int) -> int:
    """After how many steps to look again whether to stop, where a look is too dear for each of them.

    Args:
        seconds: that the last steps took.
        steps: their number.
        most: at most so many.

    Returns:
        As many as `LOOK_SECONDS` have room for, at least 1.
    """
    return max(1, most if seconds * most <= LOOK_SECONDS * steps else int(LOOK_SECONDS * steps / seconds))
