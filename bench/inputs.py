"""Operands of the cases: seeded, on the device, in as many sets as the cache makes necessary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.case import Settings
from bench.timing import rotated


def normal(shape: Sequence[int], s: Settings, seed: int, scale: float = 1.0) -> Tensor:
    """Normal values of a standard deviation `scale`, the same for the same seed."""
    generator = torch.Generator(s.device).manual_seed(seed)
    return scale * torch.randn(tuple(shape), generator=generator, device=s.device, dtype=s.dtype)


def rotating(s: Settings, bytes_each: int, build: Callable[[int], tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
    """Build sets of operands until their parts of `bytes_each` exceed the cache of the device."""
    return rotated(build, bytes_each, machine.cache_bytes(s.device))
