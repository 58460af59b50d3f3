"""Masked weight by expanding each block's mask to its weights."""

from __future__ import annotations

import torch

from spartan_kernels.backends.shared import block_sum, expand
from spartan_kernels.operands import (
    AddBlockSigns,
    BlockScores,
    KeptSoftMass,
    MaskedWeight,
    MaskedWeightBackward,
    MaskedWeightCorrection,
    MaskedWeightCoupling,
)


def masked_weight_forward(o: MaskedWeight) -> torch.Tensor:
    """theta * m * h."""
    result = o.weight.clone(memory_format=torch.contiguous_format)
    if o.soft is not None:
        result = (result * expand(o.soft, o.weight.shape, o.rows, o.columns)).to(o.weight.dtype)
    if o.hard is not None:
        result = torch.where(expand(o.hard, o.weight.shape, o.rows, o.columns), result, 0.0)
    return result


def masked_weight_backward(o: MaskedWeightBackward) -> torch.Tensor:
    """G_i m_b + sign(theta_i) beta s_b g_b / a_b, the local part of equation (2)."""
    if o.soft is None:
        result = o.grad.clone(memory_format=torch.contiguous_format)
    else:
        g = block_sum(o.grad * o.weight, o.rows, o.columns)
        pull = (o.beta * o.soft * (1 - o.soft) * g / o.costs).to(o.weight.dtype)
        result = o.grad * expand(o.soft, o.weight.shape, o.rows, o.columns)
        result = result + torch.sign(o.weight) * expand(pull, o.weight.shape, o.rows, o.columns)
    if o.hard is not None and not o.straight_through:
        result = torch.where(expand(o.hard, o.weight.shape, o.rows, o.columns), result, 0.0)
    return result


def masked_weight_backward_(o: MaskedWeightBackward) -> None:
    """The same, in the memory of grad."""
    o.grad.copy_(masked_weight_backward(o))


def masked_weight_coupling(o: MaskedWeightCoupling) -> torch.Tensor:
    """[sum_b (1 - m_b) g_b m_b, sum_b a_b s_b] of this weight."""
    wide = torch.float64
    q = block_sum((o.grad * o.weight).to(wide), o.rows, o.columns)
    v = block_sum(o.weight.abs().to(wide), o.rows, o.columns)
    m, a = o.soft.to(wide), o.costs.to(wide)
    gm = q / (1 + o.beta * (1 - m) * v / a)
    return torch.stack([((1 - m) * gm).sum(), (a * m * (1 - m)).sum()])


def masked_weight_correct_(o: MaskedWeightCorrection) -> None:
    """grad_i -= sign(theta_i) s_b scale."""
    pull = (o.soft * (1 - o.soft) * o.scale).to(o.weight.dtype)
    o.grad.sub_(torch.sign(o.weight) * expand(pull, o.weight.shape, o.rows, o.columns))


def kept_soft_mass(o: KeptSoftMass) -> torch.Tensor:
    """[sum h m, sum h] where each weight is a block."""
    wide = torch.float64
    kept = torch.where(o.hard, o.soft.to(wide), 0.0)
    return torch.stack([kept.sum(), o.hard.sum(dtype=wide)])


def add_block_signs_(o: AddBlockSigns) -> None:
    """grad_i += sign(theta_i) pull_b."""
    o.grad.add_(torch.sign(o.weight) * expand(o.pull, o.weight.shape, o.rows, o.columns).to(o.grad.dtype))


def block_scores(o: BlockScores) -> torch.Tensor:
    """Sum of |theta| over each block."""
    return block_sum(o.weight.abs(), o.rows, o.columns).contiguous()
