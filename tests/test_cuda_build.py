"""Every CUDA source compiles, and no kernel spills registers to memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")


def test_the_build_compiles_every_source() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    assert SOURCES
    assert [source.name for source in SOURCES if f"csrc/cuda/{source.name}" not in listed] == []


@pytest.mark.skipif(NVCC is None, reason="needs the CUDA compiler nvcc")
@pytest.mark.skipif("CI" in os.environ, reason="in CI, `make gpu-compile` does it for every architecture")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    command = [str(NVCC), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
    command += ["-gencode", "arch=compute_90,code=sm_90", "-cubin", "-o", str(tmp_path / "kernels.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout + done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    spilled = [int(bytes_) for bytes_ in re.findall(r"(\d+) bytes spill stores", report)]
    assert len(spilled) >= len(kernels) and (kernels or source.stem == "device")
    assert sum(spilled) == 0, report
