"""Checks over processes: what training methods do of their own, under DistributedDataParallel and FSDP2."""

from __future__ import annotations

import torch
from distributed_common import check, rank, require_same_bits, world
from distributed_sparsifier import Run, require_same_training, sharded
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spartan.methods import GSE, SRSTE, MaskDecay
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
