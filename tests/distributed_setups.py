"""Checks over processes: data and tensor parallelism, and checkpoints that go from some ranks to others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_common import check, rank, require_same_bits, world
from distributed_sparsifier import Run, full, require_same_training, sharded
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import spartan
from spartan.methods.base import Method

METHODS: tuple[Method, ...] = (
    spartan.Spartan.paper(sparsity=0.6, beta=20.0, preserve_scale=True),
    spartan.TopKAST(sparsity=0.6, backward_sparsity=0.3, interval=2, block_size=4, freeze=0.7),
    spartan.GSE(sparsity=0.6, interval=2, block_size=2),
    spartan.WGSEF(sparsity=0.6, strength=3.0),
)


@check(suite="setups")
def distributed_data_parallel(backend: str) -> None:
    """Gradients are reduced in buckets while backward goes on; micro-batches but the last are not reduced."""
    for method in METHODS:
        for masked_first in (False, True):
            many = Run(method, DistributedDataParallel, steps=10, masked_first=masked_first)
            one = Run(method, steps=10)
            for step in range(9):
                for run in (many, one):
                    run.optimizer.zero_grad()
                    for part in range(2):
                        waits = part == 0 and isinstance(run.model, DistributedDataParallel)
                        with run.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                            x, y = run.batch(step, part, 2)
                            (functional.cross_entropy(run.model(x), y) / 2).backward()
                    run.optimizer.step()
            require_same_training(many, one)
            reducer: Any = many.model
            assert not reducer.modules_buffers, "masks are broadcast"


PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()}


def split(model: nn.Module) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (world(),)), dict(PLAN))


class SplitRun(Run):
    """Every rank sees the whole batch, or where data is parallel too its share by the mesh's first dimension."""

    mesh: DeviceMesh | None = None

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Any:
        alone, self.alone = self.alone, True
        x, y = super().batch(step, part, parts)
        self.alone = alone
        if self.mesh is not None:
            x, y = (t.chunk(self.mesh.size(0))[self.mesh.get_local_rank(0)] for t in (x, y))
        return x, y


@check(suite="setups")
def tensor_parallelism(backend: str) -> None:
    widths = (12, 32, 24, 16, 6)
    for method in (
        spartan.Spartan.paper(sparsity=0.6, beta=20.0, preserve_scale=True),
        spartan.Spartan.paper(sparsity=0.6, beta=20.0, block_size=(4, 2)),
        spartan.RigL(sparsity=0.6, interval=3),
        spartan.GSE(sparsity=0.6, interval=3, candidates=2.0),
        spartan.WGSEF(sparsity=0.6, strength=3.0, block_size=(4, 2)),
        *METHODS[1:],
    ):
        many = SplitRun(method, split, steps=10, widths=widths)
        one = Run(method, steps=10, widths=widths)
        for run in (many, one):
            run.train(0, 9)
        require_same_training_split(many, one)
        many.sparsifier.finalize()
        one.sparsifier.finalize()
        assert many.sparsifier.sparsity == one.sparsifier.sparsity
    with pytest.raises(ValueError, match=r"weight '0.weight'.* blocks of \(5, 5\).*tensor parallelism"):
        SplitRun(spartan.Spartan(sparsity=0.5, block_size=5), split, widths=widths)


def require_same_training_split(many: Run, one: Run) -> None:
    for (name, found), exact in zip(many.weights().items(), one.weights().values(), strict=True):
        torch.testing.assert_close(found, exact, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    theirs, ours = (run.sparsifier.state_dict()["masks"] for run in (many, one))
    for name, mask in theirs.items():
        assert isinstance(mask["hard"], DTensor)
        assert torch.equal(full(mask["hard"]), ours[name]["hard"]), name
        require_same_bits(full(mask["hard"]))
    assert many.sparsifier.sparsity == one.sparsifier.sparsity


@check(4, suite="setups")
def fully_sharded_tensor_parallelism(backend: str) -> None:
    """FSDP2 over what tensor parallelism divides: two ranks have each slice, two slices make a weight."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))

    def both(model: nn.Module) -> nn.Module:
        return fully_shard(parallelize_module(model, mesh["model"], dict(PLAN)), mesh=mesh["data"])

    widths = (12, 32, 24, 16, 6)
    for method in (METHODS[0], spartan.Spartan.paper(sparsity=0.6, beta=20.0, block_size=(4, 2)), *METHODS[2:]):
        many, one = SplitRun(method, both, steps=10, widths=widths), Run(method, steps=10, widths=widths)
        many.mesh = mesh
        for run in (many, one):
            run.train(0, 9)
        require_same_training_split(many, one)


@check(4, suite="setups")
def hybrid_shards(backend: str) -> None:
    """Two replicas of two shards each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for method in METHODS:
        many, one = Run(method, lambda model: fully_shard(model, mesh=mesh), steps=10), Run(method, steps=10)
        for run in (many, one):
            run.train(0, 9)
        require_same_training(many, one)


def save(run: Run, folder: str, group: Any = None) -> None:
    """What a training script saves."""
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state = {"model": model, "optimizer": optimizer, "sparsifier": run.sparsifier}
    dcp.save(state, checkpoint_id=folder, process_group=group, no_dist=run.alone)


def load(run: Run, folder: str, group: Any = None) -> None:
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state = {"model": model, "optimizer": optimizer, "sparsifier": run.sparsifier}
    dcp.load(state, checkpoint_id=folder, process_group=group, no_dist=run.alone)
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)


@check(suite="setups")
def resumed_bit_for_bit_on_the_same_ranks(backend: str) -> None:
    for method in METHODS:
        whole = Run(method, sharded, steps=10)
        whole.train(0, 10)
        for stop in (3, 9):  # masks move; fixed
            with shared_folder() as folder:
                first, second = (Run(method, sharded, steps=10) for _ in range(2))
                first.train(0, stop)
                save(first, folder)
                load(second, folder)
                require_same_state(second, first)
                second.train(stop, 10)
                require_same_state(second, whole)


@check(4, suite="setups")
def resumed_on_other_numbers_of_ranks(backend: str) -> None:
    """From two ranks to four to one: the state goes over bit for bit, and what follows is the same to rounding."""
    pair = dist.new_group([0, 1])
    for method in METHODS:
        whole = Run(method, steps=10)
        whole.train(0, 9)
        with shared_folder() as first, shared_folder() as second:
            four, one = Run(method, sharded, steps=10), Run(method, steps=10)
            if rank() < 2:
                two = PairRun(method, on_pair, steps=10)
                two.train(0, 3)
                save(two, first, pair)
            dist.barrier()
            load(four, first, dist.group.WORLD)
            if rank() < 2:
                require_same_masks(four, two)
            four.train(3, 6)
            save(four, second, dist.group.WORLD)
            load(one, second)
            require_same_state(one, four)
            one.train(6, 9)
            for name, mask in one.sparsifier.masks().items():
                assert torch.equal(mask.hard, whole.sparsifier.masks()[name].hard), name
            for name, weight in one.weights().items():
                torch.testing.assert_close(weight, whole.weights()[name], rtol=2e-5, atol=2e-5)


class PairRun(Run):
    """The first two ranks share each batch."""

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Any:
        alone, self.alone = self.alone, True
        x, y = super().batch(step, part, parts)
        self.alone = alone
        return x.chunk(2)[rank()], y.chunk(2)[rank()]


def on_pair(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=DeviceMesh("cpu", [0, 1]))


def require_same_masks(run: Run, other: Run) -> None:
    for name, mask in run.sparsifier.masks().items():
        exact = other.sparsifier.masks()[name]
        assert torch.equal(mask.hard, exact.hard) and torch.equal(mask.soft, exact.soft), name


def require_same_state(run: Run, other: Run) -> None:
    require_same_masks(run, other)
    for name, weight in run.weights().items():
        assert torch.equal(weight, other.weights()[name]), name
    ours, theirs = run.sparsifier.state_dict(), other.sparsifier.state_dict()
    for key in set(ours) - {"masks", "solver"}:
        assert ours[key] == theirs[key], key
    for a, b in zip(ours["solver"], theirs["solver"], strict=True):
        assert torch.equal(a, b)


@contextmanager
def shared_folder() -> Iterator[str]:
    """A folder that all ranks know, until all have left it."""
    with TemporaryDirectory() if rank() == 0 else nullcontext() as own:
        names = [own]
        dist.broadcast_object_list(names, src=0)
        assert names[0] is not None
        yield names[0]
        dist.barrier()
