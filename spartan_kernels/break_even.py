"""From which density on the dense product is faster: measured once for a machine, on a CPU a model before that.

The surface says, for a dtype, a block size and few or many tokens, the density (active blocks / blocks) above which
multiplying the masked weight densely takes less time, and how the two compare where all blocks are active: on some
processors the product of blocks is the faster one even then, and serves weights that are masked one by one. `tune`
measures it and writes it to the user's cache. No table is shipped: before that, wide blocks are taken at any density,
and narrow ones on a CPU where a model of one with AVX2 says that they are faster.
"""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch

from spartan_kernels.h100 import BANDWIDTH, CLOCK, LAUNCH, PROCESSORS

__all__ = [
    "Crossing",
    "Surface",
    "cache_file",
    "dense_above",
    "dense_convolution_on_gpu",
    "dense_convolution_wins",
    "dense_wins",
    "device_kind",
    "load",
    "packed_convolution_time",
    "packed_time",
    "single_weights_lines",
    "single_weights_on_gpu",
    "store",
    "using",
    "whole_block",
]

FEW_TOKENS = 16  # up to here a product is bound by reading the weight
TOKEN_GROUP = 4  # of these, how many share a read of a packed single weight on a GPU
_NEVER = math.inf
_SURELY = 0.95  # of the dense product's time, for one of all blocks to take its place
Entry = TypeVar("Entry")
# What a convolution over active blocks takes, in multiply-adds of a dense one: measured on an AVX-512 CPU, float32,
# 64 to 256 channels, 1 x 1 and 3 x 3, 14 x 14 to 56 x 56 pixels, blocks of 2 to 32.
_KEPT_COST = (1.0, 0.75, 1.4)  # of each that is left: 1 + 0.75 (16 / side)^1.4 in blocks with this many outputs
# Time of a packed product with all its blocks / time of PyTorch's dense one, by rows in blocks of few rows, else by the
# shorter side, and what calling it takes besides, in multiply-adds of the dense one: measured on a CPU with AVX2,
# float32, one thread, 768 x 768 and 3072 x 768, 8 to 2048 tokens, and rounded up.
_FEW_ROWS = {1: 3.5, 2: 2.4, 3: 2.4, 4: 1.8}
_MODELLED_COSTS = ((64, 1.8), (32, 1.9), (16, 2.0), (8, 3.0), (1, 6.0))
_CALL = 2e6
# The same where the mask moves and its blocks are found and gathered for each product, and what that takes besides, in
# tokens of the dense one: mean of y and the gradient of x, single weights, 2048 x 2048 and 3072 x 768.
_NARROW = 8  # a side of fewer weights than this
_LINE, _LANES, _COLUMN = 128, 32, 2  # bytes of a line, weights that are read side by side, bytes of a column's index
_MOVING_COST, _MOVING_TOKENS = 3.6, 40
_COPY_COST = 210.0  # of each value of x and y, which are copied
_LAST_COST = 150.0  # of each where channels lie side by side already
_GPU_SIDE = 16  # outputs that an element of the image must serve on a GPU: predicted from bytes, not measured
_PLACE_COST = 90.0  # of each where nothing is copied: 1 x 1 on a channels-last image


@dataclass(frozen=True)
class Crossing:
    """Above `density`, the dense product is faster; None where it never is.

    Attributes:
        dtype: name of the dtype, as "float32".
        rows, columns: the block.
        few: whether this was measured with few tokens (at most 16) or with many.
        density: active blocks / blocks.
        whole: time with all blocks active / time of the dense product; None where that is not known.
        packed: whether the blocks were packed once, instead of found by their gate in each product.
    """

    dtype: str
    rows: int
    columns: int
    few: bool
    density: float | None
    whole: float | None = None
    packed: bool = False


Surface = tuple[Crossing, ...]


def dense_wins(
    density: float,
    device: torch.device,
    dtype: torch.dtype,
    block_size: tuple[int, int],
    tokens: int,
    packed: bool = False,
) -> bool:
    """Whether the dense product is the faster one here."""
    return density > dense_above(device, dtype, block_size, tokens, packed)


def dense_above(
    device: torch.device, dtype: torch.dtype, block_size: tuple[int, int], tokens: int, packed: bool = False
) -> float:
    """The density above which the dense product is the faster one: below 0 where it always is, infinite where never.

    Without a measurement, the block-sparse one is taken, but for narrow blocks on a CPU, where a model decides: one of
    masks that move, so not of `packed` blocks.
    """
    crossing = _threshold(device, dtype, block_size, tokens <= FEW_TOKENS, packed)
    if crossing is not None:
        return crossing
    if packed or min(block_size) >= _NARROW or device.type != "cpu":
        return _NEVER
    return (1 - _MOVING_TOKENS / max(tokens, 1)) / _MOVING_COST


def packed_time(
    density: float,
    device: torch.device,
    dtype: torch.dtype,
    block_size: tuple[int, int],
    tokens: int,
    weights: int,
) -> float:
    """Time of a product with packed blocks / time of the dense one: as measured here, else as a model says.

    The model is one of a CPU, but for few tokens and single weights on a GPU: those are predicted from bytes.

    Args:
        density: stored blocks / blocks.
        device: of the weight.
        dtype: of the weight.
        block_size: (rows, columns).
        tokens: rows of the input.
        weights: entries of the dense weight, for what a call takes besides its product.
    """
    few = tokens <= FEW_TOKENS
    crossing = _threshold(device, dtype, block_size, few, True)
    if crossing is not None:
        cost = 1 / max(crossing, 1e-9) if crossing < _NEVER else 1.0
    elif few and device.type == "cuda" and tuple(block_size) == (1, 1):
        return single_weights_on_gpu(density, dtype.itemsize, tokens, weights)
    else:
        wide = next(cost for side, cost in _MODELLED_COSTS if min(block_size) >= side)
        cost = _FEW_ROWS.get(block_size[0], wide)
    return density * cost + _CALL / max(tokens * weights, 1)


def single_weights_lines(density: float, width: int, tokens: int) -> float:
    """Lines of the L1 cache that 32 packed single weights of a row read: of x, and of themselves and their columns.

    Args:
        density: kept weights / weights, which lie anywhere.
        width: bytes of a weight.
        tokens: rows of the input.
    """
    of_x = min(_LANES, 1 + _LANES * width / (_LINE * max(density, 1e-9)))
    return tokens * of_x + 2 * math.ceil(tokens / TOKEN_GROUP)


def single_weights_on_gpu(density: float, width: int, tokens: int, weights: int) -> float:
    """Time / time of the dense product, which reads all weights: by the bytes and lines that each reads at least.

    An L1 cache reads a line in a clock.
    """
    kept = density * weights
    lines = kept / _LANES * single_weights_lines(density, width, tokens)
    ours = max(1e6 * kept * (width + _COLUMN) / BANDWIDTH, 1e6 * lines / (PROCESSORS * CLOCK))
    return (LAUNCH + ours) / (LAUNCH + 1e6 * weights * width / BANDWIDTH)


def whole_block(device: torch.device, dtype: torch.dtype, tokens: int) -> tuple[int, int] | None:
    """The block in which a product with the whole weight is measurably faster than the dense product; None: in none."""
    return _whole_block(device, dtype, tokens <= FEW_TOKENS)


@contextmanager
def using(surface: Surface) -> Iterator[None]:
    """Take this surface for every device, in this process: to compare."""
    _forced.append(surface)
    _forget()
    try:
        yield
    finally:
        _forced.pop()
        _forget()


_forced: list[Surface] = []


def _forget() -> None:
    _threshold.cache_clear()
    _whole_block.cache_clear()


@cache
def _whole_block(device: torch.device, dtype: torch.dtype, few: bool) -> tuple[int, int] | None:
    known = [(c.whole, c.rows, c.columns) for c in _entries(device, dtype, few, False) if c.whole is not None]
    whole, *block = min(known, default=(_NEVER, 0, 0))
    return (block[0], block[1]) if whole < _SURELY else None


def _entries(device: torch.device, dtype: torch.dtype, few: bool, packed: bool) -> list[Crossing]:
    measured = str(dtype).removeprefix("torch."), few, packed
    return [c for c in _surface(device_kind(device)) if (c.dtype, c.few, c.packed) == measured]


@cache
def _threshold(
    device: torch.device, dtype: torch.dtype, block_size: tuple[int, int], few: bool, packed: bool
) -> float | None:
    """The density above which the dense product is faster, _NEVER if it is not; None: it was not measured.

    For packed blocks that were not measured, what was found of blocks that are not packed, which take longer.
    """
    rows, columns = block_size
    narrow = min(block_size) < _NARROW  # these have kernels of their own
    entries = [c for c in _entries(device, dtype, few, packed) if (min(c.rows, c.columns) < _NARROW) == narrow]
    if packed and narrow and device.type == "cuda":  # there, each kind has a kernel of its own
        entries = [c for c in entries if (c.rows, c.columns) == (rows, columns)]
    if not entries:
        return _threshold(device, dtype, block_size, few, False) if packed else None
    # the nearest block measured, by its area and then its shape
    nearest = min(entries, key=lambda c: (abs(math.log(c.rows / rows)) + abs(math.log(c.columns / columns)), c.rows))
    return _NEVER if nearest.density is None else nearest.density


def _surface(kind: str) -> Surface:
    if _forced:
        return _forced[-1]
    return load().get(kind, ())


def device_kind(device: torch.device) -> str:
    """What a surface belongs to: the GPU's name, or the CPU's architecture and vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def cache_file() -> Path:
    """Where `spartan.tune` writes: SPARTAN_TUNE_CACHE, or break_even.json in the user's cache directory."""
    named = os.environ.get("SPARTAN_TUNE_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spartan-kernels" / "break_even.json"


def load() -> dict[str, Surface]:
    """The surfaces of the user's cache by kind of device; none where there is no file, or one that is damaged."""
    return read_json(cache_file(), "a break-even cache", lambda entry: checked(Crossing, entry))


def store(kind: str, surface: Surface) -> Path:
    """Write the surface of one kind of device beside the others in the user's cache, and use it from now on."""
    path = cache_file()
    surfaces: Mapping[str, Surface] = {**load(), kind: surface}
    write_json(path, {k: [asdict(c) for c in entries] for k, entries in surfaces.items()})
    _forget()
    return path


def read_json(path: Path, what: str, parse: Callable[[Any], Entry]) -> dict[str, tuple[Entry, ...]]:
    """The entries of a file of the user's cache by kind of device; none where there is no file.

    A file that is not `what` is left unused with one warning that names it: it makes products faster, not possible.
    """
    try:
        if not path.is_file():
            if path.exists():
                raise ValueError("not a regular file")
            return {}
        text = path.read_text(encoding="utf-8")
        return {kind: tuple(parse(entry) for entry in entries) for kind, entries in json.loads(text).items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError) as error:
        _warn_once(f"{path} is not {what} ({error}) and is not used; delete it or run spartan.tune()")
        return {}


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def checked(kind: type[Entry], entry: Any) -> Entry:
    """The dataclass that a dictionary describes.

    Raises:
        TypeError, ValueError: names or types that are not its fields', numbers that are negative or not finite.
    """
    made = kind(**entry)
    hints = get_type_hints(kind)
    for field in fields(made):  # type: ignore[arg-type]
        value, hint = getattr(made, field.name), hints[field.name]
        allowed = get_args(hint) or (hint,)
        allowed += (int,) if float in allowed else ()
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise TypeError(f"{field.name} is {value!r}")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise ValueError(f"{field.name} is {value!r}")
    return made


def write_json(path: Path, content: Any) -> None:
    """Write a file of the user's cache, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)  # a reader sees the old file or the new one


def dense_convolution_wins(x: torch.Tensor, weight: torch.Tensor, density: float, side: int) -> bool:
    """Whether a convolution of x on a CPU is faster with all of the weight than with a fraction of its blocks.

    Args:
        x: the image.
        weight: the weight, all of it.
        density: active blocks / blocks.
        side: outputs of a block: its rows for y, its columns for the gradient of x.
    """
    if not weight.numel():
        return True
    return _convolution_time(density, weight.shape, side, x.permute(0, 2, 3, 1).is_contiguous()) > 1


def dense_convolution_on_gpu(side: int) -> bool:
    """Whether a GPU convolves with all of the weight, where each element of the image would serve `side` outputs.

    By bytes from the L2 cache (5.5 TB/s of an H100), 16 outputs allow 88 TFLOP/s of bfloat16: a tenth of the blocks is
    then faster than the dense convolution at its usual 600, and narrower blocks are slower. Nobody reads the density.
    """
    return side < _GPU_SIDE


def packed_convolution_time(density: float, shape: Sequence[int], side: int, last: bool, tokens: int) -> float:
    """Time of a convolution on a CPU with packed blocks / time of the dense one, as a model says.

    Args:
        density: stored blocks / blocks.
        shape: of the dense weight, which has entries.
        side: outputs of a block.
        last: whether the channels of its image lie side by side.
        tokens: pixels of its result.
    """
    return _convolution_time(density, shape, side, last) + _CALL / max(tokens * math.prod(shape), 1)


def _convolution_time(density: float, shape: Sequence[int], side: int, last: bool) -> float:
    out, in_, *kernel = shape
    each = _COPY_COST if not last else _PLACE_COST if kernel == [1, 1] else _LAST_COST
    kept = _KEPT_COST[0] + _KEPT_COST[1] * (16 / side) ** _KEPT_COST[2]
    return kept * density + each * (out + in_) / math.prod(shape)
