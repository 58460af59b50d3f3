"""Lines of blocks of a convolution on Triton: launches and their sizes. Kernels are in masked_conv_kernels.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton

from spartan_kernels.backends.triton import masked_conv_kernels as kernels
from spartan_kernels.backends.triton.configs import power_of_two
from spartan_kernels.backends.triton.launches import Launch, start
from spartan_kernels.backends.triton.product_launches import pointer_or
from spartan_kernels.backends.triton.product_plan import ProductPlan, kind_of, precision_of
from spartan_kernels.precision import tf32_of_convolutions
from spartan_kernels.tiles import Tile, architecture_of, default_tile

_FEW_PROGRAMS = 256  # under which tiles are made lower
_LOWEST = 64  # pixels of a tile that the tensor cores take whole
_SCATTERED = 128  # pixels, or channels of a weight gradient, where elements are loaded one by one
_SAMPLED_PROGRAMS = 2048  # that a weight gradient with every block would have: of a tenth, enough for a GPU
_MOST_PARTS = 64
_PART_BYTES = 64 << 20  # of memory for the parts of all blocks
_BLOCKS_TILE = 2048
STORED_BLOCK = 256


class Walk(NamedTuple):
    """Which pixel of the source a kernel position brings to a pixel of the result, along (height, width) each.

    To pixel `phase + jump * u` of the result it brings pixel `step * u + (phase + base + walk * position) / jump`.

    Attributes:
        kernel: size of the kernel.
    """

    kernel: tuple[int, int]
    step: tuple[int, int]
    jump: tuple[int, int]
    base: tuple[int, int]
    walk: tuple[int, int]

    @staticmethod
    def of_output(o: Any, kernel: Any) -> Walk:
        """Of a convolution."""
        return Walk(_pair(kernel), _pair(o.stride), (1, 1), _pair(-p for p in o.padding), _pair(o.dilation))

    @staticmethod
    def of_input(o: Any, kernel: Any) -> Walk:
        """Of its gradient for the image, which is one of the gradient of its result."""
        return Walk(_pair(kernel), (1, 1), _pair(o.stride), _pair(o.padding), _pair(-d for d in o.dilation))

    @property
    def positions(self) -> int:
        """Of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def phases(self) -> int:
        """Sets of pixels that the same kernel positions reach."""
        return self.jump[0] * self.jump[1]

    @property
    def shifts(self) -> tuple[int, ...]:
        """What kernels compute the place of a kernel position from."""
        return (*self.base, *self.walk, *self.jump)


class Lines(NamedTuple):
    """Active blocks by lines, those of a phase after those of the one before.

    Attributes:
        offsets, indices, order: as `block_layout` returns them of rows.
        span, other: sides of a block, along the results and along the sum.
        extent, other_extent: channels of the result and of the source.
        position_first: whether an index is position * blocks + block, or block * positions + position.
    """

    offsets: torch.Tensor
    indices: torch.Tensor
    order: torch.Tensor
    span: int
    other: int
    extent: int
    other_extent: int
    position_first: bool

    @property
    def blocks(self) -> int:
        """Along the sum, at one kernel position."""
        return triton.cdiv(self.other_extent, self.other)

    def inner(self, walk: Walk) -> int:
        """What an index counts first: kernel positions, or blocks."""
        return self.blocks if self.position_first else walk.positions

    @property
    def of_phase(self) -> int:
        """Lines of one phase."""
        return triton.cdiv(self.extent, self.span)


def _pair(sides: Any) -> tuple[int, int]:
    height, width = sides
    return int(height), int(width)


def gathered(
    lines: Lines,
    walk: Walk,
    data: torch.Tensor,
    strides: tuple[int, ...],
    gate: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The active blocks of a weight in the order of the lines, times their gates, [n, span, other]; and their places.

    Args:
        lines: of blocks.
        walk: of the convolution.
        data: the weight.
        strides: of data, from one result and one term of the sum to the next, and by the kernel; then of the gate, from
            one line of a phase and one block to the next.
        gate: float32, without gaps.
    """
    blocks = torch.empty((gate.numel(), lines.span, lines.other), dtype=data.dtype, device=data.device)
    return blocks, _placed(lines, walk, "weight", data, gate, gate, blocks, strides)


def reordered(
    lines: Lines, walk: Walk, values: torch.Tensor, stored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed blocks [n, other, span] in the order of the lines, [n, span, other]; and their places.

    stored: int32 [lines, indices], one more than where each block lies.
    """
    blocks = torch.empty((values.shape[0], lines.span, lines.other), dtype=values.dtype, device=values.device)
    strides = 1, lines.span, 0, 0, stored.shape[1], 0
    return blocks, _placed(lines, walk, "packed", values, values, stored, blocks, strides)


def placed(lines: Lines, walk: Walk, values: torch.Tensor) -> torch.Tensor:
    """The places of packed blocks [n, span, other] that lie in the order of the lines."""
    return _placed(lines, walk, "", values, values, values, values, (0,) * 6)


def _placed(
    lines: Lines, walk: Walk, source: str, data: Any, gate: Any, stored: Any, blocks: Any, strides: tuple[int, ...]
) -> torch.Tensor:
    """Places [n, 3] of `blocks`: first channel, and how far rows and columns lie off; fills `blocks` from a source."""
    places = torch.empty((blocks.shape[0], 3), dtype=torch.int32, device=data.device)
    tile = blocks_tile(lines.span, lines.other)
    tiles = triton.cdiv(lines.blocks * walk.positions * lines.other, tile["BLOCK_K"])
    programs = lines.of_phase * walk.phases * tiles
    if programs:
        arguments = (
            data, gate, stored, blocks, places, lines.offsets, lines.indices, tiles, lines.of_phase, lines.extent,
            lines.other_extent, lines.inner(walk), walk.kernel[1], *walk.shifts, *strides,
        )  # fmt: skip
        options = {"POSITION_FIRST": lines.position_first, "SOURCE": source, **tile}
        start(Launch(kernels._conv_blocks_kernel, programs, arguments, options))
    return places


def blocks_tile(span: int, other: int) -> dict[str, Any]:
    """Of what gathers blocks."""
    block_n = min(64, power_of_two(span))
    block_k = min(max(_BLOCKS_TILE // block_n, 32), 512)
    return {"SPAN": span, "OTHER": other, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4}


def precision_of_convolution(image: torch.Tensor) -> str:
    """How its float32 is multiplied: PyTorch's switch for TF32 in convolutions."""
    if image.dtype != torch.float32:
        return precision_of(image)
    return "tf32" if tf32_of_convolutions() else "ieee"


def convolved(
    source: torch.Tensor,
    lines: Lines,
    walk: Walk,
    blocks: torch.Tensor,
    places: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """The convolution of `source` with the blocks of lines, in `out`."""
    images, _, height, width = out.shape
    rows, columns = (triton.cdiv(side, jump) for side, jump in zip((height, width), walk.jump, strict=True))
    precision = precision_of_convolution(source)
    tile = convolution_tile(
        architecture_of(source.device), images * rows * columns, lines.of_phase * walk.phases, lines.span, lines.other,
        kind_of(source.dtype, precision), are_scattered(lines.other, source),
    )  # fmt: skip
    plan = ProductPlan(
        images * rows * columns, lines.extent, lines.other_extent, lines.span, lines.other, source.element_size(), tile
    )
    arguments = (
        source, blocks, places, pointer_or(bias, source), out, lines.order, lines.offsets,
        images, *_divisors(rows, columns), plan.lines * walk.phases, plan.lines, plan.group,
        plan.extent, plan.other_extent, *source.shape[2:], height, width, *walk.step, *walk.jump,
        *source.stride(), *out.stride(),
    )  # fmt: skip
    options = {
        "SPAN": lines.span, "OTHER": lines.other, "APART": source.stride(1) != 1, "APART_OUT": out.stride(1) != 1,
        "HAS_BIAS": bias is not None, "PRECISION": precision, **tile_options(tile),
    }  # fmt: skip
    start(Launch(kernels._conv_product_kernel, plan.tiles * walk.phases, arguments, options))
    return out


def _divisors(rows: int, columns: int) -> tuple[int, ...]:
    """Pixels of an image and of a row of it; with each the two numbers by which kernels divide by it."""
    return (rows * columns, *multiplier(rows * columns), columns, *multiplier(columns))


def multiplier(divisor: int) -> tuple[int, int]:
    """(m, s) with n // divisor = n * m // 2^32 // 2^s for 0 <= n < 2^31, where divisor > 1; m as an int32.

    From m = ceil(2^(31 + l) / divisor), l = ceil(log2(divisor)): the error n (m divisor - 2^(31 + l)) / divisor /
    2^(31 + l) is less than 1 / divisor. (T. Granlund, P. Montgomery, Division by Invariant Integers using
    Multiplication, 1994.)
    """
    length = max(1, (divisor - 1).bit_length())
    m = min(-(-(1 << (31 + length)) // divisor), (1 << 32) - 1)
    return m - (m >> 31 << 32), length - 1


def tile_options(tile: Tile) -> dict[str, int]:
    """As these kernels take it."""
    return {name: value for name, value in tile.options().items() if name != "TMA"}


def convolution_tile(
    architecture: int, pixels: int, lines: int, span: int, other: int, kind: str, scattered: bool
) -> Tile:
    """That of a product with as many tokens; of fewer pixels where that would be too few programs.

    A step that lies in one block has one place, and that costs less than deeper steps save.
    """
    tile = default_tile(architecture, min(pixels, _SCATTERED) if scattered else pixels, span, kind)
    while tile.BLOCK_M > _LOWEST and -(-pixels // tile.BLOCK_M) * lines * -(-span // tile.BLOCK_N) < _FEW_PROGRAMS:
        tile = default_tile(architecture, tile.BLOCK_M // 2, span, kind)
    depth = min(tile.BLOCK_K, other & -other)
    tile = tile if depth < 32 else replace(tile, BLOCK_K=depth)
    return _for_single_loads(tile) if scattered else tile


def sampled_tile(architecture: int, depth: int, span: int, kind: str, scattered: bool) -> Tile:
    """Channels of a line in place of tokens: entries share what a step reads of dz."""
    tile = default_tile(architecture, min(_SCATTERED, depth), span, kind)
    return _for_single_loads(tile) if scattered else tile


def are_scattered(other: int, *images: torch.Tensor) -> bool:
    """Whether elements are loaded one by one: where channels lie apart in memory, or not in runs that begin evenly."""
    return other % 8 != 0 or any(
        channel != 1 or bool(n % 16 or height % 16 or width % 16)
        for n, channel, height, width in (image.stride() for image in images)
    )


def _for_single_loads(tile: Tile) -> Tile:
    """With fewer elements for each thread, which has an address and a comparison for each."""
    deep = min(tile.BLOCK_K, 32)
    return replace(tile, BLOCK_K=deep, num_warps=8 if tile.BLOCK_M * deep >= _SCATTERED * 32 else tile.num_warps)


def sampled_parts(dz: torch.Tensor, x: torch.Tensor, lines: Lines, walk: Walk, capacity: int) -> torch.Tensor:
    """x dz on the active blocks, in parts of a sum over pixels: float32 [parts, n, span, other]."""
    images, _, rows, columns = dz.shape
    precision = precision_of_convolution(x)
    depth = lines.blocks * walk.positions * lines.other
    kind, scattered = kind_of(x.dtype, precision), are_scattered(lines.other, x, dz)
    tile = sampled_tile(architecture_of(x.device), depth, lines.span, kind, scattered)
    tiles, pieces = triton.cdiv(depth, tile.BLOCK_M), triton.cdiv(lines.span, tile.BLOCK_N)
    programs, size = lines.of_phase * tiles * pieces, capacity * lines.span * lines.other
    steps = triton.cdiv(images * rows * columns, tile.BLOCK_K)
    most = min(_MOST_PARTS, max(1, _PART_BYTES // max(1, 4 * size)), max(1, steps))
    split = min(most, triton.cdiv(_SAMPLED_PROGRAMS, max(1, programs)))
    parts = torch.empty((split, capacity, lines.span, lines.other), dtype=torch.float32, device=x.device)
    arguments = (
        dz, x, parts, lines.order, lines.offsets, lines.indices, images, *_divisors(rows, columns), lines.of_phase,
        tiles, lines.extent, lines.other_extent, *x.shape[2:],
        lines.inner(walk), walk.kernel[1], *walk.step, *walk.base, *walk.walk,
        size, *dz.stride(), *x.stride(),
    )  # fmt: skip
    options = {
        "SPAN": lines.span, "OTHER": lines.other, "POSITION_FIRST": lines.position_first,
        "APART_Z": dz.stride(1) != 1, "APART": x.stride(1) != 1, "SPLIT": split, "PRECISION": precision,
        **tile_options(tile),
    }  # fmt: skip
    if programs:
        start(Launch(kernels._conv_sampled_kernel, (programs, split), arguments, options))
    return parts
