"""Measure from which density on the dense product is faster than those of blocks, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from spartan.functional import block_sparse_linear, masked_linear
from spartan_kernels import BlockSparseWeight, precision
from spartan_kernels.arguments import block_grid, block_shape
from spartan_kernels.break_even import Crossing, Surface, device_kind, store
from spartan_kernels.dispatch import AUTO_ORDER, refusal
from spartan_kernels.layout import BlockLayout
from spartan_kernels.tiles import TunedTile, architecture_of, candidates, store_tiles, using

__all__ = ["Timer", "median_seconds", "tune"]

_SHAPE = (3072, 768)  # the first layer of a transformer's MLP
_SQUARES: tuple[int | tuple[int, int], ...] = (16, 32, 64, 128)
_NARROW: tuple[int | tuple[int, int], ...] = ((4, 1), 1)
_DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0)
_TOKENS = {True: 8, False: 2048}  # few, many
_SEARCHED = 0.1  # of the blocks are active while tiles are searched
_SLACK = 1.05  # the dense product is preferred only where the block-sparse one is this much slower
Timer = Callable[[Callable[[], object], torch.device], float]


def tune(
    device: str | torch.device | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    block_sizes: Sequence[int | tuple[int, int]] | None = None,
    *,
    tiles: bool = False,
    timer: Timer | None = None,
) -> Path:
    """Measure once from which density on linear layers should multiply densely, and store that in the user's cache.

    For each dtype, block size and few or many tokens, forward passes through a 3072 x 768 weight are timed at rising
    densities against `torch.nn.functional.linear` on the same weight; the crossing is interpolated in the density. Both
    are measured: `masked_linear`, whose mask may move, and `block_sparse_linear`, which `to_block_sparse` chooses by.
    Where the product of all blocks is the faster one (PyTorch's does not know every CPU), it also serves linear
    layers that are masked weight by weight.

    Not measured: convolutions, whose time depends on more than the density (a model of a CPU, and on a GPU the width of
    the blocks decide), and products in 8 bits, which are taken where a model was packed so.

    Args:
        device: None for the GPU where there is one, else the CPU.
        dtypes: dtypes to measure; one that only the reference serves is left out.
        block_sizes: ints or (rows, columns); sizes between them take the nearest. None: 16, 32, 64 and 128, on a CPU
            also (4, 1) and 1, which stand for the blocks with a side below 8. On a GPU with Triton, packed single
            weights are measured besides, with few tokens.
        tiles: on a GPU with Triton, first search the tile of each of these products and of their input gradients, and
            store it beside: a dozen or two kernels each are compiled and timed, at a tenth of the blocks.
        timer: seconds of a call on a device; None measures the median of several.

    Returns:
        The file: SPARTAN_TUNE_CACHE, or spartan-kernels/break_even.json in XDG_CACHE_HOME or ~/.cache.

    Raises:
        ValueError: a block size that is not positive, no dtype that can be measured, or a cache file that cannot be
            read.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kernel = next(
        (name for name in AUTO_ORDER.get(where.type, ()) if _serves(name, where.type, torch.float32)), "reference"
    )
    narrow = _NARROW if where.type == "cpu" else ()
    sizes = [block_shape(size) for size in (_SQUARES + narrow if block_sizes is None else block_sizes)]
    if tiles and kernel == "triton":
        kinds = [kind for dtype in dtypes if _serves(kernel, where.type, dtype) for kind in _kinds(dtype)]
        found = (
            _fastest(where, kind, size, few, timer or median_seconds)
            for kind in kinds
            for size in sizes
            for few in (True, False)
        )
        store_tiles(device_kind(where), tuple(tile for pair in found for tile in pair))
    subjects = [(size, few, packed) for packed in (False, True) for size in sizes for few in (True, False)]
    if kernel == "triton" and where.type == "cuda" and block_sizes is None:
        subjects.append(((1, 1), True, True))
    surface: Surface = tuple(
        _crossing(where, dtype, size, few, packed, kernel, timer or median_seconds)
        for dtype in dtypes
        if kernel != "reference" and _serves(kernel, where.type, dtype)
        for size, few, packed in subjects
    )
    if not surface:
        raise ValueError(f"dtypes must hold one that a kernel serves on {where.type}; got {list(dtypes)}")
    return store(device_kind(where), surface)


def _serves(name: str, kind: str, dtype: torch.dtype) -> bool:
    return name != "reference" and refusal("masked_linear_forward", name, kind, dtype) is None


def _kinds(dtype: torch.dtype) -> list[str]:
    """How numbers of a dtype may be multiplied."""
    return ["float32", "tf32"] if dtype == torch.float32 else [str(dtype).removeprefix("torch.")]


def _fastest(
    device: torch.device, kind: str, size: tuple[int, int], few: bool, timer: Timer
) -> tuple[TunedTile, TunedTile]:
    """The fastest tiles of a forward pass, and of the gradient of its input."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(_SHAPE, generator=g, device=g.device).to(device, dtype)
    x, grad = (
        torch.randn(_TOKENS[few], side, generator=g, device=g.device).to(device, dtype) for side in reversed(_SHAPE)
    )
    gate = (torch.rand(block_grid(_SHAPE, size), generator=g, device=g.device) < _SEARCHED).to(device, torch.float32)
    layout = BlockLayout.from_gate(gate, _SHAPE, size)
    leaf = x.clone().requires_grad_()
    y = masked_linear(leaf, weight, gate, size, layout=layout, backend="triton")

    def forward() -> torch.Tensor:
        return masked_linear(x, weight, gate, size, layout=layout, backend="triton")

    def input_gradient() -> torch.Tensor:
        return torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]

    def search(call: Callable[[], object], span: int, other: int) -> TunedTile:
        times = {}
        for tile in candidates(architecture_of(device), x.shape[0], span, other, kind):
            with using(tile):
                try:
                    times[tile] = timer(call, device)
                except RuntimeError:  # more shared memory or registers than this GPU has
                    continue
        return TunedTile(kind, span, other, few, min(times, key=lambda tile: times[tile]))

    with precision.using(kind == "tf32"):
        return search(forward, *size), search(input_gradient, *reversed(size))


def _crossing(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int], few: bool, packed: bool, kernel: str, timer: Timer
) -> Crossing:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(_SHAPE, generator=g, device=g.device).to(device, dtype)
    x = torch.randn(_TOKENS[few], _SHAPE[1], generator=g, device=g.device).to(device, dtype)
    grid = block_grid(_SHAPE, size)
    order = torch.rand(grid, generator=g, device=g.device).flatten().argsort().argsort().view(grid)
    with torch.no_grad():
        dense = timer(lambda: functional.linear(x, weight), device)
        ratios = []
        for density in _DENSITIES:
            active = (order < round(density * order.numel())).to(device)
            if packed:
                blocks = BlockSparseWeight.from_dense(weight, size, active)
                sparse = partial(block_sparse_linear, x, blocks, backend=kernel)
            else:
                sparse = partial(masked_linear, x, weight, active.to(torch.float32), size, backend=kernel)
            ratios.append(timer(sparse, device) / dense)
    name = str(dtype).removeprefix("torch.")
    return Crossing(name, *size, few, interpolated_crossing(_DENSITIES, ratios), ratios[-1], packed)


def interpolated_crossing(densities: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The density from which on sparse time / dense time stays over 1.05; None where even the last is not.

    One slow measurement between fast ones is noise, so the search comes from the dense end.
    """
    if ratios[-1] <= _SLACK:
        return None
    for i in range(len(ratios) - 1, 0, -1):
        if ratios[i - 1] <= _SLACK:
            part = (_SLACK - ratios[i - 1]) / (ratios[i] - ratios[i - 1])
            return densities[i - 1] + part * (densities[i] - densities[i - 1])
    return 0.0


def median_seconds(call: Callable[[], object], device: torch.device, seconds: float = 0.1, least: int = 5) -> float:
    """Median time of a call, over at least `least` calls that take `seconds` together, after one that is not timed."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        times.append(once())
    return statistics.median(times)
