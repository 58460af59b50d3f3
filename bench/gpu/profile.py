"""ncu of survey, write and product: the time, the bytes and the stalls of each kernel."""

from __future__ import annotations

import csv
import subprocess
import sys

from bench.gpu import backends, records, tools

STEP = "profile"
_CASES = (
    "solve one tensor warm triton",
    "forward block 32 90% zeros triton",
    "solve one tensor warm cuda",
    "forward block 128 90% zeros triton",
    "rows 8192x4096 triton",
    "forward block 32 90% zeros cuda",
)
_SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats")
_METRICS = ("gpu__time_duration.sum", "dram__bytes.sum", "dram__bytes_read.sum", "dram__bytes_write.sum")
# columns that are kept of the hundreds
_KEPT = (
    *_METRICS,
    "issue_stalled",
    "throughput.avg.pct",
    "registers_per_thread",
    "shared_mem_per_block_",
    "warps_active.avg.pct",
)
_NAMES = ("Kernel Name", "Block Size", "Grid Size")


def command(ncu: list[str], case: str) -> list[str]:
    """Of one case; clocks are left as they are."""
    sections = [part for name in _SECTIONS for part in ("--section", name)]
    options = [
        "--csv",
        "--page",
        "raw",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--launch-count",
        "24",
    ]
    program = [sys.executable, "-m", "bench.gpu.headline", "--profile", case]
    return [*ncu, *options, *sections, "--metrics", ",".join(_METRICS), *program]


def kernels(text: str) -> list[dict[str, str]]:
    """Rows of the table in what ncu printed; a value has its unit behind it."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    header, units, *rows = csv.reader(line for line in lines[start:] if line.startswith('"'))
    kept = [i for i, name in enumerate(header) if name in _NAMES or any(part in name for part in _KEPT)]
    return [{header[i]: f"{row[i]} {units[i]}".strip() for i in kept} for row in rows]


def main() -> int:
    """The cases in order while there is time."""
    ncu = tools.command("ncu")
    if ncu is None:
        records.add(STEP, kind="case", wrong="ncu was not found on PATH nor in the folders of CUDA and Nsight Compute")
        return 1
    served, failed = backends.ready(), False
    cases = [case for case in _CASES if case.split()[-1] in served]
    for case in cases[:2] if records.rehearsing() else cases:
        if records.seconds_left() < 10:
            records.add(STEP, kind="left out", case=case)
            continue
        try:
            done = subprocess.run(
                command(ncu, case), capture_output=True, text=True, check=False, timeout=records.seconds_left() - 2
            )
        except subprocess.TimeoutExpired:
            records.add(STEP, kind="case", case=case, wrong="there was no time for it")
            return 1
        found = kernels(done.stdout)
        for kernel in found:
            records.add(STEP, kind="kernel", case=case, **kernel)
        if done.returncode or not found:
            failed = True
            why = (done.stdout + done.stderr).strip()[-1500:]
            records.add(STEP, kind="case", case=case, wrong=f"status {done.returncode}: {why}")
            print(why)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
