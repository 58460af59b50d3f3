"""What a top-k problem is: arguments as the user gives them, checked and brought to rows or to a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch

from spartan_kernels.arguments import number, require_float, scalar


def row_problem(
    values: torch.Tensor, budget: float | torch.Tensor, costs: float | torch.Tensor | None, dim: int
) -> tuple[torch.Tensor, Any, torch.Tensor | None, Callable[[torch.Tensor], torch.Tensor]]:
    """Values [rows, n], budget [rows] or a number, costs None, [], [n] or [rows, n], and the old shape's restorer."""
    require_float("values", values)
    dim = _normalised(dim, values)
    row_costs = _row_costs(costs, values, dim)
    if values.dim() == 2 and dim == 1:
        return values, _row_budget(budget, values.shape[:1], values.device), row_costs, _as_it_is
    moved = values.movedim(dim, -1)
    shape = moved.shape

    def restore(found: torch.Tensor) -> torch.Tensor:
        return found.reshape(*shape[:-1], found.shape[-1]).movedim(-1, dim)

    rows = moved.reshape(shape[:-1].numel(), shape[-1])
    return rows, _row_budget(budget, shape[:-1], values.device), row_costs, restore


def _as_it_is(mask: torch.Tensor) -> torch.Tensor:
    return mask


def global_problem(
    values: Sequence[torch.Tensor],
    costs: Sequence[float | torch.Tensor] | None,
    shapes: list[torch.Size] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors and costs of an operator over a list, checked; no costs are an empty list.

    `shapes` are those of the costs, where they are not their values'.
    """
    tensors = list(values)
    if not tensors:
        raise ValueError("values must hold at least one tensor; got none")
    dtype, device = getattr(tensors[0], "dtype", None), getattr(tensors[0], "device", None)
    for index, tensor in enumerate([] if _alike(tensors) else tensors):
        if index == 0 or not isinstance(tensor, torch.Tensor) or tensor.dtype is not dtype:  # lists may be long
            require_float(f"values[{index}]", tensor)
        if tensor.dtype is not dtype or tensor.device != device:
            raise ValueError(
                f"values must share a dtype and a device; values[0] is {tensors[0].dtype} on {tensors[0].device},"
                f" values[{index}] is {tensor.dtype} on {tensor.device}"
            )
    if costs is None:
        return tensors, []
    if isinstance(costs, (int, float, torch.Tensor)) or len(costs) != len(tensors):
        found = len(costs) if isinstance(costs, Sequence) else type(costs).__name__
        raise ValueError(f"costs must be None or one entry for each of the {len(tensors)} values; got {found}")
    wanted = shapes or [tensor.shape for tensor in tensors]
    return tensors, [
        _tensor_cost(i, c, v, shape) for i, (c, v, shape) in enumerate(zip(costs, tensors, wanted, strict=True))
    ]


def _alike(tensors: list[Any]) -> bool:
    """Whether these are plain floating-point tensors of one dtype and device, asked of a whole list at once."""
    if torch.compiler.is_compiling() or not {torch.Tensor, torch.nn.Parameter}.issuperset(map(type, tensors)):
        return False
    return tensors[0].is_floating_point() and len({*map(attrgetter("dtype", "device"), tensors)}) == 1


def list_in_autocast(values: Sequence[Any]) -> list[Any]:
    """`as_in_autocast` of each."""
    first = values[0] if values else None
    if isinstance(first, torch.Tensor) and not torch.is_autocast_enabled(first.device.type):
        return list(values)
    return [as_in_autocast(v) for v in values]


def as_in_autocast(values: Any) -> Any:
    """Values of half precision in an autocast region: in float32, its rule for softmax and for sums."""
    half = isinstance(values, torch.Tensor) and values.dtype in (torch.bfloat16, torch.float16)
    return values.float() if half and torch.is_autocast_enabled(values.device.type) else values


def _tensor_cost(index: int, cost: float | torch.Tensor, like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if not isinstance(cost, torch.Tensor):
        return scalar(f"costs[{index}]", cost, like.device).to(like.dtype)
    if cost.dim() and cost.shape != shape:
        raise ValueError(f"costs[{index}] must be a number, 0-dim or of shape {tuple(shape)}; got {tuple(cost.shape)}")
    return cost.to(device=like.device, dtype=like.dtype)


def _normalised(dim: int, values: torch.Tensor) -> int:
    if values.dim() == 0:
        raise ValueError("values must have at least one dimension; got a 0-dim tensor")
    if not -values.dim() <= dim < values.dim():
        raise ValueError(f"dim must be in [{-values.dim()}, {values.dim() - 1}]; got {dim}")
    return dim % values.dim()


def _row_budget(budget: float | torch.Tensor, rows: torch.Size, device: torch.device) -> Any:
    if isinstance(budget, torch.Tensor) and budget.dim():
        if budget.shape != rows:
            raise ValueError(f"budget must be a number or of shape {tuple(rows)}; got {tuple(budget.shape)}")
        return budget.to(device=device, dtype=torch.float64).reshape(-1)
    k = number("budget", budget, device)
    return k if isinstance(k, float) else k.expand(rows.numel())


def _row_costs(costs: float | torch.Tensor | None, values: torch.Tensor, dim: int) -> torch.Tensor | None:
    if costs is None:
        return None
    if not isinstance(costs, torch.Tensor):
        return scalar("costs", costs, values.device).to(values.dtype)
    costs = costs.to(device=values.device, dtype=values.dtype)
    if costs.dim() == 0 or costs.shape == (values.shape[dim],):
        return costs
    if costs.shape != values.shape:
        raise ValueError(
            f"costs must be a number or of shape ({values.shape[dim]},) or {tuple(values.shape)};"
            f" got {tuple(costs.shape)}"
        )
    return costs.movedim(dim, -1).reshape(-1, values.shape[dim])
