"""Powerpropagation: the same training as a network that is written in phi."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spartan.methods import GMP, IHT, SET, Dense, DualAveraging, OneShot, Powerpropagation, RigL, Spartan, TopKAST
from spartan.sparsifier import Sparsifier

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).double()


def batch(index: int) -> torch.Tensor:
    return torch.randn(16, 20, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


def test_a_step_by_hand() -> None:
    """theta = (4, -9), alpha = 2: phi = (2, -3), dL/dphi = G 2 |phi| = (4, 6), phi - 0.1 (4, 6) = (1.6, -3.6)."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, -9.0]]))
    sparsifier = Sparsifier(model, Powerpropagation(OneShot(sparsity=0.5)), 10, count="masked")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), torch.tensor([[2.56, -12.96]]))


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 3.0])
def test_trains_as_a_network_written_in_phi(alpha: float) -> None:
    """Dense for all but the last step: AdamW on phi through autograd gives the same weights."""
    ours, twin = network(), network()
    phi = nn.Parameter(twin[0].weight.detach().abs().pow(1 / alpha) * twin[0].weight.detach().sign())
    sparsifier = Sparsifier(ours, Powerpropagation(OneShot(sparsity=0.5, prune_at=1.0), alpha), 12, count="masked")
    rest = [twin[0].bias, *twin[2].parameters()]
    optimizers = [torch.optim.AdamW(list(p), lr=0.01) for p in (ours.parameters(), [phi, *rest])]
    sparsifier.attach(optimizers[0])
    for index in range(11):
        x = batch(index)
        for optimizer in optimizers:
            optimizer.zero_grad()
        functional.mse_loss(ours(x), x[:, :3]).backward()
        theta = phi * phi.abs().pow(alpha - 1)
        hidden = torch.tanh(functional.linear(x, theta, twin[0].bias))
        functional.mse_loss(twin[2](hidden), x[:, :3]).backward()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours[0].weight, phi * phi.abs().pow(alpha - 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "method",
    [
        Spartan(sparsity=0.8, block_size=(5, 4)),
        GMP(sparsity=0.8, interval=3),
        DualAveraging(sparsity=0.8),
        TopKAST(sparsity=0.8, backward_sparsity=0.5, interval=3),
    ],
    ids=lambda m: m.name,
)
def test_combines_with_methods_and_resumes(method: Any) -> None:
    """Exact sparsity, and bit for bit the same after a checkpoint."""

    def run() -> tuple[nn.Sequential, Sparsifier, torch.optim.Optimizer]:
        model = network()
        sparsifier = Sparsifier(model, Powerpropagation(method), 20, count="masked")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        sparsifier.attach(optimizer)
        return model, sparsifier, optimizer

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
        for index in range(begin, end):
            optimizer.zero_grad()
            functional.mse_loss(model(batch(index)), batch(index)[:, :3]).backward()
            optimizer.step()

    first, second = run(), run()
    train(first[0], first[2], 0, 7)
    for mine, theirs in zip(second, first, strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(first[0], first[2], 7, 20)
    train(second[0], second[2], 7, 20)
    for model, sparsifier, _ in (first, second):
        sparsifier.finalize()
        assert int((model[0].weight == 0).sum()) == 480
    assert torch.equal(first[0][0].weight, second[0][0].weight)


def test_the_large_grow_and_the_small_stay_small() -> None:
    """What the method is for: after the same training more of the weights are near zero."""
    near_zero = []
    for alpha in (1.0, 4.0):
        model = network()
        sparsifier = Sparsifier(model, Powerpropagation(OneShot(sparsity=0.5, prune_at=1.0), alpha), 300)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        sparsifier.attach(optimizer)
        for index in range(200):
            optimizer.zero_grad()
            functional.mse_loss(model(batch(index)), 3 * batch(index)[:, :3]).backward()
            optimizer.step()
        weight = model[0].weight.detach().abs()
        near_zero.append(float((weight < 0.1 * weight.max()).double().mean()))
    assert near_zero[1] > near_zero[0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Powerpropagation(Dense()), TypeError, r"method must be one with masks, .* got Dense\(\)"),
        (lambda: Powerpropagation(Powerpropagation(GMP(sparsity=0.5))), TypeError, "method must be one with masks"),
        (lambda: Powerpropagation(IHT(sparsity=0.5)), ValueError, "must not grow weights from zero, .* got IHT"),
        (lambda: Powerpropagation(SET(sparsity=0.5)), ValueError, "must not grow weights from zero, .* got SET"),
        (lambda: Powerpropagation(RigL(sparsity=0.5)), ValueError, "must not grow weights from zero, .* got RigL"),
        (lambda: Powerpropagation(GMP(sparsity=0.5), 0.5), ValueError, r"alpha must be in \[1, inf\); got 0.5"),
    ],
)
def test_bad_settings_are_refused_by_name(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_by_hand_it_is_refused_and_changes_nothing() -> None:
    model = network()
    before = model[0].weight.detach().clone()
    sparsifier = Sparsifier(model, Powerpropagation(GMP(sparsity=0.5)), 10)
    model(batch(0)).sum().backward()
    with pytest.raises(ValueError, match=r"use attach\(optimizer\)"):
        sparsifier.correct_gradients()
    assert torch.equal(model[0].weight, before)


def test_other_settings_do_not_resume() -> None:
    state = Sparsifier(network(), Powerpropagation(GMP(sparsity=0.5)), 10).state_dict()
    for other in (Powerpropagation(GMP(sparsity=0.5), 3.0), Powerpropagation(OneShot(sparsity=0.5))):
        with pytest.raises(ValueError, match="its settings is"):
            Sparsifier(network(), other, 10).load_state_dict(state)
