"""Weights that are several matrices, [experts, out, in]: each is masked as a matrix of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spartan import GMP, DualAveraging, FLOPs, OneShot, RigL, Sparsifier, Spartan, StaticRandom

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS, OUT, IN = 3, 8, 12


class Experts(nn.Module):
    """Each input goes through the expert of its place; the weight is read once for each."""

    def __init__(self, out: int = OUT, columns: int = IN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, out, columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y of x [n, experts, in]."""
        return torch.stack([functional.linear(x[:, i], self.weight[i]) for i in range(EXPERTS)], 1)


class ExpertsByInputs(nn.Module):
    """Stored as [experts, in, out], as transformers says by `is_transposed`."""

    is_transposed, num_experts = True, EXPERTS

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, IN, OUT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y of x [n, experts, in]."""
        return torch.einsum("nei,eio->neo", x, self.weight)


def expanded(mask: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    return mask.repeat_interleave(block[0], 1)[:, : shape[1]].repeat_interleave(block[1], 2)[:, :, : shape[2]]


@pytest.mark.parametrize("block", [(1, 1), (4, 3), (5, 5), (16, 16)])  # dividing, ragged, larger than a matrix
def test_each_expert_has_masks_of_its_own_over_its_last_two_dimensions(block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = Experts()
    plain = copy.deepcopy(model)
    method = StaticRandom(sparsity=0.5, block_size=block)
    sparsifier = Sparsifier(model, method, 10, include="*", count="masked")
    hard = sparsifier.masks()["weight"].hard
    grid = (EXPERTS, -(-OUT // block[0]), -(-IN // block[1]))
    assert hard.shape == grid and 0 < int(hard.sum()) < hard.numel()
    keep = expanded(hard, block, plain.weight.shape)
    with torch.no_grad():
        plain.weight.mul_(keep)
    x = torch.randn(7, EXPERTS, IN)
    y, expected = model(x), plain(x)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    sparsifier.finalize()
    assert torch.equal(model.weight, plain.weight)
    assert model.weight.grad is not None and plain.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, plain.weight.grad * keep)


@pytest.mark.parametrize("block", [(1, 1), (4, 3), (5, 5)])
def test_a_stack_trains_as_its_matrices_one_by_one(block: tuple[int, int]) -> None:
    """Masks, budgets and gradients of Spartan are those of as many linear layers under the same budget."""

    class Apart(nn.Module):
        def __init__(self, stack: Experts) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(IN, OUT, bias=False) for _ in range(EXPERTS))
            for layer, weight in zip(self.layers, stack.weight, strict=True):
                layer.weight.data.copy_(weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([layer(x[:, i]) for i, layer in enumerate(self.layers)], 1)

    torch.manual_seed(0)
    stack = Experts().double()
    apart = Apart(stack).double()
    for model in (stack, apart):
        sparsifier = Sparsifier(model, Spartan(sparsity=0.6, block_size=block), 20, include="*", count="masked")
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        sparsifier.attach(optimizer)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            x = torch.randn(16, EXPERTS, IN, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            (model(x) - x[..., :OUT]).square().mean().backward()
            optimizer.step()
        sparsifier.finalize()
    assert abs(float((stack.weight == 0).double().mean()) - 0.6) < block[0] * block[1] / stack.weight.numel() + 1e-9
    torch.testing.assert_close(stack.weight, torch.stack([layer.weight for layer in apart.layers]))


def test_patterns_run_along_the_inputs_of_each_expert() -> None:
    torch.manual_seed(0)
    for model, dim in ((Experts(), -1), (ExpertsByInputs(), -2)):
        sparsifier = Sparsifier(model, GMP(pattern=(2, 4)), 4, include="*")
        sparsifier.finalize()
        groups = (model.weight != 0).movedim(dim, -1).unflatten(-1, (-1, 4))
        assert bool((groups.sum(-1) == 2).all())
    with pytest.raises(ValueError, match=r"'weight' of shape \(8, 10\) does not divide into groups of 4"):
        Sparsifier(Experts(OUT, 10), GMP(pattern=(2, 4)), 4, include="*")


def test_blocks_of_experts_stored_by_inputs_are_of_outputs_and_inputs() -> None:
    model = ExpertsByInputs()
    sparsifier = Sparsifier(model, OneShot(sparsity=0.5, block_size=(4, 3)), 4, include="*", count="masked")
    assert sparsifier.masks()["weight"].hard.shape == (EXPERTS, IN // 3, OUT // 4)
    sparsifier.finalize()
    blocks = (model.weight == 0).unflatten(2, (-1, 4)).unflatten(1, (-1, 3))
    assert torch.equal(blocks.all((2, 4)), blocks.amax((2, 4)))


def test_erk_gives_experts_the_density_of_linear_layers_of_their_shape() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts(64, 96)
            self.linear = nn.Linear(96, 64)

    sparsifier = Sparsifier(
        Both(), OneShot(sparsity=0.8, distribution="erk"), 4, include=["experts.*", "linear.weight"], count="masked"
    )
    sparsifier.finalize()
    zeros = [float((weight == 0).double().mean()) for weight in sparsifier.model.parameters() if weight.dim() > 1]
    assert zeros[0] == pytest.approx(zeros[1], abs=1e-3) and zeros[0] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("block", [(4, 3), (5, 5)])
def test_costs_of_blocks_of_a_stack_have_the_shape_of_its_masks(block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    asked = []

    def costs(name: str, module: nn.Module, grid: tuple[int, ...]) -> torch.Tensor:
        asked.append(grid)
        price = torch.ones(grid)
        price[1] = 100.0  # the second expert is dear
        return price

    model = Experts()
    method = OneShot(sparsity=0.7, block_size=block)
    sparsifier = Sparsifier(model, method, 4, include="*", costs=costs)
    assert asked == [tuple(sparsifier.masks()["weight"].hard.shape)]
    sparsifier.finalize()
    assert float((model.weight[1] == 0).double().mean()) > 0.6
    assert not bool((model.weight[[0, 2]] == 0).any())
    Sparsifier(Experts(), method, 4, include="*", costs=FLOPs(torch.randn(2, EXPERTS, IN)))


@pytest.mark.parametrize("method", [Spartan, DualAveraging, RigL, GMP])
def test_training_on_stacks_resumes_bit_for_bit(method: Any) -> None:
    def start() -> tuple[Experts, Sparsifier, Any]:
        torch.manual_seed(0)
        model = Experts()
        options = {} if method is Spartan else {"interval": 2}
        sparsifier = Sparsifier(model, method(sparsity=0.6, block_size=(5, 5), **options), 12, include="*")
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        sparsifier.attach(optimizer)
        return model, sparsifier, optimizer

    def go(model: Experts, optimizer: Any, steps: range) -> None:
        for step in steps:
            x = torch.randn(16, EXPERTS, IN, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(x) - x[..., :OUT]).square().mean().backward()
            optimizer.step()

    model, sparsifier, optimizer = start()
    go(model, optimizer, range(7))
    saved = copy.deepcopy([part.state_dict() for part in (model, sparsifier, optimizer)])
    go(model, optimizer, range(7, 12))
    others = start()
    for part, state in zip(others, saved, strict=True):
        part.load_state_dict(state)
    go(others[0], others[2], range(7, 12))
    sparsifier.finalize()
    others[1].finalize()
    assert torch.equal(model.weight, others[0].weight)


def test_a_forward_pass_masks_a_weight_once_however_often_it_reads_it() -> None:
    model = Experts()
    sparsifier = Sparsifier(model, StaticRandom(sparsity=0.5), 4, include="*")
    calls = []
    carrier = model.masks_of_weight
    carrier.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, EXPERTS, IN)
    model(x)
    assert len(calls) == 1
    before = model(x).detach()
    sparsifier.masks()["weight"].hard.zero_()
    assert not torch.equal(model(x), before) and bool((model(x) == 0).all())  # nothing is kept from pass to pass
    with torch.no_grad():
        assert not model.weight.requires_grad
    assert model.weight.requires_grad
    sparsifier.finalize()
    assert type(model) is Experts


def test_the_report_of_a_stack_says_what_changed() -> None:
    sparsifier = Sparsifier(Experts(), OneShot(sparsity=0.5, block_size=(4, 3)), 4, include="*")
    sparsifier.report()
    sparsifier.masks()["weight"].hard[0] = False
    row = sparsifier.report().rows[0]
    assert row.shape == (EXPERTS, OUT, IN) and row.churn == pytest.approx(1 / 3)
