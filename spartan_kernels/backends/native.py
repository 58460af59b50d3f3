"""The compiled extension, and what its callers share: the only file that imports `_native`."""

from __future__ import annotations

import importlib
import json
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch

_native: Any = None
_import_error: str | None = None
try:
    _native = importlib.import_module("spartan_kernels._native")
except ImportError as error:
    _import_error = str(error)

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # ops.h, Dtype


@cache
def unavailable() -> str | None:
    """Why the extension cannot be used, or None."""
    if _native is not None:
        return None
    record = Path(__file__).resolve().parent.parent / "_build.json"
    reason = json.loads(record.read_text())["reason"] if record.exists() else None
    return f"the extension was not built: {reason}" if reason else f"the extension does not load: {_import_error}"


def build_info() -> dict[str, Any]:
    """How the extension was built and what it runs on here."""
    if _native is None:
        return {"available": False, "reason": unavailable()}
    return {
        "available": True,
        "reason": None,
        "compiler": _native.compiler,
        "instruction_set": _native.cpu.instruction_set(),
        "openmp": _native.cpu.parallel_available(),
        "cuda": _native.cuda_version,
        "cuda_archs": _native.cuda_archs,
        "cuda_reason": _native.cuda_reason,
    }


def compute(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, in the dtype the kernels compute in: float64, or float32 for everything narrower."""
    return tensor.detach().to(computed_in(tensor.dtype)).contiguous()


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the kernels compute numbers of another."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}


_scratch = _Scratch()
_KEPT_BYTES = 16 << 20


def workspace(size: int, use: str = "kernel") -> torch.Tensor:
    """Scratch of this thread, kept up to 16 MiB for each use: fresh pages cost as much as a pass over the data."""
    if size > _KEPT_BYTES:
        return torch.empty(size, dtype=torch.uint8)
    tensor = _scratch.tensors.get(use)
    if tensor is None or tensor.numel() < size:
        tensor = _scratch.tensors[use] = torch.empty(size, dtype=torch.uint8)
    return tensor
