"""The tests that need a GPU, then chosen cases of every operator's own tests, side by side; first failures in full."""

from __future__ import annotations

import os
import subprocess
import sys

from bench.gpu import backends, records

STEP = "suite"
_CASES, _REHEARSED_CASES = 150, 4
_FILES = (
    "soft_topk", "soft_topk_global", "hard_topk", "rows", "masked_weight", "step_gradient", "masked_linear",
    "block_sparse", "single_weights", "sampled_matmul", "layout", "corners",
)  # fmt: skip
_REHEARSED_FILES = ("masked_weight", "layout")
_REHEARSED_TESTS = "test_captured_in_a_graph and (block_scores or block_sparse_linear_forward)"


def command(arguments: list[str]) -> list[str]:
    """Of pytest, with the plugin that records every outcome; in a rehearsal also the emulated backend."""
    emulated = ["-p", "tests.cuda_emulator.plugin"] if "SPARTAN_EMULATED" in os.environ else []
    workers = "2" if records.rehearsing() else str(os.cpu_count() or 2)
    plugins = ["-p", "no:cacheprovider", "-p", "bench.gpu.pytest_plugin", *emulated]
    return [sys.executable, "-m", "pytest", "-q", "--tb=short", "-n", workers, *plugins, *arguments]


def main() -> int:
    """`tests/gpu` whole, then the chosen cases in the time that is left."""
    rehearse = records.rehearsing()
    backends.ready()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"}
    total = records.seconds_left()
    alone = ["tests/gpu", *(["-k", _REHEARSED_TESTS] if rehearse else [])]
    files = [f"tests/test_{name}.py" for name in (_REHEARSED_FILES if rehearse else _FILES)]
    count = _REHEARSED_CASES if rehearse else _CASES
    failed = False
    for part, (name, arguments) in enumerate({"tests/gpu": alone, "cases": files}.items()):
        chosen = {"SPARTAN_GPU_PART": name, "SPARTAN_GPU_CASES": str(count if name == "cases" else 0)}
        limit = records.seconds_left() - 2 - (0.4 * total if part == 0 else 0)
        with subprocess.Popen(command(arguments), env=environment | chosen) as running:
            try:
                status = running.wait(timeout=max(1.0, limit))
            except subprocess.TimeoutExpired:
                running.terminate()
                status = -1
        records.add(STEP, kind="part", name=name, status="stopped at its limit" if status == -1 else status)
        failed |= status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
