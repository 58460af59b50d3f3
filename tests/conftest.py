"""Backends and devices as test parameters, poisoned memory, hypothesis profiles."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis
import pytest
import torch
from torch.utils import deterministic

os.environ.setdefault("SPARTAN_CHECK_OPERANDS", "1")  # read when the operators are defined

from spartan_kernels import info
from spartan_kernels.precision import convolving_in_full

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("slow", parent=hypothesis.settings.get_profile("ci"), max_examples=8)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@dataclass(frozen=True)
class Target:
    """One backend on one device: what every operator test runs over."""

    backend: str
    device: str


def targets(*operators: str) -> list[Target]:
    """Every (backend, device) of this machine that serves all of ``operators``."""
    table = info()["operators"]
    devices = sorted({device for operator in operators for device in table[operator]})
    backends = [name for name in next(iter(table.values()))["cpu"] if name != "auto"]
    return [
        Target(backend, device)
        for device in devices
        for backend in backends
        if all(table[operator][device][backend] is None for operator in operators)
    ]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "operators(*names): run over every backend and device that serves them")
    if not info()["native"]["available"]:  # what "auto" says once is then said of every call
        config.addinivalue_line("filterwarnings", "ignore:spartan. the native backend .*:RuntimeWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("operators")
    if marker is None:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: fixture `target` needs the marker `operators`")
    metafunc.parametrize(
        "target",
        [
            pytest.param(t, id=f"{t.backend}-{t.device}", marks=[pytest.mark.gpu] if t.device == "cuda" else [])
            for t in targets(*marker.args)
        ],
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[object]:
    """What a backend does not list in the support table is a skip, not a failure; so is an extension not built."""
    try:
        return (yield)
    except ValueError as error:
        if re.search(r"the \w+ backend has no \w+ for torch\.|the native backend is not available", str(error)):
            pytest.skip(str(error))
        raise


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so an output that a kernel forgets to write is seen."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filling = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    deterministic.fill_uninitialized_memory = filling


@pytest.fixture
def convolutions_in_full_precision() -> Iterator[None]:
    """On a GPU, PyTorch convolves float32 in TF32 unless it is told not to; the backends here do as it says."""
    with convolving_in_full():
        yield


@pytest.fixture
def thread_count() -> Iterator[None]:
    """Restore the number of threads that a test changes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(thread_count: None) -> None:
    """For tests on tiny tensors: on a busy machine more threads only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture
def unchecked_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what the kernels themselves refuse."""
    monkeypatch.setattr("spartan_kernels.ops._checked.enabled", False)


@pytest.fixture
def quiet() -> Iterator[None]:
    """For tests with other packages, whose warnings are not of interest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
