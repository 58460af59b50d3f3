"""The backends that can be asked now: Triton always, CUDA C++ once its build has ended well."""

from __future__ import annotations

import importlib
import os
import time

from bench.gpu import build, interpreter, records


def extension(wait: float = 0.0) -> str | None:
    """Path of the built extension, waiting up to `wait` seconds for the build to end; None if there is none."""
    until = time.time() + wait
    while True:
        for record in records.read():
            if record["step"] == build.STEP:
                return record["extension"]
            if record["step"] == "plan" and record["name"] == build.STEP:
                return None  # it was stopped
        if time.time() >= until:
            return None
        time.sleep(0.5)


def ready() -> tuple[str, ...]:
    """Names of the backends to run; in a rehearsal this also puts the emulated extension in the place of CUDA's.

    To be called before anything of `spartan_kernels` is used.
    """
    if records.rehearsing():
        interpreter.mend()
    path = extension()
    if path is None:
        return ("triton",)
    if records.rehearsing():
        os.environ["SPARTAN_EMULATED"] = path
        importlib.import_module("tests.cuda_emulator.plugin")
    return ("triton", "cuda")
