"""The launches of a product with active blocks: made once for its sizes, and replayed with other tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton

from spartan_kernels.backends.triton import masked_matmul_kernels as kernels
from spartan_kernels.backends.triton import united_kernels
from spartan_kernels.backends.triton.launches import Launch, Recording
from spartan_kernels.backends.triton.product_plan import ProductPlan, scaled_tile, union_tile
from spartan_kernels.tiles import Tile

JOIN_BLOCK = 1024
_SCALING_PROGRAMS = 2048


@dataclass(frozen=True)
class ProductLaunches:
    """All that the launches of a product depend on but where its tensors lie.

    Attributes:
        tokens, stride: of x, and how far apart they lie.
        shape, block: of the weight; row: how far apart its rows lie, or those of a packed block.
        forward: by rows of blocks (x w^T) or by columns (x w).
        dtype: of x and the weight; result: of y.
    """

    device: torch.device
    dtype: torch.dtype
    result: torch.dtype
    tokens: int
    stride: int
    shape: tuple[int, int]
    block: tuple[int, int]
    row: int
    forward: bool
    packed: bool
    has_gate: bool
    has_bias: bool
    has_scales: bool
    activation: str
    save: bool
    precision: str
    tile: Tile

    @cached_property
    def recording(self) -> Recording:
        """Of these launches."""
        return Recording()

    @cached_property
    def plan(self) -> ProductPlan:
        """Programs and their order."""
        extent, other_extent = self.shape if self.forward else self.shape[::-1]
        span, other = self.block if self.forward else self.block[::-1]
        plan = ProductPlan(self.tokens, extent, other_extent, span, other, self.dtype.itemsize, self.tile)
        return plan.fitted(self.has_gate and not self.packed and plan.scales_first)

    @cached_property
    def split(self) -> int:
        """Programs that share one sum."""
        return self.plan.split

    @property
    def scales_first(self) -> bool:
        """Whether weights are multiplied by their gates in a pass of their own, into memory of the weight's size."""
        return self.has_gate and not self.packed and self.plan.scales_first

    def workspace(self) -> list[torch.Tensor]:
        """Memory for scaled weights, and for the blocks of lines that share a program; as far as it is needed."""
        plan, found = self.plan, []
        if self.scales_first:
            found.append(torch.empty(self.shape, dtype=self.dtype, device=self.device))
        if plan.united > 1:
            size = plan.groups * (triton.cdiv(plan.other_extent, plan.other) + 1)
            found.append(torch.empty(size, dtype=torch.int32, device=self.device))
        return found

    def launches(
        self,
        flat: torch.Tensor,
        data: torch.Tensor,
        gate: torch.Tensor | None,
        bias: torch.Tensor | None,
        scales: tuple[torch.Tensor | None, torch.Tensor | None],
        out: torch.Tensor,
        y: torch.Tensor,
        saved: torch.Tensor,
        index: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        positions: torch.Tensor | None,
        workspace: list[torch.Tensor],
    ) -> list[Launch]:
        """The sums, into `out`; where programs share them, then what joins their parts, into `y`.

        With a workspace, the active blocks times their gates come first.
        """
        plan, result, row = self.plan, [], self.row
        if workspace and gate is not None:
            scaled = workspace[0]
            result.append(self._scaling(data, gate, scaled, index))
            if plan.united > 1:
                return result + self._united(flat, scaled, bias, y, saved, index, workspace[1])
            data, gate, row = scaled, None, self.shape[1]
        strides = self._strides(row) + self._strides(self._grid_columns)
        tokens, indices = _descriptor(flat, plan), index[2]
        added = pointer_or(bias, flat), *(pointer_or(scale, flat) for scale in scales)
        arguments: tuple[Any, ...] = (
            tokens, data, pointer_or(gate, flat), *added, out, saved if self.save else out, *index,
            pointer_or(positions, indices), plan.tokens, plan.lines, plan.group, plan.extent, plan.other_extent,
            self.stride, *strides,
        )  # fmt: skip
        flags = {
            "HAS_BIAS": self.has_bias, "HAS_SCALES": self.has_scales, "ACTIVATION": self.activation, "SAVE": self.save,
            "SPLIT": plan.split,
        }  # fmt: skip
        options = {
            "SPAN": plan.span, "OTHER": plan.other, "PACKED": self.packed,
            "HAS_POSITIONS": self.packed and not self.forward, "HAS_GATE": gate is not None,
            "PRECISION": self.precision, **flags, **plan.tile.options(), "TMA": tokens is not flat,
        }  # fmt: skip
        result.append(Launch(kernels._product_kernel, (plan.tiles, plan.split), arguments, options))
        if plan.split > 1:
            arguments = out, *added, y, saved if self.save else y, y.numel(), plan.extent
            grid = triton.cdiv(y.numel(), JOIN_BLOCK)
            result.append(Launch(kernels._join_kernel, grid, arguments, flags | {"BLOCK": JOIN_BLOCK}))
        return result

    def _scaling(
        self, data: torch.Tensor, gate: torch.Tensor, scaled: torch.Tensor, index: tuple[torch.Tensor, ...]
    ) -> Launch:
        """The weights of this product's lines times their gates."""
        plan, tile = self.plan, scaled_tile(self.plan.span)
        steps = triton.cdiv(plan.other_extent, tile["BLOCK_K"])
        parts = max(1, min(steps, triton.cdiv(_SCALING_PROGRAMS, plan.lines)))
        strides = self._strides(self.row) + self._strides(self.shape[1]) + self._strides(self._grid_columns)
        arguments = data, gate, scaled, *index[1:], plan.extent, plan.other_extent, *strides
        options = {"SPAN": plan.span, "OTHER": plan.other, **tile}
        return Launch(kernels._scaled_kernel, (plan.lines, parts), arguments, options)

    def _united(
        self,
        flat: torch.Tensor,
        scaled: torch.Tensor,
        bias: torch.Tensor | None,
        y: torch.Tensor,
        saved: torch.Tensor,
        index: tuple[torch.Tensor, ...],
        united: torch.Tensor,
    ) -> list[Launch]:
        """The blocks that are active in any of the lines of a program, and the product with them."""
        plan, grid_other = self.plan, triton.cdiv(self.plan.other_extent, self.plan.other)
        found = *index[1:], united, plan.lines, grid_other, grid_other.bit_length()
        arguments: tuple[Any, ...] = (
            flat, scaled, pointer_or(bias, flat), y, saved if self.save else y, united, plan.tokens, plan.groups,
            plan.group, grid_other, plan.extent, plan.other_extent, self.stride, *self._strides(self.shape[1]),
        )  # fmt: skip
        options = {
            "SPAN": plan.span, "OTHER": plan.other, "HAS_BIAS": self.has_bias, "ACTIVATION": self.activation,
            "SAVE": self.save, "PRECISION": self.precision, **plan.tile.options(),
        }  # fmt: skip
        del options["TMA"]
        return [
            Launch(united_kernels._union_kernel, plan.groups, found, union_tile(plan.united)),
            Launch(united_kernels._united_product_kernel, plan.tiles, arguments, options),
        ]

    @property
    def _grid_columns(self) -> int:
        return triton.cdiv(self.shape[1], self.block[1])

    def _strides(self, row: int) -> tuple[int, int]:
        """How far apart neighbours along the outputs and along the sum lie, in rows that are `row` apart."""
        return (row, 1) if self.forward else (1, row)


product_launches = lru_cache(maxsize=1024)(ProductLaunches)


def _descriptor(x: torch.Tensor, plan: ProductPlan) -> Any:
    """Tokens as the copy engine takes them, where the tile asks for that and x allows it; else x itself."""
    tile = plan.tile
    if not tile.TMA or plan.other % tile.BLOCK_K or x.data_ptr() % 16 or x.stride(0) * plan.width % 16:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [tile.BLOCK_M, tile.BLOCK_K])


def pointer_or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that the kernel does not follow where there is no tensor."""
    return other if tensor is None else tensor
