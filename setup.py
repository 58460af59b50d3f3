"""Drives CMake for the compiled extension; everything else is in pyproject.toml.

Environment:
    SPARTAN_CUDA        auto (default: compile CUDA kernels where a CUDA device and a working compiler are), on, off
    SPARTAN_CUDA_ARCHS  CUDA architectures, such as "80;90" (default: those of the devices here, else every common one)
    CMAKE_ARGS          more arguments of CMake, such as "-DSPARTAN_OPTIMISE=-O0" for a quick build
    SPARTAN_NATIVE      auto (default: go on without the extension when it cannot be built), on (fail), off
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # it would fail on pyproject.toml with an unrelated message
    raise SystemExit(f"spartan-kernels: building needs setuptools 77 or newer; found {setuptools.__version__}")

ROOT = Path(__file__).resolve().parent
RECORD = "_build.json"  # why there is no extension, read by spartan_kernels.backends.extension


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
        if reason:  # an extension of an earlier build would run beside Python files that it does not fit
            target.unlink(missing_ok=True)
        if reason and mode == "on":
            raise SystemExit(f"SPARTAN_NATIVE=on, but the extension could not be built: {reason}")
        if reason:
            print(f"spartan-kernels: installing without compiled kernels ({reason}); the reference backend serves")
        (target.parent / RECORD).write_text(json.dumps({"reason": reason}) + "\n")

    def copy_extensions_to_source(self) -> None:
        """An editable install needs the record beside the sources too, and no extension that was not built now."""
        built = Path(self.build_lib) / "spartan_kernels"
        for ext in self.extensions:
            name = Path(self.get_ext_filename(ext.name)).name
            if not (built / name).exists():
                (ROOT / "spartan_kernels" / name).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        if (built / RECORD).exists():
            shutil.copy(built / RECORD, ROOT / "spartan_kernels" / RECORD)

    def _compile(self, target: Path) -> str | None:
        """Build the extension at `target`; None, or why it could not be built."""
        cuda = os.environ.get("SPARTAN_CUDA", "auto")
        archs = os.environ.get("SPARTAN_CUDA_ARCHS", "")
        if cuda in ("auto", "on") and not archs:
            archs = ";".join(_device_archs())
        if cuda == "auto" and not archs:
            return self._build(target, "off", "", "no CUDA device here (SPARTAN_CUDA=on compiles them all the same)")
        reason = self._build(target, cuda, archs)
        if reason is None or cuda != "auto":
            return reason
        plain = re.sub(r"[^\w .,:/()'-]", " ", reason)[:300]  # it travels through CMake and the compiler's command line
        return self._build(target, "off", "", f"they could not be compiled: {plain}")

    def _build(self, target: Path, cuda: str, archs: str, without_cuda: str = "") -> str | None:
        """Run CMake; `without_cuda` is why a build is without the CUDA kernels."""
        build = Path(self.build_temp).resolve()
        _remove_stale(build)
        build.mkdir(parents=True, exist_ok=True)
        if shutil.which("cmake") is None:
            return "cmake not found"
        try:
            import pybind11
        except ImportError:
            return "pybind11 not found"

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
            f"-DSPARTAN_CUDA_FAILURE={without_cuda}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        configure.append(f"-DSPARTAN_CUDA_ARCHS={archs}" if archs else "-USPARTAN_CUDA_ARCHS")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        if shutil.which("ninja") and not (build / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja"]
        jobs = str(os.cpu_count() or 2)
        for step in (configure, ["cmake", "--build", str(build), "--parallel", jobs]):
            done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            print(done.stdout)
            if done.returncode:
                return _first_error(done.stdout) or f"{step[0]} failed with exit status {done.returncode}"
        return None


def _device_archs() -> list[str]:
    """Architectures of the CUDA devices of this machine, such as ["90"]; empty where there are none."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^(\d+)\.(\d+)$", done.stdout, re.MULTILINE) if done.returncode == 0 else []
    return [f"{major}{minor}" for major, minor in sorted(set(found), key=lambda pair: (int(pair[0]), int(pair[1])))]


def _remove_stale(build: Path) -> None:
    """Remove a build whose tools are gone: pip makes them anew for each install, and CMake remembers their places."""
    cache = build / "CMakeCache.txt"
    if not cache.exists():
        return
    known = dict(re.findall(r"^(\w+):\w+=(.+)$", cache.read_text(), re.MULTILINE))
    tools = [known.get(f"CMAKE_{name}", "/") for name in ("COMMAND", "MAKE_PROGRAM", "CXX_COMPILER")]
    if known.get("CMAKE_HOME_DIRECTORY") != str(ROOT) or not all(map(os.path.exists, tools)):
        shutil.rmtree(build)


# what says why a build failed, best first: the compiler's or CMake's own words, the shell's, the system's
_CAUSES = (
    re.compile(r"(?:fatal )?error:|^nvcc fatal|^nvcc error"),
    re.compile(r"not found|No such file|Permission denied|No space left|cannot execute|Killed|Segmentation fault"),
)


def _first_error(output: str) -> str | None:
    """The first line that says why CMake or a compiler failed, without the place in CMake's own files."""
    lines = [line.strip() for line in output.splitlines()]
    for index, line in enumerate(lines):
        if line.startswith("CMake Error:"):
            return line.removeprefix("CMake Error:").strip()
        if line.startswith("CMake Error"):
            said = [text for text in lines[index + 1 : index + 5] if text]
            return " ".join(said[:2]).rstrip(":") if said else line
    for cause in _CAUSES:
        for line in lines:
            if cause.search(line):
                return line
    return None


setup(
    ext_modules=[Extension("spartan_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
