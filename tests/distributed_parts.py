"""Checks over processes: each rank passes its own part of every tensor, and a process group."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from distributed_common import (
    COSTS,
    CUTS,
    check,
    cuts,
    gathered,
    layer_costs,
    layers,
    raises,
    rank,
    rank_major,
    require_same_bits,
    require_soft,
    shard,
    shard_costs,
    world,
    written_out,
)
from torch import Tensor

import spartan
from spartan_kernels import ops
from spartan_kernels.dispatch import refusal
from spartan_kernels.testing import budget_error, make_values, oracle_hard_topk, oracle_soft_topk


@check()
def soft_masks_match_the_oracle_of_the_whole(backend: str) -> None:
    cases = zip(
        cycle(CUTS),
        cycle(COSTS),
        cycle((1e-2, 0.6, 0.999, 0.2)),
        (0.0, 1e-3, 0.3, 1.0, 5.0, 30.0, 300.0, 1e4),
        strict=False,
    )
    for kind, cost_kind, density, beta in cases:
        values = layers("student_t")
        costs = layer_costs(cost_kind, values)
        row, a = rank_major(values, kind), rank_major(written_out(costs, values), kind)
        budget = float(a.sum()) * density
        parts = [shard(v, kind) for v in values]
        masks = ops.soft_topk_global(parts, budget, shard_costs(costs, kind), beta, dist.group.WORLD, backend=backend)
        assert [m.shape for m in masks] == [p.shape for p in parts]
        require_soft(gathered(masks), row, budget, a, beta)


@check()
def thresholds_have_the_same_bits(backend: str) -> None:
    name = dist.group.WORLD.group_name
    for kind, beta in product(("even", "uneven"), (0.3, 20.0, 1e4)):
        parts = [shard(v, kind) for v in layers("lognormal")]
        k, b = torch.tensor(300.0, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64)
        _, threshold = torch.ops.spartan.soft_topk_global_forward(parts, k, [], b, name, backend)
        require_same_bits(threshold)


@check()
def nothing_everything_and_no_entries_at_all(backend: str) -> None:
    group = dist.group.WORLD
    parts = [shard(v, "uneven") for v in layers()]
    n = sum(v.numel() for v in layers())
    for budget, expected in ((0.0, 0.0), (float(n), 1.0)):
        for mask in ops.soft_topk_global(parts, budget, beta=3.0, group=group, backend=backend):
            assert torch.equal(mask, torch.full_like(mask, expected))
        for hard in ops.hard_topk_global(parts, budget, group=group, backend=backend):
            assert torch.equal(hard, torch.full_like(hard, expected, dtype=torch.bool))
    empty = torch.empty(0, 3)
    assert ops.soft_topk_global([empty], 0.0, beta=2.0, group=group, backend=backend)[0].shape == (0, 3)
    assert ops.hard_topk_global([empty], 0.0, group=group, backend=backend)[0].shape == (0, 3)


@check()
def narrow_dtypes(backend: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        if refusal("soft_topk_global_forward", backend, "cpu", dtype, grouped=True):
            continue
        values = [v.to(dtype) for v in layers("uniform")]
        row = rank_major(values, "uneven")
        masks = ops.soft_topk_global(
            [shard(v, "uneven") for v in values], 200.0, beta=0.5, group=dist.group.WORLD, backend=backend
        )
        assert masks[0].dtype == dtype
        exact = oracle_soft_topk(row, 200.0, None, 0.5)
        step = 1e-6 if dtype == torch.float64 else torch.finfo(dtype).eps
        torch.testing.assert_close(gathered(masks).double(), exact, rtol=step, atol=1e-7)  # float16 ends at 6e-8
        hard = ops.hard_topk_global(
            [shard(v, "uneven") for v in values], 200.0, group=dist.group.WORLD, backend=backend
        )
        assert torch.equal(gathered(hard), oracle_hard_topk(row, 200.0))


@check()
def gradients_match_the_oracle_of_the_whole(backend: str) -> None:
    wide = refusal("soft_topk_global_backward", backend, "cpu", torch.float64, grouped=True) is None
    for kind, cost_kind in product(("even", "uneven"), ("none", "mixed")):
        values = layers(dtype=torch.float64)
        costs = layer_costs(cost_kind, values)
        row = rank_major(values, kind).requires_grad_()
        a = rank_major(written_out(costs, values), kind).requires_grad_()
        k, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (150.0, 0.8))
        upstream = make_values("normal", row.shape, seed=9, dtype=torch.float64)
        exact = torch.autograd.grad(oracle_soft_topk(row, k, a, b), (row, a, k, b), upstream)

        dtype = torch.float64 if wide else torch.float32
        parts = [shard(v, kind).to(dtype, copy=True).requires_grad_() for v in values]
        own = written_out(shard_costs(costs, kind), parts)
        own = [x.to(dtype, copy=True).requires_grad_() for x in own]
        masks = spartan.soft_topk_global(parts, k, own, b, dist.group.WORLD, backend=backend)
        sizes = [sum(p.numel() for p in row_parts) for row_parts in _all_parts(values, kind)]
        mine = upstream.split(sizes)[rank()].split([p.numel() for p in parts])
        loss = sum((m * g).sum() for m, g in zip(masks, mine, strict=True))
        grads = torch.autograd.grad(loss, (*parts, *own, k, b))
        n = len(parts)
        found = (gathered(grads[:n]), gathered(grads[n : 2 * n]), *grads[2 * n :])
        for one, other in zip(found, exact, strict=True):
            rtol, atol = (1e-6, 1e-9) if wide else (1e-4, 1e-5)
            torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol)
        require_same_bits(*grads[2 * n :])


def _all_parts(values: list[Tensor], kind: str) -> list[list[Tensor]]:
    pieces = [v.reshape(-1).split(cuts(v.numel(), kind)) for v in values]
    return [[piece[r] for piece in pieces] for r in range(world())]


@check()
def hard_masks_are_those_of_the_whole(backend: str) -> None:
    distributions = ("all_equal", "normal", "quantised", "lognormal", "two_valued")
    cases = zip(
        cycle(CUTS), cycle(COSTS), distributions * 3, cycle((0.003, 0.5, 0.97, 1.0, 0.2, 0.8, 0.05)), strict=False
    )
    for number, (kind, cost_kind, distribution, density) in enumerate(cases):
        values = layers(distribution)
        costs = layer_costs(cost_kind, values)
        row, a = rank_major(values, kind), rank_major(written_out(costs, values), kind)
        absolute = bool(number & 1)
        masks = ops.hard_topk_global(
            [shard(v, kind) for v in values],
            float(a.sum()) * density,
            shard_costs(costs, kind),
            absolute=absolute,
            group=dist.group.WORLD,
            backend=backend,
        )
        expected = oracle_hard_topk(row.abs() if absolute else row, float(a.sum()) * density, a)
        assert torch.equal(gathered(masks), expected)


@check()
def scores_masked_on_some_ranks_are_left_out_on_all(backend: str) -> None:
    group = dist.group.WORLD
    for cost_kind, length in product(("none", "mixed"), (0, 70_000)):
        values = [*layers(), make_values("normal", (length,), seed=5)]
        costs = layer_costs(cost_kind, values)
        values = [
            v.masked_fill(make_values("uniform", v.shape, seed=i) < 0.4, -torch.inf) for i, v in enumerate(values)
        ]
        row, a = rank_major(values, "uneven"), rank_major(written_out(costs, values), "uneven")
        kept = row > -torch.inf
        assert 0 < int(kept.sum()) < kept.numel()
        k = 0.3 * float(a[kept].sum())
        parts, own = [shard(v, "uneven").clone().requires_grad_() for v in values], shard_costs(costs, "uneven")
        masks = spartan.soft_topk_global(parts, k, own, 2.0, group, backend=backend)
        grads = torch.autograd.grad(sum(m.square().sum() for m in masks), parts)
        require_soft(gathered(masks)[kept], row[kept], k, a[kept], 2.0)
        assert bool((gathered(masks)[~kept] == 0).all())
        leaf = row[kept].double().requires_grad_()
        oracle_soft_topk(leaf, k, a[kept], 2.0).square().sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(gathered(grads)[kept].double(), leaf.grad, rtol=1e-4, atol=1e-6)
        assert bool((gathered(grads)[~kept] == 0).all())
        hard = gathered(ops.hard_topk_global([p.detach() for p in parts], k, own, group=group, backend=backend))
        assert torch.equal(hard[kept], oracle_hard_topk(row[kept], k, a[kept])) and not bool(hard[~kept].any())
        with raises(r"budget must be in \[0, .*that are not -inf"):
            ops.soft_topk_global(parts, 1.01 * float(a[kept].sum()), own, 2.0, group, backend=backend)


@check()
def masks_of_a_training_run(backend: str) -> None:
    """Values drift, the budget shrinks, beta rises: each warm solve is right, and the state the same everywhere."""
    group = dist.group.WORLD
    for kind, absolute in (("even", False), ("uneven", True)):
        values = layers()
        n = sum(v.numel() for v in values)
        state = ops.new_solver_state()
        parts = [shard(v, kind) for v in values]
        soft = [torch.full_like(p, torch.nan) for p in parts]
        hard = [torch.ones_like(p, dtype=torch.bool) for p in parts]
        for step in range(5):
            values = [v + 0.01 * make_values("normal", v.shape, seed=100 + step) for v in values]
            budget, beta = n * (0.9 - 0.2 * step), 1.0 + 3 * step
            parts = [shard(v, kind) for v in values]
            ops.solve_masks_(
                parts, budget, None, beta, soft, hard, state, absolute=absolute, group=group, backend=backend
            )
            row = rank_major(values, kind)
            row = row.abs() if absolute else row
            require_soft(gathered(soft), row, budget, torch.ones_like(row), beta)
            kept = gathered(hard)
            assert torch.equal(kept, oracle_hard_topk(row, budget))
            torch.testing.assert_close(state[2], row[~kept].max().double(), rtol=1e-6, atol=0)
            assert float(state[4]) == step + 1
            require_same_bits(state)


@check()
def a_bad_value_on_one_rank_is_refused_on_all(backend: str) -> None:
    group = dist.group.WORLD
    good = [shard(v, "even").clone() for v in layers()]
    ones = [torch.ones_like(v) for v in good]

    def refused(text: str, values: list[Tensor], costs: Any = None, budget: float = 50.0, beta: float = 2.0) -> None:
        soft, hard = [torch.empty_like(v) for v in good], [torch.empty_like(v, dtype=torch.bool) for v in good]
        calls = [
            lambda: ops.soft_topk_global(values, budget, costs, beta, group, backend=backend),
            lambda: ops.solve_masks_(
                values, budget, costs, beta, soft, hard, ops.new_solver_state(), group=group, backend=backend
            ),
        ]
        if beta == 2.0:
            calls.append(lambda: ops.hard_topk_global(values, budget, costs, group=group, backend=backend))
        for call in calls:
            with raises(text) as caught:
                call()
            every: list[Any] = [None] * world()
            dist.all_gather_object(every, str(caught.value))
            assert len(set(every)) == 1, every

    for bad in (torch.nan, torch.inf):
        poisoned = [v.clone() for v in good]
        if rank() == world() - 1:
            poisoned[2].view(-1)[3] = bad
        refused(r"values.* must be finite", poisoned)
    costly = [a.clone() for a in ones]
    if rank() == 0:
        costly[0][0] = -1.0
    refused("costs must be finite and positive", good, costly)
    refused("budget must be the same on every rank", good, budget=50.0 + rank())
    refused("beta must be the same on every rank", good, beta=3.0 + rank())
    refused("beta must be finite", good, beta=-1.0 if rank() == 1 else 1.0)
    refused(r"budget must be in \[0, ", good, budget=1e9)
    assert (
        budget_error(gathered(ops.soft_topk_global(good, 50.0, beta=2.0, group=group, backend=backend)), 50.0) <= 1e-6
    )


@check()
def what_ranks_exchange_does_not_grow_with_the_values(backend: str) -> None:
    """A few exchanges of a sample or a histogram at most, however many values there are."""
    group = dist.group.WORLD
    name = next(name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name))
    for length in (1_000, 100_000 if backend == "triton" else 1_000_000):  # its interpreter takes seconds
        v = make_values("normal", (length,), seed=rank())
        state, soft, hard = ops.new_solver_state(), [torch.empty_like(v)], [torch.empty_like(v, dtype=torch.bool)]
        with patch.object(dist, name, wraps=getattr(dist, name)) as exchange:
            ops.soft_topk_global([v], 0.1 * length * world(), beta=5.0, group=group, backend=backend)
            ops.hard_topk_global([v], 0.1 * length * world(), group=group, backend=backend)
            ops.solve_masks_([v], 0.1 * length * world(), None, 5.0, soft, hard, state, group=group, backend=backend)
        sent = [call.args[1].nbytes for call in exchange.call_args_list]
        assert 3 <= len(sent) <= 60, sent
        assert max(sent) <= 512 * 1024, sent


@check()
def compiled_over_a_group(backend: str) -> None:
    group = dist.group.WORLD.group_name

    def step(v: Tensor, w: Tensor) -> Tensor:
        first, second = spartan.soft_topk_global([v, w], 20.0, None, 2.0, group, backend=backend)
        return (first * v).sum() + second.square().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [make_values("normal", (30 + 5 * rank(),), seed=s).requires_grad_() for s in (rank(), 9)]
        results.append((function(*leaves), *torch.autograd.grad(function(*leaves), leaves)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@check()
def a_group_of_some_ranks_and_its_name(backend: str) -> None:
    """The last two ranks share a budget; the others are no part of it."""
    members = [world() - 2, world() - 1]
    group = dist.new_group(members)
    values = [make_values("normal", (50,), seed=rank())]
    if rank() in members:
        row = torch.cat([make_values("normal", (50,), seed=r) for r in members])
        exact = oracle_soft_topk(row, 20.0, None, 3.0).split(50)[members.index(rank())]
        for given in (group, group.group_name):
            (mask,) = ops.soft_topk_global(values, 20.0, beta=3.0, group=given, backend=backend)
            torch.testing.assert_close(mask.double(), exact, rtol=1e-5, atol=1e-7)
    dist.barrier()
