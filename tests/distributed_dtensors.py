"""Checks over processes: lists of DTensors, as FSDP2 and tensor parallelism make them, solved on their local shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from distributed_common import check, layers, raises, rank, require_same_bits, require_soft, world
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import spartan
from spartan_kernels import ops
from spartan_kernels.testing import make_costs, make_values, oracle_hard_topk, oracle_soft_topk


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def full(tensors: Sequence[Any]) -> Tensor:
    """The whole tensors, one after the other."""
    return joined([t.detach().full_tensor() for t in tensors])


def require_placed_as(results: Sequence[Any], values: Sequence[Any]) -> None:
    for result, value in zip(results, values, strict=True):
        assert isinstance(result, DTensor)
        found, expected = ((t.placements, t.shape, t.device_mesh) for t in (result, value))
        assert found == expected, f"{found}, not {expected}"
        assert result.to_local().shape == value.to_local().shape


def require_all(values: list[Any], backend: str, density: float = 0.3, beta: float = 3.0) -> None:
    """Soft and hard masks, warm and cold, gradients: those of the whole tensors, under the placements of the values."""
    row = full(values)
    budget = float(row.numel() * density)
    soft = spartan.soft_topk_global(values, budget, beta=beta, backend=backend)
    require_placed_as(soft, values)
    require_soft(full(soft), row, budget, torch.ones_like(row), beta)
    require_same_bits(full(soft))

    hard = ops.hard_topk_global(values, budget, absolute=True, backend=backend)
    require_placed_as(hard, values)
    assert torch.equal(full(hard), oracle_hard_topk(row.abs(), budget))

    with torch.no_grad():
        into_soft = [torch.full_like(v, torch.nan) for v in values]
        into_hard = [torch.zeros_like(v, dtype=torch.bool) for v in values]
        state = ops.new_solver_state()
        for _ in range(2):
            ops.solve_masks_(values, budget, None, beta, into_soft, into_hard, state, absolute=True, backend=backend)
            require_soft(full(into_soft), row.abs(), budget, torch.ones_like(row), beta)
            assert torch.equal(full(into_hard), full(hard))
    require_same_bits(state)
    require_gradients(values, budget, beta, backend)


def require_gradients(values: list[Any], budget: float, beta: float, backend: str) -> None:
    leaves = [v.detach().clone().requires_grad_() for v in values]
    k = torch.tensor(budget, dtype=torch.float64, requires_grad=True)
    masks = spartan.soft_topk_global(leaves, k, beta=beta, backend=backend)
    whole = [make_values("normal", v.shape, seed=50 + i) for i, v in enumerate(values)]
    upstream = [
        distribute_tensor(g, v.device_mesh, [Replicate()] * v.device_mesh.ndim if i % 2 else v.placements)
        for i, (g, v) in enumerate(zip(whole, values, strict=True))
    ]
    *grads, grad_k = torch.autograd.grad(masks, (*leaves, k), upstream)
    require_placed_as(grads, values)

    hard = spartan.soft_topk_global(leaves, k, beta=beta, straight_through=True, backend=backend)
    require_placed_as(hard, values)
    assert torch.equal(full(hard), oracle_hard_topk(full(values), budget).to(hard[0].dtype))
    through = torch.autograd.grad(hard, (*leaves, k), upstream)
    assert torch.equal(full(through[:-1]), full(grads)) and torch.equal(through[-1], grad_k)

    row = full(values).double().requires_grad_()
    whole_k = torch.tensor(budget, dtype=torch.float64, requires_grad=True)
    exact, exact_k = torch.autograd.grad(
        oracle_soft_topk(row, whole_k, None, beta), (row, whole_k), joined(whole).double()
    )
    torch.testing.assert_close(full(grads).double(), exact, rtol=1e-4, atol=1e-5 * beta)
    torch.testing.assert_close(grad_k, exact_k, rtol=1e-4, atol=1e-6)


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (world(),))


@check()
def shards_of_one_mesh(backend: str) -> None:
    mesh = line()
    values = layers("lognormal")  # 7 and 1001 rows are uneven over any world; three rows leave a rank of four without
    values.append(make_values("normal", (3, 5), seed=8))
    require_all([distribute_tensor(v, mesh, [Shard(0)]) for v in values], backend)
    placed = [distribute_tensor(v, mesh, [Shard(v.dim() - 1)]) for v in values]
    require_all(placed, backend, density=0.8, beta=0.5)


@check()
def replicated_tensors_count_once(backend: str) -> None:
    mesh = line()
    values = layers()
    require_all([distribute_tensor(v, mesh, [Replicate()]) for v in values], backend)
    mixed = [distribute_tensor(v, mesh, [(Shard(0), Replicate())[i % 2]]) for i, v in enumerate(values)]
    require_all(mixed, backend)


@check()
def ties_go_by_index_where_one_tensor_is_sharded_by_rows(backend: str) -> None:
    values = make_values("quantised", (50, 3), seed=2)
    placed = distribute_tensor(values, line(), [Shard(0)])
    for budget in (1.0, 37.0, 100.0):
        (hard,) = ops.hard_topk_global([placed], budget, backend=backend)
        assert torch.equal(full([hard]), oracle_hard_topk(values.flatten(), budget))
    both = [placed, distribute_tensor(torch.full((9,), 0.25), line(), [Shard(0)])]
    assert float(full(ops.hard_topk_global(both, 40.0, backend=backend)).sum()) == 40


@check()
def costs_are_numbers_or_placed_like_their_values(backend: str) -> None:
    mesh = line()
    values = layers()
    whole: list[Any] = [2.0, make_costs("power_of_two", values[1].shape), torch.tensor(0.5), 1.0]
    whole[3] = make_costs("power_of_two", values[3].shape, seed=4)
    costs = [distribute_tensor(a, mesh, [Replicate()]) if isinstance(a, Tensor) and a.dim() else a for a in whole]
    a = joined([torch.as_tensor(c).expand(v.shape) for c, v in zip(whole, values, strict=True)])
    placed = [distribute_tensor(v, mesh, [Shard(0)]) for v in values]
    budget = float(a.sum()) * 0.2
    require_soft(
        full(ops.soft_topk_global(placed, budget, costs, 2.0, backend=backend)), joined(values), budget, a, 2.0
    )
    hard = ops.hard_topk_global(placed, float(a.sum()), costs, backend=backend)
    assert bool(full(hard).all())
    with raises(r"costs\[1\] must be a number, a plain 0-dim tensor or a DTensor of shape \(7,\).*got Tensor"):
        ops.soft_topk_global(placed, budget, whole, 2.0, backend=backend)


@check()
def what_cannot_be_solved_is_refused(backend: str) -> None:
    mesh = line()
    values = [distribute_tensor(v, mesh, [Shard(0)]) for v in layers()]
    with raises(r"values must be all DTensors or all plain tensors; values\[1\] is Tensor of shape \(4,\)"):
        ops.soft_topk_global([values[0], torch.ones(4)], 3.0, backend=backend)
    pending = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with raises(r"values\[1\] must be redistributed: pending a reduction"):
        ops.hard_topk_global([values[0], pending], 3.0, backend=backend)
    with raises("group must be None where values are DTensors"):
        ops.soft_topk_global(values, 3.0, group=dist.group.WORLD, backend=backend)
    scalar = distribute_tensor(torch.tensor(1.0), mesh, [Replicate()])
    with raises(r"values\[1\] is 0-dim and replicated"):
        ops.soft_topk_global([values[0], scalar], 3.0, backend=backend)
    soft = [torch.zeros_like(v) for v in values]
    hard = [torch.zeros_like(v, dtype=torch.bool) for v in values]
    plain = [v.to_local() for v in soft]
    with raises(r"soft\[0\] must be a DTensor of shape \(40, 33\), placed as its values"):
        ops.solve_masks_(values, 3.0, None, 1.0, plain, hard, ops.new_solver_state(), backend=backend)
    with raises("hard must hold one mask for each of 4 values; got 1"):
        ops.solve_masks_(values, 3.0, None, 1.0, soft, hard[:1], ops.new_solver_state(), backend=backend)


@check()
def a_nan_in_one_shard_is_refused_on_all_ranks(backend: str) -> None:
    values = [distribute_tensor(v, line(), [Shard(0)]) for v in layers()]
    if rank() == 1:
        values[0].to_local()[0, 0] = torch.nan
    with raises(r"values.* must be finite"):
        ops.soft_topk_global(values, 30.0, beta=1.0, backend=backend)


@check()
def weights_of_an_fsdp2_model(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 30), nn.ReLU(), nn.Linear(30, 5), nn.LayerNorm(5))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=line())
    fully_shard(model, mesh=line())
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert all(isinstance(w, DTensor) for w in weights)
    require_all(weights, backend)
    x = make_values("normal", (8, 13), seed=rank())
    masks = spartan.soft_topk_global(weights, 100.0, beta=2.0, backend=backend)
    (
        model(x).square().sum() + sum((m * w).abs().sum() for m, w in zip(masks, weights, strict=True)).full_tensor()
    ).backward()
    assert all(isinstance(w.grad, DTensor) and bool(w.grad.to_local().isfinite().all()) for w in weights)


@check(4)
def replicas_and_shards_in_two_dimensions(backend: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    values = layers()
    hybrid = [distribute_tensor(v, mesh, [Replicate(), Shard(0)]) for v in values]
    require_all(hybrid, backend)
    model = nn.Sequential(nn.Linear(9, 21), nn.ReLU(), nn.Linear(21, 5))
    fully_shard(model, mesh=mesh)
    require_all([p.detach() for p in model.parameters()], backend)
    unnamed = init_device_mesh("cpu", (2, 2))
    require_all([distribute_tensor(v, unnamed, [Shard(0), Shard(v.dim() - 1)]) for v in values], backend)
    kinds = ([Shard(0), Replicate()], [Replicate(), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(0)])
    mixed = [distribute_tensor(v, mesh, kind) for v, kind in zip(values, kinds, strict=True)]
    require_all(mixed, backend)


@check(4)
def fully_sharded_tensor_parallel_weights(backend: str) -> None:
    """FSDP2 cuts what tensor parallelism has cut already: strided shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 6))
    parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    weights = [p.detach() for p in model.parameters() if p.dim() > 1]
    assert all(isinstance(w, DTensor) and w.device_mesh.ndim == 2 for w in weights)
    require_all(weights, backend)
