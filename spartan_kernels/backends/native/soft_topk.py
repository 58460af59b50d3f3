"""Soft top-k on the compiled extension: by rows, and lists that share a budget."""

from __future__ import annotations

from typing import Any

import torch

from spartan_kernels.arguments import require_beta
from spartan_kernels.backends import extension
from spartan_kernels.backends.native.lists import TensorList
from spartan_kernels.backends.native.masked_weight import block_scores
from spartan_kernels.backends.native.rows import Budgets, Rows
from spartan_kernels.backends.native.unmasked import Unmasked
from spartan_kernels.backends.shared import costs_of_row
from spartan_kernels.blocks import score_list
from spartan_kernels.operands import (
    SoftTopk,
    SoftTopkBackward,
    SoftTopkGlobal,
    SoftTopkGlobalBackward,
    SolveMasks,
    as_declared,
)


def soft_topk_forward(o: SoftTopk) -> tuple[torch.Tensor, torch.Tensor]:
    """m and (centre, shift) for each row of values [rows, n]."""
    beta = float(o.beta)
    require_beta(beta)
    rows, budgets = Rows(o.values, o.costs), Budgets(o.budget)
    mask = rows.empty()
    threshold = extension.empty((o.values.shape[0], 2), torch.float64)
    try:
        extension.native.cpu.soft_topk_rows(
            *rows.arguments,
            *budgets.arguments,
            beta,
            mask.data_ptr(),
            threshold.data_ptr(),
            *rows.rest,
        )
    except extension.native.NotFinite:
        if not rows.long:
            raise
        o = as_declared(o)
        for i, row in enumerate(o.values):
            listed = SoftTopkGlobal([row], o.budget[i], costs_of_row(o.costs, i), o.beta)
            (mask[i],), threshold[i] = soft_topk_global_forward(listed)
    return _as(mask, o.values), threshold


def soft_topk_backward(o: SoftTopkBackward) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta (by row)."""
    rows, beta = Rows(o.values, o.costs), float(o.beta)
    g, t = rows.brought(o.grad).contiguous(), o.threshold.contiguous()
    grad_values = rows.empty()
    grad_costs = rows.empty() if o.cost_grad else None
    grad_budget, grad_beta = t.new_empty(o.values.shape[0]), t.new_empty(o.values.shape[0])
    extension.native.cpu.soft_topk_rows_backward(
        *rows.arguments,
        g.data_ptr(),
        t.data_ptr(),
        beta,
        grad_values.data_ptr(),
        extension.pointer(grad_costs),
        grad_budget.data_ptr(),
        grad_beta.data_ptr(),
        *rows.rest,
    )
    if rows.long and not bool(torch.isfinite(grad_beta).all()):
        for i, row in enumerate(o.values):
            found = soft_topk_global_backward(
                SoftTopkGlobalBackward([g[i]], [row], t[i], costs_of_row(o.costs, i), o.beta, o.cost_grad)
            )
            grad_values[i], grad_budget[i], grad_beta[i] = found[0][0], found[2], found[3]
            if grad_costs is not None:
                grad_costs[i] = found[1][0]
    return _as(grad_values, o.values), _as(grad_costs, o.values), grad_budget, grad_beta


def _as(found: Any, values: torch.Tensor) -> Any:
    """What was found in the values' dtype; None stays."""
    return found if found is None or found.dtype is values.dtype else found.to(values.dtype)


def soft_topk_global_forward(o: SoftTopkGlobal) -> tuple[list[torch.Tensor], torch.Tensor]:
    """m for a list that shares one budget."""
    try:
        return _soft_of_list(o)
    except extension.native.NotFinite:
        rest = Unmasked(o.values, o.costs)
        masks, threshold = _soft_of_list(o._replace(values=rest.values, costs=rest.costs))
        return rest.whole(masks), threshold


def _soft_of_list(o: SoftTopkGlobal) -> tuple[list[torch.Tensor], torch.Tensor]:
    problem = TensorList(o.values, o.costs, o.group)
    masks = problem.empty()
    threshold = extension.empty(2, torch.float64)
    _table, first = problem.first(masks)
    extension.native.cpu.soft_topk_global(
        *first, float(o.budget), float(o.beta), False, 0, threshold.data_ptr(), *problem.rest()
    )
    return masks, threshold


def soft_topk_global_backward(
    o: SoftTopkGlobalBackward,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients for values, costs (elementwise), budget and beta of a list that shares one budget."""
    found = _gradient_of_list(o)
    if bool(torch.isfinite(found[3])):
        return found
    rest = Unmasked(o.values, o.costs)  # a masked entry makes the gradient of beta infinite or NaN
    of_values, of_costs, of_budget, of_beta = _gradient_of_list(
        o._replace(grads=rest.parts(o.grads), values=rest.values, costs=rest.costs)
    )
    return rest.whole(of_values), rest.whole(of_costs) if o.cost_grad else [], of_budget, of_beta


def _gradient_of_list(
    o: SoftTopkGlobalBackward,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    problem = TensorList(o.values, o.costs, o.group)
    g = [grad.detach().to(problem.dtype).contiguous() for grad in o.grads]
    grad_values, grad_costs = problem.empty(), problem.empty() if o.cost_grad else []
    saved, scalars = o.threshold.contiguous(), extension.empty(2, torch.float64)
    _table, first = problem.first(g, grad_values, grad_costs)
    extension.native.cpu.soft_topk_global_backward(
        *first, saved.data_ptr(), float(o.beta), scalars.data_ptr(), *problem.rest()
    )
    return grad_values, grad_costs, scalars[0].clone(), scalars[1].clone()


def solve_masks_(o: SolveMasks) -> None:
    """Soft and hard mask of a training step, in place."""
    values, absolute = score_list(o, block_scores)
    o = o._replace(values=values, absolute=absolute)
    try:
        _masks_of_list(o)
    except extension.native.NotFinite:
        rest = Unmasked(o.values, o.costs)
        soft, hard = rest.parts(o.soft) if o.soft else [], rest.parts(o.hard)
        _masks_of_list(o._replace(values=rest.values, costs=rest.costs, soft=soft, hard=hard))
        for masks, found in ((o.soft, soft), (o.hard, hard)):
            for mask, entries in zip(masks, rest.whole(found) if found else [], strict=True):
                mask.copy_(entries)


def _masks_of_list(o: SolveMasks) -> None:
    problem = TensorList(o.values, o.costs, o.group)
    threshold = extension.empty(2, torch.float64)
    _table, first = problem.first(o.soft, o.hard)
    extension.native.cpu.soft_topk_global(
        *first, float(o.budget), float(o.beta), o.absolute, o.state.data_ptr(), threshold.data_ptr(), *problem.rest()
    )
    if not o.soft:
        o.state[6:] = threshold
