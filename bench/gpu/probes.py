"""Every operator on every backend, and each in a graph: a process each, side by side, which also compiles the kernels.

The headline's cases are compiled here too, in the time that the processors would else be idle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from bench.gpu import backends, records

STEP = "probes"
_REHEARSED = ("block_scores", "block_sparse_linear_forward")
_COMPILED_TOGETHER = 3  # cases of the headline in one process
_SHOWN = 4000
_BESIDE = {"OMP_NUM_THREADS": "1"}  # of each of the processes that share the machine


@dataclass(frozen=True)
class Job:
    """A command whose lines of JSON are records."""

    name: str
    command: Sequence[str]


_printing = threading.Lock()


def smoke_jobs(backend: str, kind: str) -> Iterator[Job]:
    """One for each operator that the backend serves on the device."""
    from spartan_kernels import dispatch

    for operator, support in dispatch.SUPPORT.items():
        if backend in support and (not records.rehearsing() or operator in _REHEARSED):
            arguments = ["--device", records.device_name(), "--only", kind, "--json", f"{operator}:{backend}"]
            yield Job(f"{operator}:{backend} {kind}", [sys.executable, "-m", "bench.gpu.smoke", *arguments])


def compile_jobs(backend: str) -> Iterator[Job]:
    """The headline's cases, some at a time."""
    from bench.gpu.entries import entries

    names = [entry.name for entry in entries() if entry.backend == backend]
    names = names[:1] if records.rehearsing() else names
    for i in range(0, len(names), _COMPILED_TOGETHER):
        some = names[i : i + _COMPILED_TOGETHER]
        yield Job(f"compile {', '.join(some)}", [sys.executable, "-m", "bench.gpu.headline", "--compile", *some])


def run(job: Job) -> bool:
    """Whether every record of the job's is right."""
    try:
        done = subprocess.run(
            job.command,
            env={**os.environ, **_BESIDE},
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, records.seconds_left() - 2),
        )
        status, out, said = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        status, out, said = -1, "", "there was no time for it"
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    for record in found:
        records.add(STEP, job=job.name, **record)
    failed = status != 0 or not found or any(record.get("wrong") for record in found)
    if failed and not any(record.get("wrong") for record in found):
        why = said.strip().splitlines()[-1:] or [f"its process ended with {status}"]
        records.add(STEP, job=job.name, wrong=why[0][:300])
    with _printing:
        print(f"--- {job.name}: {'FAILED' if failed else 'ok'}\n{out[-_SHOWN:]}{said[-_SHOWN:] if failed else ''}")
    return not failed


def main() -> int:
    """Triton's first; those of CUDA C++ when their build has ended."""
    with ThreadPoolExecutor(2 if records.rehearsing() else os.cpu_count() or 2) as pool:
        jobs: list[Future[bool]] = []

        def submit(backend: str) -> None:
            for some in (smoke_jobs(backend, "eager"), compile_jobs(backend), smoke_jobs(backend, "graph")):
                jobs.extend(pool.submit(run, job) for job in some)

        submit("triton")
        built = backends.extension(wait=records.seconds_left() - 15)
        if built:
            submit("cuda")
        else:
            records.add(STEP, job="cuda", wrong="the CUDA kernels were not built in time")
        right = [job.result() for job in jobs]
    return int(not (built and all(right)))


if __name__ == "__main__":
    sys.exit(main())
