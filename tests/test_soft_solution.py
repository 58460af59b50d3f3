"""Soft masks that are computed from their solution (c, d) where they are needed, instead of being kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spartan
import spartan.functional as F
from spartan_kernels import masked_weight, masked_weight_correct_, masked_weight_coupling, ops
from spartan_kernels.operands import KeptSoftMass
from spartan_kernels.ops.masked_weight import kept_soft_mass

OPERATORS = ("solve_masks_", "masked_weight_forward", "masked_weight_backward", "masked_weight_coupling")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def weights(dtype: torch.dtype, device: str, shapes: Any = ((33, 17), (4, 5, 3, 3), (1, 7))) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype) for shape in shapes]


def solved(values: list[Tensor], costs: Any, beta: float, backend: str, soft: bool, times: int = 2) -> Any:
    """Soft masks (None: not written), hard masks and the state after a cold and a warm solve."""
    masks = [torch.empty_like(v) for v in values] if soft else None
    hard = [torch.empty_like(v, dtype=torch.bool) for v in values]
    state = ops.new_solver_state(values[0].device)
    prices = sum(float(c.sum()) for c in costs) if costs else sum(v.numel() for v in values)
    for _ in range(times):
        ops.solve_masks_(values, 0.3 * prices, costs, beta, masks, hard, state, absolute=True, backend=backend)
    return masks, hard, state


@pytest.mark.operators(*OPERATORS)
@pytest.mark.parametrize("beta", [0.0, 3.0, 500.0])
@pytest.mark.parametrize("priced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operators_take_a_solution_for_the_mask_that_it_gives(
    target: Any, dtype: torch.dtype, priced: bool, beta: float
) -> None:
    values = weights(dtype, target.device)
    g = torch.Generator().manual_seed(6)
    costs = [torch.rand(v.shape, generator=g, dtype=torch.float64).add(0.5).to(v) for v in values] if priced else None
    masks, kept, known = solved(values, costs, beta, target.backend, soft=True)
    _, hard, state = solved(values, costs, beta, target.backend, soft=False)
    assert all(map(torch.equal, hard, kept))
    assert torch.equal(state[:6], known[:6])
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    for index, (theta, m, h) in enumerate(zip(values, masks, hard, strict=True)):
        a: Any = costs[index] if costs else 1.0
        grads, settings = torch.randn_like(theta), {"beta": beta, "costs": a, "backend": target.backend}
        found = []
        for soft in (state[6:], m):
            leaf, final = theta.clone().requires_grad_(), grads.clone()
            w = F.masked_weight(leaf, soft, h, **settings)
            w.backward(grads)
            masked_weight_correct_(final, theta, soft, 0.7, **settings)
            found.append((w.detach(), leaf.grad, masked_weight_coupling(grads, theta, soft, **settings), final))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance * max(1.0, beta), atol=tolerance)


@pytest.mark.operators("kept_soft_mass")
@pytest.mark.parametrize("shape", [(1, 1), (33, 17), (130, 257)])
def test_kept_soft_mass_is_the_sum_over_the_kept(target: Any, shape: tuple[int, int]) -> None:
    (theta,) = weights(torch.float32, target.device, [shape])
    hard, solution = theta > 0.2, torch.tensor([0.5, -0.25], dtype=torch.float64, device=target.device)
    m = torch.sigmoid(3.0 * (theta.double().abs() / 2.0 - 0.5) - 0.25)
    wanted = torch.stack([(m * hard).sum(), hard.sum().double()])
    beta, costs = (torch.tensor(x, dtype=torch.float64, device=target.device) for x in (3.0, 2.0))
    for soft in (solution, m.float()):
        found = kept_soft_mass(KeptSoftMass(theta, soft, hard, beta, costs, target.backend))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_long_list_is_solved_alike_without_writing_soft_masks() -> None:
    """Longer than the native solver's sample, in which every pass is taken."""
    values = weights(torch.float32, "cpu", [(700, 401), (300, 999)])
    masks, kept, known = solved(values, None, 6.0, "native", soft=True, times=3)
    _, hard, state = solved(values, None, 6.0, "native", soft=False, times=3)
    assert all(map(torch.equal, hard, kept))
    assert torch.equal(state[:6], known[:6])
    for theta, m in zip(values, masks, strict=True):
        torch.testing.assert_close(masked_weight(theta, state[6:], None, beta=6.0), theta * m, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("soft", "block_size", "words"),
    [
        (torch.zeros(2), 1, "float64 of shape"),
        (torch.zeros(3, dtype=torch.float64), 1, "float64 of shape"),
        (torch.zeros(2, dtype=torch.float64), 4, "where each weight is a block"),
    ],
)
def test_a_wrong_solution_is_named(soft: Tensor, block_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        masked_weight(torch.randn(8, 8), soft, None, block_size)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Conv1d(60, 30, 1), nn.ReLU(), nn.Linear(1, 5))


def batch() -> Tensor:
    return torch.randn(8, 40, generator=torch.Generator().manual_seed(1))


def run(model: nn.Sequential, x: Tensor) -> Tensor:
    hidden: Tensor = model[1](model[0](x))[..., None]
    y: Tensor = model[4](model[3](model[2](hidden)))
    return y.square().mean()


def computing(model: nn.Sequential, method: spartan.methods.Method) -> spartan.Sparsifier:
    return spartan.Sparsifier(model, method, 20, compute_soft=True)


def train(model: nn.Sequential, sparsifier: spartan.Sparsifier, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model, batch().to(next(model.parameters()))).backward()
        sparsifier.correct_gradients()
        optimizer.step()
        sparsifier.step()


def mask_bytes(model: nn.Module) -> int:
    return sum(b.nbytes for name, b in model.named_buffers() if "mask_" in name)


def test_masks_of_single_weights_take_a_byte_each() -> None:
    model = network()
    sparsifier = computing(model, spartan.Spartan(sparsity=0.8))
    count = sum(m.hard.numel() for m in sparsifier.masks().values())
    train(model, sparsifier, 6)
    assert mask_bytes(model) <= count + 100 * len(sparsifier.masks())
    blocks = network()
    grids = [m.hard for m in computing(blocks, spartan.Spartan(sparsity=0.8, block_size=2)).masks().values()]
    assert mask_bytes(blocks) >= 5 * sum(grid.numel() for grid in grids)  # those of blocks are kept


def test_computed_masks_are_those_of_the_weights_and_meet_the_budget() -> None:
    model = network()
    sparsifier = computing(model, spartan.Spartan(sparsity=0.8, ramp=0.0, beta=60.0, beta_units="paper"))
    train(model, sparsifier, 3)
    masks = sparsifier.masks()
    parameters = dict(model.named_parameters())
    names = {name: parameters[name].detach() for name in masks}
    kept = sum(int(m.hard.sum()) for m in masks.values())
    budget = float(sum(m.soft.double().sum() for m in masks.values()))
    assert abs(kept - budget) <= 1 + 1e-6 * budget
    wanted = F.soft_topk_global([theta.abs() for theta in names.values()], budget, beta=float(sparsifier.beta))
    for name, m in zip(names, wanted, strict=True):
        torch.testing.assert_close(masks[name].soft, m, rtol=1e-5, atol=1e-6)


def test_methods_that_keep_their_soft_masks_refuse_to_compute_them() -> None:
    with pytest.raises(ValueError, match=r"compute_soft is for .* Spartan; got GMP"):
        computing(network(), spartan.GMP(sparsity=0.8))


def test_masks_are_kept_unless_asked() -> None:
    model = network()
    sparsifier = spartan.Sparsifier(model, spartan.Spartan(sparsity=0.8), 20)
    assert mask_bytes(model) >= 5 * sum(m.hard.numel() for m in sparsifier.masks().values())


def test_before_the_first_solve_nothing_is_masked() -> None:
    model, plain = network(), network()
    computing(model, spartan.Spartan(sparsity=0.8))
    assert torch.equal(run(model, batch()), run(plain, batch()))


@pytest.mark.parametrize("forget", [False, True])
def test_training_goes_on_from_a_state_also_of_masks_that_were_kept(forget: bool) -> None:
    """`forget`: the state of a device on which soft masks are kept, whose solver left no solution."""
    method = spartan.Spartan(sparsity=0.8)
    model = network()
    sparsifier = computing(model, method)
    train(model, sparsifier, 6)
    weights_, state = copy.deepcopy(model.state_dict()), copy.deepcopy(sparsifier.state_dict())
    if forget:
        for solver in state["solver"]:
            solver[6:] = 0.0
    train(model, sparsifier, 4)
    again = network()
    restored = computing(again, method)
    restored.load_state_dict(state)
    again.load_state_dict(weights_)
    train(again, restored, 4)
    for theta, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(theta, other) if not forget else torch.allclose(theta, other, rtol=1e-5, atol=1e-7)


def test_the_solution_is_not_rounded_when_the_model_is() -> None:
    model = network()
    sparsifier = computing(model, spartan.Spartan(sparsity=0.8))
    train(model, sparsifier, 6)
    before = [m.soft for m in sparsifier.masks().values()]
    carrier: Any = model[0]
    solution = carrier.mask_soft.clone()
    model.bfloat16()
    assert torch.equal(carrier.mask_soft, solution)
    for old, mask in zip(before, sparsifier.masks().values(), strict=True):
        torch.testing.assert_close(mask.soft.float(), old, rtol=0.05, atol=0.02)
    train(model, sparsifier, 2)


def test_copies_have_the_masks_of_their_own_weights() -> None:
    model = network()
    sparsifier = computing(model, spartan.Spartan(sparsity=0.8))
    train(model, sparsifier, 6)
    twin, loss = copy.deepcopy(model), run(model, batch())
    assert torch.equal(run(twin, batch()), loss)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(run(average.module, batch()), loss)
    spartan.finalize(twin)
    torch.testing.assert_close(run(twin, batch()), loss, rtol=1e-6, atol=0.0)
