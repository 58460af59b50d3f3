"""A GPU that is not there: Triton's launches on CPU tensors, up to the call of the driver, which counts instead.

For host time and for what an operator asks of a device. Everything before the driver's launch is the real thing: the
operator, autograd, dispatch, Triton's binder and launcher. Nothing is compiled or computed, so results are garbage.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import spartan_kernels
from spartan_kernels import dispatch

_TRITON = "spartan_kernels.backends.triton."
PROGRAMS = 264  # two for each processor of an H100
TARGET = GPUTarget("cuda", 90, 32)


class Launches(Counter[str]):
    """How often each kernel was launched.

    Attributes:
        seen: where a list is put here, the name and the arguments of each launch are added to it.
    """

    seen: list[tuple[str, tuple[Any, ...]]] | None = None

    def launcher(self, name: str) -> CudaLauncher:
        """Triton's own launcher, whose last step is to count."""
        launcher = object.__new__(CudaLauncher)
        none = dict.fromkeys(
            ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align"), 0
        )
        fields = {"launch_cooperative_grid": False, "launch_pdl": False, "num_ctas": 1, "gsan_enabled": False}
        fields |= {"arg_annotations": (), "kernel_signature": b""}  # of newer releases than 3.6

        def launch(*arguments: Any) -> None:
            self[name] += 1
            if self.seen is not None:  # the kernel's own are the last, in a tuple of their own since Triton 3.7
                own = arguments[-1] if isinstance(arguments[-1], tuple) else arguments
                self.seen.append((name, own))

        launcher.__dict__.update(none, launch=launch, **fields)
        return launcher

    def kernel(self, function: JITFunction[Any]) -> CompiledKernel:
        """What a compilation would give."""
        name = function.fn.__name__.strip("_")
        kernel = object.__new__(CompiledKernel)
        kernel.__dict__.update(
            src=None, name=name, hash=name, module=self, function=1, packed_metadata=(), _run=self.launcher(name),
            _module_pid=0,
            metadata=SimpleNamespace(name=name, num_warps=4, shared=0, target=TARGET),
        )  # fmt: skip
        return kernel


class _Driver:
    """What Triton asks of a driver."""

    @staticmethod
    def get_current_target() -> GPUTarget:
        return TARGET

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0


@contextmanager
def gpu() -> Iterator[Launches]:
    """CPU tensors are served by the Triton backend as those of an H100 are; yields the count of its launches."""
    launches = Launches()

    def compiled(function: Any, key: Any, signature: Any, device: Any, *rest: Any) -> CompiledKernel:
        kernel = function.device_caches[device][0][key] = launches.kernel(function)
        return kernel

    serving = {
        operator: {name: replace(s, devices=("cpu",)) if name == "triton" else s for name, s in row.items()}
        for operator, row in dispatch.SUPPORT.items()
    }
    with ExitStack() as stack:
        replaced = stack.enter_context
        replaced(mock.patch.object(triton.runtime.driver, "_active", _Driver()))
        replaced(mock.patch.object(JITFunction, "_do_compile", compiled))
        replaced(mock.patch.dict(dispatch.SUPPORT, serving))
        replaced(mock.patch.dict(dispatch.AUTO_ORDER, {"cpu": ("triton", "reference")}))
        replaced(mock.patch.object(dispatch, "_triton_unavailable", lambda: None))
        for name, value in _REPLACED.items():
            for module in _modules():
                if hasattr(module, name):
                    replaced(mock.patch.object(module, name, value))
        _forget()
        try:
            yield launches
        finally:
            _forget()


_REPLACED = {
    "inspectable": lambda tensor: False,
    "_density": lambda row_offsets, gate: None,
    "_counted": lambda layout: -1.0,
    "program_count": lambda device, chunks: max(1, min(chunks, PROGRAMS)),
}


def _modules() -> list[Any]:
    names = [m.name for m in pkgutil.walk_packages(spartan_kernels.__path__, "spartan_kernels.")]
    wanted = [n for n in names if "native" not in n and "smoke" not in n]
    return [importlib.import_module(name) for name in wanted]


def _forget() -> None:
    for cached in (dispatch.select, dispatch.unavailable):
        cached.cache_clear()
    for module in _modules():
        for found in vars(module).values():
            if isinstance(found, JITFunction):
                found.device_caches.clear()
            elif getattr(found, "__module__", "").startswith(_TRITON) and hasattr(found, "cache_clear"):
                found.cache_clear()
