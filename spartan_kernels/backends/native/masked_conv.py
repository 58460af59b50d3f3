"""Convolution with active blocks alone, as products over windows of pixels (conv_windows)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from spartan_kernels.arguments import memory_format
from spartan_kernels.backends import extension
from spartan_kernels.backends.native.conv_products import (
    Lines,
    convolved,
    gradient_pixels,
    image_windows,
    input_gradient,
    sampled,
    spaced,
)
from spartan_kernels.backends.native.conv_windows import Geometry, geometry
from spartan_kernels.backends.native.masked_weight import masked_weight_forward
from spartan_kernels.backends.shared import LayerNeeds, dense_filter_gradients, require_one_group
from spartan_kernels.break_even import dense_convolution_wins
from spartan_kernels.operands import MaskedConv, MaskedConvBackward

__all__ = ["masked_conv2d_backward", "masked_conv2d_forward"]

_SAMPLED_COST = 1.5  # of a block of the weight's gradient, by what one of the product takes: measured


class _Places(NamedTuple):
    """Active blocks in the order of the lines and columns of a matrix over windows, and where they lie in it.

    row, column and position are those of the weight's grid [rows, columns, kernel positions].
    """

    row: torch.Tensor
    column: torch.Tensor
    position: torch.Tensor
    lines: Lines

    @staticmethod
    def for_output(active: torch.Tensor, g: Geometry, wide: int) -> _Places:
        """Lines are rows of blocks, over windows of x, whose pixels have `wide` columns of blocks."""
        across = active.shape[1]
        places = [shift * wide + phase * across for shift, phase in zip(g.shift, g.phase, strict=True)]
        order = torch.tensor(sorted(range(len(places)), key=places.__getitem__), device=active.device)
        ordered = active.flatten(2)[:, :, order].mT  # [rows, positions, columns]
        row, k, column = ordered.nonzero(as_tuple=True)
        at = order.new_tensor(places)[order][k] + column
        return _Places(row, column, order[k], Lines(_offsets(ordered), at))

    @staticmethod
    def for_input(active: torch.Tensor, g: Geometry, wide: int) -> _Places:
        """Lines are columns of blocks, phase by phase, over windows of the gradient: the transposed matrix."""
        places = [(g.reach - shift) * wide for shift in g.shift]
        order = torch.tensor(sorted(range(len(places)), key=places.__getitem__), device=active.device)
        ordered = active.flatten(2)[:, :, order].permute(1, 2, 0)  # [columns, positions, rows]
        if g.phases > 1:
            belongs = order.new_tensor(g.phase)[order] == order.new_tensor(range(g.phases))[:, None]
            ordered = (ordered & belongs[:, None, :, None]).flatten(0, 1)
        line, k, row = ordered.nonzero(as_tuple=True)
        at = order.new_tensor(places)[order][k] + row
        return _Places(row, line % active.shape[1], order[k], Lines(_offsets(ordered), at))

    def blocks(self, weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
        """The blocks of the weight at these places, in float32."""
        rows, columns = block
        out, in_ = weight.shape[:2]
        if out % rows or in_ % columns:
            weight = functional.pad(weight, (0, 0, 0, 0, 0, -in_ % columns, 0, -out % rows))
        return _tiles(weight, block)[self.row, self.column, self.position].float()

    def gates(self, gate: torch.Tensor) -> torch.Tensor:
        """The gates of these blocks, [n, 1, 1] in float32."""
        return gate.flatten(2)[self.row, self.column, self.position].float()[:, None, None]


def _offsets(active: torch.Tensor) -> torch.Tensor:
    """How many blocks lie before each line, and in all."""
    return functional.pad(active.flatten(1).sum(1).cumsum(0), (1, 0))


def _tiles(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """A weight of whole blocks as [grid rows, grid columns, kernel positions, rows, columns]: a view."""
    tiles = weight.flatten(2).unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    return tiles.permute(0, 2, 4, 1, 3)


def _active(gate: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return gate != 0 if mask is None else (gate != 0) & mask


def masked_conv2d_forward(o: MaskedConv) -> torch.Tensor:
    """Convolution of x with theta * gate on the active blocks, plus b."""
    require_one_group(o.groups, "native")
    g, out = geometry(o.x, o.weight.shape[2:], o.stride, o.padding, o.dilation), o.weight.shape[0]
    shape = (g.images, out, g.height.out, g.width.out)
    if 0 in shape:
        return o.x.new_empty(shape)
    rows_of_x, places = _over_windows(o.x, _active(o.gate, o.forward_mask), g, o.columns)
    blocks = places.blocks(o.weight, (o.rows, o.columns)) * places.gates(o.gate)
    return convolved(o.x, rows_of_x, places.lines, blocks, out, o.bias, g)


def masked_conv2d_backward(o: MaskedConvBackward) -> list[torch.Tensor]:
    """Gradients of x, weight, gate and bias; empty where not needed."""
    require_one_group(o.groups, "native")
    needs, g = LayerNeeds(*o.needs), geometry(o.x, o.weight.shape[2:], o.stride, o.padding, o.dilation)
    mask = o.backward_mask if needs.weight or needs.gate else None
    on_blocks = mask is not None and _samples(mask, o)
    flat = gradient_pixels(o.grad, g, o.gate.shape[0], o.rows) if needs.x or on_blocks else o.grad
    dweight = dgate = o.x.new_empty(0)
    if on_blocks and mask is not None:
        dweight, dgate = _sampled_gradients(flat, mask, g, o)
    elif needs.weight or needs.gate:
        dweight, dgate = dense_filter_gradients(o, masked_weight_forward)
    dx = _input_gradient(flat, g, o) if needs.x else o.x.new_empty(0)
    return [dx, dweight, dgate, o.grad.sum((0, 2, 3)) if needs.bias else o.x.new_empty(0)]


def _samples(mask: torch.Tensor, o: MaskedConvBackward) -> bool:
    """Whether to make the weight's gradient on the blocks of the mask alone: where that is faster than all of it."""
    if o.grad.numel() == 0:
        return False
    density = int(mask.sum()) / mask.numel()
    return not dense_convolution_wins(o.x, o.weight, _SAMPLED_COST * density, min(o.rows, o.columns))


def _over_windows(x: torch.Tensor, active: torch.Tensor, g: Geometry, columns: int) -> tuple[torch.Tensor, _Places]:
    """The windows of x and the places of active blocks of the weight in a matrix over them."""
    across = active.shape[1]
    return image_windows(x, g, across, columns), _Places.for_output(active, g, spaced(g.phases * across, columns))


def _sampled_gradients(
    flat: torch.Tensor, mask: torch.Tensor, g: Geometry, o: MaskedConvBackward
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and gate from products of the upstream gradient and x on the blocks of `mask` alone."""
    x, weight, gate, block, needs = o.x, o.weight, o.gate, (o.rows, o.columns), LayerNeeds(*o.needs)
    rows_of_x, places = _over_windows(x, mask, g, block[1])
    raw = extension.empty((len(places.row), *block), torch.float32)
    sampled(flat, rows_of_x, places.lines, raw, weight.shape[0], g)
    dweight = dgate = weight.new_empty(0)
    if needs.gate:
        sums = (raw.double() * places.blocks(weight, block)).sum((1, 2))
        dgate = torch.zeros_like(gate, memory_format=torch.contiguous_format)
        dgate.flatten(2)[places.row, places.column, places.position] = sums.to(gate.dtype)
    if needs.weight:
        down, across = gate.shape[:2]
        whole = weight.new_zeros(down * block[0], across * block[1], *weight.shape[2:])
        tiles = (raw * places.gates(gate)).to(weight.dtype)
        _tiles(whole, block)[places.row, places.column, places.position] = tiles
        dweight = whole[: weight.shape[0], : weight.shape[1]].contiguous()
    return dweight, dgate


def _input_gradient(flat: torch.Tensor, g: Geometry, o: MaskedConvBackward) -> torch.Tensor:
    """dx: from the active blocks, transposed."""
    x, weight, gate, rows, columns = o.x, o.weight, o.gate, o.rows, o.columns
    if x.numel() == 0 or flat.numel() == 0:
        return torch.zeros_like(x, memory_format=memory_format(x))
    places = _Places.for_input(_active(gate, o.forward_mask), g, flat.shape[1] // rows)
    blocks = (places.blocks(weight, (rows, columns)) * places.gates(gate)).mT.contiguous()
    return input_gradient(x, flat, places.lines, blocks, gate.shape[1], g)
