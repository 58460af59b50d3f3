"""Methods made for N:M patterns: SR-STE and decaying masks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from methods_common import Toy, step
from torch import nn
from torch.nn import functional

from spartan.methods import SRSTE, MaskDecay, Method
from spartan.sparsifier import Sparsifier

RATE = 0.1


pytestmark = pytest.mark.usefixtures("one_thread")


def toy(method: Method, weight: list[float], **optimizer: Any) -> tuple[Toy, Sparsifier, torch.optim.Optimizer]:
    model = Toy(weight)
    sparsifier = Sparsifier(model, method, 10, include="row.weight", count="masked")
    made = torch.optim.SGD(model.parameters(), lr=RATE, **optimizer)
    sparsifier.attach(made)
    return model, sparsifier, made


def test_sr_ste_steps_by_hand() -> None:
    """theta - 0.1 (G + 0.5 (1 - h) theta), h the larger of each two."""
    model, sparsifier, optimizer = toy(SRSTE(pattern=(1, 2), strength=0.5), [4.0, -2.0, 1.0, -1.5])
    assert sparsifier.sparsity == 0.5
    assert model.used == [4.0, 0.0, 0.0, -1.5]
    step(model, optimizer, [1.0, 1.0, -6.0, 1.0])
    assert model.values == [3.9, -2.0, 1.55, -1.6]  # -2 - 0.1 (1 - 1) and 1 - 0.1 (-6 + 0.5)
    step(model, optimizer, [0.0, 0.0, -1.0, 0.0])
    assert model.values == [3.9, -1.9, 1.5725, -1.6]
    step(model, optimizer, [0.0, 0.0, -1.0, 0.0])
    assert model.used == [3.9, 0.0, 0.0, -1.6]  # 1.5725 + 0.1 - 0.078625 = 1.593875 is still less
    step(model, optimizer, [0.0, 0.0, -1.0, 0.0])
    assert model.used == [3.9, 0.0, 1.61418, 0.0]


def test_sr_ste_without_strength_is_dual_averaging_and_decay_follows_the_loss_scale() -> None:
    model, _, optimizer = toy(SRSTE(pattern=(1, 2), strength=0.0), [4.0, -2.0])
    step(model, optimizer, [1.0, 1.0])
    assert model.values == [3.9, -2.1]
    model, _, optimizer = toy(SRSTE(pattern=(1, 2), strength=0.5), [4.0, -2.0], fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model.pull([1.0, 1.0])).backward()
    scaler.step(optimizer)
    assert model.values == [3.9, -2.0]


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("exponential", [1.0, math.exp(-0.5), math.exp(-1.0), math.exp(-1.5), 0.0]),
    ],
)
def test_masks_decay_by_hand(decay: str, factors: list[float]) -> None:
    """Dense up to step 2, decayed up to step 6 of 10; the gradient of what fades is faded alike."""
    method = MaskDecay(pattern=(1, 2), begin=0.2, end=0.6, decay=decay, rate=2.0)
    model, sparsifier, optimizer = toy(method, [4.0, -2.0])
    small = -2.0
    for index, factor in zip(range(2, 7), factors, strict=True):
        while sparsifier.step_count < index:
            step(model, optimizer, [0.0, 0.0])
        assert model.used == pytest.approx([4.0, small * factor], abs=1e-5)
        assert sparsifier.frozen == (factor == 0.0)
        optimizer.zero_grad()
        model.pull([0.0, 1.0]).backward()
        assert model.row.weight.grad.flatten().tolist() == pytest.approx([0.0, factor], abs=1e-6)
        step(model, optimizer, [0.0, 1.0])
        small -= RATE * factor
    assert model.values == [4.0, 0.0]
    assert sparsifier.sparsity == 0.5


def test_what_fades_may_come_back_before_the_mask_is_fixed() -> None:
    model, sparsifier, optimizer = toy(MaskDecay(pattern=(1, 2), end=0.8, decay="linear"), [2.0, -1.9])
    step(model, optimizer, [0.0, 0.0])
    assert model.used == pytest.approx([2.0, -1.9 * 7 / 8], abs=1e-5)
    step(model, optimizer, [0.0, 2.0])
    assert model.used == pytest.approx([2.0 * 6 / 8, -1.9 - 0.2 * 7 / 8], abs=1e-5)
    sparsifier.finalize()
    assert model.values == pytest.approx([0.0, -2.075])


@pytest.mark.parametrize(
    "method",
    [
        SRSTE(),
        SRSTE(pattern=(1, 4), freeze=0.8),
        MaskDecay(),
        MaskDecay(pattern=(1, 8), decay="linear", begin=0.1),
    ],
    ids=lambda m: f"{m.name}-{m.pattern}",
)
def test_training_ends_in_the_pattern_and_resumes(method: Any) -> None:
    def run() -> tuple[nn.Module, Sparsifier, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 3))
        sparsifier = Sparsifier(model, method, 20)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        sparsifier.attach(optimizer)
        return model, sparsifier, optimizer

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
        for index in range(begin, end):
            x = torch.randn(8, 8, 4, 4, generator=torch.Generator().manual_seed(index))
            optimizer.zero_grad()
            functional.cross_entropy(model(x), x[:, :3, 0, 0].argmax(1)).backward()
            optimizer.step()

    first, second = run(), run()
    train(first[0], first[2], 0, 9)
    for mine, theirs in zip(second, first, strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(first[0], first[2], 9, 20)
    train(second[0], second[2], 9, 20)
    n, m = method.pattern
    for model, sparsifier, _ in (first, second):
        sparsifier.finalize()
        for layer in (model[0], model[2]):
            kept = (layer.weight != 0).unflatten(1, (-1, m)).sum(2)
            assert bool((kept == n).all())
    for mine, theirs in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_decay_of_no_steps_masks_at_once() -> None:
    model, sparsifier, _ = toy(MaskDecay(pattern=(1, 2), end=0.0), [4.0, -2.0])
    assert sparsifier.frozen and model.used == [4.0, 0.0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SRSTE(strength=-1.0), ValueError, r"strength must be in \[0, inf\); got -1.0"),
        (lambda: SRSTE(sparsity=0.9), ValueError, r"sparsity must be 0.5 with pattern \(2, 4\); got 0.9"),
        (lambda: MaskDecay(decay="cosine"), ValueError, "decay must be one of linear, exponential; got 'cosine'"),
        (lambda: MaskDecay(begin=0.9), ValueError, r"begin must be at most end \(0.8\); got 0.9"),
        (lambda: MaskDecay(rate="fast"), TypeError, "rate must be a number; got str"),
    ],
)
def test_bad_settings_are_refused_by_name(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
