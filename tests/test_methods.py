"""Each method against its equations, and its settings against their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spartan.methods import DPF, GMP, Dense, DualAveraging, MaskDecay, OneShot, SparseMethod, Spartan, StaticRandom
from spartan.sparsifier import Group, Sparsifier
from spartan_kernels import hard_topk_global, soft_topk_global

pytestmark = pytest.mark.usefixtures("one_thread")


def perceptron(scale: float = 1.0) -> nn.Sequential:
    """Two hidden matrices, (30, 20) and (25, 30), with weights of standard deviation `scale`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 25), nn.ReLU(), nn.Linear(25, 3))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=scale)
    return model


def hidden(model: nn.Sequential) -> list[torch.Tensor]:
    return [model[0].weight.detach(), model[2].weight.detach()]


def advance(sparsifier: Sparsifier, steps: int) -> None:
    for _ in range(steps):
        sparsifier.step()


@pytest.mark.parametrize("units", ["paper", "mean", "threshold"])
def test_spartan_masks_are_the_soft_and_hard_top_k_of_the_schedule(units: str) -> None:
    model = perceptron(0.05)
    method = Spartan(sparsity=0.6, beta=9.0, beta_units=units)
    sparsifier = Sparsifier(model, method, 100, count="masked")
    for step in (5, 10, 40):
        advance(sparsifier, step - sparsifier.step_count)
        kept = 1350 - 810 * min(step / 20, 1)
        beta = 1 + 8 * step / 80
        values = [w.abs() for w in hidden(model)]
        hard = hard_topk_global(values, kept, backend="reference")
        assert all(torch.equal(mask.hard, h) for mask, h in zip(sparsifier.masks().values(), hard, strict=True))
        betas = {
            "paper": [beta],
            "mean": [beta * 1350 / sum(float(v.double().sum()) for v in values)],
            "threshold": [beta / t for t in last_thresholds(values, step)],
        }[units]
        assert any(masks_are(sparsifier, soft_topk_global(values, kept, beta=b)) for b in betas)


def last_thresholds(values: list[torch.Tensor], step: int) -> tuple[float, float]:
    """The last value kept and the first dropped in the step before; the hard threshold may be either."""
    kept = int(1350 - 810 * min((step - 1) / 20, 1))
    order = torch.cat([v.flatten() for v in values]).sort(descending=True).values
    return float(order[kept - 1]), float(order[kept])


def masks_are(sparsifier: Sparsifier, soft: list[torch.Tensor]) -> bool:
    return all(
        torch.allclose(mask.soft, m, rtol=1e-5, atol=1e-6)
        for mask, m in zip(sparsifier.masks().values(), soft, strict=True)
    )


def test_beta_grows_with_the_square_root_of_the_block_size() -> None:
    model = perceptron()
    sparsifier = Sparsifier(model, Spartan.paper(sparsity=0.5, block_size=5, beta=3.0), 100, count="masked")
    advance(sparsifier, 40)
    values = [w.abs().reshape(w.shape[0] // 5, 5, w.shape[1] // 5, 5).sum((1, 3)) for w in hidden(model)]
    costs = [25.0, 25.0]
    soft = soft_topk_global(values, 675, costs, beta=5 * (1 + 2 * 40 / 80), backend="reference")
    for mask, m in zip(sparsifier.masks().values(), soft, strict=True):
        torch.testing.assert_close(mask.soft, m, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("units", ["mean", "threshold"])
def test_relative_units_do_not_depend_on_the_scale_of_the_weights(units: str) -> None:
    masks = []
    for scale in (1.0, 2.0**-7):
        model = perceptron()
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight.mul_(scale)
        sparsifier = Sparsifier(model, Spartan(sparsity=0.6, beta=4.0, beta_units=units), 100)
        advance(sparsifier, 50)
        masks.append(sparsifier.masks())
    for name, mask in masks[0].items():
        torch.testing.assert_close(mask.soft, masks[1][name].soft, rtol=1e-4, atol=1e-6)


def test_spartan_freezes_into_the_weights() -> None:
    model = perceptron()
    sparsifier = Sparsifier(model, Spartan(sparsity=0.6, preserve_scale=False), 100)
    x = torch.randn(7, 20)
    advance(sparsifier, 79)
    assert not sparsifier.frozen
    mask = sparsifier.masks()["0.weight"]
    expected = hidden(model)[0] * mask.soft * mask.hard
    advance(sparsifier, 1)
    assert sparsifier.frozen
    mask = sparsifier.masks()["0.weight"]
    assert torch.equal(mask.soft, torch.ones_like(mask.soft))
    torch.testing.assert_close(hidden(model)[0], expected, rtol=0.1, atol=1e-3)  # beta moved on by one step
    before = model(x)
    advance(sparsifier, 20)
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert bool((model[0].weight.grad[~mask.hard] == 0).all())
    sparsifier.finalize()
    assert torch.equal(model(x), before)


def test_preserve_scale_divides_by_the_mean_kept_mask() -> None:
    weights = []
    for preserve in (False, True):
        model = perceptron()
        sparsifier = Sparsifier(model, Spartan(sparsity=0.6, preserve_scale=preserve), 100)
        advance(sparsifier, 30)
        mask = sparsifier.masks()["2.weight"]
        sparsifier.finalize()
        weights.append(hidden(model)[1])
    kept = mask.hard & (weights[0] != 0)
    ratio = weights[1][kept] / weights[0][kept]
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-5, atol=0.0)
    assert ratio[0] > 1


def test_one_shot_prunes_by_magnitude_at_its_time() -> None:
    model = perceptron()
    before = hidden(model)[0].clone(), hidden(model)[1].clone()
    sparsifier = Sparsifier(model, OneShot(sparsity=0.7, prune_at=0.3), 10, count="masked")
    advance(sparsifier, 2)
    assert sparsifier.sparsity == 0.0
    advance(sparsifier, 1)
    threshold = torch.cat([w.abs().flatten() for w in before]).sort(descending=True).values[404]
    for now, then in zip(hidden(model), before, strict=True):
        assert torch.equal(now, torch.where(then.abs() >= threshold, then, 0.0))


def test_gmp_follows_the_cubic_ramp_and_what_is_removed_stays_removed() -> None:
    model = perceptron()
    method = GMP(sparsity=0.8, begin=0.1, end=0.7, interval=5)
    sparsifier = Sparsifier(model, method, 100, count="masked")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    removed = torch.zeros(30, 20, dtype=torch.bool)
    for step in range(1, 101):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        functional.mse_loss(model(x), x[:, :3]).backward()
        optimizer.step()
        updated = max(10, min(step // 5 * 5, 70))
        expected = 0.8 * (1 - (1 - (updated - 10) / 60) ** 3)
        assert abs(sparsifier.sparsity - expected) <= 1 / 1350, step
        hard = sparsifier.masks()["0.weight"].hard
        assert not bool((hard & removed).any())
        removed |= ~hard


def test_static_random_has_exact_counts_and_its_own_seed() -> None:
    masks = []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        model = perceptron()
        torch.set_rng_state(state)
        sparsifier = Sparsifier(model, StaticRandom(sparsity=0.8, seed=seed), 10, count="masked")
        assert torch.equal(torch.get_rng_state(), state)
        masks.append([mask.hard for mask in sparsifier.masks().values()])
        counts = [int(hard.sum()) for hard in masks[-1]]
        assert sum(counts) == 270
        assert abs(counts[0] / counts[1] - 50 / 55) < 0.02  # ERK: in proportion to the sums of dimensions
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
    assert not torch.equal(masks[0][0], masks[2][0])


def test_static_random_draws_blocks_uniformly_at_ragged_edges_too() -> None:
    kept = torch.zeros(3, 3)
    for seed in range(400):
        model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 2))
        method = StaticRandom(sparsity=0.5, block_size=4, seed=seed)
        kept += next(iter(Sparsifier(model, method, 10, count="masked").masks().values())).hard
    frequency = kept / 400
    assert bool(((frequency > 0.3) & (frequency < 0.7)).all())


@pytest.mark.parametrize(
    "method",
    [
        Spartan(sparsity=0.7, ramp=0.0),
        Spartan(sparsity=0.7, ramp=0.0, anneal=0.0),
        Spartan(sparsity=0.7, block_size=5, ramp=0.0, beta_units="threshold", backward_tolerance=0.1),
        GMP(sparsity=0.7, end=0.0),
        OneShot(sparsity=0.7, prune_at=0.0),
        DualAveraging(sparsity=0.7, ramp=0.0),
        DPF(sparsity=0.7, ramp=0.0),
        MaskDecay(pattern=(3, 10), end=0.0),
    ],
    ids=lambda m: m.name,
)
def test_without_a_ramp_the_first_forward_pass_is_sparse(method: SparseMethod) -> None:
    model = perceptron()
    sparsifier = Sparsifier(model, method, 100, count="masked")
    assert sparsifier.sparsity == pytest.approx(0.7, abs=0.02)
    model(torch.randn(4, 20)).square().sum().backward()
    sparsifier.correct_gradients()


def test_masks_that_are_fixed_from_the_first_step_on_are() -> None:
    for method in (
        Spartan(sparsity=0.7, ramp=0.0, anneal=0.0),
        GMP(sparsity=0.7, end=0.0),
        OneShot(sparsity=0.7, prune_at=0.0),
        DualAveraging(sparsity=0.7, ramp=0.0, freeze=0.0),
        MaskDecay(pattern=(3, 10), end=0.0),
    ):
        model = perceptron()
        sparsifier = Sparsifier(model, method, 100, count="masked")
        assert sparsifier.frozen, method
        model(torch.randn(4, 20)).square().sum().backward()
        for name, mask in sparsifier.masks().items():
            assert bool((model.get_parameter(name).grad[~mask.hard] == 0).all()), method


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Spartan(sparsity=1.0), ValueError, r"sparsity must be in \[0, 1\); got 1.0"),
        (lambda: GMP(sparsity=-0.1), ValueError, r"sparsity must be in \[0, 1\); got -0.1"),
        (lambda: OneShot(sparsity=float("nan")), ValueError, "sparsity must be in"),
        (lambda: Spartan(sparsity="90%"), TypeError, "sparsity must be a number; got str"),
        (lambda: Spartan(sparsity=0.5, block_size=0), ValueError, "block_size must be a positive int"),
        (lambda: Spartan(sparsity=0.5, block_size=(4, 4, 4)), ValueError, "block_size must be"),
        (lambda: Spartan(sparsity=0.5, block_size=True), ValueError, "block_size must be a positive int .* got True"),
        (lambda: Spartan(sparsity=0.5, block_size=(4, True)), ValueError, r"block_size must be .* got \(4, True\)"),
        (lambda: Spartan(sparsity=0.5, block_size=2.5), ValueError, "block_size must be .* got 2.5"),
        (lambda: Spartan(sparsity=0.5, distribution="layer"), ValueError, "distribution must be one of"),
        (lambda: Spartan(sparsity=0.5, beta=-1.0), ValueError, r"beta must be in \[0, inf\); got -1.0"),
        (lambda: Spartan(sparsity=0.5, beta=float("inf")), ValueError, "beta must be in"),
        (lambda: Spartan(sparsity=0.5, beta_units="median"), ValueError, "beta_units must be one of paper, mean, thr"),
        (lambda: Spartan(sparsity=0.5, anneal_shape="cubic"), ValueError, "anneal_shape must be one of linear, cosine"),
        (lambda: Spartan(sparsity=0.5, backward_tolerance=1.0), ValueError, r"backward_tolerance must be in \[0, 1\)"),
        (lambda: Spartan(sparsity=0.5, backward_tolerance="1"), TypeError, "backward_tolerance must be a number"),
        (lambda: Spartan(sparsity=0.5, ramp=0.9), ValueError, r"ramp must be at most anneal \(0.8\); got 0.9"),
        (lambda: Spartan(sparsity=0.5, anneal=1.1), ValueError, r"anneal must be in \[0, 1\]; got 1.1"),
        (lambda: OneShot(sparsity=0.5, prune_at=2), ValueError, r"prune_at must be in \[0, 1\]; got 2"),
        (lambda: GMP(sparsity=0.5, begin=0.9), ValueError, r"begin must be at most end \(0.75\); got 0.9"),
        (lambda: GMP(sparsity=0.5, interval=0), ValueError, "interval must be an int of at least 1 .* got 0"),
        (lambda: StaticRandom(sparsity=0.5, seed="a"), TypeError, "seed must be an int; got str"),
    ],
)
def test_bad_settings_are_refused_by_name(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_methods_name_themselves_and_are_values() -> None:
    assert Dense().name == "Dense"
    assert Spartan(sparsity=0.9) == Spartan(sparsity=0.9)
    assert Spartan(sparsity=0.9, block_size=(2, 3)).settings()["block_size"] == [2, 3]


@pytest.mark.parametrize("kind", [Spartan, GMP, StaticRandom])
def test_layers_named_in_a_dictionary_get_their_own_sparsity(kind: Any) -> None:
    model = perceptron()
    sparsifier = Sparsifier(model, kind(sparsity=0.6, distribution={"2.*": 0.5}), 20, count="masked")
    advance(sparsifier, 20)
    sparsifier.finalize()
    assert [int(w.count_nonzero()) for w in hidden(model)] == [165, 375]  # 375 of 750, the rest of 0.4 * 1350


def test_a_group_may_name_layers_within_its_own_sparsity() -> None:
    model = perceptron()
    group = Group(include=["0.*", "2.*"], sparsity=0.6, distribution={"2.*": 0.5})
    sparsifier = Sparsifier(model, OneShot(sparsity=0.1), 10, include="4.*", count="masked", groups=[group])
    sparsifier.finalize()
    assert [int(w.count_nonzero()) for w in hidden(model)] == [165, 375]


def test_a_dictionary_needs_a_budget_of_its_own() -> None:
    method = OneShot(sparsity=0.5, distribution={"0.*": 0.4})
    with pytest.raises(ValueError, match="distribution must be a name where groups share a budget"):
        Sparsifier(perceptron(), method, 10, groups=[Group(include="2.*", distribution="uniform", block_size=5)])
