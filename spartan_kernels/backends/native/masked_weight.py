"""Masked weights on the compiled extension: tensors to pointers, blocks and costs."""

from __future__ import annotations

from typing import Any

import torch

from spartan_kernels.arguments import block_grid
from spartan_kernels.backends import extension
from spartan_kernels.operands import (
    AddBlockSigns,
    BlockScores,
    KeptSoftMass,
    MaskedLinearBackward,
    MaskedWeight,
    MaskedWeightBackward,
    MaskedWeightCorrection,
    MaskedWeightCoupling,
)
from spartan_kernels.solution import is_solution


class _Weight:
    """A weight in blocks, and the arguments that every masked-weight kernel takes first."""

    def __init__(self, weight: torch.Tensor, rows: int, columns: int) -> None:
        self.weight = extension.compute(weight)
        self.element = self.weight.element_size()
        self.blocks = extension.blocks(weight, rows, columns)

    def workspace(self) -> torch.Tensor:
        return extension.workspace(extension.native.cpu.blocks_workspace_bytes(self.blocks))


class _Soft:
    """The soft mask as the extension takes it: values, or the solution that they are computed from; None for ones.

    Costs are brought where they are read: of a solution, or `priced` anyway.
    """

    def __init__(self, o: Any, priced: bool = False) -> None:
        self.values = self.solution = self.costs = None  # kept alive
        if is_solution(o.soft, o.weight):
            self.solution = o.soft.contiguous()
        elif o.soft is not None:
            self.values = extension.compute(o.soft)
        unit = 1.0
        if priced or self.solution is not None:
            if isinstance(o.costs, float) or o.costs.dim() == 0:
                unit = float(o.costs)
            else:
                self.costs = extension.compute(o.costs)
        values, solution, array = map(extension.pointer, (self.values, self.solution, self.costs))
        self.argument = extension.native.cpu.SoftMask(values, solution, float(o.beta), array, unit)


def masked_weight_forward(o: MaskedWeight) -> torch.Tensor:
    """theta * m * h."""
    w, m, h = _Weight(o.weight, o.rows, o.columns), _Soft(o), extension.contiguous(o.hard)
    result = torch.empty_like(w.weight)
    extension.native.cpu.masked_weight(
        w.element,
        w.blocks,
        w.weight.data_ptr(),
        m.argument,
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
    w, m, h = _Weight(o.weight, o.rows, o.columns), _Soft(o, priced=True), extension.contiguous(o.hard)
    workspace = w.workspace()
    extension.native.cpu.masked_weight_backward(
        w.element,
        w.blocks,
        grad.data_ptr(),
        w.weight.data_ptr(),
        m.argument,
        extension.pointer(h),
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
    w, m, g = _Weight(o.weight, o.rows, o.columns), _Soft(o, priced=True), extension.compute(o.grad)
    sums, workspace = extension.empty(2, torch.float64), w.workspace()
    extension.native.cpu.masked_weight_coupling(
        w.element,
        w.blocks,
        g.data_ptr(),
        w.weight.data_ptr(),
        m.argument,
        sums.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        torch.get_num_threads(),
    )
    return sums


def kept_soft_mass(o: KeptSoftMass) -> torch.Tensor:
    """[sum h m, sum h] where each weight is a block."""
    w, m, h = _Weight(o.weight, 1, 1), _Soft(o), o.hard.contiguous()
    sums, workspace = extension.empty(2, torch.float64), w.workspace()
    extension.native.cpu.masked_weight_kept(
        w.element,
        w.blocks,
        w.weight.data_ptr(),
        m.argument,
        h.data_ptr(),
        sums.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        torch.get_num_threads(),
    )
    return sums


def masked_weight_correct_(o: MaskedWeightCorrection) -> None:
    """grad_i -= sign(theta_i) s_b scale."""
    w, m, g = _Weight(o.weight, o.rows, o.columns), _Soft(o), extension.compute(o.grad)
    extension.native.cpu.masked_weight_correct(
        w.element, w.blocks, g.data_ptr(), w.weight.data_ptr(), m.argument, float(o.scale), torch.get_num_threads()
    )
    _write_back(g, o.grad)


def gate_gradient_(grad: torch.Tensor, o: MaskedLinearBackward) -> torch.Tensor:
    """G gate_b + sign(theta) slope_b g_b in place of G, a gated weight's gradient; returns g_b, the sums of G theta."""
    w, gate = _Weight(o.weight, o.rows, o.columns), extension.compute(o.gate)
    slope = None if o.slope is None else extension.compute(o.slope)
    sums, workspace = torch.empty_like(gate), w.workspace()
    extension.native.cpu.gate_gradient(
        w.element,
        w.blocks,
        grad.data_ptr(),
        w.weight.data_ptr(),
        gate.data_ptr(),
        extension.pointer(slope),
        sums.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        torch.get_num_threads(),
    )
    return sums


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
    scores = extension.empty(block_grid(o.weight.shape, (o.rows, o.columns)), w.weight.dtype)
    extension.native.cpu.block_scores(
        w.element, w.blocks, w.weight.data_ptr(), scores.data_ptr(), torch.get_num_threads()
    )
    return scores.to(o.weight.dtype)
