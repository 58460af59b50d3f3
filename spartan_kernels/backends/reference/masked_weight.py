"""Masked weight by expanding each block's mask to its weights."""

from __future__ import annotations

from typing import Any

import torch

from spartan_kernels.backends.shared import block_sum, expand


def masked_weight_forward(
    weight: torch.Tensor,
    soft: torch.Tensor | None,
    hard: torch.Tensor | None,
    beta: torch.Tensor,
    costs: torch.Tensor,
    rows: int,
    columns: int,
    straight_through: bool,
) -> torch.Tensor:
    """theta * m * h."""
    result = weight.clone(memory_format=torch.contiguous_format)
    if soft is not None:
        result = (result * expand(soft, weight.shape, rows, columns)).to(weight.dtype)
    if hard is not None:
        result = torch.where(expand(hard, weight.shape, rows, columns), result, 0.0)
    return result


def masked_weight_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    soft: torch.Tensor | None,
    hard: torch.Tensor | None,
    beta: torch.Tensor,
    costs: torch.Tensor,
    rows: int,
    columns: int,
    straight_through: bool,
) -> torch.Tensor:
    """G_i m_b + sign(theta_i) beta s_b g_b / a_b, the local part of equation (2)."""
    if soft is None:
        result = grad.clone(memory_format=torch.contiguous_format)
    else:
        g = block_sum(grad * weight, rows, columns)
        pull = (beta * soft * (1 - soft) * g / costs).to(weight.dtype)
        result = grad * expand(soft, weight.shape, rows, columns)
        result = result + torch.sign(weight) * expand(pull, weight.shape, rows, columns)
    if hard is not None and not straight_through:
        result = torch.where(expand(hard, weight.shape, rows, columns), result, 0.0)
    return result


def masked_weight_backward_(grad: torch.Tensor, *operands: Any) -> None:
    """The same, in the memory of grad."""
    grad.copy_(masked_weight_backward(grad, *operands))


def masked_weight_coupling(
    grad: torch.Tensor,
    weight: torch.Tensor,
    soft: torch.Tensor,
    beta: torch.Tensor,
    costs: torch.Tensor,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """[sum_b (1 - m_b) g_b m_b, sum_b a_b s_b] of this weight."""
    wide = torch.float64
    q = block_sum((grad * weight).to(wide), rows, columns)
    v = block_sum(weight.abs().to(wide), rows, columns)
    m, a = soft.to(wide), costs.to(wide)
    gm = q / (1 + beta * (1 - m) * v / a)
    return torch.stack([((1 - m) * gm).sum(), (a * m * (1 - m)).sum()])


def masked_weight_correct_(
    grad: torch.Tensor, weight: torch.Tensor, soft: torch.Tensor, scale: torch.Tensor, rows: int, columns: int
) -> None:
    """grad_i -= sign(theta_i) s_b scale."""
    pull = (soft * (1 - soft) * scale).to(weight.dtype)
    grad.sub_(torch.sign(weight) * expand(pull, weight.shape, rows, columns))


def add_block_signs_(grad: torch.Tensor, weight: torch.Tensor, pull: torch.Tensor, rows: int, columns: int) -> None:
    """grad_i += sign(theta_i) pull_b."""
    grad.add_(torch.sign(weight) * expand(pull, weight.shape, rows, columns).to(grad.dtype))


def block_scores(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Sum of |theta| over each block."""
    return block_sum(weight.abs(), rows, columns).contiguous()
