"""Lists of tensors that share one budget, in this process or over the ranks of a process group."""

from __future__ import annotations

import torch

from spartan_kernels.backends.shared import check_list
from spartan_kernels.backends.triton.global_gradient import global_gradient
from spartan_kernels.backends.triton.global_solve import GlobalSolve, global_solve
from spartan_kernels.backends.triton.masked_weight import block_scores
from spartan_kernels.backends.triton.ranked_solve import RankedSolve, ranked_solve
from spartan_kernels.backends.triton.tensor_list import ListShape, TensorList, contiguous
from spartan_kernels.blocks import score_list
from spartan_kernels.operands import HardTopkGlobal, SoftTopkGlobal, SoftTopkGlobalBackward, SolveMasks


def _empty(values: list[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [torch.empty(v.shape, dtype=dtype or v.dtype, device=v.device) for v in values]


def _solve(shape: ListShape, absolute: bool, soft: bool, hard: bool, group: str) -> GlobalSolve | RankedSolve | None:
    """What solves a list of this shape; None where there is nothing to solve."""
    if group:
        return ranked_solve(shape, absolute, soft, hard, group)
    return global_solve(shape, absolute, soft, hard) if shape.length else None


def soft_topk_global_forward(o: SoftTopkGlobal) -> tuple[list[torch.Tensor], torch.Tensor]:
    """m and (c, d) for a list that shares one budget."""
    check_list(o.values, o.budget, o.costs, o.beta, o.group)
    masks = _empty(o.values)
    problem = TensorList(o.values, o.costs)
    solve = _solve(problem.shape, False, True, False, o.group)
    if solve is None:
        return masks, o.budget.new_zeros(2)
    return masks, solve.run(problem.table(masks), o.budget, o.beta)


def solve_masks_(o: SolveMasks) -> None:
    """Soft and hard mask of a training step, in place."""
    values, absolute = score_list(o, block_scores)
    check_list(values, o.budget, o.costs, o.beta, o.group)
    problem = TensorList(values, o.costs)
    solve = _solve(problem.shape, absolute, True, True, o.group)
    if solve is not None:
        soft = o.soft or _empty(values)  # the table holds addresses alone
        threshold = solve.run(problem.table(soft, o.hard), o.budget, o.beta, o.state)
        if not o.soft:
            o.state[6:] = threshold


def hard_topk_global_forward(o: HardTopkGlobal) -> list[torch.Tensor]:
    """h for a list that shares one budget."""
    check_list(o.values, o.budget, o.costs, None, o.group)
    masks = _empty(o.values, torch.bool)
    problem = TensorList(o.values, o.costs)
    solve = _solve(problem.shape, o.absolute, False, True, o.group)
    if solve is not None:
        solve.run(problem.table(masks, masks), o.budget, torch.ones_like(o.budget))
    return masks


def soft_topk_global_backward(
    o: SoftTopkGlobalBackward,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta of a list that shares one budget."""
    problem = TensorList(o.values, o.costs)
    grad_values, grad_costs = _empty(o.values), _empty(o.values) if o.cost_grad else []
    scalars = torch.zeros(2, dtype=torch.float64, device=problem.shape.device)
    if problem.shape.length or o.group:
        table = problem.table(contiguous(o.grads), grad_values, *([grad_costs] if o.cost_grad else []))
        gradient = global_gradient(problem.shape, o.cost_grad, table.aligned)
        gradient.run(table, o.threshold.contiguous(), o.beta, scalars, o.group)
    return grad_values, grad_costs, scalars[0], scalars[1]
