"""WGSEF: the proximal step is the minimum that it is defined as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spartan.methods import WGSEF
from spartan.methods.wgsef import _search, _share
from spartan.sparsifier import Sparsifier

pytestmark = pytest.mark.usefixtures("one_thread")


def toy(weight: list[float], method: WGSEF, rate: float) -> tuple[nn.Sequential, Sparsifier, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(len(weight), 1, bias=False), nn.Linear(1, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([weight]))
    sparsifier = Sparsifier(model, method, 10, count="masked")
    optimizer = torch.optim.SGD(model[0].parameters(), lr=rate)
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def test_a_step_by_hand() -> None:
    """tau = 0.5 * 2 = 1, t = (4, -3, 1, 0.5), k = 1: with alpha = 3/7 u = (5/7, 2/7, 0, 0), t u / (u + 1)."""
    model, sparsifier, optimizer = toy([5.0, -3.0, 1.0, 0.5], WGSEF(sparsity=0.75, strength=2.0), 0.5)
    model[0](torch.tensor([[2.0, 0.0, 0.0, 0.0]], dtype=torch.float64)).sum().backward()
    optimizer.step()
    expected = [[4 * 5 / 12, -3 * 2 / 9, 0.0, 0.0]]
    torch.testing.assert_close(model[0].weight.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert sparsifier.masks()["0.weight"].hard.tolist() == [[True, True, False, False]]
    optimizer.zero_grad()  # what is zero goes on getting gradients
    model[0](torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    assert model[0].weight.grad.tolist() == [[1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("tau", [0.0, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_shares_meet_the_budget_and_minimise_what_they_are_defined_by(tau: float, share: float) -> None:
    """sum tau |t|^2 / (2 (tau + u)) is convex in u: no way of moving share from one block to another lowers it."""
    generator = torch.Generator().manual_seed(0)
    t = [torch.randn(n, generator=generator, dtype=torch.float64).exp() for n in (40, 7)]
    a = [torch.rand(n, generator=generator, dtype=torch.float64) + 0.5 for n in (40, 7)]
    budget = share * float(sum(x.sum() for x in a))
    norms = [x / y.sqrt() for x, y in zip(t, a, strict=True)]
    alpha = _search(norms, a, tau, budget)
    u, t, a = torch.cat([_share(v, alpha, tau) for v in norms]), torch.cat(t), torch.cat(a)
    assert abs(float((a * u).sum()) - budget) <= 1e-6 * budget
    if tau:
        gain = tau * t**2 / (2 * (tau + u) ** 2) / a  # by each unit of the budget
        tolerance = 1 + 1e-9
        assert float(gain[u < 1].max()) <= float(gain[u > 0].min()) * tolerance


def test_all_that_is_not_zero_stays_where_there_is_room() -> None:
    model, _, optimizer = toy([2.0, 0.0, 0.0, 0.0], WGSEF(sparsity=0.5, strength=2.0), 0.5)
    model[0](torch.zeros(1, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert model[0].weight.tolist() == [[1.0, 0.0, 0.0, 0.0]]  # u = 1: 2 / (1 + tau)


@pytest.mark.parametrize("block", [1, (4, 4)])
def test_training_drives_blocks_to_zero_and_ends_exactly(block: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 3))
    sparsifier = Sparsifier(model, WGSEF(sparsity=0.75, block_size=block, strength=5.0), 120, count="masked")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    losses, sparsities = [], []
    for index in range(120):
        x = torch.randn(64, 20, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), x[:, :3].argmax(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        sparsities.append(sparsifier.sparsity)
        for name, mask in sparsifier.masks().items():
            weight = model.get_parameter(name).detach()
            side = (1, 1) if block == 1 else block
            blocks = weight.unflatten(1, (-1, side[1])).unflatten(0, (-1, side[0])).abs().amax((1, 3))
            assert torch.equal(blocks != 0, mask.hard) or sparsifier.frozen
    assert sparsities[0] < 0.75 and 0.5 < sparsities[90] <= 0.75 and sparsifier.frozen
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    sparsifier.finalize()
    assert 0 <= sparsifier.sparsity - 0.75 < 16 / 1280


def test_refusals() -> None:
    with pytest.raises(ValueError, match="strength must be above 0; got 0"):
        WGSEF(sparsity=0.5, strength=0)
    model, sparsifier, _ = toy([1.0, 2.0], WGSEF(sparsity=0.5), 0.1)
    sparsifier.finalize()
    sparsifier = Sparsifier(model, WGSEF(sparsity=0.5), 10, count="masked")
    with pytest.raises(ValueError, match=r"WGSEF steps as far .* by hand step\(optimizer\)"):
        sparsifier.step()
    several = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    sparsifier = Sparsifier(several, WGSEF(sparsity=0.5), 10, count="masked")
    groups = [{"params": several[0].parameters(), "lr": 0.1}, {"params": several[1].parameters(), "lr": 0.2}]
    with pytest.raises(ValueError, match=r"must share a learning rate for WGSEF; got \[0.1, 0.2\]"):
        sparsifier.step(torch.optim.SGD(groups))
    with torch.no_grad():
        several[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weight '0\.weight' must be finite"):
        sparsifier.step(torch.optim.SGD(several.parameters(), lr=0.1))
