"""pytest plugin: every launch of a kernel in Triton's interpreter is watched for races and wild accesses.

`pytest -p tests.triton_races.plugin` with TRITON_INTERPRET=1. What a kernel leaves unwritten is NaN, or the largest
integer, so that a test that compares results sees it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.triton_races.declared import DECLARED
from tests.triton_races.recorder import poisoned, recording

_always = ExitStack()
_always.enter_context(poisoned())
recorder = _always.enter_context(recording(DECLARED))


def pytest_collection_finish() -> None:
    """What is there before the tests need not be searched for the tensors of a launch."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A finding fails its test, even where the test expects an error of its own."""
    recorder.findings.clear()
    yield
    assert not recorder.findings, "\n".join(finding.text for finding in recorder.findings)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which kernels were watched, and how often each was launched."""
    counts = ", ".join(f"{name} {count}" for name, count in sorted(recorder.launches.items()))
    terminalreporter.write_line(f"watched launches: {counts or 'none'}")


def pytest_unconfigure() -> None:
    """The interpreter and PyTorch are as they were."""
    gc.unfreeze()
    _always.close()
