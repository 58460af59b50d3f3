"""Tools: on PATH, beside Python, or in the folders of CUDA and of Nsight Compute; a rehearsal has stand-ins."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from pathlib import Path

from bench.gpu import records

STOOD_IN = ("compute-sanitizer", "ncu")


def find(name: str) -> str | None:
    """Path of the tool, or None."""
    found = shutil.which(name)
    if found:
        return found
    compiler = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders += [str(Path(compiler).resolve().parent.parent)] if compiler else []
    folders += ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    places = [place for folder in folders if folder for place in (f"{folder}/bin", f"{folder}/{name}")]
    places += [str(Path(sys.executable).parent)]
    places += sorted(glob.glob("/opt/nvidia/nsight-compute/*"), reverse=True)
    return next((str(path) for place in places if os.access(path := Path(place, name), os.X_OK)), None)


def command(name: str) -> list[str] | None:
    """How to call the tool, or None where it is not."""
    if records.rehearsing() and name in STOOD_IN:
        return [sys.executable, "-m", "bench.gpu.stand_in_tools", name]
    found = find(name)
    return [found] if found else None
