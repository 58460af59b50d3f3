"""How a product of active blocks is launched: programs, their order, and the bytes that they move."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from spartan_kernels.float8 import FLOAT8
from spartan_kernels.precision import tf32
from spartan_kernels.tiles import BLACKWELL, HOPPER, MANY_TOKENS, Tile, architecture_of, power_of_two

_FEW_PROGRAMS = 256  # under which a sum is split between programs
_MOST_PARTS = 16
_GROUP_BYTES = 16 << 20  # of x that stay in the L2 cache, beside weights and outputs
_MOST_GROUPED = 16
_FEWEST_BLOCKS = 1000  # of a grid, for each block of a program of the sampled product


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def precision_of(x: torch.Tensor) -> str:
    """How a product multiplies and adds: float32 as PyTorch's switch for TF32 says, 8 bits with sums of float32."""
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, FLOAT8):
        return "widened"
    if x.dtype == FLOAT8 and architecture_of(x.device) < BLACKWELL:
        return "promoted"
    return "tf32" if x.dtype == torch.float32 and tf32() else "ieee"


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """What the tiles of a product depend on: its dtype, "tf32" or "float8"."""
    if dtype == FLOAT8:
        return "float8"
    return "tf32" if precision == "tf32" else str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Traffic:
    """What a product asks for: floating-point operations, and bytes.

    Attributes:
        x_bytes, weight_bytes: into the multiprocessors, from the L2 cache; of a weight's gradient, dz for the weights.
        y_bytes: written.
        memory_bytes: read from device memory, where the L2 cache holds the tokens of a group but not the weights.
        scaling_bytes: read and written beforehand, by the pass that multiplies weights by their gates.
        full: how much of what the tensor cores multiply is active.
    """

    flops: int
    x_bytes: int
    weight_bytes: int
    y_bytes: int
    memory_bytes: int
    scaling_bytes: int = 0
    full: float = 1.0


@dataclass(frozen=True)
class ProductPlan:
    """A product with lines of blocks of (span outputs, other columns), `extent` by `other_extent`, of `tokens`.

    All lines, the longest first, are multiplied with `group` tiles of tokens, which the L2 cache holds, before the next
    group: tokens come from device memory once, and weights once for each group.

    Attributes:
        width: bytes of an entry of x and of a weight. y_width: of y.
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
    y_width: int | None = None  # as x

    @property
    def lines(self) -> int:
        """Rows of blocks, or columns of blocks of an input gradient."""
        return _ceil_div(self.extent, self.span)

    @property
    def united(self) -> int:
        """Neighbouring lines that share a program, which walks the blocks that are active in any of them."""
        alone = max(16, power_of_two(self.span))
        return self.tile.BLOCK_N // self.span if self.tile.BLOCK_N > alone else 1

    @property
    def groups(self) -> int:
        """Programs, or those of a piece, for all lines and one tile of tokens."""
        return _ceil_div(self.lines, self.united)

    def fitted(self, scaled: bool) -> ProductPlan:
        """This plan, or if lines cannot share programs, with a tile for one line; `scaled`: gates are done with."""
        can = scaled and self.span == power_of_two(self.span) and self.other >= 8 and not self.tile.TMA
        can = can and self.tile.BLOCK_K % self.other == 0 and self.tiles >= _FEW_PROGRAMS
        # an index and a bit for each line are one number
        can = can and _ceil_div(self.other_extent, self.other) << self.united < 1 << 31
        if can or self.united == 1:
            return self
        return replace(self, tile=replace(self.tile, BLOCK_N=max(16, power_of_two(self.span))))

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
        return self.token_tiles * self.groups * self.pieces

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

    @property
    def scales_first(self) -> bool:
        """Whether a gate is worth a pass of its own over the active weights.

        Operands then go from shared memory to the tensor cores, and one step is multiplied while the next ones come. A
        program that scales takes each weight through its registers and back before it can multiply: at blocks of 64,
        0.024 clocks of a processor for each weight and 256 tokens. The pass reads and writes 4 bytes of bfloat16, and
        the product finds 2 of them in the L2 cache: as much, by these counts, from about 1500 tokens on.
        """
        return self.tokens >= MANY_TOKENS

    def traffic(self, active: int) -> Traffic:
        """What `active` blocks cost.

        A tile of outputs reads the active columns of its tokens: each element of x that comes from the L2 cache serves
        min(outputs of a block, BLOCK_N) outputs, and each weight BLOCK_M tokens. That bounds a product with small
        blocks. Lines that share a program read the columns that are active in any of them, and multiply them all.
        """
        weights = active * self.span * self.other
        groups = _ceil_div(self.token_tiles, self.group)
        grid_other = max(1, _ceil_div(self.other_extent, self.other))
        density = active / (self.lines * grid_other)
        # blocks that are active in any of the lines of a program, where they lie at random, and all of these together
        walked = self.groups * grid_other * (1 - (1 - density) ** self.united) if self.united > 1 else active
        return Traffic(
            flops=2 * self.tokens * weights,
            x_bytes=round(self.tokens * walked * self.other * self.pieces * self.width),
            weight_bytes=self.token_tiles * weights * self.width,
            y_bytes=self.tokens * self.extent * (self.y_width or self.width),
            memory_bytes=(self.tokens * self.other_extent + groups * weights) * self.width,
            scaling_bytes=2 * weights * self.width if self.scales_first else 0,
            full=active / (walked * self.united) if walked else 1.0,
        )


def scaled_tile(span: int) -> dict[str, int]:
    """The tile of weights that are multiplied by their gates at a time."""
    block_n = min(64, power_of_two(span))
    return {"BLOCK_N": block_n, "BLOCK_K": 4096 // block_n, "num_warps": 4}


def rounding_tile(features: int) -> dict[str, int]:
    """Entries of a row that are rounded to 8 bits at a time."""
    return {"BLOCK": min(2048, max(128, power_of_two(features))), "num_warps": 4}


def union_tile(united: int) -> dict[str, int]:
    """Blocks of a line that are searched for at a time, in each of the lines that share a program."""
    return {"LINES": united, "BLOCK": 256, "num_warps": 8}


@dataclass(frozen=True)
class SampledPlan:
    """A weight's gradient on the active blocks of `grid`, each of (rows, columns): `blocks` side by side in a program.

    Blocks that share a program share the rows of dz, which it reads for all of them. There are as many as the tile of
    a product has room for, but a thousand blocks of the grid for each of them: were a tenth active, a hundred programs.
    """

    grid: tuple[int, int]
    rows: int
    columns: int
    kind: str
    architecture: int

    @property
    def width(self) -> int:
        """Rows of the tile for one block: a power of two."""
        return power_of_two(self.columns)

    @property
    def blocks(self) -> int:
        """Blocks of a program."""
        most = max(1, self.grid[0] * self.grid[1] // _FEWEST_BLOCKS)
        room = 64 if self.kind == "float32" else 256 if self.architecture >= HOPPER and self.kind != "tf32" else 128
        needed = -(-16 // self.width)  # a tile has 16 rows at least
        return max(needed, min(room // self.width, power_of_two(most + 1) // 2))

    @property
    def parts(self) -> int:
        """Programs of a row of blocks, were all of it active."""
        return _ceil_div(self.grid[1], self.blocks)

    def options(self) -> dict[str, int]:
        """The tile as a launch takes it."""
        c, r = self.blocks * self.width, max(16, power_of_two(self.rows))
        width = 4 if self.kind in ("float32", "tf32") else 2
        steps = 16 if self.kind == "float32" else 128 // width
        warps = 4 if c * r <= 8192 // width else 8
        return {
            "BLOCKS": self.blocks, "BLOCK_C": c, "BLOCK_R": r, "BLOCK_T": steps, "num_warps": warps, "num_stages": 3
        }  # fmt: skip

    def programs(self, density: float) -> float:
        """Those that find blocks, on average, where each block is active with that chance."""
        n = self.grid[1]
        chances = (math.comb(n, k) * density**k * (1 - density) ** (n - k) for k in range(n + 1))
        return self.grid[0] * sum(chance * _ceil_div(k, self.blocks) for k, chance in enumerate(chances))

    def traffic(self, tokens: int, density: float) -> Traffic:
        """What that costs: a program reads the rows of dz once for its blocks, of which the last of a row has fewer."""
        width = 4 if self.kind in ("float32", "tf32") else 2
        active, weights = round(density * self.grid[0] * self.grid[1]), self.rows * self.columns
        return Traffic(
            flops=2 * tokens * active * weights,
            x_bytes=tokens * active * self.columns * width,
            weight_bytes=round(self.programs(density) * tokens * self.rows * width),
            y_bytes=active * weights * width,
            memory_bytes=tokens * (self.grid[0] * self.rows + self.grid[1] * self.columns) * width,
            full=active / (self.programs(density) * self.blocks),
        )
