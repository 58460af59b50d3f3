"""The CPU kernels on Arm: cross-compiled, and run in an emulator where both tools are installed."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# as CMakeLists.txt has them, but for the level, which costs minutes
OPTIONS = ["-std=c++20", "-O1", "-DSPARTAN_ISA=baseline", "-fno-math-errno", "-fno-trapping-math", "-w"]
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_cpu_kernels_agree_with_float64_on_arm(tmp_path: Path) -> None:
    """Soft and hard top-k by rows and over a list, products of ten block shapes and their gradients, on NEON."""

    def compiled(source: Path) -> Path:
        made = tmp_path / f"{source.stem}.o"
        subprocess.run([COMPILER, *OPTIONS, "-c", str(source), "-o", str(made)], check=True, timeout=900)
        return made

    sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "tests/arm/check.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compiled, sources)]
    program = tmp_path / "check"
    subprocess.run([COMPILER, "-static", *objects, "-ldl", "-o", str(program)], check=True, timeout=300)
    run = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "418 checks, 0 wrong" in run.stdout
