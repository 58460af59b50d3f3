"""Soft top-k: the mask of the entropically regularised knapsack, by rows or with one budget over many tensors."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from spartan_kernels.arguments import block_grid, block_shape, clip_block, number, require_device
from spartan_kernels.groups import group_name
from spartan_kernels.operands import SoftTopk, SoftTopkBackward, SoftTopkGlobal, SoftTopkGlobalBackward, SolveMasks
from spartan_kernels.ops._define import define
from spartan_kernels.ops._problem import as_in_autocast, global_problem, list_in_autocast, row_problem
from spartan_kernels.ops._shards import shards
from spartan_kernels.ops._vmap import fold_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SOLVER_STATE_SIZE = 8


def _fake_forward(o: SoftTopk) -> Any:
    return _like(o.values), o.beta.new_empty((o.values.shape[0], 2))


def _fake_backward(o: SoftTopkBackward) -> Any:
    rows = o.beta.new_empty(o.values.shape[0])
    return _like(o.values), _like(o.values) if o.cost_grad else o.values.new_empty(0), rows, rows.clone()


def _fake_global_forward(o: SoftTopkGlobal) -> Any:
    return [_like(v) for v in o.values], o.beta.new_empty(2)


def _fake_global_backward(o: SoftTopkGlobalBackward) -> Any:
    grad_costs = [_like(v) for v in o.values] if o.cost_grad else []
    return [_like(v) for v in o.values], grad_costs, o.beta.new_empty(()), o.beta.new_empty(())


def _like(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


soft_topk_forward = define(
    "soft_topk_forward", SoftTopk, "(Tensor, Tensor)", _fake_forward, fold_rows("values", "budget")
)
# -> gradients of values [rows, n], costs (elementwise, empty unless cost_grad), budget [rows] and beta [rows]
soft_topk_backward = define(
    "soft_topk_backward",
    SoftTopkBackward,
    "(Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    fold_rows("grad", "values", "threshold"),
)
soft_topk_global_forward = define(
    "soft_topk_global_forward", SoftTopkGlobal, "(Tensor[], Tensor)", _fake_global_forward
)
soft_topk_global_backward = define(
    "soft_topk_global_backward",
    SoftTopkGlobalBackward,
    "(Tensor[], Tensor[], Tensor, Tensor)",
    _fake_global_backward,
)
_solve_masks = define("solve_masks_", SolveMasks, "()", lambda o: None, writes=("soft", "hard", "state"))


def soft_topk(
    values: torch.Tensor,
    budget: float | torch.Tensor,
    costs: float | torch.Tensor | None = None,
    beta: float | torch.Tensor = 1.0,
    dim: int = -1,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Soft mask of the entries worth keeping within a budget, along one dimension.

    m_i = sigmoid(beta v_i / a_i + mu), with mu such that sum_i a_i m_i = k.

    Args:
        values: v, any shape, floating point. An entry of -inf is masked: its mask and gradients are 0, and it costs
            nothing.
        budget: k, a number or a tensor shaped like `values` without `dim`; in [0, sum of the costs of entries that are
            not -inf].
        costs: a > 0; None (ones), a number, one per entry of `dim`, or shaped like `values`.
        beta: sharpness, finite and at least 0; 0 gives k / sum(a) everywhere. The limit of a large one is `hard_topk`.
        dim: the dimension that shares a budget.
        backend: "auto" or the name of a backend.

    Returns:
        m in [0, 1], shape and dtype of `values`; differentiable in values, budget, costs and beta once
            `spartan` is imported.

    Raises:
        TypeError: integer or non-tensor values, costs or beta of a wrong type.
        ValueError: budget outside [0, that sum], costs not positive, beta negative, shapes that do not match,
            or values that are NaN or +inf. A GPU is not asked: there a row with such values, or with a budget above
            that sum, comes out as NaN.

    Source: Tai, Tian, Lim, "Spartan", NeurIPS 2022, section 3, equation (1) of its soft top-k.
    """
    rows, row_budget, row_costs, restore = row_problem(as_in_autocast(values), budget, costs, dim)
    o = SoftTopk(rows, row_budget, row_costs, number("beta", beta, values.device), backend or "")
    mask, _ = soft_topk_forward(o)
    return restore(mask)


def soft_topk_global(
    values: Sequence[torch.Tensor],
    budget: float | torch.Tensor,
    costs: Sequence[float | torch.Tensor] | None = None,
    beta: float | torch.Tensor = 1.0,
    group: ProcessGroup | str | None = None,
    *,
    backend: str | None = None,
) -> list[torch.Tensor]:
    """Soft masks under one budget over many tensors, and over the ranks of a process group.

    m_i = sigmoid(beta v_i / a_i + mu), with one mu such that the sum of a_i m_i over all tensors (and ranks) is k.

    Args:
        values: tensors of any shapes, of one dtype and device; or DTensors on one mesh (the parameters of FSDP2 or of
            tensor parallelism), which are solved on their local shards without gathering them. Entries of -inf are
            masked, as in `soft_topk`; the native backend then copies the others.
        budget: k, a number or 0-dim tensor, for all of them together.
        costs: None (ones), or for each tensor a number, a 0-dim tensor or a tensor of its shape.
        beta: sharpness, at least 0.
        group: a `torch.distributed` process group (or its name) whose ranks each pass their own part, which may be
            empty; None for this process alone, and with DTensors, whose mesh has it. All ranks call with the same
            budget and beta, and every mask comes out of the same bits of threshold. Served by the native,
            Triton and reference backends.
        backend: "auto" or the name of a backend.

    Returns:
        One mask for each tensor, of its shape and dtype; a DTensor placed as its values where they are one. A tensor
        replicated over ranks of its mesh counts once. Differentiable (once) in values, budget, costs and
        beta once `spartan` is imported.

    Raises:
        TypeError, ValueError: as `soft_topk`; also for an empty list, for DTensors mixed with plain tensors, on several
            meshes or pending a reduction. On the CPU what is refused on one rank for its values, costs, budget or beta
            is refused on all.

    Source: Tai, Tian, Lim, "Spartan", NeurIPS 2022, section 3.
    """
    parts = shards(values, costs, group)
    tensors, cost_list = global_problem(list_in_autocast(parts.values), parts.costs)
    name = group_name(parts.group)
    device = tensors[0].device
    k, sharpness = number("budget", budget, device), number("beta", beta, device)
    masks, _ = soft_topk_global_forward(SoftTopkGlobal(tensors, k, cost_list, sharpness, name, backend or ""))
    return parts.restore(masks)


def new_solver_state(device: torch.device | str = "cpu") -> torch.Tensor:
    """State of `solve_masks_` between steps, empty: the first call starts cold.

    Returns:
        float64 [8]: soft threshold t, its predecessor, hard threshold (the largest v/a that is not wholly kept) and its
        predecessor, the number of solves so far, room for the backend's own use, and two numbers for the solution of a
        soft mask that is not written.
    """
    return torch.zeros(SOLVER_STATE_SIZE, dtype=torch.float64, device=device)


def solve_masks_(
    values: Sequence[torch.Tensor],
    budget: float | torch.Tensor,
    costs: Sequence[float | torch.Tensor] | None,
    beta: float | torch.Tensor,
    soft: Sequence[torch.Tensor] | None,
    hard: Sequence[torch.Tensor],
    state: torch.Tensor,
    *,
    absolute: bool = False,
    block_sizes: Sequence[int | tuple[int, int]] | None = None,
    group: ProcessGroup | str | None = None,
    backend: str | None = None,
) -> None:
    """Write the soft and the hard mask of one training step in place, starting from the thresholds of the last one.

    soft = m of `soft_topk_global`; hard = `hard_topk_global`; v = values, or |values| with `absolute` (no copy), or
    with `block_sizes` the sum of |values| over each block, computed in the same call.

    Args:
        values: weights or block scores, of one dtype and device; or DTensors, as in `soft_topk_global`. Scores of -inf
            are masked unless magnitudes count.
        budget: k, a number or 0-dim tensor.
        costs: None, or for each tensor a number, a 0-dim tensor or a tensor of its shape.
        beta: sharpness, at least 0.
        soft: for each tensor, where its soft mask goes: its shape and dtype, contiguous; placed as it is for a DTensor.
            None: it is not written, and `state[6:8]` is then its solution (c, d), m = sigmoid(beta (v / a - c) + d), of
            which `masked_weight` makes it; on GPUs it takes its memory during the call all the same.
        hard: for each tensor, where its hard mask goes: its shape, bool, contiguous; placed as it is for a DTensor.
        state: from `new_solver_state`, updated; over ranks each has its own, all of the same bits.
        absolute: choose by magnitude.
        block_sizes: for each tensor, a weight, its block size: masks and costs have one entry per block (`block_grid`).
            None where values are scores already. Not for DTensors, whose blocks a cut may divide.
        group: as in `soft_topk_global`; the index that breaks ties counts through the ranks in their order.
        backend: "auto" or the name of a backend.

    Raises:
        TypeError, ValueError: as `soft_topk_global`; also for masks or a state of the wrong shape or dtype.
    """
    parts = shards(values, costs, group)
    sides = None if block_sizes is None else [block_shape(size) for size in block_sizes]
    shapes = None if sides is None else _grids(parts.values, sides)
    if sides is not None and all(pair == (1, 1) for pair in sides):
        absolute, sides = True, None
    if sides is not None and parts.layouts:
        raise ValueError("block_sizes must be 1 where values are DTensors; pass the scores of their blocks")
    tensors, cost_list = global_problem(parts.values, parts.costs, shapes)
    soft_parts, hard_parts = [] if soft is None else parts.targets("soft", soft), parts.targets("hard", hard)
    grids = shapes or [tensor.shape for tensor in tensors]
    device = tensors[0].device
    if soft is not None:
        _require_masks("soft", soft_parts, grids, tensors[0].dtype, device)
    _require_masks("hard", hard_parts, grids, torch.bool, device)
    if state.shape != (SOLVER_STATE_SIZE,) or state.dtype != torch.float64:
        raise ValueError(f"state must come from new_solver_state; got {state.dtype} of shape {tuple(state.shape)}")
    require_device("state", state, device, "values")
    if sides is not None:
        sides = [clip_block(pair, tensor.shape) for pair, tensor in zip(sides, tensors, strict=True)]
    name = group_name(parts.group)
    o = SolveMasks(
        values=tensors,
        budget=number("budget", budget, device),
        costs=cost_list,
        beta=number("beta", beta, device),
        absolute=absolute,
        block_sizes=[side for pair in sides or [] for side in pair],
        soft=soft_parts,
        hard=hard_parts,
        state=state,
        group=name,
        backend=backend or "",
    )
    _solve_masks(o)
    if soft is not None:
        parts.store(soft_parts, soft)
    parts.store(hard_parts, hard)


def _grids(values: Sequence[torch.Tensor], sides: list[tuple[int, int]]) -> list[torch.Size]:
    if len(sides) != len(values):
        raise ValueError(f"block_sizes must hold one for each of the {len(values)} values; got {len(sides)}")
    return [torch.Size(block_grid(value.shape, pair)) for value, pair in zip(values, sides, strict=True)]


def _require_masks(
    name: str, masks: Sequence[torch.Tensor], shapes: list[torch.Size], dtype: torch.dtype, device: torch.device
) -> None:
    if len(masks) != len(shapes):
        raise ValueError(f"{name} must hold one mask for each of the {len(shapes)} values; got {len(masks)}")
    if not torch.compiler.is_compiling() and (
        {*map(attrgetter("dtype"), masks)} == {dtype}
        and {*map(attrgetter("device"), masks)} == {device}
        and [*map(attrgetter("shape"), masks)] == shapes
        and all(map(torch.Tensor.is_contiguous, masks))
    ):
        return  # lists may be long
    for index, (mask, shape) in enumerate(zip(masks, shapes, strict=True)):
        if mask.dtype is not dtype or mask.shape != shape or not mask.is_contiguous():
            raise ValueError(
                f"{name}[{index}] must be contiguous {dtype} of shape {tuple(shape)};"
                f" got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        require_device(f"{name}[{index}]", mask, device, "values")
