"""Convolution as one block-sparse product over the pixels of a channels-last copy: im2col that copies nothing.

Pixels lie one after another, p floats apart, images and rows separated by the zeros of the padding. The window of a
pixel is then a row of a matrix that overlaps itself: [pixels, reach * p] with stride p, where kernel position (i, j)
finds its channels at column (i * pitch + j) * p. What lies between the positions of a kernel are columns without active
blocks, which the product never reads. With a stride s, s x s neighbouring pixels become one pixel of s * s times the
channels, which makes the stride 1. The gradient of x is the same product with the transposed blocks over the upstream
gradient.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

from spartan_kernels.arguments import memory_format
from spartan_kernels.backends.native_matmul import _Matrix
from spartan_kernels.backends.reference.masked_conv import parameter_gradients

__all__ = ["masked_conv2d_backward", "masked_conv2d_forward"]

_PAGE_FLOATS = 512  # rows this far apart fall into the same few places of the cache


class _Axis:
    """One dimension of an image, in steps of the stride: step q holds the positions q * stride + phase."""

    def __init__(self, size: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
        taps = [i * dilation for i in range(kernel)]
        self.out = (size + 2 * padding - taps[-1] - 1) // stride + 1
        self.phases = sorted({tap % stride for tap in taps})
        self.phase = [self.phases.index(tap % stride) for tap in taps]
        self.offset = [tap // stride for tap in taps]
        self.reach = max(self.offset)
        full = self.out + self.reach
        # for each phase: its steps that hold data, and the positions of x that they are
        self.parts: list[tuple[slice, slice]] = []
        for phase in self.phases:
            first = max(0, -(-(padding - phase) // stride))
            last = max(first, min(full, (size - 1 + padding - phase) // stride + 1))
            source = first * stride + phase - padding
            self.parts.append((slice(first, last), slice(source, source + (last - first) * stride, stride)))
        held = [steps for steps, _ in self.parts if steps.stop > steps.start]
        lead = min((steps.start for steps in held), default=0)
        end = max((steps.stop for steps in held), default=0)
        # the zeros before the next line's data serve as those behind this one's
        self.pitch = max(end, full - lead, self.out)


@dataclass(frozen=True)
class _Geometry:
    """Where pixels and kernel positions lie in the flat copies of x and of the upstream gradient."""

    images: int
    height: _Axis
    width: _Axis

    @cached_property
    def pixels(self) -> int:
        return self.images * self.height.pitch * self.width.pitch

    @cached_property
    def tokens(self) -> int:
        """Pixels up to the last one that has a result."""
        last_row = (self.images - 1) * self.height.pitch + self.height.out - 1
        return last_row * self.width.pitch + self.width.out

    @cached_property
    def reach(self) -> int:
        return self.height.reach * self.width.pitch + self.width.reach

    @cached_property
    def phases(self) -> int:
        return len(self.height.phases) * len(self.width.phases)

    @cached_property
    def shift(self) -> list[int]:
        """For each kernel position: how many pixels ahead it looks."""
        return [i * self.width.pitch + j for i, j in itertools.product(self.height.offset, self.width.offset)]

    @cached_property
    def phase(self) -> list[int]:
        """For each kernel position: in which phase of the pixel its channels lie."""
        count = len(self.width.phases)
        return [i * count + j for i, j in itertools.product(self.height.phase, self.width.phase)]

    def lines(self, flat: torch.Tensor) -> torch.Tensor:
        """The pixels of a flat copy as [images, rows, columns, channels]."""
        return flat[: self.pixels].view(self.images, self.height.pitch, self.width.pitch, flat.shape[1])

    def parts(self, channels: int, width: int) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """For each phase: its place in `lines` and in a channels-last image; phases are `width` channels apart."""
        pairs = itertools.product(self.height.parts, self.width.parts)
        every = slice(None)
        return [
            ((every, h[0], w[0], slice(k * width, k * width + channels)), (every, h[1], w[1], every))
            for k, (h, w) in enumerate(pairs)
        ]


def _geometry(
    x: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> _Geometry:
    axes = (_Axis(*each) for each in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True))
    return _Geometry(x.shape[0], *axes)


def _spaced(blocks: int, size: int) -> int:
    """Blocks of `size` channels from one pixel to the next."""
    return blocks + (blocks * size % _PAGE_FLOATS == 0)


def _flat_input(x: torch.Tensor, g: _Geometry, width: int, channels: int) -> torch.Tensor:
    """x channels-last in float32, phases `width` channels apart, with its zeros: [pixels and more, channels]."""
    source = x.permute(0, 2, 3, 1)
    if (g.height.pitch, g.width.pitch, g.reach, channels) == (*x.shape[2:], 0, x.shape[1]) and source.is_contiguous():
        return source.reshape(-1, channels).float()  # that is what x is already
    flat = torch.zeros(max(g.pixels, g.tokens + g.reach), channels)
    lines = g.lines(flat)
    for place, origin in g.parts(x.shape[1], width):
        lines[place].copy_(source[origin])
    return flat


def _flat_grad(grad: torch.Tensor, g: _Geometry, channels: int) -> torch.Tensor:
    """The upstream gradient at the pixels that have results, behind `reach` pixels of zeros."""
    flat = torch.zeros(g.reach + g.pixels, channels)
    valid = g.lines(flat[g.reach :])[:, : g.height.out, : g.width.out, : grad.shape[1]]
    valid.copy_(grad.permute(0, 2, 3, 1))
    return flat


def _windows(flat: torch.Tensor, tokens: int, pixels: int) -> torch.Tensor:
    """Each token's row: the channels of `pixels` pixels from its own on."""
    return flat.as_strided((tokens, pixels * flat.shape[1]), (flat.shape[1], 1))


def _product(
    windows: torch.Tensor,
    blocks: torch.Tensor,
    line: torch.Tensor,
    column: torch.Tensor,
    out: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """windows times the transpose of a matrix of `out` rows, given by its blocks ordered by line and column."""
    size = (blocks.shape[1], blocks.shape[2])
    count = torch.bincount(line, minlength=-(-out // size[0]))
    row_offsets = functional.pad(count.cumsum(0), (1, 0)).to(torch.int32)
    # the index by columns is not read by a forward product: one without blocks
    no_columns = torch.zeros(windows.shape[1] // size[1] + 1, dtype=torch.int32)
    index = [row_offsets, column.to(torch.int32), no_columns, torch.zeros_like(line, dtype=torch.int32)]
    shape = (out, windows.shape[1])
    matrix = _Matrix(blocks, shape, size, index, positions=torch.zeros_like(line, dtype=torch.int32))
    return matrix.forward(windows, bias, "", False)[0]


def _blocks(
    weight: torch.Tensor,
    gate: torch.Tensor,
    mask: torch.Tensor | None,
    line: torch.Tensor,
    column: torch.Tensor,
    block: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """theta * gate of the active blocks, ordered by line and column, with these; both are given for every block."""
    rows, columns = block
    active = gate != 0 if mask is None else (gate != 0) & mask
    r, c, i, j = active.nonzero(as_tuple=True)
    line, column = line[r, c, i, j], column[r, c, i, j]
    order = (line * (1 + int(column.max() if len(column) else 0)) + column).argsort()
    r, c, i, j = (index[order] for index in (r, c, i, j))
    out, in_ = weight.shape[:2]
    if out % rows or in_ % columns:
        weight = functional.pad(weight, (0, 0, 0, 0, 0, -in_ % columns, 0, -out % rows))
    grid = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).permute(0, 2, 4, 5, 1, 3)
    values = grid[r, c, i, j].float() * gate[r, c, i, j].float()[:, None, None]
    return values, line[order], column[order]


def _image(tokens: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Channels-last tokens as an image of x's dtype, laid out in memory as x is."""
    image = tokens.as_strided(shape, strides).permute(0, 3, 1, 2)
    return image.to(like.dtype).contiguous(memory_format=memory_format(like))


def masked_conv2d_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    forward_mask: torch.Tensor | None,
    backward_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """Convolution of x with theta * gate on the active blocks, plus b."""
    _require_one_group(groups)
    g, out = _geometry(x, weight, stride, padding, dilation), weight.shape[0]
    shape = (g.images, g.height.out, g.width.out, out)
    if 0 in shape:
        return x.new_empty(shape[0], out, *shape[1:3])
    across = gate.shape[1]
    spaced = _spaced(g.phases * across, columns)
    flat = _flat_input(x, g, across * columns, spaced * columns)
    shift, phase = torch.tensor(g.shift), torch.tensor(g.phase)
    place = (shift * spaced + phase * across).view(gate.shape[2:])
    column = (place + torch.arange(across)[:, None, None]).expand(gate.shape)
    line = torch.arange(gate.shape[0])[:, None, None, None].expand(gate.shape)
    blocks = _blocks(weight, gate, forward_mask, line, column, (rows, columns))
    y = _product(_windows(flat, g.tokens, g.reach + 1), *blocks, out, None if bias is None else bias.float())
    strides = (g.height.pitch * g.width.pitch * out, g.width.pitch * out, out, 1)
    return _image(y, shape, strides, x)


def masked_conv2d_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    forward_mask: torch.Tensor | None,
    backward_mask: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    rows: int,
    columns: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of x, weight, gate and bias; empty where not needed. That of the weight is PyTorch's dense one."""
    _require_one_group(groups)
    geometry = stride, padding, dilation, False, [0, 0], groups
    results = [x.new_empty(0) for _ in range(4)]
    if needs[0]:
        g = _geometry(x, weight, stride, padding, dilation)
        results[0] = _input_gradient(grad, x, weight, gate, forward_mask, g, (rows, columns))
    if needs[1] or needs[2]:
        wanted = [False, True, False]
        dense = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, wanted)[1]
        results[1:3] = parameter_gradients(dense, weight, gate, backward_mask, rows, columns, needs)
    if needs[3]:
        results[3] = grad.sum((0, 2, 3))
    return results


def _input_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    mask: torch.Tensor | None,
    g: _Geometry,
    block: tuple[int, int],
) -> torch.Tensor:
    """dx: transposed blocks over the upstream gradient; its outputs are the channels of x, phase by phase."""
    rows, columns = block
    dx = torch.zeros_like(x, memory_format=memory_format(x))
    if dx.numel() == 0 or grad.numel() == 0:
        return dx
    down, across = gate.shape[:2]
    spaced = _spaced(down, rows)
    flat = _flat_grad(grad, g, spaced * rows)
    shift, phase = torch.tensor(g.shift), torch.tensor(g.phase)
    place = ((g.reach - shift) * spaced).view(gate.shape[2:])
    column = (place + torch.arange(down)[:, None, None, None]).expand(gate.shape)
    line = ((phase * across).view(gate.shape[2:]) + torch.arange(across)[:, None, None]).expand(gate.shape)
    values, line, column = _blocks(weight, gate, mask, line, column, block)
    windows = _windows(flat, g.pixels, g.reach + 1)
    tokens = _product(windows, values.mT.contiguous(), line, column, g.phases * across * columns)
    lines, image = g.lines(tokens), dx.permute(0, 2, 3, 1)
    for place_, origin in g.parts(x.shape[1], across * columns):
        image[origin].copy_(lines[place_])
    return dx


def _require_one_group(groups: int) -> None:
    if groups != 1:
        raise ValueError(f"groups must be 1 for backend='native'; got {groups}: leave the backend to 'auto'")
