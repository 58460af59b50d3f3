"""What compute-sanitizer and ncu print, for a rehearsal: the program runs, what is found in it is nothing.

`python -m bench.gpu.stand_in_tools TOOL [options] PROGRAM ...`; options are those that the plan gives the real tools.
"""

from __future__ import annotations

import csv
import subprocess
import sys

_SUMMARIES = {
    "memcheck": "========= ERROR SUMMARY: 0 errors",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}
_KERNEL = {
    "ID": ("", "0"),
    "Process ID": ("", "1"),
    "Kernel Name": ("", "stand_in"),
    "Block Size": ("", "(128, 1, 1)"),
    "Grid Size": ("", "(4, 1, 1)"),
    "gpu__time_duration.sum": ("ns", "1,024"),
    "dram__bytes.sum": ("Mbyte", "2.5"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "3.5"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "0.5"),
}


def _program(arguments: list[str]) -> list[str]:
    """What follows the options: it begins with the Python that runs this."""
    return arguments[arguments.index(sys.executable) :]


def main() -> int:
    """Run the program; the exit status is its own."""
    tool, *arguments = sys.argv[1:]
    status = subprocess.run(_program(arguments), check=False).returncode
    if tool == "compute-sanitizer":
        print(_SUMMARIES[arguments[arguments.index("--tool") + 1]], flush=True)
    else:
        writer = csv.writer(sys.stdout, quoting=csv.QUOTE_ALL, lineterminator="\n")
        print("==PROF== Disconnected from process 1")
        writer.writerow(_KERNEL)
        writer.writerow(unit for unit, _ in _KERNEL.values())
        writer.writerow(value for _, value in _KERNEL.values())
    return status


if __name__ == "__main__":
    sys.exit(main())
