"""What the machine is: versions, tools, and its ceilings of copying and multiplying."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import torch

from bench import machine
from bench.gpu import records, tools

STEP = "facts"
_PACKAGES = ("torch", "triton", "numpy", "pybind11", "pytest", "pytest-xdist", "hypothesis", "scipy")
_TOOLS = ("nvcc", "cmake", "ninja", "compute-sanitizer", "ncu")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()


def main() -> int:
    """Record them; a ceiling that cannot be measured is a line too."""
    device, quick = records.device_name(), records.rehearsing()
    records.add(STEP, kind="machine", **machine.describe(device), load=os.getloadavg()[0])
    records.add(
        STEP,
        kind="software",
        packages={name: _version(name) for name in _PACKAGES},
        tools={name: tools.find(name) for name in _TOOLS},
        smi=_said(["nvidia-smi"]).splitlines()[:20],
    )
    failed = False
    try:
        copy = machine.copy_ceiling(device, quick)
        records.add(STEP, kind="ceiling", name="copy", value=round(1e-9 / copy.median, 1), unit="GB/s")
    except Exception as error:
        failed = True
        records.add(STEP, kind="ceiling", name="copy", wrong=f"{type(error).__name__}: {error}")
    for dtype in (torch.bfloat16, torch.float32):
        name = f"matmul {str(dtype).removeprefix('torch.')}"
        try:
            product = machine.matmul_ceiling(device, dtype, quick)
            records.add(STEP, kind="ceiling", name=name, value=float(f"{1e-12 / product.median:.4g}"), unit="TFLOP/s")
        except Exception as error:
            failed = True
            records.add(STEP, kind="ceiling", name=name, wrong=f"{type(error).__name__}: {error}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
