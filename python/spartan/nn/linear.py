"""A linear layer whose weights are masked one by one: a dense product that keeps nothing but its own buffers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from spartan.functional import masked_weight
from spartan_kernels import BlockLayout, block_grid, dispatch
from spartan_kernels.break_even import dense_wins, whole_block
from spartan_kernels.operands import MaskedLinear, MaskedLinearBackward, MaskedWeight, MaskedWeightBackward
from spartan_kernels.ops.masked_matmul import masked_linear_backward, masked_linear_forward
from spartan_kernels.ops.masked_weight import masked_weight_arguments, masked_weight_backward_, masked_weight_forward
from spartan_kernels.torch_private import forward_mode, transforms_active

__all__ = ["linear_with_masked_weight"]


def linear_with_masked_weight(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    soft: torch.Tensor | None,
    hard: torch.Tensor,
    beta: torch.Tensor,
    costs: torch.Tensor,
    scale: torch.Tensor | None,
    straight_through: bool,
) -> torch.Tensor:
    """y = x w^T + b with w = theta * m * h (* scale), and the gradients of `spartan.masked_weight`.

    On the CPU the memory of w becomes that of its gradient, and then of theta's: at first touch a fresh result costs
    more than what it is computed by, and so a step takes no more memory than a dense one besides the masks. Where so
    few weights are kept that a sparse product is faster, y and the gradient of x multiply by those alone. Where
    `spartan.tune` found the product of blocks faster than PyTorch's even with all of them, it is taken.

    Args:
        x: [..., in].
        weight: theta, [out, in].
        bias: [out] or None.
        soft: m, shape of `weight`, or None for ones.
        hard: h, bool, shape of `weight`.
        beta: sharpness that m was solved with.
        costs: a, 0-dim or shaped like `weight`.
        scale: 0-dim, or None for 1.
        straight_through: whether gradients reach weights where h is 0.
    """
    if _in_place(x, weight):
        operands = x, weight, bias, soft, hard, beta, costs, scale, straight_through
        result: torch.Tensor = _InPlace.apply(*operands)
        return result
    w = masked_weight(weight, soft, hard, beta=beta, costs=costs, straight_through=straight_through)
    return functional.linear(x, w if scale is None else w * scale, bias)


def _in_place(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether these are plain tensors on the CPU, of one dtype, that nothing traces or transforms.

    Of the backends only those for the CPU write a gradient into the memory of another tensor.
    """
    return (
        not torch.compiler.is_compiling()
        and dispatch.requested(None) in ("auto", "native", "reference")
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not torch.is_autocast_enabled("cpu")
        and not transforms_active()
        and not forward_mode()
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        soft: torch.Tensor | None,
        hard: torch.Tensor,
        beta: torch.Tensor,
        costs: torch.Tensor,
        scale: torch.Tensor | None,
        straight_through: bool,
    ) -> torch.Tensor:
        o = MaskedWeight(weight, *masked_weight_arguments(weight, soft, hard, 1, beta, costs), straight_through)
        ctx.settings = o.rows, o.columns, straight_through
        ctx.save_for_backward(x, scale, o.weight, o.soft, o.hard, o.beta, o.costs)
        ctx.w = _masked(scale, o)
        ctx.block = _block_of(x, hard)
        if ctx.block is None:
            return functional.linear(x, ctx.w, bias)
        gate, layout = _active(hard, ctx.block)
        rows, columns = ctx.block
        return masked_linear_forward(MaskedLinear(x, ctx.w, gate, layout, [], bias, "", rows, columns, save=False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, scale, weight, soft, hard, beta, costs = ctx.saved_tensors
        masked = MaskedWeight(weight, soft, hard, beta, costs, *ctx.settings)
        w, ctx.w = ctx.w, None
        if w is None:  # a graph that was retained goes backward again
            w = _masked(scale, masked)
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        dx, dweight = _gradients(grad, x, w, hard, ctx.block, of_x, of_weight)
        if of_weight:
            if scale is not None:
                dweight.mul_(scale)
            masked_weight_backward_(MaskedWeightBackward(dweight, *masked))
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if of_bias else None
        return dx if of_x else None, dweight if of_weight else None, dbias, *[None] * 6


def _gradients(
    grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, hard: torch.Tensor, block: Any, of_x: bool, of_w: bool
) -> tuple[Any, Any]:
    """Of x, and of w in the memory of w where PyTorch computes it: every weight's, so not in single weights."""
    dx = dw = None
    dense_w = of_w and block in (None, _SINGLE)
    if block is not None and (of_x or not dense_w):
        gate, layout = _active(hard, block)
        needs, saved, (rows, columns) = [of_x, of_w and not dense_w, False, False], grad.new_empty(0), block
        o = MaskedLinearBackward(grad, x, w, gate, layout, [], saved, "", rows, columns, needs)
        dx, dw, *_ = masked_linear_backward(o)
    flat = grad.reshape(-1, grad.shape[-1])
    if block is None and of_x:
        dx = (flat @ w).view(x.shape)
    if dense_w:
        dw = torch.mm(flat.t(), x.reshape(-1, x.shape[-1]), out=w)
    return dx, dw


_SINGLE = (1, 1)


def _block_of(x: torch.Tensor, hard: torch.Tensor) -> tuple[int, int] | None:
    """The block of the fastest product: of the kept weights alone, of all in blocks, or (None) PyTorch's."""
    tokens = x.shape[:-1].numel()

    def saves_time(density: float) -> bool:
        return not dense_wins(density, x.device, x.dtype, _SINGLE, tokens)

    # kept weights are only counted where few enough could save time, which with few tokens they never do
    if _compiled(x.dtype) and saves_time(0.0) and saves_time(int(hard.count_nonzero()) / max(1, hard.numel())):
        return _SINGLE
    return whole_block(x.device, x.dtype, tokens)


def _compiled(dtype: torch.dtype) -> bool:
    """Whether the compiled kernels may serve: of the others none gains from an index."""
    if dispatch.requested(None) == "reference":
        return False
    return dispatch.refusal("masked_linear_forward", "native", "cpu", dtype) is None


def _active(hard: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The gate and the index that the product takes."""
    return (hard, []) if block == _SINGLE else _whole(hard.shape, block)


@lru_cache(maxsize=64)
def _whole(shape: torch.Size, block: tuple[int, int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A gate of ones, and the index of all blocks."""
    gate = torch.ones(block_grid(shape, block), device="cpu")
    return gate, BlockLayout.from_gate(gate, (shape[0], shape[1]), block).tensors()


def _masked(scale: torch.Tensor | None, o: MaskedWeight) -> torch.Tensor:
    w: torch.Tensor = masked_weight_forward(o)
    return w if scale is None else w.mul_(scale)
