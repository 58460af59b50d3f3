"""The CPU kernels under GCC's sanitizers: `python -m tests.sanitizers [address|thread]`.

Builds the extension instrumented, shows that a planted mistake is reported, and runs the operators' own tests on it.
Under `address` that is AddressSanitizer and UndefinedBehaviorSanitizer, PyTorch's allocations included; under `thread`
ThreadSanitizer, with a team of plain threads in place of OpenMP's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "soft_topk",
    "soft_topk_global",
    "hard_topk",
    "hard_indices",
    "rows",
    "masked_scores",
    "masked_weight",
    "masked_linear",
    "layout",
    "block_sparse",
    "narrow_blocks",
    "native",
)
# torch.library and torch.compile are not under test, and a child process would load the extension that is installed
SELECTION = "(native-cpu or test_native) and not opcheck and not compiled and not instruction_set"


@dataclass(frozen=True)
class Sanitizer:
    """Flags for the compiler, runtimes to load first, their options, and a mistake with what must be said about it."""

    flags: str
    libraries: tuple[str, ...]
    options: dict[str, str]
    canary: tuple[str, str]


SANITIZERS = {
    "address": Sanitizer(
        "address,undefined",
        ("libasan.so", "libstdc++.so"),  # the second, so that the first finds the C++ exceptions to intercept
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},  # Python never frees everything
        ("overflow", "heap-buffer-overflow"),
    ),
    "thread": Sanitizer(
        "thread",
        ("libtsan.so",),
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1"},
        ("race", "data race"),
    ),
}


def build(name: str, sanitizer: Sanitizer) -> Path:
    """Compile the extension with its CPU kernels instrumented; the folder is kept, so the next build is incremental."""
    import pybind11

    folder = ROOT / "build" / f"sanitize-{name}"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DSPARTAN_CUDA=off"]
    configure += [f"-DSPARTAN_SANITIZE={sanitizer.flags}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}"]
    if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja"]
    for step in (configure, ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 2)]):
        subprocess.run(step, check=True, stdout=subprocess.DEVNULL)
    (extension,) = folder.glob("_native*.so")
    return extension


def _located(library: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={library}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def environment(sanitizer: Sanitizer, extension: Path) -> dict[str, str]:
    """The environment of a Python in which the sanitizer is the first to be loaded."""
    found = [_located(name) for name in sanitizer.libraries]
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **sanitizer.options,
        "LD_PRELOAD": " ".join(found),
        "PYTHONPATH": os.pathsep.join(paths),
        "SPARTAN_SANITIZED": str(extension),
    }


def main(name: str = "address") -> int:
    """Build, plant a mistake, test; the exit status is pytest's, or 1 when the planted mistake went unseen."""
    if name not in SANITIZERS:
        raise SystemExit(f"the sanitizer must be one of {', '.join(SANITIZERS)}; got {name!r}")
    sanitizer = SANITIZERS[name]
    variables = environment(sanitizer, build(name, sanitizer))
    mistake, said = sanitizer.canary
    command = [sys.executable, "-m", "tests.sanitizers.canary", mistake]
    planted = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    if said not in planted.stderr:
        print(f"the planted {mistake} was not reported; exit status {planted.returncode}:\n{planted.stderr[-2000:]}")
        return 1
    files = [str(ROOT / "tests" / f"test_{test}.py") for test in TESTS]
    command = [sys.executable, "-m", "pytest", "-p", "tests.sanitizers.plugin", "-p", "no:cacheprovider"]
    command += ["-n", "auto", "--dist", "worksteal"] if name == "address" else []  # a team needs the cores for itself
    return subprocess.run([*command, "-k", SELECTION, *files], env=variables, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
