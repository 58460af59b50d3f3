"""Which blocks of a weight take part: their index by rows and by columns, built on the tensor's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spartan_kernels.arguments import block_grid, block_shape, require_index
from spartan_kernels.calls import OPERATORS
from spartan_kernels.operands import BlockLayoutOf
from spartan_kernels.torch_private import transforms_active

__all__ = ["BlockLayout"]

# the buffers of a layout, in the order in which operators take them
INDEX = ("row_offsets", "column_indices", "column_offsets", "row_indices", "order")


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The active blocks of a weight, as compressed rows and as compressed columns of blocks.

    Every buffer has the size that all blocks would need, so nothing waits for their number: entries past
    `row_offsets[-1]` are 0. A layout may serve any number of products with a weight of its shape.

    Attributes:
        shape: (out_features, in_features) of the weight.
        block_size: (rows, columns) of a block.
        row_offsets: int32 [grid rows + 1]; the blocks of block row r are entries row_offsets[r] to row_offsets[r + 1]
            of `column_indices`.
        column_indices: int32 [grid rows * grid columns], increasing in each row.
        column_offsets: int32 [grid columns + 1], the same by columns.
        row_indices: int32 [grid rows * grid columns], increasing in each column.
        order: int32 [grid rows + grid columns]; the block rows from that with most active blocks to that with fewest,
            equal ones as they come, then the block columns likewise: so a GPU ends with the shortest.
        density: active blocks / blocks where the host knows it (on the CPU, or as given), else None.
    """

    shape: tuple[int, int]
    block_size: tuple[int, int]
    row_offsets: torch.Tensor
    column_indices: torch.Tensor
    column_offsets: torch.Tensor
    row_indices: torch.Tensor
    order: torch.Tensor
    density: float | None = None

    def __post_init__(self) -> None:
        """Refuse buffers of a wrong dtype, length or device, which kernels would read past.

        Raises:
            ValueError: such a buffer, by name.
        """
        grid = block_grid(self.shape, self.block_size)
        active, device = self.column_indices.shape[:1].numel(), self.row_offsets.device
        if active > grid[0] * grid[1]:
            raise ValueError(
                f"column_indices must have at most {grid[0] * grid[1]} entries, one for each block; got {active}"
            )
        lengths = (grid[0] + 1, active, grid[1] + 1, active, grid[0] + grid[1])
        for name, tensor, length in zip(INDEX, self.tensors(), lengths, strict=True):
            require_index(name, tensor, length, device)

    @staticmethod
    def from_gate(
        gate: torch.Tensor,
        shape: Sequence[int],
        block_size: int | tuple[int, int],
        mask: torch.Tensor | None = None,
        density: float | None = None,
        backend: str | None = None,
    ) -> BlockLayout:
        """The blocks whose gate is not zero (NaN is not) and whose mask is set.

        Args:
            gate: float or bool, [ceil(out / rows), ceil(in / columns)].
            shape: (out_features, in_features) of the weight.
            block_size: an int or (rows, columns).
            mask: bool, shape of `gate`; None for all blocks.
            density: the active fraction if you know it; a GPU is not asked for it.
            backend: "auto" or the name of a backend.

        Raises:
            TypeError: an integer gate, a mask that is not bool. ValueError: shapes or devices that do not match, a
                density outside [0, 1].
        """
        size = block_shape(block_size)
        out, in_ = (int(side) for side in shape)
        require_gate("gate", gate, (out, in_), size)
        if mask is not None:
            require_mask("mask", mask, gate, (out, in_), size)
        if density is not None and not 0 <= density <= 1:
            raise ValueError(f"density must be in [0, 1]; got {density}")
        a, b, c, d, e = OPERATORS["block_layout"](BlockLayoutOf(gate.detach(), mask, backend or ""))
        return BlockLayout((out, in_), size, a, b, c, d, e, _density(a, gate) if density is None else density)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return self.row_offsets.shape[0] - 1, self.column_offsets.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Where the index lies."""
        return self.row_offsets.device

    def tensors(self) -> list[torch.Tensor]:
        """row_offsets, column_indices, column_offsets, row_indices, order: as the operators take them."""
        return [self.row_offsets, self.column_indices, self.column_offsets, self.row_indices, self.order]

    def mask(self) -> torch.Tensor:
        """bool [grid rows, grid columns]: True at the active blocks."""
        return active_blocks(self.row_offsets, self.column_indices, self.grid[1])


def active_blocks(row_offsets: torch.Tensor, column_indices: torch.Tensor, grid_columns: int) -> torch.Tensor:
    """The active blocks as bool [grid rows, grid columns], without asking the device how many there are."""
    grid_rows = row_offsets.shape[0] - 1
    entry = torch.arange(column_indices.shape[0], dtype=torch.int32, device=row_offsets.device)
    row = torch.searchsorted(row_offsets[1:].contiguous(), entry, right=True)
    # what lies past the last entry goes to a place of its own
    place = torch.where(entry < row_offsets[-1], row * grid_columns + column_indices, grid_rows * grid_columns)
    active = torch.zeros(grid_rows * grid_columns + 1, dtype=torch.bool, device=row_offsets.device)
    return active.index_fill(0, place, True)[:-1].view(grid_rows, grid_columns)


def longest_first(row_offsets: torch.Tensor, column_offsets: torch.Tensor) -> torch.Tensor:
    """`order` of a layout with these offsets."""
    counts = (offsets.diff() for offsets in (row_offsets, column_offsets))
    return torch.cat([count.argsort(descending=True, stable=True) for count in counts]).to(torch.int32)


def require_gate(name: str, gate: torch.Tensor, shape: tuple[int, int], block_size: tuple[int, int]) -> None:
    """Raise unless `gate` is a float or bool tensor with one entry for each block."""
    if not isinstance(gate, torch.Tensor) or not (gate.is_floating_point() or gate.dtype == torch.bool):
        found = f"dtype {gate.dtype}" if isinstance(gate, torch.Tensor) else type(gate).__name__
        raise TypeError(f"{name} must be a floating-point or bool tensor; got {found}")
    _require_grid(name, gate, shape, block_size)


def require_mask(
    name: str, mask: torch.Tensor, like: torch.Tensor, shape: tuple[int, int], block_size: tuple[int, int]
) -> None:
    """Raise unless `mask` is bool, has one entry for each block and lies where `like` does."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        found = f"dtype {mask.dtype}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor; got {found}")
    _require_grid(name, mask, shape, block_size)
    if mask.device != like.device:
        raise ValueError(f"{name} must be on {like.device}; got {mask.device}")


def _require_grid(name: str, tensor: torch.Tensor, shape: tuple[int, int], block_size: tuple[int, int]) -> None:
    grid = block_grid(shape, block_size)
    if tuple(tensor.shape) != grid:
        raise ValueError(
            f"{name} must have shape {grid}, one entry per {block_size} block of weight {shape};"
            f" got {tuple(tensor.shape)}"
        )


def _density(row_offsets: torch.Tensor, gate: torch.Tensor) -> float | None:
    """Active blocks / blocks, read where that waits for nothing and is not part of a graph or transform."""
    if torch.compiler.is_compiling() or gate.device.type != "cpu" or transforms_active():
        return None
    if type(row_offsets) is not torch.Tensor:  # a fake tensor holds no numbers
        return None
    return int(row_offsets[-1]) / gate.numel() if gate.numel() else 0.0
