"""A test marked `own_process` runs in one: a failed capture leaves stream and random numbers in the capture's state."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.gpu import interpreter

_INSIDE = "SPARTAN_TEST_PROCESS"
_REHEARSED = os.environ.get("SPARTAN_REHEARSE") == "1"
_SECONDS = 900 if _REHEARSED else 100


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "own_process: runs in a process of its own")
    if _REHEARSED:
        interpreter.mend()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker("own_process") is None or os.environ.get(_INSIDE) == "1":
        return None
    root, plugins = str(pyfuncitem.config.rootpath), pyfuncitem.config.getoption("plugins") or []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [part for name in plugins if name.startswith("tests.") for part in ("-p", name)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, pyfuncitem.nodeid],
        cwd=root,
        env=environment | {_INSIDE: "1"},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"in its own process: {done.stdout[-6000:]}{done.stderr[-2000:]}", pytrace=False)
    if " skipped" in done.stdout and " passed" not in done.stdout:
        pytest.skip("in its own process: skipped")
    return True
