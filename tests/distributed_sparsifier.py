"""Checks over processes: sparse training of sharded models is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from distributed_common import check, rank, require_same_bits, world
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

import spartan
from spartan.methods.base import Method

BATCH = 16
Place = Callable[[nn.Module], nn.Module]


def model_of(widths: tuple[int, ...] = (12, 26, 22, 6), seed: int = 0) -> nn.Sequential:
    """A perceptron, the same on every rank; the default widths divide over no four ranks, nor into blocks of four."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b), nn.Tanh()][: 1 if i == len(widths) - 2 else 2]
    return nn.Sequential(*layers)


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2 with the first layer and the rest as units."""
    mesh = init_device_mesh("cpu", (world(),))
    fully_shard(model[0], mesh=mesh)  # type: ignore[index]
    return fully_shard(model, mesh=mesh)


def full(tensor: Any) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


class Run:
    """A model in training; every rank has its share of a batch, which is the same whatever their number."""

    def __init__(self, method: Method, place: Place | None = None, steps: int = 20, **options: Any) -> None:
        self.alone = place is None
        widths = options.pop("widths", (12, 26, 22, 6))
        self.model: nn.Module = model_of(widths)
        self.sparsifier: spartan.Sparsifier
        if options.pop("shard_first", True) or place is None:
            self.model = place(self.model) if place else self.model
            self.sparsifier = spartan.Sparsifier(self.model, method, steps, **options)
        else:
            self.sparsifier = spartan.Sparsifier(self.model, method, steps, **options)
            self.model = place(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.sparsifier.attach(self.optimizer)
        self.widths = widths

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, self.widths[0], generator=generator)
        y = x[:, : self.widths[-1]].argmax(1)
        return (x, y) if self.alone else (x.chunk(world())[rank()], y.chunk(world())[rank()])

    def train(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            self.optimizer.zero_grad()
            x, y = self.batch(step)
            functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: full(p) for name, p in self.model.named_parameters()}


def require_same_training(many: Run, one: Run, tolerance: float = 2e-5) -> None:
    """The weights of one process to rounding, its masks exactly, and the same bits on all ranks."""
    masks, expected = many.sparsifier.masks(), one.sparsifier.masks()
    for name, mask in masks.items():
        require_same_bits(mask.hard, mask.soft)
        assert torch.equal(mask.hard, expected[name].hard), name
        torch.testing.assert_close(mask.soft, expected[name].soft, rtol=1e-3, atol=1e-4)
    for (name, found), exact in zip(many.weights().items(), one.weights().values(), strict=True):
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert many.sparsifier.sparsity == one.sparsifier.sparsity


def per_block(name: str, module: nn.Module, grid: tuple[int, ...]) -> float | Tensor:
    """A different cost for each block of the first weight, one for all of the others."""
    return torch.rand(grid, generator=torch.Generator().manual_seed(1)) + 0.5 if name.startswith("0.") else 3.0


METHODS: list[Method] = [
    spartan.Spartan(sparsity=0.7, beta=20.0),
    spartan.Spartan(sparsity=0.6, block_size=(4, 3), beta=4.0, beta_units="threshold", preserve_scale=True),
]


@check(suite="sparsifier")
def fsdp2_trains_as_one_process(backend: str) -> None:
    for method in METHODS:
        many, one = Run(method, sharded), Run(method)
        assert all(isinstance(p, DTensor) for p in many.model.parameters())
        for begin, end in ((0, 3), (3, 10), (10, 18)):  # the ramp, annealing, fixed
            many.train(begin, end)
            one.train(begin, end)
            require_same_training(many, one)
        assert many.sparsifier.frozen


@check(suite="sparsifier")
def budgets_of_cost_are_those_of_one_process(backend: str) -> None:
    flops = spartan.FLOPs(torch.randn(3, 12, generator=torch.Generator().manual_seed(0)))
    for block, costs in ((1, per_block), ((4, 3), per_block), (1, flops), ((4, 3), flops)):
        method = spartan.Spartan(
            sparsity=0.6, block_size=block, beta=6.0, beta_units="mean", backward_tolerance=0.05, anneal_shape="cosine"
        )
        many, one = Run(method, sharded, costs=costs), Run(method, costs=costs)
        assert all(isinstance(p, DTensor) for p in many.model.parameters())
        for begin, end in ((0, 3), (3, 10), (10, 18)):
            many.train(begin, end)
            one.train(begin, end)
            require_same_training(many, one)
        assert many.sparsifier.costs() == one.sparsifier.costs()
