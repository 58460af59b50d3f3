"""Masked weights in CUDA C++: tensors to pointers, blocks and costs."""

from __future__ import annotations

import torch

from spartan_kernels.arguments import block_grid
from spartan_kernels.backends import extension
from spartan_kernels.operands import (
    BlockScores,
    MaskedWeight,
    MaskedWeightBackward,
    MaskedWeightCorrection,
    MaskedWeightCoupling,
)


class _Weight:
    """A weight in blocks, and the arguments that every masked-weight kernel takes first."""

    def __init__(self, weight: torch.Tensor, rows: int, columns: int) -> None:
        self.weight = weight.detach().contiguous()
        self.first = (extension.DTYPES[weight.dtype], extension.blocks(weight, rows, columns))


class _Costs:
    """One cost for each block, or one number for all."""

    def __init__(self, costs: torch.Tensor) -> None:
        self.kept = costs.contiguous()
        pointer = self.kept.data_ptr()
        self.arguments = (0, pointer) if costs.dim() == 0 else (pointer, 0)


def masked_weight_forward(o: MaskedWeight) -> torch.Tensor:
    """theta * m * h."""
    w = _Weight(o.weight, o.rows, o.columns)
    m, h = extension.contiguous(o.soft), extension.contiguous(o.hard)
    result = torch.empty_like(w.weight)
    extension.call(
        extension.native.cuda.masked_weight,
        o.weight,
        *w.first,
        w.weight.data_ptr(),
        extension.pointer(m),
        extension.pointer(h),
        result.data_ptr(),
    )
    return result


def masked_weight_backward(o: MaskedWeightBackward) -> torch.Tensor:
    """G_i m_b + sign(theta_i) beta s_b g_b / a_b."""
    w, a = _Weight(o.weight, o.rows, o.columns), _Costs(o.costs)
    g, m, h = o.grad.to(o.weight.dtype).contiguous(), extension.contiguous(o.soft), extension.contiguous(o.hard)
    result = torch.empty_like(w.weight)
    extension.call(
        extension.native.cuda.masked_weight_backward,
        o.weight,
        *w.first,
        g.data_ptr(),
        w.weight.data_ptr(),
        extension.pointer(m),
        extension.pointer(h),
        o.beta.data_ptr(),
        *a.arguments,
        o.straight_through,
        result.data_ptr(),
    )
    return result


def masked_weight_coupling(o: MaskedWeightCoupling) -> torch.Tensor:
    """[sum_b (1 - m_b) g_b m_b, sum_b a_b s_b] of this weight."""
    w, a = _Weight(o.weight, o.rows, o.columns), _Costs(o.costs)
    g, m = o.grad.contiguous(), o.soft.contiguous()
    sums = torch.empty(2, dtype=torch.float64, device=o.weight.device)
    workspace = torch.empty(extension.native.cuda.coupling_workspace, dtype=torch.float64, device=o.weight.device)
    extension.call(
        extension.native.cuda.masked_weight_coupling,
        o.weight,
        *w.first,
        g.data_ptr(),
        w.weight.data_ptr(),
        m.data_ptr(),
        o.beta.data_ptr(),
        *a.arguments,
        sums.data_ptr(),
        workspace.data_ptr(),
    )
    return sums


def masked_weight_correct_(o: MaskedWeightCorrection) -> None:
    """grad_i -= sign(theta_i) s_b scale."""
    w = _Weight(o.weight, o.rows, o.columns)
    g, m = o.grad.contiguous(), o.soft.contiguous()
    extension.call(
        extension.native.cuda.masked_weight_correct,
        o.weight,
        *w.first,
        g.data_ptr(),
        w.weight.data_ptr(),
        m.data_ptr(),
        o.scale.data_ptr(),
    )
    if g.data_ptr() != o.grad.data_ptr():
        o.grad.copy_(g)


def block_scores(o: BlockScores) -> torch.Tensor:
    """Sum of |theta| over each block."""
    w = _Weight(o.weight, o.rows, o.columns)
    grid = block_grid(o.weight.shape, (o.rows, o.columns))
    scores = torch.empty(grid, dtype=o.weight.dtype, device=o.weight.device)
    extension.call(extension.native.cuda.block_scores, o.weight, *w.first, w.weight.data_ptr(), scores.data_ptr())
    return scores
