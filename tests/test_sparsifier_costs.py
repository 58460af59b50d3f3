"""Training to a budget of cost: what is kept never costs more, and equation (2) holds with a cost for each block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spartan import (
    DPF,
    GMP,
    IHT,
    SET,
    DualAveraging,
    FLOPs,
    Group,
    LatencyTable,
    OneShot,
    RigL,
    Sparsifier,
    Spartan,
    StaticRandom,
    TopKAST,
    soft_topk_global,
)
from spartan.budgets import LatencyEntry, Parameters
from spartan.methods import SparseMethod
from spartan_kernels import expand_blocks

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 22), nn.ReLU(), nn.Linear(22, 4)
    )


def per_block(name: str, module: nn.Module, grid: tuple[int, ...]) -> float | torch.Tensor:
    """A different cost for each block of the first weight, one for all of the others."""
    return torch.rand(grid, generator=torch.Generator().manual_seed(1)) + 0.5 if name == "0.weight" else 3.0


def train(model: nn.Module, sparsifier: Sparsifier, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer)
    for index in range(steps):
        x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        functional.cross_entropy(model(x), x[:, 0, 0].argmax(1)).backward()
        optimizer.step()


def test_blocks_are_chosen_by_magnitude_over_cost() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 1.0]]))  # cost 4 each: 1 and 0.25 per unit
        model[1].weight.copy_(torch.tensor([[0.9, 3.0]]))  # cost 1 each
    costs = {"0.weight": 4.0, "1.weight": 1.0}
    sparsifier = Sparsifier(
        model, OneShot(sparsity=0.5, prune_at=0.0), 10, costs=lambda name, module, grid: costs[name]
    )
    sparsifier.step()
    assert model[0].weight.tolist() == [[4.0, 0.0]]
    torch.testing.assert_close(model[1].weight, torch.tensor([[0.0, 3.0]]))
    kept = {name: tuple(cost) for name, cost in sparsifier.costs().items()}
    assert kept == {"0.weight": pytest.approx((8.0, 4.0)), "1.weight": pytest.approx((2.0, 1.0))}


@pytest.mark.parametrize("distribution", ["global", {"0.weight": 0.56}])
def test_a_block_that_fits_exactly_is_kept_whatever_the_rounding(distribution: Any) -> None:
    model = nn.Sequential(nn.Linear(25, 1), nn.Linear(1, 1))
    method = OneShot(sparsity=0.56, prune_at=0.0, distribution=distribution)  # 25 - 0.56 * 25 is a bit less than 11
    sparsifier = Sparsifier(model, method, 10, costs=lambda name, module, grid: 2.0)
    sparsifier.step()
    assert int(model[0].weight.count_nonzero()) == 11


METHODS: list[SparseMethod] = [
    Spartan(sparsity=0.8),
    Spartan(sparsity=0.8, block_size=(4, 3), beta_units="threshold", beta=4.0),
    Spartan(sparsity=0.8, block_size=4, distribution="uniform", preserve_scale=True),
    TopKAST(sparsity=0.8, backward_sparsity=0.5, block_size=4, interval=3),
    DualAveraging(sparsity=0.8, distribution={"0.weight": 0.9}),
    DPF(sparsity=0.8, block_size=4, interval=3),
    IHT(sparsity=0.8, distribution="erk"),
    GMP(sparsity=0.8, block_size=4, interval=3),
    OneShot(sparsity=0.8),
    StaticRandom(sparsity=0.8, block_size=4),
    RigL(sparsity=0.8, block_size=4, interval=3),
    SET(sparsity=0.8, interval=3),
]


@pytest.mark.parametrize("costs", [FLOPs(torch.randn(1, 3, 4, 4)), per_block], ids=["flops", "callable"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.block_size}")
def test_what_is_kept_never_costs_more_than_the_budget(method: SparseMethod, costs: Any) -> None:
    model = network()
    sparsifier = Sparsifier(model, method, 20, costs=costs)
    train(model, sparsifier, 20)
    sizes = sparsifier.costs()
    block = max(float(tensor.carrier.mask_costs.max()) for tensor in sparsifier._masks.tensors) * sparsifier._cost_unit
    dense, kept = sum(c.dense for c in sizes.values()), sum(c.kept for c in sizes.values())
    assert kept <= 0.2 * dense * (1 + 1e-6)
    slack = 1 if method.distribution == "global" else 2  # what the dictionary names keeps its own
    assert kept >= 0.2 * dense - slack * block
    sparsifier.finalize()
    assert sum(cost.kept for cost in sparsifier.costs().values()) == kept


def test_flops_weigh_the_positions_of_the_convolution() -> None:
    model = network()
    sparsifier = Sparsifier(model, OneShot(sparsity=0.5), 20, costs=FLOPs(torch.randn(2, 3, 4, 4)))
    assert {name: cost.dense for name, cost in sparsifier.costs().items()} == pytest.approx(
        {"0.weight": 2 * 2 * 16 * 216, "3.weight": 2 * 2 * 128 * 22}
    )


@pytest.mark.parametrize("block", [(1, 1), (4, 3)])
def test_the_gradient_is_equation_2_with_costs(block: tuple[int, int]) -> None:
    model = network().double()
    sparsifier = Sparsifier(model, Spartan.paper(sparsity=0.7, block_size=block, beta=30.0), 100, costs=per_block)
    for _ in range(50):
        sparsifier.step()
    x, target = torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.randint(4, (8,))
    functional.cross_entropy(model(x), target).backward()
    sparsifier.correct_gradients()

    tensors = sparsifier._masks.tensors
    theta = [tensor.weight.detach().clone().requires_grad_() for tensor in tensors]
    values = [sums(weight, block) for weight in theta]
    costs = [tensor.carrier.mask_costs for tensor in tensors]
    total = sum(float(c.sum()) if c.dim() else float(c) * v.numel() for c, v in zip(costs, values, strict=True))
    soft = soft_topk_global(values, 0.3 * total, costs, beta=tensors[0].carrier.mask_beta)
    weights = {}
    for tensor, weight, mask in zip(tensors, theta, soft, strict=True):
        torch.testing.assert_close(mask, tensor.mask.soft, rtol=1e-6, atol=1e-9)
        scaled = weight * expand_blocks(mask, weight.shape, block)
        hard = expand_blocks(tensor.mask.hard, weight.shape, block)
        weights[tensor.name] = scaled + (scaled * hard - scaled).detach()
    twin = network().double()
    functional.cross_entropy(torch.func.functional_call(twin, weights, (x,)), target).backward()
    for tensor, weight in zip(tensors, theta, strict=True):
        torch.testing.assert_close(tensor.weight.grad, weight.grad, rtol=1e-5, atol=1e-10)


def sums(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """v_b, the sum of |theta| over each block, differentiable."""
    if block == (1, 1):
        return weight.abs()
    rows, columns = -weight.shape[0] % block[0], -weight.shape[1] % block[1]
    flat = weight.abs().flatten(2) if weight.dim() > 2 else weight.abs()[..., None]
    padded = functional.pad(flat, (0, 0, 0, columns, 0, rows))
    result = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).sum((1, 3))
    return result.unflatten(2, weight.shape[2:]) if weight.dim() > 2 else result[..., 0]


def test_preserve_scale_takes_the_mean_over_weights() -> None:
    model = network()
    method = Spartan(sparsity=0.6, preserve_scale=True, block_size=4)
    sparsifier = Sparsifier(model, method, 100, costs=per_block)
    for _ in range(40):
        sparsifier.step()
    mask = sparsifier.masks()["0.weight"]
    shape = model[0].weight.shape
    soft, hard = expand_blocks(mask.soft, shape, 4), expand_blocks(mask.hard, shape, 4)
    torch.testing.assert_close(model[0].mask_scale, 1 / soft[hard].mean())


@pytest.mark.parametrize("block", [1, (4, 3)])
def test_a_cost_of_one_for_each_weight_is_the_default(block: Any) -> None:
    masks = []
    for costs in (None, Parameters()):
        model = network()
        method = Spartan.paper(sparsity=0.75, block_size=block, beta=30.0)  # of 3032 weights, a whole number
        sparsifier = Sparsifier(model, method, 100, count="masked", costs=costs)
        for _ in range(50):
            sparsifier.step()
        masks.append(sparsifier.masks())
        assert sum(cost.dense for cost in sparsifier.costs().values()) == pytest.approx(3032)
    for name, mask in masks[0].items():
        torch.testing.assert_close(mask.soft, masks[1][name].soft, rtol=1e-5, atol=1e-7)
        assert torch.equal(mask.hard, masks[1][name].hard)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_costs_in_half_precision(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    sparsifier = Sparsifier(model, Spartan(sparsity=0.8, block_size=(4, 3)), 20, costs=per_block)
    for _ in range(20):
        sparsifier.step()
    costs = sparsifier.costs().values()
    dense, kept = sum(cost.dense for cost in costs), sum(cost.kept for cost in costs)
    assert 0.2 * dense - 20 * 3.0 <= kept <= 0.2 * dense * (1 + 1e-6)


def test_scaling_all_costs_changes_nothing() -> None:
    masks = []
    for factor in (1.0, 1e9):
        model = network()
        method = Spartan.paper(sparsity=0.7, beta=30.0)

        def scaled(name: str, module: nn.Module, grid: Any, factor: float = factor) -> Any:
            return factor * per_block(name, module, grid)

        sparsifier = Sparsifier(model, method, 100, costs=scaled)
        for _ in range(50):
            sparsifier.step()
        masks.append(sparsifier.masks())
    for name, mask in masks[0].items():
        torch.testing.assert_close(mask.soft, masks[1][name].soft, rtol=1e-4, atol=1e-6)
        assert torch.equal(mask.hard, masks[1][name].hard)


def test_a_group_of_its_own_sparsity_keeps_that_part_of_its_cost() -> None:
    model = network()
    group = Group(include="0.weight", sparsity=0.25)
    sparsifier = Sparsifier(
        model, OneShot(sparsity=0.9, prune_at=0.0), 10, groups=[group], costs=FLOPs(torch.randn(1, 3, 4, 4))
    )
    sparsifier.step()
    costs = sparsifier.costs()
    assert costs["0.weight"].kept == pytest.approx(0.75 * costs["0.weight"].dense)
    assert costs["3.weight"].kept == pytest.approx(0.1 * costs["3.weight"].dense, rel=1 / 281)


def test_a_latency_table_is_a_budget_of_seconds() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    entries = [("0.weight", (16, 32), ((8, 32),), 2e-6), ("1.weight", (16, 16), ((8, 16),), 1e-6)]
    table = LatencyTable([LatencyEntry(name, shape, (4, 4), x, seconds) for name, shape, x, seconds in entries])
    method = Spartan(sparsity=0.75, block_size=4)
    sparsifier = Sparsifier(model, method, 10, costs=table)
    for _ in range(10):
        sparsifier.step()
    costs = sparsifier.costs()
    assert sum(cost.dense for cost in costs.values()) == pytest.approx(32 * 2e-6 + 16 * 1e-6)
    kept = sum(cost.kept for cost in costs.values())  # a block of 2e-6 may be what does not fit
    assert 18e-6 * (1 - 1e-6) <= kept <= 20e-6 * (1 + 1e-6)


def test_training_resumes_bit_for_bit_and_only_with_its_costs() -> None:
    method = Spartan(sparsity=0.7, block_size=4)
    whole, again = network(), network()
    train(whole, Sparsifier(whole, method, 20, costs=per_block), 20)
    half = network()
    first = Sparsifier(half, method, 20, costs=per_block)
    optimizer = torch.optim.AdamW(half.parameters(), lr=1e-2)
    first.attach(optimizer)
    second = Sparsifier(again, method, 20, costs=per_block)
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    second.attach(other)
    for index in range(20):
        if index == 9:
            again.load_state_dict(half.state_dict())
            other.load_state_dict(optimizer.state_dict())
            second.load_state_dict(first.state_dict())
        model, own = (half, optimizer) if index < 9 else (again, other)
        x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(index))
        own.zero_grad()
        functional.cross_entropy(model(x), x[:, 0, 0].argmax(1)).backward()
        own.step()
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="state is of another training: its costs is"):
        Sparsifier(network(), method, 20).load_state_dict(first.state_dict())


def test_what_does_not_go_with_costs_is_refused() -> None:
    example = FLOPs(torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"costs are not for weights with a pattern; '0.weight' has \(1, 3\)"):
        Sparsifier(network(), Spartan(pattern=(1, 3)), 10, exclude="3.*", costs=example)
    with pytest.raises(TypeError, match="costs must be a cost model or a function"):
        Sparsifier(network(), Spartan(sparsity=0.5), 10, costs="flops")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sparsity 0.999 cannot be reached: .* cost are masked"):
        Sparsifier(network(), Spartan(sparsity=0.999, block_size=16), 10, costs=example)
