"""pytest plugin of the plan: chooses cases of every operator's tests, records each outcome as it comes.

SPARTAN_GPU_CASES is how many cases to choose of those that have a target on the device (0: all tests, unchosen);
SPARTAN_GPU_PART names the part of the plan.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from itertools import chain, zip_longest

import pytest

from bench.gpu import interpreter, records

_IN_FULL = 6  # failures whose whole report is printed and recorded
_failures = 0


def choose(identifiers: list[str], count: int) -> list[str]:
    """`count` of the tests: one of each function and backend in turn, in an order that every process finds the same."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for identifier in sorted(identifiers, key=lambda i: hashlib.sha256(i.encode()).hexdigest()):
        function, _, parameters = identifier.partition("[")
        groups[function, "cuda-" if "cuda-c" in parameters else "triton-"].append(identifier)
    turns = chain.from_iterable(zip_longest(*groups.values()))
    return [identifier for identifier in turns if identifier is not None][:count]


def _has_gpu_target(item: pytest.Item) -> bool:
    target = getattr(item, "callspec", None) and item.callspec.params.get("target")
    return target is not None and target.backend in ("triton", "cuda")


def pytest_configure() -> None:
    """In a rehearsal the interpreter runs the kernels."""
    if records.rehearsing():
        interpreter.mend()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the chosen cases alone."""
    count = int(os.environ.get("SPARTAN_GPU_CASES", "0"))
    if count:
        kept = set(choose([item.nodeid for item in items if _has_gpu_target(item)], count))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = [item for item in items if item.nodeid in kept]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record an outcome, once: the workers of xdist leave it to the process that they report to."""
    global _failures
    if os.environ.get("PYTEST_XDIST_WORKER") or (report.when != "call" and report.outcome == "passed"):
        return
    found: dict[str, object] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome == "failed":
        _failures += 1
        text = str(report.longrepr)
        found["wrong"] = text if _failures <= _IN_FULL else text.strip().splitlines()[-1][:300]
        if _failures <= _IN_FULL:
            print(f"\n--- {report.nodeid}\n{text}", flush=True)
    records.add("suite", kind="test", part=os.environ.get("SPARTAN_GPU_PART", ""), **found)
