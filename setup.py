"""Drives CMake for the compiled extension; everything else is in pyproject.toml.

Environment:
    SPARTAN_CUDA        auto (default: compile CUDA kernels when a working CUDA compiler is found), on, off
    SPARTAN_CUDA_ARCHS  CUDA architectures, such as "80;90"
    SPARTAN_NATIVE      auto (default: go on without the extension when it cannot be built), on (fail), off
"""

from __future__ import annotations

import json
import os
import re
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
        built = Path(self.build_lib) / "spartan_kernels" / RECORD
        if built.exists():
            shutil.copy(built, ROOT / "spartan_kernels" / RECORD)

    def _compile(self, target: Path) -> str | None:
        """Build the extension at `target`; None, or why it could not be built."""
        cuda = os.environ.get("SPARTAN_CUDA", "auto")
        reason = self._build(target, cuda)
        if reason is None or cuda != "auto":
            return reason
        plain = re.sub(r"[^\w .,:/()'-]", " ", reason)[:300]  # it travels through CMake and the compiler's command line
        return self._build(target, "off", f"they could not be compiled: {plain}")

    def _build(self, target: Path, cuda: str, cuda_failure: str = "") -> str | None:
        """Run CMake; `cuda_failure` is why an earlier run with the CUDA kernels did not succeed."""
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
            f"-DSPARTAN_CUDA={cuda}",
            f"-DSPARTAN_CUDA_FAILURE={cuda_failure}",
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
    """What CMake or the compiler said first, in one line, without the place in CMake's own files."""
    lines = [line.strip() for line in output.splitlines()]
    for index, line in enumerate(lines):
        if line.startswith("CMake Error"):
            said = [text for text in lines[index + 1 : index + 5] if text]
            return " ".join(said[:2]).rstrip(":") if said else line
        if "error:" in line or line.startswith("nvcc fatal"):
            return line
    return None


setup(
    ext_modules=[Extension("spartan_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
