"""Tiles in which a GPU multiplies with active blocks: a default for each architecture, or what `spartan.tune` found.

A tile is BLOCK_M tokens by BLOCK_N outputs, summed in steps of BLOCK_K, by num_warps warps with num_stages steps under
way. Where BLOCK_N is more than a block has, neighbouring lines of blocks share a program, if the product allows it.
With TMA, tokens are copied to shared memory by the processor's copy engine where blocks and strides allow it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from spartan_kernels.break_even import FEW_TOKENS, cache_file, checked, device_kind, read_json, write_json

__all__ = ["Tile", "TunedTile", "candidates", "default_tile", "store_tiles", "tile_for", "tiles_file", "using"]

BLACKWELL = 100  # from here on they add 8-bit products in float32, in a memory of their own
HOPPER = 90  # from here on the tensor cores read both operands from shared memory
MANY_TOKENS = 2048  # from here on a program may take 512, and gates are worth a pass of their own over the weights


@dataclass(frozen=True)
class Tile:
    """How a product is cut: see the module."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int = 3
    TMA: bool = False

    def options(self) -> dict[str, int]:
        """As a launch takes it."""
        return asdict(self)


@dataclass(frozen=True)
class TunedTile:
    """The fastest tile that was found for one class of products.

    Attributes:
        kind: "float32", "tf32", "bfloat16", "float16" or "float8".
        span, other: sides of a block, along the outputs and along the sum.
        few: whether this was measured with few tokens (at most 16) or with many.
    """

    kind: str
    span: int
    other: int
    few: bool
    tile: Tile


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@cache
def default_tile(architecture: int, tokens: int, span: int, kind: str) -> Tile:
    """The tile of a product on a GPU of compute capability `architecture` / 10 (0: of another maker).

    Tokens are on the side of 64 and more rows, so that small blocks use the tensor cores fully. Where the sums leave
    the registers room, a tile has 256 tokens, or 512 at blocks of 64: that divides how often weights come from the L2
    cache, for which larger blocks have no registers. Blocks of 8 and 16 are bound by how often x comes: lines of 128
    outputs share it. Five stages are three steps in
    shared memory: the index of a step is loaded two stages before its operands are multiplied. Without tensor cores
    (float32 in full precision) operands are held in registers as well, and tiles are smaller.

    In 8 bits weights are packed, so lines share nothing. Before Blackwell the sums of a step are held beside all the
    others, to which they are added, and tiles have half the outputs.
    """
    cores, width = kind != "float32", {"float32": 4, "tf32": 4, "float8": 1}.get(kind, 2)
    most = 128 if cores else 64
    wide = architecture >= HOPPER and width <= 2 and tokens > 128
    block_m = min(256 if wide else most, max(16, power_of_two(tokens)))
    block_n = min(most, max(16, power_of_two(span)))
    outputs = block_m * block_n
    if wide and width == 2 and tokens >= MANY_TOKENS:
        block_m, block_n = 512 if block_n == 64 else block_m, 128 if 8 <= span <= 16 else block_n
    if wide and width == 1 and architecture < BLACKWELL:
        block_m = min(block_m, (1 << 14) // block_n)
    if wide:
        return Tile(block_m, block_n, 128 // width, 8, 5)
    block_k = 128 // width if cores else 16
    return Tile(block_m, block_n, block_k, 8 if outputs >= (8192 if cores else 4096) else 4)


def candidates(architecture: int, tokens: int, span: int, other: int, kind: str) -> list[Tile]:
    """The default, then the tiles that may be faster: what a search measures."""
    first = default_tile(architecture, tokens, span, kind)
    m, n, k, warps, stages = first.BLOCK_M, first.BLOCK_N, first.BLOCK_K, first.num_warps, first.num_stages
    tiles = [first, *(Tile(m, n, k, w, s) for w in (4, 8) for s in (2, 3, 4, 5))]
    tiles += [Tile(m, n, depth, warps, stages) for depth in (k // 2, 2 * k) if depth >= 16]
    if n > max(16, power_of_two(span)):  # lines of blocks each by itself
        tiles += [Tile(m, 16, k, w, s) for w in (4, 8) for s in (3, 5)]
    if m > 64:
        tiles += [Tile(m // 2, n, k, w, s) for w in (4, 8) for s in (3, 4)]
    if architecture >= HOPPER:
        tiles += [replace(t, TMA=True) for t in tiles if other % t.BLOCK_K == 0]
    return list(dict.fromkeys(tiles))


_forced: list[Tile] = []


@contextmanager
def using(tile: Tile) -> Iterator[None]:
    """Every product takes this tile, in this process: for a search."""
    _forced.append(tile)
    try:
        yield
    finally:
        _forced.pop()


def tile_for(device: torch.device, tokens: int, span: int, other: int, kind: str) -> Tile:
    """What a product is launched with: as measured on this device, else the default."""
    if _forced:
        return _forced[-1]
    tuned = _tuned(device.type, device.index, span, other, kind, tokens <= FEW_TOKENS)
    if tuned is not None and tuned.BLOCK_M <= max(16, power_of_two(tokens)):  # found with many more tokens, maybe
        return tuned
    return default_tile(architecture_of(device), tokens, span, kind)


@cache
def architecture_of(device: torch.device) -> int:
    """Ten times the compute capability; 0 where there is none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _tuned(kind_of_device: str, index: int | None, span: int, other: int, kind: str, few: bool) -> Tile | None:
    name = device_kind(torch.device(kind_of_device if index is None else f"{kind_of_device}:{index}"))
    wanted = (kind, span, other, few)
    found = (t.tile for t in load_tiles().get(name, ()) if (t.kind, t.span, t.other, t.few) == wanted)
    return next(found, None)


def tiles_file() -> Path:
    """Where `spartan.tune` writes tiles: beside the break-even densities."""
    path = cache_file()
    return path.with_name(f"{path.stem}-tiles{path.suffix}")


def load_tiles() -> dict[str, tuple[TunedTile, ...]]:
    """The tiles of the user's cache by kind of device; none where there is no file, or one that is damaged."""
    return read_json(tiles_file(), "a cache of tiles", _parsed)


def _parsed(entry: dict[str, object]) -> TunedTile:
    return checked(TunedTile, {**entry, "tile": checked(Tile, entry["tile"])})


def store_tiles(kind_of_device: str, tiles: tuple[TunedTile, ...]) -> Path:
    """Write the tiles of one kind of device beside the others in the user's cache, and use them from now on."""
    everything = {**load_tiles(), kind_of_device: tiles}
    write_json(tiles_file(), {kind: [asdict(t) for t in entries] for kind, entries in everything.items()})
    _tuned.cache_clear()
    return tiles_file()
