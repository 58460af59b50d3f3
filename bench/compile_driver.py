"""A GPU that is not there, for Triton: launches take their whole way through Triton up to the driver, which drops them.

So arguments are specialised and kernels compiled by Triton's own code, whatever its version, as on a machine that has
the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class _Utils:
    """What Triton asks the driver about the device, and where it loads binaries: nowhere."""

    def get_device_properties(self, device: object) -> dict[str, int]:
        """Limits of an H100."""
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: object) -> tuple[int, int, int, int, int]:
        """Handles of a module and its function, and what they need."""
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: object) -> None:
        """Nothing was loaded."""
        pass


class StandInDriver(DriverBase):
    """Triton's driver for a target without a device; Triton keeps the kernels of each `device` apart."""

    def __init__(self, target: GPUTarget, device: str) -> None:
        super().__init__()
        self.target, self.device, self.utils = target, device, _Utils()

    @classmethod
    def is_active(cls) -> bool:
        """Always."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Only names are needed."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """The target to compile for."""
        return self.target

    def get_active_torch_device(self) -> torch.device:
        """Where PyTorch's tensors are."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """There is none."""
        raise RuntimeError("there is no device to measure")

    def get_current_device(self) -> str:
        """What Triton keeps kernels by."""
        return self.device

    def get_current_stream(self, device: object) -> int:
        """The default stream."""
        return 0

    def launcher_cls(self, source: object, metadata: object) -> Any:
        """What launches a kernel: nothing does."""
        return lambda *arguments: None


def use(backend: str, arch: int | str, warp_size: int, purpose: str = "") -> None:
    """Compile for this target from now on, in this process; for another purpose, all anew."""
    driver = StandInDriver(GPUTarget(backend, arch, warp_size), f"{backend} {arch} {purpose}")
    triton.runtime.driver.set_active(driver)


def compiled(kernel: Any) -> int:
    """How many kernels a function has become for the target in use: one for each specialisation of its arguments."""
    return len(kernel.device_caches[triton.runtime.driver.active.get_current_device()][0])
