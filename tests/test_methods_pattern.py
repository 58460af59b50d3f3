"""N:M masks in training: each n of m neighbours, exactly, with the gradient of equation (2) in each group."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import spartan
from spartan.methods import (
    DPF,
    GMP,
    IHT,
    SET,
    SRSTE,
    DualAveraging,
    MaskDecay,
    OneShot,
    RigL,
    SparseMethod,
    Spartan,
    StaticRandom,
    TopKAST,
)
from spartan.sparsifier import Sparsifier

MIXED: list[SparseMethod] = [
    Spartan(sparsity=0.75, block_size=(4, 2), beta=4.0, beta_units="threshold"),
    TopKAST(sparsity=0.75, backward_sparsity=0.375, block_size=(4, 2), interval=2),
    GMP(sparsity=0.75, block_size=(4, 2), interval=2),
    StaticRandom(sparsity=0.75, block_size=(4, 2), distribution="global"),
    SRSTE(pattern=None, sparsity=0.75, block_size=(4, 2)),
    MaskDecay(pattern=None, sparsity=0.75, block_size=(4, 2)),
    # The same in other words: blocks are those of a group.
    DualAveraging(pattern=(2, 4)),
]


METHODS: list[SparseMethod] = [
    Spartan(pattern=(2, 4)),
    Spartan(pattern=(1, 4), beta_units="threshold", beta=4.0, preserve_scale=True),
    DualAveraging(pattern=(2, 4)),
    DPF(pattern=(2, 4), interval=2),
    IHT(pattern=(1, 2)),
    GMP(pattern=(2, 4), interval=2),
    OneShot(pattern=(3, 4)),
    StaticRandom(pattern=(2, 4)),
    TopKAST(pattern=(2, 4), backward_sparsity=0.25, interval=2),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 20), nn.ReLU(), nn.Linear(20, 3))


def kept_of_each(weight: torch.Tensor, m: int) -> torch.Tensor:
    return (weight != 0).unflatten(1, (-1, m)).sum(2)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.pattern}")
def test_finished_models_keep_n_of_each_m(method: SparseMethod) -> None:
    model = network()
    sparsifier = Sparsifier(model, method, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer)
    for _ in range(12):
        x = torch.randn(8, 4, 6, 6)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), x[:, :3, 0, 0].argmax(1)).backward()
        optimizer.step()
    sparsifier.finalize()
    n, m = method.pattern or (0, 0)
    for layer in (model[0], model[3]):
        assert bool((kept_of_each(layer.weight, m) == n).all())
    assert sparsifier.sparsity == method.sparsity == 1 - n / m


def mixed(model: nn.Module, method: SparseMethod) -> Sparsifier:
    """2:4 in the convolution, blocks with 75 % zeros in the linear layer."""
    if method.pattern is None:
        group = spartan.Group(include="0.*", pattern=(2, 4))
    else:
        group = spartan.Group(include="3.*", sparsity=0.75, block_size=(4, 2))
    return Sparsifier(model, method, 12, groups=[group], count="masked")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for index in steps:
        x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        functional.cross_entropy(model(x), x[:, :3, 0, 0].argmax(1)).backward()
        optimizer.step()


@pytest.mark.parametrize("method", MIXED, ids=lambda method: method.name)
def test_a_pattern_in_one_part_and_blocks_in_another(method: SparseMethod) -> None:
    ends = []
    for stop in (12, 7):
        model = network()
        sparsifier = mixed(model, method)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sparsifier.attach(optimizer)
        train(model, optimizer, range(stop))
        if stop < 12:  # resumed
            states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, sparsifier)]
            model = network()
            sparsifier = mixed(model, method)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            sparsifier.attach(optimizer)
            for part, state in zip((model, optimizer, sparsifier), states, strict=True):
                part.load_state_dict(state)
            train(model, optimizer, range(stop, 12))
        sparsifier.finalize()
        rows = {row.name: (row.block_size, row.sparsity) for row in sparsifier.report().rows}
        assert rows == {"0.weight": ((1, 1), 0.5), "3.weight": ((4, 2), 0.75)}
        assert bool((kept_of_each(model[0].weight, 4) == 2).all())
        zero = (model[3].weight == 0).unflatten(1, (-1, 2)).unflatten(0, (-1, 4))
        assert torch.equal(zero.all(3).all(1), zero.any(3).any(1))
        assert int(zero.sum()) == 0.75 * zero.numel()
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_groups_may_have_patterns_of_their_own_or_the_method_s() -> None:
    model = network()
    groups = [spartan.Group(include="3.*", pattern=[1, 4]), spartan.Group(include="0.*")]
    Sparsifier(model, OneShot(pattern=(2, 4)), 10, groups=groups).finalize()
    assert bool((kept_of_each(model[0].weight, 4) == 2).all())
    assert bool((kept_of_each(model[3].weight, 4) == 1).all())


def test_sparsity_of_the_rest_does_not_count_a_pattern() -> None:
    model = network()
    group = spartan.Group(include="0.*", pattern=(2, 4))
    Sparsifier(model, OneShot(sparsity=0.5), 10, groups=[group]).finalize()
    rest = sum(parameter.numel() for parameter in model.parameters()) - model[0].weight.numel()
    assert int((model[3].weight == 0).sum()) == round(0.5 * rest)


def test_what_does_not_go_with_the_pattern_of_a_group_is_refused() -> None:
    model, group = network(), spartan.Group(include="0.*", pattern=(2, 4))
    with pytest.raises(ValueError, match="pattern is not for RigL"):
        Sparsifier(model, RigL(sparsity=0.5), 10, groups=[group])
    with pytest.raises(ValueError, match=r"keep_zeros is not for a pattern, .* got pattern \(2, 4\)"):
        Sparsifier(model, GMP(sparsity=0.5), 10, groups=[group], keep_zeros=True)
    with pytest.raises(ValueError, match=r"costs are not for weights with a pattern; '0.weight' has \(2, 4\)"):
        Sparsifier(model, GMP(sparsity=0.5), 10, groups=[group], costs=spartan.FLOPs(torch.randn(1, 4, 6, 6)))
    with pytest.raises(ValueError, match=r"groups\[0\] must have a sparsity of its own to have blocks"):
        Sparsifier(model, GMP(pattern=(2, 4)), 10, groups=[spartan.Group(include="0.*", block_size=2)])
    assert type(model[0]) is nn.Conv2d


def test_top_kast_trains_the_larger_set_of_each_group() -> None:
    model = network()
    sparsifier = Sparsifier(model, TopKAST(pattern=(2, 4), backward_sparsity=0.25), 10)
    model(torch.randn(8, 4, 6, 6)).square().sum().backward()
    sparsifier.correct_gradients()
    assert bool((kept_of_each(model[3].weight.grad, 4) <= 3).all())
    largest = spartan.sparsity_pattern(model[3].weight.detach(), 3, 4)
    assert torch.equal(model[3].weight.grad, model[3].weight.grad * largest)


def test_hard_masks_are_those_of_a_hand_made_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -1.0, 2.0, -4.0], [1.0, 1.0, 1.0, 1.0]]))
    sparsifier = Sparsifier(model, OneShot(pattern=(2, 4), prune_at=0.0), 10)
    sparsifier.finalize()
    assert model[0].weight.tolist() == [[3.0, 0.0, 0.0, -4.0], [1.0, 1.0, 0.0, 0.0]]


def test_the_budget_of_each_group_shrinks_along_the_ramp() -> None:
    model = network()
    sparsifier = Sparsifier(model, Spartan(pattern=(2, 4)), 100)
    seen = {}
    for step in range(1, 30):
        sparsifier.step()
        mask = sparsifier.masks()["3.weight"]
        sums = mask.soft.double().unflatten(1, (-1, 4)).sum(2)
        expected = 4 - 2 * min(step / 20, 1)
        torch.testing.assert_close(sums, torch.full_like(sums, expected), rtol=1e-6, atol=0)
        seen[step] = set(kept_of_each(mask.hard, 4).flatten().tolist())
    assert (seen[1], seen[10], seen[19], seen[20], seen[29]) == ({3}, {3}, {2}, {2}, {2})


@pytest.mark.parametrize("units", ["paper", "threshold"])
def test_the_gradient_is_equation_2_in_each_group(units: str) -> None:
    model = network().double()
    beta = 30.0 if units == "paper" else 4.0
    sparsifier = Sparsifier(model, Spartan(pattern=(2, 4), beta=beta, beta_units=units, preserve_scale=False), 100)
    for _ in range(50):
        sparsifier.step()
    x, target = torch.randn(8, 4, 6, 6, dtype=torch.float64), torch.randint(3, (8,))
    for part in (x[:3], x[3:]):  # accumulated
        functional.cross_entropy(model(part), target[: len(part)], reduction="sum").backward()
    sparsifier.correct_gradients()

    twin = network().double()
    for index in (0, 3):
        theta = twin[index].weight.detach().clone().requires_grad_()
        mask = sparsifier.masks()[f"{index}.weight"]
        sharpness = model[index].mask_beta
        soft = spartan.sparsity_pattern(theta, 2, 4, dim=1, beta=sharpness)
        torch.testing.assert_close(soft, mask.soft, rtol=1e-9, atol=1e-12)
        scaled = theta * soft
        weight = scaled + (scaled * mask.hard - scaled).detach()  # straight through h
        del twin[index].weight
        twin[index].weight = weight
        twin[index].theta = theta
    for part in (x[:3], x[3:]):
        loss = functional.cross_entropy(twin(part), target[: len(part)], reduction="sum")
        loss.backward(retain_graph=True)
    for index in (0, 3):
        torch.testing.assert_close(model[index].weight.grad, twin[index].theta.grad, rtol=1e-7, atol=1e-12)


def test_threshold_units_do_not_depend_on_the_scale_of_the_weights() -> None:
    masks = []
    for scale in (1.0, 2.0**-7):
        model = network()
        with torch.no_grad():
            model[3].weight.mul_(scale)
        sparsifier = Sparsifier(model, Spartan(pattern=(2, 4), beta=4.0, beta_units="threshold"), 100)
        for _ in range(40):
            sparsifier.step()
        masks.append(sparsifier.masks()["3.weight"].soft)
    torch.testing.assert_close(masks[0], masks[1], rtol=1e-4, atol=1e-6)


def test_training_resumes_bit_for_bit() -> None:
    def run(sparsifier: Sparsifier, model: nn.Module, steps: range) -> None:
        for index in steps:
            x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(index))
            model.zero_grad()
            model(x).square().mean().backward()
            sparsifier.correct_gradients()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)
            sparsifier.step()

    method = Spartan(pattern=(2, 4), beta=4.0, beta_units="threshold")
    whole, half, again = network(), network(), network()
    run(Sparsifier(whole, method, 20), whole, range(20))
    first = Sparsifier(half, method, 20)
    run(first, half, range(9))
    second = Sparsifier(again, method, 20)
    again.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict())
    run(second, again, range(9, 20))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Spartan(pattern=(4, 4)), ValueError, r"pattern must be a pair \(n, m\) of ints with 1 <= n < m"),
        (lambda: Spartan(pattern=2), ValueError, "pattern must be a pair"),
        (lambda: Spartan(pattern=(2.0, 4)), ValueError, "pattern must be a pair"),
        (lambda: Spartan(pattern=(2, 4), sparsity=0.9), ValueError, r"sparsity must be 0.5 with pattern \(2, 4\)"),
        (lambda: Spartan(pattern=(2, 4), block_size=4), ValueError, "block_size must be 1 with pattern"),
        (lambda: RigL(pattern=(2, 4)), ValueError, "pattern is not for RigL"),
        (lambda: SET(pattern=(2, 4)), ValueError, "pattern is not for SET"),
        (lambda: Spartan(), TypeError, "sparsity must be a number; got NoneType"),
    ],
)
def test_settings_are_validated(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_weight_that_does_not_divide_is_refused_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"weight '1.weight' of shape \(5, 6\) does not divide into groups of 4"):
        Sparsifier(model, Spartan(pattern=(2, 4)), 10)
    assert type(model[0]) is nn.Linear
    Sparsifier(model, Spartan(pattern=(2, 4)), 10, exclude="1.weight")


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = network()
    sparsifier = Sparsifier(model, Spartan(pattern=(2, 4)), 10)
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weight '3.weight' must be finite; 1 of its entries"):
        sparsifier.step()
