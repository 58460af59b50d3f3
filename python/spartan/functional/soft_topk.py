"""Soft top-k masks with gradients, and the hard mask that takes the soft one's gradient.

The backward saves the values themselves (no copy where rows are views of them), two float64 numbers
for each row or list, and costs given as a tensor. Never the mask: s = m (1 - m) cancels where m is near 1 (bfloat16
rounds all m > 0.998 to 1), so the backward computes m and 1 - m again from the values and the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from spartan.functional.autograd import differentiable, differentiable_once, needed, saved_number
from spartan_kernels import ops
from spartan_kernels.operands import SoftTopk, SoftTopkBackward, SoftTopkGlobal, SoftTopkGlobalBackward
from spartan_kernels.ops import as_in_autocast, hard_topk, hard_topk_global
from spartan_kernels.ops.soft_topk import soft_topk_backward, soft_topk_global_backward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["soft_topk", "soft_topk_global"]


def soft_topk(
    values: torch.Tensor,
    budget: float | torch.Tensor,
    costs: float | torch.Tensor | None = None,
    beta: float | torch.Tensor = 1.0,
    dim: int = -1,
    *,
    straight_through: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Soft mask of the entries worth keeping within a budget, along one dimension; differentiable (once).

    m_i = sigmoid(beta v_i / a_i + mu), with mu such that sum_i a_i m_i = k. With s = m (1 - m), g = dL/dm and
    r = sum_i g_i s_i / sum_i a_i s_i:  dL/dv_i = beta s_i (g_i / a_i - r),  dL/dk = r,
    dL/da_i = -(g_i - a_i r) s_i beta v_i / a_i^2 - r m_i,  dL/dbeta = sum_i (g_i - a_i r) s_i v_i / a_i.

    Args:
        values: v, any shape, floating point. Half precision is read as float32 under autocast, as softmax does on CUDA.
            An entry of -inf is masked: its mask and gradients are 0, and it costs nothing.
        budget: k, a number or a tensor shaped like `values` without `dim`; in [0, sum of the costs of entries that are
            not -inf].
        costs: a > 0; None (ones), a number, one per entry of `dim`, or shaped like `values`.
        beta: sharpness, finite and at least 0; 0 gives k / sum(a) everywhere. The limit of a large one is `hard_topk`.
        dim: the dimension that shares a budget.
        straight_through: return the hard mask of `hard_topk` as 0 and 1, with the gradient of the soft one.
        backend: "auto" or the name of a backend.

    Returns:
        m in [0, 1], shape and dtype of `values` (float32 for half precision under autocast); differentiable in
        values, budget, costs and beta. Every gradient is 0 where sum_i a_i s_i is 0: k is 0 or everything, or m is
        saturated.

    Raises:
        TypeError: integer or non-tensor values, costs or beta of a wrong type.
        ValueError: budget outside [0, that sum], costs not positive, beta negative, shapes that do not match,
            or values that are NaN or +inf. A GPU is not asked: there a row with such values, or with a budget above
            that sum, comes out as NaN.
        RuntimeError: when the gradient is differentiated in turn.

    Source: Tai, Tian, Lim, "Spartan", NeurIPS 2022, section 3, equation (1) of its soft top-k.
    """
    soft = ops.soft_topk(values, budget, costs, beta, dim, backend=backend)
    if not straight_through:
        return soft
    hard = hard_topk(as_in_autocast(values), budget, costs, dim, backend=backend)
    return _StraightThrough.apply(hard, soft)


def soft_topk_global(
    values: Sequence[torch.Tensor],
    budget: float | torch.Tensor,
    costs: Sequence[float | torch.Tensor] | None = None,
    beta: float | torch.Tensor = 1.0,
    group: ProcessGroup | str | None = None,
    *,
    straight_through: bool = False,
    backend: str | None = None,
) -> list[torch.Tensor]:
    """Soft masks under one budget over many tensors, and over the ranks of a process group; differentiable (once).

    m_i = sigmoid(beta v_i / a_i + mu), with one mu such that the sum of a_i m_i over all tensors (and ranks) is k;
    the gradients are those of `soft_topk`, with its sums over all tensors (and ranks).

    Args:
        values: tensors of any shapes, of one dtype and device; half precision is read as float32 under autocast. Or
            DTensors on one mesh (the parameters of FSDP2 or of tensor parallelism), which are solved on their local
            shards without gathering them; a tensor replicated over ranks counts once. Entries of -inf are masked, as in
            `soft_topk`.
        budget: k, a number or 0-dim tensor, for all of them together.
        costs: None (ones), or for each tensor a number, a 0-dim tensor or a tensor of its shape.
        beta: sharpness, at least 0.
        group: a `torch.distributed` process group (or its name) whose ranks each pass their own part, which may be
            empty; None for this process alone, and with DTensors, whose mesh has it. All ranks call with the same
            budget and beta, forward and backward. Served by the native, Triton and reference
            backends.
        straight_through: return the hard masks of `hard_topk_global` as 0 and 1, with the gradient of the soft ones.
        backend: "auto" or the name of a backend.

    Returns:
        One mask for each tensor, of its shape and dtype (float32 for half precision under autocast); DTensors placed
        as the values where those are.

    Raises:
        TypeError, ValueError, RuntimeError: as `soft_topk`; also for an empty list, for DTensors mixed with plain
            tensors, on several meshes or pending a reduction. On the CPU what is refused on one rank for its values,
            costs, budget or beta is refused on all.

    Source: Tai, Tian, Lim, "Spartan", NeurIPS 2022, section 3.
    """
    soft = ops.soft_topk_global(values, budget, costs, beta, group, backend=backend)
    if not straight_through:
        return soft
    hard = hard_topk_global([as_in_autocast(v) for v in values], budget, costs, group=group, backend=backend)
    return [_StraightThrough.apply(h, m) for h, m in zip(hard, soft, strict=True)]


class _StraightThrough(torch.autograd.Function):
    """The hard mask in the soft one's dtype; its gradient goes to the soft one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
        return hard.to(soft.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, grad


def _reduce_to(elementwise: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum an elementwise gradient down to the shape that was broadcast."""
    return elementwise.sum_to_size(like.shape)


def _setup_rows(ctx: Any, o: SoftTopk, output: Any) -> None:
    _, threshold = output
    tensor, ctx.beta = saved_number(o.beta)
    ctx.save_for_backward(o.values, threshold, o.costs, tensor)
    ctx.mark_non_differentiable(threshold)
    ctx.set_materialize_grads(False)  # or each backward would fill zeros for the threshold
    ctx.backend = o.backend


def _backward_rows(ctx: Any, grad_mask: torch.Tensor | None, grad_threshold: None) -> Any:
    if grad_mask is None:
        return [None] * len(ctx.needs)
    values, threshold, costs, tensor = ctx.saved_tensors
    beta = ctx.beta if tensor is None else tensor
    o = SoftTopkBackward(grad_mask, values, threshold, costs, beta, ctx.needs.costs, ctx.backend)
    of_values, of_costs, of_budget, of_beta = soft_topk_backward(o)
    reduced = _reduce_to(of_costs, costs) if ctx.needs.costs else None
    return needed(ctx.needs, (of_values, of_budget, reduced, of_beta.sum() if ctx.needs.beta else None))


def _setup_global(ctx: Any, o: SoftTopkGlobal, output: Any) -> None:
    _, threshold = output
    tensor, ctx.beta = saved_number(o.beta)
    ctx.save_for_backward(*o.values, *o.costs, threshold, tensor)
    ctx.mark_non_differentiable(threshold)
    ctx.count = len(o.values)
    ctx.group, ctx.backend = o.group, o.backend


def _backward_global(ctx: Any, grad_masks: Any, grad_threshold: torch.Tensor) -> Any:
    *lists, threshold, tensor = ctx.saved_tensors
    beta = ctx.beta if tensor is None else tensor
    values, costs = lists[: ctx.count], lists[ctx.count :]
    cost_grad = any(ctx.needs.costs)
    o = SoftTopkGlobalBackward(grad_masks, values, threshold, costs, beta, cost_grad, ctx.group, ctx.backend)
    of_values, of_costs, of_budget, of_beta = soft_topk_global_backward(o)
    reduced = [_reduce_to(g, c) for g, c in zip(of_costs, costs, strict=True)] if cost_grad else None
    return of_values, of_budget if ctx.needs.budget else None, reduced, of_beta if ctx.needs.beta else None


differentiable("soft_topk_forward", ("values", "budget", "costs", "beta"), _setup_rows, _backward_rows)
differentiable("soft_topk_global_forward", ("values", "budget", "costs", "beta"), _setup_global, _backward_global)
differentiable_once("soft_topk_backward", "soft_topk")
differentiable_once("soft_topk_global_backward", "soft_topk_global")
