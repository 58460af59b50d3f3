"""Drives CMake for the compiled extension; everything else is in pyproject.toml.

Environment:
    SPARTAN_CUDA        auto (default: compile CUDA kernels when a CUDA compiler is found), on, off
    SPARTAN_CUDA_ARCHS  CUDA architectures, such as "80;90"
    SPARTAN_NATIVE      auto (default: go on without the extension when it cannot be built), on (fail), off
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
RECORD = "_build.json"  # why there is no extension, read by spartan_kernels.backends.native


class CMakeBuild(build_ext):
    """Builds `_native` with CMake; a machine without a compiler gets the package without it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build, and record how it went for `spartan info`."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("SPARTAN_NATIVE", "auto")
        if mode not in ("auto", "on", "off"):
            raise SystemExit(f"SPARTAN_NATIVE must be auto, on or off; got {mode!r}")
        reason = "switched off by SPARTAN_NATIVE=off" if mode == "off" else self._compile(target)
        if reason and mode == "on":
            raise SystemExit(f"SPARTAN_NATIVE=on, but the extension could not be built: {reason}")
        if reason:
            print(f"spartan-kernels: installing without compiled kernels ({reason}); the reference backend serves")
        (target.parent / RECORD).write_text(json.dumps({"reason": reason}) + "\n")

    def copy_extensions_to_source(self) -> None:
        """An editable install needs the record beside the sources too."""
        super().copy_extensions_to_source()
        built = Path(self.get_ext_fullpath("spartan_kernels._native")).resolve().parent / RECORD
        if built.exists():
            shutil.copy(built, ROOT / "spartan_kernels" / RECORD)

    def _compile(self, target: Path) -> str | None:
        """Build the extension at `target`; None, or why it could not be built."""
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        if shutil.which("cmake") is None:
            return "cmake not found"
        import pybind11

        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DSPARTAN_CUDA={os.environ.get('SPARTAN_CUDA', 'auto')}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if archs := os.environ.get("SPARTAN_CUDA_ARCHS"):
            configure.append(f"-DSPARTAN_CUDA_ARCHS={archs}")
        if shutil.which("ninja") and not (build / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja"]
        jobs = str(os.cpu_count() or 2)
        for step in (configure, ["cmake", "--build", str(build), "--parallel", jobs]):
            done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            print(done.stdout)
            if done.returncode:
                return _first_error(done.stdout) or f"{step[0]} failed with exit status {done.returncode}"
        return None


def _first_error(output: str) -> str | None:
    lines = [line.strip() for line in output.splitlines()]
    for index, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join(text for text in lines[index : index + 3] if text)
        if "error:" in line:
            return line
    return None


setup(
    ext_modules=[Extension("spartan_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
