"""How a product of active blocks is launched: programs, their order, and the bytes that they move."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spartan_kernels.precision import tf32
from spartan_kernels.tiles import Tile, power_of_two

_FEW_PROGRAMS = 256  # under which a sum is split between programs
_MOST_PARTS = 16
_GROUP_BYTES = 16 << 20  # of x that stay in the L2 cache, beside weights and outputs
_MOST_GROUPED = 16


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def precision_of(x: torch.Tensor) -> str:
    """How float32 is multiplied: PyTorch's switch for TF32."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return "widened"
    return "tf32" if x.dtype == torch.float32 and tf32() else "ieee"


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """What the tiles of a product depend on: its dtype, or "tf32"."""
    return "tf32" if precision == "tf32" else str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Traffic:
    """What a product asks for: floating-point operations, and bytes.

    Attributes:
        x_bytes, weight_bytes: into the multiprocessors, from the L2 cache.
        y_bytes: written.
        memory_bytes: read from device memory, where the L2 cache holds the tokens of a group but not the weights.
    """

    flops: int
    x_bytes: int
    weight_bytes: int
    y_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class ProductPlan:
    """A product with lines of blocks of (span outputs, other columns), `extent` by `other_extent`, of `tokens`.

    All lines, the longest first, are multiplied with `group` tiles of tokens, which the L2 cache holds, before the next
    group: tokens come from device memory once, and weights once for each group.

    Attributes:
        tile: what one program multiplies.
        tiles: programs of a sum.
        split: programs that share one sum.
        group: tiles of tokens that are multiplied with every line before the next ones are.
    """

    tokens: int
    extent: int
    other_extent: int
    span: int
    other: int
    width: int
    tile: Tile

    @property
    def lines(self) -> int:
        """Rows of blocks, or columns of blocks of an input gradient."""
        return _ceil_div(self.extent, self.span)

    @property
    def pieces(self) -> int:
        """Tiles that share the outputs of a block."""
        return _ceil_div(self.span, self.tile.BLOCK_N)

    @property
    def token_tiles(self) -> int:
        """Tiles that share the tokens."""
        return _ceil_div(self.tokens, self.tile.BLOCK_M)

    @property
    def tiles(self) -> int:
        """Programs of one part of the sum."""
        return self.token_tiles * self.lines * self.pieces

    @property
    def split(self) -> int:
        """Programs that share one sum, where there are too few tiles to fill a GPU."""
        most = max(1, _ceil_div(self.other_extent, self.tile.BLOCK_K))
        return min(_MOST_PARTS, most, _ceil_div(_FEW_PROGRAMS, self.tiles)) if self.tiles < _FEW_PROGRAMS else 1

    @property
    def group(self) -> int:
        """Tiles of tokens that stay in the L2 cache together."""
        bytes_of_tile = self.tile.BLOCK_M * max(self.other_extent, 1) * self.width
        return max(1, min(_MOST_GROUPED, _GROUP_BYTES // bytes_of_tile))

    def traffic(self, active: int) -> Traffic:
        """What `active` blocks cost.

        A tile of outputs reads the active columns of its tokens: each element of x that comes from the L2 cache serves
        min(outputs of a block, BLOCK_N) outputs, and each weight BLOCK_M tokens. That bounds a product with small
        blocks.
        """
        weights = active * self.span * self.other
        groups = _ceil_div(self.token_tiles, self.group)
        return Traffic(
            flops=2 * self.tokens * weights,
            x_bytes=self.tokens * active * self.other * self.pieces * self.width,
            weight_bytes=self.token_tiles * weights * self.width,
            y_bytes=self.tokens * self.extent * self.width,
            memory_bytes=(self.tokens * self.other_extent + groups * weights) * self.width,
        )


def sampled_tile(rows: int, columns: int, tensor_cores: bool, width: int) -> dict[str, int]:
    """The tile of a sampled product: a whole block, and the tokens of a step."""
    block_r, block_c = max(16, power_of_two(rows)), max(16, power_of_two(columns))
    block_t = 128 // width if tensor_cores else 16
    warps = 4 if block_r * block_c <= 8192 // width else 8
    return {"BLOCK_R": block_r, "BLOCK_C": block_c, "BLOCK_T": block_t, "num_warps": warps, "num_stages": 3}
