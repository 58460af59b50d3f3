"""Carries out a plan: every step in a process group that is ended whole, and a summary whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bench.gpu import records

ROOT = Path(__file__).resolve().parent.parent.parent
_GRACE = 3.0  # seconds between asking a group to end and ending it
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOG, _RECORDS, _SUMMARY = "gpu.log", "gpu.jsonl", "summary.txt"


@dataclass(frozen=True)
class Step:
    """A command and its place in the plan.

    Attributes:
        ends: seconds after the plan's start by which it has to have ended; what earlier steps saved is its own.
        least: it does not begin with fewer seconds than this.
        background: the next steps do not wait for it.
    """

    name: str
    command: Sequence[str]
    ends: float
    least: float = 10.0
    background: bool = False


@dataclass
class _Started:
    step: Step
    process: subprocess.Popen[bytes]
    begun: float


class _Killed(BaseException):
    """The run itself was told to end."""


class Run:
    """One carrying out of a plan, its results under `out`: a log, a file of records and the summary."""

    def __init__(
        self,
        steps: Sequence[Step],
        out: Path,
        describe: Callable[[str, list[records.Record]], list[str]],
        environment: dict[str, str] | None = None,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.steps, self.describe = steps, describe
        self.log, self.records, self.summary = (out / name for name in (_LOG, _RECORDS, _SUMMARY))
        for path in (self.log, self.records, self.summary):
            path.write_bytes(b"")
        os.environ[records.FILE] = str(self.records.resolve())
        self.environment = {**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"}
        self.start = time.time()
        self.background: list[_Started] = []
        self.current: _Started | None = None
        self.ended: dict[str, str] = {}

    def go(self) -> int:
        """Every step in order, the later ones also when an earlier one failed; 0 when all ended well."""
        caught = {number: signal.signal(number, self._killed) for number in _SIGNALS}
        reason = ""
        try:
            for step in self.steps:
                self._run(step)
            for started in list(self.background):
                self._wait(started)
        except _Killed as killed:
            reason = f"ended by {killed}; "
        finally:
            for number in _SIGNALS:  # one is enough: another would cut the summary short
                signal.signal(number, signal.SIG_IGN)
            self._finish(reason)
            for number, handler in caught.items():
                signal.signal(number, handler)
        return int(bool(reason) or any(state != "ok" for state in self.ended.values()))

    @staticmethod
    def _killed(number: int, frame: FrameType | None) -> None:
        raise _Killed(signal.Signals(number).name)

    def _now(self) -> float:
        return time.time() - self.start

    def _run(self, step: Step) -> None:
        left = step.ends - self._now()
        if left < step.least:
            self._end(step, "no time", 0.0)
            return
        environment = self.environment | {records.UNTIL: str(self.start + step.ends)}
        with self.log.open("ab") as log:
            log.write(f"\n===== {step.name}, {self._now():.0f} s after the start\n".encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    list(step.command), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                log.write(f"{error}\n".encode())
                self._end(step, "FAILED", 0.0)
                return
        started = _Started(step, process, self._now())
        if step.background:
            self.background.append(started)
        else:
            self.current = started
            self._wait(started)
            self.current = None

    def _wait(self, started: _Started) -> None:
        while started.process.poll() is None and self._now() < started.step.ends:
            for other in [b for b in self.background if b is not started]:
                if other.process.poll() is not None or self._now() >= other.step.ends:
                    self._close(other)
            time.sleep(0.1)
        self._close(started)

    def _close(self, started: _Started) -> None:
        """Note how it ended, and end whatever it left running."""
        code = started.process.poll()
        _end_group(started.process)
        if started in self.background:
            self.background.remove(started)
        state = "stopped at its limit" if code is None else "ok" if code == 0 else f"FAILED ({code})"
        self._end(started.step, state, self._now() - started.begun)

    def _end(self, step: Step, state: str, seconds: float) -> None:
        self.ended[step.name] = state
        records.add("plan", name=step.name, state=state, seconds=round(seconds, 1))
        self._say(f"{step.name:10} {state:22} {seconds:6.1f} s")
        for line in self.describe(step.name, records.read(self.records)):
            self._say(f"  {line}")

    def _say(self, line: str) -> None:
        """On the screen and in the summary, at once."""
        with self.summary.open("a") as file:
            file.write(line + "\n")
        try:
            print(line, flush=True)
        except OSError:  # whoever read the screen is gone; the file stays
            pass

    def _finish(self, reason: str) -> None:
        """End what still runs, tell what it found, and say how the whole went."""
        running = [*([self.current] if self.current else []), *self.background]
        for started in running:
            _end_group(started.process)
            self._end(started.step, "ended with the run", self._now() - started.begun)
        for step in self.steps:
            if step.name not in self.ended:
                self._end(step, "not begun", 0.0)
        bad = [f"{name}: {state}" for name, state in self.ended.items() if state != "ok"]
        self._say(f"total {self._now():.0f} s; {reason}{'; '.join(bad) or 'every step ended well'}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, first asked, then without asking."""
    for number, seconds in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, 1.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        until = time.time() + (seconds if process.poll() is None else 0.2)
        while time.time() < until and process.poll() is None:
            time.sleep(0.05)
    process.poll()
