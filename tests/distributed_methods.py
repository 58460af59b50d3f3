"""Checks over processes: what training methods do of their own, under DistributedDataParallel and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_common import check, rank, require_same_bits, world
from distributed_sparsifier import Run, require_same_run, require_same_training, sharded
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spartan.methods import GSE, SRSTE, WGSEF, MaskDecay
from spartan.sparsifier import Sparsifier

_BATCH = 8


@check(2, suite="sparsifier")
def gse_over_ranks_is_that_of_one_process(backend: str) -> None:
    """Each rank sees its part of a batch; masks are those of training on the whole, the same on every rank."""
    for method in (
        GSE(sparsity=0.8, interval=3, distribution="global"),
        GSE(sparsity=0.5, interval=2, block_size=4),
    ):
        masks, weights = [], []
        for parallel in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 3)).double()
            sparsifier = Sparsifier(model, method, 20, count="masked")
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            sparsifier.attach(optimizer)
            network = DistributedDataParallel(model) if parallel else model
            for index in range(7):
                generator = torch.Generator().manual_seed(index)
                x = torch.randn(_BATCH, 20, generator=generator, dtype=torch.float64)
                x = x.chunk(world())[rank()] if parallel else x
                optimizer.zero_grad()
                (network(x) - x[:, :3]).square().mean().backward()
                optimizer.step()
            masks.append([mask.hard for mask in sparsifier.masks().values()])
            weights.append([parameter.detach() for parameter in model.parameters()])
            require_same_bits(*masks[-1], *weights[-1])
        assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True)), method
        for alone, together in zip(*weights, strict=True):
            torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-9)


@check(2, suite="sparsifier")
def methods_for_patterns_train_shards_as_one_process(backend: str) -> None:
    widths = (12, 28, 20, 6)
    for method in (SRSTE(strength=0.1), MaskDecay(end=0.5), MaskDecay(pattern=None, sparsity=0.6, block_size=(4, 3))):
        many, one = Run(method, sharded, widths=widths), Run(method, widths=widths)
        for begin, end in ((0, 4), (4, 12)):
            many.train(begin, end)
            one.train(begin, end)
            require_same_training(many, one)


@check(suite="methods")
def gse_and_wgsef_train_shards_as_one_process(backend: str) -> None:
    for method in (
        GSE(sparsity=0.6, interval=3, candidates=0.1, fraction=0.8, distribution="global"),  # candidates are too few
        GSE(sparsity=0.5, interval=2, block_size=(4, 3), distribution="global"),
        WGSEF(sparsity=0.6, strength=2.0),
        WGSEF(sparsity=0.6, strength=5.0, block_size=(4, 3), ramp=0.3, interval=2),
    ):
        many = require_same_run(method, sharded, (4, 8, 12), steps=12)  # masks move twice; they are fixed
        assert many.sparsifier.frozen


@check(2, suite="methods")
def wgsef_names_a_weight_that_is_not_finite_on_all_ranks(backend: str) -> None:
    for block_size in (1, 4):
        run = Run(WGSEF(sparsity=0.5, block_size=block_size), sharded, steps=8)
        run.train(0, 3)
        before = {name: mask.hard.clone() for name, mask in run.sparsifier.masks().items()}
        if rank() == world() - 1:
            weight: Any = run.model.get_parameter("2.weight")
            weight.detach().to_local()[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"weight '2.weight' must be finite; the norm of a block is nan"):
            run.optimizer.step()
        assert all(torch.equal(mask.hard, before[name]) for name, mask in run.sparsifier.masks().items())
        dist.barrier()
