"""pytest plugin: the CUDA backend as served by an extension built on the emulator, on CPU tensors.

`pytest -p tests.cuda_emulator.plugin` with SPARTAN_EMULATED naming that extension.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace

import torch

if "spartan_kernels._native" in sys.modules:  # pybind11 would give that back in place of the one to load here
    raise RuntimeError("tests.cuda_emulator.plugin must be imported before spartan_kernels")
os.environ.setdefault("SPARTAN_CHECK_OPERANDS", "1")
specification = importlib.util.spec_from_file_location("spartan_kernels._native", os.environ["SPARTAN_EMULATED"])
assert specification is not None and specification.loader is not None
emulated = importlib.util.module_from_spec(specification)
specification.loader.exec_module(emulated)
sys.modules["spartan_kernels._native"] = emulated

from spartan_kernels import dispatch  # noqa: E402
from spartan_kernels.backends import extension  # noqa: E402


def _no_stream(like: torch.Tensor) -> tuple[int, int]:
    return 0, 0


extension.stream = _no_stream
extension.cuda_unavailable = lambda: None
for rows in dispatch.SUPPORT.values():
    if "cuda" in rows:
        rows["cuda"] = replace(rows["cuda"], devices=("cpu",))
dispatch.unavailable.cache_clear()
dispatch.select.cache_clear()
