"""How much passes through each input and output of a layer: what bounds the gradient of every weight between them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from spartan.distributed import group_of_passes, local, total_over
from spartan.masks import MaskedTensor
from spartan_kernels import block_grid

__all__ = ["Activity"]

# Dimensions that follow the features.
_KINDS = {
    nn.Linear: 0,
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}


class Activity:
    """Sums of |x| by input feature and of |dL/dy| by output feature, over all passes of a layer while it is `active`.

    f_i = sum_n |x_ni|, g_o = sum_n |(dL/dy)_no|; for a convolution n runs over samples and positions, and the
    channels of all groups that share a place in the weight count together. |dL/dw_oi| = |sum_n (dL/dy)_no x_ni| is at
    most g_o f_i. Nothing of the passes is kept but these sums.

    Args:
        tensor: the weight; of the modules that have it linear and convolution layers are watched, others have no sums.
    """

    def __init__(self, tensor: MaskedTensor) -> None:
        self.active = False
        self._tensor = tensor
        self._inputs: torch.Tensor | None = None
        self._outputs: torch.Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self.open()

    def open(self) -> None:
        """Watch the modules, if they are not watched already."""
        if not self._handles:
            for module, channel in self._layers():
                watch = partial(self._watch, channel)
                self._handles.append(module.register_forward_hook(watch, with_kwargs=True))

    def clear(self) -> None:
        """Begin anew."""
        self._inputs = self._outputs = None

    def close(self) -> None:
        """Watch no longer."""
        self.active = False
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def by_block(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The sums by block of the whole weight's first and second dimension, over the ranks that it trains on.

        Those are outputs and inputs, or inputs and outputs of a weight that is stored so. None where no pass went
        through the layer, or one overflowed. All ranks call it.
        """
        weight, sides = self._tensor.weight, self._tensor.carrier.mask_block_size
        split, other = block_grid(self._tensor.shape, sides)[:2]
        sums = torch.zeros(split + other, dtype=torch.float64, device=self._tensor.seen.device)
        if self._handles:
            self._add_own(sums[:split], sums[split:])
            sums = total_over(sums, group_of_passes(weight))
        first, second = sums[:split], sums[split:]
        total = first.sum() * second.sum()
        return (first, second) if bool(torch.isfinite(total) & (total > 0)) else None

    def _add_own(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Add what passed here, at its place among the blocks of the whole weight.

        Tensor parallelism lets a slice of the inputs or of the outputs pass on each rank, and all of the others: every
        one of those then counts as often as there are slices, a factor that shares do not have.
        """
        tensor = self._tensor
        places = self._slices(first, second)
        if self._inputs is None or self._outputs is None or not math.prod(tensor.seen.shape):
            return
        passed = (self._inputs, self._outputs) if tensor.transposed else (self._outputs, self._inputs)
        for dim, (sums, values) in enumerate(zip((first, second), passed, strict=True)):
            whole, own = tensor.weight.shape[dim], tensor.seen.shape[dim]
            gathered = len(values) == whole  # as tensor parallelism may leave outputs
            values = values.reshape(-1, whole if gathered else own).sum(0)
            sums[slice(None) if gathered else places[dim]] += _sum_blocks(values, tensor.carrier.mask_block_size[dim])

    def _slices(self, first: torch.Tensor, second: torch.Tensor) -> list[slice]:
        """Where the blocks of this rank's slice lie among those of the whole weight, along its first two dimensions."""
        seen = self._tensor.seen
        if seen.mesh is None:
            return [slice(None), slice(None)]
        grid = torch.arange(len(first) * len(second), device=first.device).reshape(len(first), len(second))
        own = seen.slice_of(grid)
        if not own.numel():
            return [slice(0, 0), slice(0, 0)]
        row, column = divmod(int(own[0, 0]), len(second))
        return [slice(row, row + own.shape[0]), slice(column, column + own.shape[1])]

    def _layers(self) -> list[tuple[nn.Module, int]]:
        """The modules whose forward multiplies by the weight, with the place of the features among dimensions."""
        layers: list[tuple[nn.Module, int]] = []
        if self._tensor.stack is not None:  # which inputs a matrix of it sees is known to its module alone
            return layers
        for module in (self._tensor.module, *(module for module, _ in self._tensor.shared)):
            trailing = next((n for kind, n in _KINDS.items() if isinstance(module, kind)), None)
            if trailing is None and self._tensor.transposed:
                trailing = 0  # a linear layer with its weight as [in, out]
            if trailing is not None:
                layers.append((module, -1 - trailing))
        return layers

    def _watch(self, channel: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if self.active and isinstance(output, torch.Tensor) and output.requires_grad and isinstance(x, torch.Tensor):
            self._inputs = _added(self._inputs, x, channel)
            output.register_hook(partial(self._collect, channel))

    def _collect(self, channel: int, grad: torch.Tensor) -> None:
        self._outputs = _added(self._outputs, grad, channel)


def _added(total: torch.Tensor | None, values: torch.Tensor, channel: int) -> torch.Tensor:
    magnitudes = local(values).abs().movedim(channel, -1)
    more = magnitudes.reshape(-1, magnitudes.shape[-1]).sum(0, dtype=torch.float64)
    return more if total is None else total + more


def _sum_blocks(values: torch.Tensor, side: int) -> torch.Tensor:
    """Sums of `side` neighbours; the last may be fewer."""
    return functional.pad(values, (0, -len(values) % side)).reshape(-1, side).sum(1)
