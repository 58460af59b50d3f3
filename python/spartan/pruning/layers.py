"""A weight as pruning sees it: its blocks and what they cost, its matrices, and the inputs that they multiply."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spartan.budgets import BlockCosts
from spartan.distributed import is_dtensor
from spartan.nn.kinds import is_transformers_linear
from spartan.nn.selection import Candidate, Use
from spartan_kernels import block_costs, block_grid

__all__ = ["Layer", "Watch", "require_plain", "watch_of", "wide"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PADDINGS = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
_CHUNK = 1 << 24  # entries of the inputs of a convolution that are laid out at a time


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights and statistics of `dtype` are computed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Layer:
    """A weight to prune, with the settings of its part of the model.

    Scores and masks are in the grid of its blocks [rows of blocks, columns of blocks, *kernel]; `values` has shape
    [out, in, *kernel]. Linear algebra takes it as `matrices` [groups, out / groups, kernel * in], of which each
    multiplies inputs of its own.

    Args:
        candidate: the weight.
        block_size: (rows, columns) of [out, in].
        pattern: (n, m) or None.
        costs: of its blocks in the weight's own dimensions; None: each weight costs 1.
    """

    def __init__(
        self,
        candidate: Candidate,
        block_size: tuple[int, int],
        pattern: tuple[int, int] | None = None,
        costs: BlockCosts | None = None,
    ) -> None:
        self.candidate, self.block_size, self.pattern = candidate, block_size, pattern
        self._stack = candidate.stack(block_size)
        self.shape = self.values().shape
        self.grid = block_grid(self.shape, block_size)
        own = block_costs(self.shape, block_size) if costs is None else costs.blocks
        if isinstance(own, torch.Tensor):
            own = (own if costs is None else self.oriented(own)).to(candidate.weight.device)
        self.costs = own
        self.groups = self._groups()

    @property
    def name(self) -> str:
        """Of the weight in the model."""
        return self.candidate.name

    @property
    def capacity(self) -> float:
        """Cost of all its blocks."""
        if isinstance(self.costs, torch.Tensor):
            return float(self.costs.double().sum())
        return self.costs * math.prod(self.grid)

    def values(self) -> torch.Tensor:
        """The weight as [out, in, *kernel], a view without a graph."""
        return self.oriented(self.candidate.weight.detach())

    def write(self, values: torch.Tensor) -> None:
        """Make these [out, in, *kernel] the weight's values, at once."""
        with torch.no_grad():
            self.values().copy_(values)

    def matrices(self, values: torch.Tensor) -> torch.Tensor:
        """Of values [out, in, *kernel] the matrices [groups, out / groups, kernel * in]."""
        return values.movedim(1, -1).reshape(self.groups, self.shape[0] // self.groups, -1)

    def from_matrices(self, matrices: torch.Tensor) -> torch.Tensor:
        """The inverse of `matrices`."""
        return matrices.reshape(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)

    def expand(self, grid: torch.Tensor) -> torch.Tensor:
        """The value of each weight's block, [out, in, *kernel]."""
        rows, columns = self.block_size
        if (rows, columns) == (1, 1):
            return grid
        tall = grid.repeat_interleave(rows, 0)[: self.shape[0]]
        return tall.repeat_interleave(columns, 1)[:, : self.shape[1]]

    def zeros(self) -> int:
        """Number of zeros in the weight."""
        return self.candidate.weight.numel() - int(self.candidate.weight.count_nonzero())

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape or its blocks', in the dimensions [out, in, *kernel]: a view."""
        if self._stack is not None:
            tensor = self._stack.turned(tensor)
        return tensor.transpose(0, 1) if self.candidate.transposed else tensor

    def _groups(self) -> int:
        """How many matrices with inputs of their own it is made of: the groups of a convolution."""
        module = self.candidate.uses[0].module
        return module.groups if isinstance(module, _CONVOLUTIONS) else 1


def require_plain(layers: Sequence[Layer]) -> None:
    """Raise ValueError at a weight that is sharded, or not finite."""
    for layer in layers:
        weight = layer.candidate.weight
        if is_dtensor(weight):
            raise ValueError(f"weight {layer.name!r} is sharded; prune the model before it is")
        bad = weight.numel() - int(weight.isfinite().count_nonzero())
        if bad:
            raise ValueError(f"weight {layer.name!r} must be finite; {bad} of its entries are NaN or infinite")


@dataclass(frozen=True)
class Watch:
    """Where the inputs of a weight are seen: before `module` is called, `read(args, kwargs)` gives the tensor.

    `rows` lays them out as the weight's matrices multiply them, some of them at a time: [groups, rows, kernel * in];
    `layout`: equal where two weights lay the same tensor out alike.
    """

    module: nn.Module
    read: Callable[[tuple[Any, ...], dict[str, Any]], torch.Tensor]
    rows: Callable[[torch.Tensor], Iterator[torch.Tensor]]
    layout: tuple[Any, ...] = ()


def watch_of(use: Use) -> Watch | None:
    """How the inputs of a weight are seen where a module has it; None if hooks cannot see them."""
    module, owner = use.module, use.owner
    if isinstance(owner, nn.MultiheadAttention) and use.parameter == "weight" and module is owner.out_proj:
        return Watch(owner, lambda args, kwargs: _attended(owner, args, kwargs), _flat)
    if isinstance(module, nn.MultiheadAttention) and use.parameter == "in_proj_weight":
        return Watch(module, _same_for_all, _flat)
    if use.parameter != "weight":
        return None
    if isinstance(module, nn.Linear) or is_transformers_linear(module):
        return Watch(module, _first, _flat)
    if isinstance(module, _CONVOLUTIONS):
        sides = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
        return Watch(module, _first, lambda inputs: _patches(module, inputs), sides)
    return None


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _flat(inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    yield inputs.reshape(1, -1, inputs.shape[-1])


def _same_for_all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What an attention projects to queries, keys and values, where that is one tensor."""
    query, key, value = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)][:3]
    if query is not key or key is not value:
        raise ValueError(
            "in_proj_weight of an attention can be calibrated where query, key and value are one tensor; here they"
            " differ: leave it out with exclude="
        )
    return query


def _attended(attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What goes into the output projection: the attention's result with the identity in the projection's place."""
    projection = attention.out_proj
    weight = projection.weight
    stand_in = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
    if projection.bias is not None:
        stand_in["out_proj.bias"] = torch.zeros_like(projection.bias)
    attended: torch.Tensor = torch.func.functional_call(attention, stand_in, args, kwargs)[0]
    return attended


def _patches(module: Any, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Inputs of each output position of a convolution [groups, images * positions, kernel * channels of a group]."""
    kernel, dims = module.kernel_size, len(module.kernel_size)
    inputs = inputs if inputs.dim() == dims + 2 else inputs[None]
    sides = [side for pair in reversed(_padding(module)) for side in pair]
    padded = functional.pad(inputs, sides, _PADDINGS[module.padding_mode]) if any(sides) else inputs
    seen = padded
    for dim, (size, step, dilation) in enumerate(zip(kernel, module.stride, module.dilation, strict=True)):
        seen = seen.unfold(dim + 2, dilation * (size - 1) + 1, step)[..., ::dilation]
    # now [images, channels, *positions, *kernel], a view
    seen = seen.unflatten(1, (module.groups, -1)).movedim(1, 0).movedim(2, -1)
    of_an_image = math.prod(seen.shape) // max(seen.shape[1], 1)
    for some in seen.split(max(1, _CHUNK // max(of_an_image, 1)), 1):
        yield some.reshape(module.groups, -1, math.prod(kernel) * some.shape[-1])


def _padding(module: Any) -> list[tuple[int, int]]:
    """Zeros before and after each dimension."""
    if not isinstance(module.padding, str):
        return [(side, side) for side in module.padding]
    spans = [dilation * (size - 1) for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    return [(span // 2, span - span // 2) if module.padding == "same" else (0, 0) for span in spans]
