"""The CUDA kernels by CMake directly, for the architecture of this device alone; in a rehearsal on the emulator."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu import records, tools
from bench.gpu.run import ROOT

STEP = "build"
_SHOWN = 6000  # characters of a failed build's output
# stays, so that the next rehearsal and the tests build nothing anew
_EMULATED = ROOT / "build" / "gpu-rehearsal" / f"emulated-{sys.implementation.cache_tag}"


def architecture() -> str:
    """Of the current device, as CMake takes it, such as 90."""
    import torch

    return "{}{}".format(*torch.cuda.get_device_capability())


def commands(folder: Path, cuda: str, archs: str) -> list[list[str]]:
    """Configure and build `_native` into `folder`."""
    import pybind11

    cmake, ninja, nvcc = (tools.find(name) for name in ("cmake", "ninja", "nvcc"))
    configure = [
        cmake or "cmake", "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
        f"-DSPARTAN_CUDA={cuda}", f"-DSPARTAN_CUDA_ARCHS={archs}", "-DCMAKE_BUILD_TYPE=Release",
    ]  # fmt: skip
    configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc and cuda == "on" else []
    return [configure, [cmake or "cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 2)]]


def build(folder: Path, cuda: str, archs: str) -> Path:
    """The built extension.

    Raises:
        RuntimeError: with the end of what CMake or the compiler said.
    """
    for command in commands(folder, cuda, archs):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout[-_SHOWN:])
    (extension,) = folder.glob("_native*.so")
    return extension


def emulated() -> Path:
    """The extension with its CUDA kernels as C++ on the emulator; one process builds, others wait for it.

    Raises:
        RuntimeError: as in `build`.
    """
    _EMULATED.mkdir(parents=True, exist_ok=True)
    with (_EMULATED / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(_EMULATED, "emulated", "90")


def install(extension: Path) -> Path:
    """Put the extension beside the package's sources in one move: others import the package meanwhile."""
    package = ROOT / "spartan_kernels"
    for name, source in ((extension.name, extension), ("_build.json", None)):
        temporary = package / f"{name}.new"
        if source is None:
            temporary.write_text(json.dumps({"reason": None}) + "\n")
        else:
            shutil.copy(source, temporary)
        os.replace(temporary, package / name)
    return package / extension.name


def main() -> int:
    """Build, install, and say so to the steps that wait for it."""
    start, rehearse = time.perf_counter(), records.rehearsing()
    try:
        if rehearse:
            extension = emulated()
        else:
            with tempfile.TemporaryDirectory() as folder:
                extension = install(build(Path(folder), "on", architecture()))
    except Exception as error:
        print(error)
        first = next((line for line in str(error).splitlines() if "error" in line.lower()), str(error)[:200])
        records.add(STEP, extension=None, wrong=first.strip()[:300])
        return 1
    records.add(STEP, extension=str(extension), seconds=round(time.perf_counter() - start, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
