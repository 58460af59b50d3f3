"""Selections and masked weights in plain eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_mask(values: Tensor, k: int) -> Tensor:
    """Hard mask along the last dimension by torch.topk."""
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, values.topk(k, -1).indices, True)


def sort_mask(values: Tensor, k: int) -> Tensor:
    """Hard mask along the last dimension by torch.sort."""
    order = values.sort(-1, descending=True).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def kthvalue_mask(values: Tensor, k: int) -> Tensor:
    """Hard mask along the last dimension by torch.kthvalue; keeps too many on ties."""
    return values >= values.kthvalue(values.shape[-1] - k + 1, -1, keepdim=True).values


def soft_topk_gradient(grad: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Gradient of the row-wise soft top-k with unit costs for its values."""
    s = mask * (1 - mask)
    r = (grad * s).sum(-1, keepdim=True) / s.sum(-1, keepdim=True)
    return beta * s * (grad - r)


def masked_weight(weight: Tensor, soft: Tensor, hard: Tensor) -> Tensor:
    """Theta * m * h, masks given for every weight."""
    return weight * soft * hard


def masked_weight_gradient(grad: Tensor, weight: Tensor, soft: Tensor, beta: float) -> Tensor:
    """Local part of equation (2) for block size 1: G m + sign(theta) beta s G theta."""
    return grad * soft + torch.sign(weight) * (beta * soft * (1 - soft) * (grad * weight))


def expand(blocks: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Write the mask of blocks, square or (rows, columns), out for every weight."""
    rows, columns = (size, size) if isinstance(size, int) else size
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def block_gradient(grad: Tensor, weight: Tensor, soft: Tensor, beta: float, size: int) -> Tensor:
    """Local part of equation (2) for square blocks that divide the weight."""
    rows, columns = soft.shape
    g = (grad * weight).view(rows, size, columns, size).sum((1, 3))
    pull = beta * soft * (1 - soft) * g / size**2
    return grad * expand(soft, size) + torch.sign(weight) * expand(pull, size)
