"""Encodings of a sparse tensor: which of its bits are kept, and the bits. All are exact, negative zeros included.

Weights that were rounded to 8 bits before are saved as that: numbers, and scales by outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from spartan_kernels import BlockSparseFilter, BlockSparseWeight
from spartan_kernels.arguments import block_shape
from spartan_kernels.float8 import FLOAT8

__all__ = ["ENCODINGS", "Packed", "block_activity", "expected_parts", "pack", "pack_blocks", "unpack", "unpack_blocks"]

ENCODINGS = ("dense", "bitmap", "index", "blocks", "float8")
_PARTS = {
    "dense": ("values",),
    "bitmap": ("bitmap", "values"),
    "index": ("index", "values"),
    "blocks": ("bitmap", "values"),
    "float8": ("bitmap", "values", "scales"),
}
_SQUARES = (4, 8, 16, 32, 64, 128)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Packed:
    """A tensor as saved.

    Attributes:
        encoding: one of `ENCODINGS`.
        parts: its tensors; `values` has the dtype of the original, but for "float8".
        block_size: (rows, columns), for "blocks" and "float8".
    """

    encoding: str
    parts: dict[str, torch.Tensor]
    block_size: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """What its tensors take."""
        return sum(part.nbytes for part in self.parts.values())


def expected_parts(encoding: str) -> tuple[str, ...]:
    """Names of the tensors of an encoding."""
    return _PARTS[encoding]


def pack(tensor: torch.Tensor, block_size: int | tuple[int, int] | None = None, dense: bool = False) -> Packed:
    """`tensor` in the smallest of its encodings, or dense; block sizes to try are `block_size`, or squares."""
    tensor = tensor.contiguous()
    if dense or not tensor.is_floating_point() or tensor.numel() == 0:
        return Packed("dense", {"values": tensor.clone()})
    nonzero = _bits(tensor).reshape(-1) != 0
    count, width = int(nonzero.sum()), tensor.element_size()
    index_dtype = torch.int32 if tensor.numel() <= torch.iinfo(torch.int32).max else torch.int64
    sizes: dict[tuple[str, tuple[int, int] | None], int] = {
        ("dense", None): tensor.numel() * width,
        ("bitmap", None): math.ceil(tensor.numel() / 8) + count * width,
        ("index", None): count * (width + index_dtype.itemsize),
    }
    if tensor.dim() >= 2:
        squares = [(side, side) for side in _SQUARES] if block_size is None else [block_shape(block_size)]
        for block in squares:
            active = block_activity(nonzero.view(tensor.shape), block)
            stored = int(active.sum()) * block[0] * block[1]
            sizes["blocks", block] = math.ceil(active.numel() / 8) + stored * width
    encoding, chosen = min(sizes, key=lambda key: sizes[key])
    if encoding == "dense":
        return Packed("dense", {"values": tensor.clone()})
    values = tensor.reshape(-1)[nonzero]
    if encoding == "bitmap":
        return Packed("bitmap", {"bitmap": _to_bitmap(nonzero), "values": values})
    if encoding == "index":
        return Packed("index", {"index": nonzero.nonzero().reshape(-1).to(index_dtype), "values": values})
    assert chosen is not None
    tiles = _tiles(tensor, chosen)
    active = block_activity(nonzero.view(tensor.shape), chosen)
    return Packed("blocks", {"bitmap": _to_bitmap(active), "values": tiles[active].contiguous()}, chosen)


def unpack(packed: Packed, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The tensor of this shape and dtype that was packed.

    Raises:
        ValueError: parts that do not fit the shape, the dtype or one another.
    """
    values = packed.parts["values"]
    if values.dtype != dtype:
        raise ValueError(f"values are {values.dtype}, not {dtype}")
    if packed.encoding == "dense":
        if values.shape != shape:
            raise ValueError(f"values have shape {tuple(values.shape)}, not {tuple(shape)}")
        return values
    if packed.encoding == "blocks":
        return _unpack_blocks(packed, shape)
    flat = values.new_zeros(math.prod(shape))
    if packed.encoding == "bitmap":
        kept = _from_bitmap(packed.parts["bitmap"], flat.numel())
        _require_count(values, int(kept.sum()))
        flat[kept] = values
    else:
        index = packed.parts["index"].to(torch.int64)
        _require_count(values, index.numel())
        rising = index.dim() == 1 and bool((index.diff() > 0).all())
        if not rising or (index.numel() and not 0 <= int(index[0]) <= int(index[-1]) < flat.numel()):
            raise ValueError(f"index is not increasing in [0, {flat.numel()})")
        flat[index] = values
    return flat.view(shape)


def pack_blocks(weight: BlockSparseWeight | BlockSparseFilter) -> Packed:
    """The stored blocks of a packed weight, or its values alone where these are fewer and tell the blocks."""
    if isinstance(weight, BlockSparseFilter):  # in the order of the grid
        active = weight.mask().cpu()
        values = _tiles(weight.to_dense().detach().cpu(), weight.block_size)[active]
    else:
        active, values = weight.layout.mask().cpu(), weight.values.detach().cpu()
    blocks = Packed("blocks", {"bitmap": _to_bitmap(active), "values": values.clone()}, weight.block_size)
    if isinstance(weight, BlockSparseWeight) and weight.scales is not None:
        return Packed("float8", {**blocks.parts, "scales": weight.scales.cpu().clone()}, weight.block_size)
    if not bool((values != 0).flatten(1).any(1).all()):  # a block of zeros is known by nothing else
        return blocks
    smallest = pack(weight.to_dense().detach().cpu(), weight.block_size)
    return smallest if smallest.nbytes < blocks.nbytes else blocks


def unpack_blocks(packed: Packed, shape: torch.Size, dtype: torch.dtype) -> BlockSparseWeight | BlockSparseFilter:
    """The packed weight of this shape and dtype that "blocks" or "float8" are of.

    Raises:
        ValueError: parts that do not fit the shape, the dtype or one another.
    """
    values, scales = packed.parts["values"], packed.parts.get("scales")
    expected = dtype if scales is None else FLOAT8
    if values.dtype != expected or len(shape) not in (2, 4):
        raise ValueError(
            f"values are {values.dtype} of a weight of shape {tuple(shape)}, not {expected} of a matrix or 2-d"
            " convolution"
        )
    active = _active_blocks(packed, shape)
    if len(shape) == 4:
        assert packed.block_size is not None
        return BlockSparseFilter.from_dense(_unpack_blocks(packed, shape), packed.block_size, active)
    offsets = functional.pad(active.sum(1).cumsum(0), (1, 0))
    index = offsets, active.nonzero()[:, 1], (shape[0], shape[1])
    return BlockSparseWeight.from_blocks(values, *index, scales, None if scales is None else dtype)


def _active_blocks(packed: Packed, shape: torch.Size) -> torch.Tensor:
    """Which blocks are stored, as bool [grid rows, grid columns, *rest]."""
    values, block = packed.parts["values"], packed.block_size
    assert block is not None
    rows, columns = block
    grid = (math.ceil(shape[0] / rows), math.ceil(shape[1] / columns), *shape[2:])
    active = _from_bitmap(packed.parts["bitmap"], math.prod(grid)).view(grid)
    if values.shape != (int(active.sum()), rows, columns):
        raise ValueError(f"values have shape {tuple(values.shape)}, not {(int(active.sum()), rows, columns)}")
    return active


def _unpack_blocks(packed: Packed, shape: torch.Size) -> torch.Tensor:
    values, block = packed.parts["values"], packed.block_size
    assert block is not None
    rows, columns = block
    active = _active_blocks(packed, shape)
    grid = active.shape
    tiles = values.new_zeros(*grid, rows, columns)
    tiles[active] = values
    # [grid rows, grid columns, *rest, rows, columns] -> [out, in, *rest]
    back = tiles.movedim(-2, 1).movedim(-1, 3)
    full = back.reshape(grid[0] * rows, grid[1] * columns, *shape[2:])
    return full[: shape[0], : shape[1]].contiguous()


def _tiles(tensor: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[out, in, *rest] padded with zeros and cut to [grid rows, grid columns, *rest, rows, columns]."""
    rows, columns = block
    out, in_, *rest = tensor.shape
    padded = tensor.new_zeros(math.ceil(out / rows) * rows, math.ceil(in_ / columns) * columns, *rest)
    padded[:out, :in_] = tensor
    split = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns, *rest)
    return split.movedim(3, -1).movedim(1, -2)


def block_activity(nonzero: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Which blocks hold a nonzero."""
    return _tiles(nonzero, block).flatten(-2).any(-1)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _to_bitmap(flags: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(flags.reshape(-1).numpy()))


def _from_bitmap(bitmap: torch.Tensor, count: int) -> torch.Tensor:
    if bitmap.dtype != torch.uint8 or bitmap.shape != (math.ceil(count / 8),):
        raise ValueError(f"bitmap is {bitmap.dtype} of shape {tuple(bitmap.shape)}, not {math.ceil(count / 8)} bytes")
    bits = np.unpackbits(bitmap.numpy())
    if bits[count:].any():
        raise ValueError("bitmap has bits past its end")
    return torch.from_numpy(bits[:count].astype(bool))


def _require_count(values: torch.Tensor, count: int) -> None:
    if values.shape != (count,):
        raise ValueError(f"values have shape {tuple(values.shape)}, not ({count},)")
