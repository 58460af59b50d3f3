"""Argument checks shared by the operators and their backends. Imports nothing of this package."""

from __future__ import annotations

import math
from typing import Any

import torch

# How far above the sum of the costs a budget may lie and still mean "keep everything": the rounding of a float32 sum.
BUDGET_SLACK = 1e-6
# A budget this close to the sum of the costs means all of it: the rounding of a float64 sum in another order.
BUDGET_ROUNDING = 1e-12
# Below this sharpness 1 / beta overflows; the mask is that of beta = 0 to the last bit.
SMALLEST_BETA = 1e-290

_checks_enabled = False


def checks(enabled: bool) -> None:
    """Inspect values on the GPU too, at the price of a host synchronisation in each call.

    On the CPU bad values always raise; on a GPU non-finite input comes out as NaN unless this is switched on.
    """
    global _checks_enabled
    _checks_enabled = bool(enabled)


def inspectable(tensor: torch.Tensor) -> bool:
    """Whether the host may look at values of `tensor`: always on the CPU, elsewhere only after `checks(True)`."""
    return tensor.device.type == "cpu" or _checks_enabled


def require_float(name: str, tensor: Any) -> None:
    """Raise TypeError unless `tensor` is a floating-point tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a floating-point tensor; got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got dtype {tensor.dtype}")


def require_device(name: str, tensor: torch.Tensor, device: torch.device, of: str) -> None:
    """Raise ValueError unless `tensor` lies on the device of the argument `of`: a pointer to elsewhere is no use."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, as {of}; got {tensor.device}")


def require_index(name: str, tensor: torch.Tensor, length: int, device: torch.device) -> None:
    """Raise ValueError unless `tensor` is a contiguous int32 vector of this length on this device."""
    vector = tensor.dim() == 1 and tensor.shape[0] == length
    if not vector or tensor.dtype != torch.int32 or tensor.device != device or (length > 1 and tensor.stride(0) != 1):
        raise ValueError(
            f"{name} must be contiguous torch.int32 of shape ({length},) on {device}; got {tensor.dtype} of shape"
            f" {tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}"
        )


def require_scores(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError when `tensor` can be inspected and holds NaN or +infinity; -infinity masks an entry."""
    if inspectable(tensor) and not bool((tensor < torch.inf).all()):
        count = int((~(tensor < torch.inf)).sum())
        raise ValueError(f"{name} must be finite, or -inf to be masked; {count} of {tensor.numel()} are NaN or +inf")


def require_beta(beta: torch.Tensor | float) -> None:
    """Raise ValueError when `beta` can be inspected and is negative or not finite."""
    if isinstance(beta, torch.Tensor):
        if not inspectable(beta):
            return
        beta = float(beta)
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and at least 0; got {beta}")


def require_costs(costs: torch.Tensor) -> None:
    """Raise ValueError when `costs` can be inspected and has an entry that is not finite and positive."""
    if inspectable(costs) and costs.numel() and not bool(((costs > 0) & torch.isfinite(costs)).all()):
        raise ValueError(f"costs must be finite and positive; the smallest is {float(costs.min())}")


def clamp_budget(budget: torch.Tensor, total: torch.Tensor | float) -> torch.Tensor:
    """`budget` limited to [0, total], the cost of what is not masked; above it by more than rounding NaN.

    Raises:
        ValueError: it can be inspected and is outside of [0, total] by more than rounding.
    """
    total = torch.as_tensor(total, dtype=torch.float64, device=budget.device)
    if inspectable(budget):
        outside = ~((budget >= 0) & (budget <= total * (1 + BUDGET_SLACK)))
        if bool(outside.any()):
            worst = outside.broadcast_to(torch.broadcast_shapes(outside.shape, budget.shape)).nonzero()[0]
            limit = float(total.expand_as(outside)[tuple(worst)])
            raise ValueError(
                f"budget must be in [0, {limit:g}], the sum of the costs of entries that are not -inf; "
                f"got {float(budget[tuple(worst)]):g}"
            )
    limited = torch.where(budget >= total * (1 - BUDGET_ROUNDING), total, budget.clamp(min=0.0))
    return torch.where(budget > total * (1 + BUDGET_SLACK), torch.nan, limited)


def scalar(name: str, value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`value` as a 0-dim float64 tensor on `device`; a tensor stays in its autograd graph."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-dim tensor; got shape {tuple(value.shape)}")
        return value.to(device=device, dtype=torch.float64)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a 0-dim tensor; got {type(value).__name__}")
    if torch.compiler.is_compiling():
        # `full` would burn the number into the graph, and an annealed beta compile it again at every step
        return torch.ones((), dtype=torch.float64, device=device) * value
    return torch.full((), float(value), dtype=torch.float64, device=device)


def number(name: str, value: float | torch.Tensor, device: torch.device) -> Any:
    """`scalar`, but a number stays one where nothing compiles: operators take it as it is (`operands.as_declared`)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not torch.compiler.is_compiling():
        return float(value)
    return scalar(name, value, device)


def block_shape(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """`block_size` as (rows, columns).

    Raises:
        ValueError: not a positive int or a pair of positive ints.
    """
    pair = block_size if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(pair) == 2:
        rows, columns = pair
        if _is_side(rows) and _is_side(columns):
            return rows, columns
    raise ValueError(f"block_size must be a positive int or a pair of positive ints; got {block_size!r}")


def _is_side(side: Any) -> bool:
    return isinstance(side, int) and not isinstance(side, bool) and side > 0


def clip_block(block_size: int | tuple[int, int], shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    """`block_size` as (rows, columns) that reach no further than a weight of this shape: its grid is the same.

    Kernels and workspaces are sized by the block, so one that is larger than its matrix would cost for nothing.
    """
    rows, columns = block_shape(block_size)
    if len(shape) >= 2:
        out, in_ = shape[0], shape[1]
        rows, columns = (rows if rows <= out else max(1, out)), (columns if columns <= in_ else max(1, in_))
    return rows, columns


def block_grid(shape: tuple[int, ...] | torch.Size, block_size: int | tuple[int, int]) -> tuple[int, ...]:
    """Shape of the blocks of a weight: [ceil(out / rows), ceil(in / columns), *rest].

    A block covers (rows, columns) of the first two dimensions; each position of further ones (a convolution's kernel)
    is a block of its own. Block size 1 gives `shape` itself, for weights of any number of dimensions.

    Raises:
        ValueError: a block size that is not positive, or larger than 1 for a weight of fewer than two dimensions.
    """
    rows, columns = block_shape(block_size)
    if (rows, columns) == (1, 1):
        return tuple(shape)
    if len(shape) < 2:
        raise ValueError(f"block_size {block_size} needs a weight of at least two dimensions; got {tuple(shape)}")
    return (-(-shape[0] // rows), -(-shape[1] // columns), *shape[2:])


def memory_format(image: torch.Tensor) -> torch.memory_format:
    """How to lay out what is made from an image: channels-last where it is that and not plainly contiguous."""
    last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def output_size(x: Any, weight: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Any, ...]:
    """The shape of a convolution's result, from those of image and weight."""
    spatial = (
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    )
    return (x[0], weight[0], *spatial)
