"""Where the inputs of a weight are seen, and how its matrices multiply them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spartan.nn.kinds import TRANSPOSED_CONVOLUTIONS, is_transformers_linear
from spartan.nn.selection import Use

__all__ = ["Watch", "watch_of"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PADDINGS = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
_CHUNK = 1 << 20  # entries of the inputs of a convolution that are laid out at a time


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
        return Watch(module, _first, lambda inputs: _patches(module, _padded(module, inputs), module.stride), sides)
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return Watch(
            module, lambda args, kwargs: _spread_out(module, args, kwargs), lambda inputs: _reversed(module, inputs)
        )
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


def _patches(
    module: Any, inputs: torch.Tensor, stride: Sequence[int], *, flipped: bool = False
) -> Iterator[torch.Tensor]:
    """What each output position sees of padded inputs, [groups, images * positions, kernel * channels of a group]."""
    kernel = module.kernel_size
    seen = inputs
    for dim, (size, step, dilation) in enumerate(zip(kernel, stride, module.dilation, strict=True)):
        seen = seen.unfold(dim + 2, dilation * (size - 1) + 1, step)[..., ::dilation]
    # now [images, channels, *positions, *kernel], a view
    seen = seen.unflatten(1, (module.groups, -1)).movedim(1, 0).movedim(2, -1)
    of_a_line = math.prod(seen.shape) // max(seen.shape[1] * seen.shape[2], 1)
    lines = max(1, _CHUNK // max(of_a_line, 1))  # along the first dimension of the positions
    for images in seen.split(max(1, lines // max(seen.shape[2], 1)), 1):
        for some in images.split(lines, 2):
            some = some.flip(tuple(range(-1 - len(kernel), -1))) if flipped else some
            yield some.reshape(module.groups, -1, math.prod(kernel) * some.shape[-1])


def _padded(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The padded inputs of a convolution, [images, channels, *positions]."""
    inputs = inputs if inputs.dim() == len(module.kernel_size) + 2 else inputs[None]
    sides = [side for pair in reversed(_padding(module)) for side in pair]
    return functional.pad(inputs, sides, _PADDINGS[module.padding_mode]) if any(sides) else inputs


def _padding(module: Any) -> list[tuple[int, int]]:
    """Zeros before and after each dimension."""
    if not isinstance(module.padding, str):
        return [(side, side) for side in module.padding]
    spans = [dilation * (size - 1) for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    return [(span // 2, span - span // 2) if module.padding == "same" else (0, 0) for span in spans]


def _spread_out(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The inputs of a transposed convolution with its stride between them, padded so that it is a plain one over them.

    With stride s, padding p, dilation d, kernel size K and output padding e, of each dimension,

        y_o[q] = sum over inputs i, positions k < K of  W_iok x_i[(q + p - d k) / s],   x_i[.] = 0 but at whole places
               = sum over i, k of  W_iok z_i[q + d (K - 1 - k)],

    where z_i[d (K - 1) - p + s j] = x_i[j] and zero elsewhere: an output sees the patch of z at q, kernel reversed. So
    z has d (K - 1) - p zeros before, and e more than that behind; fewer than none cuts inputs that no output sees.
    """
    inputs = args[0] if args else kwargs["input"]
    size = args[1] if len(args) > 1 else kwargs.get("output_size")
    dims = len(module.kernel_size)
    inputs = inputs if inputs.dim() == dims + 2 else inputs[None]
    spread = [step * (side - 1) + 1 for step, side in zip(module.stride, inputs.shape[2:], strict=True)]
    between = inputs.new_zeros(*inputs.shape[:2], *spread)
    places = (..., *(slice(None, None, step) for step in module.stride))
    between[places] = inputs
    sides: list[int] = []
    for dim in reversed(range(dims)):
        before = module.dilation[dim] * (module.kernel_size[dim] - 1) - module.padding[dim]
        least = spread[dim] + before - module.padding[dim]
        more = module.output_padding[dim] if size is None else size[dim - dims] - least
        sides += [before, before + more]
    return functional.pad(between, sides)


def _reversed(module: Any, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """What each output position of a transposed convolution sees of inputs that are spread out."""
    return _patches(module, inputs, [1] * len(module.kernel_size), flipped=True)
