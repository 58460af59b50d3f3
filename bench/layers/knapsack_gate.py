"""Gates under a budget of cost, with their gradient, beside what is written by hand from a sort and a bisection."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Settings, Work, case
from bench.checks import check_close
from bench.inputs import normal, rotating
from spartan.layers import KnapsackGate
from spartan_kernels.testing import oracle_hard_topk, oracle_soft_topk

_BETA, _BUDGET, _BISECTIONS = 4.0, 0.25, 40
_CHECKED = 32  # rows: the oracle bisects in float64


class _ByHand(torch.autograd.Function):
    """The hard mask by a sort; its gradient by a bisection for mu and the implicit derivative."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, scores: Tensor, costs: Tensor) -> Tensor:
        k, x = _BUDGET * costs.sum(), _BETA * scores
        order = scores.argsort(-1, descending=True)
        fits = costs[order].cumsum(-1) <= k
        low, high = -x.amax(-1, keepdim=True) - 20, -x.amin(-1, keepdim=True) + 20
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            above = (costs * torch.sigmoid(x + middle)).sum(-1, keepdim=True) > k
            high, low = torch.where(above, middle, high), torch.where(above, low, middle)
        m = torch.sigmoid(x + low)
        ctx.save_for_backward(m * (1 - m), costs)
        return torch.zeros_like(scores).scatter_(-1, order, fits.to(scores.dtype))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        slope, costs = ctx.saved_tensors  # type: ignore[attr-defined]
        price = (slope * grad).sum(-1, keepdim=True) / (slope * costs).sum(-1, keepdim=True)
        return _BETA * slope * (grad - price * costs), None


@case("layers", "knapsack-gate-4096x256")
def knapsack_gate(s: Settings) -> Work:
    """4096 inputs choose among 256 blocks of costs from 1 to 9, a quarter of all; forward and backward."""
    rows, n = (512 if s.quick else 4096), 256
    costs = torch.randint(1, 10, (n,), generator=torch.Generator().manual_seed(7)).to(s.device, s.dtype)
    gate = KnapsackGate(costs, torch.nn.Identity(), budget=_BUDGET, beta=_BETA).to(s.device)

    def ours(scores: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gates = gate(scores)
        return gates, torch.autograd.grad(gates, scores, upstream)[0]

    def by_hand(scores: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gates = _ByHand.apply(scores, costs)
        return gates, torch.autograd.grad(gates, scores, upstream)[0]

    def dense(scores: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gates = torch.sigmoid(scores)
        return gates, torch.autograd.grad(gates, scores, upstream)[0]

    def check(found: tuple[Tensor, Tensor], scores: Tensor, upstream: Tensor) -> None:
        gates, gradient = (part[:_CHECKED] for part in found)
        leaf = scores[:_CHECKED].detach().double().requires_grad_()
        values, k = leaf * costs, _BUDGET * float(costs.double().sum())
        if not torch.equal(gates.bool(), oracle_hard_topk((scores[:_CHECKED].detach() * costs), k, costs)):
            raise AssertionError("the gates are not the blocks of largest score that fit")
        mask = oracle_soft_topk(values, k, costs, _BETA)
        (exact,) = torch.autograd.grad(mask, leaf, upstream[:_CHECKED].double())
        plain = torch.autograd.grad(
            _ByHand.apply(few := scores[:_CHECKED].detach().requires_grad_(), costs), few, upstream[:_CHECKED]
        )[0]
        check_close(gradient, exact, plain, 1e-5 * exact.abs().amax())

    nbytes = 4 * rows * n * s.dtype.itemsize  # scores and upstream in, gates and gradient out
    operands = rotating(
        s, nbytes // 4, lambda i: (normal((rows, n), s, i).requires_grad_(), normal((rows, n), s, 1000 + i))
    )
    return Work(
        ours=ours,
        operands=operands,
        check=check,
        bytes=nbytes,
        peers={"sort and bisection": by_hand, "sigmoid, no budget": dense},
    )
