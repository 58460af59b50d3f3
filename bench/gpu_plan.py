"""What the products of the Triton backend move on an H100, from their launch plans, against what bounds them.

Each element of x that comes from the L2 cache serves the rows of a block at most (its columns, in the input gradient),
so that many operations for two bytes of bfloat16: no plan multiplies faster than that times the cache's bandwidth, nor
than the tensor cores. A plan also brings the weights, once for every tile of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from bench.columns import print_columns
from spartan_kernels.tiles import default_tile

TOKENS = 8192
SHAPES = ((4096, 4096), (4096, 16384))  # in, out
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (128, 16), (128, 32))
DENSITY = 0.1
_HOPPER = 90
_WIDTH = 2  # bytes of bfloat16
_TENSOR_CORES = 800e12  # operations in a second
_L2_BANDWIDTH = 5.5e12  # bytes in a second, from the L2 cache into all processors


@dataclass(frozen=True)
class PlanRow:
    """One product: megabytes from the L2 cache and from device memory, and 10^12 operations a second that they allow.

    Attributes:
        bound: with the bytes of x alone, each element serving a whole block.
        plan: with the bytes of x and weights that the launch moves.
    """

    shape: str
    block: str
    direction: str
    tile: str
    l2_megabytes: float
    memory_megabytes: float
    bound: float
    plan: float

    @property
    def part(self) -> float:
        """How much of the bound the plan allows."""
        return self.plan / self.bound


def plan_rows() -> Iterator[PlanRow]:
    """Forward and input gradient of every shape and block, a tenth of the blocks active."""
    from spartan_kernels.backends.triton.product_plan import ProductPlan

    for (in_, out), (rows, columns), forward in itertools.product(SHAPES, BLOCKS, (True, False)):
        span, other = (rows, columns) if forward else (columns, rows)
        extent, across = (out, in_) if forward else (in_, out)
        tile = default_tile(_HOPPER, TOKENS, span, "bfloat16")
        plan = ProductPlan(TOKENS, extent, across, span, other, _WIDTH, tile)
        traffic = plan.traffic(round(DENSITY * (out // rows) * (in_ // columns)))
        from_l2 = traffic.x_bytes + traffic.weight_bytes
        yield PlanRow(
            f"{in_} to {out}",
            f"{rows} x {columns}",
            "forward" if forward else "input gradient",
            f"{tile.BLOCK_M} x {tile.BLOCK_N} x {tile.BLOCK_K}",
            round(from_l2 / 1e6, 1),
            round((traffic.memory_bytes + traffic.y_bytes) / 1e6, 1),
            round(min(_TENSOR_CORES, 2 * span / _WIDTH * _L2_BANDWIDTH) / 1e12, 1),
            round(min(_TENSOR_CORES, traffic.flops / from_l2 * _L2_BANDWIDTH) / 1e12, 1),
        )


def report(rows: list[PlanRow]) -> None:
    """Print the table."""
    header = ["in to out", "block", "product", "tile", "MB of L2", "MB of memory", "TFLOP/s", "bound", "part"]
    lines = [[str(value) for value in asdict(r).values()] for r in rows]
    lines = [[*cells[:6], cells[7], cells[6], f"{r.part:.2f}"] for cells, r in zip(lines, rows, strict=True)]
    print(f"\nWhat the launch plans allow on an H100: bfloat16, {TOKENS} tokens, {DENSITY:.0%} of the blocks active")
    print_columns(header, lines)
