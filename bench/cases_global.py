"""One budget over a network: solve, hard mask, soft mask, gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import spartan.functional as F
from bench.case import Peer, Settings, Work, case
from bench.checks import check_budget_mask, check_close, check_hard_mask
from bench.inputs import normal
from bench.peers import eager
from bench.peers.sinkhorn import sinkhorn_soft_topk, sort_and_sinkhorn
from spartan_kernels import ops


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of the convolutions and the classifier of ResNet-50: 25.5 million weights."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    in_ = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        shapes.append((4 * width, in_, 1, 1))
        for _ in range(blocks):
            shapes += [(width, in_, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            in_ = 4 * width
    return [*shapes, (1000, 2048)]


def _copy(*sources: Tensor) -> Callable[..., None]:
    """Make the peer that every memory-bound case has, a copy of its tensors."""
    targets = [torch.empty_like(t) for t in sources]

    def copy(*_: Any) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return copy


class _TrainingStep:
    """Weights of a network, their masks and the solver's state, as a training step holds them."""

    def __init__(self, s: Settings, shapes: Sequence[tuple[int, ...]]) -> None:
        self.weights = [normal(shape, s, i, (2 / math.prod(shape[1:])) ** 0.5) for i, shape in enumerate(shapes)]
        self.noise = [1e-3 * normal(w.shape, s, 500 + i, float(w.std())) for i, w in enumerate(self.weights)]
        self.n = sum(w.numel() for w in self.weights)
        # on the device, so that a graph of the solve follows the schedule
        self.budget, self.beta = (torch.tensor(v, dtype=torch.float64, device=s.device) for v in (0.1 * self.n, 20.0))
        self.soft = [torch.empty_like(w) for w in self.weights]
        self.hard = [torch.empty_like(w, dtype=torch.bool) for w in self.weights]
        self.state = ops.new_solver_state(s.device)
        self.backend = s.backend

    def drift(self) -> None:
        """One optimizer step's worth of change, and the schedule's."""
        torch._foreach_add_(self.weights, self.noise)
        self.beta.mul_(1.001)
        self.budget.mul_(0.9995)

    def solve(self, state: Tensor) -> None:
        ops.solve_masks_(
            self.weights,
            self.budget,
            None,
            self.beta,
            self.soft,
            self.hard,
            state,
            absolute=True,
            backend=self.backend,
        )

    def check(self) -> None:
        soft, hard = (torch.cat([m.flatten() for m in masks]) for masks in (self.soft, self.hard))
        row = torch.cat([w.flatten() for w in self.weights]).abs()
        check_budget_mask(soft, float(self.budget), values=row, beta=float(self.beta))
        check_hard_mask(hard, row, float(self.budget))


def _network(quick: bool) -> list[tuple[int, ...]]:
    return [(512, 512)] * 4 if quick else resnet50_shapes()


def training_step_masks(
    s: Settings, shapes: Sequence[tuple[int, ...]], warm: bool, peers: Sequence[str] = ("copy", "sort + Sinkhorn")
) -> Work:
    """Both masks of weights of these shapes: from nothing, or (`warm`) from the last step's solution."""
    step = _TrainingStep(s, shapes)
    if warm:
        for _ in range(2):  # the start extrapolates from two thresholds
            step.solve(step.state)
            step.drift()
    others: dict[str, Peer | str] = {
        "copy": _copy(*step.weights),
        "sort + Sinkhorn": lambda: sort_and_sinkhorn(step.weights, float(step.budget), float(step.beta)),
    }
    return Work(
        ours=lambda: step.solve(step.state if warm else ops.new_solver_state(s.device)),
        operands=[()],
        prepare=step.drift,
        check=lambda _: step.check(),
        bytes=2 * step.n * s.dtype.itemsize + step.n,
        peers={name: others[name] for name in peers},
        notes={"weights": float(step.n)},
    )


@case("soft_topk_global", "resnet50-cold")
def global_cold(s: Settings) -> Work:
    """Both masks of 25.5 million weights from nothing."""
    return training_step_masks(s, _network(s.quick), warm=False)


@case("soft_topk_global", "resnet50-warm")
def global_warm(s: Settings) -> Work:
    """Both masks of 25.5 million weights, one training step after the last solve."""
    return training_step_masks(s, _network(s.quick), warm=True)


@case("soft_topk_global", "one-tensor-cold")
def global_one_tensor(s: Settings) -> Work:
    """Soft mask alone of one flat tensor of 25.6 million values, as a differentiable call."""
    n, beta = (1 << 20 if s.quick else 25_600_000), 5.0
    values, k = normal((n,), s, 0), 0.1 * n
    return Work(
        ours=lambda v: ops.soft_topk_global([v], k, beta=beta, backend=s.backend)[0],
        operands=[(values,)],
        check=lambda mask, v: check_budget_mask(mask, k, values=v, beta=beta),
        bytes=2 * n * s.dtype.itemsize,
        peers={"copy": lambda v: v.clone(), "Sinkhorn": lambda v: sinkhorn_soft_topk(v, k, beta=beta)},
    )


@case("soft_topk_global", "1000-tensors-cold")
def global_many_tensors(s: Settings) -> Work:
    """Soft masks of 1000 tensors of 1 to 10^6 values, beside one tensor of their total length."""
    count, largest = (100, 1e4) if s.quick else (1000, 1e6)
    generator = torch.Generator().manual_seed(0)
    lengths = (largest ** torch.rand(count, generator=generator, dtype=torch.float64)).long().tolist()
    n, beta = sum(lengths), 5.0
    k = 0.1 * n
    whole = normal((n,), s, 0)
    parts = [part.clone() for part in whole.split(lengths)]

    def check(masks: list[Tensor], _: list[Tensor], flat: Tensor) -> None:
        check_budget_mask(torch.cat(masks), k, values=flat, beta=beta)

    return Work(
        ours=lambda tensors, _: ops.soft_topk_global(tensors, k, beta=beta, backend=s.backend),
        operands=[(parts, whole)],
        check=check,
        bytes=2 * n * s.dtype.itemsize,
        peers={
            "copy": lambda tensors, flat: flat.clone(),
            "ours, one tensor": lambda _, flat: ops.soft_topk_global([flat], k, beta=beta, backend=s.backend),
        },
        notes={"tensors": float(count), "values": float(n)},
    )


@case("soft_topk_global", "one-tensor-backward")
def global_backward(s: Settings) -> Work:
    """Gradient for one flat tensor of 25.6 million values, from a finished forward pass."""
    n, beta = (1 << 20 if s.quick else 25_600_000), 5.0
    values, k = normal((n,), s, 0).requires_grad_(), 0.1 * n
    (mask,) = F.soft_topk_global([values], k, beta=beta, backend=s.backend)
    upstream = normal((n,), s, 1)

    def check(gradient: Tensor, leaf: Tensor, out: Tensor, grad: Tensor) -> None:
        exact = eager.soft_topk_gradient(grad.double(), out.detach().double(), beta)
        # the mask that the formula starts from is rounded, 1 - m with it
        floor = beta * 4 * torch.finfo(s.dtype).eps * grad.abs().amax()
        check_close(gradient, exact, eager.soft_topk_gradient(grad, out.detach(), beta), floor)

    return Work(
        ours=lambda leaf, out, grad: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0],
        operands=[(values, mask, upstream)],
        check=check,
        bytes=3 * n * s.dtype.itemsize,
        peers={
            "copy": lambda leaf, out, grad: grad.clone(),
            "eager formula": lambda leaf, out, grad: eager.soft_topk_gradient(grad, out.detach(), beta),
        },
    )
