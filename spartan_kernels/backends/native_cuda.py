"""The extension's CUDA kernels: tensors to pointers, shapes and the current stream. Nothing here waits for the GPU.

The CUDA half of native.py, which imports the extension for both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from spartan_kernels.backends import native

_native: Any = native._native

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # ops.h, Dtype


@cache
def unavailable() -> str | None:
    """Why the CUDA kernels cannot be used, or None."""
    if _native is None:
        return native.unavailable()
    if _native.cuda_version is None:
        return f"the extension was built without CUDA kernels: {_native.cuda_reason}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if problem := _native.cuda.problem():
        return f"the CUDA {_native.cuda_version} runtime of the extension cannot work here: {problem}"
    built = [(int(arch[:-1]), int(arch[-1])) for arch in _native.cuda_archs.split(",")]
    devices = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    if any(_runs(device, built) for device in devices):
        return None
    found = ", ".join(f"{major}.{minor}" for major, minor in devices)
    return f"the extension was built for CUDA architectures {_native.cuda_archs}; the devices here are {found}"


def _runs(device: tuple[int, int], built: list[tuple[int, int]]) -> bool:
    """Binary code runs on later minor versions; of the newest there is PTX, which later devices compile."""
    return device >= max(built) or any(device[0] == major and device[1] >= minor for major, minor in built)


def stream(like: torch.Tensor) -> tuple[int, int]:
    """Current stream of the tensor's device, and the device's number."""
    return torch.cuda.current_stream(like.device).cuda_stream, like.device.index


def call(function: Callable[..., None], like: torch.Tensor, *arguments: Any) -> None:
    """Launch on the device and current stream of `like`, and leave the caller's current device as it was."""
    with torch.cuda.device_of(like):
        function(*arguments, *stream(like))


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Without its graph, each element beside the next."""
    return None if tensor is None else tensor.detach().contiguous()
