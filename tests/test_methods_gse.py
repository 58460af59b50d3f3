"""GSE: candidates follow what passes through a layer, and only they are looked at and grown."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from methods_common import Toy, hard, step
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from spartan.methods import GSE
from spartan.sparsifier import Sparsifier

pytestmark = pytest.mark.usefixtures("one_thread")


def toy(weight: list[float], kept: list[bool], **settings: Any) -> tuple[Toy, Sparsifier, torch.optim.Optimizer]:
    model = Toy(weight)
    method = GSE(sparsity=0.5, fraction=1.0, **settings)
    sparsifier = Sparsifier(model, method, 8, include="row.weight", count="masked")
    hard(sparsifier).copy_(torch.tensor([kept]))
    with torch.no_grad():
        model.row.weight.copy_(torch.tensor([weight]) * torch.tensor([kept]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def test_steps_by_hand() -> None:
    """T = 6: after step 2 the share 1/2 (1 + cos(pi/3)) = 3/4 of two weights goes: round(1.5) = 2."""
    model, sparsifier, optimizer = toy([3.0, 0.1, 9.0, 9.0], [True, True, False, False], interval=2, candidates=20)
    step(model, optimizer, [0.0, 0.0, 5.0, 0.0])  # only the third is active, so only it is a candidate
    assert model.values == [3.0, 0.1, 0.0, 0.0]
    step(model, optimizer, [1.0, 2.0, -0.5, 9.0])
    # RigL would grow the fourth. Both kept are dropped, the third is grown, and the first, the larger, stays.
    assert hard(sparsifier).tolist() == [[True, False, True, False]]
    assert model.values == [2.9, 0.0, 0.0, 0.0]
    step(model, optimizer, [1.0, 1.0, 1.0, 1.0])
    assert model.values == [2.8, 0.0, -0.1, 0.0]


def test_grows_the_candidates_of_largest_accumulated_gradient() -> None:
    """All are candidates; micro-batches of opposite sign cancel, so the last alone would grow the third."""
    model, sparsifier, optimizer = toy([3.0, 2.0, 9.0, 9.0], [True, True, False, False], interval=2, candidates=50)
    step(model, optimizer, [1.0, 1.0, 1.0, 1.0])
    step(model, optimizer, [0.0, 0.0, 10.0, 1.0], [0.0, 0.0, -10.0, 1.0])
    assert bool(hard(sparsifier)[0, 3])


class Network(nn.Module):
    """Layers of every known kind; the gradient of every masked weight is computed through autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.line = nn.ConvTranspose1d(6, 10, 2, groups=2)
        self.linear = nn.Linear(10, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 4, 4, 4] -> [n, 17, 3]."""
        x = torch.tanh(self.conv(x)).flatten(2)
        return self.head(torch.tanh(self.linear(self.line(x).mT)))


def network(**settings: Any) -> tuple[Network, Sparsifier, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Network().double()
    sparsifier = Sparsifier(
        model, GSE(sparsity=0.5, **settings), 100, include="*.weight", exclude="head.*", count="masked"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def batch(index: int) -> torch.Tensor:
    return torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 2])
def test_activity_bounds_the_gradient_of_every_block(block: int) -> None:
    model, sparsifier, _ = network(interval=2, block_size=block)
    for tensor in sparsifier._masks.tensors:  # everything gets its gradient, to compare with
        tensor.carrier.mask_straight_through = True
    for index in range(2):
        model(batch(index)).square().sum().backward()
    for tensor in sparsifier._masks.tensors:
        sums = tensor.observer.by_block()
        bound = torch.outer(*sums)[(..., *[None] * (tensor.weight.dim() - 2))]
        gradient = tensor.magnitudes(tensor.weight.grad)
        assert bool((gradient <= bound * (1 + 1e-12)).all()) and bool((gradient > 0).any())


def test_activity_is_the_sum_of_magnitudes() -> None:
    model, sparsifier, _ = network(interval=2)
    tensors = {tensor.name: tensor for tensor in sparsifier._masks.tensors}
    seen: dict[str, Any] = {}

    def remember(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen[type(module).__name__] = args[0], output

    model.conv.register_forward_hook(remember)
    model.line.register_forward_hook(remember)
    model.linear.register_forward_hook(remember)
    model(batch(0)).square().sum().backward()
    outputs, inputs = tensors["linear.weight"].observer.by_block()
    x, y = seen["MaskedLinear"]
    torch.testing.assert_close(inputs, x.detach().abs().sum((0, 1)))
    torch.testing.assert_close(outputs, y.grad.abs().sum((0, 1)))
    inputs, outputs = tensors["line.weight"].observer.by_block()  # stored as [in, out]
    x, y = seen["MaskedConvTranspose1d"]
    torch.testing.assert_close(inputs, x.detach().abs().sum((0, 2)))
    torch.testing.assert_close(outputs, y.grad.abs().sum((0, 2)).reshape(2, 5).sum(0))
    outputs, inputs = tensors["conv.weight"].observer.by_block()
    x, y = seen["MaskedConv2d"]
    torch.testing.assert_close(inputs, x.abs().sum((0, 2, 3)).reshape(2, 2).sum(0))  # of both groups
    torch.testing.assert_close(outputs, y.grad.abs().sum((0, 2, 3)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activity_through_checkpointing_is_the_same_up_to_a_factor(reentrant: bool) -> None:
    shares = []
    for wrapped in (False, True):
        model, sparsifier, _ = network(interval=2)
        x = batch(0).requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if wrapped else model(x)
        y.square().sum().backward()
        shares.append([[s / s.sum() for s in t.observer.by_block()] for t in sparsifier._masks.tensors])
    for plain, again in zip(*shares, strict=True):
        for one, other in zip(plain, again, strict=True):
            torch.testing.assert_close(one, other)


def test_blocks_compute_no_gradient_but_that_of_kept_ones_and_candidates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 3)).double()
    sparsifier = Sparsifier(model, GSE(sparsity=0.75, block_size=4, interval=2, candidates=0.5), 100, count="masked")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    (tensor,) = sparsifier._masks.tensors
    x = torch.randn(16, 32, dtype=torch.float64)
    for due in (False, True):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        looked = tensor.expand(tensor.carrier.mask_backward if due else hard(sparsifier))
        assert bool((tensor.weight.grad[~looked] == 0).all()) and bool((tensor.weight.grad[looked] != 0).all())
        if due:
            extra = int((tensor.carrier.mask_backward & ~hard(sparsifier)).sum())
            assert 0 < extra <= math.ceil(0.5 * 24)
        optimizer.step()
    assert torch.equal(tensor.carrier.mask_backward, hard(sparsifier))


def test_draws_follow_the_product_of_activities() -> None:
    model, sparsifier, _ = network(interval=2)
    model(batch(0)).square().sum().backward()
    (tensor,) = [t for t in sparsifier._masks.tensors if t.name == "linear.weight"]
    outputs, inputs = tensor.observer.by_block()
    probability = torch.outer(outputs / outputs.sum(), inputs / inputs.sum())
    rounds, count = 2000, int(tensor.carrier.mask_hard.sum())
    drawn = torch.zeros(7, 10, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        drawn += sparsifier.method._draw(tensor, generator)
    expected = 1 - (1 - probability) ** count
    deviation = (expected * (1 - expected) / rounds).sqrt()
    assert bool(((drawn / rounds - expected).abs() < 5 * deviation).all())
    assert float(expected.max() / expected.min()) > 2  # it is not the uniform draw


def test_an_overflowed_pass_leaves_a_uniform_draw() -> None:
    model, sparsifier, optimizer = toy([1.0, 1.0, 0.0, 0.0], [True, True, False, False], interval=2, candidates=50)
    model.pull([math.inf, 0.0, 0.0, 0.0]).backward()  # as under a loss scale that is too large: this step is skipped
    step(model, optimizer, [0.0, 0.0, 1.0, 0.0])
    (tensor,) = sparsifier._masks.tensors
    assert tensor.carrier.mask_backward.tolist() == [[True, True, True, True]]


def test_finalize_leaves_plain_modules_without_hooks() -> None:
    model, sparsifier, _ = network(interval=2)
    sparsifier.finalize()
    assert not any(module._forward_hooks for module in model.modules())
    assert type(model.linear) is nn.Linear


def train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    for index in range(begin, end):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        functional.mse_loss(model(x), x[:, :3]).backward()
        optimizer.step()


def test_a_frozen_training_goes_back_to_an_earlier_checkpoint() -> None:
    runs = []
    for back in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
        sparsifier = Sparsifier(model, GSE(sparsity=0.8, interval=3), 20, count="masked")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier.attach(optimizer)
        train(model, optimizer, 0, 4)
        if back:
            state, weights = sparsifier.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
            train(model, optimizer, 4, 18)
            assert sparsifier.frozen
            sparsifier.load_state_dict(state)
            model.load_state_dict(weights)
        train(model, optimizer, 4, 20)
        runs.append(model[0].weight.detach().clone())
    assert torch.equal(runs[0], runs[1])


def test_an_average_of_the_model_follows_it() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
    sparsifier = Sparsifier(model, GSE(sparsity=0.8, interval=2), 20, count="masked")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    average = AveragedModel(model, avg_fn=lambda old, new, count: new)
    for index in range(6):
        train(model, optimizer, index, index + 1)
        average.update_parameters(model)
        x = torch.randn(4, 20)
        assert torch.equal(average(x), model(x)), index


def test_bad_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="candidates must be above 0; got 0"):
        GSE(sparsity=0.5, candidates=0)
    with pytest.raises(TypeError, match="candidates must be a number; got str"):
        GSE(sparsity=0.5, candidates="all")  # type: ignore[arg-type]
