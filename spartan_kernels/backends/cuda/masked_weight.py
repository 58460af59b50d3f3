"""Masked weights in CUDA C++: tensors to pointers, blocks and costs."""

from __future__ import annotations

import torch

from spartan_kernels.arguments import block_grid
from spartan_kernels.backends import extension


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
    w = _Weight(weight, rows, columns)
    m, h = extension.contiguous(soft), extension.contiguous(hard)
    result = torch.empty_like(w.weight)
    extension.call(
        extension.native.cuda.masked_weight,
        weight,
        *w.first,
        w.weight.data_ptr(),
        extension.pointer(m),
        extension.pointer(h),
        result.data_ptr(),
    )
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
    """G_i m_b + sign(theta_i) beta s_b g_b / a_b."""
    w, a = _Weight(weight, rows, columns), _Costs(costs)
    g, m, h = grad.to(weight.dtype).contiguous(), extension.contiguous(soft), extension.contiguous(hard)
    result = torch.empty_like(w.weight)
    extension.call(
        extension.native.cuda.masked_weight_backward,
        weight,
        *w.first,
        g.data_ptr(),
        w.weight.data_ptr(),
        extension.pointer(m),
        extension.pointer(h),
        beta.data_ptr(),
        *a.arguments,
        straight_through,
        result.data_ptr(),
    )
    return result


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
    w, a = _Weight(weight, rows, columns), _Costs(costs)
    g, m = grad.contiguous(), soft.contiguous()
    sums = torch.empty(2, dtype=torch.float64, device=weight.device)
    workspace = torch.empty(extension.native.cuda.coupling_workspace, dtype=torch.float64, device=weight.device)
    extension.call(
        extension.native.cuda.masked_weight_coupling,
        weight,
        *w.first,
        g.data_ptr(),
        w.weight.data_ptr(),
        m.data_ptr(),
        beta.data_ptr(),
        *a.arguments,
        sums.data_ptr(),
        workspace.data_ptr(),
    )
    return sums


def masked_weight_correct_(
    grad: torch.Tensor, weight: torch.Tensor, soft: torch.Tensor, scale: torch.Tensor, rows: int, columns: int
) -> None:
    """grad_i -= sign(theta_i) s_b scale."""
    w = _Weight(weight, rows, columns)
    g, m = grad.contiguous(), soft.contiguous()
    extension.call(
        extension.native.cuda.masked_weight_correct,
        weight,
        *w.first,
        g.data_ptr(),
        w.weight.data_ptr(),
        m.data_ptr(),
        scale.data_ptr(),
    )
    if g.data_ptr() != grad.data_ptr():
        grad.copy_(g)


def block_scores(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Sum of |theta| over each block."""
    w = _Weight(weight, rows, columns)
    grid = block_grid(weight.shape, (rows, columns))
    scores = torch.empty(grid, dtype=weight.dtype, device=weight.device)
    extension.call(extension.native.cuda.block_scores, weight, *w.first, w.weight.data_ptr(), scores.data_ptr())
    return scores
