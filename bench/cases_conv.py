"""Convolutions masked by blocks of channels, over sparsity, block and memory layout, against the dense convolution.

Ours is the layer that `Sparsifier` makes, with a hard mask. It chooses by itself where to convolve densely, and then
pays for forming the masked weight.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import spartan
from bench.case import Settings, Work, case
from bench.checks import check_close
from bench.inputs import normal, rotating
from spartan.nn import mask_weight
from spartan_kernels import ops


@dataclass(frozen=True)
class _Layer:
    """A convolution of a residual network: channels in and out, kernel, side of the image, images."""

    in_: int
    out: int
    kernel: int
    side: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.in_}to{self.out}-{self.kernel}x{self.kernel}-{self.side}x{self.side}"


_LAYERS = (_Layer(64, 128, 3, 28, 16), _Layer(256, 256, 1, 14, 16))
_SPARSITIES = (0.0, 0.5, 0.8, 0.9)
_BLOCKS = (16, 32)
_QUICK = {(32, 0.5), (32, 0.9)}
_SECONDS = 0.15
_FEW = 8  # output channels whose weight gradient is compared with float64


class _Problem:
    """A layer's weight and mask, and what a pass through it takes."""

    def __init__(self, s: Settings, layer: _Layer, size: int, sparsity: float, last: bool) -> None:
        self.s, self.layer, self.size, self.sparsity, self.last = s, layer, size, sparsity, last
        self.batch = 2 if s.quick else layer.batch
        shape = (layer.out, layer.in_, layer.kernel, layer.kernel)
        grid = ops.block_grid(shape, size)
        order = normal(grid, s, 2).flatten().argsort().argsort().view(grid)
        self.mask = order < round((1 - sparsity) * order.numel())
        self.kept_weights = ops.expand_blocks(self.mask, shape, size)
        self.module = nn.Conv2d(layer.in_, layer.out, layer.kernel, padding=layer.kernel // 2, bias=False)
        self.module.weight = nn.Parameter(normal(shape, s, 1, (layer.in_ * layer.kernel**2) ** -0.5))
        carrier = mask_weight(self.module, (size, size), soft=False)
        carrier.mask_hard.copy_(self.mask)
        carrier.masks_changed()
        self.weight = self.module.weight
        self.masked = (self.weight * self.kept_weights).detach()
        self.kept = int(self.mask.sum()) * size**2

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(x, weight, padding=self.layer.kernel // 2)

    def image(self, channels: int, seed: int) -> Tensor:
        image = normal((self.batch, channels, self.layer.side, self.layer.side), self.s, seed)
        return image.to(memory_format=torch.channels_last) if self.last else image

    def operands(self, i: int) -> tuple[Tensor, Tensor]:
        """Image and upstream gradient."""
        return self.image(self.layer.in_, 10 + i), self.image(self.layer.out, 1000 + i)

    def work(self, passes: int, **more: Any) -> Work:
        """A Work of one pass (forward) or three: forward, gradient of x, gradient of the kept weights."""
        pixels, itemsize = self.batch * self.layer.side**2, self.s.dtype.itemsize
        x_bytes, y_bytes, kept_bytes = (
            n * itemsize for n in (pixels * self.layer.in_, pixels * self.layer.out, self.kept)
        )
        nbytes = x_bytes + y_bytes + kept_bytes
        if passes == 3:
            # the backward passes read x, the kept weights and dy once, and write dx and the weights' gradient
            nbytes += 2 * x_bytes + 2 * kept_bytes + y_bytes
        columns = self.layer.in_ * self.layer.kernel**2
        notes = {
            "rows": pixels, "in": columns, "out": self.layer.out, "channels last": self.last, "block": self.size,
            "sparsity": self.sparsity,
        }  # fmt: skip
        return Work(
            operands=rotating(self.s, x_bytes + y_bytes, self.operands),
            bytes=nbytes,
            flops=passes * 2 * pixels * self.kept,
            notes={name: float(value) for name, value in {**notes, "passes": passes}.items()},
            seconds=_SECONDS,
            **more,
        )


def _close(got: Tensor, exact: Tensor, plain: Tensor, name: str) -> None:
    # sums in another order may be off by a rounding of the largest result
    check_close(got, exact, plain, 2 * torch.finfo(got.dtype).eps * exact.abs().max(), name=name)


def _forward(p: _Problem) -> Work:
    def check(y: Tensor, x: Tensor, grad: Tensor) -> None:
        one = x[:1]
        _close(y.detach()[:1], p.dense(one.double(), p.masked.double()), p.dense(one, p.masked), "y")

    @torch.no_grad()
    def ours(x: Tensor, grad: Tensor) -> Tensor:
        with spartan.backend(p.s.backend or "auto"):
            y: Tensor = p.module(x)
        return y

    @torch.no_grad()
    def dense(x: Tensor, grad: Tensor) -> Tensor:
        return p.dense(x, p.masked)

    return p.work(1, ours=ours, check=check, peers={"dense": dense})


def _forward_backward(p: _Problem) -> Work:
    leaf = p.masked.clone().requires_grad_()

    def ours(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        with spartan.backend(p.s.backend or "auto"):
            return torch.autograd.grad(p.module(x.requires_grad_()), (x, p.weight), grad)

    def dense(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(p.dense(x.requires_grad_(), leaf), (x, leaf), grad)

    def check(gradients: tuple[Tensor, Tensor], x: Tensor, grad: Tensor) -> None:
        dx, dweight = gradients
        one, upstream = x.detach()[:1], grad[:1]
        results = []
        for dtype in (torch.float64, p.s.dtype):
            image = one.to(dtype).requires_grad_()
            results += torch.autograd.grad(p.dense(image, p.masked.to(dtype)), image, upstream.to(dtype))
        _close(dx[:1], *results, "gradient of x")
        rows, results = slice(None, None, p.layer.out // _FEW), []
        kept = p.kept_weights[rows]
        for dtype in (torch.float64, p.s.dtype):
            few = p.masked[rows].to(dtype).requires_grad_()
            (all_,) = torch.autograd.grad(p.dense(x.detach().to(dtype), few), few, grad[:, rows].to(dtype))
            results.append(all_ * kept.to(dtype))
        _close(dweight[rows], *results, "gradient of the weight")

    return p.work(3, ours=ours, check=check, peers={"dense": dense})


def _register(layer: _Layer, size: int, sparsity: float, last: bool, backward: bool) -> None:
    kind, build = ("forward-backward", _forward_backward) if backward else ("forward", _forward)
    order = "channels-last" if last else "channels-first"

    def builder(s: Settings) -> Work:
        return build(_Problem(s, layer, size, sparsity, last))

    builder.__doc__ = (
        f"{kind.replace('-', ' and ').capitalize()} of a {layer.kernel} x {layer.kernel} convolution, {layer.in_} to"
        f" {layer.out} channels of {layer.side} x {layer.side}, {order}, {sparsity:.0%} of its {size} x {size} blocks"
        " zero."
    )
    name = f"{kind}-{layer.name}-{order}-block-{size}-sparsity-{sparsity * 100:.0f}"
    case("masked_conv", name, quick=layer is _LAYERS[0] and last and (size, sparsity) in _QUICK)(builder)


for _layer, _size, _sparsity, _last, _backward in itertools.product(
    _LAYERS, _BLOCKS, _SPARSITIES, (False, True), (False, True)
):
    _register(_layer, _size, _sparsity, _last, _backward)
