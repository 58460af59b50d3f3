"""Which backend serves which operator: one table, one choice, one report."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from spartan_kernels.backends import extension

BACKENDS = ("native", "triton", "cuda", "reference")
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}
# Those that solve over the ranks of a process group.
GROUP_BACKENDS = ("native", "triton", "reference")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Triton's interpreter runs the same kernels on CPU tensors; chosen for the whole process, before triton is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON_DEVICES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Support:
    """Device types and dtypes that one backend serves for one operator; an empty device tuple means any.

    `capability` is the least compute capability of CUDA devices, (0, 0) for any of any maker.
    """

    stem: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    capability: tuple[int, int] = (0, 0)


_Dtypes = tuple[torch.dtype, ...]


def _rows(
    stem: str,
    *operators: str,
    reference: _Dtypes = _FLOATS,
    native: _Dtypes = (),
    gpu: _Dtypes = (),
    triton: _Dtypes = (),
    capability: tuple[int, int] = (0, 0),
) -> dict[str, dict[str, Support]]:
    """The same row for each operator of a stem, from the dtypes that each backend serves; `gpu`: triton and cuda.

    `capability` is what kernels for GPUs need.
    """
    row = {"reference": Support(stem, (), reference)}
    if native:
        row["native"] = Support(stem, ("cpu",), native)
    if gpu or triton:
        row["triton"] = Support(stem, _TRITON_DEVICES, gpu or triton, capability)
    if gpu:
        row["cuda"] = Support(stem, ("cuda",), gpu, capability)
    return {operator: row for operator in operators}


# operator -> backend -> what it serves. The only place that says so.
SUPPORT: dict[str, dict[str, Support]] = {
    **_rows(
        "soft_topk",
        "soft_topk_forward",
        "soft_topk_backward",
        "soft_topk_global_forward",
        "soft_topk_global_backward",
        "solve_masks_",
        native=_FLOATS,
        gpu=_NARROW,
    ),
    **_rows(
        "hard_topk",
        "hard_topk_forward",
        "hard_topk_indices_forward",
        "hard_topk_global_forward",
        native=_FLOATS,
        gpu=_NARROW,
    ),
    **_rows(
        "masked_weight",
        "masked_weight_forward",
        "masked_weight_backward",
        "masked_weight_coupling",
        "masked_weight_correct_",
        "block_scores",
        native=_FLOATS,
        gpu=_NARROW,
    ),
    **_rows(
        "masked_weight",
        "kept_soft_mass",
        "add_block_signs_",
        "masked_weight_backward_",
        native=_FLOATS,
        triton=_NARROW,
    ),
    **_rows(
        "masked_matmul",
        "masked_linear_forward",
        "masked_linear_backward",
        "sampled_matmul_forward",
        native=_NARROW,
        gpu=_NARROW,
    ),
    **_rows("block_sparse", "block_sparse_linear_forward", "block_sparse_linear_backward", native=_NARROW, gpu=_NARROW),
    **_rows(
        "block_sparse",
        "block_sparse_linear_float8_forward",
        reference=_NARROW,
        triton=_NARROW,
        capability=(8, 9),  # the first with products in 8 bits
    ),
    **_rows("masked_conv", "masked_conv2d_forward", "masked_conv2d_backward", native=_NARROW, triton=_NARROW),
    **_rows(
        "block_sparse_conv",
        "block_sparse_conv2d_forward",
        "block_sparse_conv2d_backward",
        native=_NARROW,
        triton=_NARROW,
    ),
    **_rows(
        "block_layout",
        "block_layout",
        reference=(*_FLOATS, torch.bool),
        native=(*_FLOATS, torch.bool),
        gpu=(*_FLOATS, torch.bool),
    ),
}


class _Settings(threading.local):
    backend: str | None = None


_settings = _Settings()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use the backend `name` for every operator called in this block (and thread).

    Raises:
        ValueError: `name` is not "auto" or one of the backends.
    """
    previous, _settings.backend = _settings.backend, _known(name)
    try:
        yield
    finally:
        _settings.backend = previous


def _known(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}; got {name!r}")
    return name


def requested(name: str | None) -> str:
    """The backend asked for: the argument, else the `backend` block, else SPARTAN_BACKEND, else "auto"."""
    if name:
        return _known(name)
    return _settings.backend or _known(extension.environment("SPARTAN_BACKEND") or "auto")


@cache
def unavailable(name: str) -> str | None:
    """Why the backend `name` cannot run on this machine, or None when it can."""
    if name == "reference":
        return None
    if name == "native":
        return extension.unavailable()
    if name == "triton":
        return _triton_unavailable()
    return extension.cuda_unavailable()


def _triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (torch.cuda.is_available() or _INTERPRETED):
        return "no CUDA device was found (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"
    return None


def refusal(operator: str, name: str, device: str, dtype: torch.dtype, grouped: bool = False) -> str | None:
    """Why the backend `name` does not serve this call (over a process group: `grouped`), or None when it does."""
    support = SUPPORT[operator].get(name)
    if support is None:
        return f"the {name} backend has no {operator}"
    if support.devices and device not in support.devices:
        return f"the {name} backend serves {', '.join(support.devices)} tensors, not {device}"
    if dtype not in support.dtypes:
        return f"the {name} backend has no {operator} for {dtype}"
    if grouped and name not in GROUP_BACKENDS:
        return f"the {name} backend has no {operator} over a process group"
    reason = unavailable(name)
    if reason:
        return f"the {name} backend is not available: {reason}"
    found = least_capability() if device == "cuda" and support.capability > (0, 0) else support.capability
    if found < support.capability:
        needed, has = (".".join(map(str, pair)) for pair in (support.capability, found))
        has = has if found > (0, 0) else "none"
        return f"the {name} backend has {operator} from compute capability {needed} on; a device here has {has}"
    return None


@cache
def least_capability() -> tuple[int, int]:
    """Of the CUDA devices of this machine; those of other makers have none, (0, 0)."""
    if torch.version.hip is not None:
        return 0, 0
    return min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))


@cache
def select(operator: str, device: str, dtype: torch.dtype, name: str, grouped: bool = False) -> str:
    """The backend that serves `operator`: `name` itself, or for "auto" the first of AUTO_ORDER that can.

    "auto" warns once when it steps over a backend that exists for the operator and dtype but cannot run here.

    Raises:
        ValueError: the backend named cannot serve this call; it never falls back.
    """
    if name != "auto":
        reason = refusal(operator, name, device, dtype, grouped)
        if reason:
            raise ValueError(f"backend={name!r}: {reason}")
        return name
    for candidate in AUTO_ORDER.get(device, ("reference",)):
        reason = refusal(operator, candidate, device, dtype, grouped)
        if reason is None:
            return candidate
        support = SUPPORT[operator].get(candidate)
        if support and dtype in support.dtypes:
            _warn_once(f"spartan: {reason}; using a slower backend")
    raise ValueError(f"{operator}: no backend serves {device} tensors of {dtype}")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@cache
def implementation(operator: str, name: str) -> Callable[..., Any]:
    """The function of the backend `name` that computes `operator`."""
    module = importlib.import_module(f"spartan_kernels.backends.{name}.{SUPPORT[operator][name].stem}")
    function: Callable[..., Any] = getattr(module, operator)
    return function


def resolve(operator: str, like: torch.Tensor, name: str | None, grouped: bool = False) -> Callable[..., Any]:
    """The function that computes `operator` for tensors like `like`, over a process group where `grouped`."""
    return implementation(operator, select(operator, like.device.type, like.dtype, requested(name), grouped))


def info() -> dict[str, Any]:
    """What is installed and which backend serves which operator on which device, with the reason where none does.

    Returns:
        "version", "torch", "native" (the extension's build: compilers, instruction set, reason if absent), "devices"
        and "operators": {operator: {device: {"auto": name, backend: None or the reason it does not serve}}}.
    """
    from spartan_kernels import __version__

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    operators = {
        operator: {
            device: {
                "auto": next(
                    (n for n in AUTO_ORDER[device] if refusal(operator, n, device, torch.float32) is None), None
                ),
                **{n: refusal(operator, n, device, torch.float32) for n in BACKENDS},
            }
            for device in devices
        }
        for operator in SUPPORT
    }
    return {
        "version": __version__,
        "torch": torch.__version__,
        "native": extension.build_info(),
        "devices": devices,
        "operators": operators,
    }
