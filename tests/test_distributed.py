"""Over several processes: one start for each world size and suite runs all its checks by `distributed_worker.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)

import distributed_dtensors  # noqa: F401  registers its checks, as the next ones do
import distributed_methods  # noqa: F401
import distributed_parts  # noqa: F401
import distributed_setups  # noqa: F401
import distributed_sparsifier  # noqa: F401
from distributed_common import CHECKS

TESTS = Path(__file__).resolve().parent
SECONDS = 300


@cache
def reports(world: int, suite: str) -> list[dict[str, str]]:
    """What each rank says of each check: nothing, or the traceback of its failure."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS.parent / "python")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(TESTS / "distributed_worker.py"), str(world), folder, suite]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output = process.communicate(timeout=SECONDS)[0]
        except subprocess.TimeoutExpired:
            output = "timed out"
        finally:
            with suppress(ProcessLookupError):  # the ranks too
                os.killpg(process.pid, signal.SIGKILL)
        files = [Path(folder) / f"rank-{rank}.json" for rank in range(world)]
        return [json.loads(file.read_text()) if file.exists() else {"": output} for file in files]


@pytest.mark.parametrize(
    ("world", "name", "backend"), [(w, n, b) for n, c in CHECKS.items() for w in c.worlds for b in c.backends(w)]
)
def test_over_processes(world: int, name: str, backend: str) -> None:
    for rank, report in enumerate(reports(world, CHECKS[name].suite)):
        failed = next((text for text in report.values() if text), "no report")
        found = report.get(f"{name}/{backend}", f"not run, after: {failed}")
        assert found == "", f"rank {rank} of {world}: {found}"
