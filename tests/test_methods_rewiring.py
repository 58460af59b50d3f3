"""SET and RigL: what is dropped, what is grown, and what the optimizer keeps of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from methods_common import Toy, hard
from torch import nn
from torch.nn import functional

from spartan.methods import GSE, SET, RigL
from spartan.sparsifier import Sparsifier

pytestmark = pytest.mark.usefixtures("one_thread")


def set_masks(sparsifier: Sparsifier, kept: list[bool]) -> None:
    """Replace the random first masks, so that the answer is known by hand."""
    hard(sparsifier).copy_(torch.tensor([kept]))


def rigl_toy(weight: list[float], kept: list[bool], **settings: Any) -> tuple[Toy, Sparsifier]:
    model = Toy(weight)
    method = RigL(sparsity=0.5, fraction=1.0, **settings)
    sparsifier = Sparsifier(model, method, 8, include="row.weight", count="masked")
    set_masks(sparsifier, kept)
    with torch.no_grad():
        model.row.weight.copy_(torch.tensor([weight]) * torch.tensor([kept]))
    return model, sparsifier


def test_rigl_steps_by_hand() -> None:
    """T = 6: after step 2 the share 1/2 (1 + cos(pi/3)) = 3/4 of two weights goes: round(1.5) = 2."""
    model, sparsifier = rigl_toy([3.0, 0.1, 9.0, 9.0], [True, True, False, False], interval=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model.pull([0.0, 0.0, 5.0, 5.0]).backward()
    assert model.row.weight.grad.tolist() == [[0.0, 0.0, 0.0, 0.0]]  # not the step before a change: kept blocks alone
    optimizer.step()
    assert hard(sparsifier).tolist() == [[True, True, False, False]]
    optimizer.zero_grad()
    model.pull([1.0, 2.0, -4.0, 0.5]).backward()
    optimizer.step()
    # Both are dropped; of gradients 1, 2, 4, 0.5 the second and third are grown: the second stays as it is.
    assert hard(sparsifier).tolist() == [[False, True, True, False]]
    assert model.values == [0.0, -0.1, 0.0, 0.0]
    optimizer.zero_grad()
    model.pull([1.0, 1.0, 1.0, 1.0]).backward()
    optimizer.step()
    assert model.values == [0.0, -0.2, -0.1, 0.0]


def test_rigl_brings_back_what_it_dropped_before_weights_without_a_gradient() -> None:
    model, sparsifier = rigl_toy([9.0, 9.0, 3.0, 0.1], [False, False, True, True], interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model.pull([0.0, 0.0, 0.0, 0.0]).backward()
    optimizer.step()
    assert hard(sparsifier).tolist() == [[False, False, True, True]]
    assert model.values == [0.0, 0.0, 3.0, 0.1]
    optimizer.zero_grad()
    model.pull([0.0, 1e-12, 0.0, 0.0]).backward()
    optimizer.step()
    assert hard(sparsifier).tolist() == [[False, True, True, False]]


def test_rigl_scores_on_the_accumulated_gradient() -> None:
    """Micro-batches of opposite sign cancel: the last alone, or the sum of magnitudes, would grow the third."""
    model, sparsifier = rigl_toy([3.0, 0.1, 9.0, 9.0], [True, True, False, False], interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    model.pull([0.0, 0.0, 10.0, 1.0]).backward()
    model.pull([0.0, 0.0, -10.0, 1.0]).backward()
    optimizer.step()
    assert bool(hard(sparsifier)[0, 3]) and not bool(hard(sparsifier)[0, 2])


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_rigl_resets_the_moments_of_grown_weights_alone(name: str) -> None:
    model, sparsifier = rigl_toy([3.0, 2.0, 9.0, 9.0], [True, True, False, False], interval=2)
    settings: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {"amsgrad": True}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.0, **settings)
    state = optimizer.state[model.row.weight]
    sparsifier.attach(optimizer)
    for pull in ([1.0, 1.0, 0.0, 0.0], [3.0, 1.0, 2.0, 0.5]):
        optimizer.zero_grad()
        model.pull(pull).backward()
        for value in state.values():
            if value.dim():
                value[0, 2:] = 7.0  # from when they were last trained
        optimizer.step()
    assert hard(sparsifier).tolist() == [[True, False, True, False]]
    moments = {key: value for key, value in state.items() if value.dim()}
    assert len(moments) == (1 if name == "SGD" else 3)
    for key, moment in moments.items():
        if key == "exp_avg_sq":  # that of the settled weight, more than two gradients of 2 would have made it
            assert float(moment[0, 2]) == pytest.approx(float(moment[0, 0]))
            assert float(moment[0, 2]) > (1 - 0.999**2) * 2.0**2
        else:
            assert moment[0, 2] == 0
        assert bool((moment[0, [0, 1, 3]] != 0).all())


def test_rigl_by_hand_asks_for_the_optimizer() -> None:
    model, sparsifier = rigl_toy([3.0, 2.0, 9.0, 9.0], [True, True, False, False], interval=1)
    optimizer = torch.optim.Adam(model.parameters())
    model.pull([1.0, 1.0, 1.0, 1.0]).backward()
    sparsifier.correct_gradients()
    optimizer.step()
    with pytest.raises(ValueError, match=r"RigL resets the optimizer's moments .* by hand step\(optimizer\)"):
        sparsifier.step()
    sparsifier.step(optimizer)


def test_rigl_leaves_masks_alone_where_a_fused_optimizer_skips() -> None:
    model, sparsifier = rigl_toy([3.0, 2.0, 9.0, 9.0], [True, True, False, False], interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.pull([1.0, 1.0, math.inf, 1.0])).backward()
    scaler.step(optimizer)
    scaler.update()
    assert hard(sparsifier).tolist() == [[True, True, False, False]]
    optimizer.zero_grad()
    scaler.scale(model.pull([1.0, 1.0, 0.0, 9.0])).backward()
    scaler.step(optimizer)
    assert bool(hard(sparsifier)[0, 3])


@pytest.mark.parametrize("kind", [SET, RigL, GSE])
@pytest.mark.parametrize("block", [1, 4])
def test_budgets_stay_exact_and_shares_follow_the_cosine(kind: Any, block: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 26), nn.ReLU(), nn.Linear(26, 3))
    sparsifier = Sparsifier(model, kind(sparsity=0.75, block_size=block, interval=4, fraction=0.5), 40, count="masked")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    first = {name: int(mask.hard.sum()) for name, mask in sparsifier.masks().items()}
    assert 0 <= sparsifier.sparsity - 0.75 < block * block / 1472
    for index in range(1, 41):
        old = {name: mask.hard.clone() for name, mask in sparsifier.masks().items()}
        values = {name: model.get_parameter(name).detach().clone() for name in old}
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        functional.mse_loss(model(x), x[:, :3]).backward()
        optimizer.step()
        changed = lost = 0
        for tensor in sparsifier._masks.tensors:
            new, was = tensor.carrier.mask_hard, old[tensor.name]
            if block == 1:
                assert int(new.sum()) == first[tensor.name]
            grown = tensor.expand(new & ~was)
            changed += int(grown.sum())
            lost += int(tensor.expand(was & ~new).sum())
            assert bool((tensor.weight[grown] == 0).all())
            if bool((new != was).any()):
                assert bool((tensor.weight[tensor.expand(~new)] == 0).all())
                if block == 1:
                    kept = values[tensor.name][was].abs()  # before the step, so lr bounds how far the order moved
                    smallest = values[tensor.name][was & ~new].abs()
                    assert smallest.max() <= kept.sort().values[round(0.5 * len(kept))] + 0.02
        share = 0.25 * (1 + math.cos(math.pi * index / 30))
        if index % 4 == 0 and index < 30:
            assert lost <= share * 368 + 2 * block * block  # a block more than its share at most, of each layer
            # Where a single block of each layer is dropped, RigL may choose both again.
            assert changed > 0 or (kind is RigL and block > 1 and index >= 24)
        else:
            assert changed == 0
        assert 0 <= sparsifier.sparsity - 0.75 < block * block / 1472
    assert sparsifier.frozen


def test_set_grows_uniformly_and_by_its_own_seed() -> None:
    grown = torch.zeros(1, 40)
    for seed in range(300):
        model = Toy([1.0] * 40)
        method = SET(sparsity=0.5, fraction=0.5, interval=1, seed=seed)
        sparsifier = Sparsifier(model, method, 100, include="row.weight", count="masked")
        set_masks(sparsifier, [True] * 20 + [False] * 20)
        nn.init.ones_(model.row.weight)
        state = torch.get_rng_state()
        sparsifier.step(torch.optim.SGD(model.parameters()))
        assert torch.equal(torch.get_rng_state(), state)
        grown += hard(sparsifier)
    # Of 20 equal weights the 10 of lowest index stay (f = 1/2 at first); 10 of the other 30 are grown.
    assert bool((grown[0, :10] == 300).all())
    frequency = grown[0, 10:] / 300
    assert bool(((frequency > 0.2) & (frequency < 0.47)).all())


def test_set_draws_differ_from_step_to_step_and_repeat_with_the_seed() -> None:
    runs = []
    for seed in (0, 0, 1):
        model = Toy([1.0] * 40)
        method = SET(sparsity=0.5, fraction=1.0, interval=1, seed=seed)
        sparsifier = Sparsifier(model, method, 100, include="row.weight", count="masked")
        optimizer = torch.optim.SGD(model.parameters())
        masks = []
        for _ in range(3):
            sparsifier.step(optimizer)
            masks.append(hard(sparsifier).clone())
        runs.append(torch.stack(masks))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RigL(sparsity=0.5, fraction=1.5), ValueError, r"fraction must be in \[0, 1\]; got 1.5"),
        (lambda: SET(sparsity=0.5, interval=0), ValueError, "interval must be an int of at least 1 .* got 0"),
        (lambda: SET(sparsity=0.5, end=-1), ValueError, r"end must be in \[0, 1\]; got -1"),
        (lambda: SET(sparsity=0.5, seed=0.5), TypeError, "seed must be an int; got float"),
    ],
)
def test_bad_settings_are_refused_by_name(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
