"""The gradient of a whole training step against float64 autograd through the exact soft top-k."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from spartan.methods import Spartan
from spartan.sparsifier import Sparsifier
from spartan_kernels.testing import oracle_block_sum, oracle_expand_blocks, oracle_soft_topk

TOTAL_STEPS = 100


pytestmark = pytest.mark.usefixtures("one_thread")


class Network(nn.Module):
    """A convolution and two linear layers; weights of scale 1, so that masks are neither flat nor decided."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3)
        self.first = nn.Linear(7 * 16, 18)
        self.second = nn.Linear(18, 13)
        self.head = nn.Linear(13, 4)
        for weight in (self.conv.weight, self.first.weight, self.second.weight):
            nn.init.normal_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images [n, 3, 6, 6]."""
        x = torch.tanh(self.conv(x) / 5).flatten(1)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x) / 10)) / 4))


def exact_masked(
    weights: dict[str, torch.Tensor], groups: list[list[str]], sparsifier: Sparsifier, block: int
) -> dict[str, torch.Tensor]:
    """w = theta m h with m an exact, differentiable function of all weights of a budget, h straight through."""
    masked = {}
    for members in groups:
        scores = {name: block_scores(weights[name], block) for name in members}
        costs = torch.cat([block_scores(torch.ones_like(weights[name]), block).reshape(-1) for name in members])
        progress = min(sparsifier.step_count / (0.2 * TOTAL_STEPS), 1.0)
        group = next(g for g in sparsifier._masks.groups if g.tensors[0].name == members[0])
        budget = group.capacity + (group.target - group.capacity) * progress
        row = torch.cat([scores[name].reshape(-1) for name in members])
        assert sparsifier.beta is not None
        m = oracle_soft_topk(row, budget, costs, sparsifier.beta * block)
        parts = m.split([scores[name].numel() for name in members])
        for name, part in zip(members, parts, strict=True):
            soft = part.view(scores[name].shape)
            dense = weights[name] * expand(soft, weights[name].shape, block)
            hard = expand(sparsifier.masks()[name].hard, weights[name].shape, block)
            masked[name] = dense + (dense * hard - dense).detach()
    return masked


def block_scores(weight: torch.Tensor, block: int) -> torch.Tensor:
    return weight.abs() if block == 1 else oracle_block_sum(weight.abs(), block)


def expand(grid: torch.Tensor, shape: torch.Size, block: int) -> torch.Tensor:
    return grid if block == 1 else oracle_expand_blocks(grid, shape, block)


@pytest.mark.parametrize(("steps", "micro_batches"), [(7, 1), (70, 3)])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("distribution", ["global", "uniform", "erk"])
def test_gradient_equals_autograd_of_the_exact_operator(
    distribution: str, block: int, steps: int, micro_batches: int
) -> None:
    torch.manual_seed(0)
    model = Network().double()
    plain = copy.deepcopy(model)
    method = Spartan.paper(sparsity=0.6, block_size=block, distribution=distribution, beta=6.0)
    sparsifier = Sparsifier(model, method, TOTAL_STEPS)
    for _ in range(steps):
        sparsifier.step()
    x, y = torch.randn(12, 3, 6, 6, dtype=torch.float64), torch.randint(4, (12,))
    for inputs, labels in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
        (functional.cross_entropy(model(inputs), labels) / micro_batches).backward()
    local = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    sparsifier.correct_gradients()

    parameters = dict(plain.named_parameters())
    names = list(sparsifier.masks())
    groups = [names] if distribution == "global" else [[name] for name in names]
    used = {**parameters, **exact_masked(parameters, groups, sparsifier, block)}
    functional.cross_entropy(torch.func.functional_call(plain, used, x), y).backward()

    corrected = 0.0
    for name, parameter in model.named_parameters():
        exact = parameters[name].grad
        scale = exact.abs().max()
        assert (parameter.grad - exact).abs().max() <= 1e-9 * scale, name
        corrected = max(corrected, float((parameter.grad - local[name]).abs().max() / scale))
    assert corrected > 1e-4  # the coupling term is not negligible here, so its absence would be seen


def test_gradient_of_a_layer_that_took_no_part() -> None:
    """Its weights share the budget, so the loss depends on them although no product uses them."""
    torch.manual_seed(0)
    model = Network().double()
    unused = nn.Linear(9, 11).double()
    both = nn.ModuleDict({"unused": unused, "model": model})
    sparsifier = Sparsifier(both, Spartan.paper(sparsity=0.5, beta=6.0), TOTAL_STEPS)
    for _ in range(30):
        sparsifier.step()
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    assert unused.weight.grad is None
    sparsifier.correct_gradients()
    found = unused.weight.grad

    weights = {name: p.detach().clone().requires_grad_() for name, p in both.named_parameters()}
    masked = exact_masked(weights, [list(sparsifier.masks())], sparsifier, 1)
    used = {k.removeprefix("model."): v for k, v in {**weights, **masked}.items() if k.startswith("model.")}
    torch.func.functional_call(Network().double(), used, x).square().sum().backward()
    exact = weights["unused.weight"].grad
    assert exact.abs().max() > 0
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))


def test_preserve_scale_gradient_is_that_of_a_constant_factor() -> None:
    torch.manual_seed(0)
    model = Network().double()
    plain = copy.deepcopy(model)
    sparsifier = Sparsifier(model, Spartan.paper(sparsity=0.6, beta=6.0, preserve_scale=True), TOTAL_STEPS)
    for _ in range(30):
        sparsifier.step()
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    sparsifier.correct_gradients()

    parameters = dict(plain.named_parameters())
    masked = exact_masked(parameters, [list(sparsifier.masks())], sparsifier, 1)
    for name, mask in sparsifier.masks().items():
        masked[name] = masked[name] / mask.soft[mask.hard].mean()
    torch.func.functional_call(plain, {**parameters, **masked}, x).square().sum().backward()
    for name, parameter in model.named_parameters():
        exact = parameters[name].grad
        torch.testing.assert_close(parameter.grad, exact, rtol=1e-8, atol=1e-9 * float(exact.abs().max()))
