"""How much passes through each input and output of a layer: what bounds the gradient of every weight between them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from spartan.masks import MaskedTensor

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
        """The sums by block of the weight's first and second dimension, over the ranks of the default process group.

        Those are outputs and inputs, or inputs and outputs of a weight that is stored so. None where no pass went
        through the layer, or one overflowed.
        """
        weight, (rows, columns) = self._tensor.weight, self._tensor.carrier.mask_block_size
        split = self._tensor.carrier.mask_hard.shape[0]
        sums = torch.zeros(sum(self._tensor.carrier.mask_hard.shape[:2]), dtype=torch.float64, device=weight.device)
        if self._inputs is not None and self._outputs is not None:
            first, second = self._outputs, self._inputs
            if self._tensor.transposed:
                first, second = second, first
            sums[:split] = _sum_blocks(first, rows)
            sums[split:] = _sum_blocks(second.reshape(-1, weight.shape[1]).sum(0), columns)
        if self._handles and dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        first, second = sums[:split], sums[split:]
        total = first.sum() * second.sum()
        return (first, second) if bool(torch.isfinite(total) & (total > 0)) else None

    def _layers(self) -> list[tuple[nn.Module, int]]:
        """The modules whose forward multiplies by the weight, with the place of the features among dimensions."""
        layers = []
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
    magnitudes = values.detach().abs().movedim(channel, -1)
    more = magnitudes.reshape(-1, magnitudes.shape[-1]).sum(0, dtype=torch.float64)
    return more if total is None else total + more


def _sum_blocks(values: torch.Tensor, side: int) -> torch.Tensor:
    """Sums of `side` neighbours; the last may be fewer."""
    return functional.pad(values, (0, -len(values) % side)).reshape(-1, side).sum(1)
