"""What the products of the Triton backend move on an H100, from their launch plans, against what bounds them.

Each element of x that comes from the L2 cache serves the rows of a block at most (its columns, in the input gradient),
so that many operations for two bytes of bfloat16: no plan multiplies faster than that times the cache's bandwidth, nor
than the tensor cores, unless lines of blocks share a tile of x. A plan also brings the weights, once for every tile of
tokens; a weight's gradient brings the rows of dz, once for every program. A pass that multiplies weights by their gates
comes before, and takes time too. Packed blocks in float8 need no gates, but a pass that rounds x before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.columns import print_columns
from spartan_kernels.h100 import BANDWIDTH, LAUNCH
from spartan_kernels.tiles import default_tile

if TYPE_CHECKING:
    from spartan_kernels.backends.triton.product_plan import Traffic

TOKENS = 8192
SHAPES = ((4096, 4096), (4096, 16384))  # in, out
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (128, 16), (128, 32))
DENSITY = 0.1
_HOPPER = 90
_WIDTH = 2  # bytes of bfloat16
_TENSOR_CORES = {2: 800e12, 1: 1600e12}  # operations in a second, by bytes of what is multiplied
_L2_BANDWIDTH = 5.5e12  # bytes in a second, from the L2 cache into all processors
FLOAT8_FORWARD = "forward, float8"


@dataclass(frozen=True)
class PlanRow:
    """One product: megabytes from the L2 cache and from device memory, and 10^12 operations a second that they allow.

    Attributes:
        tile: tokens, outputs and depth of a step; of a weight's gradient, columns and rows of it, and tokens of a step.
        bound: with the bytes of x alone, each element serving one whole block.
        plan: with the bytes of x and weights that the launch moves.
        full: how much of what the tensor cores multiply is active.
        scaling_microseconds: of the pass that multiplies weights by their gates, with its launch, and of the launch
            that finds the blocks of lines which share a program; in float8, of the pass that rounds x.
    """

    shape: str
    block: str
    direction: str
    tile: str
    gigaflops: float
    l2_megabytes: float
    memory_megabytes: float
    bound: float
    plan: float
    full: float
    scaling_microseconds: float

    @property
    def part(self) -> float:
        """How much of the bound the plan allows."""
        return self.plan / self.bound

    @property
    def width(self) -> int:
        """Bytes of what is multiplied."""
        return 1 if self.direction == FLOAT8_FORWARD else _WIDTH

    @property
    def united(self) -> bool:
        """Whether lines of blocks share a program."""
        span = int(self.block.split(" x ")[not self.direction.startswith("forward")])
        return self.direction != "weight gradient" and int(self.tile.split(" x ")[1]) > span

    @property
    def case(self) -> tuple[str, str]:
        """The kernel, and the label of its compile case."""
        if self.direction == "weight gradient":
            blocks = int(self.tile.split(" x ")[0]) // int(self.block.split(" x ")[1])
            return "_sampled_kernel", f"block {self.block}, {blocks} to a program, bfloat16"
        if self.direction == FLOAT8_FORWARD:
            return "_product_kernel", f"block {self.block}, {TOKENS} tokens, float8"
        label = f"block {self.block}, {TOKENS} tokens, bfloat16"
        kernel = "_united_product_kernel" if self.united else "_product_kernel"
        return kernel, label if self.direction == "forward" else f"{label}, {self.direction}"


def plan_rows() -> Iterator[PlanRow]:
    """Forward, input gradient, weight gradient and float8 of every shape and block, a tenth of the blocks active."""
    from spartan_kernels.backends.triton.product_plan import ProductPlan, SampledPlan

    for (in_, out), (rows, columns) in itertools.product(SHAPES, BLOCKS):
        grid = out // rows, in_ // columns
        for direction, span, other, extent, across in (
            ("forward", rows, columns, out, in_),
            ("input gradient", columns, rows, in_, out),
        ):
            tile = default_tile(_HOPPER, TOKENS, span, "bfloat16")
            plan = ProductPlan(TOKENS, extent, across, span, other, _WIDTH, tile).fitted(scaled=True)
            tile = plan.tile
            traffic = plan.traffic(round(DENSITY * grid[0] * grid[1]))
            sides = f"{tile.BLOCK_M} x {tile.BLOCK_N} x {tile.BLOCK_K}"
            yield _row(f"{in_} to {out}", (rows, columns), direction, sides, span, traffic, 1 + (plan.united > 1))
        sampled = SampledPlan(grid, rows, columns, "bfloat16", _HOPPER)
        size = sampled.options()
        sides = f"{size['BLOCK_C']} x {size['BLOCK_R']} x {size['BLOCK_T']}"
        traffic = sampled.traffic(TOKENS, DENSITY)
        yield _row(f"{in_} to {out}", (rows, columns), "weight gradient", sides, rows, traffic, 0)
        tile = default_tile(_HOPPER, TOKENS, rows, "float8")
        plan = ProductPlan(TOKENS, out, in_, rows, columns, 1, tile, _WIDTH)
        sides = f"{tile.BLOCK_M} x {tile.BLOCK_N} x {tile.BLOCK_K}"
        rounding = TOKENS * in_ * (_WIDTH + 1)
        traffic = replace(plan.traffic(round(DENSITY * grid[0] * grid[1])), scaling_bytes=rounding)
        yield _row(f"{in_} to {out}", (rows, columns), FLOAT8_FORWARD, sides, rows, traffic, 1, width=1)


def _row(
    shape: str,
    block: tuple[int, int],
    direction: str,
    tile: str,
    served: int,
    traffic: Traffic,
    launches: int,
    width: int = _WIDTH,
) -> PlanRow:
    """The row of a product where an element of x serves that many outputs, and with what is launched before it."""
    from_l2 = traffic.x_bytes + traffic.weight_bytes
    scaling = 1e6 * traffic.scaling_bytes / BANDWIDTH + launches * LAUNCH
    return PlanRow(
        shape,
        f"{block[0]} x {block[1]}",
        direction,
        tile,
        round(traffic.flops / 1e9, 1),
        round(from_l2 / 1e6, 1),
        round((traffic.memory_bytes + traffic.y_bytes) / 1e6, 1),
        round(min(_TENSOR_CORES[width], 2 * served / width * _L2_BANDWIDTH) / 1e12, 1),
        round(min(traffic.full * _TENSOR_CORES[width], traffic.flops / from_l2 * _L2_BANDWIDTH) / 1e12, 1),
        round(traffic.full, 3),
        round(scaling, 1),
    )


def report(rows: list[PlanRow]) -> None:
    """Print the table."""
    header = [
        "in to out",
        "block",
        "product",
        "tile",
        "MB of L2",
        "MB of memory",
        "TFLOP/s",
        "bound",
        "part",
        "scaling",
    ]
    lines = [
        [
            *(r.shape, r.block, r.direction, r.tile),
            *map(str, (r.l2_megabytes, r.memory_megabytes, r.plan, r.bound)),
            *(f"{r.part:.2f}", f"{r.scaling_microseconds} µs"),
        ]
        for r in rows
    ]
    print(f"\nWhat the launch plans allow on an H100: {TOKENS} tokens of bfloat16, {DENSITY:.0%} of the blocks active")
    print_columns(header, lines)
