"""compute-sanitizer over the smoke test: memcheck without the caching allocator, racecheck of CUDA C++."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from bench.gpu import backends, records, tools

STEP = "sanitize"
_RUNS = (("memcheck", "triton"), ("memcheck", "cuda"), ("racecheck", "cuda"))
_REHEARSED = ("block_scores",)
_MARK = "========="
_FOUND = 9  # exit status of a program in which something was found


def command(sanitizer: list[str], tool: str, backend: str) -> list[str]:
    """Of one run over every operator that the backend serves."""
    operators = [f"{name}:{backend}" for name in _REHEARSED] if records.rehearsing() else [f":{backend}"]
    smoke = ["-m", "bench.gpu.smoke", "--device", records.device_name(), "--only", "eager", "--json", *operators]
    return [*sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "10", sys.executable, *smoke]


def run(sanitizer: list[str], tool: str, backend: str) -> bool:
    """Whether nothing was found; each operator is a record as it ends, what is found another."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    said: list[str] = []
    probed, wrong = 0, 0
    with subprocess.Popen(
        command(sanitizer, tool, backend), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("{"):
                outcome = json.loads(line)
                probed += 1
                wrong += bool(outcome["wrong"])
                records.add(STEP, tool=tool, **(outcome | {"kind": "probe"}))
            else:
                print(f"{tool} {backend}: {line}", end="", flush=True)
            if line.startswith(_MARK):
                said.append(line.removeprefix(_MARK).strip())
                if "SUMMARY" not in line and len(said) <= 40:
                    records.add(STEP, kind="found", tool=tool, backend=backend, text=said[-1])
    status = running.returncode
    summary = next((line for line in reversed(said) if "SUMMARY" in line), f"no summary, status {status}")
    clean = status == 0 and not wrong
    records.add(STEP, kind="run", tool=tool, backend=backend, probes=probed, summary=summary, status=status)
    return clean


def main() -> int:
    """All runs; 0 when nothing was found."""
    sanitizer = tools.command("compute-sanitizer")
    if sanitizer is None:
        records.add(STEP, kind="run", wrong="compute-sanitizer was not found on PATH nor in CUDA's folders")
        return 1
    served = backends.ready()
    runs = [(tool, backend) for tool, backend in _RUNS if backend in served]
    with ThreadPoolExecutor(len(runs)) as pool:
        return int(not all(list(pool.map(lambda pair: run(sanitizer, *pair), runs))))


if __name__ == "__main__":
    sys.exit(main())
