"""The compiled extension and what its callers share: pointers, workspaces, streams. Nothing else imports `_native`."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

native: Any = None
_import_error: str | None = None
try:
    import spartan_kernels._native as native
except ImportError as error:
    _import_error = str(error)

# A variable of the process. Where it is not set, `os.environ` takes as long to say so as a small product.
environment: Callable[[str], str | None] = getattr(native, "environment", os.environ.get)

_HOST = torch.device("cpu")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # ops.h, Dtype
TF32 = 4
ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # ops.h, Activation


@cache
def unavailable() -> str | None:
    """Why the extension cannot be used, or None."""
    if native is not None:
        return None
    record = Path(__file__).resolve().parent.parent / "_build.json"
    reason = json.loads(record.read_text())["reason"] if record.exists() else None
    return f"the extension was not built: {reason}" if reason else f"the extension does not load: {_import_error}"


@cache
def cuda_unavailable() -> str | None:
    """Why the CUDA kernels cannot be used, or None."""
    if native is None:
        return unavailable()
    if native.cuda_version is None:
        return f"the extension was built without CUDA kernels: {native.cuda_reason}"
    if torch.version.hip is not None:
        return "PyTorch was built for ROCm, which runs no CUDA C++"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if problem := native.cuda.problem():
        return f"the CUDA {native.cuda_version} runtime of the extension cannot work here: {problem}"
    built = [(int(arch[:-1]), int(arch[-1])) for arch in native.cuda_archs.split(",")]
    devices = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    if any(_runs(device, built) for device in devices):
        return None
    found = ", ".join(f"{major}.{minor}" for major, minor in devices)
    return f"the extension was built for CUDA architectures {native.cuda_archs}; the devices here are {found}"


def _runs(device: tuple[int, int], built: list[tuple[int, int]]) -> bool:
    """Binary code runs on later minor versions; of the newest there is PTX, which later devices compile."""
    return device >= max(built) or any(device[0] == major and device[1] >= minor for major, minor in built)


def build_info() -> dict[str, Any]:
    """How the extension was built and what it runs on here."""
    if native is None:
        return {"available": False, "reason": unavailable()}
    return {
        "available": True,
        "reason": None,
        "compiler": native.compiler,
        "instruction_set": native.cpu.instruction_set(),
        "openmp": native.cpu.parallel_available(),
        "cuda": native.cuda_version,
        "cuda_archs": native.cuda_archs,
        "cuda_reason": native.cuda_reason,
    }


def multiply_adds(rounds: int) -> int:
    """Multiply and add in registers alone, on every thread: the CPU's peak. Returns the floating-point operations."""
    threads = torch.get_num_threads()
    sinks = empty(threads, torch.float32)
    operations: int = native.cpu.multiply_adds(rounds, sinks.data_ptr(), threads)
    return operations


def compute(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, in the dtype the CPU kernels compute in: float64, or float32 for everything narrower."""
    dtype = computed_in(tensor.dtype)
    return (tensor if tensor.dtype is dtype else tensor.detach().to(dtype)).contiguous()


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the CPU kernels compute numbers of another."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Without its graph, each element beside the next."""
    return None if tensor is None else tensor.detach().contiguous()


def empty(shape: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory of the host, whatever PyTorch's default device and dtype are: a kernel writes to its address."""
    return torch.empty(shape, dtype=dtype, device=_HOST)


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def blocks(weight: torch.Tensor, rows: int, columns: int) -> Any:
    """A weight in blocks as the kernels take it: as [out, in, kernel positions]; one of fewer dimensions is one row."""
    if weight.dim() < 2:
        return native.Blocks(1, weight.numel(), 1, rows, columns)
    out, in_, *rest = weight.shape
    return native.Blocks(out, in_, math.prod(rest), rows, columns)


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """x as [tokens, features] whose features lie side by side."""
    flat = x if x.dim() == 2 else x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


class Index(NamedTuple):
    """An index of active blocks by its addresses, in the order of a layout's buffers, and what they point into."""

    addresses: tuple[int, ...]
    keeps: Any


def addresses(layout: list[torch.Tensor]) -> tuple[int, ...]:
    """Those of the buffers of a layout; zeros where there are none, which is every block."""
    if not layout:
        return (0, 0, 0, 0, 0)
    a, b, c, d, e = layout
    return a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), e.data_ptr()


class BlockMatrix:
    """A block-sparse matrix as the kernels take it; keeps what it points to. Its index lies side by side in memory."""

    def __init__(
        self,
        data: torch.Tensor,
        shape: tuple[int, int],
        block: tuple[int, int],
        layout: list[torch.Tensor] | Index,
        gate: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        if positions is None:
            self.data = data if data.stride(-1) == 1 else data.contiguous()
            stride, stored = self.data.stride(0), 0
        else:
            self.data = data.contiguous()
            stride, stored = 0, self.data.shape[0]
            if not stored:
                positions = positions.new_zeros(1)  # a null pointer would say that the matrix is not packed
        if gate is not None:
            gate = (gate if gate.dtype is torch.float32 else gate.to(torch.float32)).contiguous()
        self.gate, self.layout, self.positions = gate, layout, positions
        index = layout.addresses if isinstance(layout, Index) else addresses(layout)
        self.out, self.in_ = out, in_ = shape
        rows, columns = block
        self.handle = native.cpu.BlockMatrix(
            self.data.data_ptr(), out, in_, rows, columns, stride, pointer(gate), *index, pointer(positions), stored
        )
        self.dtype = DTYPES[data.dtype]


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}


_scratch = _Scratch()
_KEPT_BYTES = 16 << 20


def workspace(size: int, use: str = "kernel") -> torch.Tensor:
    """Scratch of this thread, kept up to 16 MiB for each use: fresh pages cost as much as a pass over the data."""
    if size > _KEPT_BYTES:
        return empty(size, torch.uint8)
    tensor = _scratch.tensors.get(use)
    if tensor is None or tensor.numel() < size:
        tensor = _scratch.tensors[use] = empty(size, torch.uint8)
    return tensor


def stream(like: torch.Tensor) -> tuple[int, int]:
    """Current stream of the tensor's device, and the device's number."""
    return torch.cuda.current_stream(like.device).cuda_stream, like.device.index


def call(function: Callable[..., None], like: torch.Tensor, *arguments: Any) -> None:
    """Launch on the device and current stream of `like`, and leave the caller's current device as it was."""
    with torch.cuda.device_of(like):
        function(*arguments, *stream(like))
