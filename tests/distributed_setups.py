"""Checks over processes: data and tensor parallelism, and checkpoints that go from some ranks to others."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from distributed_common import check, require_same_bits, world
from distributed_sparsifier import Run, full, model_of, require_same_training
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import spartan
from spartan.methods.base import Method

METHODS: tuple[Method, ...] = (
    spartan.Spartan(sparsity=0.6, beta=20.0, preserve_scale=True),
    spartan.TopKAST(sparsity=0.6, backward_sparsity=0.3, interval=2, block_size=4, freeze=0.7),
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
            assert not [b for b in reducer.modules_buffers if b.dtype is torch.bool or b.dim()], "masks are broadcast"


class Columns(nn.Module):
    """Two layers as tensor parallelism divides them: by outputs, then by inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = model_of((12, 32, 24, 16, 6))

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers(x)


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
        spartan.Spartan(sparsity=0.6, beta=20.0, preserve_scale=True),
        spartan.Spartan(sparsity=0.6, beta=20.0, block_size=(4, 2)),
        spartan.RigL(sparsity=0.6, interval=3),
        METHODS[1],
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
    with pytest.raises(ValueError, match="call parallelize_module before Sparsifier"):
        SplitRun(METHODS[0], split, widths=widths, masked_first=True).train(0, 1)


def require_same_training_split(many: Run, one: Run) -> None:
    for (name, found), exact in zip(many.weights().items(), one.weights().values(), strict=True):
        torch.testing.assert_close(found, exact, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    theirs, ours = (run.sparsifier.state_dict()["masks"] for run in (many, one))
    for name, mask in theirs.items():
        assert isinstance(mask["hard"], DTensor)
        assert torch.equal(full(mask["hard"]), ours[name]["hard"]), name
        require_same_bits(full(mask["hard"]))
    assert many.sparsifier.sparsity == one.sparsifier.sparsity
