"""A block-sparse weight that stores its active blocks alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from spartan_kernels.arguments import block_grid, clip_block, require_device, require_float, require_index
from spartan_kernels.float8 import FLOAT8, rounded, row_scales
from spartan_kernels.layout import INDEX, BlockLayout, longest_first, require_mask

if TYPE_CHECKING:
    import scipy.sparse

__all__ = ["BlockSparseWeight"]


@dataclass(frozen=True, eq=False)
class BlockSparseWeight:
    """The active blocks of a weight, packed by rows of blocks.

    Attributes:
        values: [n, rows, columns], the blocks in the order of `layout.column_indices`; zeros past the weight's edge.
        layout: their index; unlike a gate's, its buffers have exactly n entries.
        positions: int32 [n]; entry j by columns (of `layout.row_indices`) is block positions[j] of `values`.
        scales: where values are torch.float8_e4m3fn, what each output's are multiplied by: float32 [out, 1], of a
            transposed weight [1, in]; else None.
        rounded_from: the dtype that the weight had before, which `to_dense` gives back; None without scales.
    """

    values: torch.Tensor
    layout: BlockLayout
    positions: torch.Tensor
    scales: torch.Tensor | None = None
    rounded_from: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Refuse values, positions and scales that do not fit the index.

        Raises:
            ValueError: such a tensor, by name.
        """
        active, device = self.layout.column_indices.shape[0], self.layout.device
        if tuple(self.values.shape) != (active, *self.layout.block_size):
            raise ValueError(
                f"values must have shape {(active, *self.layout.block_size)}, one block for each entry of the index;"
                f" got {tuple(self.values.shape)}"
            )
        require_device("values", self.values, device, "the index")
        require_index("positions", self.positions, active, device)
        self._require_scales(device)

    def _require_scales(self, device: torch.device) -> None:
        float8, scales, (out, in_) = self.values.dtype == FLOAT8, self.scales, self.shape
        if float8 != (scales is not None) or float8 != (self.rounded_from is not None):
            raise ValueError(
                f"scales and rounded_from must be there for values of {FLOAT8} alone; got values of"
                f" {self.values.dtype}, {'no' if scales is None else 'some'} scales, {self.rounded_from}"
            )
        if scales is None:
            return
        if tuple(scales.shape) not in ((out, 1), (1, in_)) or scales.dtype != torch.float32:
            raise ValueError(
                f"scales must be torch.float32 of shape ({out}, 1), or (1, {in_}) of a transposed weight;"
                f" got {scales.dtype} of shape {tuple(scales.shape)}"
            )
        require_device("scales", scales, device, "the index")

    def require_valid(self) -> None:
        """Look at every number of the index; the host waits for a GPU.

        Raises:
            ValueError: a buffer that is not what the blocks say, by name.
        """
        with torch.no_grad():
            whole = BlockSparseWeight.from_blocks(
                self.values,
                self.layout.row_offsets,
                self.layout.column_indices,
                self.shape,
                self.scales,
                self.rounded_from,
            )
        found = (*self.layout.tensors(), self.positions)
        expected = (*whole.layout.tensors(), whole.positions)
        for name, ours, right in zip((*INDEX, "positions"), found, expected, strict=True):
            if not torch.equal(ours, right):
                raise ValueError(f"{name} is not the index of the packed blocks; it was changed since it was made")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.layout.shape

    @property
    def block_size(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.layout.block_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight."""
        return self.rounded_from or self.values.dtype

    @property
    def density(self) -> float:
        """Stored blocks / blocks."""
        return self.values.shape[0] / max(1, math.prod(self.layout.grid))

    @staticmethod
    def from_blocks(
        values: torch.Tensor,
        row_offsets: torch.Tensor,
        column_indices: torch.Tensor,
        shape: tuple[int, int],
        scales: torch.Tensor | None = None,
        rounded_from: torch.dtype | None = None,
    ) -> BlockSparseWeight:
        """From blocks [n, rows, columns] in compressed rows; the index by columns is made here.

        Raises:
            TypeError: integer values. ValueError: offsets and columns that do not fit the shape or one another.
        """
        require_float("values", values)
        if values.dim() != 3 or not all(values.shape[1:]):
            raise ValueError(f"values must be [blocks, rows, columns]; got {tuple(values.shape)}")
        block_size = (values.shape[1], values.shape[2])
        grid = block_grid(shape, block_size)
        offsets, columns = row_offsets.to(torch.int64), column_indices.to(torch.int64)
        _require_compressed(offsets, columns, values.shape[0], grid)
        rows = torch.repeat_interleave(torch.arange(grid[0], device=values.device), offsets.diff())
        order = torch.argsort(columns, stable=True)
        counts = torch.bincount(columns, minlength=grid[1])
        column_offsets = functional.pad(counts.cumsum(0), (1, 0))
        index = (offsets, columns, column_offsets, rows[order], longest_first(offsets, column_offsets), order)
        a, b, c, d, e, positions = (t.to(torch.int32).contiguous() for t in index)
        density = values.shape[0] / max(1, math.prod(grid))
        layout = BlockLayout((int(shape[0]), int(shape[1])), block_size, a, b, c, d, e, density)
        values = _without_edges(values, rows, columns, layout)
        return BlockSparseWeight(values, layout, positions, scales, rounded_from)

    @staticmethod
    def from_dense(
        weight: torch.Tensor, block_size: int | tuple[int, int], mask: torch.Tensor | None = None
    ) -> BlockSparseWeight:
        """The blocks of `weight` where `mask` is set, or (without one) that hold anything but zeros.

        A block that is larger than the weight is stored as large as the weight.

        Raises:
            TypeError: an integer weight, a mask that is not bool. ValueError: shapes that do not match.
        """
        require_float("weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"weight must be [out, in]; got {tuple(weight.shape)}")
        rows, columns = clip_block(block_size, weight.shape)
        out, in_ = weight.shape
        tiles = functional.pad(weight, (0, -in_ % columns, 0, -out % rows))
        tiles = tiles.reshape(tiles.shape[0] // rows, rows, tiles.shape[1] // columns, columns).movedim(1, 2)
        if mask is None:
            mask = (tiles != 0).flatten(2).any(-1)
        else:
            require_mask("mask", mask, weight, (out, in_), (rows, columns))
        offsets = functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return BlockSparseWeight.from_blocks(tiles[mask].contiguous(), offsets, mask.nonzero()[:, 1], (out, in_))

    def to_dense(self) -> torch.Tensor:
        """The weight [out, in], zeros where no block is stored."""
        (rows, columns), grid, (out, in_) = self.block_size, self.layout.grid, self.shape
        tiles = self.values.new_zeros(*grid, rows, columns)
        tiles = tiles.index_put((self._rows(), self.layout.column_indices.long()), self.values)
        dense = tiles.movedim(2, 1).reshape(grid[0] * rows, grid[1] * columns)[:out, :in_]
        return dense if self.scales is None else (dense.to(torch.float32) * self.scales).to(self.dtype)

    def to_float8(self) -> BlockSparseWeight:
        """This weight in 8 bits, for inference: each output's numbers are divided by their largest / 448 and rounded.

        An output with NaN or infinity becomes NaN: the format has no infinity.
        """
        if self.scales is not None:
            return self
        with torch.no_grad():
            scales, rows = row_scales(self.to_dense()), self.block_size[0]
            padded = functional.pad(scales, (0, 0, 0, -self.shape[0] % rows), value=1.0)
            of_blocks = padded.reshape(self.layout.grid[0], rows, 1)[self._rows()]
        return replace(
            self, values=rounded(self.values.detach(), of_blocks), scales=scales, rounded_from=self.values.dtype
        )

    def transposed(self) -> BlockSparseWeight:
        """The transpose of the weight, in transposed blocks."""
        layout, (out, in_) = self.layout, self.shape
        values = self.values[self.positions.long()].mT.contiguous()
        scales = None if self.scales is None else self.scales.mT.contiguous()
        index = layout.column_offsets, layout.row_indices
        return BlockSparseWeight.from_blocks(values, *index, (in_, out), scales, self.rounded_from)

    def to_bsr(self) -> torch.Tensor:
        """As `torch.sparse_bsr`, which knows whole blocks only.

        Raises:
            ValueError: a shape that the blocks do not divide.
        """
        self._require_whole("torch.sparse_bsr")
        if self.scales is not None:
            return self._unrounded().to_bsr()
        offsets, columns = self.layout.row_offsets, self.layout.column_indices
        return torch.sparse_bsr_tensor(
            offsets, columns, self.values, size=self.shape, device=self.values.device, check_invariants=True
        )

    @staticmethod
    def from_bsr(matrix: torch.Tensor) -> BlockSparseWeight:
        """From a `torch.sparse_bsr` matrix.

        Raises:
            TypeError: a tensor of another layout.
        """
        if matrix.layout != torch.sparse_bsr:
            raise TypeError(f"matrix must be torch.sparse_bsr; got {matrix.layout}")
        shape = (matrix.shape[0], matrix.shape[1])
        return BlockSparseWeight.from_blocks(matrix.values(), matrix.crow_indices(), matrix.col_indices(), shape)

    def to_scipy(self) -> scipy.sparse.bsr_array:
        """As `scipy.sparse.bsr_array`, sharing memory where SciPy lets it; bfloat16 becomes float32.

        Raises:
            ValueError: a shape that the blocks do not divide.
        """
        import scipy.sparse

        self._require_whole("scipy.sparse.bsr_array")
        if self.scales is not None:
            return self._unrounded().to_scipy()
        values = self.values.detach().cpu()
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        columns, offsets = self.layout.column_indices.cpu(), self.layout.row_offsets.cpu()
        return scipy.sparse.bsr_array((values.numpy(), columns.numpy(), offsets.numpy()), shape=self.shape)

    @staticmethod
    def from_scipy(matrix: Any) -> BlockSparseWeight:
        """From a SciPy BSR array or matrix.

        Raises:
            TypeError: a matrix of another format.
        """
        if getattr(matrix, "format", None) != "bsr":
            raise TypeError(f"matrix must be a scipy.sparse BSR array; got {type(matrix).__name__}")
        matrix = matrix.copy()
        matrix.sum_duplicates()
        values, offsets, columns = map(torch.from_numpy, (matrix.data, matrix.indptr, matrix.indices))
        return BlockSparseWeight.from_blocks(values, offsets, columns, (int(matrix.shape[0]), int(matrix.shape[1])))

    def _unrounded(self) -> BlockSparseWeight:
        """The same numbers without scales."""
        return BlockSparseWeight.from_dense(self.to_dense(), self.block_size, self.layout.mask())

    def _rows(self) -> torch.Tensor:
        """The block row of each block, by operations whose results have shapes that are known: graphs are exported."""
        rows = self.layout.row_indices.long()
        return torch.zeros_like(rows).index_put((self.positions.long(),), rows)

    def _require_whole(self, target: str) -> None:
        if any(side % size for side, size in zip(self.shape, self.block_size, strict=True)):
            raise ValueError(f"{target} needs whole blocks; got shape {self.shape} in blocks of {self.block_size}")


def _require_compressed(offsets: torch.Tensor, columns: torch.Tensor, count: int, grid: tuple[int, ...]) -> None:
    if tuple(offsets.shape) != (grid[0] + 1,) or tuple(columns.shape) != (count,):
        raise ValueError(
            f"row_offsets must have {grid[0] + 1} entries and column_indices {count}; got {tuple(offsets.shape)} and"
            f" {tuple(columns.shape)}"
        )
    rising = bool((offsets.diff() >= 0).all()) and int(offsets[0]) == 0 and int(offsets[-1]) == count
    if not rising or (count and not 0 <= int(columns.min()) <= int(columns.max()) < grid[1]):
        raise ValueError(f"row_offsets must rise from 0 to {count} and column_indices lie in [0, {grid[1]})")
    step = columns.diff() > 0
    starts = offsets[1:-1]
    inner = starts[(starts > 0) & (starts < count)] - 1
    step[inner] = True  # where a row begins, any column may follow
    if not bool(step.all()):
        raise ValueError("column_indices must increase in each row of blocks")


def _without_edges(
    values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, layout: BlockLayout
) -> torch.Tensor:
    """The blocks with zeros past the edge of the weight."""
    (out, in_), (height, width) = layout.shape, layout.block_size
    if out % height == 0 and in_ % width == 0:
        return values
    row = rows[:, None] * height + torch.arange(height, device=values.device)
    column = columns[:, None] * width + torch.arange(width, device=values.device)
    return torch.where((row < out)[:, :, None] & (column < in_)[:, None, :], values, 0.0)
