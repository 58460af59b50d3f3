"""Masked weights on the compiled extension: tensors to pointers, blocks and costs."""

from __future__ import annotations

import torch

from spartan_kernels.arguments import block_grid
from spartan_kernels.backends import extension
from spartan_kernels.operands import (
    AddBlockSigns,
    BlockScores,
    MaskedWeight,
    MaskedWeightBackward,
    MaskedWeightCorrection,
    MaskedWeightCoupling,
)


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


def _cost_arguments(costs: torch.Tensor | float) -> tuple[torch.Tensor | None, float]:
    one = isinstance(costs, float) or costs.dim() == 0
    return (None, float(costs)) if one else (extension.compute(costs), 1.0)  # type: ignore[arg-type]


def masked_weight_forward(o: MaskedWeight) -> torch.Tensor:
    """theta * m * h."""
    w = _Weight(o.weight, o.rows, o.columns)
    m, h = _mask_arguments(o.soft, o.hard)
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
    return result.to(o.weight.dtype)


def masked_weight_backward(o: MaskedWeightBackward) -> torch.Tensor:
    """G_i m_b + sign(theta_i) beta s_b g_b / a_b."""
    dtype = extension.computed_in(o.weight.dtype)
    result = torch.empty_like(o.weight, dtype=dtype, memory_format=torch.contiguous_format)
    _backward_into(result, extension.compute(o.grad), o)
    return result.to(o.weight.dtype)


def masked_weight_backward_(o: MaskedWeightBackward) -> None:
    """The same, in the memory of grad."""
    g = extension.compute(o.grad)
    _backward_into(g, g, o)
    _write_back(g, o.grad)


def _backward_into(result: torch.Tensor, grad: torch.Tensor, o: MaskedWeightBackward) -> None:
    w = _Weight(o.weight, o.rows, o.columns)
    m, h = _mask_arguments(o.soft, o.hard)
    array, unit = _cost_arguments(o.costs)
    workspace = w.workspace()
    extension.native.cpu.masked_weight_backward(
        w.element,
        w.blocks,
        grad.data_ptr(),
        w.weight.data_ptr(),
        extension.pointer(m),
        extension.pointer(h),
        float(o.beta),
        extension.pointer(array),
        unit,
        o.straight_through,
        result.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        torch.get_num_threads(),
    )


def _write_back(computed: torch.Tensor, grad: torch.Tensor) -> None:
    """Bring to `grad` what was computed in a copy of it."""
    if computed.data_ptr() != grad.data_ptr():
        grad.copy_(computed)


def masked_weight_coupling(o: MaskedWeightCoupling) -> torch.Tensor:
    """[sum_b (1 - m_b) g_b m_b, sum_b a_b s_b] of this weight."""
    w = _Weight(o.weight, o.rows, o.columns)
    g, m = extension.compute(o.grad), extension.compute(o.soft)
    array, unit = _cost_arguments(o.costs)
    sums, workspace = torch.empty(2, dtype=torch.float64), w.workspace()
    extension.native.cpu.masked_weight_coupling(
        w.element,
        w.blocks,
        g.data_ptr(),
        w.weight.data_ptr(),
        m.data_ptr(),
        float(o.beta),
        extension.pointer(array),
        unit,
        sums.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        torch.get_num_threads(),
    )
    return sums


def masked_weight_correct_(o: MaskedWeightCorrection) -> None:
    """grad_i -= sign(theta_i) s_b scale."""
    w = _Weight(o.weight, o.rows, o.columns)
    g, m = extension.compute(o.grad), extension.compute(o.soft)
    extension.native.cpu.masked_weight_correct(
        w.element, w.blocks, g.data_ptr(), w.weight.data_ptr(), m.data_ptr(), float(o.scale), torch.get_num_threads()
    )
    _write_back(g, o.grad)


def add_block_signs_(o: AddBlockSigns) -> None:
    """grad_i += sign(theta_i) pull_b."""
    w = _Weight(o.weight, o.rows, o.columns)
    g, p = extension.compute(o.grad), extension.compute(o.pull).to(w.weight.dtype)
    extension.native.cpu.add_block_signs(
        w.element, w.blocks, g.data_ptr(), w.weight.data_ptr(), p.data_ptr(), torch.get_num_threads()
    )
    _write_back(g, o.grad)


def block_scores(o: BlockScores) -> torch.Tensor:
    """Sum of |theta| over each block."""
    w = _Weight(o.weight, o.rows, o.columns)
    scores = torch.empty(block_grid(o.weight.shape, (o.rows, o.columns)), dtype=w.weight.dtype)
    extension.native.cpu.block_scores(
        w.element, w.blocks, w.weight.data_ptr(), scores.data_ptr(), torch.get_num_threads()
    )
    return scores.to(o.weight.dtype)
