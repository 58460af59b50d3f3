"""Checks over processes: sparse training of sharded models is that of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_common import check, rank, require_same_bits, world
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

import spartan
from spartan.methods.base import Method
from spartan.nn import MaskedLinear

BATCH = 16
# Over four ranks: rows that do not divide, blocks of four that the cuts divide, and a rank without any row.
WIDTHS = (12, 26, 3, 22, 6)
Place = Callable[[nn.Module], nn.Module]


def model_of(widths: Sequence[int]) -> nn.Sequential:
    """A perceptron, the same on every rank."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2, with the first layer a unit by itself and the rest another."""
    mesh = init_device_mesh("cpu", (world(),))
    assert isinstance(model, nn.Sequential)
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(tensor: Any) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


class Run:
    """A model in training: each rank has its share of a batch, or this process all of it where nothing is placed."""

    def __init__(
        self,
        method: Method,
        place: Place | None = None,
        steps: int = 20,
        widths: Sequence[int] = WIDTHS,
        masked_first: bool = False,
        **options: Any,
    ) -> None:
        self.alone = place is None
        self.widths = widths
        self.model: nn.Module = model_of(widths)
        if place is not None and not masked_first:
            self.model = place(self.model)
        self.sparsifier = spartan.Sparsifier(self.model, method, steps, **options)
        if place is not None and masked_first:
            self.model = place(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.sparsifier.attach(self.optimizer)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, self.widths[0], generator=generator).chunk(parts)[part]
        x = x if self.alone else x.chunk(world())[rank()]
        return x, x[:, : self.widths[-1]].argmax(1)

    def train(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            self.optimizer.zero_grad()
            x, y = self.batch(step)
            functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: full(p) for name, p in self.model.named_parameters()}


def require_same_training(many: Run, one: Run, tolerance: float = 2e-5) -> None:
    """The weights of one process to rounding, exactly its hard masks, and the same bits on all ranks."""
    masks, expected = many.sparsifier.masks(), one.sparsifier.masks()
    for (name, mask), exact in zip(masks.items(), expected.values(), strict=True):
        require_same_bits(full(mask.hard), full(mask.soft))
        assert torch.equal(full(mask.hard), exact.hard), name
        torch.testing.assert_close(full(mask.soft), exact.soft, rtol=1e-3, atol=1e-4)
    for (name, found), exact in zip(many.weights().items(), one.weights().values(), strict=True):
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert many.sparsifier.sparsity == one.sparsifier.sparsity


def require_same_run(method: Method, place: Place, ends: Sequence[int], **options: Any) -> Run:
    many, one = Run(method, place, **options), Run(method, **{**options, "masked_first": False})
    for begin, end in pairwise((0, *ends)):
        many.train(begin, end)
        one.train(begin, end)
        require_same_training(many, one)
    return many


@check(suite="sparsifier")
def fsdp2_trains_as_one_process(backend: str) -> None:
    for method in (
        spartan.Spartan.paper(sparsity=0.7, beta=20.0),
        spartan.Spartan(sparsity=0.6, block_size=(4, 3), beta=4.0, beta_units="threshold", preserve_scale=True),
    ):
        many = require_same_run(method, sharded, (3, 10, 18))  # the ramp, annealing, fixed
        assert all(isinstance(p, DTensor) for p in many.model.parameters())
        assert many.sparsifier.frozen
        many.sparsifier.finalize()
        zeros = sum(int((p == 0).sum()) for p in many.weights().values())
        assert zeros == round(many.sparsifier.sparsity * sum(p.numel() for p in many.model.parameters()))
        assert not any(isinstance(m, MaskedLinear) for m in many.model.modules())
        first: Any = many.model
        assert isinstance(first[0], FSDPModule) and isinstance(first[0], nn.Linear)


@check(4, suite="sparsifier")
def fsdp2_is_one_process_after_200_steps(backend: str) -> None:
    require_same_run(spartan.Spartan.paper(sparsity=0.8, beta=20.0), sharded, (200,), steps=200, widths=(12, 20, 16, 6))


@check(suite="sparsifier")
def every_method_that_takes_shards(backend: str) -> None:
    for method in (
        spartan.TopKAST(sparsity=0.6, backward_sparsity=0.3, interval=2, freeze=0.7),
        spartan.TopKAST(sparsity=0.6, backward_sparsity=0.3, interval=2, block_size=4, penalty="l1"),
        spartan.GMP(sparsity=0.6, interval=2, end=0.5, distribution="uniform"),
        spartan.OneShot(sparsity=0.6, prune_at=0.5, block_size=(2, 4)),
        spartan.StaticRandom(sparsity=0.6),
        spartan.DPF(sparsity=0.6, interval=2),
        spartan.IHT(sparsity=0.6, interval=2),
        spartan.SET(sparsity=0.6, interval=3, block_size=2),
        spartan.RigL(sparsity=0.6, interval=3),
        spartan.RigL(sparsity=0.5, interval=3, block_size=4, distribution="global"),
        spartan.Powerpropagation(spartan.DualAveraging(sparsity=0.6)),
    ):
        require_same_run(method, sharded, (7,), steps=8)


@check(suite="sparsifier")
def patterns_on_shards(backend: str) -> None:
    require_same_run(
        spartan.Spartan(pattern=(1, 2), beta=4.0, beta_units="threshold"), sharded, (7,), steps=8, widths=(12, 26, 6, 6)
    )


@check(suite="sparsifier")
def masked_before_or_after_it_is_sharded(backend: str) -> None:
    method = spartan.Spartan.paper(sparsity=0.7, beta=20.0, block_size=2)
    require_same_run(method, sharded, (6,), steps=10, masked_first=True)
    convolution = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    fully_shard(convolution, mesh=init_device_mesh("cpu", (world(),)))
    with pytest.raises(ValueError, match=r"weight '0.weight' of Conv1d must be masked before it is sharded"):
        spartan.Sparsifier(convolution, method, 10)
    with pytest.raises(ValueError, match=r"Whole does not train weights that are divided over ranks, as '0.weight' is"):
        Run(Whole(sparsity=0.5), sharded)


class Attending(nn.Module):
    """Attention, whose attributes give masked weights, and three experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of x [n, length, 8]."""
        return torch.einsum("nli,eoi->nleo", self.attention(x, x, x)[0], self.experts)


@check(suite="sparsifier")
def attributes_and_stacks_masked_before_they_are_sharded(backend: str) -> None:
    for block in ((1, 1), (2, 2), (4, 4)):  # the last does not divide the rows of an expert
        weights = []
        for shards in (False, True):
            torch.manual_seed(0)
            model = Attending()
            method = spartan.Spartan(sparsity=0.6, block_size=block)
            sparsifier = spartan.Sparsifier(model, method, 6, include="*", count="masked")
            if shards:
                mesh = init_device_mesh("cpu", (world(),))
                fully_shard(model.attention, mesh=mesh)
                fully_shard(model, mesh=mesh)
            # The bias of keys has no gradient but rounding, which a small eps would make steps of.
            optimizer = torch.optim.Adam(model.parameters(), 0.02, eps=1e-4)
            sparsifier.attach(optimizer)
            for step in range(6):
                x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                (model(x) - x[:, :, None, :6]).square().mean().backward()
                optimizer.step()
            sparsifier.finalize()
            weights.append({name: full(parameter) for name, parameter in model.named_parameters()})
        one, many = weights
        assert list(one) == list(many)
        for name, value in one.items():
            torch.testing.assert_close(many[name], value, rtol=2e-5, atol=2e-6, msg=f"{name} in blocks of {block}")


class Whole(spartan.DualAveraging):
    """A method that works on whole weights alone, as one that does not say otherwise."""

    takes_shards = Method.takes_shards


@check(suite="sparsifier")
def micro_batches_without_reduction(backend: str) -> None:
    """Gradients accumulate over two micro-batches, of which the last reduces them."""
    method = spartan.Spartan.paper(sparsity=0.7, beta=20.0)
    runs = Run(method, sharded, steps=8), Run(method, steps=8)
    for step in range(6):
        for run in runs:
            run.optimizer.zero_grad()
            for part in range(2):
                if isinstance(run.model, FSDPModule):
                    run.model.set_requires_gradient_sync(part == 1)
                x, y = run.batch(step, part, 2)
                (functional.cross_entropy(run.model(x), y) / 2).backward()
            run.optimizer.step()
    require_same_training(*runs)


@check(suite="sparsifier")
def computing_in_half_precision(backend: str) -> None:
    """FSDP2 gathers bfloat16, masks and weights are float32, and evaluating in between changes nothing."""

    def half(model: nn.Module) -> nn.Module:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return fully_shard(model, mesh=init_device_mesh("cpu", (world(),)), mp_policy=policy)

    for block_size in (1, 4):
        run = Run(spartan.Spartan.paper(sparsity=0.6, beta=20.0, block_size=block_size), half, steps=6)
        for step in range(5):
            run.train(step, step + 1)
            with torch.no_grad():  # leaves the root's parameters gathered
                assert run.model(run.batch(step)[0]).dtype is torch.bfloat16
        for mask in run.sparsifier.masks().values():
            assert mask.soft.dtype is torch.float32
            require_same_bits(mask.soft, mask.hard)
        run.sparsifier.finalize()


@check(suite="sparsifier")
def a_weight_that_is_not_finite_is_named_on_all_ranks(backend: str) -> None:
    for options in ({}, {"block_size": 4}, {"pattern": (1, 2)}):
        method = spartan.Spartan.paper(**{"sparsity": 0.5, "beta": 20.0, **options})
        run = Run(method, sharded, steps=8, widths=(12, 26, 8, 6))
        run.train(0, 3)
        before = {name: (m.soft.clone(), m.hard.clone()) for name, m in run.sparsifier.masks().items()}
        if rank() == world() - 1:
            weight: Any = run.model.get_parameter("0.weight")
            weight.detach().to_local()[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"weight '0.weight' must be finite; \d+ of its entries are NaN"):
            run.optimizer.step()
        for name, mask in run.sparsifier.masks().items():
            assert torch.equal(mask.soft, before[name][0]) and torch.equal(mask.hard, before[name][1])
        dist.barrier()


def per_block(name: str, module: nn.Module, grid: tuple[int, ...]) -> float | Tensor:
    """A different cost for each block of the first weight, one for all of the others."""
    return torch.rand(grid, generator=torch.Generator().manual_seed(1)) + 0.5 if name.startswith("0.") else 3.0


@check(suite="sparsifier")
def budgets_of_cost_are_those_of_one_process(backend: str) -> None:
    flops = spartan.FLOPs(torch.randn(3, 12, generator=torch.Generator().manual_seed(0)))
    for block, costs in ((1, per_block), ((4, 3), per_block), (1, flops), ((4, 3), flops)):
        method = spartan.Spartan(
            sparsity=0.6, block_size=block, beta=6.0, beta_units="mean", backward_tolerance=0.05, anneal_shape="cosine"
        )
        many = require_same_run(method, sharded, (3, 10, 18), costs=costs, widths=(12, 26, 22, 6))
        one = Run(method, costs=costs, widths=(12, 26, 22, 6))
        one.train(0, 18)
        assert many.sparsifier.costs() == one.sparsifier.costs()
