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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from spartan_kernels.arguments import memory_format
from spartan_kernels.backends import extension

__all__ = ["Geometry", "geometry", "image_of", "result_memory", "tokens_of_grad", "tokens_of_input", "windows"]


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
class Geometry:
    """Where pixels and kernel positions lie in the flat copies of x and of the upstream gradient."""

    images: int
    height: _Axis
    width: _Axis

    @cached_property
    def pixels(self) -> int:
        """Of the flat copies, with the zeros between lines."""
        return self.images * self.height.pitch * self.width.pitch

    @cached_property
    def tokens(self) -> int:
        """Pixels up to the last one that has a result."""
        last_row = (self.images - 1) * self.height.pitch + self.height.out - 1
        return last_row * self.width.pitch + self.width.out

    @cached_property
    def reach(self) -> int:
        """How many pixels ahead the last kernel position looks."""
        return self.height.reach * self.width.pitch + self.width.reach

    @cached_property
    def phases(self) -> int:
        """Neighbouring pixels that a stride makes one."""
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

    @property
    def whole(self) -> bool:
        """Whether the tokens are the pixels of the result, one after another, and each sees one pixel of x."""
        return (self.reach, self.phases) == (0, 1) and self.pixels == self.images * self.height.out * self.width.out

    def reads_all(self, x: torch.Tensor) -> bool:
        """Whether the pixels of x are read one after another, all of them and nothing else."""
        axes = zip((self.height, self.width), x.shape[2:], strict=True)
        return all(axis.parts == [(slice(0, size), slice(0, size, 1))] and axis.pitch == size for axis, size in axes)

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


def geometry(
    x: torch.Tensor, kernel: Sequence[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Geometry:
    """Where the pixels and kernel positions of a convolution lie."""
    axes = (_Axis(*each) for each in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True))
    return Geometry(x.shape[0], *axes)


def _kept(use: str, rows: int, columns: int) -> torch.Tensor:
    """Float32 scratch of this thread, whose memory nothing that is returned may share."""
    size = rows * columns * 4
    return extension.workspace(size, use)[:size].view(torch.float32).view(rows, columns)


def result_memory(like: torch.Tensor, g: Geometry, rows: int, columns: int) -> torch.Tensor:
    """Memory for the tokens that become an image like x: its own where they can be one as they are, else scratch."""
    if g.whole and like.dtype == torch.float32:
        return extension.empty((rows, columns), torch.float32)
    return _kept("result of a convolution", rows, columns)


def tokens_of_input(x: torch.Tensor, g: Geometry, width: int, channels: int) -> torch.Tensor:
    """x channels-last in float32, phases `width` channels apart, with its zeros: [pixels and more, channels]."""
    source = x.permute(0, 2, 3, 1)
    if g.whole and g.reads_all(x) and channels == x.shape[1] and source.is_contiguous():
        return source.reshape(-1, channels).float()  # that is what x is already
    flat = _kept("input of a convolution", max(g.pixels, g.tokens + g.reach), channels).zero_()
    lines = g.lines(flat)
    for place, origin in g.parts(x.shape[1], width):
        lines[place].copy_(source[origin])
    return flat


def tokens_of_grad(grad: torch.Tensor, g: Geometry, channels: int) -> torch.Tensor:
    """The upstream gradient at the pixels that have results, behind `reach` pixels of zeros."""
    source = grad.permute(0, 2, 3, 1)
    if g.whole and channels == grad.shape[1] and source.is_contiguous():
        return source.reshape(-1, channels).float()
    flat = _kept("gradient of a convolution", g.reach + g.pixels, channels).zero_()
    g.lines(flat[g.reach :])[:, : g.height.out, : g.width.out, : grad.shape[1]].copy_(source)
    return flat


def windows(flat: torch.Tensor, tokens: int, pixels: int) -> torch.Tensor:
    """Each token's row: the channels of `pixels` pixels from its own on."""
    return flat.as_strided((tokens, pixels * flat.shape[1]), (flat.shape[1], 1))


def image_of(lines: torch.Tensor, like: torch.Tensor, g: Geometry) -> torch.Tensor:
    """[images, rows, columns, channels] in `result_memory` as an image of x's dtype, laid out in memory as x is."""
    layout = memory_format(like)
    image = lines.permute(0, 3, 1, 2).to(like.dtype).contiguous(memory_format=layout)
    scratch = not (g.whole and like.dtype == torch.float32)
    shared = image.untyped_storage().data_ptr() == lines.untyped_storage().data_ptr()  # of an image of one row, say
    return image.clone(memory_format=layout) if scratch and shared else image
