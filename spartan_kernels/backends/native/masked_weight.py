"""Masked weights on the compiled extension: tensors to pointers, blocks and costs."""

from __future__ import annotations

from typing import Any

import torch

from spartan_kernels.arguments import block_grid
from spartan_kernels.backends import extension


class _Weight:
    """A weight in blocks, and the arguments that every masked-weight kernel takes first."""

    def __init__(self, weight: torch.Tensor, rows: int, columns: int) -> None:
        self.weight = extension.compute(weight)
        self.element = self.weight.element_size()
        self.blocks = extension.blocks(weight, rows, columns)

    def workspace(self) -> torch.Tensor:
        return extension.workspace(extension.native.cpu.blocks_workspace_bytes(self.blocks))


def _mask_arguments(
    soft: torch.Tensor | None, hard: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return None if soft is None else extension.compute(soft), None if hard is None else hard.contiguous()


def _cost_arguments(costs: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    return (None, float(costs)) if costs.dim() == 0 else (extension.compute(costs), 1.0)


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
    m, h = _mask_arguments(soft, hard)
    result = torch.empty_like(w.weight)
    extension.native.cpu.masked_weight(
        w.element,
        w.blocks,
        w.weight.data_ptr(),
        extension.pointer(m),
        extension.pointer(h),
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result.to(weight.dtype)


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
    result = torch.empty_like(weight, dtype=extension.computed_in(weight.dtype), memory_format=torch.contiguous_format)
    _backward_into(result, extension.compute(grad), weight, soft, hard, beta, costs, rows, columns, straight_through)
    return result.to(weight.dtype)


def masked_weight_backward_(grad: torch.Tensor, *operands: Any) -> None:
    """The same, in the memory of grad."""
    g = extension.compute(grad)
    _backward_into(g, g, *operands)
    if g.data_ptr() != grad.data_ptr():
        grad.copy_(g)


def _backward_into(
    result: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    soft: torch.Tensor | None,
    hard: torch.Tensor | None,
    beta: torch.Tensor,
    costs: torch.Tensor,
    rows: int,
    columns: int,
    straight_through: bool,
) -> None:
    w = _Weight(weight, rows, columns)
    m, h = _mask_arguments(soft, hard)
    array, unit = _cost_arguments(costs)
    workspace = w.workspace()
    extension.native.cpu.masked_weight_backward(
        w.element,
        w.blocks,
        grad.data_ptr(),
        w.weight.data_ptr(),
        extension.pointer(m),
        extension.pointer(h),
        float(beta),
        extension.pointer(array),
        unit,
        straight_through,
        result.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        torch.get_num_threads(),
    )


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
    w = _Weight(weight, rows, columns)
    g, m = extension.compute(grad), extension.compute(soft)
    array, unit = _cost_arguments(costs)
    sums, workspace = torch.empty(2, dtype=torch.float64), w.workspace()
    extension.native.cpu.masked_weight_coupling(
        w.element,
        w.blocks,
        g.data_ptr(),
        w.weight.data_ptr(),
        m.data_ptr(),
        float(beta),
        extension.pointer(array),
        unit,
        sums.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        torch.get_num_threads(),
    )
    return sums


def masked_weight_correct_(
    grad: torch.Tensor, weight: torch.Tensor, soft: torch.Tensor, scale: torch.Tensor, rows: int, columns: int
) -> None:
    """grad_i -= sign(theta_i) s_b scale."""
    w = _Weight(weight, rows, columns)
    g, m = extension.compute(grad), extension.compute(soft)
    extension.native.cpu.masked_weight_correct(
        w.element, w.blocks, g.data_ptr(), w.weight.data_ptr(), m.data_ptr(), float(scale), torch.get_num_threads()
    )
    if g.data_ptr() != grad.data_ptr():
        grad.copy_(g)


def add_block_signs_(grad: torch.Tensor, weight: torch.Tensor, pull: torch.Tensor, rows: int, columns: int) -> None:
    """grad_i += sign(theta_i) pull_b."""
    w = _Weight(weight, rows, columns)
    g, p = extension.compute(grad), extension.compute(pull).to(w.weight.dtype)
    extension.native.cpu.add_block_signs(
        w.element, w.blocks, g.data_ptr(), w.weight.data_ptr(), p.data_ptr(), torch.get_num_threads()
    )
    if g.data_ptr() != grad.data_ptr():
        grad.copy_(g)


def block_scores(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Sum of |theta| over each block."""
    w = _Weight(weight, rows, columns)
    scores = torch.empty(block_grid(weight.shape, (rows, columns)), dtype=w.weight.dtype)
    extension.native.cpu.block_scores(
        w.element, w.blocks, w.weight.data_ptr(), scores.data_ptr(), torch.get_num_threads()
    )
    return scores.to(weight.dtype)
